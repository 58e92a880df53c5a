"""Why phases that begin with the teacher's states differ from those that begin with the experts': in closed form for a
Gaussian under guidance, and on an exact mixture of two classes, whose guided prediction is exact.

Prints, by the strength of guidance, the two laws that a phase can begin with, and how far students of either kind are
from the guided sampler at every phase's end. About eight CPU minutes.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phased_dmd.config import Config
from phased_dmd.config.overrides import changed
from phased_dmd.engine.randomness import generator, normal
from phased_dmd.maths.phases import shift_time, step_times
from phased_dmd.maths.schedules import FlowSchedule, renoise_times
from phased_dmd.models.analytic import ExactMixture, PlainCodec, TimeMLP, fit_student
from phased_dmd.networks.roles import System
from phased_dmd.pool import teacher_times
from phased_dmd.prompts import Prompt
from phased_dmd.recipes import resolve
from phased_dmd.sampling.loading import load
from phased_dmd.train import distill

SHIFT, STEPS, BASE = 2.0, 4, 40
STRENGTHS = (2.0, 1.0)


# ---------------------------------------------------------------- a Gaussian, in closed form


def gaussian_laws(
    guidance: float, mean: float = 1.0, std: float = 0.5, wide: float = 1.2
) -> Iterator[tuple[float, ...]]:
    """Yields for each phase's end s the mean and the deviation of x_s there: of the guided sampler in infinitely many
    steps, and where matching is at rest.

    The class is N(mean, std^2), all classes together are N(0, wide^2). The guided score is linear, x_t's precision
    g / V_c + (1 - g) / V_u. Matching the Gaussian x_s descends the mean over t of KL(q_t | guided), weighed as
    `posterior` weighs its gradient.
    """

    def guided(t: Tensor) -> tuple[Tensor, Tensor]:
        """The precision and the mean that the guided score has at t."""
        alpha, own, all_ = 1 - t, ((1 - t) * std) ** 2 + t**2, ((1 - t) * wide) ** 2 + t**2
        precision = guidance / own + (1 - guidance) / all_
        return precision, guidance * alpha * mean / own / precision

    grid = shift_time(torch.linspace(1, 0, 2_001, dtype=torch.float64), SHIFT)
    centre, log_std, at = 0.0, 0.0, {}
    for t, r in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):  # dx/dt = (x + t score) / (t - 1), Heun's rule
        at[t] = centre, math.exp(log_std)
        slopes = []
        for time in (min(t, 1 - 1e-9), r):
            precision, target = (value.item() for value in guided(torch.tensor(time, dtype=torch.float64)))
            slopes.append(((1 - time * precision) / (time - 1), time * precision * target / (time - 1)))
        (a, b), (c, d) = slopes
        predicted = centre + (r - t) * (a * centre + b)
        centre += (r - t) * (a * centre + b + c * predicted + d) / 2
        log_std += (r - t) * (a + c) / 2
    at[0.0] = centre, math.exp(log_std)
    for s in step_times(STEPS, SHIFT)[1:]:
        nearest = min(at, key=lambda t, s=s: abs(t - s))
        yield (s, *at[nearest], *matched(s, guided))


def matched(s: float, guided: Any) -> tuple[float, float]:
    """The mean and the deviation of the Gaussian x_s at which the matching's gradient is zero."""
    schedule, one = FlowSchedule(), torch.tensor([s], dtype=torch.float64)
    t = renoise_times((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000, max(s, 0.02), 1.0, SHIFT)
    t = t.clamp(max=1 - 1e-6)
    alpha_ts, sigma_ts = schedule.transition(one, t)
    precision, target = guided(t)
    weight = (1 - s) * sigma_ts**2 / (1 - t)  # kappa, times what a unit of the score is of x_0
    variance, low, high = 1.0, 1e-6, 10.0
    for _ in range(100):  # the slope of the KL in the variance rises through zero
        variance = (low + high) / 2
        slope = (weight * alpha_ts * (precision - 1 / (alpha_ts**2 * variance + sigma_ts**2))).sum()
        low, high = (low, variance) if slope > 0 else (variance, high)
    centre = (weight * precision * target).sum() / (weight * precision * alpha_ts).sum()
    return centre.item(), math.sqrt(variance)


# ---------------------------------------------------------------- an exact mixture of two classes


class Guided(nn.Module):
    """Predicts u + g (c - u) exactly, c of one class and u of both."""

    def __init__(self, own: ExactMixture, both: ExactMixture, guidance: float) -> None:
        super().__init__()
        self.own, self.both, self.guidance = own, both, guidance

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicts psi [b, dims] at x [b, dims] and t [b]."""
        u = self.both(x, t)
        return u + self.guidance * (self.own(x, t) - u)


class Chequered:
    """`VelocityModel`: the white squares of a chequered board of 25 narrow modes, guided away from the black ones. Its
    student is fitted to the class without guidance, as a base is before it is guided.
    """

    schedule, prediction, switches, guidance, lora_targets = FlowSchedule(), "flow", (), (1.0,), ()
    sample_shapes = ((2,),)

    def __init__(self, guidance: float, seed: int) -> None:
        axis = range(-2, 3)
        board = torch.tensor([(x, y) for x in axis for y in axis], dtype=torch.float64)
        white = board[(board.sum(1) % 2) == 0]
        own, both = (ExactMixture(m, 0.05, torch.ones(len(m)), self.schedule, "flow") for m in (white, board))
        self.networks = [Guided(own, both, guidance)]
        self.students = [fitted(own, seed)]

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        return ()

    def batch(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {}

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return network(x, t)

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        return conditional


def fitted(exact: ExactMixture, seed: int, steps: int = 3000) -> TimeMLP:
    """The network that students start from."""
    torch.manual_seed(seed)
    student = TimeMLP(2)
    fit_student(student, exact, steps, generator(seed, "fit"))
    return student


def energy(a: Tensor, b: Tensor) -> float:
    """Returns twice the mean distance between two sets [n, d] minus those within each, without samples' own zeros."""
    within = [torch.pdist(each).mean().item() for each in (a, b)]
    return 2 * torch.cdist(a, b).mean().item() - sum(within)


def config_of(seed: int, iterations: int, **changes: Any) -> Config:
    own = {"kind": "own", "base_steps": BASE}
    quick = {"iterations": iterations, "seed": seed, "sample_every": None, "rollouts.reuse": True, "fake.updates": 2}
    return resolve("toy-2d", {"teacher": own, "rollouts.pool": 8192, **quick, **changes})


def ends(system: System, noise: Tensor, condition: dict[str, Tensor]) -> list[Tensor]:
    """The student's samples at the end of every phase."""
    phases = range(1, system.plan.num_phases + 1)
    with torch.no_grad():
        return [system.roll(system.plan.path(phase), noise, condition).x for phase in phases]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--polish", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--run", type=Path, help="measure the states of this finished run's student instead")
    asked = parser.parse_args()
    if asked.run:
        of_run(asked.run)
        return
    for guidance in (1.0, 1.5, 2.0, 4.0):
        for s, *laws in gaussian_laws(guidance):
            sampler, matched_ = (f"{mean:.4f} ± {std:.4f}" for mean, std in (laws[:2], laws[2:]))
            print(f"Gaussian, g {guidance}, s {s:.3f}: sampler {sampler}, matched {matched_}")
    for seed in range(asked.seeds):
        for guidance in STRENGTHS:
            mixture(guidance, seed, asked.iterations, asked.polish)


def mixture(guidance: float, seed: int, iterations: int, polish: int) -> None:
    """Trains the two kinds of students, and polishes one; prints their distances to the guided sampler's states."""
    own = Chequered(guidance, seed), PlainCodec()
    rng = torch.Generator().manual_seed(10**6 + seed)
    noise, other = torch.randn(2, 4000, 2, generator=rng)
    with tempfile.TemporaryDirectory() as folder:
        runs = {start: config_of(seed, iterations, **{"rollouts.start": start}) for start in ("experts", "teacher")}
        first = Path(folder) / "teacher"
        runs["polished"] = changed(
            runs["experts"], {"iterations": polish, "init_experts": [str(first)], "generator.lr": 5e-4}
        )
        for name, config in sorted(runs.items(), key=lambda run: run[0] == "polished"):
            system = load(distill(config, Path(folder) / name, quiet=True, own=own), own=own).system
            reference = list(teacher_ends(system, other, {}))
            found = [energy(a, b) for a, b in zip(ends(system, noise, {}), reference, strict=True)]
            floor = [energy(a, b) for a, b in zip(teacher_ends(system, noise, {}), reference, strict=True)]
            print(f"g {guidance}, seed {seed}, {name}: {numbers(found)} (sampler itself {numbers(floor)})", flush=True)


def of_run(run: Path, count: int = 128, prompt: str = "a handwritten digit") -> None:
    """Prints the same of a run, on one prompt: distances, and the deviation of all numbers of a state."""
    sampler = load(run)
    row, system = sampler.encode([Prompt(prompt)])[Prompt(prompt)], sampler.system
    condition = system.model.batch([row] * count)
    noise, other = (normal(sampler.shape, range(i, i + count), "side by side") for i in (0, count))
    student = ends(system, noise, condition)
    paired, reference = (list(teacher_ends(system, x, condition)) for x in (noise, other))
    starts = [noise, *paired]
    for k, states in enumerate(zip(student, paired, reference, strict=True), 1):
        a, b, c = (x.flatten(1) for x in states)
        own = system.plan.path(k)[system.plan.steps(k).start :]
        with torch.no_grad():
            alone = system.roll(own, starts[k - 1], condition).x.flatten(1)
        print(
            f"{run}, s_{k}: student to sampler {energy(a, c):.4f}, the sampler itself {energy(b, c):.4f}; of one noise "
            f"{rms(a - b):.4f} apart, from the sampler's own state at s_{k - 1} {rms(alone - b):.4f}; deviations "
            f"{a.std():.4f}, {b.std():.4f}, {c.std():.4f}",
            flush=True,
        )


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def teacher_ends(system: System, noise: Tensor, condition: dict[str, Tensor]) -> Iterator[Tensor]:
    """The guided sampler's states at the end of every phase."""
    config, x = system.config, noise
    for phase in range(1, system.plan.num_phases + 1):
        x = system.roll_teacher(teacher_times(config, system.plan, phase), x, condition)
        yield x


def numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{1e3 * value:.2f}" for value in values)


if __name__ == "__main__":
    main()
