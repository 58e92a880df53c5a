"""A recipe's variants over seeds: their runs, what they measure, and that as tables."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phased_dmd.checkpoint import write_atomically
from phased_dmd.config import Config
from phased_dmd.evaluate import HEADINGS, evaluate, tables
from phased_dmd.recipes import resolve
from phased_dmd.reproduce.claims import Budget, Variant
from phased_dmd.reproduce.intervals import interval
from phased_dmd.train import distill

Rows = Mapping[str, Mapping[str, dict[str, Any]]]  # of a table: row, measure, its `interval`


def study(
    recipe: str, variants: Mapping[str, Variant], budget: Budget, runs: Path, results: Path, command: str
) -> Path:
    """Writes results/RECIPE.md and .json: a recipe's variants side by side, without a verdict."""
    found = run_variants(recipe, variants, budget, runs, results / recipe)
    write_atomically(results / f"{recipe}.json", (json.dumps({"command": command, **found}, indent=1) + "\n").encode())
    path = results / f"{recipe}.md"
    lead = f"`{command}`: {sizes(found)}; mean ± half width of the 95 % interval over seeds."
    write_atomically(path, ("\n\n".join([f"# {recipe}", lead, *markdown(found)]) + "\n").encode())
    return path


def run_variants(
    recipe: str, variants: Mapping[str, Variant], budget: Budget, runs: Path, results: Path
) -> dict[str, Any]:
    """Distils and evaluates every variant with every seed: seeds, samples, updates, summary and the evaluations.

    Each evaluation is also a file in `results`, RECIPE-VARIANT-SEED.json. What such a file holds is not done again, nor
    what is distilled and evaluated in `runs`, whose folders all claims share: delete both to measure anew.
    """
    files: dict[Path, tuple[str, Config, Path]] = {}
    for label, variant in variants.items():
        for seed in range(budget.seeds):
            path = results / f"{recipe}-{re.sub(r'[^A-Za-z0-9.]+', '-', label)}-{seed}.json"
            files[path] = (label, *prepared(recipe, variant, seed, budget, runs))
    missing = {path: entry for path, entry in files.items() if not is_done(path, entry[1], budget.samples)}
    folders = [distill(config, folder) for _, config, folder in missing.values()]
    evaluations = evaluate(folders, budget.samples)
    for path, (label, config, folder) in missing.items():
        body = {"variant": label, "config": config.model_dump(mode="json"), **evaluations[str(folder)]}
        write_atomically(path, (json.dumps(body, indent=1) + "\n").encode())
    done = [json.loads(path.read_text()) for path in files]
    return {
        "seeds": list(range(budget.seeds)),
        "samples": budget.samples,
        "updates": budget.updates,
        "summary": summarise(done),
        "runs": done,
    }


def prepared(recipe: str, variant: Variant, seed: int, budget: Budget, runs: Path) -> tuple[Config, Path]:
    """A variant's config and its run folder, named by all that sets it apart."""
    config = resolve(recipe, {"seed": seed, **variant.overrides}, variant.method)
    tags = [f"{key}={value}" for key, value in variant.overrides.items()]
    if budget.updates < 1:
        config = config.model_copy(update={"iterations": max(1, round(config.iterations * budget.updates))})
        tags.append(f"iterations={config.iterations}")
    return config, runs / "-".join([recipe, config.method, *tags, str(seed)])


def is_done(path: Path, config: Config, samples: int) -> bool:
    """Whether the file holds the evaluation of this very run with as many samples."""
    if not path.exists():
        return False
    body = json.loads(path.read_text())
    return body["config"] == config.model_dump(mode="json") and body["samples"] == samples


def summarise(evaluations: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Intervals over seeds, {table: {row: {measure: interval}}}; a generator's row carries its variant's name."""
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    for evaluation in evaluations:
        for kind, rows in tables(evaluation).items():
            for row, values in rows.items():
                method, _, steps = row.rpartition(", ")
                title = row if method == "base" else f"{evaluation['variant']}, {steps}"
                if method == "base" and (kind, row) in cells:
                    continue  # the same samples as another run's
                for measure, value in values.items():
                    cells.setdefault((kind, title), {}).setdefault(measure, []).append(value)
    return {
        kind: {row: {m: interval(v) for m, v in values.items()} for (k, row), values in cells.items() if k == kind}
        for kind in dict.fromkeys(kind for kind, _ in cells)
    }


def sizes(found: Mapping[str, Any]) -> str:
    """How much was run, in words."""
    text = f"{len(found['seeds'])} seeds, {found['samples']} samples a cell"
    return text if found["updates"] == 1 else f"{text}, {found['updates']:g} of the recipe's generator updates"


def markdown(found: Mapping[str, Any]) -> list[str]:
    """A table a prompt set."""
    return [table(kind, rows) for kind, rows in found["summary"].items()]


def table(kind: str, rows: Rows) -> str:
    measures = list(next(iter(rows.values())))
    lines = [f"| {kind} | {' | '.join(HEADINGS[m][0] for m in measures)} |", "|" + "---|" * (len(measures) + 1)]
    for row, values in rows.items():
        shown = [f"{v['mean']:.3g}" + (f" ± {v['half_width']:.2g}" if v["half_width"] else "") for v in values.values()]
        lines.append(f"| {row} | {' | '.join(shown)} |")
    return "\n".join(lines)
