"""What distribution matching comes to rest at when its teacher is guided, beside what the guided sampler makes.

Exact, in one dimension: two classes that are mixtures of Gaussians, the score of one guided away from that of both.
Prints tables and draws docs/images/guidance.png, in 30 CPU seconds. `--student` also trains two students, in 80 more.
"""

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from phased_dmd.engine.randomness import generator
from phased_dmd.maths.phases import T_MIN, step_times
from phased_dmd.maths.schedules import FlowSchedule, renoise_times
from phased_dmd.models.analytic import ExactMixture, PlainCodec, TimeMLP, fit_student
from phased_dmd.recipes import resolve
from phased_dmd.sampling.loading import load
from phased_dmd.train import distill

Array = NDArray[np.float64]
CLASS, ALL, STD = {-1.0: 0.5, 1.5: 0.5}, {-1.0: 0.25, 1.5: 0.25, 0.5: 0.5}, 0.4  # means and weights; of every Gaussian
GRID = np.linspace(-3.5, 4.0, 301)  # places of x_0, where a law has its shares
SCALES, STEPS, TIMES, MANY = (1.0, 1.5, 2.0, 3.0), 4, 32, 1000
WEAKER = {2.0: 1.75, 3.0: 2.5}  # by the sampler's guidance: one to match under instead
FLOW = FlowSchedule()


def mixture(modes: dict[float, float]) -> ExactMixture:
    """The exact flow prediction of a mixture."""
    return ExactMixture(torch.tensor([*modes])[:, None], STD, torch.tensor([*modes.values()]), FLOW, "flow")


class Guided(nn.Module):
    """Predicts u + g (c - u) exactly, c of the class and u of both classes."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.own, self.all, self.scale = mixture(CLASS), mixture(ALL), scale

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicts psi [b, 1] at x [b, 1] and t [b]."""
        u = self.all(x, t)
        return u + self.scale * (self.own(x, t) - u)


def sampled(scale: float, steps: int, count: int = 4000) -> Array:
    """Samples of the guided sampler, sorted: Euler's rule from the quantiles of a normal law, as sampling takes it."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    x, network = (math.sqrt(2) * torch.erfinv(2 * u - 1))[:, None], Guided(scale)
    times = step_times(steps, shift=1.0)
    with torch.no_grad():
        for t, r in zip(times[:-1], times[1:], strict=True):
            x = x + (r - t) * network(x, torch.full((count,), t, dtype=torch.float64))
    return np.sort(x[:, 0].numpy())


# ---------------------------------------------------------------- where matching is at rest


def log_density(x: Array, t: float, modes: dict[float, float]) -> Array:
    """log p(x_t) of a mixture."""
    variance = ((1 - t) * STD) ** 2 + t**2
    each = [math.log(w) - (x - (1 - t) * m) ** 2 / (2 * variance) for m, w in modes.items()]
    return np.logaddexp.reduce(each, 0) - 0.5 * math.log(2 * math.pi * variance)


class Matching:
    """The functional that DMD descends: the mean over t of KL(p_t || q_t), p_t being a law p of x_0 noised to t, and
    q_t proportional to c_t^g u_t^(1 - g), the only law whose score is the guided one.

    t is drawn as in training, at shift 1, and weighed by sigma^2 / alpha^2, as `objective=posterior` weighs it. A law p
    is its shares at GRID. Matching's gradient in a sample is this functional's: where one vanishes so does the other.
    """

    def __init__(self, scale: float) -> None:
        u = (torch.arange(TIMES, dtype=torch.float64) + 0.5) / TIMES
        times = renoise_times(u, T_MIN, 1.0, shift=1.0).numpy()
        weights, kernels, logs = (times / (1 - times)) ** 2 / TIMES, [], []
        for t in times:
            x = np.linspace((1 - t) * GRID[0] - 5 * t, (1 - t) * GRID[-1] + 5 * t, 301)
            kernel = np.exp(-((x[:, None] - (1 - t) * GRID) ** 2) / (2 * t**2))
            guided = scale * log_density(x, t, CLASS) + (1 - scale) * log_density(x, t, ALL)
            kernels.append(kernel / kernel.sum(0))
            logs.append(guided - np.logaddexp.reduce(guided))
        self.weights, self.kernels, self.logs = weights, np.stack(kernels), np.stack(logs)
        self.back = (weights[:, None, None] * self.kernels).reshape(-1, len(GRID)).T.copy()

    def __call__(self, p: Array) -> tuple[float, Array]:
        """The functional's value, and its gradient in the shares."""
        noised = self.kernels @ p
        ratio = np.log(np.maximum(noised, 1e-300)) - self.logs
        return float(self.weights @ (noised * ratio).sum(1)), self.back @ ratio.ravel()

    def rest(self, iterations: int = 500) -> tuple[Array, float, float]:
        """The law at rest, its value, and the most by which that may be above the least there is.

        The functional is convex in p, so there is one law. Each step multiplies shares by the exponential of their
        gradient (mirror descent), and is halved where it leads up.
        """
        p = shares_of_class()
        (value, gradient), step = self(p), 1.0
        for _ in range(iterations):
            slope = gradient - p @ gradient
            while True:
                tried = p * np.exp(np.clip(-step * slope, -30, 30))
                tried /= tried.sum()
                found = self(tried)
                if found[0] <= value or step < 1e-9:
                    break
                step /= 2
            if found[0] > value:
                break
            p, (value, gradient), step = tried, found, 1.3 * step
        return p, value, float(p @ gradient - gradient.min())


def shares_of_class() -> Array:
    """The class itself, without guidance."""
    density = np.exp(log_density(GRID, 0.0, CLASS))
    return density / density.sum()


# ---------------------------------------------------------------- distances and the page


def cumulated(law: Array) -> Array:
    """The distribution function behind each place of GRID: of shares there, or of sorted samples."""
    spacing = GRID[1] - GRID[0]
    return np.cumsum(law) if len(law) == len(GRID) else np.searchsorted(law, GRID + spacing / 2) / len(law)


def energy(a: Array, b: Array) -> float:
    """The energy distance of two laws: in one dimension twice the integral of (F - G)^2."""
    return float(2 * ((cumulated(a) - cumulated(b)) ** 2).sum() * (GRID[1] - GRID[0]))


def laws_of(scale: float) -> dict[str, Array]:
    """The laws that are compared, as shares or sorted samples."""
    return {
        "the class": shares_of_class(), "the sampler": sampled(scale, MANY), "its 4 steps": sampled(scale, STEPS),
        "matching at rest": Matching(scale).rest()[0],
    }  # fmt: skip


PAIRS = (
    ("the class", "the sampler"), ("its 4 steps", "the sampler"), ("matching at rest", "the sampler"),
    ("matching at rest", "the class"),
)  # fmt: skip
COLOURS = {
    "the class": "grey", "the sampler": "#0072b2", "matching at rest": "#d55e00", "its 4 steps": "#009e73",
}  # fmt: skip


def row(scale: float, laws: dict[str, Array]) -> str:
    """A line of the table: energy distances in thousandths."""
    cells = [f"{1e3 * energy(laws[a], laws[b]):.1f}" for a, b in PAIRS]
    return f"| {scale:g} | {' | '.join(cells)} |"


def draw(all_laws: dict[float, dict[str, Array]], path: Path) -> None:
    """A panel a scale, with the densities of the laws."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    edges = np.linspace(GRID[0], GRID[-1], 76)
    for axes, (scale, laws) in zip(figure.subplots(1, len(all_laws), sharey=True), all_laws.items(), strict=True):
        for name, colour in COLOURS.items():
            shares = laws[name] if len(laws[name]) == len(GRID) else None
            height, _ = np.histogram(laws[name] if shares is None else GRID, edges, density=True, weights=shares)
            if name == "the class":
                axes.stairs(height, edges, color=colour, label=name, fill=True, alpha=0.25)
            else:
                axes.stairs(height, edges, color=colour, label=name, lw=1.2)
        axes.set(title=f"g = {scale:g}", xlim=(-3, 3.5), yticks=[], xlabel="x")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------- a student of the trainer's own


class Teacher:
    """`VelocityModel` of the guided class; its student is fitted to the class without guidance, as a base is."""

    schedule, prediction, switches, guidance, lora_targets = FLOW, "flow", (), (1.0,), ()
    sample_shapes = ((1,),)

    def __init__(self, scale: float) -> None:
        torch.manual_seed(0)
        student = TimeMLP(1)
        fit_student(student, mixture(CLASS), 2000, generator(0, "fit"))
        self.networks, self.students = [Guided(scale).eval()], [student.eval()]

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        return ()

    def batch(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {}

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return network(x, t)

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        return conditional


def distilled(scale: float, count: int = 4000) -> Array:
    """Sorted samples of a student that Phased DMD has distilled from the guided teacher: four steps in four phases."""
    changes: dict[str, Any] = {
        "teacher": {"kind": "own"}, "plan.steps": STEPS, "plan.phases": STEPS, "iterations": 400,
        "phase_shares": [0.25, 0.25, 0.5, 2.0], "rollouts.reuse": True, "fake.updates": 2, "sample_every": None,
    }  # fmt: skip
    own = Teacher(scale), PlainCodec()
    with tempfile.TemporaryDirectory() as folder:
        sampler = load(distill(resolve("toy-1d", changes), Path(folder) / "run", quiet=True, own=own), own=own)
        return np.sort(sampler([""] * count, range(count)).flatten().double().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", action="store_true", help="also train students at the weakest and the strongest")
    parser.add_argument("--output", type=Path, default=Path("docs/images/guidance.png"))
    asked = parser.parse_args()
    all_laws = {scale: laws_of(scale) for scale in SCALES}
    print(f"| g | {' | '.join(f'{a} to {b}' for a, b in PAIRS)} |\n|{'---|' * (len(PAIRS) + 1)}")
    for scale, laws in all_laws.items():
        print(row(scale, laws))
    for scale, weaker in WEAKER.items():
        apart = 1e3 * energy(Matching(weaker).rest()[0], all_laws[scale]["the sampler"])
        print(f"matching at rest under g = {weaker:g} to the sampler under g = {scale:g}: {apart:.1f}")
    draw(all_laws, asked.output)
    for scale in SCALES[:: len(SCALES) - 1] if asked.student else ():
        student = distilled(scale)
        for name in ("the sampler", "matching at rest"):
            print(f"g = {scale:g}, a distilled student to {name}: {1e3 * energy(student, all_laws[scale][name]):.1f}")


if __name__ == "__main__":
    main()
