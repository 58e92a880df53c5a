"""The generator's sampling path, with gradient through all of a phase's steps, the last one, or none."""

from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from phased_dmd.maths.phases import Hop
from phased_dmd.maths.schedules import Prediction, Schedule, ddim_step, expand_like, predicted_x0, times_like

Solver = Literal["ddim", "renoise"]


class Rollout(NamedTuple):
    """A rollout gives x, the sample at the path's end [b, ...], and x0, the last call's prediction of x_0 [b, ...]."""

    x: Tensor
    x0: Tensor


def rollout(
    predict: Callable[[int, Tensor, Tensor], Tensor],
    x: Tensor,
    path: Sequence[Hop],
    schedule: Schedule,
    prediction: Prediction,
    gradient_steps: Collection[int] = (),
    solver: Solver = "ddim",
    noise: Callable[[int], Tensor] | None = None,
) -> Rollout:
    """Runs the pipeline of Eq. 10 over the hops of `PhasePlan.path` (Sec. 2.2, 2.3).

    predict(step, x, t) returns the native prediction [b, ...] of the step's expert at t [b]. x is the first sample,
    sigma(t_0) eps, [b, ...]. gradient_steps are the steps recorded for backward: all of the phase's, or the exit step
    alone (SGTS). The solver `ddim` keeps the predicted noise; `renoise` draws it anew from noise(step) [b, ...], which
    may be None (else ValueError) only if no hop ends at sigma_r > 0.
    """
    x0 = x
    for step, t, r in path:
        t_, r_ = times_like(t, x), times_like(r, x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and step in gradient_steps):
            psi = predict(step, x, t_)
            x0 = predicted_x0(psi, x, t_, schedule, prediction)
            if solver == "ddim":
                x = ddim_step(psi, x, t_, r_, schedule, prediction)
                continue
            x = expand_like(schedule.alpha(r_), x0) * x0
            if schedule.sigma(r_)[0] > 0:
                if noise is None:
                    raise ValueError("the renoise solver needs a source of noise")
                x = x + expand_like(schedule.sigma(r_), x) * noise(step)
    return Rollout(x, x0)


def aimed_at(x: Tensor, end: Tensor, t: float, r: float, schedule: Schedule) -> Tensor:
    """Returns the x_0 that a DDIM step must predict at x [b, ...] and t to reach `end` at r < t, [b, ...].

    Both lie on one line, x = alpha_t x_0 + sigma_t eps and end = alpha_r x_0 + sigma_r eps.
    """
    t_, r_ = times_like(t, x), times_like(r, x)
    alpha_t, alpha_r = (expand_like(schedule.alpha(time), x) for time in (t_, r_))
    sigma_t, sigma_r = (expand_like(schedule.sigma(time), x) for time in (t_, r_))
    return (sigma_t * end - sigma_r * x) / (sigma_t * alpha_r - sigma_r * alpha_t)
