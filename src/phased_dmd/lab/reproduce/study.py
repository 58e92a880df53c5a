"""A recipe's variants over seeds: their runs, what they measure, and that as tables."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from phased_dmd.checkpoint import RunFolder, write_atomically
from phased_dmd.config import Config
from phased_dmd.lab.evaluate import Protocol, evaluate, tables
from phased_dmd.lab.evaluate import title as evaluated_title
from phased_dmd.lab.metrics.formats import number
from phased_dmd.lab.metrics.intervals import interval
from phased_dmd.lab.reproduce.claim import Budget, Variant
from phased_dmd.lab.reproduce.workers import Run
from phased_dmd.recipes import resolve

Rows = Mapping[str, Mapping[str, dict[str, Any]]]  # of a table: row, measure, its cell
Summary = dict[str, dict[str, dict[str, dict[str, Any]]]]  # table, row, measure, its cell


@dataclass(frozen=True)
class Study:
    """What the variants of a recipe measure: runs and evaluations by (label, seed).

    summary: {table: {row: {measure: cell}}}, a cell being an `interval` over seeds with the signed `gaps` to the base;
    a base's row has the interval of its samples. facts: {label: what sets its runs apart in size}.
    """

    recipe: str
    budget: Budget
    runs: Mapping[tuple[str, int], Run]
    evaluations: Mapping[tuple[str, int], dict[str, Any]]
    summary: Summary
    facts: Mapping[str, dict[str, int]]

    @property
    def nets(self) -> dict[str, str]:
        """The networks that measured, by name."""
        return next(iter(self.evaluations.values()))["nets"]

    def body(self) -> dict[str, Any]:
        """As it stands in a claim's JSON."""
        seeds = sorted({seed for _, seed in self.runs})
        return {
            "seeds": seeds, "samples": self.budget.samples, "updates": self.budget.updates, "nets": self.nets,
            "variants": self.facts, "summary": self.summary,
        }  # fmt: skip


def study(
    recipe: str, variants: Mapping[str, Variant], budget: Budget, runs: Path, results: Path, about: Mapping[str, Any]
) -> Path:
    """Writes results/RECIPE.md and .json: a recipe's variants side by side, without a verdict."""
    found = collect(recipe, planned(recipe, variants, budget, runs), budget, results / recipe)
    body = {**about, **found.body()}
    write_atomically(results / f"{recipe}.json", (json.dumps(body, indent=1) + "\n").encode())
    path = results / f"{recipe}.md"
    lead = f"`{about['command']}`, {about['date']}: {sizes(found)}; mean ± half width of the 95 % interval over seeds, "
    lead += "in the base's rows over samples."
    shown = [table(kind, rows, nets=found.nets) for kind, rows in found.summary.items()]
    write_atomically(path, ("\n\n".join([f"# {recipe}", lead, *shown]) + "\n").encode())
    return path


def planned(recipe: str, variants: Mapping[str, Variant], budget: Budget, runs: Path) -> dict[tuple[str, int], Run]:
    """The runs that a budget asks for, by (label, seed)."""
    found = {}
    for label, variant in variants.items():
        for seed in range(budget.first, budget.first + budget.seeds):
            config, folder = prepared(recipe, variant, seed, budget, runs)
            heir_of = prepared(recipe, replace(variant, last=1.0), seed, budget, runs)[1] if variant.last < 1 else None
            found[label, seed] = Run(config, folder, budget.samples, heir_of)
    return found


def prepared(recipe: str, variant: Variant, seed: int, budget: Budget, runs: Path) -> tuple[Config, Path]:
    """A variant's config and its run folder, named by all that sets it apart."""
    config = resolve(recipe, {"seed": seed, **variant.overrides}, variant.method)
    tags = [f"{key}={value}" for key, value in variant.overrides.items()]
    if (share := budget.updates * variant.updates) != 1:
        config = config.model_copy(update={"iterations": max(1, round(config.iterations * share))})
        tags.append(f"iterations={config.iterations}")
    if variant.last < 1:
        config = config.model_copy(update={"iterations": max(1, round(config.iterations * variant.last))})
        tags.append(f"last={config.iterations}")
    return config, runs / "-".join([recipe, config.method, *tags, str(seed)])


def collect(recipe: str, runs: Mapping[tuple[str, int], Run], budget: Budget, results: Path) -> Study:
    """What finished runs measure; writes results/RECIPE-VARIANT-SEED.json of each."""
    evaluations, facts = {}, {}
    for (label, seed), run in runs.items():
        (found,) = evaluate([run.folder], Protocol(samples=run.samples)).values()
        facts[label] = facts_of(run)
        body = {"variant": label, "config": run.config.model_dump(mode="json"), **facts[label], **found}
        body["subject"] = run.folder.name  # a result names no path of the machine that made it
        path = results / f"{recipe}-{re.sub(r'[^A-Za-z0-9.]+', '-', label)}-{seed}.json"
        write_atomically(path, (json.dumps(body) + "\n").encode())
        evaluations[label, seed] = found
    return Study(recipe, budget, runs, evaluations, summarise(evaluations), facts)


def facts_of(run: Run) -> dict[str, int]:
    """A run's phases, generator updates in all, and trainable parameters of all experts together."""
    plan = run.config.plan
    before = RunFolder(run.heir_of).config() if run.heir_of else run.config
    updates = sum(map(before.phase_iterations, range(1, plan.phases))) + run.config.phase_iterations(plan.phases)
    parameters = 0
    for phase in range(1, plan.phases + 1):
        with safe_open(RunFolder(run.folder).expert_path(phase), "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 it is no mapping
        parameters += sum(math.prod(shape) for shape in shapes)
    return {"phases": plan.phases, "updates": updates, "trainable_parameters": parameters}


def summarise(evaluations: Mapping[tuple[str, int], dict[str, Any]]) -> Summary:
    """Cells over seeds, {table: {row: {measure: cell}}}; the bases' rows first, then a row a label."""
    bases: dict[str, dict[str, dict[str, Any]]] = {}
    values: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {}
    for (label, _), evaluation in evaluations.items():
        for kind, rows in tables(evaluation).items():
            for row, figures in rows.items():
                if row.startswith("base, "):
                    bases.setdefault(kind, {}).setdefault(row, {m: base_cell(f) for m, f in figures.items()})
                    continue
                for measure, figure in figures.items():
                    values.setdefault(kind, {}).setdefault(label, {}).setdefault(measure, []).append(figure)
    return {  # the base at the most steps, at which gaps are 0, comes first
        kind: dict(sorted(bases[kind].items(), key=lambda base: -int(base[0].split()[1])))
        | {label: {m: cell(found) for m, found in measures.items()} for label, measures in labels.items()}
        for kind, labels in values.items()
    }


def cell(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of several seeds: their `interval`, and the gaps to the base."""
    return interval([figure["value"] for figure in figures]) | {"gaps": [figure["gap"] for figure in figures]}


def base_cell(figure: Mapping[str, Any]) -> dict[str, Any]:
    """A base's figure, which all seeds share, with the interval of its samples."""
    return {
        "mean": figure["value"], "half_width": figure["half_width"], "values": [figure["value"]],
        "gaps": [figure["gap"]],
    }  # fmt: skip


def sizes(found: Study) -> str:
    """How much was run, in words."""
    count, budget = len({seed for _, seed in found.runs}), found.budget
    updates = sorted({facts["updates"] for facts in found.facts.values()})
    text = f"{count} {'seed' if count == 1 else 'seeds'}, {budget.samples} samples a cell, "
    text += f"{', '.join(map(str, updates))} generator updates in all"
    return text if budget.updates == 1 else f"{text} ({budget.updates:g} of the recipe's)"


def table(
    kind: str,
    rows: Rows,
    measures: Sequence[str] | None = None,
    facts: Mapping[str, Mapping[str, int]] | None = None,
    nets: Mapping[str, str] | None = None,
) -> str:
    """Rows by measures, all of the first row's if not told, in Markdown. facts: columns of the rows that have any."""
    measures = list(next(iter(rows.values()))) if measures is None else measures
    columns = list(next(iter(facts.values()))) if facts else []
    heads = [*(name.replace("_", " ") for name in columns), *(title(m, nets) for m in measures)]
    lines = [f"| {kind} | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1)]
    for row, cells in rows.items():
        mine = (facts or {}).get(row, {})
        shown = [*(f"{mine[c]:,}" if c in mine else "" for c in columns), *(plus_minus(cells.get(m)) for m in measures)]
        lines.append(f"| {row} | {' | '.join(shown)} |")
    return "\n".join(lines)


def plus_minus(found: Mapping[str, Any] | None) -> str:
    """A cell in Markdown: the mean and its half width to the latter's second digit, with equal decimals."""
    if found is None:
        return "-"
    mean, half = found["mean"], found["half_width"]
    if not half:
        return number(mean)
    decimals = max(0, 1 - math.floor(math.log10(half)))
    if decimals > 7:
        return f"{number(mean, scale=half)} ± {number(half, digits=2)}"
    return f"{mean:,.{decimals}f} ± {half:,.{decimals}f}".replace("-", "−")


OWN_TITLES = {
    "structure": "change of structure", "detail": "change of detail", "agreement": "digits read alike",
    "detail_over_structure": "change of detail over that of structure", "deviation": "deviation from the exact flow",
}  # fmt: skip


def title(measure: str, nets: Mapping[str, str] | None = None) -> str:
    """A measure's title, with the name of the net that made it if nets are told."""
    return OWN_TITLES[measure] if measure in OWN_TITLES else evaluated_title(measure, dict(nets or {}))
