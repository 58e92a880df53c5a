"""The two updates of Phased DMD: what they draw, roll out and descend."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from phased_dmd.draws import Draws
from phased_dmd.engine.world import mean
from phased_dmd.maths.losses import (
    biased_target,
    distribution_matching_loss,
    fisher_stop_gradient_loss,
    printed_target,
    score_matching_loss,
    subinterval_target,
)
from phased_dmd.maths.rollout import Rollout
from phased_dmd.models.protocol import Condition, rows
from phased_dmd.networks.roles import FAKE, TEACHER, expert_role
from phased_dmd.networks.system import System
from phased_dmd.paths import Paths

TARGETS = {"unbiased": subinterval_target, "biased": biased_target, "printed": printed_target}


def score_matching(draws: Draws, condition: Condition, paths: Paths) -> Tensor:
    """The fake learns the score of what the generator makes (Eq. 13; Eq. 4 where the phase ends at s = 0).

    Adds to the gradient; returns the loss of these samples, weighted by their share of the process's batch.
    """
    system, present = draws.system, draws.networks()
    x_s = paths.end(draws, condition)
    if (index := draws.shared) is not None:
        x_s, condition = x_s[index], rows(condition, index)
    s, t = draws.times()
    with system.roles.active(FAKE):
        loss = score_matching_loss(
            lambda x, t: system.fake(x, t, condition, present),
            x_s, draws.eps(), s, t, system.model.schedule, system.model.prediction,
            TARGETS[system.config.objective.target],
        ).mean() * draws.share  # fmt: skip
        backward(loss, system)
    return loss.detach()


def distribution_matching(draws: Draws, condition: Condition, paths: Paths) -> Tensor:
    """The generator descends its divergence from the teacher at the phase's end: of KL, the gradient is the difference
    of fake and teacher (Eq. 11; Eq. 9 at s = 0).

    Adds to the gradient; returns the loss of these samples, weighted by their share of the process's batch.
    """
    system, config, role = draws.system, draws.system.config, expert_role(draws.phase)
    if config.plan.gradient == "all":
        x, hops = paths.begin(draws, condition), draws.path[draws.first :]
    else:
        x, hops = paths.before_exit(draws, condition), draws.path[-1:]
    with system.roles.active(role):
        end = system.roll(hops, x, condition, [hop.step for hop in hops], draws.renoise)
        descend = kullback_leibler if config.objective.divergence == "kl" else fisher
        loss = descend(draws, condition, end).mean() * draws.share
        backward(loss, system)
    return loss.detach()


def kullback_leibler(draws: Draws, condition: Condition, end: Rollout) -> Tensor:
    """The loss [b] whose gradient is that of the Kullback-Leibler divergence (Eq. 11)."""
    system, present, (s, t) = draws.system, draws.networks(), draws.times()
    return distribution_matching_loss(
        end.x, draws.eps(), s, t, system.model.schedule, system.model.prediction,
        teacher=lambda x, t: system.teacher(x, t, condition, present),
        fake=lambda x, t: system.fake(x, t, condition, present),
        weighting=system.config.objective.weighting, x0_generator=end.x0.detach(),
    )  # fmt: skip


def fisher(draws: Draws, condition: Condition, end: Rollout) -> Tensor:
    """The loss [b] whose gradient is that of the Fisher divergence: the teacher's denoising error minus the fake's.

    Teacher and fake are differentiated one after the other, each within its role, down to x_s.
    """
    system, present, (s, t), eps = draws.system, draws.networks(), draws.times(), draws.eps()
    schedule, prediction = system.model.schedule, system.model.prediction

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        return system.teacher(x, t, condition, present)

    def fake(x: Tensor, t: Tensor) -> Tensor:
        return system.fake(x, t, condition, present)

    x_s, losses = end.x.detach().requires_grad_(), []
    if system.config.objective.divergence == "fisher":
        with system.roles.active(TEACHER):
            losses.append(_along(x_s, score_matching_loss(teacher, x_s, eps, s, t, schedule, prediction)))
        with system.roles.active(FAKE):
            losses.append(_along(x_s, -score_matching_loss(fake, x_s, eps, s, t, schedule, prediction)))
    else:
        with system.roles.active(FAKE):
            loss = fisher_stop_gradient_loss(teacher, fake, x_s, eps, s, t, schedule, prediction)
            losses.append(_along(x_s, loss))
    return torch.stack([value + ((end.x - x_s.detach()) * slope).flatten(1).sum(1) for value, slope in losses]).sum(0)


def _along(x: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """A loss's values [b] and its gradient in x [b, ...]."""
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def backward(loss: Tensor, system: System) -> None:
    """Each of the processes that share a sample has a part of its gradient; they are averaged."""
    (loss * system.config.engine.sequence_parallel).backward()


def over(
    batch: Iterable[tuple[Draws, Condition]], paths: Paths, update: Callable[[Draws, Condition, Paths], Tensor]
) -> float:
    """An update's loss over a whole batch, micro-batch by micro-batch and over all processes."""
    return mean(torch.stack([update(draws, condition, paths) for draws, condition in batch]).sum())
