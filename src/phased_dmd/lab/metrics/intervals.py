"""95 % intervals: of means over seeds by Student's t, and of any statistic of a set of samples by the jackknife."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.stats import t as student_t
from torch import Tensor

Statistic = Callable[[Tensor], float]  # of the indices of the samples that are kept
LEAST = 1e-12  # stands for a zero, of which there is no logarithm
POWER = 0.8  # of the effects that `detectable` states


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Returns the `mean` of values, the `half_width` of its 95 % interval (None from one value), and the `values`."""
    mean, half = statistics.fmean(values), None
    if len(values) > 1:
        half = t_quantile(len(values)) * (statistics.stdev(values) / math.sqrt(len(values)))
    return {"mean": mean, "half_width": half, "values": list(values)}


def ratio(larger: Sequence[float], smaller: Sequence[float], least: float = LEAST) -> dict[str, Any]:
    """Compares values of equal seeds by larger / smaller: geometric mean, 95 % interval and p by the logarithms.

    It is for distances and divergences: they vary by factors, and their plain differences are far from normal. least:
    what a smaller value counts as. `detectable`: the ratio that as many seeds tell in four of five cases.
    """
    logs = [math.log(max(a, least) / max(b, least)) for a, b in zip(larger, smaller, strict=True)]
    test = _t_test(logs)
    ends = {name: None if test[name] is None else math.exp(test[name]) for name in ENDS}
    return {"scale": "ratio", **ends, "p": test["p"], "values": [math.exp(value) for value in logs]}


ENDS = ("value", "low", "high", "detectable")  # of a comparison, in its own scale


def difference(larger: Sequence[float], smaller: Sequence[float]) -> dict[str, Any]:
    """Compares values of equal seeds by larger - smaller: mean, 95 % interval and p.

    It is for shares and bounded scores, which may be zero. `detectable`: the difference that as many seeds tell in four
    of five cases.
    """
    values = [a - b for a, b in zip(larger, smaller, strict=True)]
    return {"scale": "difference", **_t_test(values), "values": values}


def _t_test(values: Sequence[float]) -> dict[str, Any]:
    """Returns the mean as `value`, the ends of its 95 % interval, and the one-sided p that it lies above zero.

    One value, and values that do not differ, have no spread to tell an interval, p or detectable effect by: all None.
    """
    found = interval(values)
    mean, half = found["mean"], found["half_width"]
    if not half:
        return {"value": mean, "low": None, "high": None, "detectable": None, "p": None}
    error, freedom = half / t_quantile(len(values)), len(values) - 1
    detectable = half + float(student_t.ppf(POWER, freedom)) * error
    p = float(student_t.sf(mean / error, freedom))
    return {"value": mean, "low": mean - half, "high": mean + half, "detectable": detectable, "p": p}


def leave_one_out(statistic: Statistic, groups: Tensor) -> tuple[float, list[float]]:
    """Returns the statistic of all samples, and the list of those with one group left out; [] of fewer than 3 groups.

    groups: [n], the group of each sample, 0, 1, ...
    """
    keep, count = torch.arange(len(groups)), int(groups.max()) + 1
    return statistic(keep), [statistic(keep[groups != group]) for group in range(count if count > 2 else 0)]


def debiased(value: float, without: Sequence[float]) -> float:
    """Returns a statistic without the part of its bias that falls as 1 / n (Quenouille's jackknife).

    value: of all samples. without: with one group after the other left out; the value is returned as it is where there
    is none. Of a distance it may be below zero.
    """
    count = len(without)
    return count * value - (count - 1) * statistics.fmean(without) if count else value


def jackknife_half_width(without: Sequence[float]) -> float | None:
    """Returns the half width of a statistic's 95 % interval by the jackknife (Efron and Stein, 1981), by Student's t.

    without: the statistic with one group after the other left out; None from fewer than three. For a mean over groups
    of one size it is the half width of `interval`.
    """
    count = len(without)
    if count < 3:
        return None
    centre = statistics.fmean(without)
    return t_quantile(count) * math.sqrt((count - 1) / count * sum((value - centre) ** 2 for value in without))


def t_quantile(count: int) -> float:
    """Returns Student's t at 97.5 % for the mean of `count` values."""
    return float(student_t.ppf(0.975, count - 1))
