"""The two updates of Phased DMD: what they draw, roll out and descend."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from phased_dmd.draws import Draws
from phased_dmd.engine.world import mean
from phased_dmd.experts import FAKE, expert_role
from phased_dmd.models.protocol import Condition
from phased_dmd.objectives import (
    biased_target,
    distribution_matching_loss,
    printed_target,
    score_matching_loss,
    subinterval_target,
)
from phased_dmd.system import System

TARGETS = {"unbiased": subinterval_target, "biased": biased_target, "printed": printed_target}


def score_matching(draws: Draws, condition: Condition) -> Tensor:
    """The fake learns the score of what the generator makes (Eq. 13; Eq. 4 where the phase ends at s = 0).

    Adds to the gradient; returns the loss of these samples, weighted by their share of the process's batch.
    """
    system, phase, present = draws.system, draws.key[1], draws.networks()
    path = system.plan.path(phase, draws.exit_step(full=system.config.plan.fake_rollout == "full"))
    with torch.no_grad():
        x_s = system.roll(path, draws.noise("start"), condition, renoise=lambda i: draws.noise("renoise", i)).x
    s, t = draws.times()
    with system.roles.active(FAKE):
        loss = score_matching_loss(
            lambda x, t: system.fake(x, t, condition, present),
            x_s, draws.noise("eps"), s, t, system.model.schedule, system.model.prediction,
            TARGETS[system.config.objective.target],
        ).mean() * draws.share  # fmt: skip
        backward(loss, system)
    return loss.detach()


def distribution_matching(draws: Draws, condition: Condition) -> Tensor:
    """The generator descends the difference of fake and teacher at the phase's end (Eq. 11; Eq. 9 at s = 0).

    Adds to the gradient; returns the loss of these samples, weighted by their share of the process's batch.
    """
    system, phase, present = draws.system, draws.key[1], draws.networks()
    path = system.plan.path(phase, draws.exit_step(full=False))
    exits = system.plan.steps(phase) if system.config.plan.gradient == "all" else (path[-1].step,)
    with system.roles.active(expert_role(phase)):
        end = system.roll(path, draws.noise("start"), condition, exits, lambda i: draws.noise("renoise", i))
        s, t = draws.times()
        loss = distribution_matching_loss(
            end.x, draws.noise("eps"), s, t, system.model.schedule, system.model.prediction,
            teacher=lambda x, t: system.teacher(x, t, condition, present),
            fake=lambda x, t: system.fake(x, t, condition, present),
            weighting=system.config.objective.weighting, x0_generator=end.x0.detach(),
        ).mean() * draws.share  # fmt: skip
        backward(loss, system)
    return loss.detach()


def backward(loss: Tensor, system: System) -> None:
    """Each of the processes that share a sample has a part of its gradient; they are averaged."""
    (loss * system.config.engine.sequence_parallel).backward()


def over(batch: Iterable[tuple[Draws, Condition]], update: Callable[[Draws, Condition], Tensor]) -> float:
    """An update's loss over a whole batch, micro-batch by micro-batch and over all processes."""
    return mean(torch.stack([update(draws, condition) for draws, condition in batch]).sum())
