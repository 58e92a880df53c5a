"""What the teachers from diffusers' pipelines have in common: transformers, a VAE, and checks of their config."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phased_dmd.config.teacher import PipelineTeacher, QwenImageTeacher, Size, WanTeacher
from phased_dmd.errors import UserError
from phased_dmd.maths.schedules import FlowSchedule, Prediction, Schedule
from phased_dmd.models.source import Source

ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class PipelineModel:
    """Is the common part of the `VelocityModel`s whose transformers predict the velocity of a flow.

    kind, parts: the transformers' class and their names in the folder, noisiest first; experts and fakes start from
    the very networks. Whether they can be loaded is checked at once. shapes: of one sample's latents, one a resolution
    bucket. switches: see `PhasePlan`.
    """

    def __init__(
        self, config: WanTeacher | QwenImageTeacher, source: Source, device: torch.device, kind: type,
        parts: Sequence[str], shapes: Sequence[tuple[int, ...]], switches: Sequence[float] = (),
    ) -> None:  # fmt: skip
        if len(config.guidance) not in (1, len(parts)):
            raise UserError(f"teacher.guidance: {len(config.guidance)} values for {len(parts)} network(s)")
        self.schedule: Schedule = FlowSchedule()
        self.prediction: Prediction = "flow"
        self.device, self.dtype = device, DTYPES[config.dtype]
        self.sample_shapes, self.switches = shapes, switches
        self.guidance: Sequence[float] = config.guidance * (len(parts) // len(config.guidance))
        self.lora_targets: Sequence[str] = config.lora_targets
        self._source, self._outlines = source, {name: source.outline(kind, name, self.dtype) for name in parts}
        self._networks: Sequence[nn.Module] = []
        for name, outline in self._outlines.items():
            source.check_loadable(outline, name)
            check_targets(outline, config.lora_targets)

    @property
    def networks(self) -> Sequence[nn.Module]:
        """Returns the networks, loaded when they are first needed: by then the encoders may be gone."""
        if not self._networks:
            parts = self._outlines.items()
            self._networks = [self._source.network(outline, name, self.dtype, self.device) for name, outline in parts]
        return self._networks

    @property
    def students(self) -> Sequence[nn.Module]:
        return self.networks

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        return unconditional + guidance * (conditional - unconditional)


class PipelineCodec:
    """Is the common part of the `Codec`s with a video VAE whose latents are shifted and scaled channel by channel.

    kind: the VAE's class. parts: those that encode; fingerprinted with what else the encoding depends on.
    """

    takes_images = False

    def __init__(
        self, config: PipelineTeacher, source: Source, device: torch.device, kind: type, parts: Sequence[str],
        *encoded_by: object,
    ) -> None:  # fmt: skip
        for name in parts:
            if name.endswith("encoder"):
                source.check_weights(name)
        self.source, self.device, self.max_tokens = source, device, config.max_tokens
        # Half precision is slow on a CPU.
        self.text_dtype = torch.float32 if device.type == "cpu" else DTYPES[config.dtype]
        self._fingerprint, self._encoded_by = "", (parts, config.max_tokens, *encoded_by)
        self.vae: Any = source.load(kind, "vae", dtype=torch.float32).to(device)
        shape = 1, -1, 1, 1, 1
        self.mean = torch.tensor(self.vae.config["latents_mean"]).reshape(shape)
        self.std = torch.tensor(self.vae.config["latents_std"]).reshape(shape)

    @property
    def fingerprint(self) -> str:
        self._fingerprint = self._fingerprint or self.source.fingerprint(*self._encoded_by)
        return self._fingerprint

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.vae.device, self.vae.dtype)
        pixels = self.vae.decode(latents * self.std.to(latents) + self.mean.to(latents), return_dict=False)[0]
        return pixels.float().permute(0, 2, 3, 4, 1) / 2 + 0.5


def check_pipeline(source: Source, names: Sequence[str]) -> None:
    """Raises a UserError where the folder holds another pipeline."""
    if (found := source.index.get("_class_name")) not in names:
        raise UserError(f"teacher.path: {source.path} is a {found}, not a {' or '.join(names)}")


def check_sizes(
    sizes: Sequence[Size], strides: tuple[int, int, int], most: tuple[int, int, int] | None = None
) -> None:  # fmt: skip
    """Raises a UserError, with the nearest size that is valid, where one does not fit the strides.

    strides: of frames, height and width. most: the frames, height and width up to which the network knows positions.
    """
    for i, size in enumerate(sizes):
        lengths = size.num_frames, size.height, size.width
        nearest = [stride * max(1, round(length / stride)) for length, stride in zip(lengths, strides, strict=True)]
        nearest[0] = 1 + strides[0] * round((size.num_frames - 1) / strides[0])
        if tuple(nearest) != lengths:
            raise UserError(
                f"teacher.sizes.{i}: {size} does not fit the strides {', '.join(map(str, strides))} of frames, "
                f"height and width; nearest is {'x'.join(map(str, nearest))}"
            )
        if most and any(a > b for a, b in zip(lengths, most, strict=True)):
            limit = "x".join(map(str, most))
            raise UserError(
                f"teacher.sizes.{i}: {size} is beyond the network's table of positions, which ends at {limit}"
            )


def check_targets(network: nn.Module, targets: Sequence[str]) -> None:
    """Raises a UserError where a LoRA target ends the name of no module, or of one that no adapter fits."""
    modules = dict(network.named_modules())
    for target in targets:
        found = [module for name, module in modules.items() if name == target or name.endswith(f".{target}")]
        if not found:
            raise UserError(f"teacher.lora_targets: {target} ends the name of no module of the transformer")
        if odd := next((module for module in found if not isinstance(module, ADAPTABLE)), None):
            raise UserError(f"teacher.lora_targets: {target} is a {type(odd).__name__}, which takes no adapter")
