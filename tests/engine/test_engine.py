"""Every draw is a function of its key and the sample's index alone, and has the distribution it claims."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from phased_dmd.engine.randomness import choice, generators, normal, seed_of, splitmix64, uniform

KEY = (3, 1, 250, 4)  # run seed, phase, iteration, sub-update


def test_seed_is_blake2b_of_the_key() -> None:
    """From `printf "(0, 1, 2, 'fake')" | b2sum -l 64`: the digest read as a little-endian number, halved."""
    digest = "7e84f6c9dfab9f3c"
    assert seed_of(0, 1, 2, "fake") == int.from_bytes(bytes.fromhex(digest), "little") // 2


def test_samples_are_seeded_by_splitmix64() -> None:
    """The published outputs of SplitMix64 from seed 1234567; sample i has the (i + 1)-th of its key's seed, halved."""
    stream = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821
    ]  # fmt: skip
    assert [splitmix64(1234567, i) for i in range(5)] == stream
    halves = [splitmix64(seed_of(*KEY), i) // 2 for i in range(5)]
    assert [rng.initial_seed() for rng in generators(range(5), *KEY)] == halves
    assert [rng.initial_seed() for rng in generators([4, 0], *KEY)] == [halves[4], halves[0]]


def test_seeds_alike_in_their_lower_half_give_distinct_draws() -> None:
    """torch's own generator takes only 32 bits of a seed: these would all draw the same without mixing."""
    seeds = [splitmix64(seed, i) >> 1 for seed in (7, 7 + 2**32, 7 + 2**50, 7 + 2**62) for i in range(3)]
    draws = torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    assert len(draws.unique(dim=0)) == 12


@pytest.mark.parametrize("cut", [1, 3, 7])
@pytest.mark.parametrize("shape", [(2,), (3, 5, 7), (1,)])
def test_a_split_batch_draws_the_same_samples(cut: int, shape: tuple[int, ...]) -> None:
    whole = normal(shape, range(8), *KEY, "start")
    parts = [normal(shape, part, *KEY, "start") for part in (range(cut), range(cut, 8))]
    assert torch.equal(torch.cat(parts), whole)
    order = [5, 0, 7, 2]
    assert torch.equal(normal(shape, order, *KEY, "start"), whole[order])
    times = uniform(range(8), *KEY, "t")
    assert torch.equal(torch.cat([uniform(range(cut), *KEY, "t"), uniform(range(cut, 8), *KEY, "t")]), times)


def test_draws_neither_read_nor_disturb_the_global_generator() -> None:
    def everything() -> tuple[Tensor, Tensor, int]:
        return normal((4,), range(3), *KEY, "eps"), uniform(range(3), *KEY, "t"), choice(1000, *KEY, "exit")

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = everything()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = everything()
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]) and first[2] == second[2]


def test_normal_has_the_moments_of_a_standard_normal() -> None:
    """Bounds of five standard errors: 1/n for the mean, 2/n for the variance, 96/n for the fourth moment."""
    x = normal((16,), range(4096), *KEY, "start").double()
    n = x.numel()
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    mean = x.mean(0)  # of each of a sample's elements, over the samples
    assert mean.abs().max() < 5 / math.sqrt(len(x))


def test_neighbouring_samples_and_roles_are_independent() -> None:
    """Correlations of n pairs stay within five standard errors, 5/sqrt(n)."""
    x, other_role = normal((16,), range(2048), *KEY, "start"), normal((16,), range(2048), *KEY, "eps")
    next_iteration = normal((16,), range(2048), 3, 1, 251, 4, "start")
    for a, b in ((x[:-1], x[1:]), (x, other_role), (x, next_iteration), (x[:, :-1], x[:, 1:])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(a.numel())


def test_uniform_is_uniform_on_the_unit_interval() -> None:
    """Kolmogorov-Smirnov: sqrt(n) D exceeds 1.95 once in a thousand; consecutive samples uncorrelated."""
    u = uniform(range(4000), *KEY, "t")
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    grid = torch.arange(1, len(u) + 1, dtype=torch.float64) / len(u)
    distance = (u.sort().values - grid).abs().max() + 1 / len(u)
    assert distance * math.sqrt(len(u)) < 1.95
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 5 / math.sqrt(len(u))


def test_choice_is_uniform() -> None:
    """Pearson's chi-squared of 3000 draws over 3 values: 13.8 is exceeded once in a thousand (2 degrees)."""
    counts = torch.bincount(torch.tensor([choice(3, 0, 1, i, 0, "exit") for i in range(3000)]))
    assert len(counts) == 3
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 13.8
    assert {choice(1, 0, 1, i, 0, "exit") for i in range(10)} == {0}


def test_distinct_keys_give_distinct_draws() -> None:
    roles = ("start", "eps", "renoise", "t", "prompt")
    keys = list(itertools.product((0, 1), (1, 2), (0, 1, 10), (0, 1, 5), roles))
    keys += [(0, 1, 1, 1, "renoise", 0), (0, 1, 1, 1, "renoise", 1), (0, 11, 1, "start"), (0, 1, 11, "start")]
    draws = torch.cat([normal((2,), range(20), *key) for key in keys])
    assert len(draws.unique(dim=0)) == len(keys) * 20
    assert seed_of(1, 2) != seed_of("1", 2) != seed_of(12)


def test_a_large_batch_repeats_no_sample() -> None:
    assert len(normal((2,), range(5000), *KEY, "start").unique(dim=0)) == 5000
