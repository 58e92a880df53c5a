"""What a plan says in words: what is likely a mistake, and the cheapest change that makes a run fit."""

import json
import math
import shlex
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from phased_dmd.config import FISHER, Config
from phased_dmd.config.overrides import apply_overrides, build
from phased_dmd.config.teacher import PipelineTeacher, WanTeacher
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import NEAR, PhasePlan
from phased_dmd.plan.measure import meta_model

Fits = Callable[[Config, int], bool]  # whether a config's run fits on a number of GPUs


class Option(NamedTuple):
    """A field of the config, the value that saves memory, and what that costs."""

    key: str
    value: Any
    note: str


Options = tuple[Option, ...]
WAYS = 4  # processes that share a sample
OPTIONS: Options = (
    Option("renoise.network", "update", "all samples of an update are scored by one network"),
    Option("engine.sequence_parallel", WAYS, f"every {WAYS} GPUs share a sample"),
    Option("sample_every", None, "no previews"),
    Option("optimiser.second_moment", "bfloat16", "rounded at random"),
    Option("fake.weights", "lora", "loses quality"),
    Option("teacher.quantise", "nf4", "weights of 4 bits, which one GPU alone can hold"),
)  # cheapest first, after those of `free`
OFFLOAD = Option("engine.offload", True, "slow: weights cross to the host and back")


def free(config: Config) -> Options:
    """Returns the options that change no result."""
    paired = config.rollouts.antithetic is not None
    samples, noun = (2, "pair") if paired else (1, "sample")
    return (
        Option("engine.micro_batch", samples, f"more calls, each of one {noun}"),
        Option("engine.activation_checkpointing", True, "a forward more in every update"),
    )


def is_shared(config: Config, gpus: int) -> bool:
    """Says whether GPUs can share the batch equally, and each sample as is asked, in whole pairs where there are."""
    samples, rest = divmod(config.batch_size * config.engine.sequence_parallel, gpus)
    grouped = gpus % config.engine.sequence_parallel == 0 and gpus % config.engine.replicas == 0
    return grouped and not rest and samples % (1 if config.rollouts.antithetic is None else 2) == 0


def smaller(config: Config) -> Options:
    """Returns the option that leaves out all but the smallest of a teacher's sizes; none if they are alike."""
    sizes = config.teacher.sizes if isinstance(config.teacher, PipelineTeacher) else ()
    pixels = [size.num_frames * size.height * size.width for size in sizes]
    kept = [size.model_dump(mode="json") for size, count in zip(sizes, pixels, strict=True) if count == min(pixels)]
    return (Option("teacher.sizes", kept, "the others are not distilled"),) if len(kept) < len(sizes) else ()


def changed(config: Config, options: Options) -> Config:
    """Returns the config with some options set. Raises UserError where they contradict its other fields."""
    return build(apply_overrides(config.model_dump(mode="json"), {key: value for key, value, _ in options}))


def _possible(config: Config, options: Options, gpus: int) -> Config | None:
    """Returns the config with some options set, or None where they contradict its other fields or the GPUs."""
    try:
        tried = changed(config, options)
    except UserError:
        return None
    packed, ways = getattr(tried.teacher, "quantise", None), tried.engine.sequence_parallel
    if (gpus > 1 and packed) or (ways > config.engine.sequence_parallel and not can_split(tried, gpus)):
        return None
    return tried


def can_split(config: Config, gpus: int) -> bool:
    """Says whether samples can be split among processes: Wan's, of lengths that can be divided."""
    ways, model = config.engine.sequence_parallel, meta_model(config.teacher)
    if not isinstance(config.teacher, WanTeacher) or config.objective in FISHER or not is_shared(config, gpus):
        return False
    network: Any = model.networks[0].config
    lengths = [math.prod(shape[1:]) // math.prod(network["patch_size"]) for shape in model.sample_shapes]
    return not any(number % ways for number in (network["num_attention_heads"], *lengths))


def cheapest(config: Config, gpus: int, fits: Fits) -> Options | None:
    """Returns the options that make it fit, no dearer one than needed, and none that is not needed; None if none do."""
    chosen, so_far = (), config
    for option in (*free(config), *OPTIONS, *smaller(config), OFFLOAD):
        if option is OFFLOAD:  # a packed network stays on its GPU
            chosen = tuple(other for other in chosen if other.key != "teacher.quantise")
        tried = _possible(config, (*chosen, option), gpus)
        if tried in (None, so_far):
            continue
        chosen, so_far = (*chosen, option), tried
        if fits(so_far, gpus):
            break
    else:
        return None
    for option in reversed(chosen[:-1]):
        fewer = tuple(other for other in chosen if other is not option)
        if (tried := _possible(config, fewer, gpus)) is not None and fits(tried, gpus):
            chosen = fewer
    return chosen


def least_gpus(config: Config, gpus: int, fits: Fits) -> int | None:
    """Returns how many more GPUs would do, with the options that change no result; None if no number does.

    They must share the batch equally, in whole pairs where samples are antithetic.
    """
    if getattr(config.teacher, "quantise", None) is not None:
        return None
    slower = changed(config, free(config))
    more = range(gpus + 1, config.batch_size * config.engine.sequence_parallel + 1)
    return next((n for n in more if is_shared(config, n) and fits(slower, n)), None)


def flags(options: Options) -> str:
    """Returns options as they are typed in a shell."""
    values = [value if isinstance(value, str) else json.dumps(value) for _, value, _ in options]
    return " ".join(
        f"--set {shlex.quote(f'{option.key}={value}')}" for option, value in zip(options, values, strict=True)
    )


def warnings(config: Config, plan: PhasePlan, gpus: int) -> Iterator[str]:
    """Yields what is likely to be a mistake, though it can be planned."""
    samples = config.batch_size * config.engine.sequence_parallel
    each, rest = divmod(samples, gpus)
    if rest:
        idle = f", {gpus - samples} of which have none" if samples < gpus else ""
        yield (
            f"batch_size: {config.batch_size} samples cannot be shared equally by {gpus} GPUs{idle}: "
            "distill refuses them"
        )
    elif each % 2 and config.rollouts.antithetic is not None:
        each_gpu = f"{each} samples on each of {gpus} GPUs"
        yield f"rollouts.antithetic: of {each_gpu} no pairs can be made: distill refuses them"
    for switch in plan.switches:
        if any(abs(time - switch) < NEAR for time in plan.times):
            yield (
                f"plan.shift: the teacher's switch {switch:g} is a point of the grid: the noisier network runs the "
                "step from there; in a pipeline that runs it at t >= switch, rounding may decide otherwise"
            )
    served = {plan.expert(step).network for step in range(plan.num_steps)}
    for network in range(len(plan.switches) + 1):
        if network not in served:
            yield f"plan.shift: no step starts in the range of network {network}, which is never distilled"
    for phase in range(1, plan.num_phases + 1):
        if len(plan.experts(phase)) > 1:
            yield f"plan.phases: phase {phase} crosses the teacher's switch and trains an expert on either side"
