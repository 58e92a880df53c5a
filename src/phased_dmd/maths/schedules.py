"""Noise schedules, transitions, prediction types and re-noise times.

x_t = alpha_t x_0 + sigma_t eps with t from 0 (data) to 1 (noise). A time is a tensor of shape [b]; it and every
coefficient are float64 whatever the dtype of the samples, because sigma_ts cancels catastrophically near t = s.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from phased_dmd.maths.phases import renoise_range, shift_time, unshift_time

Prediction = Literal["flow", "x0", "eps", "v"]
Times = Float[Tensor, " b"]
Coefficients = Float64[Tensor, " b"]
Samples = Float[Tensor, "b ..."]


def times_like(t: float | Tensor, x: Tensor) -> Tensor:
    """t as float64 of shape [b] for samples x [b, ...]."""
    return torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(x.shape[0])


def on(coefficient: Tensor, x: Tensor) -> Tensor:
    """A float64 coefficient [b] shaped to multiply x [b, ...], in float32 at least."""
    shaped = coefficient.reshape(-1, *[1] * (x.ndim - 1))
    return shaped.to(x.device, torch.promote_types(x.dtype, torch.float32))


class Schedule(ABC):
    """(alpha_t, sigma_t) of Eq. 1; alpha_t / sigma_t falls strictly in t."""

    @abstractmethod
    def alpha(self, t: Times) -> Coefficients:
        """The signal's factor at t [b], float64."""

    @abstractmethod
    def sigma(self, t: Times) -> Coefficients:
        """The noise's standard deviation at t [b], float64."""

    @abstractmethod
    def clamp_unit(self, t: Times) -> Coefficients:
        """The unit of sigma_ts^2 in the clamp of Eq. 13: 1 where sigma is at most 1, else sigma_t^2."""

    def transition(self, s: Times, t: Times) -> tuple[Coefficients, Coefficients]:
        """Eq. 2: (alpha_ts, sigma_ts), both float64 [b], of p(x_t | x_s) = N(alpha_ts x_s, sigma_ts^2) for s < t."""
        alpha_ts = self.alpha(t) / self.alpha(s)
        mean_sigma = alpha_ts * self.sigma(s)
        return alpha_ts, ((self.sigma(t) - mean_sigma) * (self.sigma(t) + mean_sigma)).sqrt()


class FlowSchedule(Schedule):
    """Rectified flow: alpha = 1 - t, sigma = t."""

    def alpha(self, t: Times) -> Coefficients:
        return 1 - t.double()

    def sigma(self, t: Times) -> Coefficients:
        return t.double()

    def clamp_unit(self, t: Times) -> Coefficients:
        return torch.ones_like(t, dtype=torch.float64)


class VPSchedule(Schedule):
    """Variance preserving, alpha^2 + sigma^2 = 1: `cosine`, or the SDE with `linear` beta from .1 to 20."""

    def __init__(self, kind: Literal["cosine", "linear"] = "cosine") -> None:
        if kind not in ("cosine", "linear"):
            raise ValueError(f"VPSchedule: kind is 'cosine' or 'linear', not {kind!r}")
        self.kind = kind

    def _log_alpha(self, t: Times) -> Coefficients:
        return -0.25 * t.double() ** 2 * (20 - 0.1) - 0.5 * t.double() * 0.1

    def alpha(self, t: Times) -> Coefficients:
        return torch.cos(t.double() * math.pi / 2) if self.kind == "cosine" else self._log_alpha(t).exp()

    def sigma(self, t: Times) -> Coefficients:
        if self.kind == "cosine":
            return torch.sin(t.double() * math.pi / 2)
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def clamp_unit(self, t: Times) -> Coefficients:
        return torch.ones_like(t, dtype=torch.float64)


class VESchedule(Schedule):
    """Variance exploding: alpha = 1, sigma rises geometrically from sigma_min > 0 to sigma_max."""

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 10.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"VESchedule: needs 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def alpha(self, t: Times) -> Coefficients:
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Times) -> Coefficients:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t.double()

    def clamp_unit(self, t: Times) -> Coefficients:
        return self.sigma(t) ** 2


def coefficients(prediction: Prediction, alpha: Coefficients, sigma: Coefficients) -> tuple[Coefficients, Coefficients]:
    """(p, q) of psi = p x_0 + q eps: flow (-1, 1), x0 (1, 0), eps (0, 1), v (-sigma, alpha)."""
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    match prediction:
        case "flow":
            return -one, one
        case "x0":
            return one, zero
        case "eps":
            return zero, one
        case "v":
            return -sigma, alpha
    raise ValueError(f"prediction: {prediction!r} is none of {', '.join(get_args(Prediction))}")


def determinant(prediction: Prediction, alpha: Coefficients, sigma: Coefficients) -> Coefficients:
    """D = alpha q - sigma p, of the linear map (x_0, eps) -> (x_t, psi)."""
    p, q = coefficients(prediction, alpha, sigma)
    return alpha * q - sigma * p


def forward(x_s: Samples, eps: Samples, s: Times, t: Times, schedule: Schedule) -> Samples:
    """x_t = alpha_ts x_s + sigma_ts eps (Eq. 2); x_s and eps [b, ...], s < t [b]."""
    alpha_ts, sigma_ts = schedule.transition(s, t)
    return on(alpha_ts, x_s) * x_s + on(sigma_ts, x_s) * eps


def predicted_x0(psi: Samples, x_t: Samples, t: Times, schedule: Schedule, prediction: Prediction) -> Samples:
    """x0_hat = (q x_t - sigma_t psi) / D. For eps prediction it needs alpha_t > 0."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    _, q = coefficients(prediction, alpha, sigma)
    d = determinant(prediction, alpha, sigma)
    return on(q / d, x_t) * x_t - on(sigma / d, x_t) * psi


def predicted_eps(psi: Samples, x_t: Samples, t: Times, schedule: Schedule, prediction: Prediction) -> Samples:
    """eps_hat = (alpha_t psi - p x_t) / D. For x0 prediction it needs sigma_t > 0."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    p, _ = coefficients(prediction, alpha, sigma)
    d = determinant(prediction, alpha, sigma)
    return on(alpha / d, x_t) * psi - on(p / d, x_t) * x_t


def ddim_step(psi: Samples, x_t: Samples, t: Times, r: Times, schedule: Schedule, prediction: Prediction) -> Samples:
    """x_r = alpha_r x0_hat + sigma_r eps_hat, r < t: the deterministic step. On `FlowSchedule` it is Euler's."""
    alpha, sigma, alpha_r, sigma_r = schedule.alpha(t), schedule.sigma(t), schedule.alpha(r), schedule.sigma(r)
    p, q = coefficients(prediction, alpha, sigma)
    d = determinant(prediction, alpha, sigma)
    on_x, on_psi = (alpha_r * q - sigma_r * p) / d, (sigma_r * alpha - alpha_r * sigma) / d
    return on(on_x, x_t) * x_t + on(on_psi, x_t) * psi


def check_start(prediction: Prediction, schedule: Schedule, t_0: float) -> None:
    """Raises ValueError where eps prediction would start at alpha = 0: x_0 is not determined there."""
    alpha = schedule.alpha(torch.tensor([t_0], dtype=torch.float64)).item()
    if prediction == "eps" and alpha < 1e-3:
        raise ValueError(
            f"plan.start: eps prediction cannot start at t = {t_0:g}, where alpha is {alpha:.1e}; start below 1"
        )


def renoise_times(
    r: Times, low: float, high: float, shift: float, t_range: tuple[float, float] | None = None, clamp: bool = False
) -> Coefficients:
    """Re-noise times t in (low, high], float64 [b], from r uniform in [0, 1): uniform in raw time, then shifted.

    t_range truncates (raw time uniform on the image of the intersection) or, with clamp, piles up at its bounds.
    """
    low, high = renoise_range(low, high, t_range, clamp)
    u_low, u_high = unshift_time(low, shift), unshift_time(high, shift)
    t = shift_time(u_high - (u_high - u_low) * r.double(), shift).clamp(max=high)
    t = torch.where(t > low, t, torch.nextafter(torch.full_like(t, low), torch.ones_like(t)))  # rounding: never t = s
    return t.clamp(*t_range) if clamp and t_range else t
