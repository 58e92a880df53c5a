"""Sampling: a run's or an export's generator, and the teacher on the same grid."""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from phased_dmd.conditions import fitting
from phased_dmd.config import Config
from phased_dmd.config.teacher import WanTeacher
from phased_dmd.engine.collectives import run_on_all_ranks
from phased_dmd.engine.randomness import normal
from phased_dmd.engine.world import device, rank, world_size
from phased_dmd.errors import UserError
from phased_dmd.media import FRAMES, thumbnails
from phased_dmd.models.protocol import Codec, Condition
from phased_dmd.models.source import SHIPPED
from phased_dmd.networks.roles import System
from phased_dmd.prompts import Prompt

BATCH, BATCH_NUMBERS = 64, 2**18  # samples a network call when sampling, and the most numbers that they hold
PREVIEWS, LEAST_PREVIEWS, PREVIEW_NUMBERS = 16, 4, 2**23  # samples of a preview, and the numbers that more may hold
PREVIEW_PIXELS = 2**22  # of its picture, about
NANO_FPS, WAN_FPS = 8.0, 16.0


class Sampler:
    """The few-step generator of a run, and its teacher on the same grid, in one resolution bucket."""

    def __init__(self, system: System, codec: Codec, bucket: int = 0) -> None:
        self.system, self.codec, self.bucket = system, codec, bucket
        self._known: dict[Prompt, Condition] = {}

    def __repr__(self) -> str:
        config, plan = self.system.config, self.system.plan
        steps = f"{plan.num_steps} steps in {plan.num_phases} phase{'s' if plan.num_phases > 1 else ''}"
        return f"Sampler({config.recipe}, {config.method}, {steps}, samples {list(self.shape)}, bucket {self.bucket})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample's latents."""
        return tuple(self.system.model.sample_shapes[self.bucket])

    @property
    def fps(self) -> float:
        """Frames a second of the teacher's clips: of nano's, or of Wan's."""
        teacher = self.system.config.teacher
        return NANO_FPS if isinstance(teacher, WanTeacher) and teacher.path in SHIPPED else WAN_FPS

    def __call__(
        self, prompts: Sequence[Prompt | str], seeds: Sequence[int], teacher_steps: int | None = None
    ) -> Tensor:
        """Latents [n, ...] for n prompts with n seeds, on the CPU; teacher_steps: from the guided teacher instead.

        A UserError where the arguments are of other kinds, or as many prompts as seeds are not given.
        """
        return torch.cat(list(self.batches(prompts, seeds, teacher_steps)))

    def batches(
        self, prompts: Sequence[Prompt | str], seeds: Sequence[int], teacher_steps: int | None = None
    ) -> Iterator[Tensor]:
        """The same, as many at a time as a network call takes."""
        asked, numbers, teacher_steps = _asked(prompts, seeds, teacher_steps)
        known = self.encode(list(dict.fromkeys(asked)))
        size = batch_size(self.shape)
        for i in range(0, len(asked), size):
            yield self._batch([known[prompt] for prompt in asked[i : i + size]], numbers[i : i + size], teacher_steps)

    def encode(self, prompts: Sequence[Prompt]) -> dict[Prompt, Condition]:
        """The condition of each prompt, and of all before; a UserError where a first frame is missing or does not fit.

        The encoders are let go: the networks need their place.
        """
        for prompt, buckets in zip(prompts, fitting(self.codec, prompts), strict=False):
            if self.bucket not in buckets:
                raise UserError(f"{prompt.image}: not of the shape of the samples, see teacher.sizes")
        new = [prompt for prompt in prompts if prompt not in self._known]
        for i in range(0, len(new), BATCH):
            part = new[i : i + BATCH]
            for prompt, row in zip(part, self.codec.encode_text([prompt.text for prompt in part]), strict=True):
                image = self.codec.encode_image(prompt.image, self.bucket) if self.codec.takes_images else {}  # type: ignore[arg-type] checked by fitting
                self._known[prompt] = row | image
        self.codec.free()
        return self._known

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [n, frames, height, width, 3] in [0, 1], or an analytic model's samples as they are.

        latents: whole samples, as the sampler gives them; anything else is a UserError.
        """
        if not isinstance(latents, Tensor) or latents.shape[1:] != self.shape or not len(latents):
            found = list(latents.shape) if isinstance(latents, Tensor) else f"a {type(latents).__name__}"
            raise UserError(f"latents: {found}, where a tensor [n, {', '.join(map(str, self.shape))}] is needed")
        return torch.cat([self.codec.decode(part).cpu() for part in latents.split(batch_size(self.shape))])

    @torch.no_grad()
    def preview(self, phase: int, rows: Sequence[Condition]) -> Tensor:
        """What the generator predicts of x_0 at the end of a phase, a sample a condition, seeds 0, 1, ...

        Points [n, d], or small pictures [n, k, h, w, 3] of few frames. The processes share the samples, and call the
        networks equally often: those that are left over repeat the last one.
        """
        ways, size = self.system.config.engine.sequence_parallel, preview_batch(self.system.config, self.shape)
        share = math.ceil(len(rows) * ways / world_size())
        first = rank() // ways * share
        batches = [range(i, min(i + size, first + share)) for i in range(first, first + share, size)]
        ends = [self._end(phase, rows, [min(i, len(rows) - 1) for i in batch]) for batch in batches]
        kept = [end[: max(0, len(rows) - batch.start)] for batch, end in zip(batches, ends, strict=True)]
        own = [end for end in kept if len(end)] if rank() % ways == 0 else []
        shown = run_on_all_ranks(lambda: [_small(self.codec.decode(end).cpu(), len(rows)) for end in own])
        pixels = torch.cat([part for parts in shown for part in parts])
        return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels

    def _end(self, phase: int, rows: Sequence[Condition], samples: Sequence[int]) -> Tensor:
        """x_0 of some of a preview's samples."""
        system, (noise, renoise) = self.system, self._noise(samples)
        condition = system.model.batch([rows[i] for i in samples])
        return system.roll(system.plan.path(phase), system.start(noise), condition, renoise=renoise).x0

    @torch.no_grad()
    def _batch(self, rows: Sequence[Condition], seeds: Sequence[int], teacher_steps: int | None) -> Tensor:
        system, condition = self.system, self.system.model.batch(rows)
        noise, renoise = self._noise(seeds)
        if teacher_steps is not None:
            return system.sample_teacher(noise, condition, teacher_steps).cpu()
        path = system.plan.path(system.plan.num_phases)
        return system.roll(path, system.start(noise), condition, renoise=renoise).x.cpu()

    def _noise(self, seeds: Sequence[int]) -> tuple[Tensor, Callable[[int], Tensor]]:
        """The start [n, ...], and what the renoise solver draws at a step."""
        return (
            normal(self.shape, seeds, "sample").to(device()),
            lambda step: normal(self.shape, seeds, "sample renoise", step).to(device()),
        )


def _asked(prompts: Any, seeds: Any, teacher_steps: Any) -> tuple[list[Prompt], list[int], int | None]:
    """What a sampler is called with, as it is meant; a UserError for what is not."""
    if isinstance(prompts, str | Prompt):
        raise UserError(f"prompts: a list is needed, with a prompt a seed; [{prompts!r}] * n has the same n times")
    try:
        asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    except TypeError:
        raise UserError(f"prompts: a list of texts is needed, and this is a {type(prompts).__name__}") from None
    if odd := [prompt for prompt in asked if not isinstance(prompt, Prompt)]:
        raise UserError(f"prompts: {odd[0]!r} is no text")
    try:
        numbers = [operator.index(seed) for seed in seeds]
    except TypeError:
        given = " ".join(repr(seeds).split())[:40]
        raise UserError(f"seeds: a list of whole numbers is needed, such as range(8), and this is {given}") from None
    if len(asked) != len(numbers) or not asked:
        raise UserError(
            f"prompts, seeds: {len(asked)} and {len(numbers)} of them; every sample has one of each: [prompt] * n has "
            "the same prompt n times"
        )
    try:
        steps = None if teacher_steps is None else operator.index(teacher_steps)
    except TypeError:
        steps = 0
    if steps is not None and steps < 1:
        raise UserError(f"teacher_steps: {teacher_steps!r} is no number of steps, from 1 on")
    return asked, numbers, steps


def _small(pixels: Tensor, count: int) -> Tensor:
    """One of the `count` samples of a preview, or some: bytes of few small frames, or points as they are."""
    if pixels.ndim != 5:
        return pixels
    f, h, w = pixels.shape[1:4]
    return thumbnails(pixels, int(math.sqrt(PREVIEW_PIXELS * h / (count * min(f, FRAMES) * w))))


def preview_size(shape: Sequence[int]) -> int:
    """How many samples of a shape a preview has."""
    return max(LEAST_PREVIEWS, min(PREVIEWS, PREVIEW_NUMBERS // math.prod(shape)))


def preview_batch(config: Config, shape: Sequence[int]) -> int:
    """How many of them go through a network, and are decoded, at once."""
    return min(batch_size(shape), config.engine.micro_batch or BATCH)


def batch_size(shape: Sequence[int]) -> int:
    """How many samples of a shape go through a network at once: one of a large model, many of nano."""
    return max(1, min(BATCH, BATCH_NUMBERS // math.prod(shape)))
