"""What the teachers from diffusers' pipelines have in common: transformers, a VAE, and checks of their config."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from phased_dmd.config.teacher import PipelineTeacher, Size
from phased_dmd.errors import UserError
from phased_dmd.maths.schedules import FlowSchedule, Prediction, Schedule
from phased_dmd.media import shown_size
from phased_dmd.models.protocol import Condition
from phased_dmd.models.source import Source
from phased_dmd.recipes import fitting

ASPECT = 0.05  # by how much a picture's aspect ratio may differ from its bucket's
ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class PipelineModel:
    """Is the common part of the `VelocityModel`s whose transformers predict the velocity of a flow.

    kind, parts: the transformers' class and their names in the folder, noisiest first; experts and fakes start from
    the very networks. Whether they can be loaded is checked at once. lora_targets: of the config. shapes: of one
    sample's latents, one a resolution bucket. switches: see `PhasePlan`.
    """

    def __init__(
        self, config: PipelineTeacher, source: Source, device: torch.device, kind: type, lora_targets: Sequence[str],
        parts: Sequence[str], shapes: Sequence[tuple[int, ...]], switches: Sequence[float] = (),
    ) -> None:  # fmt: skip
        if len(config.guidance) not in (1, len(parts)):
            raise UserError(f"teacher.guidance: {len(config.guidance)} values for {len(parts)} network(s)")
        self.schedule: Schedule = FlowSchedule()
        self.prediction: Prediction = "flow"
        self.device, self.dtype = device, DTYPES[config.dtype]
        self.sample_shapes, self.switches = shapes, switches
        self.guidance: Sequence[float] = config.guidance * (len(parts) // len(config.guidance))
        self.lora_targets: Sequence[str] = lora_targets
        self._source, self._outlines = source, {name: source.outline(kind, name, self.dtype) for name in parts}
        self._networks: Sequence[nn.Module] = []
        for name, outline in self._outlines.items():
            source.check_loadable(outline, name)
            self.lora_targets = adapted(outline, lora_targets)

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
    """Is the common part of the `Codec`s of pipelines, all but what encodes and what decodes.

    kind: the VAE's class. parts: those that encode; fingerprinted with what else the encoding depends on.
    """

    takes_images = False
    pipeline: Any  # the stock one, of what encodes and decodes alone

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

    @property
    def fingerprint(self) -> str:
        self._fingerprint = self._fingerprint or self.source.fingerprint(*self._encoded_by)
        return self._fingerprint

    def load_encoder(self, kind: Any) -> None:
        """Gives the stock pipeline its text encoder, of a class, unless it has it."""
        if self.pipeline.text_encoder is None:
            encoder = self.source.load(kind, "text_encoder", dtype=self.text_dtype)
            self.pipeline.text_encoder = encoder.to(self.device)

    def free(self) -> None:
        """Takes the text encoder from the stock pipeline, and its memory with it."""
        self.pipeline.text_encoder = None

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Counts the tokens of each prompt as the encoder reads it, in its template if it has one."""
        raise NotImplementedError

    def too_long(self, prompts: Sequence[str]) -> int:
        """Counts the prompts of more than `max_tokens` tokens, which are cut off."""
        return sum(length > self.max_tokens for length in self.lengths(prompts))

    def fits(self, image: Path) -> list[int]:
        """Lists no bucket, where a codec takes no pictures."""
        return []

    def encode_picture(self, prompt: str, picture: Path, bucket: int) -> Condition:
        """Adds nothing to a prompt, where a codec takes no pictures."""
        return {}


def statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Returns the mean and the standard deviation of a video VAE's latents, [1, channels, 1, 1, 1] each."""
    config, shape = vae.config, (1, -1, 1, 1, 1)
    return torch.tensor(config["latents_mean"]).reshape(shape), torch.tensor(config["latents_std"]).reshape(shape)


@torch.no_grad()
def decode_clip(vae: Any, latents: Tensor) -> Tensor:
    """Decodes latents [b, c, f, h, w] by a video VAE, whose own are scaled channel by channel; see `Codec`."""
    latents = latents.to(vae.device, vae.dtype)
    mean, std = statistics(vae)
    pixels = vae.decode(latents * std.to(latents) + mean.to(latents), return_dict=False)[0]
    return pixels.float().permute(0, 2, 3, 4, 1) / 2 + 0.5


@torch.no_grad()
def decode_picture(vae: Any, latents: Tensor) -> Tensor:
    """Decodes latents [b, c, h, w] as a VAE of pictures has them to pixels [b, 1, height, width, 3] in [0, 1]."""
    pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return (pixels.float().permute(0, 2, 3, 1)[:, None] / 2 + 0.5).clamp(0, 1)


def as_picture(latents: Tensor) -> Tensor:
    """Returns latents [b, c, 1, h, w] without their frame, as pipelines of pictures have them."""
    return latents[:, :, 0]


def as_tokens(latents: Tensor) -> Tensor:
    """Returns latents [b, c, 1, h, w] as tokens [b, h w, c]."""
    return latents.flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """Returns tokens as latents, the inverse of `as_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, (1, height, width))


def fitting_sizes(picture: Path, sizes: Sequence[Size]) -> list[int]:
    """Lists the sizes whose aspect ratio is a picture's; raises a UserError where there is none."""
    width, height = shown_size(picture)
    found = [i for i, size in enumerate(sizes) if abs(width / height / (size.width / size.height) - 1) <= ASPECT]
    if not found:
        raise UserError(
            f"{picture}: a picture of {height}x{width} fits none of the sizes {', '.join(map(str, sizes))}; "
            "it needs the same shape"
        )
    return found


def pad_texts(rows: Sequence[Condition], device: torch.device, dtype: torch.dtype) -> Condition:
    """Pads text to [b, tokens, ...] with zeros; mask [b, tokens], on the CPU, is true where there is text."""
    texts = [row["text"].to(device, dtype) for row in rows]
    lengths = torch.tensor([len(text) for text in texts])  # on the CPU, where `predict` reads it without waiting
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return {"text": pad_sequence(texts, batch_first=True), "mask": mask}


def chat_lengths(tokenizer: Any, prompts: Sequence[str], thinking: bool) -> list[int]:
    """Counts the tokens of each prompt as a chat's only message. thinking: whether the answer may begin with it."""
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": text}], **options) for text in prompts]
    return [len(ids) for ids in tokenizer(texts).input_ids]


def stock_sigmas(source: Source, steps: int, mu: Callable[[Mapping[str, Any]], float]) -> tuple[float, ...]:
    """Returns the times of a pipeline that hands evenly spaced ones to its scheduler, and 0: as that one shifts them.

    mu: the shift's logarithm, of the scheduler's configuration, where that says that it depends on the resolution.
    """
    scheduler: Any = source.load(FlowMatchEulerDiscreteScheduler, "scheduler")
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu(scheduler.config))
    return tuple(scheduler.sigmas.tolist())


def line_mu(config: Mapping[str, Any], tokens: int) -> float:
    """Returns the shift's logarithm for a number of tokens, which a scheduler's configuration puts on a line."""
    near, far = config["base_image_seq_len"], config["max_image_seq_len"]
    return config["base_shift"] + (config["max_shift"] - config["base_shift"]) * (tokens - near) / (far - near)


def evenly_shifted(shift: float, steps: int, stochastic: bool) -> FlowMatchEulerDiscreteScheduler:
    """Returns the scheduler that shifts evenly spaced times by a number, whatever the resolution."""
    return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=stochastic)


def check_pipeline(source: Source, names: Sequence[str]) -> None:
    """Raises a UserError where the folder holds another pipeline, which names the recipe that fits it."""
    if (found := source.index.get("_class_name")) not in names:
        named = f"{source.path} is a {found}, not a {' or '.join(names)}"
        raise UserError(f"teacher.path: {named}; {fitting(str(found))}")


def check_pictures(sizes: Sequence[Size], strides: tuple[int, int], name: str) -> None:
    """Raises a UserError where a size has several frames, or does not fit the strides. name: of the model."""
    for i, size in enumerate(sizes):
        if size.num_frames != 1:
            raise UserError(f"teacher.sizes.{i}: {size} has {size.num_frames} frames; {name} makes pictures")
    check_sizes(sizes, (1, *strides))


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


def adapted(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Returns the LoRA targets; one that also ends the names of lists of layers as its layers, by their whole names.

    Raises a UserError where a target ends the name of no module, or only of some that no adapter fits.
    """
    modules, names = dict(network.named_modules()), []
    for target in targets:
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        layers = [name for name in found if isinstance(modules[name], ADAPTABLE)]
        if not found:
            raise UserError(f"teacher.lora_targets: {target} ends the name of no module of the transformer")
        if not layers:
            odd = type(modules[found[0]]).__name__
            raise UserError(f"teacher.lora_targets: {target} is a {odd}, which takes no adapter")
        names += [target] if layers == found else layers
    return names
