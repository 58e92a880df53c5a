"""Stateless randomness: every draw is a function of its key, and of the sample's index."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio


def seed_of(*key: int | str) -> int:
    """A 63-bit seed that depends on nothing but the key: (run seed, phase, iteration, sub-update, role)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the key."""
    return torch.Generator().manual_seed(seed_of(*key))


def generators(samples: Sequence[int], *key: int | str) -> Iterator[torch.Generator]:
    """For each sample a generator seeded by the key and the sample's index; use each before taking the next.

    SplitMix64 of both: the Mersenne twister behind torch's generator takes only the seed's lower 32 bits.
    """
    seed, rng = seed_of(*key), torch.Generator()
    for sample in samples:
        mixed = (seed + GOLDEN * (sample + 1)) % 2**64
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        yield rng.manual_seed((mixed ^ mixed >> 31) >> 1)


def normal(shape: Sequence[int], samples: Sequence[int], *key: int | str) -> Tensor:
    """Standard normal noise [len(samples), *shape]."""
    return torch.stack([torch.randn(*shape, generator=rng) for rng in generators(samples, *key)])


def uniform(samples: Sequence[int], *key: int | str) -> Tensor:
    """Uniform numbers in [0, 1), float64 [len(samples)]."""
    return torch.cat([torch.rand(1, generator=rng, dtype=torch.float64) for rng in generators(samples, *key)])


def choice(count: int, *key: int | str) -> int:
    """One integer in [0, count), the same on every rank."""
    return int(torch.randint(count, (1,), generator=generator(*key)))
