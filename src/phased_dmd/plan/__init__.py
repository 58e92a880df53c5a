"""`plan`: what a run will need, before anything is downloaded: parameters, memory, work, and what would make it fit."""

import math
from dataclasses import dataclass

from phased_dmd.config import Config, phase_plan
from phased_dmd.config.teacher import PipelineTeacher
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import PhasePlan
from phased_dmd.models.protocol import VelocityModel
from phased_dmd.networks.roles import TEACHER
from phased_dmd.plan import advice
from phased_dmd.plan.bare import bare_model, image_shapes, text_width
from phased_dmd.plan.measure import Forward
from phased_dmd.plan.memory import (
    RESERVE,
    Memory,
    Network,
    describe,
    measured,
    micro_batch,
    parameters_by_role,
    phase_memory,
)
from phased_dmd.plan.preview import Preview, previews
from phased_dmd.plan.work import Work, forward_flops, hours, mean_flops, phase_work
from phased_dmd.prompts import read_prompts

GB = 1e9


@dataclass(frozen=True)
class PhaseCost:
    """One phase: bytes on each GPU, calls and forwards an iteration a sample, and FLOPs and hours in all.

    hours: of training. previews: how many; preview_seconds: of each.
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
    """What the run of a config will need on GPUs of `memory_gb` gigabytes (10^9 bytes) and `tflops` at their peak.

    utilisation: the share of the peak that a run reaches. Raises UserError for what cannot be run at all.
    """
    _check(config, gpus, memory_gb, utilisation, tflops)
    model = bare_model(config)
    try:
        plan = phase_plan(config, model.switches)
    except ValueError as error:
        raise UserError(str(error)) from None
    forward = measured(config, model)
    networks = [describe(config, model, index, forward) for index in range(len(model.students))]
    usable = memory_gb * GB * (1 - RESERVE)
    flops = forward_flops(config, model)
    preview = previews(config, model, flops)

    def sizes(config: Config, gpus: int) -> list[Memory]:
        phases, shown = range(1, plan.num_phases + 1), preview(config, gpus).memory
        return [phase_memory(config, plan, networks, phase, gpus, forward, shown) for phase in phases]

    def fits(config: Config, gpus: int) -> bool:
        return max(each.gpu for each in sizes(config, gpus)) <= usable

    mean, now = mean_flops(config, flops), fits(config, gpus)
    guided = max(model.guidance) > 1
    shown, speed = preview(config, gpus), (gpus, tflops, utilisation)
    phases = tuple(
        _cost(config, plan, phase, own, phase_work(config, plan, phase, guided), mean, shown, speed)
        for phase, own in enumerate(sizes(config, gpus), 1)
    )
    chosen = None if now else advice.cheapest(config, gpus, fits)
    costly = not now and (chosen is None or not set(chosen) <= set(advice.free(config)))
    prompts = len(read_prompts(config.prompts)) if config.prompts is not None else 0
    alone = forward(1, None if config.fake.weights == "full" else config.fake.lora)
    biggest = _largest(config, model)
    return Needs(
        recipe=config.recipe, method=config.method, gpus=gpus, gpu_memory=memory_gb * GB, usable=usable,
        micro_batch=micro_batch(config, gpus), largest_bucket=biggest,
        parameters=parameters_by_role(config, plan, networks),
        forward_flops=dict(zip(_buckets(config, model), flops, strict=True)),
        phases=phases, hours=sum(phase.hours for phase in phases),
        preview_hours=sum(phase.previews * phase.preview_seconds for phase in phases) / 3600,
        prompts=prompts, prompt_cache=prompt_cache(config, model, prompts), fits=now,
        options=advice.flags(chosen) if chosen is not None else None,
        option_notes=tuple(f"{key}: {note}" for key, _, note in chosen or ()),
        enough_gpus=advice.least_gpus(config, gpus, fits) if costly else None,
        warnings=(*advice.warnings(config, plan, gpus), *_too_long(biggest, alone, usable)),
        remarks=tuple(_remarks(networks)),
    )  # fmt: skip


def _too_long(bucket: str, alone: Forward, usable: float) -> list[str]:
    """A sample that no GPU holds, however many there are."""
    least = alone.checkpointed + alone.block
    if least <= usable:
        return []
    return [
        f"teacher.sizes: one sample of {bucket} keeps {size(least)} of activations, checkpointed: no number of GPUs "
        "holds it"
    ]


def _check(config: Config, gpus: int, memory_gb: float, utilisation: float, tflops: float) -> None:
    if gpus < 1:
        raise UserError(f"--gpus: {gpus} is none")
    if gpus % config.engine.replicas:
        raise UserError(f"engine.replicas: {gpus} GPUs cannot be split into {config.engine.replicas} equal groups")
    for name, value, most in (
        ("memory-gb", memory_gb, math.inf),
        ("utilisation", utilisation, 1),
        ("tflops", tflops, math.inf),
    ):
        if not 0 < value <= most or value == math.inf:
            raise UserError(f"--{name}: {value:g} is not {'in (0, 1]' if most == 1 else 'a positive number'}")


def _cost(
    config: Config, plan: PhasePlan, phase: int, held: Memory, work: Work, mean: float, preview: Preview,
    speed: tuple[int, float, float],
) -> PhaseCost:  # fmt: skip
    flops = work.forwards * mean * config.batch_size
    each, iterations = hours(flops, *speed), config.phase_iterations(phase)
    shown = preview.samples * len(plan.path(phase)) * preview.call + preview.decode  # by one GPU, as all do at once
    return PhaseCost(
        phase, plan.end(phase), iterations, held, work, flops, each * 3600, each * iterations,
        previews=math.ceil(iterations / config.sample_every) if config.sample_every is not None else 0,
        preview_seconds=hours(shown, 1, *speed[1:]) * 3600,
    )  # fmt: skip


def prompt_cache(config: Config, model: VelocityModel, prompts: int) -> int:
    """The most bytes that encoded prompts, the negative one among them, take on disk: all as long as is allowed.

    Of first frames, every one in every resolution bucket.
    """
    if not isinstance(config.teacher, PipelineTeacher):
        return 0
    network = model.networks[0]
    item = {"float64": 8, "float32": 4, "bfloat16": 2}[config.teacher.dtype]
    texts = (prompts + 1) * config.teacher.max_tokens * text_width(network) * item
    images = sum(math.prod(more) * 4 for shape in model.sample_shapes for more in image_shapes(network, shape).values())
    return texts + prompts * images


def _buckets(config: Config, model: VelocityModel) -> list[str]:
    if isinstance(config.teacher, PipelineTeacher):
        return [str(size) for size in config.teacher.sizes]
    return ["x".join(map(str, shape)) for shape in model.sample_shapes]


def _largest(config: Config, model: VelocityModel) -> str:
    shapes = list(model.sample_shapes)
    return _buckets(config, model)[max(range(len(shapes)), key=lambda i: math.prod(shapes[i]))]


def _remarks(networks: list[Network]) -> list[str]:
    """What the absence of a first moment saves."""
    network = max(networks, key=lambda network: network.parameters)
    moments = 4 * network.trained_itemsize * network.parameters  # weights, gradients, and two moments
    return [
        f"{TEACHER}: {size(network.bytes)} a network, frozen",
        f"a full fake of one network, with its gradients and both moments of AdamW: {size(moments)}; without the "
        f"first, as here: {size(3 * moments // 4)}; in all shards together",
    ]


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= 0.1 * factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
