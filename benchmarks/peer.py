"""A peer beside ours: DMD2 of NVIDIA's Model Optimizer (`modelopt_dmd2`) and `fast`, in turn, on the same teachers."""

import itertools
import math
import multiprocessing
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from contests import FAST, NANO, TOY, Contest, key
from cost import UNITS, Curves, base, most, point, quotient, reach, smoothed
from peak import peak

from phased_dmd.checkpoint import RunFolder
from phased_dmd.config import Config, phase_plan
from phased_dmd.lab.reproduce.begin import begin_worker
from phased_dmd.lab.reproduce.claim import Budget, Criterion, Variant
from phased_dmd.lab.reproduce.results import read_rows, write_rows
from phased_dmd.lab.reproduce.study import Study, plan_runs, rows_of, study_of
from phased_dmd.lab.reproduce.workers import PlannedRun, Workers
from phased_dmd.recipes import resolve
from phased_dmd.train import distill

PEER = "peer"


@dataclass(frozen=True)
class Options:
    """What the peer's users choose beside the student's updates.

    lr, fake_lr, beta1: of AdamW. frequency: steps to an update of the student, the others are the fake's. ema: the
    decay of the student's average. sample_type: whether a step goes along the predicted noise or adds new noise, when
    training and sampling. times: the distribution of the re-noise times. fake_loss: the space of the fake's error.
    decay: the course of both rates. clip: of a gradient's norm. lora: the rank of a student that is an adapter, 0 for
    one that is trained in full.
    """

    lr: float
    fake_lr: float
    frequency: int = 5
    ema: float | None = 0.97
    sample_type: Literal["ode", "sde"] = "ode"
    times: Literal["shifted", "uniform", "logitnormal"] = "shifted"
    fake_loss: Literal["x0", "flow"] = "x0"
    decay: Literal["linear", "constant"] = "linear"
    clip: float = 1.0
    beta1: float = 0.0
    lora: int = 0

    def grid(self, config: Config) -> tuple[float, ...]:
        """Returns the times of the student's steps, down to 0: ours."""
        return phase_plan(config).times

    def config(self, recipe: str, updates: int, seed: int) -> Config:
        """Returns what describes the student as a run: the recipe's teacher, prompts and batch."""
        return resolve(recipe, {
            "recipe": f"{recipe}-peer", "plan.phases": 1, "plan.gradient": "all", "iterations": updates, "seed": seed,
            "generator.weights": "full", "generator.lr": self.lr, "generator.ema": self.ema, "fake.lr": self.fake_lr,
            "fake.updates": self.frequency - 1, "optimiser.decay": self.decay, "optimiser.clip": self.clip,
            "ablation.solver": "ddim" if self.sample_type == "ode" else "renoise",
        })  # fmt: skip

    def forwards(self, config: Config) -> float:
        """Returns the network calls of a run for one sample of the batch, in forwards of the network.

        A backward counts two, and one where only an adapter is trained. Of the steps before a student's input, drawn
        evenly, half are made in the mean.
        """
        guided = getattr(config.teacher, "guidance", (1.0,))[0] != 1
        unrolled = (config.plan.steps - 1) / 2
        student = unrolled + (2 if self.lora else 3) + 1 + (2 if guided else 1)
        return config.iterations * (student + (self.frequency - 1) * (unrolled + 1 + 3))

    def tag(self) -> str:
        """Returns what sets these options apart from the defaults, for a folder's name."""
        stated = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return "-".join(f"{f.name}={getattr(self, f.name)}" for f in stated)


@dataclass(frozen=True)
class Match:
    """A recipe's teacher, on which the peer and `fast` meet.

    contest: of the recipe, whose samples and measures are taken. measures: of quality here. seeds: those that decide.
    ladder: the peer's budgets, in updates of the student, each with the options that its tuning found best. shares:
    ours, see `Contest`.
    """

    contest: Contest
    measures: tuple[Criterion, ...]
    seeds: range
    ladder: Mapping[int, Options]
    shares: Sequence[float]

    def planned(self, runs: Path) -> dict[str, dict[tuple[str, int], PlannedRun]]:
        """Returns the runs of both sides, by label and seed."""
        recipe, samples = self.contest.recipe, self.contest.samples
        ours = {f"{FAST}, x {share:g}": Variant(None, {}, share) for share in self.shares}
        peers = {}
        for (updates, options), seed in itertools.product(self.ladder.items(), self.seeds):
            config = options.config(recipe, updates, seed)
            folder = runs / "-".join([config.recipe, options.tag(), f"{updates}", f"{seed}"])
            peers[f"{PEER}, {updates} updates", seed] = PlannedRun(config, folder, samples)
        budget = Budget(len(self.seeds), samples, first=self.seeds.start)
        return {PEER: peers, FAST: plan_runs(self.contest.name(FAST), ours, budget, runs)}


def peer(match: Match, runs: Path, results: Path, jobs: int) -> dict[str, Any]:
    """Measures both sides: their curves, what the peer's best costs each, distances at equal CPU seconds, and memory.

    Trains and evaluates what is missing in the folder `runs`, on `jobs` processes.
    """
    contest, planned = match.contest, match.planned(runs)
    train_in_turn(match.ladder, planned, jobs)
    with Workers(jobs, print) as workers:
        workers.evaluate([run for side in planned.values() for run in side.values()])
    studies = studied(match, planned, results)
    curves = {side: [point(contest, study, label, runs) for label in study.sizes] for side, study in studies.items()}
    # Its updates are no phase's of ours, so its calls are counted otherwise.
    for each, (updates, options) in zip(curves[PEER], match.ladder.items(), strict=True):
        each["calls"] = options.forwards(options.config(contest.recipe, updates, 0))
    return {
        "recipe": contest.recipe, "seeds": list(match.seeds),
        "ladder": {f"{updates}": asdict(options) for updates, options in match.ladder.items()},
        "base": base(contest, studies[PEER]), "curves": curves,
        "races": [likely(curves, match.measures, len(match.seeds))], **memory(match),
    }  # fmt: skip


def studied(
    match: Match, planned: Mapping[str, Mapping[tuple[str, int], PlannedRun]], results: Path
) -> dict[str, Study]:
    """Returns a study of each side; the rows of its runs replace those of results/peer.jsonl."""
    names = {PEER: f"{match.contest.recipe}-peer", FAST: match.contest.name(FAST)}
    rows = {side: rows_of(names[side], planned[side]) for side in planned}
    path = results / "peer.jsonl"
    kept = {row["name"]: row for row in (*read_rows(path), *(row for of_side in rows.values() for row in of_side))}
    write_rows(path, kept.values())
    budget = Budget(len(match.seeds), match.contest.samples, first=match.seeds.start)
    return {side: study_of(names[side], budget, rows[side]) for side in rows}


def memory(match: Match) -> dict[str, Any]:
    """Returns what an update of each side holds at its most, in bytes, and ours over the peer's."""
    from modelopt_dmd2 import peak as peers_peak

    recipe = match.contest.recipe
    peers = [peers_peak(options.config(recipe, 1, 0), options) for options in set(match.ladder.values())]
    peaks = {PEER: min(peers, key=lambda peak: peak.in_all), FAST: peak(resolve(match.contest.name(FAST)))}
    sizes = {side: of_side._asdict() | {"in_all": of_side.in_all} for side, of_side in peaks.items()}
    return {"memory": sizes, "memory_ratio": peaks[FAST].in_all / peaks[PEER].in_all}


def train_in_turn(
    ladder: Mapping[int, Options], planned: Mapping[str, Mapping[tuple[str, int], PlannedRun]], jobs: int
) -> None:
    """Trains what is missing, in turn a run of the peer's and one of ours of the same seed."""
    by_seed = {side: sorted(runs.items(), key=lambda run: run[0][1]) for side, runs in planned.items()}
    tasks = [
        (side, run)
        for pair in itertools.zip_longest(*([(side, run) for _, run in by_seed[side]] for side in (PEER, FAST)))
        for side, run in filter(None, pair)
        if not RunFolder(run.folder).finished(run.config)
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, begin_worker) as pool:
        waiting = [
            pool.submit(train, run, ladder[run.config.iterations] if side == PEER else None) for side, run in tasks
        ]
        for count, (future, (_, run)) in enumerate(zip(waiting, tasks, strict=True), 1):
            future.result()
            print(f"trained, {count} of {len(tasks)}: {run.folder.name}", flush=True)


def train(run: PlannedRun, options: Options | None) -> None:
    """Trains one run, in a worker; without the peer's options it is one of ours."""
    if options is None:
        distill(run.config, run.folder, quiet=True)
    else:
        from modelopt_dmd2 import train as train_peer  # its package is no dependency of ours

        train_peer(run.config, options, run.folder)


def meet(curves: Curves, measures: Sequence[Criterion], which: Sequence[int]) -> dict[str, Any]:
    """Returns what the peer's best quality costs each side, and how far ours is ahead at as many CPU seconds.

    The peer's best is the least of its budgets' means over the seeds `which`, in each measure, at that budget's cost.
    ratios: the peer's cost over ours, None where ours does not get there. distances: at the CPU seconds of the peer's
    best, its mean over ours, which is read off our curve, and where that has ended, off its end.
    """
    reached: dict[str, dict[str, list[float | None]]] = {side: {unit: [] for unit in UNITS} for side in (PEER, FAST)}
    targets, distances = {}, {}
    for measure in measures:
        means = {
            side: [fmean(p["values"][key(measure)]["values"][i] for i in which) for p in curves[side]]
            for side in (PEER, FAST)
        }
        target = targets[key(measure)] = min(means[PEER])
        best = curves[PEER][means[PEER].index(target)]
        for unit in UNITS:
            reached[PEER][unit].append(best[unit])
            reached[FAST][unit].append(reach([p[unit] for p in curves[FAST]], means[FAST], target))
        ours = value_at([p["cpu_seconds"] for p in curves[FAST]], means[FAST], best["cpu_seconds"])
        distances[key(measure)] = None if ours is None else target / ours
    costs = {side: {unit: most(found) for unit, found in units.items()} for side, units in reached.items()}
    ratios = {unit: quotient(costs[PEER][unit], costs[FAST][unit]) for unit in UNITS}
    return {"targets": targets, "reached": costs, "ratios": ratios, "distances": distances}


def value_at(costs: Sequence[float], values: Sequence[float], cost: float) -> float | None:
    """Returns a smoothed curve's value at a cost, by lines over its logarithm; None before the curve begins."""
    curve = smoothed(values)
    if cost < costs[0]:
        return None
    for (a, left), (b, right) in itertools.pairwise(zip(costs, curve, strict=True)):
        if cost <= b:
            share = math.log(cost / a) / math.log(b / a)
            return (1 - share) * left + share * right
    return curve[-1]


def likely(curves: Curves, measures: Sequence[Criterion], seeds: int, draws: int = 1000) -> dict[str, Any]:
    """Returns `meet` of all seeds, with the middle 95 % of each of its figures over bootstrap draws of the seeds.

    A draw in which ours does not reach the peer's best, or begins at more CPU seconds, counts as 0.
    """
    generator, which = random.Random(0), range(seeds)
    found = meet(curves, measures, which)
    drawn = [meet(curves, measures, generator.choices(which, k=seeds)) for _ in range(draws)]
    return found | {"middle": {name: middle(drawn, lambda d, n=name: d[n]) for name in ("ratios", "distances")}}


def middle(drawn: Sequence[Any], figures: Callable[[Any], Mapping[str, float | None]]) -> dict[str, list[float]]:
    """Returns for each figure the range that 95 % of the draws lie in, in the middle."""
    tail, ranges = round(0.025 * len(drawn)), {}
    for name in figures(drawn[0]):
        ordered = sorted(figures(each)[name] or 0.0 for each in drawn)
        ranges[name] = [ordered[tail], ordered[-1 - tail]]
    return ranges


MATCHES = {
    "toy-2d": Match(
        TOY, (*TOY.measures, *TOY.diversity), seeds=range(30, 36),
        ladder=dict.fromkeys((500, 1000, 2000, 4000), Options(lr=5e-4, fake_lr=1e-3, sample_type="sde")),
        shares=(0.25, 0.5, 1.0, 2.0),
    ),
    "nano-t2i": Match(
        NANO, NANO.measures, seeds=range(20, 25),
        ladder=dict.fromkeys((30, 60, 120), Options(lr=1e-3, fake_lr=4e-4, sample_type="sde", lora=32)),
        shares=(0.25, 0.5, 1.0),
    ),
}  # fmt: skip
