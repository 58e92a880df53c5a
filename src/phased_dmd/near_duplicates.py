"""Prompts that say nearly the same as one before them: shingles, compared where MinHash says that it is worth it.

The similarity of two texts is the Jaccard index of their shingles, the runs of five characters in them once letters are
small, and marks and spaces are one space. It needs no words, and so serves languages that part none.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ALIKE = 0.8  # the similarity from which on two texts are nearly the same
SHINGLE = 5  # characters
BANDS, ROWS = 20, 6  # of MinHash: texts of similarity .8 share a band with probability .998, of .5 with .27
LATEST = 50  # texts of a band that one is compared with, where a template makes many a little alike
UNLIKE = 0.65  # of the hashes in common: texts of similarity .8 have fewer once in 30,000
MARKS = re.compile(r"[\W_]+")
Hashes = NDArray[np.uint64]
BASE, MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)  # odd numbers whose bits look random


def normalised(text: str) -> str:
    """Returns a text in small letters, compatible forms as one, and all that is no letter or digit as one space."""
    return MARKS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def shingles(text: str) -> Hashes:
    """Returns the distinct hashes of a normalised text's shingles, sorted; of a shorter text that of all of it."""
    points = np.frombuffer(text.ljust(SHINGLE, "\0").encode("utf-32-le"), np.uint32).astype(np.uint64)
    count = len(points) - SHINGLE + 1
    found = np.zeros(count, np.uint64)
    for i in range(SHINGLE):
        found = (found + points[i : i + count] + np.uint64(1)) * BASE
    found ^= found >> np.uint64(31)
    return np.unique(found * MIX)


def jaccard(a: Hashes, b: Hashes) -> float:
    """Returns the share of two sets' elements that are in both, 0 to 1."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def near_duplicates(texts: Sequence[str]) -> dict[int, int]:
    """Returns for each text, by its index, that is nearly one before it, which one: one that is none of them itself.

    texts: normalised. Pairs are found by MinHash, with a probability of .998 at the least similarity and more above it.
    """
    signatures = np.array([signature(shingles(text)) for text in texts]).reshape(-1, BANDS * ROWS)
    places = _shared(signatures)
    kept: dict[tuple[int, int], list[int]] = defaultdict(list)  # by band, and group of equal ones
    found: dict[int, int] = {}
    for i, groups in enumerate(places):
        own = [(band, group) for band, group in enumerate(groups) if group >= 0]
        near = np.array(sorted({j for place in own for j in kept[place][-LATEST:]}), np.int64)
        likely: list[int] = near[(signatures[near] == signatures[i]).mean(1) >= UNLIKE].tolist()
        same = next((j for j in likely if jaccard(shingles(texts[i]), shingles(texts[j])) >= ALIKE), None)
        if same is not None:
            found[i] = same
            continue
        for place in own:
            kept[place].append(i)
    return found


def signature(hashes: Hashes) -> NDArray[np.uint32]:
    """Returns the MinHash of a set, [BANDS ROWS]: two sets agree in each with a probability of their Jaccard index."""
    return (hashes[None] * FACTORS >> np.uint64(32)).min(1).astype(np.uint32)


FACTORS = np.random.default_rng(0).integers(0, 2**63, (BANDS * ROWS, 1), np.uint64) * np.uint64(2) + np.uint64(1)


def _shared(signatures: NDArray[np.uint32]) -> list[list[int]]:
    """Returns for each text and band the number of its group, of those that are equal there; -1 where it is alone."""
    powers = BASE ** np.arange(1, ROWS + 1, dtype=np.uint64)
    columns = []
    for band in signatures.reshape(len(signatures), BANDS, ROWS).swapaxes(0, 1):
        _, group, counts = np.unique((band * powers).sum(1), return_inverse=True, return_counts=True)
        columns.append(np.where(counts[group] > 1, group, -1))
    return np.stack(columns, 1).tolist()
