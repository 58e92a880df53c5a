"""Near duplicates: MinHash against the Jaccard index it stands for, and all pairs against brute force."""

import functools
import itertools
import random

import numpy as np
import pytest

from phased_dmd.near_duplicates import ALIKE, jaccard, near_duplicates, normalised, shingles, signature

WORDS = """
red green old young slow wide detailed fox woman river city night snow rain morning camera photo
""".split()  # noqa: SIM905  seventeen strings in quotes say no more


@functools.cache
def runs(text: str) -> set[str]:
    """The shingles themselves."""
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def similarity(a: str, b: str) -> float:
    return len(runs(a) & runs(b)) / len(runs(a) | runs(b))


def sentences(count: int, seed: int) -> list[str]:
    """Different texts of twelve words, two thirds of them those of one before with one or two words changed."""
    rng, found = random.Random(seed), [" ".join(random.Random(seed).choices(WORDS, k=12))]
    while len(found) < count:
        words = rng.choice(found).split() if rng.random() < 0.67 else rng.choices(WORDS, k=12)
        for _ in range(rng.randint(1, 2)):
            words[rng.randrange(12)] = rng.choice(WORDS)
        if (text := " ".join(words)) not in found:
            found.append(text)
    return found


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("  A Red FOX, asleep!", "a red fox asleep"),
        ("ＦＵＬＬ width №1", "full width no1"),
        ("Straße_42", "strasse 42"),
        ("赤い狐。眠る", "赤い狐 眠る"),
    ],
)
def test_case_marks_and_spaces_are_no_difference(text: str, same: str) -> None:
    assert normalised(text) == same == normalised(same)


@pytest.mark.parametrize(
    "pair", [("a red fox in the snow", "a red fox in snow"), ("ab", "abc"), ("日本の冬の川", "日本の冬の山"), ("", "a")]
)
def test_hashed_shingles_have_the_jaccard_index_of_the_runs_of_characters(pair: tuple[str, str]) -> None:
    assert jaccard(*map(shingles, pair)) == similarity(*pair)
    assert jaccard(*map(shingles, pair[:1] * 2)) == 1


def test_two_signatures_agree_as_often_as_the_jaccard_index_says() -> None:
    """Over 120 hashes and 379 pairs; the mean difference deviates by .003."""
    texts = sentences(400, seed=1)
    pairs = list(itertools.islice(itertools.combinations(texts, 2), 4000, 80_000, 200))
    known = np.array([similarity(*pair) for pair in pairs])
    found = np.array([(signature(shingles(a)) == signature(shingles(b))).mean() for a, b in pairs])
    assert abs((found - known).mean()) < 0.01 and np.corrcoef(known, found)[0, 1] > 0.9


def test_all_near_duplicates_are_found_and_nothing_else() -> None:
    """Of each text the first before it that is kept and alike, by brute force; a missed pair would have one in 500."""
    texts = sentences(160, seed=2)
    known: dict[int, list[int]] = {}
    for i, text in enumerate(texts):
        before = [j for j in range(i) if j not in known and similarity(text, texts[j]) >= ALIKE]
        if before:
            known[i] = before
    found = near_duplicates(texts)
    assert 20 < len(known) < 140 and found.keys() == known.keys()
    assert all(found[i] in known[i] for i in known)


def test_few_texts_have_no_near_duplicates() -> None:
    assert near_duplicates([]) == near_duplicates(["one"]) == near_duplicates(["one", "two"]) == {}
