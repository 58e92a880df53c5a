"""What a quality costs: the paper's schedule and `fast`, each trained to its end at several budgets, and its levers."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from contests import FAST, LEVER_SEEDS, PAPER, Contest, key
from scipy.optimize import isotonic_regression

from phased_dmd.config import Config
from phased_dmd.plan.work import phase_work
from phased_dmd.reproduce.claim import Budget, Measure
from phased_dmd.reproduce.intervals import compare, shown
from phased_dmd.reproduce.study import Study, collect, planned
from phased_dmd.reproduce.workers import Run, Workers

LEVERS = "levers"
UNITS = ("calls", "cpu_seconds")
Curves = Mapping[str, Sequence[Mapping[str, Any]]]  # by side; each point is a budget


def cost(contests: Sequence[Contest], runs: Path, results: Path, jobs: int) -> dict[str, Any]:
    """What each contest shows; distils and evaluates what is missing in the folder `runs`, on `jobs` processes."""
    parts: list[tuple[Contest, str, str, Budget, dict[tuple[str, int], Run]]] = []
    for contest in contests:
        for side in contest.ladders:
            variants, budget = contest.variants(side), Budget(contest.seeds, contest.samples)
            parts.append((contest, side, side, budget, planned(contest.name(side), variants, budget, runs)))
        side, budget = contest.levers_of, Budget(LEVER_SEEDS, contest.samples)
        variants = contest.variants(side) | contest.lever_variants()
        wanted = {label: variants[label] for label in (contest.reference, *contest.levers)}
        parts.append((contest, LEVERS, side, budget, planned(contest.name(side), wanted, budget, runs)))
    with Workers(jobs, print) as workers:
        everything = [run for *_, planned_runs in parts for run in planned_runs.values()]
        workers.distil(everything)
        workers.evaluate(everything)
    found: dict[str, dict[str, Study]] = {}
    for contest, part, side, budget, planned_runs in parts:
        studied = collect(contest.name(side), planned_runs, budget, results / "cost")
        found.setdefault(contest.recipe, {})[part] = studied
    return {contest.recipe: weigh(contest, found[contest.recipe]) for contest in contests}


def weigh(contest: Contest, studies: Mapping[str, Study]) -> dict[str, Any]:
    """Curves of both sides, what reaching the target costs each, and the levers."""
    curves = {
        side: [point(contest, studies[side], label) for label in contest.variants(side)] for side in contest.ladders
    }
    seeds = range(contest.seeds)
    decided_by = [(contest.measures, seeds)]
    decided_by += [((measure,), seeds) for measure in contest.measures if len(contest.measures) > 1]
    decided_by += [(contest.measures, some) for some in (seeds[:LEVER_SEEDS], seeds[LEVER_SEEDS:]) if some]
    races = [race(curves, measures, some) | likely(curves, measures, some) for measures, some in decided_by]
    at = {side: first(curves[side], races[0]["reached"][side]["calls"]) for side in (PAPER, FAST)}
    return {
        "measures": [[m.table, m.name, m.direction] for m in contest.measures],
        "diversity": [[m.table, m.name, m.direction] for m in contest.diversity],
        "base": {
            key(m): next(iter(studies[PAPER].summary[m.table].values()))[m.name]["mean"]
            for m in (*contest.measures, *contest.diversity)
        },
        "tuned": contest.tuned, "curves": curves, "races": races,
        "compared": {side: point_at["label"] if point_at else None for side, point_at in at.items()},
        "comparisons": comparisons(contest, studies, at),
        "levers_of": contest.levers_of, "reference": contest.reference,
        "levers": [weighed(contest, studies[LEVERS], label) for label in studies[LEVERS].facts],
    }  # fmt: skip


def race(curves: Curves, measures: Sequence[Measure], seeds: Sequence[int]) -> dict[str, Any]:
    """What the target costs both sides by some measures and seeds: the paper's own best, of each measure."""

    def means(side: str, measure: Measure) -> list[float]:
        return [fmean(p["values"][key(measure)]["values"][seed] for seed in seeds) for p in curves[side]]

    targets = {key(m): smoothed(means(PAPER, m))[-1] for m in measures}
    reached = {
        side: {
            unit: most(reach([p[unit] for p in curves[side]], means(side, m), targets[key(m)]) for m in measures)
            for unit in UNITS
        }
        for side in (PAPER, FAST)
    }
    ratios = {unit: quotient(reached[PAPER][unit], reached[FAST][unit]) for unit in UNITS}
    return {"seeds": list(seeds), "targets": targets, "reached": reached, "ratios": ratios}


def likely(curves: Curves, measures: Sequence[Measure], seeds: Sequence[int], draws: int = 1000) -> dict[str, Any]:
    """Where the ratios of `race` lie, by unit: the middle 95 % over bootstrap draws of the seeds, and the share from 2.

    A draw in which `fast` does not keep the target within its budgets counts as a ratio of zero.
    """
    generator = random.Random(0)
    drawn = [race(curves, measures, generator.choices(seeds, k=len(seeds)))["ratios"] for _ in range(draws)]
    ratios = {unit: sorted(ratio[unit] or 0.0 for ratio in drawn) for unit in UNITS}
    tail = round(0.025 * draws)
    return {
        "middle": {unit: [found[tail], found[-1 - tail]] for unit, found in ratios.items()},
        "twice": {unit: fmean(ratio >= 2 for ratio in found) for unit, found in ratios.items()},
    }


def weighed(contest: Contest, study: Study, label: str) -> dict[str, Any]:
    """The point of a lever, and of each measure whether it is told from the reference, the same seeds."""
    shows = {}
    for m in (*contest.measures, *contest.diversity):
        rows = study.summary[m.table]
        shows[key(m)] = shown(compare(m, rows[label][m.name], rows[contest.reference][m.name]))
    return {**point(contest, study, label), "shows": shows}


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


def forwards(config: Config) -> float:
    """Network calls of a run a sample of the batch, in forwards of the network."""
    plan, guidance = config.phase_plan(), getattr(config.teacher, "guidance", (1.0,))
    guided, phases = guidance[0] != 1, range(1, plan.num_phases + 1)
    return sum(config.phase_iterations(k) * phase_work(config, plan, k, guided).forwards for k in phases)


def cpu_seconds(run: Path) -> float:
    """Of all iterations; previews, checkpoints and the encoding of prompts are not among them."""
    rows = map(json.loads, (run / "timing.jsonl").read_text().splitlines())
    return sum({(row["phase"], row["iteration"]): row["cpu_seconds"] for row in rows}.values())  # repeated after a kill


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
