"""Means, ratios and their intervals over seeds."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import t as student_t


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and the half width of its 95 % interval by Student's t; none from one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "half_width": None, "values": list(values)}
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "half_width": float(student_t.ppf(0.975, len(values) - 1)) * spread, "values": list(values)}


def ratio(worse: Sequence[float], better: Sequence[float]) -> dict[str, Any]:
    """worse / better of the same seeds: geometric mean and 95 % interval, of the logarithms; low and high of one: None.

    Positive values only: distances and divergences vary by factors, and their plain differences are far from normal.
    """
    logs = interval([math.log(w / b) for w, b in zip(worse, better, strict=True)])
    mean, half = logs["mean"], logs["half_width"]
    low, high = (None, None) if half is None else (math.exp(mean - half), math.exp(mean + half))
    return {"ratio": math.exp(mean), "low": low, "high": high, "values": [math.exp(v) for v in logs["values"]]}


def judge(comparisons: Sequence[dict[str, Any]]) -> str | None:
    """The verdict on ratios that are claimed to be above 1; None where one of them has no interval.

    It holds where every interval lies above 1, and does not hold where none does: one that contains 1 shows nothing.
    """
    lows = [comparison["low"] for comparison in comparisons]
    if not lows or None in lows:
        return None
    shown = sum(low > 1 for low in lows)
    return "holds" if shown == len(lows) else "holds partly" if shown else "does not hold"
