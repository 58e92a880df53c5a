"""Why TDM's departures do not hurt on toy-2d: what its targets teach a fake, on the exact mixture and without networks.

A law is a sample of pairs: x at a phase's begin [n, 2] and x_s at its end [n, 2]. What a fake learns of it without
error are means given x_t, over its samples by their exact weights p(x_t | x_s). All is float64.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from phased_dmd.config import phase_plan
from phased_dmd.config.teacher import AnalyticTeacher
from phased_dmd.engine.randomness import generator
from phased_dmd.lab.metrics.distances import mode_histogram_kl
from phased_dmd.maths.losses import biased_target, posterior_mean
from phased_dmd.maths.phases import Hop, RenoiseInterval
from phased_dmd.maths.rollout import rollout
from phased_dmd.maths.schedules import add_noise, predicted_x0, renoise_times, times_like, x0_through
from phased_dmd.models.analytic import ExactMixture, build_mixture
from phased_dmd.recipes import resolve

Target = Literal["unbiased", "biased", "rollout"]
INTERVALS = ("nested", "disjoint")
FINE = 40  # Euler steps of the teacher's flow within a phase, by which a law stays the teacher's


@dataclass(frozen=True)
class Stage:
    """A phase of toy-2d, from its begin to its end s, with the interval of its re-noise times t."""

    exact: ExactMixture
    begin: float
    s: float
    interval: RenoiseInterval
    shift: float

    def times(self, count: int, rng: torch.Generator) -> Tensor:
        """Draws t [count] as training does."""
        u = torch.rand(count, generator=rng, dtype=torch.float64)
        return renoise_times(u, self.interval.low, self.interval.high, self.shift)

    def start(self, count: int, rng: torch.Generator) -> Tensor:
        """Draws the teacher's own x at the phase's begin, [count, 2]."""
        x_0, noise = self.exact.sample(count, rng).double(), torch.randn(count, 2, generator=rng, dtype=torch.float64)
        return (1 - self.begin) * x_0 + self.begin * noise

    def flow(self, x: Tensor, steps: int) -> Tensor:
        """Takes x [n, 2] from the phase's begin to its end in Euler steps of the teacher; one is the expert's onset."""
        grid = [self.begin + (self.s - self.begin) * i / steps for i in range(steps + 1)]
        hops = [Hop(i, grid[i], grid[i + 1]) for i in range(steps)]
        return rollout(lambda _, x, t: self.exact(x, t), x, hops, self.exact.schedule, "flow").x

    def noised(self, x_s: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns x_t [n, 2] of x_s, and t [n]."""
        t, eps = self.times(len(x_s), rng), torch.randn(x_s.shape, generator=rng, dtype=torch.float64)
        return add_noise(x_s, eps, times_like(self.s, x_s), t, self.exact.schedule), t

    def teacher(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns E_T[x_s | x_t] [n, 2]."""
        return self._mean(predicted_x0(self.exact(x_t, t), x_t, t, self.exact.schedule, "flow"), x_t, t)

    def fake(self, target: Target, begin: Tensor, x_s: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns E_F[x_s | x_t] [m, 2], at x_t [m, 2], of a fake that has learned the target on a law."""
        schedule, s = self.exact.schedule, times_like(self.s, x_t)
        alpha_ts, sigma_ts = (coefficient[:, None] for coefficient in schedule.transition(s, t))
        closeness = (alpha_ts * x_t @ x_s.T - alpha_ts**2 * x_s.square().sum(1) / 2) / sigma_ts**2
        weights = closeness.softmax(1)  # p(x_s | x_t), [m, n]
        if target == "rollout":
            x0 = x0_through(begin, x_s, times_like(self.begin, x_s), times_like(self.s, x_s), schedule)
            return self._mean(weights @ x0, x_t, t)
        mean = weights @ x_s
        if target == "unbiased":
            return mean
        psi = biased_target(mean, (x_t - alpha_ts * mean) / sigma_ts, s, t, schedule, "flow")  # it is linear in both
        return self._mean(predicted_x0(psi, x_t, t, schedule, "flow"), x_t, t)

    def _mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return posterior_mean(x0, x_t, times_like(self.s, x_t), t, self.exact.schedule)


def stages(interval: str) -> list[Stage]:
    """Returns the phases of toy-2d, of which t is drawn nested or disjoint."""
    config = resolve("toy-2d")
    assert isinstance(config.teacher, AnalyticTeacher)
    plan, exact = phase_plan(config), build_mixture(config.teacher)
    return [
        Stage(exact, plan.begin(k), plan.end(k), RenoiseInterval.of(plan, k, interval, None), config.plan.shift)
        for k in range(1, plan.num_phases + 1)
    ]


def biases(stage: Stage, samples: int, seed: int = 0) -> dict[str, float]:
    """Returns root mean squares of E_F[x_s | x_t] - E_T[x_s | x_t], the generator's gradient: `signal`, of an expert at
    its onset and a fake that is right, and by target of a generator that is right and a fake that is not.

    Means over a law come from two halves of it, whose product has no share of their noise.
    """
    rng = generator(seed, "tdm", f"{stage.s:g}", f"{stage.interval.high:g}")
    starts = [stage.start(samples, rng) for _ in range(3)]

    def size(steps: int, target: Target, other: Target | None) -> float:
        (asked, *laws) = [(x, stage.flow(x, steps)) for x in starts]
        x_t, t = stage.noised(asked[1], rng)
        wrong, right = ([stage.fake(kind, *law, x_t, t) for law in laws] if kind else None for kind in (target, other))
        right = right or [stage.teacher(x_t, t)] * 2
        one, two = (a - b for a, b in zip(wrong or [], right, strict=True))
        return math.sqrt(max(0.0, (one * two).sum(1).mean().item()))

    return {
        "signal": size(1, "unbiased", None),
        "biased": size(FINE, "biased", "unbiased"), "rollout": size(FINE, "rollout", "unbiased"),
    }  # fmt: skip


def descend(target: Target, interval: str, particles: int, iterations: int, seed: int = 0) -> dict[str, Any]:
    """Distils toy-2d into particles, phase by phase: each is moved along E_T - E_F as an expert's output would be.

    Returns by phase the `stretch`, the root mean square of x_s over that of the teacher's law; of the last phase's end
    the `kl` of the modes and the mean `distance` to the nearest mode; and both of where the teacher's own flow, which
    undoes nothing, takes what the last phase began from.
    """
    rng = generator(seed, "descend", target, interval)
    x, stretch, phases = torch.randn(particles, 2, generator=rng, dtype=torch.float64), [], stages(interval)
    exact = phases[0].exact
    clean = exact.means.square().sum(1).mean() + 2 * exact.std**2  # the mean of |x_0|^2
    flowed = x
    for stage in phases:
        x_s, flowed = stage.flow(x, 1), stage.flow(x, FINE)
        for i in range(iterations):
            x_t, t = stage.noised(x_s, rng)
            x_s = x_s + (1 - i / iterations) * (stage.teacher(x_t, t) - stage.fake(target, x, x_s, x_t, t))
        wanted = (1 - stage.s) ** 2 * clean + 2 * stage.s**2
        stretch.append((x_s.square().sum(1).mean() / wanted).sqrt().item())
        x = x_s

    def quality(x: Tensor) -> dict[str, float]:
        distance = torch.cdist(x, exact.means).min(1).values.mean().item()
        return {"kl": mode_histogram_kl(x, exact.means, exact.weights), "distance": distance}

    return {"target": target, "interval": interval, "stretch": stretch, **quality(x), "flowed": quality(flowed)}


def tdm_study(samples: int = 2000, particles: int = 500, iterations: int = 150) -> dict[str, Any]:
    """Returns the sizes of the biases by interval and phase, and what particles come to by target and interval."""
    of_phases = [
        {"interval": interval, "phase": k, "s": stage.s, "high": stage.interval.high, **biases(stage, samples)}
        for interval in INTERVALS
        for k, stage in enumerate(stages(interval), 1)
    ]
    kinds: tuple[Target, ...] = ("unbiased", "biased", "rollout")
    ends = [descend(kind, interval, particles, iterations) for interval in INTERVALS for kind in kinds]
    return {"biases": of_phases, "ends": ends}
