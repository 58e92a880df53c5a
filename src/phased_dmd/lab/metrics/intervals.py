"""95 % intervals: over seeds by Student's t, and of any function of a set of samples by the jackknife."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.stats import t as student_t
from torch import Tensor

Statistic = Callable[[Tensor], float]  # of the indices of samples


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and the half width of its 95 % interval by Student's t; none from one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "half_width": None, "values": list(values)}
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "half_width": quantile(len(values)) * spread, "values": list(values)}


def leave_one_out(statistic: Statistic, groups: Tensor) -> tuple[float, list[float]]:
    """The statistic of all samples, and of those outside each group; of fewer than three groups the first alone.

    groups: [n], the group of each sample, 0, 1, ...
    """
    keep, count = torch.arange(len(groups)), int(groups.max()) + 1
    return statistic(keep), [statistic(keep[groups != group]) for group in range(count if count > 2 else 0)]


def spread(without: Sequence[float]) -> float | None:
    """The half width of a statistic's 95 % interval by the jackknife (Efron and Stein, 1981), with Student's t.

    without: the statistic with one group after the other left out; None from fewer than three. For a mean over groups
    of one size it is the half width of `interval`.
    """
    count = len(without)
    if count < 3:
        return None
    centre = statistics.fmean(without)
    return quantile(count) * math.sqrt((count - 1) / count * sum((value - centre) ** 2 for value in without))


def quantile(count: int) -> float:
    """Student's t at 97.5 % for the mean of `count` values."""
    return float(student_t.ppf(0.975, count - 1))
