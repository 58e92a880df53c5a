"""What a quality costs: the paper's schedule and `fast`, each trained to its end at several budgets, and its levers."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from contests import FAST, LEVER_SEEDS, MARGINS, PAPER, Contest, key
from scipy.optimize import isotonic_regression

from phased_dmd.config import Config
from phased_dmd.lab.metrics.intervals import difference, ratio
from phased_dmd.lab.reproduce.claim import Budget, Criterion, Variant
from phased_dmd.lab.reproduce.results import read_rows, write_rows
from phased_dmd.lab.reproduce.study import Study, plan_runs, rows_of, study_of
from phased_dmd.lab.reproduce.verdict import compare, outcome
from phased_dmd.lab.reproduce.workers import Workers
from phased_dmd.plan.work import pool_forwards, trained_forwards

UNITS = ("calls", "cpu_seconds")
TWICE = 2  # times fewer calls, at which diversity is compared
Curves = Mapping[str, Sequence[Mapping[str, Any]]]  # by side; each point is a budget


def cost(contest: Contest, runs: Path, results: Path, jobs: int) -> dict[str, Any]:
    """Measures both sides: their curves, what reaching the target costs, and what `fast` loses with half the calls.

    Distils and evaluates what is missing in the folder `runs`, on `jobs` processes.
    """
    variants = {side: contest.variants(side) for side in contest.ladders}
    studies = studied(contest, variants, contest.seeds, runs, results, jobs)
    curves = {side: [point(contest, studies[side], label, runs) for label in variants[side]] for side in variants}
    decided_by = [contest.measures, *([measure] for measure in contest.measures if len(contest.measures) > 1)]
    which = range(len(contest.seeds))
    return {
        "recipe": contest.recipe, "seeds": list(contest.seeds), "tuned": contest.tuned,
        "base": base(contest, studies[PAPER]), "curves": curves,
        "races": [race(curves, measures, which) | likely(curves, measures, which) for measures in decided_by],
        "comparisons": comparisons(contest, studies, pairs(curves)),
    }  # fmt: skip


def levers(contest: Contest, runs: Path, results: Path, jobs: int) -> dict[str, Any]:
    """Measures what each lever alone does to one side, and whether the same seeds tell it from the reference."""
    side = contest.levers_of
    variants = contest.variants(side) | contest.lever_variants()
    wanted = {label: variants[label] for label in (contest.reference, *contest.levers)}
    study = studied(contest, {side: wanted}, LEVER_SEEDS, runs, results, jobs)[side]
    return {
        "recipe": contest.recipe, "seeds": list(LEVER_SEEDS), "levers_of": side, "reference": contest.reference,
        "base": base(contest, study),
        "levers": [weighed(contest, study, label, runs) for label in wanted],
    }  # fmt: skip


def studied(
    contest: Contest, variants: Mapping[str, Mapping[str, Variant]], seeds: range, runs: Path, results: Path, jobs: int
) -> dict[str, Study]:
    """Returns a study of each side's variants; the rows of their runs replace those of results/cost.jsonl.

    The rows of other contests and levers, which that file has too, stay.
    """
    budget = Budget(len(seeds), contest.samples, first=seeds.start)
    asked = {side: plan_runs(contest.name(side), wanted, budget, runs) for side, wanted in variants.items()}
    with Workers(jobs, print) as workers:
        everything = [run for runs_of_side in asked.values() for run in runs_of_side.values()]
        workers.distill(everything)
        workers.evaluate(everything)
    rows = {side: rows_of(contest.name(side), asked[side]) for side in asked}
    path = results / "cost.jsonl"
    by_name = {row["name"]: row for row in (*read_rows(path), *(row for side in rows for row in rows[side]))}
    write_rows(path, by_name.values())
    return {side: study_of(contest.name(side), budget, rows[side]) for side in rows}


def base(contest: Contest, study: Study) -> dict[str, float]:
    """Returns the measures of the teacher's samples."""
    return {
        key(m): next(iter(study.summary[m.table].values()))[m.name]["mean"]
        for m in (*contest.measures, *contest.diversity)
    }


def race(curves: Curves, measures: Sequence[Criterion], which: Sequence[int]) -> dict[str, Any]:
    """Returns what the target costs both sides: the best of the paper's side in each measure, in the mean over seeds.

    which: those seeds, by their places in the values of a point.
    """

    def means(side: str, measure: Criterion) -> list[float]:
        return [fmean(p["values"][key(measure)]["values"][i] for i in which) for p in curves[side]]

    targets = {key(m): smoothed(means(PAPER, m))[-1] for m in measures}
    reached = {
        side: {
            unit: most(reach([p[unit] for p in curves[side]], means(side, m), targets[key(m)]) for m in measures)
            for unit in UNITS
        }
        for side in (PAPER, FAST)
    }
    ratios = {unit: quotient(reached[PAPER][unit], reached[FAST][unit]) for unit in UNITS}
    return {"targets": targets, "reached": reached, "ratios": ratios}


def likely(curves: Curves, measures: Sequence[Criterion], which: Sequence[int], draws: int = 1000) -> dict[str, Any]:
    """Returns, over bootstrap draws of the seeds, the share of them in which `fast` reaches and keeps the target within
    its budgets, the middle 95 % of the ratios of those, and the share of all draws in which a ratio is 2 and more.
    """
    generator = random.Random(0)
    drawn = [race(curves, measures, generator.choices(which, k=len(which)))["ratios"] for _ in range(draws)]
    ratios = {unit: sorted(ratio[unit] for ratio in drawn if ratio[unit] is not None) for unit in UNITS}
    return {
        "reached_in": {unit: len(found) / draws for unit, found in ratios.items()},
        "middle": {unit: middle_of(found) for unit, found in ratios.items()},
        "twice": {unit: sum(ratio >= TWICE for ratio in found) / draws for unit, found in ratios.items()},
    }


def middle_of(ordered: Sequence[float]) -> list[float] | None:
    """Returns the range that 95 % of ordered values lie in, in the middle; None of none."""
    tail = round(0.025 * len(ordered))
    return [ordered[tail], ordered[-1 - tail]] if ordered else None


def pairs(curves: Curves) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Pairs each of the paper's budgets with the largest of `fast` that makes half its calls at most.

    All of a ladder are paired, since a single budget that is picked by what it reached is one where chance was kind.
    """
    found = []
    for paper in curves[PAPER]:
        affordable = [fast for fast in curves[FAST] if TWICE * fast["calls"] <= paper["calls"]]
        if affordable:
            found.append((affordable[-1], paper))
    return found


def comparisons(
    contest: Contest, studies: Mapping[str, Study], paired: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Compares `fast` with the paper's schedule by the same seeds, over all pairs together and in each.

    Above neutral `fast` is better. All pairs of a seed count as one: their geometric mean, or mean difference.
    """
    found = []
    for m in (*contest.measures, *contest.diversity):
        rows = {**studies[PAPER].summary[m.table], **studies[FAST].summary[m.table]}
        each = [compare(m, rows, fast["label"], paper["label"]) for fast, paper in paired]
        by_seed = list(zip(*(c["values"] for c in each), strict=True))
        if m.scale == "ratio":
            together = ratio([geometric_mean(values) for values in by_seed], [1.0] * len(by_seed))
        else:
            together = difference([fmean(values) for values in by_seed], [0.0] * len(by_seed))
        labels = [f"{fast['label']} against {paper['label']}" for fast, paper in paired]
        found.append({
            "measure": key(m), **together, "shows": outcome(together), "margin": MARGINS[m.name],
            "no_worse": no_worse(together, MARGINS[m.name]),
            "each": {label: {**c, "shows": outcome(c)} for label, c in zip(labels, each, strict=True)},
        })  # fmt: skip
    return found


def no_worse(comparison: Mapping[str, Any], margin: float) -> bool:
    """Says whether the whole interval is better than being worse by a margin, a factor or a difference."""
    low, least = comparison["low"], 1 / margin if comparison["scale"] == "ratio" else -margin
    return low is not None and low > least


def weighed(contest: Contest, study: Study, label: str, runs: Path) -> dict[str, Any]:
    """Returns the point of a lever, and for each measure whether the same seeds tell it from the reference."""
    shows = {}
    for m in (*contest.measures, *contest.diversity):
        rows = study.summary[m.table]
        shows[key(m)] = outcome(compare(m, rows, label, contest.reference))
    return {**point(contest, study, label, runs), "shows": shows}


def point(contest: Contest, study: Study, label: str, runs: Path) -> dict[str, Any]:
    """Returns a label's cost, means over seeds, and its measures by seed."""
    rows = [row for (other, _), row in study.evaluations.items() if other == label]
    return {
        "label": label, "updates": study.sizes[label]["updates"], "calls": forwards(Config(**rows[0]["config"])),
        "cpu_seconds": fmean(cpu_seconds(runs / row["subject"]) for row in rows),
        "values": {
            key(m): study.summary[m.table][label][m.name]
            for m in (*contest.measures, *contest.diversity)
        },
    }  # fmt: skip


def forwards(config: Config) -> float:
    """Returns the network calls of a run and its pool for one sample of the batch, in forwards of the network."""
    return trained_forwards(config) + pool_forwards(config)


def cpu_seconds(run: Path) -> float:
    """Returns the CPU seconds of the pool and all iterations, without previews, checkpoints and encoding of prompts."""
    rows = [json.loads(line) for line in (run / "timing.jsonl").read_text("utf-8").splitlines()]
    once = {(row["phase"], row["iteration"]): row["cpu_seconds"] for row in rows if "pool_calls" not in row}
    return sum(once.values()) + sum(row["cpu_seconds"] for row in rows if "pool_calls" in row)  # repeated after a kill


def smoothed(values: Sequence[float]) -> list[float]:
    """Returns the nearest sequence that never rises: neighbours that do are averaged."""
    return isotonic_regression(values, increasing=False).x.tolist()


def reach(costs: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """Returns the cost at which the smoothed values reach the target, which they then keep; None if they do not.

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
