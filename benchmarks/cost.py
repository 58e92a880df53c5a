"""What a quality costs: the paper's schedule and `fast`, each trained to its end at several budgets, and its levers."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.optimize import isotonic_regression

from phased_dmd.config import Config
from phased_dmd.plan.work import phase_work
from phased_dmd.reproduce.claim import FRECHET, MODES, Budget, Measure, Variant
from phased_dmd.reproduce.claims import DIVERSITY
from phased_dmd.reproduce.intervals import compare, shown
from phased_dmd.reproduce.study import Study, collect, planned, plus_minus
from phased_dmd.reproduce.workers import Run, Workers

SEEDS = 3
PAPER, FAST = "paper's", "fast"


@dataclass(frozen=True)
class Contest:
    """The paper's schedule of a recipe against `fast`, which is the recipe of that name with -fast.

    measures: of quality; a target is reached where each of them reaches the best that the paper's schedule does.
    diversity: what must not be lost by it. ladders: by side, shares of its recipe's iterations. paper: what tuning
    lays over the recipe for the paper's side. levers: what the table of levers has, at `share` of the iterations, over
    `levers_of` that side.
    """

    recipe: str
    samples: int
    measures: tuple[Measure, ...]
    diversity: tuple[Measure, ...]
    ladders: Mapping[str, Sequence[float]]
    paper: Mapping[str, Any]
    levers_of: str
    levers: Mapping[str, Mapping[str, Any]]
    share: float = 1.0

    def variants(self, side: str) -> dict[str, Variant]:
        overrides = self.paper if side == PAPER else {}
        return {f"{side}, x {share:g}": Variant(None, overrides, share) for share in self.ladders[side]}

    def lever_variants(self) -> dict[str, Variant]:
        overrides = self.paper if self.levers_of == PAPER else {}
        return {label: Variant(None, {**overrides, **lever}, self.share) for label, lever in self.levers.items()}

    def name(self, side: str) -> str:
        return self.recipe if side == PAPER else f"{self.recipe}-fast"


def cost(contests: Sequence[Contest], runs: Path, results: Path, jobs: int) -> dict[str, Any]:
    """What each contest shows; distils and evaluates what is missing in the folder `runs`, on `jobs` processes."""
    parts: list[tuple[Contest, str, Budget, dict[tuple[str, int], Run]]] = []
    for contest in contests:
        budget = Budget(SEEDS, contest.samples)
        for side in (PAPER, FAST):
            variants = contest.variants(side) | (contest.lever_variants() if side == contest.levers_of else {})
            parts.append((contest, side, budget, planned(contest.name(side), variants, budget, runs)))
    with Workers(jobs, print) as workers:
        everything = [run for *_, planned_runs in parts for run in planned_runs.values()]
        workers.distil(everything)
        workers.evaluate(everything)
    found: dict[str, dict[str, Study]] = {}
    for contest, side, budget, planned_runs in parts:
        studied = collect(contest.name(side), planned_runs, budget, results / "cost")
        found.setdefault(contest.recipe, {})[side] = studied
    return {contest.recipe: weigh(contest, found[contest.recipe]) for contest in contests}


def weigh(contest: Contest, studies: Mapping[str, Study]) -> dict[str, Any]:
    """Curves of both sides, the target, what reaching it costs each, and the levers."""
    curves = {
        side: [point(contest, studies[side], label) for label in contest.variants(side)] for side in (PAPER, FAST)
    }
    targets = {key(m): smoothed([mean(p, m) for p in curves[PAPER]])[-1] for m in contest.measures}
    reached = {
        side: {
            unit: most(reach([p[unit] for p in curves[side]], [mean(p, m) for p in curves[side]], targets[key(m)])
                       for m in contest.measures)
            for unit in ("calls", "cpu_seconds")
        }
        for side in (PAPER, FAST)
    }  # fmt: skip
    ratios = {unit: quotient(reached[PAPER][unit], reached[FAST][unit]) for unit in ("calls", "cpu_seconds")}
    at = {side: first(curves[side], reached[side]["calls"]) for side in (PAPER, FAST)}
    return {
        "measures": [[m.table, m.name, m.direction] for m in contest.measures],
        "diversity": [[m.table, m.name, m.direction] for m in contest.diversity],
        "base": {
            key(m): next(iter(studies[PAPER].summary[m.table].values()))[m.name]["mean"]
            for m in (*contest.measures, *contest.diversity)
        },
        "curves": curves, "targets": targets, "reached": reached, "ratios": ratios,
        "compared": {side: point_at["label"] if point_at else None for side, point_at in at.items()},
        "comparisons": comparisons(contest, studies, at), "levers_of": contest.levers_of,
        "levers": [point(contest, studies[contest.levers_of], label) for label in contest.lever_variants()],
    }  # fmt: skip


def point(contest: Contest, study: Study, label: str) -> dict[str, Any]:
    """A label's cost, means over seeds, and its measures by seed."""
    runs = [run for (other, _), run in study.runs.items() if other == label]
    return {
        "label": label, "updates": runs[0].config.updates, "calls": forwards(runs[0].config),
        "cpu_seconds": fmean(cpu_seconds(run.folder) for run in runs),
        "values": {
            key(m): study.summary[m.table][label][m.name]
            for m in (*contest.measures, *contest.diversity)
        },
    }  # fmt: skip


def key(measure: Measure) -> str:
    return f"{measure.table}/{measure.name}"


def mean(found: Mapping[str, Any], measure: Measure) -> float:
    return found["values"][key(measure)]["mean"]


def forwards(config: Config) -> float:
    """Network calls of a run a sample of the batch, in forwards of the network."""
    plan, guidance = config.phase_plan(), getattr(config.teacher, "guidance", (1.0,))
    guided, phases = guidance[0] != 1, range(1, plan.num_phases + 1)
    return sum(config.phase_iterations(k) * phase_work(config, plan, k, guided).forwards for k in phases)


def cpu_seconds(run: Path) -> float:
    """Of all iterations; previews, checkpoints and the encoding of prompts are not among them."""
    return sum(json.loads(line)["cpu_seconds"] for line in (run / "timing.jsonl").read_text().splitlines())


def smoothed(values: Sequence[float]) -> list[float]:
    """The nearest sequence that never rises: neighbours that do are averaged."""
    return isotonic_regression(values, increasing=False).x.tolist()


def reach(costs: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """What it costs until the smoothed values reach the target, which they then keep; None if they do not.

    Between two budgets by a line over the logarithm of the cost; the least budget where it is reached there already.
    """
    curve = smoothed(values)
    for i, value in enumerate(curve):
        if value <= target:
            if i == 0 or value == target:
                return costs[i]
            share = (curve[i - 1] - target) / (curve[i - 1] - value)
            return math.exp((1 - share) * math.log(costs[i - 1]) + share * math.log(costs[i]))
    return None


def most(costs: Any) -> float | None:
    found = list(costs)
    return None if None in found else max(found)


def quotient(paper: float | None, fast: float | None) -> float | None:
    return None if paper is None or fast is None else paper / fast


def first(curve: Sequence[Mapping[str, Any]], cost: float | None) -> Mapping[str, Any] | None:
    """The least budget that pays the cost."""
    return next((p for p in curve if cost is not None and p["calls"] >= cost * (1 - 1e-9)), None)


def comparisons(
    contest: Contest, studies: Mapping[str, Study], at: Mapping[str, Mapping[str, Any] | None]
) -> list[dict[str, Any]]:
    """`fast` against the paper's schedule, each at the budget that reaches the target: above neutral it is better."""
    paper, fast = at[PAPER], at[FAST]
    if paper is None or fast is None:
        return []
    found = []
    for measure in (*contest.measures, *contest.diversity):
        cells = (s.summary[measure.table][p["label"]][measure.name]
                 for s, p in ((studies[FAST], fast), (studies[PAPER], paper)))  # fmt: skip
        comparison = compare(measure, *cells)
        found.append({"table": measure.table, "measure": measure.name, **comparison, "shows": shown(comparison)})
    return found


def page(found: Mapping[str, Any]) -> list[str]:
    """The figures as lines of Markdown."""
    lines: list[str] = []
    for recipe, contest in found.items():
        names = list(contest["base"])
        head = [f"| {recipe} | generator updates | forwards | CPU s | {' | '.join(names)} |"]
        head += ["|" + "---|" * (len(names) + 4), f"| base, 40 steps | | | | {bases(contest)} |"]
        rows = [line(p, names) for side in (PAPER, FAST) for p in contest["curves"][side]]
        lines += ["", *head, *rows, "", *verdict(contest), ""]
        told = "alone, over the paper's schedule" if contest["levers_of"] == PAPER else "left out of `fast`"
        lines += [f"Levers {told}, {SEEDS} seeds:", "", *head, *(line(p, names) for p in contest["levers"])]
    return lines


def bases(contest: Mapping[str, Any]) -> str:
    return " | ".join(f"{value:.4g}" for value in contest["base"].values())


def line(found: Mapping[str, Any], names: Sequence[str]) -> str:
    cells = " | ".join(plus_minus(found["values"][name]) for name in names)
    return f"| {found['label']} | {found['updates']} | {found['calls']:,.0f} | {found['cpu_seconds']:,.1f} | {cells} |"


def verdict(contest: Mapping[str, Any]) -> list[str]:
    targets = ", ".join(f"{name} {value:.4g}" for name, value in contest["targets"].items())
    reached = contest["reached"]
    if None in (*reached[PAPER].values(), *reached[FAST].values()):
        return [f"Target: {targets}. `fast` does not reach it."]
    costs = "; ".join(
        f"{side}: {reached[side]['calls']:,.0f} forwards, {reached[side]['cpu_seconds']:,.1f} CPU s"
        for side in (PAPER, FAST)
    )
    ratios = contest["ratios"]
    told = [f"Target: {targets}. {costs}: **{ratios['calls']:.2f} times fewer calls, "
            f"{ratios['cpu_seconds']:.2f} times less CPU time**."]  # fmt: skip
    both = " against ".join(contest["compared"][side] for side in (FAST, PAPER))
    told += ["", f"{both}, the same seeds, above 1 for a ratio and 0 for a difference `fast` is better:", ""]
    told += ["| measure | | 95 % interval | it shows |", "|---|---|---|---|"]
    words = {"as claimed": "`fast` better", "the reverse": "`fast` worse", "nothing": "nothing", None: "-"}
    for c in contest["comparisons"]:
        told.append(
            f"| {c['table']}/{c['measure']} ({c['scale']}) | {c['value']:.3g} | {c['low']:.3g} to {c['high']:.3g} | "
            f"{words[c['shows']]} |"
        )
    return told


def draw(found: Mapping[str, Any], path: Path) -> None:
    """The curves, a row a recipe, a panel a measure, over the calls."""
    from matplotlib.figure import Figure

    columns = max(len(contest["base"]) for contest in found.values())
    figure = Figure((3 * columns, 2.8 * len(found)), dpi=150)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(found), columns, squeeze=False)
    for row, (recipe, contest) in zip(grid, found.items(), strict=True):
        for panel in row[len(contest["base"]) :]:
            panel.set_axis_off()
        for panel, (name, base) in zip(row, contest["base"].items(), strict=False):
            for side, style in ((PAPER, "o-"), (FAST, "s--")):
                points = contest["curves"][side]
                cells = [p["values"][name] for p in points]
                panel.errorbar(
                    [p["calls"] for p in points], [c["mean"] for c in cells], [c["half_width"] or 0 for c in cells],
                    fmt=style, capsize=3, markersize=4, linewidth=1.2, label=side,
                )  # fmt: skip
            panel.axhline(base, color="#999999", linewidth=1, linestyle=":", zorder=0, label="base, 40 steps")
            if (target := contest["targets"].get(name)) is not None:
                panel.axhline(target, color="#36648b", linewidth=0.8, zorder=0, label="target")
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:,.0f}")
            panel.set_title(f"{recipe}: {name}", fontsize=8)
            panel.set_xlabel("forwards a sample of the batch", fontsize=8)
            panel.tick_params(labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
            panel.legend(frameon=False, fontsize=7)
    figure.savefig(path)


SGTS = {"plan.phases": 2, "plan.gradient": "last", "iterations": 1000}  # as many updates in all; exits need it
ALONE = {
    "neither": {}, "reuse": {"rollouts.reuse": True}, "pool": {"rollouts.pool": 32},
    "antithetic noise": {"rollouts.antithetic": "noise"}, "antithetic start": {"rollouts.antithetic": "start"},
    "2 fake updates": {"fake.updates": 2}, "1 fake update": {"fake.updates": 1}, "pull": {"fake.pull": 1.0},
    "slower fake": {"fake.optimiser.lr": 1e-3}, "Fisher": {"objective.divergence": "fisher"},
    "Fisher, stop gradient": {"objective.divergence": "fisher-stop-gradient"},
    "shares": {"phase_shares": [0.5, 0.5, 1.0, 2.0]}, "2 phases, SGTS": SGTS,
    "2 phases, SGTS, shuffled exits": {**SGTS, "plan.exits": "shuffled"},
}  # fmt: skip
TOY = Contest(
    recipe="toy-2d", samples=4000, measures=(Measure("mixture", "distance_to_nearest_mode"),),
    diversity=(MODES, Measure("mixture", "energy_distance")),
    ladders={PAPER: (0.25, 0.5, 1.0), FAST: (0.25, 0.5, 0.75, 1.0, 1.25)},
    paper={}, levers_of=PAPER, levers=ALONE, share=0.5,
)  # fmt: skip
LEFT_OUT = {
    "no reuse": {"rollouts.reuse": False}, "5 fake updates": {"fake.updates": 5}, "no pull": {"fake.pull": 0.0},
    "no antithetic start": {"rollouts.antithetic": None}, "equal phases": {"phase_shares": [1.0625] * 4},
}  # fmt: skip
NANO = Contest(
    recipe="nano-t2i", samples=2000, measures=(FRECHET,),
    diversity=(*DIVERSITY, Measure("specific", "frechet_features")),
    ladders={PAPER: (0.25, 0.5, 1.0), FAST: (0.5, 0.75, 1.0, 1.125)},
    paper={"generator.ema": 0.9, "fake.optimiser.lr": 1.5e-4}, levers_of=FAST, levers=LEFT_OUT, share=0.5,
)  # fmt: skip
CONTESTS = (TOY, NANO)
