"""What the figures of health, their rules and their line cost, as a share of the iterations that they are taken in."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from phased_dmd import health, step, train
from phased_dmd.config import Config
from phased_dmd.maths import losses
from phased_dmd.networks.optim import Learner

TIMED = (  # what is computed for health alone, but for the size of a step: the figures of an update, sums, line, rules
    (losses, "_agreement_figures"), (losses, "_projection_figures"), (losses, "x0_residual"), (step, "thirds"),
    (health, "add"), (health, "line"), (train, "tell_health"),
)  # fmt: skip


def health_share(config: Config, folder: Path) -> float:
    """Returns the share of a run's CPU seconds, in all iterations, that health takes.

    That of a step's size is what a measured optimiser step takes more than the median of the others of its network, so
    that not every iteration may write a line.
    """
    seconds: dict[str, list[float]] = defaultdict(list)
    inside = 0

    def timed(function: Callable[..., Any], name_of: Callable[..., str]) -> Callable[..., Any]:
        @wraps(function)
        def run(*arguments: Any) -> Any:
            nonlocal inside
            inside, began = inside + 1, time.process_time()
            try:
                return function(*arguments)
            finally:
                inside -= 1
                if not inside:  # what one of them calls of the others is in its own time
                    seconds[name_of(*arguments)].append(time.process_time() - began)

        return run

    def step_name(learner: Learner, _iteration: int, measured: bool = False) -> str:
        return f"{'measured' if measured else 'plain'} {learner.role}"

    log = train.log

    def logged(run: Any, row: dict[str, Any], wall: float, cpu: float) -> None:
        seconds["whole"].append(cpu)
        log(run, row, wall, cpu)

    with ExitStack() as patched:
        for owner, name in TIMED:
            patched.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), lambda *_: "health")))
        patched.enter_context(mock.patch.object(Learner, "step", timed(Learner.step, step_name)))
        patched.enter_context(mock.patch.object(train, "log", logged))
        train.distill(config, folder, quiet=True)
    sizes = sum(
        sum(found) - len(found) * median(seconds[name.replace("measured", "plain")])
        for name, found in list(seconds.items())
        if name.startswith("measured")
    )
    return (sum(seconds["health"]) + sizes) / sum(seconds["whole"])


def show_health(found: Mapping[str, float]) -> list[str]:
    return [
        "CPU time of the figures, the size of a step, the line and the rules over that of whole iterations, a line "
        "written after every second.", "", "| model | share, % |", "|---|---|",
        *(f"| {model} | {100 * share:.3f} |" for model, share in found.items()),
    ]  # fmt: skip
