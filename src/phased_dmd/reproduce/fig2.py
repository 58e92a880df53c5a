"""The paper's Fig. 2 and Appendix D: a 1-D score model trained within a subinterval."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from phased_dmd.checkpoint import write_atomically
from phased_dmd.diffusion import FlowSchedule, renoise_times, times_like
from phased_dmd.engine import generator
from phased_dmd.models.analytic import ExactMixture, TimeMLP
from phased_dmd.objectives import Target, biased_target, score_matching_loss, subinterval_target
from phased_dmd.phases import Hop
from phased_dmd.reproduce.intervals import interval
from phased_dmd.rollouts import rollout

MIDDLE = 0.5  # the subinterval of Fig. 2 is (.5, 1)


def fig2(seeds: Sequence[int], results: Path, steps: int = 4000, hidden: int = 128) -> Path:
    """Fig. 2 and Appendix D: trajectories of a 1-D score model trained on t in (.5, 1) from x_.5 alone.

    Four points {-1, 0, 1, 2}; models of the full interval (Eq. 4), of the subinterval with the unbiased target
    (Eq. 12) and with the biased one. Writes results/fig2.{json,md,png}: mean absolute deviation of 200 trajectories
    from the exact flow, over t in (.5, 1).
    """
    schedule = FlowSchedule()
    exact = ExactMixture(torch.tensor([[-1.0], [0.0], [1.0], [2.0]]), 0.0, torch.ones(4), schedule, "flow")
    settings: dict[str, tuple[float, Target]] = {
        "full interval, Eq. 4": (0.0, subinterval_target),
        "subinterval, unbiased": (MIDDLE, subinterval_target),
        "subinterval, biased": (MIDDLE, biased_target),
    }
    deviations: dict[str, list[float]] = {name: [] for name in settings}
    curves: dict[str, Tensor] = {}
    for seed in seeds:
        noise = torch.randn(200, 1, generator=generator(seed, "trajectories"))
        curves = {"exact flow": trajectories(exact, noise, schedule)}
        for name, (s, target) in settings.items():
            model = fit_subinterval(exact, s, target, seed, steps, hidden)
            curves[name] = trajectories(model, noise, schedule)
            deviations[name].append(float((curves[name] - curves["exact flow"]).abs().mean()))
    summary = {name: interval(values) for name, values in deviations.items()}
    command = f"phased-dmd reproduce fig2 --seeds {len(seeds)}"
    write_atomically(
        results / "fig2.json", (json.dumps({"command": command, "summary": summary}, indent=1) + "\n").encode()
    )
    lines = [
        f"| {name} | {v['mean']:.4f} | {min(v['values']):.4f} to {max(v['values']):.4f} |"
        for name, v in summary.items()
    ]
    text = (
        f"# Fig. 2: score matching within a subinterval\n\n`{command}`\n\n"
        f"| model | mean absolute deviation from the exact flow | range over {len(seeds)} seeds |\n|---|---|---|\n"
    )
    write_atomically(results / "fig2.md", (text + "\n".join(lines) + "\n\n![trajectories](fig2.png)\n").encode())
    _plot_trajectories(curves, results / "fig2.png")
    return results / "fig2.md"


def fit_subinterval(exact: ExactMixture, s: float, target: Target, seed: int, steps: int, hidden: int) -> TimeMLP:
    """A flow model on t in (s, 1) trained by Eq. 13 from samples of x_s alone."""
    rng = generator(seed, "fit", f"{s:g}")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = TimeMLP(1, hidden, 4)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.001, steps)
    schedule = exact.schedule
    for _ in range(steps):
        x_0 = exact.sample(1024, rng)
        s_ = times_like(s, x_0)
        sigma_s = schedule.sigma(s_)[:, None].float()
        x_s = schedule.alpha(s_)[:, None].float() * x_0 + sigma_s * torch.randn(x_0.shape, generator=rng)
        t = renoise_times(torch.rand(len(x_0), generator=rng, dtype=torch.float64), s, 1.0, 1.0)
        loss = score_matching_loss(model, x_s, torch.randn(x_0.shape, generator=rng), s_, t, schedule, "flow", target)
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
        decay.step()
    return model


@torch.no_grad()
def trajectories(model: torch.nn.Module, noise: Tensor, schedule: FlowSchedule, steps: int = 100) -> Tensor:
    """The sampling trajectories from t = 1 down to .5, [steps, n]."""
    times = [1 - MIDDLE * i / steps for i in range(steps + 1)]
    x, points = noise, []
    for i in range(steps):
        x = rollout(lambda _step, x, t: model(x, t), x, [Hop(i, times[i], times[i + 1])], schedule, "flow").x
        points.append(x[:, 0])
    return torch.stack(points)


def _plot_trajectories(curves: dict[str, Tensor], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((3 * len(curves), 3), layout="constrained")
    for panel, (name, points) in zip(figure.subplots(1, len(curves), sharey=True), curves.items(), strict=True):
        times = torch.linspace(1 - MIDDLE / len(points), MIDDLE, len(points))
        panel.plot(times, points, color="#36648b", linewidth=0.4, alpha=0.6)
        panel.invert_xaxis()
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("t", fontsize=8)
    figure.savefig(path, dpi=120)
