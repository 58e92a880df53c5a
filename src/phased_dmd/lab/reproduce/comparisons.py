"""Comparisons of variants over seeds, and the verdict."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import t as student_t

from phased_dmd.lab.metrics.intervals import interval, quantile
from phased_dmd.lab.reproduce.claim import Measure

NEUTRAL = {"ratio": 1.0, "difference": 0.0}  # neither is better
LEAST = 1e-12  # in the place of a zero, of which there is no logarithm
CHANCE = 0.025  # that an interval of 95 % lies above NEUTRAL where there is nothing


def ratio(larger: Sequence[float], smaller: Sequence[float]) -> dict[str, Any]:
    """larger / smaller of the same seeds: geometric mean, and its 95 % interval and p by the logarithms.

    For distances and divergences: they vary by factors, and their plain differences are far from normal.
    """
    logs = [math.log(max(a, LEAST) / max(b, LEAST)) for a, b in zip(larger, smaller, strict=True)]
    mean, low, high, p = _interval(logs)
    low, high = (None, None) if low is None or high is None else (math.exp(low), math.exp(high))
    return {
        "scale": "ratio", "value": math.exp(mean), "low": low, "high": high, "p": p,
        "values": [math.exp(value) for value in logs],
    }  # fmt: skip


def difference(larger: Sequence[float], smaller: Sequence[float]) -> dict[str, Any]:
    """larger - smaller of the same seeds: mean, 95 % interval and p; for shares and bounded scores, which may be 0."""
    values = [a - b for a, b in zip(larger, smaller, strict=True)]
    mean, low, high, p = _interval(values)
    return {"scale": "difference", "value": mean, "low": low, "high": high, "p": p, "values": values}


def _interval(values: Sequence[float]) -> tuple[float, float | None, float | None, float | None]:
    """Mean, both ends of its 95 % interval, and the chance of as large a t where there is nothing; none of one seed."""
    found = interval(values)
    mean, half = found["mean"], found["half_width"]
    if half is None:
        return mean, None, None, None
    if half == 0:
        return mean, mean, mean, 0.0 if mean > 0 else 1.0
    p = student_t.sf(mean / half * quantile(len(values)), len(values) - 1)
    return mean, mean - half, mean + half, float(p)


def compare(measure: Measure, better: Mapping[str, Any], worse: Mapping[str, Any]) -> dict[str, Any]:
    """How far the measure, as claimed, sets the better cell apart from the worse one: above NEUTRAL if it does.

    better, worse: cells of a summary, with the `values` by seed and their signed `gaps` to the base.
    """
    if measure.direction == "closer":
        good, bad = ([abs(gap) for gap in cell["gaps"]] for cell in (better, worse))
    else:
        good, bad = better["values"], worse["values"]
    larger, smaller = (good, bad) if measure.direction == "higher" else (bad, good)
    return (ratio if measure.scale == "ratio" else difference)(larger, smaller)


def shown(comparison: Mapping[str, Any]) -> str | None:
    """What the interval shows: as claimed, the reverse, or nothing; None of one seed."""
    low, high, neutral = comparison["low"], comparison["high"], NEUTRAL[comparison["scale"]]
    if low is None:
        return None
    return "as claimed" if low > neutral else "the reverse" if high < neutral else "nothing"


def judge(comparisons: Sequence[Mapping[str, Any]]) -> str | None:
    """The verdict on comparisons that are claimed to lie above NEUTRAL; None where one of them has no interval.

    It holds where every interval does. It holds partly where more do than lie below it, and one of them would if the
    intervals were as wide as all of them together need (Bonferroni: p below CHANCE over their number). Else it does
    not hold.
    """
    counts = tally(comparisons)
    if counts is None:
        return None
    claimed, reverse, _ = counts
    if claimed == len(comparisons):
        return "holds"
    sure = any(comparison["p"] < CHANCE / len(comparisons) for comparison in comparisons)
    return "holds partly" if claimed > reverse and sure else "does not hold"


def tally(comparisons: Sequence[Mapping[str, Any]]) -> tuple[int, int, int] | None:
    """How many intervals are as claimed, reversed and undecided; None where one is missing."""
    found = [shown(comparison) for comparison in comparisons]
    if not found or None in found:
        return None
    return found.count("as claimed"), found.count("the reverse"), found.count("nothing")
