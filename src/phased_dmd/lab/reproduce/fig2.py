"""The paper's Fig. 2 and Appendix D: a 1-D score model trained within a subinterval."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phased_dmd.checkpoint import write_atomically
from phased_dmd.engine.randomness import generator
from phased_dmd.lab.metrics.intervals import interval
from phased_dmd.lab.reproduce.claim_page import HOW_COMPARED, comparison_table, decisive, made_by, verdict_line
from phased_dmd.lab.reproduce.comparisons import judge, ratio
from phased_dmd.lab.reproduce.study import plus_minus
from phased_dmd.maths.losses import Target, biased_target, score_matching_loss, subinterval_target
from phased_dmd.maths.phases import Hop
from phased_dmd.maths.rollout import rollout
from phased_dmd.maths.schedules import FlowSchedule, renoise_times, times_like
from phased_dmd.models.analytic import ExactMixture, TimeMLP

MIDDLE = 0.5  # the subinterval of Fig. 2 is (.5, 1)
SEEDS = {"quick": 1, "full": 5}  # by budget
STEPS = 4000

SAYS = (
    "Trained within a subinterval by the unbiased objective, a score model is equivalent to one trained on the full "
    "interval; the biased objective gives other trajectories."
)
FULL, UNBIASED, BIASED = "full interval, Eq. 4", "subinterval, unbiased", "subinterval, biased"
ALIKE = 2.0  # times the full interval's deviation: as much is counted as equivalent


def fig2(seeds: Sequence[int], results: Path, about: Mapping[str, Any], steps: int = STEPS, hidden: int = 128) -> Path:
    """Fig. 2 and Appendix D: trajectories of a 1-D score model trained on t in (.5, 1) from x_.5 alone.

    Four points {-1, 0, 1, 2}; models of the full interval (Eq. 4), of the subinterval with the unbiased target
    (Eq. 12) and with the biased one. Writes results/fig2.{json,md,png}, and into results/fig2/ a file a model and
    seed: mean absolute deviation of 200 trajectories from the exact flow, over t in (.5, 1). Other seeds or steps than
    those of the full budget get no verdict.
    """
    schedule = FlowSchedule()
    exact = ExactMixture(torch.tensor([[-1.0], [0.0], [1.0], [2.0]]), 0.0, torch.ones(4), schedule, "flow")
    settings: dict[str, tuple[float, Target]] = {
        FULL: (0.0, subinterval_target),
        UNBIASED: (MIDDLE, subinterval_target),
        BIASED: (MIDDLE, biased_target),
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
            one = {"variant": name, "seed": seed, "steps": steps, "deviation": deviations[name][-1]}
            stem = f"{name.replace(', ', '-').replace(' ', '-').replace('.', '')}-{seed}"
            write_atomically(results / "fig2" / f"{stem}.json", (json.dumps(one, indent=1) + "\n").encode())
    comparisons = judge_trajectories(deviations)
    whole = about["budget"] == "full" and (len(seeds), steps) == (SEEDS["full"], STEPS)
    body = {
        "claim": "fig2", "says": SAYS, "source": "Fig. 2, Sec. 2.3.2, Appendix D", **about,
        "verdict": judge(comparisons) if whole else None, "decides": decisive(comparisons),
        "comparisons": comparisons, "summary": {name: interval(values) for name, values in deviations.items()},
    }  # fmt: skip
    write_atomically(results / "fig2.json", (json.dumps(body, indent=1) + "\n").encode())
    _plot_trajectories(curves, results / "fig2.png")
    write_atomically(results / "fig2.md", _markdown(body, about).encode())
    return results / "fig2.md"


def judge_trajectories(deviations: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """That the biased model deviates more than the unbiased one, that one at most ALIKE times as the full's."""
    equivalent = ratio([ALIKE * value for value in deviations[FULL]], deviations[UNBIASED])
    other = ratio(deviations[BIASED], deviations[UNBIASED])
    about = {"recipe": "four points", "table": "trajectories", "measure": "deviation", "direction": "lower"}
    return [
        about | {"better": UNBIASED, "worse": BIASED, "what": "biased / unbiased"} | other,
        about | {"better": UNBIASED, "worse": FULL, "what": f"{ALIKE:g} x full interval / unbiased"} | equivalent,
    ]


def _markdown(body: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    lines = ["| model | mean absolute deviation from the exact flow |", "|---|---|"]
    lines += [f"| {name} | {plus_minus(found)} |" for name, found in body["summary"].items()]
    parts = [
        "# fig2", f"{body['source']}: {SAYS}",
        "The evidence there: trajectories that overlap, or do not. No figures.",
        verdict_line(body["verdict"], body["comparisons"], about), comparison_table(body["comparisons"]), HOW_COMPARED,
        "![trajectories](fig2.png)", "## Measured",
        f"{made_by(about)} Mean ± half width of the 95 % interval over seeds. 200 trajectories from t = 1 to "
        f"{MIDDLE:g}, their coordinates; the points are 1 apart.",
        "\n".join(lines),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


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
