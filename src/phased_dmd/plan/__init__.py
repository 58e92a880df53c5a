"""`plan`: what a run will need, before anything is downloaded: parameters, memory, work, and what would make it fit."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from phased_dmd.config import Config, renoise_interval
from phased_dmd.config.teacher import PipelineTeacher
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import PhasePlan
from phased_dmd.networks.roles import TEACHER
from phased_dmd.plan import advice
from phased_dmd.plan.measure import (
    ITEMSIZE,
    bucket_shapes,
    condition_shapes,
    itemsizes,
    largest,
    largest_block,
    largest_call,
    meta_model,
    network_parameters,
    plan_of,
)
from phased_dmd.plan.memory import (
    RESERVE,
    Memory,
    checkpoint_bytes,
    micro_batch,
    network_bytes,
    parameters_by_role,
    phase_memory,
    score_calls,
)
from phased_dmd.plan.preview import base_steps, preview_cost
from phased_dmd.plan.stages import Stage, stages
from phased_dmd.plan.work import Work, forward_flops, gathered_bytes, mean_flops, phase_forwards, phase_work
from phased_dmd.pool import begins_with_teacher, kept_ends, pool_calls
from phased_dmd.prompts import read_prompts
from phased_dmd.step import bucket_odds

GB = 1e9
CARDS = {24: 165.0, 48: 362.0, 80: 989.0, 141: 989.0}  # GB, and TFLOPS as specified: RTX 4090, L40S, H100, H200
COUNTS = {1: True, 2: False, 4: False, 8: True, 16: False, 32: False, 64: True}  # of GPUs, and which always matter
NODE, LINK = 8, 40e9  # GPUs that share a fast network, and bytes a second of each GPU between such nodes: a guess


@dataclass(frozen=True)
class PhaseCost:
    """The cost of one phase: memory on each GPU, work of an iteration for a sample, FLOPs and seconds of an iteration.

    An iteration is one that matches distributions, unless all of the phase is anchored; the hours are those of training
    in all, of which the first `anchored` iterations regress the teacher. gathered: bytes of weights that reach each GPU
    in an iteration, and of gradients that leave it. previews, preview_seconds: how many previews are made, and the time
    of each. base_seconds: of what the base makes of their noise, once. checkpoint: bytes of one on disk.
    """

    phase: int
    boundary: float
    iterations: int
    anchored: int
    memory: Memory
    work: Work
    iteration_flops: float
    iteration_seconds: float
    gathered: int
    hours: float
    previews: int
    preview_seconds: float
    base_seconds: float
    checkpoint: int


class PoolCost(NamedTuple):
    """The cost of the teacher's trajectories: network calls for single samples, hours, and bytes on disk."""

    calls: int
    hours: float
    disk: int


@dataclass(frozen=True)
class Needs:
    """All that a plan says. Sizes are in bytes.

    hours: of all phases, the pool not among them. side_by_side: hours where each phase has as many GPUs for itself, and
    they share the pool; None where a phase waits for those before it.
    """

    recipe: str
    method: str
    gpus: int
    gpu_memory: float
    usable: float
    micro_batch: int
    largest_bucket: str
    parameters: dict[str, int]
    forward_flops: dict[str, int]
    phases: tuple[PhaseCost, ...]
    stages: tuple[Stage, ...]
    hours: float
    pool: PoolCost | None
    side_by_side: float | None
    preview_hours: float
    prompts: int
    prompt_cache: int
    fits: bool
    options: str | None
    option_notes: tuple[str, ...]
    enough_gpus: int | None
    warnings: tuple[str, ...]
    remarks: tuple[str, ...]


def needs(config: Config, gpus: int, memory_gb: float, utilisation: float = 0.4, tflops: float = 989.0) -> Needs:
    """Returns what a config's run needs on GPUs of `memory_gb` gigabytes (10^9 bytes) and `tflops` at their peak.

    utilisation: the share of the peak that a run reaches. Raises UserError for what cannot be run at all.
    """
    _check(config, gpus, memory_gb, utilisation, tflops)
    usable, plan = memory_gb * GB * (1 - RESERVE), plan_of(config)

    def fits(config: Config, gpus: int) -> bool:
        return peak(stages(config, gpus)).gpu <= usable

    fit = fits(config, gpus)
    chosen = None if fit else advice.cheapest(config, gpus, fits)
    costly = not fit and (chosen is None or any(option not in advice.free(config) for option in chosen))
    phases = tuple(_phase_cost(config, k, gpus, tflops, utilisation) for k in range(1, plan.num_phases + 1))
    pool = _pool_cost(config, gpus, tflops, utilisation)
    prompts = len(read_prompts(config.prompts)) if config.prompts is not None else 0
    buckets, shapes = _bucket_names(config), bucket_shapes(config.teacher)
    bucket = buckets[largest(shapes)]
    return Needs(
        recipe=config.recipe, method=config.method, gpus=gpus, gpu_memory=memory_gb * GB, usable=usable,
        micro_batch=micro_batch(config, gpus), largest_bucket=bucket, parameters=parameters_by_role(config),
        forward_flops=dict(zip(buckets, forward_flops(config.teacher), strict=True)),
        phases=phases, stages=tuple(stages(config, gpus)), hours=sum(phase.hours for phase in phases), pool=pool,
        side_by_side=_side_by_side(config, phases, pool),
        preview_hours=sum(phase.previews * phase.preview_seconds + phase.base_seconds for phase in phases) / 3600,
        prompts=prompts, prompt_cache=prompt_cache(config, prompts), fits=fit,
        options=advice.flags(chosen) if chosen is not None else None,
        option_notes=tuple(f"{option.key}: {option.note}" for option in chosen or ()),
        enough_gpus=advice.least_gpus(config, gpus, fits) if costly else None,
        warnings=(*advice.warnings(config, plan, gpus), *_length_warnings(config, bucket, usable)),
        remarks=(*_remarks(config), *_networks(config, plan), *_gathers(config, phases, gpus, usable)),
    )  # fmt: skip


def peak(stages: Iterable[Stage]) -> Stage:
    """Returns the stage that holds the most on each GPU, the first of equals."""
    return max(stages, key=lambda stage: stage.gpu)


def simulated_needs(plan: Needs, config: Config) -> Needs:
    """Returns a plan whose updates are simulated, and which fits or not by what these hold; see `simulate.py`."""
    from phased_dmd.plan.simulate import simulated

    numbers = [each.phase for each in plan.phases]
    peaks = zip(numbers, simulated(config, plan.gpus, numbers), strict=True)
    names = {phase: {"fake updates": most.fake, "generator updates": most.generator} for phase, most in peaks}
    found = tuple(stages(config, plan.gpus, names))
    return replace(plan, stages=found, fits=peak(found).gpu <= plan.usable)


class Proposal(NamedTuple):
    """The cheapest way to run a recipe on some GPUs of a size.

    options: as flags; None if none are enough. hours: of training; peak: the stage that holds the most. host: bytes of
    the host's memory for each GPU, the most of all stages but loading.
    """

    memory_gb: float
    gpus: int
    options: str | None
    hours: float
    peak: Stage
    host: int


def proposals(config: Config, utilisation: float = 0.4) -> Iterator[Proposal]:
    """Yields for common cards, and 1 to 64 of them, the cheapest changes with which a run fits.

    Between 1, 8 and 64 GPUs there are those alone that change with the number. All are of single samples a call.
    """
    single = advice.free(config)[:1] if config.engine.micro_batch is None else ()
    small = advice.changed(config, single)
    for memory_gb, tflops in CARDS.items():
        before: advice.Options | None = ()
        for gpus in (count for count in COUNTS if advice.is_shared(small, count)):
            chosen, tried = _propose(small, gpus, memory_gb * GB * (1 - RESERVE))
            if chosen == before and not COUNTS[gpus]:
                continue
            before, found = chosen, list(stages(tried, gpus))
            costs = [_phase_cost(tried, phase, gpus, tflops, utilisation) for phase in range(1, config.plan.phases + 1)]
            flags = advice.flags((*single, *chosen)) if chosen is not None else None
            host = max(stage.host for stage in found if stage.name != "loading")  # that is the first process's alone
            yield Proposal(memory_gb, gpus, flags, sum(cost.hours for cost in costs), peak(found), host)


def _propose(config: Config, gpus: int, usable: float) -> tuple[advice.Options | None, Config]:
    """Returns the cheapest changes with which a config fits, and the config with them; without any, all were tried."""
    last = config

    def fits(config: Config, gpus: int) -> bool:
        nonlocal last
        last = config
        return peak(stages(config, gpus)).gpu <= usable

    chosen = () if fits(config, gpus) else advice.cheapest(config, gpus, fits)
    return chosen, last if chosen is None else advice.changed(config, chosen)


def _check(config: Config, gpus: int, memory_gb: float, utilisation: float, tflops: float) -> None:
    if gpus < 1:
        raise UserError(f"--gpus: {gpus} is none")
    if gpus > 1 and getattr(config.teacher, "quantise", None) is not None:
        raise UserError(f"teacher.quantise: a packed network stays whole on one GPU, and --gpus is {gpus}")
    if gpus % config.engine.replicas:
        raise UserError(f"engine.replicas: {gpus} GPUs cannot be split into {config.engine.replicas} equal groups")
    for name, value in (("memory-gb", memory_gb), ("tflops", tflops)):
        if not 0 < value < math.inf:
            raise UserError(f"--{name}: {value:g} is not a positive number")
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation: {utilisation:g} is not in (0, 1]")


def _phase_cost(config: Config, phase: int, gpus: int, tflops: float, utilisation: float) -> PhaseCost:
    def hours(flops: float, gpus: int) -> float:
        return flops / (gpus * tflops * 1e12 * utilisation) / 3600

    plan, shown, iterations = plan_of(config), preview_cost(config, gpus), config.phase_iterations(phase)
    guided = max(meta_model(config.teacher).guidance) > 1
    forward, attention = mean_flops(config.teacher)
    scored, anchored = score_calls(config, phase, gpus), config.anchored(phase)
    work = phase_work(config, plan, phase, guided, scored, attention, anchored == iterations)
    flops = work.forwards * forward * config.batch_size
    total = phase_forwards(config, plan, phase, guided, scored, attention) * forward * config.batch_size
    return PhaseCost(
        phase, plan.end(phase), iterations, anchored, phase_memory(config, phase, gpus), work, flops,
        iteration_seconds=hours(flops, gpus) * 3600, gathered=gathered_bytes(config, work, gpus, scored),
        hours=hours(total, gpus),
        previews=math.ceil(iterations / config.sample_every) if config.sample_every is not None else 0,
        preview_seconds=hours(len(plan.path(phase)) * shown.step + shown.decode, 1) * 3600,  # all GPUs do so at once
        base_seconds=hours(base_steps(config, plan, phase) * shown.step, 1) * 3600,
        checkpoint=checkpoint_bytes(config, phase),
    )  # fmt: skip


def _pool_cost(config: Config, gpus: int, tflops: float, utilisation: float) -> PoolCost | None:
    """Returns what the pool costs, or None where there is none."""
    plan, model = plan_of(config), meta_model(config.teacher)
    if not (calls := pool_calls(config, plan, model.guidance)):
        return None
    sizes = [math.prod(shape) for shape in model.sample_shapes]
    odds = bucket_odds(config, None)
    numbers = sum(n * odd for n, odd in zip(sizes, odds, strict=True)) / sum(odds)
    ends = {end for phase in range(1, plan.num_phases + 1) for end in kept_ends(config, phase)}
    states = sum(2 if end > 1 and config.rollouts.start == "experts" else 1 for end in ends)
    hours = calls * mean_flops(config.teacher)[0] / (gpus * tflops * 1e12 * utilisation) / 3600
    return PoolCost(calls, hours, round(4 * states * numbers * config.rollouts.pool))


def _side_by_side(config: Config, phases: tuple[PhaseCost, ...], pool: PoolCost | None) -> float | None:
    """Returns the hours of the longest phase and its share of the pool, or None where phases wait for each other."""
    if not begins_with_teacher(config, len(phases)):
        return None
    return max(phase.hours for phase in phases) + (pool.hours / len(phases) if pool else 0.0)


def prompt_cache(config: Config, prompts: int) -> int:
    """Returns the most bytes that encoded prompts take on disk, the negative prompt among them.

    Every prompt is taken to be as long as is allowed, and every first frame to be in every resolution bucket.
    """
    teacher = config.teacher
    if not isinstance(teacher, PipelineTeacher):
        return 0
    conditions = [condition_shapes(teacher, shape) for shape in bucket_shapes(teacher)]
    images = sum(math.prod(part) * 4 for shapes in conditions for name, part in shapes.items() if name != "text")
    return (prompts + 1) * math.prod(conditions[0]["text"]) * ITEMSIZE[teacher.dtype] + prompts * images


def _bucket_names(config: Config) -> list[str]:
    if isinstance(config.teacher, PipelineTeacher):
        return [str(size) for size in config.teacher.sizes]
    return ["x".join(map(str, shape)) for shape in meta_model(config.teacher).sample_shapes]


def _length_warnings(config: Config, bucket: str, usable: float) -> list[str]:
    """Warns of a sample that no GPU holds, however many GPUs there are."""
    one = largest_call(config, 1, config.fake)
    least = one.checkpointed + largest_block(config, 1, config.fake)
    if least <= usable:
        return []
    return [
        f"teacher.sizes: one sample of {bucket} keeps {size(least)} of activations, checkpointed: no number of GPUs "
        "holds it"
    ]


def _remarks(config: Config) -> tuple[str, ...]:
    """Says what networks weigh, and what the absence of a first moment saves."""
    parameters = network_parameters(config.teacher)
    moments = 4 * itemsizes(config.teacher)[1] * parameters  # weights, gradients, and two moments
    return (
        f"{TEACHER}: {size(network_bytes(config.teacher))} a network, frozen",
        f"a full fake of one network, with its gradients and both moments of AdamW: {size(moments)}; without the "
        f"first, as here: {size(3 * moments // 4)}; in all shards together",
    )


def _networks(config: Config, plan: PhasePlan) -> Iterator[str]:
    """Says which of several networks each phase needs, where phases may be trained apart."""
    if not (plan.switches and begins_with_teacher(config, plan.num_phases)):
        return
    for phase in range(1, plan.num_phases + 1):
        experts = sorted({expert.network for expert in plan.experts(phase)})
        fakes = plan.fakes(phase, renoise_interval(config, plan, phase).support) if config.matches(phase) else ()
        asked = f", and asks teacher and fake on {_list(fakes)}" if fakes else ""
        yield f"phase {phase} by itself: trains an expert on network {_list(experts)}{asked}"


def _list(networks: Iterable[int]) -> str:
    return " and ".join(map(str, networks))


def _replicated(config: Config, gpus: int, usable: float) -> str:
    """Says whether a run that gathers its weights within nodes fits."""
    replicas = advice.changed(config, (advice.Option("engine.replicas", gpus // NODE, ""),))
    most = peak(stages(replicas, gpus)).gpu
    fits = "fits" if most <= usable else "does not fit"
    return f"--set engine.replicas={gpus // NODE} gathers within nodes of {NODE}, and {fits} with {size(most)}"


def _gathers(config: Config, phases: tuple[PhaseCost, ...], gpus: int, usable: float) -> Iterator[str]:
    """Says where the weights that are gathered from other nodes take longer than the computation."""
    shards, slowest = gpus // config.engine.replicas, max(phases, key=lambda each: each.gathered)
    if shards > NODE and gpus % NODE == 0 and (seconds := slowest.gathered / LINK) > slowest.iteration_seconds:
        yield (
            f"gathers: {size(slowest.gathered)} to and from each GPU in an iteration of phase {slowest.phase}, "
            f"{seconds:.3g} s at {LINK / 1e9:g} GB/s between nodes, and {slowest.iteration_seconds:.3g} s of "
            f"computation: {_replicated(config, gpus, usable)}"
        )


def size(count: float) -> str:
    """Returns a number of bytes in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= 0.1 * factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
