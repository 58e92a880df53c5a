"""How far pairs of samples lower the variance of the gradients, at equal batches, on nano."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from phased_dmd import train
from phased_dmd.draws import Draws
from phased_dmd.models.protocol import Condition
from phased_dmd.networks.roles import FAKE, expert_role
from phased_dmd.paths import Paths
from phased_dmd.recipes import resolve
from phased_dmd.train import Job, Position
from phased_dmd.updates import distribution_matching, score_matching

AFTER = 10**6  # iterations: draws that training has not had
PAIRS = (None, "noise", "start")


def variances(folder: Path, iterations: int = 30, batches: int = 48) -> list[dict[str, Any]]:
    """For each phase at its end, trained by the recipe: the variance of the fake's and the expert's gradients over
    batches, summed over all parameters, by the kind of pairs; relative to none.
    """
    found: list[dict[str, Any]] = []
    end = train.end

    def measured(job: Job, phase: int, expert: Any) -> None:
        row: dict[str, Any] = {"phase": phase}
        for role, update, descend in (
            (FAKE, 1, score_matching),
            (expert_role(phase), 0, distribution_matching),
        ):
            by_pairs = {str(kind): variance(job, phase, role, update, descend, kind, batches) for kind in PAIRS}
            row["fake" if role == FAKE else "expert"] = {
                kind: value / by_pairs["None"] for kind, value in by_pairs.items()
            }
        found.append(row)
        end(job, phase, expert)

    with mock.patch.object(train, "end", measured):
        train.distill(resolve("nano-t2i", {"iterations": iterations, "sample_every": 10**6}), folder, quiet=True)
    return found


def variance(
    job: Job, phase: int, role: str, update: int, descend: Callable[[Draws, Condition, Paths], Tensor],
    kind: str | None, batches: int,
) -> float:  # fmt: skip
    """The trace of the covariance of a role's gradient over batches drawn with one kind of pairs."""
    parameters = job.system.roles.parameters(role)
    mean = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    squares = 0.0
    rollouts = job.system.config.rollouts.model_copy(update={"antithetic": kind})
    system = replace(job.system, config=job.system.config.model_copy(update={"rollouts": rollouts}))
    for batch in range(batches):
        for draws, condition in replace(job, system=system).batch(Position(phase, AFTER + batch), update):
            descend(draws, condition, Paths())
        for name, p in parameters.items():
            assert p.grad is not None
            gradient = p.grad.double()
            squares += float(gradient.square().sum())
            mean[name] += gradient / batches
            p.grad = None
    return (squares - batches * sum(float(m.square().sum()) for m in mean.values())) / (batches - 1)
