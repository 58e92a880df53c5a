"""The sampler runs the few-step generator of a run or an export, or its teacher on the same grid."""

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from phased_dmd.conditions import fitting
from phased_dmd.config import Config
from phased_dmd.config.teacher import AnalyticTeacher, WanTeacher
from phased_dmd.engine.collectives import run_on_all_ranks
from phased_dmd.engine.randomness import normal
from phased_dmd.engine.world import BATCH, batch_size, device, rank, world_size
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import PhasePlan, step_times, times_between
from phased_dmd.maths.rollout import Rollout, aimed_at
from phased_dmd.media import FRAMES, thumbnails
from phased_dmd.models.loader import stock_solver, stock_times
from phased_dmd.models.protocol import Codec, Condition
from phased_dmd.models.source import SHIPPED
from phased_dmd.networks.roles import System
from phased_dmd.pool import Taken
from phased_dmd.prompts import Prompt

PREVIEWS, LEAST_PREVIEWS, PREVIEW_NUMBERS = 16, 4, 2**23  # samples of a preview, and the numbers that more may hold
PREVIEW_PIXELS = 2**22  # of its picture, about
NANO_FPS, WAN_FPS = 8.0, 16.0


class Sampler:
    """A sampler runs the few-step generator of a run, or its teacher on the same grid, in one resolution bucket.

    known: conditions of prompts that were encoded before. last: the last phase that has an expert; where others should
    follow it, samples are what it predicts of x_0 at its end, as in a preview.
    """

    def __init__(
        self, system: System, codec: Codec, bucket: int = 0, known: Mapping[Prompt, Condition] | None = None,
        last: int | None = None,
    ) -> None:  # fmt: skip
        self.system, self.codec, self.bucket = system, codec, bucket
        self.last = last or system.plan.num_phases
        self._known = dict(known or {})

    def __repr__(self) -> str:
        config, plan = self.system.config, self.system.plan
        steps = f"{plan.num_steps} steps in {plan.num_phases} phase{'s' if plan.num_phases > 1 else ''}"
        return f"Sampler({config.recipe}, {config.method}, {steps}, samples {list(self.shape)}, bucket {self.bucket})"

    @property
    def calls(self) -> int:
        """Returns the network calls that a sample of the generator takes."""
        return self.system.plan.steps(self.last).stop

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of one sample's latents, without the batch."""
        return tuple(self.system.model.sample_shapes[self.bucket])

    @property
    def fps(self) -> float:
        """Returns the frames a second at which clips are written: nano's, of other small ones too, or Wan's."""
        teacher = self.system.config.teacher
        small = isinstance(teacher, AnalyticTeacher) or isinstance(teacher, WanTeacher) and teacher.path in SHIPPED
        return NANO_FPS if small else WAN_FPS

    def __call__(
        self, prompts: Sequence[Prompt | str], seeds: Sequence[int], teacher_steps: int | None = None
    ) -> Tensor:
        """Returns latents [n, ...] on the CPU, for n prompts with a seed each.

        teacher_steps: sample the guided teacher, as its own pipeline does, with that many steps instead of the
        generator. Raises UserError for arguments of other kinds, and for other than as many prompts as seeds.
        """
        return torch.cat(list(self.batches(prompts, seeds, teacher_steps)))

    def batches(
        self, prompts: Sequence[Prompt | str], seeds: Sequence[int], teacher_steps: int | None = None
    ) -> Iterator[Tensor]:
        """Yields what a call returns in parts, as many samples at a time as go through a network at once."""
        asked, numbers = _checked(prompts, seeds, teacher_steps)
        known = self.encode(list(dict.fromkeys(asked)))
        size = batch_size(self.shape)
        teacher = self.system.config.teacher
        times = stock_times(teacher, self.bucket, int(teacher_steps)) if teacher_steps else None
        for i in range(0, len(asked), size):
            rows, part = [known[prompt] for prompt in asked[i : i + size]], numbers[i : i + size]
            if teacher_steps is None:
                end = self._roll(self.last, rows, part)
                yield (end.x if self.last == self.system.plan.num_phases else end.x0).cpu()
            else:
                noise, condition = self._noise(part), self.system.model.batch(rows)
                if (solver := stock_solver(teacher, int(teacher_steps))) is not None:
                    yield self.system.solve_teacher(solver, noise, condition).cpu()
                else:
                    yield self.system.sample_teacher(noise, condition, int(teacher_steps), times).cpu()

    def encode(self, prompts: Sequence[Prompt]) -> dict[Prompt, Condition]:
        """Returns the condition of each prompt, see `encode`, and of all before; then frees the encoders, whose memory
        networks need.
        """
        self._known |= encode(self.codec, [prompt for prompt in prompts if prompt not in self._known], self.bucket)
        self.codec.free()
        return self._known

    def decode(self, latents: Tensor) -> Tensor:
        """Returns pixels [n, frames, height, width, 3] in [0, 1], or an analytic model's samples as they are.

        latents: whole samples, as the sampler gives them; anything else is a UserError.
        """
        if not isinstance(latents, Tensor) or latents.shape[1:] != self.shape or not len(latents):
            found = list(latents.shape) if isinstance(latents, Tensor) else f"a {type(latents).__name__}"
            raise UserError(f"latents: {found}, where a tensor [n, {', '.join(map(str, self.shape))}] is needed")
        return torch.cat([self.codec.decode(part).cpu() for part in latents.split(batch_size(self.shape))])

    def preview(self, phase: int, rows: Sequence[Condition], taken: Taken | None = None) -> Tensor:
        """Returns the generator's prediction of x_0 at a phase's end, one sample a condition, with seeds 0, 1, ...

        Points [n, d], or small pictures [n, k, h, w, 3] of few frames. The processes share the samples. taken: states
        that they begin the phase with, in place of first noise.
        """

        def made(samples: Sequence[int], begin: Tensor | None) -> Tensor:
            return self._roll(phase, [rows[i] for i in samples], samples, begin).x0

        return self._shared(made, len(rows), taken)

    def base_preview(self, phase: int, rows: Sequence[Condition], taken: Taken | None = None) -> Tensor:
        """Returns what a preview is to come near: the x_0 that its last step would have to predict to end where the
        teacher's own many steps end, from the same noise or states. At t = 0 that is the teacher's sample.
        """

        def made(samples: Sequence[int], begin: Tensor | None) -> Tensor:
            system, steps = self.system, self.system.config.teacher.base_steps
            grid = stock_times(system.config.teacher, self.bucket, steps) or base_grid(system.config)
            x = system.start(self._noise(samples)) if begin is None else begin
            hops, before = base_hops(system.plan, phase, grid, begin is not None), x
            condition = system.model.batch([rows[i] for i in samples])
            for times in hops:
                before, x = x, system.roll_teacher(times, x, condition)
            return aimed_at(before, x, hops[-1][0], hops[-1][-1], system.model.schedule)

        return self._shared(made, len(rows), taken)

    @torch.no_grad()
    def _shared(
        self, made: Callable[[Sequence[int], Tensor | None], Tensor], count: int, taken: Taken | None
    ) -> Tensor:
        """Returns a preview's pixels, or points, of which each process makes and decodes a share.

        made: makes latents of the samples of these numbers, from the states that they begin with, if there are any.
        """
        ways, size = self.system.config.engine.sequence_parallel, preview_batch(self.system.config, self.shape)
        ends = []
        for samples, kept in preview_shares(count, size, rank() // ways, world_size() // ways):
            begin = None if taken is None else taken._replace(entries=[taken.entries[i] for i in samples]).begin()
            ends.append(made(samples, begin)[:kept])
        own = [end for end in ends if len(end)] if rank() % ways == 0 else []

        def small(pixels: Tensor) -> Tensor:
            if pixels.ndim != 5:
                return pixels
            f, h, w = pixels.shape[1:4]
            return thumbnails(pixels, int(math.sqrt(PREVIEW_PIXELS * h / (count * min(f, FRAMES) * w))))

        shown = run_on_all_ranks(lambda: [small(self.codec.decode(end).cpu()) for end in own])
        pixels = torch.cat([part for parts in shown for part in parts])
        return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels

    @torch.no_grad()
    def _roll(
        self, phase: int, rows: Sequence[Condition], seeds: Sequence[int], begin: Tensor | None = None
    ) -> Rollout:
        """Runs the experts from noise, or from x at the phase's begin, to its end, one sample a condition and seed."""

        def step_noise(step: int) -> Tensor:
            return self._noise(seeds, "sample renoise", step)

        system = self.system
        path, start = system.plan.path(phase), begin
        if start is None:
            start = system.start(self._noise(seeds))
        else:
            path = path[system.plan.steps(phase).start :]
        return system.roll(path, start, system.model.batch(rows), noise=step_noise)

    def _noise(self, seeds: Sequence[int], *key: str | int) -> Tensor:
        """Draws standard normal noise [n, ...], each sample's from its own seed."""
        return normal(self.shape, seeds, *(key or ("sample",))).to(device())


def encode(codec: Codec, prompts: Sequence[Prompt], bucket: int) -> dict[Prompt, Condition]:
    """Returns the condition of each prompt in a resolution bucket.

    Raises UserError where a first frame is missing or does not fit the samples.
    """
    for prompt, buckets in zip(prompts, fitting(codec, prompts), strict=False):
        if bucket not in buckets:
            raise UserError(f"{prompt.image}: not of the shape of the samples, see teacher.sizes")
    known = {}
    for i in range(0, len(prompts), BATCH):
        part = prompts[i : i + BATCH]
        for prompt, row in zip(part, codec.encode_text([prompt.text for prompt in part]), strict=True):
            told = codec.takes_images and prompt.image
            known[prompt] = row | (codec.encode_picture(prompt.text, told, bucket) if told else {})
    return known


def _checked(prompts: Any, seeds: Any, teacher_steps: Any) -> tuple[list[Prompt], list[int]]:
    """Returns a sampler's arguments as prompts and whole numbers; raises UserError for what they cannot be."""
    if isinstance(prompts, str | Prompt):
        raise UserError(f"prompts: a list is needed, with a prompt a seed; [{prompts!r}] * n has the same n times")
    try:
        asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    except TypeError:
        raise UserError(f"prompts: a list of texts is needed, and this is a {type(prompts).__name__}") from None
    if odd := [prompt for prompt in asked if not isinstance(prompt, Prompt)]:
        raise UserError(f"prompts: {odd[0]!r} is no text")
    try:
        numbers = [operator.index(seed) for seed in seeds]  # torch's and numpy's whole numbers, too
    except TypeError:
        given = " ".join(repr(seeds).split())[:40]
        raise UserError(f"seeds: a list of whole numbers is needed, such as range(8), and this is {given}") from None
    if len(asked) != len(numbers) or not asked:
        raise UserError(
            f"prompts, seeds: {len(asked)} and {len(numbers)} of them; every sample has one of each: [prompt] * n has "
            "the same prompt n times"
        )
    if teacher_steps is not None and (not isinstance(teacher_steps, Integral) or int(teacher_steps) < 1):
        raise UserError(f"teacher_steps: {teacher_steps!r} is no number of steps, from 1 on")
    return asked, numbers


def preview_size(shape: Sequence[int]) -> int:
    """Returns how many samples of a shape a preview has."""
    return max(LEAST_PREVIEWS, min(PREVIEWS, PREVIEW_NUMBERS // math.prod(shape)))


def preview_batch(config: Config, shape: Sequence[int]) -> int:
    """Returns how many samples of a preview go through a network, and are decoded, at once."""
    return min(batch_size(shape), config.engine.micro_batch or BATCH)


def preview_shares(count: int, size: int, process: int, processes: int) -> Iterator[tuple[list[int], int]]:
    """Yields a process's batches of a preview's `count` samples, and how many of each batch are shown.

    All processes have equally many batches of equal sizes, because with sharded weights they must call the networks
    equally often: those that are left over repeat the last sample, and it is not shown.
    """
    share = -(-count // processes)
    for start in range(process * share, (process + 1) * share, size):
        batch = range(start, min(start + size, (process + 1) * share))
        yield [min(i, count - 1) for i in batch], max(0, min(len(batch), count - start))


def base_grid(config: Config) -> tuple[float, ...]:
    """Returns the times of the base's own number of steps on the plan's shifted grid."""
    return step_times(config.teacher.base_steps, config.plan.shift, config.plan.start)


def base_hops(
    plan: PhasePlan, phase: int, grid: Sequence[float], from_begin: bool = False
) -> list[tuple[float, ...]]:  # fmt: skip
    """Returns for each of the generator's steps up to a phase's end the times of a finer grid that the teacher's own
    sampler goes through meanwhile. from_begin: of the phase's own steps alone.
    """
    path = plan.path(phase)[plan.steps(phase).start if from_begin else 0 :]
    return [times_between(hop.t, hop.r, grid) for hop in path]
