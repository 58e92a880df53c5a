"""`plan`: what a run will need, before anything is downloaded: parameters, memory, work, and what would make it fit."""

import math
from dataclasses import dataclass

from phased_dmd.config import Config
from phased_dmd.config.teacher import PipelineTeacher
from phased_dmd.errors import UserError
from phased_dmd.networks.roles import TEACHER
from phased_dmd.plan import advice
from phased_dmd.plan.measure import (
    bucket_shapes,
    condition_shapes,
    largest,
    largest_block,
    largest_call,
    meta_model,
    plan_of,
)
from phased_dmd.plan.memory import (
    ITEMSIZE,
    RESERVE,
    Memory,
    checkpoint_bytes,
    itemsizes,
    micro_batch,
    network_bytes,
    parameters_by_role,
    phase_memory,
    score_calls,
)
from phased_dmd.plan.preview import preview_cost
from phased_dmd.plan.work import Work, forward_flops, mean_flops, phase_work
from phased_dmd.prompts import read_prompts

GB = 1e9


@dataclass(frozen=True)
class PhaseCost:
    """The cost of one phase: memory on each GPU, work of an iteration for a sample, FLOPs and seconds of an iteration.

    hours: of training, in all. previews, preview_seconds: how many previews are made, and the time of each. checkpoint:
    bytes of one on disk.
    """

    phase: int
    boundary: float
    iterations: int
    memory: Memory
    work: Work
    iteration_flops: float
    iteration_seconds: float
    hours: float
    previews: int
    preview_seconds: float
    checkpoint: int


@dataclass(frozen=True)
class Needs:
    """All that a plan says. Sizes are in bytes."""

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
    hours: float
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
        sizes = (phase_memory(config, phase, gpus).gpu for phase in range(1, plan.num_phases + 1))
        return max(sizes) <= usable

    fit = fits(config, gpus)
    chosen = None if fit else advice.cheapest(config, gpus, fits)
    costly = not fit and (chosen is None or any(option not in advice.free(config) for option in chosen))
    phases = tuple(_phase_cost(config, k, gpus, tflops, utilisation) for k in range(1, plan.num_phases + 1))
    prompts = len(read_prompts(config.prompts)) if config.prompts is not None else 0
    buckets, shapes = _bucket_names(config), bucket_shapes(config.teacher)
    bucket = buckets[largest(shapes)]
    return Needs(
        recipe=config.recipe, method=config.method, gpus=gpus, gpu_memory=memory_gb * GB, usable=usable,
        micro_batch=micro_batch(config, gpus), largest_bucket=bucket, parameters=parameters_by_role(config),
        forward_flops=dict(zip(buckets, forward_flops(config.teacher), strict=True)),
        phases=phases, hours=sum(phase.hours for phase in phases),
        preview_hours=sum(phase.previews * phase.preview_seconds for phase in phases) / 3600,
        prompts=prompts, prompt_cache=prompt_cache(config, prompts), fits=fit,
        options=advice.flags(chosen) if chosen is not None else None,
        option_notes=tuple(f"{option.key}: {option.note}" for option in chosen or ()),
        enough_gpus=advice.least_gpus(config, gpus, fits) if costly else None,
        warnings=(*advice.warnings(config, plan, gpus), *_length_warnings(config, bucket, usable)),
        remarks=_remarks(config, gpus),
    )  # fmt: skip


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
    work = phase_work(config, plan, phase, guided, score_calls(config, phase, gpus), attention)
    flops = work.forwards * forward * config.batch_size
    each = hours(flops, gpus)
    return PhaseCost(
        phase, plan.end(phase), iterations, phase_memory(config, phase, gpus), work, flops,
        iteration_seconds=each * 3600, hours=each * iterations,
        previews=math.ceil(iterations / config.sample_every) if config.sample_every is not None else 0,
        preview_seconds=hours(len(plan.path(phase)) * shown.step + shown.decode, 1) * 3600,  # all GPUs do so at once
        checkpoint=checkpoint_bytes(config, phase),
    )  # fmt: skip


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


def _remarks(config: Config, gpus: int) -> tuple[str, ...]:
    """Says what networks and checkpoints weigh, and what the absence of a first moment saves."""
    parameters = sum(p.numel() for p in meta_model(config.teacher).students[0].parameters())
    each = max(checkpoint_bytes(config, phase) for phase in range(1, config.plan.phases + 1))
    moments = 4 * itemsizes(config.teacher)[1] * parameters  # weights, gradients, and two moments
    return (
        f"{TEACHER}: {size(network_bytes(config.teacher))} a network, frozen",
        f"a full fake of one network, with its gradients and both moments of AdamW: {size(moments)}; without the "
        f"first, as here: {size(3 * moments // 4)}; in all shards together",
        f"checkpoints: {size(each)} the largest, {size((config.keep_last + 1) * each)} of disk with the kept ones; "
        f"{size(2 * each / gpus)} of host memory for each GPU while it is written",
    )


def size(count: float) -> str:
    """Returns a number of bytes in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= 0.1 * factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
