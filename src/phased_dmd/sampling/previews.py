"""Previews show in training what a phase's generator makes, below what the base makes of the same noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from phased_dmd.checkpoint import load_tensors, save_tensors
from phased_dmd.conditions import Conditions
from phased_dmd.config import Config
from phased_dmd.contact_sheet import Caption, save_sheet
from phased_dmd.engine.collectives import run_on_first_rank
from phased_dmd.maths.phases import PhasePlan
from phased_dmd.media import save_points
from phased_dmd.models.protocol import Codec, Condition
from phased_dmd.networks.roles import System
from phased_dmd.pool import Pool, begins_with_teacher
from phased_dmd.sampling.sampler import Sampler, base_grid, base_hops, preview_size

POINTS = 512  # of a preview of a model of points
WORTH = 2  # samples in a phase's updates, which take some five calls each, for a call that the base's part takes


@dataclass(frozen=True)
class Preview:
    """A preview's pixels [n, k, h, w, 3] in [0, 1], of few frames, or points [n, d].

    base: what it is to come near, or None. prompts: the number of each sample's prompt among the run's; none for a
    model that takes none. seeds: of each sample's noise; none where it begins with the teacher's states.
    """

    pixels: Tensor
    base: Tensor | None
    prompts: Sequence[int]
    seeds: Sequence[int]

    def save(self, path: Path, made: str, base: str, texts: Sequence[str]) -> None:
        """Writes it as a contact sheet, or plots. made, base: names of the rows. texts: of all of the run's prompts."""
        beside = {} if self.base is None else {base: self.base}
        if self.pixels.ndim != 5:
            clouds = {name: points[:, :2] for name, points in {**beside, made: self.pixels}.items()}
            save_points(path, clouds, next(iter(clouds.values())))
            return
        told = [texts[i] for i in self.prompts] or [""] * len(self.pixels)
        captions = [Caption(text, self.seeds[i] if self.seeds else None) for i, text in enumerate(told)]
        save_sheet(path, {**beside, made: self.pixels}, captions)


def make_preview(
    system: System, codec: Codec, phase: int, conditions: Conditions | None, odds: Sequence[float], kept: Path,
    pool: Pool | None = None,
) -> Preview:  # fmt: skip
    """Samples a preview of training, in the first bucket that has odds: of prompts spread over all, or points.

    A phase that begins with the teacher's states is shown from some of them on. kept: the folder in which the base's
    part is kept, which is made once a phase.
    """
    bucket = next(i for i, each in enumerate(odds) if each)
    shape = system.model.sample_shapes[bucket]
    count = preview_count(system.config, shape)
    taken, prompts, rows = None, [], [Condition()] * count
    if pool is not None and begins_with_teacher(system.config, phase):
        taken = pool.spread(phase, bucket, count)
        rows, prompts = taken.rows(), pool.prompts(bucket, taken.entries)
    elif conditions is not None:
        eligible = conditions.eligible(bucket)
        prompts = [eligible[i * len(eligible) // count] for i in range(count)]
        rows = [conditions.row(prompt, bucket) for prompt in prompts]
    sampler, path, base = Sampler(system, codec, bucket), kept / f"base-phase-{phase}.safetensors", None
    if shows_base(system.config, system.plan, system.model.guidance, phase, count):
        if not run_on_first_rank(path.exists):
            made = sampler.base_preview(phase, rows, taken)
            run_on_first_rank(lambda: save_tensors(path, {"samples": made}, {}))
        base = load_tensors(path)[0]["samples"]
    return Preview(sampler.preview(phase, rows, taken), base, prompts, [] if taken else range(count))


def preview_count(config: Config, shape: Sequence[int]) -> int:
    """Returns how many samples of a shape a preview of a run has."""
    return POINTS if config.prompts is None and len(shape) == 1 else preview_size(shape)


def shows_base(config: Config, plan: PhasePlan, guidance: Sequence[float], phase: int, count: int) -> bool:
    """Says whether a phase is long enough for the base's part of its previews, of `count` samples, to be worth it."""
    updated = config.phase_iterations(phase) * config.batch_size * (1 + config.fake.updates)
    return count * base_calls(config, plan, guidance, phase) * WORTH <= updated


def base_calls(config: Config, plan: PhasePlan, guidance: Sequence[float], phase: int) -> int:
    """Returns the network calls, guidance's among them, that the base's part of a preview takes for each sample."""
    hops = base_hops(plan, phase, base_grid(config), begins_with_teacher(config, phase))
    return sum(2 if guidance[plan.network(t)] > 1 else 1 for hop in hops for t in hop[:-1])
