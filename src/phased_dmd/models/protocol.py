"""The two extension points: a `VelocityModel` is distilled; a `Codec` encodes its prompts and decodes its samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from phased_dmd.maths.schedules import Prediction, Schedule

Condition = dict[str, Tensor]  # what a network is told beside x and t


NEGATIVE = "negative_"  # begins names in a condition, see `Codec.encode_picture`


class VelocityModel(Protocol):
    """Offers a teacher as one or more frozen networks on one schedule, all of one prediction type.

    networks: the teacher's, noisiest first. students: what experts and fakes start from; the very networks
    wherever they can be trained. switches: see `PhasePlan`. sample_shapes: of one sample, without the batch, one a
    resolution bucket. guidance: one a network, the g of uncond + g (cond - uncond); 1 is none.
    lora_targets: ends of the names of the adapted modules.
    """

    @property
    def networks(self) -> Sequence[nn.Module]: ...
    @property
    def students(self) -> Sequence[nn.Module]: ...
    @property
    def switches(self) -> Sequence[float]: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def prediction(self) -> Prediction: ...
    @property
    def sample_shapes(self) -> Sequence[tuple[int, ...]]: ...
    @property
    def guidance(self) -> Sequence[float]: ...
    @property
    def lora_targets(self) -> Sequence[str]: ...

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """Returns the repeated blocks of a network or its copy, to be sharded, recomputed and compiled one by one."""
        ...

    def batch(self, rows: Sequence[Condition]) -> Condition:
        """Joins the codec's conditions, one a sample, into one condition of tensors [b, ...], padded as needed."""
        ...

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Returns a network's native prediction [b, ...] at x [b, ...] and t [b] in [0, 1]."""
        ...

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        """Returns the guided prediction [b, ...]."""
        ...


class Codec(Protocol):
    """Encodes prompts, and pictures given with them, to conditions, and decodes latents to pixels.

    A picture is a clip's first frame, or what a prompt asks to change.

    fingerprint: changes whenever the same prompt would be encoded differently; what was encoded before is then redone.
    takes_images: whether every prompt needs a picture.
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def takes_images(self) -> bool: ...

    def encode_text(self, prompts: Sequence[str]) -> list[Condition]:
        """Encodes each prompt to an unpadded condition on the CPU; the empty prompt is encoded like any other."""
        ...

    def too_long(self, prompts: Sequence[str]) -> int:
        """Counts the prompts that `encode_text` cuts off."""
        ...

    def fits(self, image: Path) -> list[int]:
        """Lists the resolution buckets that a picture fits; a UserError if it is no picture."""
        ...

    def encode_picture(self, prompt: str, picture: Path, bucket: int) -> Condition:
        """Returns what a picture adds to a prompt's condition in a resolution bucket, and what it tells instead.

        What begins with `NEGATIVE` is told in the unconditional half of guidance, where that depends on the picture.
        """
        ...

    def free(self) -> None:
        """Lets go of the encoders; they are loaded again when next needed."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents to pixels [b, frames, height, width, 3] in [0, 1]."""
        ...


def rows(condition: Condition, index: Tensor) -> Condition:
    """Selects rows of a batched condition."""
    return {name: tensor[index.to(tensor.device)] for name, tensor in condition.items()}
