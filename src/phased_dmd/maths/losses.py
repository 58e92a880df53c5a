"""The two losses of Phased DMD, for every phase: s = 0 gives ordinary DMD.

Arguments are tensors and callables only. x_s, eps: [b, ...]; s, t: [b] float64, s < t. `Predict` maps (x_t, t) to
the native prediction psi = p x_0 + q eps [b, ...]. Losses come per sample, [b], averaged over the sample's elements.
What `expand_like` has multiplied is float32 at least, so bfloat16 samples are computed in float32 here.
D is the determinant of (x_0, eps) -> (x_t, psi), `d` in the code; see `schedules`.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from phased_dmd.maths.schedules import (
    Coefficients,
    Prediction,
    Samples,
    Schedule,
    Times,
    add_noise,
    coefficients,
    determinant,
    expand_like,
    predicted_x0,
)

Losses = Float[Tensor, " b"]
Figures = dict[str, Losses]  # what is seen of each sample on the way to a loss, for metrics.jsonl
Predict = Callable[[Tensor, Tensor], Tensor]
Target = Callable[[Tensor, Tensor, Tensor, Tensor, Schedule, Prediction], Tensor]
Weighting = Literal["normalised", "projected", "paper", "posterior", "public"]

MAX_WEIGHT = 10.0  # Eq. 13 clamps its weight 1/sigma_ts^2 to [0, 10]
MIN_NORMALISER = 1e-4  # the least mean absolute error that a gradient is divided by


def _mean_per_sample(x: Tensor) -> Tensor:
    """Averages [b, ...] over all axes but the batch's: [b]."""
    return x.flatten(1).mean(1)


def _is_clean(s: Tensor, schedule: Schedule) -> Tensor:
    """Says for each s whether x_s is x_0 itself, so that Eq. 12 is Eq. 4: [b], bool."""
    return (schedule.sigma(s) == 0) & (schedule.alpha(s) == 1)


def posterior_mean(x0: Samples, x_t: Samples, s: Times, t: Times, schedule: Schedule) -> Samples:
    """Returns E[x_s | x_t] [b, ...] for a prediction x0 of E[x_0 | x_t]: the mean of p(x_s | x_t, x_0) at x_0 = x0."""
    alpha_s, sigma_s, sigma_t = schedule.alpha(s), schedule.sigma(s), schedule.sigma(t)
    alpha_ts, sigma_ts = schedule.transition(s, t)
    on_x_t, on_x0 = alpha_ts * sigma_s**2 / sigma_t**2, alpha_s * sigma_ts**2 / sigma_t**2
    return expand_like(on_x_t, x_t) * x_t + expand_like(on_x0, x_t) * x0


def subinterval_target(
    x_s: Samples, eps: Samples, s: Times, t: Times, schedule: Schedule, prediction: Prediction
) -> Samples:
    """Returns the unbiased regression target [b, ...] at x_t, given only x_s: Eq. 12 (flow), Eq. 15 (x0), their twins.

    target = p x0* + q eps*, with x0* = x_s/alpha_s - alpha_t sigma_s^2/(alpha_s^2 sigma_ts) eps and
    eps* = sigma_t/sigma_ts eps; its mean given x_t is that of p x_0 + q eps. It diverges at t = s if sigma_s > 0.
    """
    alpha_s, sigma_s, alpha_t, sigma_t = schedule.alpha(s), schedule.sigma(s), schedule.alpha(t), schedule.sigma(t)
    _, sigma_ts = schedule.transition(s, t)
    p, q = coefficients(prediction, alpha_t, sigma_t)
    on_eps = (q * sigma_t - p * alpha_t * sigma_s**2 / alpha_s**2) / sigma_ts
    return expand_like(p / alpha_s, x_s) * x_s + expand_like(on_eps, x_s) * eps


def biased_target(
    x_s: Samples, eps: Samples, s: Times, t: Times, schedule: Schedule, prediction: Prediction
) -> Samples:
    """Returns p x_s + q eps [b, ...], Eq. 4's target with x_s for x_0: an ablation (Sec. 2.3.2), biased at s > 0."""
    p, q = coefficients(prediction, schedule.alpha(t), schedule.sigma(t))
    return expand_like(p, x_s) * x_s + expand_like(q, x_s) * eps


def rollout_target(
    x_s: Samples, eps: Samples, s: Times, t: Times, schedule: Schedule, prediction: Prediction, x0: Samples
) -> Samples:
    """Returns p x0 + q (x_t - alpha_t x0)/sigma_t [b, ...] for the x0 that the rollout's last call predicted.

    It is TDM's target (arXiv 2503.06674), an ablation: at s > 0 biased, unless the noise in x_s is a standard normal
    that is independent of x0, which that of a `ddim` rollout is not.
    """
    alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
    p, q = coefficients(prediction, alpha_t, sigma_t)
    mixed = (add_noise(x_s, eps, s, t, schedule) - expand_like(alpha_t, x_s) * x0) / expand_like(sigma_t, x_s)
    return expand_like(p, x_s) * x0 + expand_like(q, x_s) * mixed


def printed_target(
    x_s: Samples, eps: Samples, s: Times, t: Times, schedule: Schedule, prediction: Prediction
) -> Samples:
    """Returns Eq. 13's target [b, ...] as it is printed: an ablation, wrong wherever s > 0.

    The print lost a bracket, which flips the sign of the term in x_s.
    """
    p, _ = coefficients(prediction, schedule.alpha(t), schedule.sigma(t))
    flipped = torch.where(_is_clean(s, schedule), 0.0, 2 * p / schedule.alpha(s))
    return subinterval_target(x_s, eps, s, t, schedule, prediction) - expand_like(flipped, x_s) * x_s


def score_matching_weight(s: Times, t: Times, schedule: Schedule) -> Coefficients:
    """Returns Eq. 13's weight on the prediction's own squared error, [b] float64; 1 where x_s is clean (Eq. 4).

    Eq. 13 clamps 1/sigma_ts^2 to [0, 10] and has sigma_ts times the error: the weight is min(1, 10 sigma_ts^2). Where
    the schedule's sigma exceeds 1, sigma_ts^2 is measured in `Schedule.clamp_unit`.
    """
    _, sigma_ts = schedule.transition(s, t)
    weight = (MAX_WEIGHT * sigma_ts**2 / schedule.clamp_unit(t)).clamp(max=1.0)
    return torch.where(_is_clean(s, schedule), torch.ones_like(weight), weight)


def score_matching_loss(
    predict: Predict, x_s: Samples, eps: Samples, s: Times, t: Times, schedule: Schedule, prediction: Prediction,
    target: Target = subinterval_target,
) -> Losses:  # fmt: skip
    """Returns Eq. 13 with its lost bracket restored, Eq. 4 at s = 0: the fake's loss [b] on generated samples x_s."""
    psi = predict(add_noise(x_s, eps, s, t, schedule), t)
    error = psi - target(x_s, eps, s, t, schedule, prediction)
    square = _mean_per_sample(error**2)
    return score_matching_weight(s, t, schedule).to(square) * square


def x0_residual(
    psi: Samples, x_s: Samples, eps: Samples, s: Times, t: Times, schedule: Schedule, prediction: Prediction
) -> Samples:
    """Returns x0_hat - x0* [b, ...]: what a prediction psi at x_t says of x_0, less the x0* of `subinterval_target`.

    Its mean given x_t is the error of x0_hat, zero for the exact prediction. kappa times it is E_psi[x_s | x_t] - x_s.
    """
    sigma_t = schedule.sigma(t)
    target = subinterval_target(x_s, eps, s, t, schedule, prediction)
    return expand_like(sigma_t / determinant(prediction, schedule.alpha(t), sigma_t), x_s) * (target - psi)


def _rms_per_sample(x: Samples) -> Losses:
    """Returns the root mean square of [b, ...] over all axes but the batch's: [b]."""
    return _mean_per_sample(x**2).sqrt()


def without_component(x: Samples, along: Samples) -> Samples:
    """Returns x less its orthogonal projection on `along`, sample by sample, all [b, ...]; x where `along` is zero.

    The inner product of the result with x is never negative.
    """
    unit = along / expand_like(_rms_per_sample(along).clamp(min=torch.finfo(along.dtype).eps), along)
    return x - expand_like(_mean_per_sample(x * unit), x) * unit


def _agreement_figures(difference: Samples, residual: Samples) -> Figures:
    """Returns three mean squares [b]: how far the teacher's and the fake's E[x_s | x_t] lie from x_s, and from another.

    difference: E_F[x_s | x_t] - E_T[x_s | x_t]. residual: E_F[x_s | x_t] - x_s. As the generator drew x_s, both errors
    have the part that no denoiser can know, and (teacher - fake) / gap is, in the mean over x_s: 1 for a fake that is
    right, (2 - l) / l for one that has gone the part l of the way from the teacher, at most 0 for one that does no
    better than the teacher.
    """
    return {
        "teacher_error": _mean_per_sample((residual - difference) ** 2),
        "fake_error": _mean_per_sample(residual**2),
        "gap": _mean_per_sample(difference**2),
    }


def _projection_figures(difference: Samples, residual: Samples) -> Figures:
    """Returns for each sample |residual| / |difference|, and the share of |difference|^2 that lies along the residual.

    difference, residual: [b, ...] in one unit. A difference shorter than `MIN_NORMALISER` counts as that long.
    """
    length = _rms_per_sample(difference).clamp(min=MIN_NORMALISER)
    removed = _rms_per_sample(difference - without_component(difference, residual))
    return {"residual_ratio": _rms_per_sample(residual) / length, "removed_share": (removed / length) ** 2}


def matching_gradient(
    x_s: Samples, eps: Samples, s: Times, t: Times, schedule: Schedule, prediction: Prediction,
    teacher: Predict, fake: Predict, weighting: Weighting = "normalised", x0_generator: Samples | None = None,
) -> tuple[Samples, Figures]:  # fmt: skip
    """Returns the gradient of Eq. 11 (Eq. 9 at s = 0) with respect to x_s, [b, ...], without graph, and its figures.

    T and F are the predictions of teacher and fake at x_t, x0_T and x0_F what they say of x_0. The weightings but
    `projected` differ by a positive factor for each sample and t:
    paper: w (T - F), w = alpha_ts alpha_t / (sigma_t D).
    posterior: kappa (x0_F - x0_T) = E_F[x_s | x_t] - E_T[x_s | x_t], kappa = alpha_s sigma_ts^2 / sigma_t^2.
    normalised: the same, divided by the mean absolute x_s - E_T[x_s | x_t] of the sample, which needs many elements to
    be a mean; at s = 0 it is the form of public DMD code.
    projected: `normalised` without its component along r = E_F[x_s | x_t] - x_s, the fake's own error at this sample
    (PDMD, arXiv 2609.35768); the divisor stays. Of one element nothing is left.
    public: x0_F - x0_T, divided by the mean absolute x0_generator - x0_T; x0_generator is the generator's own
    prediction of x_0, without which `public` is a ValueError.
    """
    with torch.no_grad():
        x_t = add_noise(x_s, eps, s, t, schedule)
        psi_teacher, psi_fake = teacher(x_t, t), fake(x_t, t)
        alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
        alpha_ts, sigma_ts = schedule.transition(s, t)
        d = determinant(prediction, alpha_t, sigma_t)
        kappa = expand_like(schedule.alpha(s) * sigma_ts**2 / sigma_t**2, x_s)
        x0_difference = expand_like(sigma_t / d, x_s) * (psi_teacher - psi_fake)  # x0_F - x0_T
        residual = x0_residual(psi_fake, x_s, eps, s, t, schedule, prediction)
        figures = _agreement_figures(kappa * x0_difference, kappa * residual)
        if weighting == "paper":
            return expand_like(alpha_ts * alpha_t / (sigma_t * d), x_s) * (psi_teacher - psi_fake), figures
        x0_teacher = predicted_x0(psi_teacher, x_t, t, schedule, prediction)
        if weighting == "projected":
            figures |= _projection_figures(x0_difference, residual)
            x0_difference = without_component(x0_difference, residual)
        if weighting == "posterior":
            return kappa * x0_difference, figures
        if weighting == "public":
            if x0_generator is None:
                raise ValueError("the public weighting needs the generator's own x_0 prediction, x0_generator")
            gradient, error = x0_difference, x0_generator - x0_teacher
        elif weighting in ("normalised", "projected"):
            gradient, error = kappa * x0_difference, x_s - posterior_mean(x0_teacher, x_t, s, t, schedule)
        else:
            raise ValueError(f"weighting: {weighting!r} is none of {', '.join(get_args(Weighting))}")
        return gradient / expand_like(_mean_per_sample(error.abs()).clamp(min=MIN_NORMALISER), x_s), figures


def distribution_matching_loss(
    x_s: Samples, eps: Samples, s: Times, t: Times, schedule: Schedule, prediction: Prediction,
    teacher: Predict, fake: Predict, weighting: Weighting = "normalised", x0_generator: Samples | None = None,
) -> tuple[Losses, Figures]:  # fmt: skip
    """Returns Eq. 11 as a loss [b], 0.5 |x_s - sg(x_s - gradient)|^2, sg being the stop of gradients, and its figures.

    Its gradient in x_s is `matching_gradient` / elements. x_s is the rollout's end, with its graph. The teacher is
    called with guidance, the fake without; neither is differentiated.
    """
    gradient, figures = matching_gradient(x_s, eps, s, t, schedule, prediction, teacher, fake, weighting, x0_generator)
    return 0.5 * _mean_per_sample((x_s - (x_s - gradient).detach()) ** 2), figures


def anchor_loss(x_s: Samples, anchor: Samples, duration: float) -> Losses:
    """Returns the squared difference [b] of two mean velocities over a phase of that duration, from the same state to
    x_s and to anchor [b, ...]. x_s is the rollout's end, with its graph.
    """
    return _mean_per_sample(((x_s - anchor) / duration) ** 2)


def fisher_stop_gradient_loss(
    teacher: Predict, fake: Predict, x_s: Samples, eps: Samples, s: Times, t: Times,
    schedule: Schedule, prediction: Prediction,
) -> Losses:  # fmt: skip
    """Returns |sg(E_T[x_s | x_t]) - E_F[x_s | x_t]|^2, [b], differentiated through the fake's input alone.

    The two means are of x_s, never of a velocity: only there does the loss descend. Its gradient is not the Fisher
    divergence's but the KL's, preconditioned by the covariance of x_s given x_t. The Fisher divergence itself is
    `score_matching_loss` of the teacher minus the fake's, on samples with their graph.
    """
    x_t = add_noise(x_s, eps, s, t, schedule)

    def expected_x_s(predict: Predict) -> Samples:
        return posterior_mean(predicted_x0(predict(x_t, t), x_t, t, schedule, prediction), x_t, s, t, schedule)

    with torch.no_grad():
        wanted = expected_x_s(teacher)
    return _mean_per_sample((expected_x_s(fake) - wanted) ** 2)
