"""The two losses of Phased DMD, for every phase: s = 0 gives ordinary DMD.

Arguments are tensors and callables only. x_s, eps: [b, ...]; s, t: [b] float64, s < t. `Predict` maps (x_t, t) to
the native prediction psi [b, ...]. Losses come per sample, [b], averaged over the sample's elements.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from phased_dmd.maths.schedules import (
    Coefficients,
    Prediction,
    Samples,
    Schedule,
    Times,
    coefficients,
    determinant,
    forward,
    on,
    predicted_x0,
)

Losses = Float[Tensor, " b"]
Predict = Callable[[Tensor, Tensor], Tensor]
Target = Callable[[Tensor, Tensor, Tensor, Tensor, Schedule, Prediction], Tensor]
Weighting = Literal["normalised", "paper", "posterior", "public"]

CLAMP = 10.0  # of 1/sigma_ts^2 in Eq. 13
FLOOR = 1e-4  # of the normalising mean absolute error


def _mean(x: Tensor) -> Tensor:
    """Mean over all but the batch: [b, ...] -> [b], in float32 at least."""
    return x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)).mean(1)


def _clean(s: Tensor, schedule: Schedule) -> Tensor:
    """Where x_s is x_0 itself, so that Eq. 12 is Eq. 4: [b], bool."""
    return (schedule.sigma(s) == 0) & (schedule.alpha(s) == 1)


def subinterval_target(
    x_s: Samples, eps: Samples, s: Times, t: Times, schedule: Schedule, prediction: Prediction
) -> Samples:
    """Eq. 12 (flow), Eq. 15 (x0) and their twins: the unbiased regression target at x_t, given only x_s.

    target = p x0* + q eps*, with x0* = x_s/alpha_s - alpha_t sigma_s^2/(alpha_s^2 sigma_ts) eps and
    eps* = sigma_t/sigma_ts eps; its mean given x_t is that of p x_0 + q eps. It diverges at t = s if sigma_s > 0.
    """
    alpha_s, sigma_s, alpha_t, sigma_t = schedule.alpha(s), schedule.sigma(s), schedule.alpha(t), schedule.sigma(t)
    _, sigma_ts = schedule.transition(s, t)
    p, q = coefficients(prediction, alpha_t, sigma_t)
    on_eps = (q * sigma_t - p * alpha_t * sigma_s**2 / alpha_s**2) / sigma_ts
    return on(p / alpha_s, x_s) * x_s + on(on_eps, x_s) * eps


def biased_target(
    x_s: Samples, eps: Samples, s: Times, t: Times, schedule: Schedule, prediction: Prediction
) -> Samples:
    """Ablation (Sec. 2.3.2): Eq. 4 with x_s in the place of x_0, p x_s + q eps. Biased wherever s > 0."""
    p, q = coefficients(prediction, schedule.alpha(t), schedule.sigma(t))
    return on(p, x_s) * x_s + on(q, x_s) * eps


def printed_target(
    x_s: Samples, eps: Samples, s: Times, t: Times, schedule: Schedule, prediction: Prediction
) -> Samples:
    """Ablation: Eq. 13 as printed, without the bracket it lost, which flips the sign of x_s. Wrong wherever s > 0."""
    p, _ = coefficients(prediction, schedule.alpha(t), schedule.sigma(t))
    flipped = torch.where(_clean(s, schedule), 0.0, 2 * p / schedule.alpha(s))
    return subinterval_target(x_s, eps, s, t, schedule, prediction) - on(flipped, x_s) * x_s


def score_matching_weight(s: Times, t: Times, schedule: Schedule) -> Coefficients:
    """Eq. 13's clamp(1/sigma_ts^2, 0, 10) sigma_ts^2 = min(1, 10 sigma_ts^2), [b]; 1 where x_s is clean (Eq. 4)."""
    _, sigma_ts = schedule.transition(s, t)
    weight = (CLAMP * sigma_ts**2 / schedule.clamp_unit(t)).clamp(max=1.0)
    return torch.where(_clean(s, schedule), torch.ones_like(weight), weight)


def score_matching_loss(
    predict: Predict, x_s: Samples, eps: Samples, s: Times, t: Times, schedule: Schedule, prediction: Prediction,
    target: Target = subinterval_target,
) -> Losses:  # fmt: skip
    """Eq. 13, its lost bracket restored; Eq. 4 at s = 0. The fake's loss [b] on generated samples x_s."""
    psi = predict(forward(x_s, eps, s, t, schedule), t)
    error = psi - target(x_s, eps, s, t, schedule, prediction)
    square = _mean(error**2)
    return score_matching_weight(s, t, schedule).to(square) * square


def matching_gradient(
    x_s: Samples, eps: Samples, s: Times, t: Times, schedule: Schedule, prediction: Prediction,
    teacher: Predict, fake: Predict, weighting: Weighting = "normalised", x0_generator: Samples | None = None,
) -> Samples:  # fmt: skip
    """Eq. 11 (Eq. 9 at s = 0): the gradient with respect to x_s, [b, ...], without graph.

    paper: w (T - F), w = alpha_ts alpha_t / (sigma_t D). posterior: kappa (x0_F - x0_T) = E_F[x_s | x_t] -
    E_T[x_s | x_t]. normalised: the same over the mean absolute x_s - E_T[x_s | x_t], which takes many elements to be a
    mean; at s = 0 the form of public DMD code. public: x0_F - x0_T over the mean absolute
    x0_generator - x0_T, the generator's own x_0 prediction.
    """
    with torch.no_grad():
        x_s, eps = (v.detach().to(torch.promote_types(v.dtype, torch.float32)) for v in (x_s, eps))
        x_t = forward(x_s, eps, s, t, schedule)
        psi_teacher, psi_fake = teacher(x_t, t), fake(x_t, t)
        alpha_s, sigma_s, alpha_t, sigma_t = schedule.alpha(s), schedule.sigma(s), schedule.alpha(t), schedule.sigma(t)
        alpha_ts, sigma_ts = schedule.transition(s, t)
        d = determinant(prediction, alpha_t, sigma_t)
        if weighting == "paper":
            return on(alpha_ts * alpha_t / (sigma_t * d), x_s) * (psi_teacher - psi_fake)
        x0_teacher = predicted_x0(psi_teacher, x_t, t, schedule, prediction)
        x0_difference = on(sigma_t / d, x_s) * (psi_teacher - psi_fake)  # x0_F - x0_T
        if weighting == "public":
            if x0_generator is None:
                raise ValueError("the public weighting needs the generator's own x_0 prediction, x0_generator")
            return x0_difference / on(_mean((x0_generator - x0_teacher).abs()).clamp(min=FLOOR), x_s)
        kappa = alpha_s * sigma_ts**2 / sigma_t**2
        if weighting == "posterior":
            return on(kappa, x_s) * x0_difference
        expected_x_s = on(alpha_ts * sigma_s**2 / sigma_t**2, x_s) * x_t + on(kappa, x_s) * x0_teacher
        return on(kappa, x_s) * x0_difference / on(_mean((x_s - expected_x_s).abs()).clamp(min=FLOOR), x_s)


def distribution_matching_loss(
    x_s: Samples, eps: Samples, s: Times, t: Times, schedule: Schedule, prediction: Prediction,
    teacher: Predict, fake: Predict, weighting: Weighting = "normalised", x0_generator: Samples | None = None,
) -> Losses:  # fmt: skip
    """Eq. 11 as a loss [b]: 0.5 |x_s - sg(x_s - gradient)|^2, whose gradient in x_s is `matching_gradient` / elements.

    x_s: the rollout's end, with its graph. teacher: with guidance; fake: without; neither is differentiated.
    """
    gradient = matching_gradient(x_s, eps, s, t, schedule, prediction, teacher, fake, weighting, x0_generator)
    return 0.5 * _mean((x_s - (x_s - gradient).detach()) ** 2)


def fisher_stop_gradient_loss(
    teacher: Predict, fake: Predict, x_s: Samples, eps: Samples, s: Times, t: Times,
    schedule: Schedule, prediction: Prediction,
) -> Losses:  # fmt: skip
    """|sg(E_T[x_s | x_t]) - E_F[x_s | x_t]|^2, [b], differentiated through the fake's input alone.

    On x_s, never on a velocity: only there does it descend. It is no Fisher gradient but the KL's, preconditioned by
    the covariance of x_s given x_t; the Fisher divergence itself is `score_matching_loss` of the teacher minus the
    fake's, on samples with their graph.
    """
    x_s, eps = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (x_s, eps))
    x_t = forward(x_s, eps, s, t, schedule)
    alpha_s, sigma_s, sigma_t = schedule.alpha(s), schedule.sigma(s), schedule.sigma(t)
    alpha_ts, sigma_ts = schedule.transition(s, t)

    def expected_x_s(predict: Predict) -> Samples:
        x0 = predicted_x0(predict(x_t, t), x_t, t, schedule, prediction)
        return on(alpha_ts * sigma_s**2 / sigma_t**2, x_s) * x_t + on(alpha_s * sigma_ts**2 / sigma_t**2, x_s) * x0

    with torch.no_grad():
        wanted = expected_x_s(teacher)
    return _mean((expected_x_s(fake) - wanted) ** 2)
