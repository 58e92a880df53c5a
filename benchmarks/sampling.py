"""The denoising loops of four steps, experts fused, and of the base's forty with guidance, timed in turn."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from phased_dmd.engine.randomness import normal
from phased_dmd.export import export
from phased_dmd.recipes import resolve
from phased_dmd.sampling.loading import load
from phased_dmd.train import distill

BATCH = 16


def sampling(folder: Path, pairs: int = 7) -> dict[str, float]:
    """Medians of the seconds a loop takes, and of their ratio, on nano; what the experts learnt does not matter."""
    few = {"iterations": 1, "batch_size": 2, "fake.updates": 1}
    export(distill(resolve("nano-t2i", few), folder / "run", quiet=True), folder / "fused", fused=True)
    system = load(folder / "fused").system
    noise = normal(system.model.sample_shapes[0], range(BATCH), 0)
    condition = system.model.batch([system.negative] * BATCH)
    base_steps = system.config.teacher.base_steps
    path = system.plan.path(system.plan.num_phases)

    @torch.no_grad()
    def seconds(loop: Callable[[], object]) -> float:
        started = time.perf_counter()
        loop()
        return time.perf_counter() - started

    found = [
        (
            seconds(lambda: system.sample_teacher(noise, condition, base_steps)),
            seconds(lambda: system.roll(path, system.start(noise), condition)),
        )
        for _ in range(pairs + 1)
    ][1:]  # the first warms up
    return {
        "base_steps": base_steps, "steps": len(path), "batch": BATCH,
        "base": statistics.median(base for base, _ in found), "student": statistics.median(own for _, own in found),
        "ratio": statistics.median(base / own for base, own in found),
    }  # fmt: skip
