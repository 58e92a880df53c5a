"""The two extension points: `VelocityModel`, what is distilled, and `Codec`, what stands before and behind it."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from phased_dmd.diffusion import Prediction, Schedule

Condition = dict[str, Tensor]  # what a network is told beside x and t: tensors of one row a sample


class VelocityModel(Protocol):
    """A teacher bank: one or more frozen networks on one schedule, all of one prediction type.

    networks: the teacher's, noisiest first. students: what experts and fakes start from; the very networks
    wherever they can be trained. switches: see `PhasePlan`. sample_shape: of one sample, without the batch.
    guidance: g of uncond + g (cond - uncond); 1 is none. lora_targets: ends of the names of the adapted modules.
    """

    networks: Sequence[nn.Module]
    students: Sequence[nn.Module]
    switches: Sequence[float]
    schedule: Schedule
    prediction: Prediction
    sample_shape: tuple[int, ...]
    guidance: float
    lora_targets: Sequence[str]

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The native prediction [b, ...] at x [b, ...] and t [b] in [0, 1], on the network's own time scale."""
        ...

    def guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """The guided prediction [b, ...]."""
        ...


class Codec(Protocol):
    """Prompts to conditions, latents to pixels."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """One row a prompt; the empty prompt is the unconditional one."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [b, frames, height, width, 3] in [0, 1]."""
        ...


def rows(condition: Condition, index: Tensor) -> Condition:
    """The chosen rows of a condition."""
    return {name: tensor[index.to(tensor.device)] for name, tensor in condition.items()}
