"""What a plan warns of, and the cheapest change that makes it fit."""

import json
from collections.abc import Callable
from typing import Any

from phased_dmd.config import Config
from phased_dmd.config.overrides import apply_overrides, build
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import NEAR, PhasePlan

Options = tuple[tuple[str, Any, str], ...]
OPTIONS: Options = (
    ("sample_every", None, "no previews"),
    ("optimiser.second_moment", "bfloat16", "rounded at random"),
    ("fake.weights", "lora", "loses quality"),
    ("engine.offload", True, "slow: weights cross to the host and back"),
)  # cheapest first, after those of `free`
Fits = Callable[[Config, int], bool]


def free(config: Config) -> Options:
    """What changes no result."""
    paired = config.rollouts.antithetic is not None
    return (
        ("engine.micro_batch", 2 if paired else 1, f"more calls, each of one {'pair' if paired else 'sample'}"),
        ("engine.activation_checkpointing", True, "a forward more in every update"),
    )


def changed(config: Config, options: Options) -> Config:
    """The config with some options set."""
    return build(apply_overrides(config.model_dump(mode="json"), {key: value for key, value, _ in options}))


def _is_set(config: Config, key: str, value: Any) -> bool:
    node: Any = config.model_dump(mode="json")
    for part in key.split("."):
        node = node[part]
    return node == value


def _is_possible(config: Config, option: tuple[str, Any, str]) -> bool:
    """Whether it goes with the rest."""
    try:
        changed(config, (option,))
    except UserError:
        return False
    return True


def cheapest(config: Config, gpus: int, fits: Fits) -> Options | None:
    """The options to add until it fits, no dearer one than needed, and none that is not needed; None if none do."""
    open_ = [o for o in free(config) + OPTIONS if not _is_set(config, *o[:2]) and _is_possible(config, o)]
    for length in range(1, len(open_) + 1):
        chosen = tuple(open_[:length])
        if not fits(changed(config, chosen), gpus):
            continue
        for option in reversed(chosen[:-1]):
            fewer = tuple(other for other in chosen if other is not option)
            if fits(changed(config, fewer), gpus):
                chosen = fewer
        return chosen
    return None


def least_gpus(config: Config, gpus: int, fits: Fits) -> int | None:
    """How many GPUs would do, with the options that change no result; they must share the batch equally."""
    slower, batch = changed(config, free(config)), config.batch_size
    least = 1 if config.rollouts.antithetic is None else 2  # samples that are not parted
    candidates = (n for n in range(gpus + 1, batch + 1) if batch % (n * least) == 0 and n % config.engine.replicas == 0)
    return next((n for n in candidates if fits(slower, n)), None)


def flags(options: Options) -> str:
    """As they are typed."""
    values = [value if isinstance(value, str) else json.dumps(value) for _, value, _ in options]
    return " ".join(f"--set {key}={value}" for (key, _, _), value in zip(options, values, strict=True))


def warnings(config: Config, plan: PhasePlan, gpus: int) -> list[str]:
    """What is likely to be a mistake, though it can be run."""
    return [*_batch(config, gpus), *_switches(plan)]


def _batch(config: Config, gpus: int) -> list[str]:
    ways = config.engine.sequence_parallel
    each, rest = divmod(config.batch_size * ways, gpus)
    if not rest and each % 2 and config.rollouts.antithetic is not None:
        return [
            f"rollouts.antithetic: of {each} samples on each of {gpus} GPUs no pairs can be made: distill refuses them"
        ]
    if not rest:
        return []
    idle = f", {gpus - config.batch_size * ways} of which have none" if config.batch_size * ways < gpus else ""
    return [
        f"batch_size: {config.batch_size} samples cannot be shared equally by {gpus} GPUs{idle}: distill refuses them"
    ]


def _switches(plan: PhasePlan) -> list[str]:
    """A teacher's switch against the grid and the phases."""
    found = []
    for switch in plan.switches:
        if any(abs(time - switch) < NEAR for time in plan.times):
            found.append(
                f"plan.shift: the teacher's switch {switch:g} is a point of the grid: the noisier network runs the "
                "step from there; in a pipeline that runs it at t >= switch, rounding may decide otherwise"
            )
    served = {plan.expert(step).network for step in range(plan.num_steps)}
    for network in range(len(plan.switches) + 1):
        if network not in served:
            found.append(f"plan.shift: no step starts in the range of network {network}, which is never distilled")
    for phase in range(1, plan.num_phases + 1):
        if len(plan.experts(phase)) > 1:
            found.append(f"plan.phases: phase {phase} crosses the teacher's switch and trains an expert on either side")
    return found
