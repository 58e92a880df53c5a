"""How far pairs of samples lower the variance of the gradients, at equal batches, on nano."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from phased_dmd import train
from phased_dmd.networks.roles import FAKE, expert_role
from phased_dmd.recipes import resolve
from phased_dmd.step import EXPERT_UPDATE, Batch, Loss, States, draw, expert_loss, fake_loss
from phased_dmd.train import Job

AFTER = 10**6  # iterations: draws that training has not had
PAIRS = (None, "start")


def variances(folder: Path, iterations: int = 30, batches: int = 48) -> list[dict[str, Any]]:
    """For each phase at its end, trained by the recipe: the variance of the fake's and the expert's gradients over
    batches, summed over all parameters, by the kind of pairs; relative to none.
    """
    found: list[dict[str, Any]] = []
    end = train.end

    def measured(job: Job, phase: int, expert: Any) -> None:
        row: dict[str, Any] = {"phase": phase}
        for role, update, loss_of in (
            (FAKE, 1, fake_loss),
            (expert_role(phase), EXPERT_UPDATE, expert_loss),
        ):
            by_pairs = {str(kind): variance(job, phase, role, update, loss_of, kind, batches) for kind in PAIRS}
            row["fake" if role == FAKE else "expert"] = {
                kind: value / by_pairs["None"] for kind, value in by_pairs.items()
            }
        found.append(row)
        end(job, phase, expert)

    with mock.patch.object(train, "end", measured):
        train.distill(resolve("nano-t2i", {"iterations": iterations, "sample_every": 10**6}), folder, quiet=True)
    return found


def variance(
    job: Job, phase: int, role: str, update: int, loss_of: Callable[[Batch, States], Loss],
    kind: str | None, batches: int,
) -> float:  # fmt: skip
    """The trace of the covariance of a role's gradient over batches drawn with one kind of pairs."""
    parameters = job.system.roles.parameters(role)
    mean = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    squares = 0.0
    rollouts = job.system.config.rollouts.model_copy(update={"antithetic": kind})
    system = replace(job.system, config=job.system.config.model_copy(update={"rollouts": rollouts}))
    for batch in range(batches):
        with system.roles.active(role):
            for samples in job.micro_batches:
                drawn = draw(system, phase, AFTER + batch, update, samples[0], job.odds, job.conditions)
                loss_of(drawn, {})[0].backward()
        for name, p in parameters.items():
            assert p.grad is not None
            gradient = p.grad.double()
            squares += float(gradient.square().sum())
            mean[name] += gradient / batches
            p.grad = None
    return (squares - batches * sum(float(m.square().sum()) for m in mean.values())) / (batches - 1)
