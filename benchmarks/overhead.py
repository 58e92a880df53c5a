"""What an iteration of training costs beyond the network calls that it must make, timed in turn in one process."""

import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from phased_dmd import train
from phased_dmd.config import Config
from phased_dmd.engine.randomness import normal
from phased_dmd.networks.roles import FAKE, TEACHER, System, expert_role

WARM_UP = 3  # iterations of each phase that are not counted


def overhead(config: Config, folder: Path) -> list[dict[str, float]]:
    """For each phase the medians, over pairs, of an iteration's seconds, of its bare calls' and of their ratio."""
    found: dict[int, list[tuple[float, float]]] = {}
    systems: list[System] = []
    build, log = train.build_system, train.log

    def built(*arguments: Any) -> System:
        systems.append(build(*arguments))
        return systems[-1]

    def timed(run: Any, row: dict[str, Any], seconds: float, cpu_seconds: float) -> None:
        log(run, row, seconds, cpu_seconds)
        found.setdefault(row["phase"], []).append((seconds, bare_iteration(systems[-1], row["phase"])))

    with mock.patch.object(train, "build_system", built), mock.patch.object(train, "log", timed):
        train.distill(config, folder, quiet=True)
    return [
        {
            "phase": phase, "iteration": statistics.median(whole for whole, _ in pairs[WARM_UP:]),
            "calls": statistics.median(bare for _, bare in pairs[WARM_UP:]),
            "ratio": statistics.median(whole / bare for whole, bare in pairs[WARM_UP:]),
        }
        for phase, pairs in found.items()
    ]  # fmt: skip


def bare_iteration(system: System, phase: int) -> float:
    """Seconds of the calls of one iteration, of a phase with one step, in the order that training makes them in.

    Inputs lie ready, adapters are switched before the clock starts, and of a backward only the network's is made.
    """
    config, model, roles = system.config, system.model, system.roles
    x = normal(model.sample_shapes[0], range(config.batch_size), 0)
    time_step = torch.full((config.batch_size,), 900.0)
    text = model.batch([system.negative] * config.batch_size)["text"]
    seconds = 0.0

    def call(role: str, network: int, count: int = 1, backward: bool = False) -> None:
        nonlocal seconds
        with roles.active(role), torch.set_grad_enabled(backward):
            module = roles.module(role, network)
            started = time.perf_counter()
            for _ in range(count):
                output = module(x, time_step, text, return_dict=False)[0]
                if backward:
                    output.mean().backward()
            seconds += time.perf_counter() - started
        for parameter in roles.parameters(role).values() if backward else ():
            parameter.grad = None

    *before, own = [system.plan.expert(hop.step) for hop in system.plan.path(phase)]
    for _ in range(config.fake.updates):
        for expert in (*before, own):
            call(expert_role(expert.phase), expert.network)
        call(FAKE, 0, backward=True)
    for expert in before:
        call(expert_role(expert.phase), expert.network)
    call(expert_role(own.phase), own.network, backward=True)
    call(TEACHER, 0, count=2 if model.guidance[0] != 1 else 1)
    call(FAKE, 0)
    return seconds
