"""Variants compared seed by seed, and the verdict on what is claimed of them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from phased_dmd.lab.metrics.intervals import LEAST, difference, ratio
from phased_dmd.lab.reproduce.claim import Criterion, Trial

NEUTRAL = {"ratio": 1.0, "difference": 0.0}  # the value at which neither side is better
FROM_ZERO = ("frechet", "_kl", "energy_distance")  # in the names of measures that are 0 for the base's own law
CHANCE = 0.025  # that a 95 % interval lies above NEUTRAL where there is no difference


def compare_pairs(recipe: str, trial: Trial, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a comparison for each pair and criterion of a trial, from the tables of a study's summary."""
    result = []
    for better, worse in trial.pairs:
        for c in trial.criteria:
            rows = summary[c.table]
            about = {"recipe": recipe, "table": c.table, "measure": c.name, "direction": c.direction}
            about |= {"better": better, "worse": worse, "what": _in_words(c, better, worse)}
            result.append(about | compare(c, rows, better, worse))
    return result


def compare(criterion: Criterion, rows: Mapping[str, Any], better: str, worse: str) -> dict[str, Any]:
    """Says how far a criterion sets the better row apart from the worse one: above NEUTRAL if it does as claimed.

    rows: a table of a summary, whose cells have the `values` by seed and their signed `gaps` to the base.
    """
    good_cell, bad_cell = (rows[label][criterion.name] for label in (better, worse))
    if criterion.direction == "closer":
        good, bad = ([abs(gap) for gap in cell["gaps"]] for cell in (good_cell, bad_cell))
    else:
        good, bad = good_cell["values"], bad_cell["values"]
    larger, smaller = (good, bad) if criterion.direction == "higher" else (bad, good)
    if criterion.scale == "difference":
        return difference(larger, smaller)
    return ratio(larger, smaller, resolution(criterion, rows))


def resolution(criterion: Criterion, rows: Mapping[str, Any]) -> float:
    """Returns what a distance counts as at least: the most that the base has been read as against itself.

    That is 0 but for the error of few samples, by which two distances below it differ.
    """
    base = next(iter(rows))
    if not any(part in criterion.name for part in FROM_ZERO) or not base.startswith("base, "):
        return LEAST
    return max(LEAST, *(abs(value) for value in rows[base][criterion.name]["values"]))


def _in_words(criterion: Criterion, better: str, worse: str) -> str:
    """Says what is divided by what, or subtracted from what."""
    if criterion.direction == "closer":
        better, worse = f"gap of {better}", f"gap of {worse}"
    larger, smaller = (better, worse) if criterion.direction == "higher" else (worse, better)
    return f"{larger} {'/' if criterion.scale == 'ratio' else '-'} {smaller}"


def outcome(comparison: Mapping[str, Any]) -> str | None:
    """Says what the interval shows: `as claimed`, `the reverse` or `nothing`, as where seeds do not differ at all; None
    from one seed.
    """
    low, high, neutral = comparison["low"], comparison["high"], NEUTRAL[comparison["scale"]]
    if low is None:
        return None if len(comparison["values"]) < 2 else "nothing"
    return "as claimed" if low > neutral else "the reverse" if high < neutral else "nothing"


def mirrored(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the comparison with its sides exchanged: what was worse is claimed to be better."""
    value, low, high, p = (comparison[key] for key in ("value", "low", "high", "p"))

    def turned(end: float | None) -> float | None:
        return None if end is None else 1 / end if comparison["scale"] == "ratio" else -end

    ends = {"value": turned(value), "low": turned(high), "high": turned(low), "p": None if p is None else 1 - p}
    return {**comparison, **ends}


def count_outcomes(comparisons: Sequence[Mapping[str, Any]]) -> tuple[int, int, int] | None:
    """Returns how many comparisons are as claimed, reversed and undecided; None where one has no interval."""
    found = [outcome(comparison) for comparison in comparisons]
    if not found or None in found:
        return None
    return found.count("as claimed"), found.count("the reverse"), found.count("nothing")


def judge(comparisons: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns the verdict on comparisons that are claimed to lie above NEUTRAL; None where one has no interval.

    The claim `holds` where every interval lies above. Else one of them must do so even if the intervals were as wide as
    all of them together need (Bonferroni: p below CHANCE over their number): it then `holds partly` where none is the
    reverse, and is `mixed` where some are. Else it `does not hold`.
    """
    counts = count_outcomes(comparisons)
    if counts is None:
        return None
    claimed, reverse, _ = counts
    if claimed == len(comparisons):
        return "holds"
    sure = any(c["p"] is not None and c["p"] < CHANCE / len(comparisons) for c in comparisons)
    if not sure:
        return "does not hold"
    return "mixed" if reverse else "holds partly"


def judge_each(comparisons: Sequence[Mapping[str, Any]], full: Collection[str]) -> dict[str, str | None]:
    """Returns the verdict on each recipe of the comparisons, in their order. full: those whose budgets suffice for one;
    the others' is None.
    """
    recipes = dict.fromkeys(c["recipe"] for c in comparisons)
    return {r: judge([c for c in comparisons if c["recipe"] == r]) if r in full else None for r in recipes}


def in_a_line(verdicts: Mapping[str, str | None]) -> str | None:
    """Writes the verdicts that there are, by recipe, as a line; None where there is none."""
    return "; ".join(f"{recipe}: {verdict}" for recipe, verdict in verdicts.items() if verdict) or None
