"""Does the verdict on a run's health name what it was spoilt with, and is it silent on good ones? A confusion table.

python benchmarks/health.py --seeds 200 201     # some half an hour on one core; writes docs/results/health.{jsonl,md}
"""

import argparse
import json
import multiprocessing
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from phased_dmd import health
from phased_dmd.checkpoint import RunFolder
from phased_dmd.config import Config
from phased_dmd.lab.reproduce.begin import begin_worker
from phased_dmd.lab.reproduce.results import read_rows, write_rows
from phased_dmd.networks.optim import NonFiniteError
from phased_dmd.recipes import resolve
from phased_dmd.train import distill

QUIET = {"sample_every": None, "checkpoint_every": 10**6, "checkpoint_minutes": None}
RECIPES: Mapping[str, Mapping[str, Any]] = {  # shortened, with a line every few of its iterations
    "nano-t2i-fast": {"iterations": 16, "log_every": 2},
    "nano-t2i": {"iterations": 10, "log_every": 1},
    "nano-moe": {"iterations": 16, "log_every": 2, "fake.updates": 2, "rollouts.reuse": True},
}
RATES = {"generator rate", "overflow"}  # the words of both ask for a lower generator.lr
# What is multiplied in the recipe, or set, and the causes any of which is right; none for a run that is good.
GOOD: Mapping[str, Mapping[str, float]] = {
    "as it is": {}, "generator.lr x 0.5": {"generator.lr": 0.5}, "generator.lr x 1.25": {"generator.lr": 1.25},
    "fake.lr x 0.5": {"fake.lr": 0.5}, "fake.lr x 1.25": {"fake.lr": 1.25},
}  # fmt: skip
SPOILT: Mapping[str, tuple[Mapping[str, float], set[str]]] = {
    "generator.lr x 10": ({"generator.lr": 10}, RATES), "generator.lr x 30": ({"generator.lr": 30}, RATES),
    "generator.lr x 10,000": ({"generator.lr": 1e4}, RATES),
    "fake.lr x 10": ({"fake.lr": 10}, {"fake rate"}), "fake.lr x 30": ({"fake.lr": 30}, {"fake rate"}),
    "both rates x 10": ({"generator.lr": 10, "fake.lr": 10}, RATES | {"fake rate"}),
    "fake frozen": ({"fake.lr": 1e-10}, {"still"}), "guidance x 3": ({"teacher.guidance": 3}, {"guidance"}),
    "shift x 0.2": ({"plan.shift": 0.2}, {"shift"}), "shift x 8": ({"plan.shift": 8}, {"shift"}),
}  # fmt: skip
BIASED = "biased target"
KINDS = (*GOOD, *SPOILT, BIASED)


def config_of(recipe: str, kind: str, seed: int) -> Config:
    """Returns the configuration of a run that is spoilt in that way, or good."""
    fields = resolve(recipe, RECIPES[recipe]).model_dump()
    changes: dict[str, Any] = {"ablation.target": "biased"} if kind == BIASED else {}
    for name, factor in (GOOD.get(kind) or SPOILT.get(kind, ({}, set()))[0]).items():
        section, field = name.split(".")
        old = fields[section][field]
        changes[name] = [each * factor for each in old] if isinstance(old, tuple | list) else old * factor
    return resolve(recipe, {**RECIPES[recipe], **QUIET, **changes, "seed": seed})


def judged(recipe: str, kind: str, seed: int, cache: Path) -> dict[str, Any]:
    """Trains a run and returns its verdict: each cause with the share of all updates after which it was named."""
    config = config_of(recipe, kind, seed)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            distill(config, Path(folder) / "run", quiet=True, cache=cache / recipe)
            ended = None
        except NonFiniteError as error:
            ended = str(error).partition(";")[0]
        rows = RunFolder(Path(folder) / "run").metrics()
    done = [0, *(config.phase_iterations(phase) for phase in range(1, config.plan.phases + 1))]
    named = {f.cause: (sum(done[: f.phase]) + f.iteration) / config.updates for f in health.verdict(rows, config)}
    return {"recipe": recipe, "kind": kind, "seed": seed, "named": named, "ended": ended}


def is_right(row: Mapping[str, Any]) -> bool:
    """Says whether a good run was left alone, or a right cause named first, before half of the updates."""
    wanted = {"target"} if row["kind"] == BIASED else SPOILT.get(row["kind"], ({}, set()))[1]
    if not wanted:
        return not row["named"]
    first = min(row["named"].items(), key=lambda item: item[1], default=(None, 1.0))
    return first[0] in wanted and first[1] < 0.5


def page(rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> str:
    """The table as Markdown: a line a kind, a column a cause, and how many runs were judged rightly."""
    causes = [rule.cause for rule in health.RULES]
    spoilt, good = ([row for row in rows if (row["kind"] in GOOD) == told] for told in (False, True))
    right = sum(map(is_right, spoilt)), sum(map(is_right, good))
    lines = [
        "# The verdict on a run's health, on runs that were spoilt on purpose", "",
        f"`python benchmarks/health.py --seeds {' '.join(map(str, seeds))}`: {len(rows)} runs of {', '.join(RECIPES)}, "
        "shortened. The rules and their thresholds were set on seeds 100, 101 and 200.", "",
        f"**Spoilt: {right[0]} of {len(spoilt)} named rightly before half of their updates. "
        f"Good: {right[1]} of {len(good)} left alone.**", "",
        "A number is how many runs were told that cause; in bold, where it is right.", "",
        "| run | runs | right | " + " | ".join(causes) + " |", "|---" * (3 + len(causes)) + "|",
    ]  # fmt: skip
    for kind in KINDS:
        of_kind = [row for row in rows if row["kind"] == kind]
        wanted = {"target"} if kind == BIASED else SPOILT.get(kind, ({}, set()))[1]
        counts = [sum(cause in row["named"] for row in of_kind) for cause in causes]
        cells = [f"**{n}**" if n and c in wanted else f"{n or ''}" for n, c in zip(counts, causes, strict=True)]
        lines.append(f"| {kind} | {len(of_kind)} | {sum(map(is_right, of_kind))} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("docs/results/health"), help="what was judged there stays")
    arguments = parser.parse_args()
    path = arguments.output.with_suffix(".jsonl")
    rows = read_rows(path)
    done = {(row["recipe"], row["kind"], row["seed"]) for row in rows}
    asked = [
        (recipe, kind, seed) for seed in arguments.seeds for recipe in arguments.recipes for kind in KINDS
        if (recipe, kind, seed) not in done
    ]  # fmt: skip
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as cache, ProcessPoolExecutor(arguments.jobs, context, begin_worker) as pool:
        for future in [pool.submit(judged, *each, Path(cache)) for each in asked]:
            rows.append(future.result())
            print(json.dumps(rows[-1]), flush=True)
            write_rows(path, rows)
    arguments.output.with_suffix(".md").write_text(page(rows, arguments.seeds), encoding="utf-8")


if __name__ == "__main__":
    main()
