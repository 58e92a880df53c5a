"""Closed forms in float64 for a Gaussian x_0 in one dimension, written without the package's own formulas."""

import math
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from phased_dmd.maths.schedules import FlowSchedule, Schedule, VESchedule, VPSchedule

SCHEDULES: dict[str, Schedule] = {
    "flow": FlowSchedule(),
    "vp-cosine": VPSchedule(),
    "vp-linear": VPSchedule("linear"),
    "ve": VESchedule(),
}
PREDICTIONS = ("flow", "x0", "eps", "v")
MEAN, STD = 0.7, 0.8  # of x_0


def alpha_sigma(name: str, t: float) -> tuple[float, float]:
    """(alpha_t, sigma_t): flow (1 - t, t); cosine; beta(t) = .1 + 19.9 t integrated; sigma = .02 (10/.02)^t."""
    match name:
        case "flow":
            return 1 - t, t
        case "vp-cosine":
            return math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)
        case "vp-linear":
            integral = 0.1 * t + 19.9 * t * t / 2
            return math.exp(-integral / 2), math.sqrt(-math.expm1(-integral))
        case _:
            return 1.0, 0.02 * 500**t


def transition(name: str, s: float, t: float) -> tuple[float, float]:
    """(alpha_ts, sigma_ts^2), sigma_ts^2 in a form of each schedule's own that does not cancel as t - s -> 0."""
    alpha_ts = alpha_sigma(name, t)[0] / alpha_sigma(name, s)[0]
    match name:
        case "flow":
            return alpha_ts, (t - s) * (t * (1 - s) + (1 - t) * s) / (1 - s) ** 2
        case "vp-cosine":  # sin^2 t cos^2 s - cos^2 t sin^2 s = sin(t - s) sin(t + s)
            half = math.pi / 2
            return alpha_ts, math.sin(half * (t - s)) * math.sin(half * (t + s)) / math.cos(half * s) ** 2
        case "vp-linear":  # 1 - exp(-integral of beta from s to t)
            return alpha_ts, -math.expm1(-(t - s) * (0.1 + 19.9 * (t + s) / 2))
        case _:
            return alpha_ts, (0.02 * 500**s) ** 2 * math.expm1(2 * (t - s) * math.log(500))


def p_q(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(p, q) of psi = p x_0 + q eps, for each type."""
    return {"flow": (-1.0, 1.0), "x0": (1.0, 0.0), "eps": (0.0, 1.0), "v": (-sigma, alpha)}[prediction]


class Affine(NamedTuple):
    """x -> slope x + intercept."""

    slope: float
    intercept: float

    def __call__(self, x: Tensor, *_: object) -> Tensor:
        return self.slope * x + self.intercept

    def rms(self, mean: float, variance: float) -> float:
        """The root mean square over x ~ N(mean, variance)."""
        return math.sqrt((self.slope * mean + self.intercept) ** 2 + self.slope**2 * variance)


def law(name: str, t: float, mean: float = MEAN, std: float = STD) -> tuple[float, float]:
    """(mean, variance) of x_t for x_0 ~ N(mean, std^2)."""
    alpha, sigma = alpha_sigma(name, t)
    return alpha * mean, (alpha * std) ** 2 + sigma**2


def exact_prediction(name: str, prediction: str, t: float, mean: float = MEAN, std: float = STD) -> Affine:
    """E[p x_0 + q eps | x_t] for x_0 ~ N(mean, std^2), by the regression of each of the two on x_t."""
    alpha, sigma = alpha_sigma(name, t)
    p, q = p_q(prediction, alpha, sigma)
    m_t, v_t = law(name, t, mean, std)
    slope = (p * alpha * std**2 + q * sigma) / v_t
    return Affine(slope, p * mean - slope * m_t)


def exact_x_s(name: str, s: float, t: float, mean: float = MEAN, std: float = STD) -> Affine:
    """E[x_s | x_t] for x_0 ~ N(mean, std^2), from the joint law of (x_s, x_t)."""
    (m_s, v_s), (m_t, v_t) = law(name, s, mean, std), law(name, t, mean, std)
    slope = transition(name, s, t)[0] * v_s / v_t
    return Affine(slope, m_s - slope * m_t)


def hermite(nodes: int, dims: int) -> tuple[list[Tensor], Tensor]:
    """Gauss-Hermite nodes (one tensor [nodes^dims] a dimension) and weights of N(0, I), exact to degree 2 nodes - 1."""
    points, weights = numpy.polynomial.hermite_e.hermegauss(nodes)
    grids = torch.meshgrid(*[torch.tensor(points)] * dims, indexing="ij")
    products = torch.meshgrid(*[torch.tensor(weights / weights.sum())] * dims, indexing="ij")
    return [grid.flatten() for grid in grids], torch.stack(products).prod(0).flatten()


def full(value: float, like: Tensor) -> Tensor:
    """A time as float64 of the batch's shape [b]."""
    return torch.full((len(like),), value, dtype=torch.float64)
