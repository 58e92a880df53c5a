"""What every check of a model shares: its parts, calls of them, and how near is the same."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from phased_dmd.engine.world import device
from phased_dmd.models.protocol import Condition, VelocityModel

Complaints = Iterator[str]  # what a check finds; it is left at the first, so that each may rely on those before it


class ModelError(AssertionError):
    """What `check_model` found wrong."""


class Part(NamedTuple):
    """A network or student of a model, and the times that it serves."""

    name: str
    module: nn.Module
    low: float
    high: float

    def times(self, *fractions: float) -> Tensor:
        """Times within its range, float64 [b]."""
        share = torch.tensor(fractions, dtype=torch.float64, device=device())
        return self.low + share * (self.high - self.low)


def parts_of(model: VelocityModel, start: float) -> Iterator[Part]:
    """The networks, and the students that are none of them."""
    bounds = (start, *model.switches, 0.0)
    for i, (network, student) in enumerate(zip(model.networks, model.students, strict=True)):
        yield Part(f"networks[{i}]", network, bounds[i + 1], bounds[i])
        if student is not network:
            yield Part(f"students[{i}]", student, bounds[i + 1], bounds[i])


def call(model: VelocityModel, part: Part, x: Tensor, t: Tensor, rows: Sequence[Condition]) -> Tensor:
    try:
        return model.predict(part.module, x, t, model.batch(rows))
    except Exception as error:  # whatever a network raises
        message = f"{part.name}: predict or batch fails for x {list(x.shape)} and t {list(t.shape)}: {error}"
        raise ModelError(message) from error


def near(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> bool:
    """Whether the norm of a - b is small beside that of b."""
    return bool((a.double() - b.double()).norm() <= tolerance * b.double().norm())


def tolerance_of(psi: Tensor, module: nn.Module) -> float:
    """Of two computations of the same prediction, relative."""
    return 5e-2 if any(tensor.itemsize < 4 for tensor in (psi, *module.parameters())) else 1e-3
