"""The paper's Fig. 2 and Appendix D: a 1-D score model trained within a subinterval."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from phased_dmd.engine.randomness import generator
from phased_dmd.lab.metrics.formats import markdown_table
from phased_dmd.lab.metrics.intervals import interval, ratio
from phased_dmd.lab.reproduce.claim_page import HOW_COMPARED, comparison_table, decisive, made_by, verdict_part
from phased_dmd.lab.reproduce.results import plus_minus, write_page, write_rows
from phased_dmd.lab.reproduce.verdict import in_a_line, judge_each
from phased_dmd.maths.losses import Target, biased_target, score_matching_loss, subinterval_target
from phased_dmd.maths.phases import Hop
from phased_dmd.maths.rollout import rollout
from phased_dmd.maths.schedules import FlowSchedule, renoise_times, times_like
from phased_dmd.models.analytic import ExactMixture, TimeMLP

MIDDLE = 0.5  # the subinterval of Fig. 2 is (.5, 1)
SEEDS = {"quick": 1, "full": 5}  # by budget

SAYS = (
    "Trained within a subinterval by the unbiased objective, a score model is equivalent to one trained on the full "
    "interval; the biased objective gives other trajectories."
)
FULL, UNBIASED, BIASED = "full interval, Eq. 4", "subinterval, unbiased", "subinterval, biased"
ALIKE = 2.0  # times the full interval's deviation: as much is counted as equivalent


POINTS = "four points"  # what the models learn, in the place of a recipe


def fig2(
    seeds: Sequence[int], results: Path, about: Mapping[str, Any], full: bool, steps: int = 4000, hidden: int = 128
) -> Path:
    """Reproduces Fig. 2 and Appendix D: trajectories of a 1-D score model trained on t in (.5, 1) from x_.5 alone.

    Four points {-1, 0, 1, 2}; models of the full interval (Eq. 4), of the subinterval with the unbiased target
    (Eq. 12) and with the biased one. Writes results/fig2.{json,md,png}, and in fig2.jsonl for each model and seed the
    mean absolute deviation of 200 trajectories from the exact flow, over t in (.5, 1). full: whether the seeds suffice
    for a verdict.
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
    rows = []
    for seed in seeds:
        noise = torch.randn(200, 1, generator=generator(seed, "trajectories"))
        curves = {"exact flow": trajectories(exact, noise, schedule)}
        for name, (s, target) in settings.items():
            curves[name] = trajectories(fit_subinterval(exact, s, target, seed, steps, hidden), noise, schedule)
            deviations[name].append(float((curves[name] - curves["exact flow"]).abs().mean()))
            stem = name.replace(", ", "-").replace(" ", "-").replace(".", "")
            about_row = {"name": f"{stem}-{seed}", "variant": name, "seed": seed, "steps": steps}
            rows.append(about_row | {"deviation": deviations[name][-1]})
    write_rows(results / "fig2.jsonl", rows)
    comparisons = compare_deviations(deviations)
    verdicts = judge_each(comparisons, [POINTS] if full else [])
    body = {
        "claim": "fig2", "says": SAYS, "source": "Fig. 2, Sec. 2.3.2, Appendix D", **about,
        "verdict": in_a_line(verdicts), "verdicts": verdicts, "decides": decisive(comparisons),
        "comparisons": comparisons, "summary": {name: interval(values) for name, values in deviations.items()},
    }  # fmt: skip
    _draw_trajectories(curves, results / "fig2.png")
    return write_page(results, "fig2", fig2_page(body), body)


def compare_deviations(deviations: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Compares the models: the biased one deviates more than the unbiased one, which is equivalent to the full one.

    Models are equivalent where one deviates at most ALIKE times as far as the other.
    """
    equivalent = ratio([ALIKE * value for value in deviations[FULL]], deviations[UNBIASED])
    other = ratio(deviations[BIASED], deviations[UNBIASED])
    about = {"recipe": POINTS, "table": "trajectories", "measure": "deviation", "direction": "lower"}
    return [
        about | {"better": UNBIASED, "worse": BIASED, "what": "biased / unbiased"} | other,
        about | {"better": UNBIASED, "worse": FULL, "what": f"{ALIKE:g} x full interval / unbiased"} | equivalent,
    ]


def fig2_page(body: Mapping[str, Any]) -> list[str]:
    """Returns the parts of results/fig2.md from its JSON."""
    rows = [[name, plus_minus(cell)] for name, cell in body["summary"].items()]
    return [
        "# fig2", f"{body['source']}: {SAYS}",
        "The evidence there: trajectories that overlap, or do not. No figures.",
        verdict_part(body["verdicts"], body["comparisons"], body), comparison_table(body["comparisons"]), HOW_COMPARED,
        "![trajectories](fig2.png)", "## Measured",
        f"{made_by(body)} Mean ± half width of the 95 % interval over seeds. 200 trajectories from t = 1 to "
        f"{MIDDLE:g}, their coordinates; the points are 1 apart.",
        markdown_table(["model", "mean absolute deviation from the exact flow"], rows),
    ]  # fmt: skip


def fit_subinterval(exact: ExactMixture, s: float, target: Target, seed: int, steps: int, hidden: int) -> TimeMLP:
    """Trains a flow model on t in (s, 1) by Eq. 13, from samples of x_s alone."""
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
    """Returns sampling trajectories from t = 1 down to .5, [steps, n]."""
    times = [1 - MIDDLE * i / steps for i in range(steps + 1)]
    x, points = noise, []
    for i in range(steps):
        x = rollout(lambda _step, x, t: model(x, t), x, [Hop(i, times[i], times[i + 1])], schedule, "flow").x
        points.append(x[:, 0])
    return torch.stack(points)


def _draw_trajectories(curves: Mapping[str, Tensor], path: Path) -> None:
    figure = Figure((3 * len(curves), 3), layout="constrained")
    for panel, (name, points) in zip(figure.subplots(1, len(curves), sharey=True), curves.items(), strict=True):
        times = torch.linspace(1 - MIDDLE / len(points), MIDDLE, len(points))
        panel.plot(times, points, color="#36648b", linewidth=0.4, alpha=0.6)
        panel.invert_xaxis()
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("t", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
