"""Noise schedules, transitions, prediction types and re-noise times.

x_t = alpha_t x_0 + sigma_t eps with t from 0 (data) to 1 (noise). A time is a tensor of shape [b]; it and every
coefficient are float64 whatever the dtype of the samples, because sigma_ts cancels catastrophically near t = s.

A network of any prediction type returns psi = p x_0 + q eps. With x_t this makes a 2 x 2 linear map,

    x_t = alpha_t x_0 + sigma_t eps
    psi =       p x_0 +       q eps,      of determinant D = alpha_t q - sigma_t p,

and whatever is computed from psi is a row of its inverse: x0_hat = (q x_t - sigma_t psi) / D and
eps_hat = (alpha_t psi - p x_t) / D. In the code D is `d`.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from phased_dmd.maths.phases import shift_time, unshift_time

Prediction = Literal["flow", "x0", "eps", "v"]
Times = Float[Tensor, " b"]
Coefficients = Float64[Tensor, " b"]
Samples = Float[Tensor, "b ..."]


def times_like(t: float | Tensor, x: Tensor) -> Tensor:
    """Returns the time t, one number or [b], as float64 of shape [b] for samples x [b, ...]."""
    return torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(x.shape[0])


def expand_like(coefficient: Tensor, x: Tensor) -> Tensor:
    """Reshapes a coefficient [b] to [b, 1, ...] so that it multiplies samples x [b, ...].

    The result is on x's device, in x's dtype but in float32 at least: bfloat16 would round it to three digits.
    """
    shaped = coefficient.reshape(-1, *[1] * (x.ndim - 1))
    return shaped.to(x.device, torch.promote_types(x.dtype, torch.float32))


class Schedule(ABC):
    """A noise schedule gives (alpha_t, sigma_t) of Eq. 1; alpha_t / sigma_t must fall strictly in t."""

    @abstractmethod
    def alpha(self, t: Times) -> Coefficients:
        """Returns the signal's factor alpha_t at times t [b], float64 [b]."""

    @abstractmethod
    def sigma(self, t: Times) -> Coefficients:
        """Returns the noise's standard deviation sigma_t at times t [b], float64 [b]."""

    def clamp_unit(self, t: Times) -> Coefficients:
        """Returns the variance [b], float64, that the clamp of Eq. 13 takes as 1.

        The paper clamps 1/sigma_ts^2 at 10 and so assumes that sigma_t is at most 1, as here. A schedule whose sigma_t
        exceeds 1 returns sigma_t^2, so that the clamp acts on sigma_ts^2/sigma_t^2.
        """
        return torch.ones_like(t, dtype=torch.float64)

    def transition(self, s: Times, t: Times) -> tuple[Coefficients, Coefficients]:
        """Returns (alpha_ts, sigma_ts) of Eq. 2, p(x_t | x_s) = N(alpha_ts x_s, sigma_ts^2), for s < t; float64 [b]."""
        alpha_ts = self.alpha(t) / self.alpha(s)
        mean_sigma = alpha_ts * self.sigma(s)
        # A difference of squares, factored: squaring first would round what cancels near s.
        return alpha_ts, ((self.sigma(t) - mean_sigma) * (self.sigma(t) + mean_sigma)).sqrt()


class FlowSchedule(Schedule):
    """Rectified flow interpolates linearly: alpha_t = 1 - t, sigma_t = t."""

    def alpha(self, t: Times) -> Coefficients:
        return 1 - t.double()

    def sigma(self, t: Times) -> Coefficients:
        return t.double()


class VPSchedule(Schedule):
    """A variance preserving schedule has alpha_t^2 + sigma_t^2 = 1.

    kind: `cosine`, alpha_t = cos(pi t / 2), or `linear`, the SDE whose beta rises linearly from .1 to 20.
    """

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


class VESchedule(Schedule):
    """A variance exploding schedule has alpha_t = 1, and sigma_t rises geometrically from sigma_min to sigma_max.

    sigma_min must be above 0, so x_s is never clean: x_0 is never seen without noise.
    """

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
    """Returns (p, q) [b] of psi = p x_0 + q eps: flow (-1, 1), x0 (1, 0), eps (0, 1), v (-sigma_t, alpha_t)."""
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
    """Returns D = alpha_t q - sigma_t p [b], the determinant of the linear map (x_0, eps) -> (x_t, psi)."""
    p, q = coefficients(prediction, alpha, sigma)
    return alpha * q - sigma * p


def add_noise(x_s: Samples, eps: Samples, s: Times, t: Times, schedule: Schedule) -> Samples:
    """Samples Eq. 2: returns x_t = alpha_ts x_s + sigma_ts eps for x_s and eps [b, ...], s < t [b]."""
    alpha_ts, sigma_ts = schedule.transition(s, t)
    return expand_like(alpha_ts, x_s) * x_s + expand_like(sigma_ts, x_s) * eps


def predicted_x0(psi: Samples, x_t: Samples, t: Times, schedule: Schedule, prediction: Prediction) -> Samples:
    """Returns x0_hat = (q x_t - sigma_t psi) / D for psi and x_t [b, ...]. Eps prediction needs alpha_t > 0."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    _, q = coefficients(prediction, alpha, sigma)
    d = determinant(prediction, alpha, sigma)
    return expand_like(q / d, x_t) * x_t - expand_like(sigma / d, x_t) * psi


def ddim_step(psi: Samples, x_t: Samples, t: Times, r: Times, schedule: Schedule, prediction: Prediction) -> Samples:
    """Steps from t to r < t without new noise: returns x_r = alpha_r x0_hat + sigma_r eps_hat [b, ...].

    It is written as one sum over x_t and psi, because their coefficients cancel near r = t and float64 can afford that.
    On `FlowSchedule` with flow prediction the step is Euler's.
    """
    alpha, sigma, alpha_r, sigma_r = schedule.alpha(t), schedule.sigma(t), schedule.alpha(r), schedule.sigma(r)
    p, q = coefficients(prediction, alpha, sigma)
    d = determinant(prediction, alpha, sigma)
    on_x, on_psi = (alpha_r * q - sigma_r * p) / d, (sigma_r * alpha - alpha_r * sigma) / d
    return expand_like(on_x, x_t) * x_t + expand_like(on_psi, x_t) * psi


def x0_through(x_t: Samples, x_r: Samples, t: Times, r: Times, schedule: Schedule) -> Samples:
    """Returns the x0_hat [b, ...] by which `ddim_step` led from x_t to x_r: the x_0 of the one pair that makes both."""
    alpha, sigma, alpha_r, sigma_r = schedule.alpha(t), schedule.sigma(t), schedule.alpha(r), schedule.sigma(r)
    d = sigma * alpha_r - sigma_r * alpha
    return expand_like(sigma / d, x_t) * x_r - expand_like(sigma_r / d, x_t) * x_t


def check_start(prediction: Prediction, schedule: Schedule, t_0: float) -> None:
    """Raises ValueError if eps prediction would start where alpha(t_0) is about 0: x_0 is not determined there."""
    alpha = schedule.alpha(torch.tensor([t_0], dtype=torch.float64)).item()
    if prediction == "eps" and alpha < 1e-3:
        raise ValueError(
            f"plan.start: eps prediction cannot start at t = {t_0:g}, where alpha is {alpha:.1e}; start below 1"
        )


def renoise_times(r: Times, low: float, high: float, shift: float, floor: float = 0.0) -> Coefficients:
    """Maps r [b], uniform in [0, 1), to re-noise times t in (low, high], float64 [b] (Sec. 2.3.1).

    t is uniform in raw time, then shifted; what is below the floor is moved up to it. An empty interval, or a floor
    above it, is a ValueError.
    """
    if not (low < high and floor <= high):
        raise ValueError(f"renoise: no time is left between {max(low, floor):g} and {high:g}")
    u_low, u_high = unshift_time(low, shift), unshift_time(high, shift)
    t = shift_time(u_high - (u_high - u_low) * r.double(), shift).clamp(max=high)
    above = torch.nextafter(torch.full_like(t, low), torch.ones_like(t))  # rounding must not give t = s
    return torch.where(t > low, t, above).clamp(min=floor)
