"""A recipe's variants over seeds: the runs to be made, a row for each of what it measures, and means over seeds."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from phased_dmd.checkpoint import RunFolder
from phased_dmd.config import Config
from phased_dmd.lab.evaluate import evaluate
from phased_dmd.lab.metrics.intervals import interval
from phased_dmd.lab.reproduce.claim import Budget, Variant
from phased_dmd.lab.reproduce.known_rows import Standing, row_that_stands
from phased_dmd.lab.reproduce.workers import PlannedRun
from phased_dmd.recipes import resolve

Cell = dict[str, Any]  # an `interval` over seeds, and the signed `gaps` to the base by seed
Table = dict[str, dict[str, Cell]]  # by row and measure
SIZES = ("phases", "updates", "trainable_parameters")


@dataclass(frozen=True)
class Study:
    """What the runs of a recipe's variants measure, as a page shows it.

    evaluations: by label and seed. sizes: of the runs of each label, see SIZES. summary: a table for each prompt set,
    the base's rows first, then a row a label.
    """

    recipe: str
    budget: Budget
    evaluations: Mapping[tuple[str, int], Mapping[str, Any]]
    sizes: Mapping[str, dict[str, int]]
    summary: dict[str, Table]

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for _, seed in self.evaluations})

    @property
    def nets(self) -> dict[str, str]:
        """Returns the names of the networks that measured."""
        return next(iter(self.evaluations.values()))["nets"]

    def as_json(self) -> dict[str, Any]:
        """Returns the study as it stands in the JSON beside its page."""
        return {
            "seeds": self.seeds, "samples": self.budget.samples, "updates": self.budget.updates, "nets": self.nets,
            "variants": self.sizes, "summary": self.summary,
        }  # fmt: skip


def plan_runs(
    recipe: str, variants: Mapping[str, Variant], budget: Budget, runs: Path
) -> dict[tuple[str, int], PlannedRun]:
    """Returns the runs that a budget asks for, by label and seed; their folders lie in the folder `runs`."""
    planned = {}
    for label, variant in variants.items():
        for seed in range(budget.first, budget.first + budget.seeds):
            config, folder = plan_run(recipe, variant, seed, budget, runs)
            parent = plan_run(recipe, replace(variant, last=1.0), seed, budget, runs)[1] if variant.last < 1 else None
            planned[label, seed] = PlannedRun(config, folder, budget.samples, parent)
    return planned


def plan_run(recipe: str, variant: Variant, seed: int, budget: Budget, runs: Path) -> tuple[Config, Path]:
    """Returns a variant's config and its run folder, whose name tells all that sets it apart."""
    config = resolve(recipe, {"seed": seed, **variant.overrides}, variant.method)
    tags = [f"{key}={value}" for key, value in variant.overrides.items()]
    for tag, share in (("iterations", budget.updates * variant.updates), ("last", variant.last)):
        if share != 1:
            config = config.model_copy(update={"iterations": max(1, round(config.iterations * share))})
            tags.append(f"{tag}={config.iterations}")
    return config, runs / "-".join([recipe, config.method, *tags, str(seed)])


def rows_of(
    recipe: str, runs: Mapping[tuple[str, int], PlannedRun], standing: Standing | None = None
) -> list[dict[str, Any]]:
    """Returns a row for each run: its name, its config and what it measures; evaluates the runs that are not yet.

    standing: rows of runs that were made before, which are taken as they are.
    """
    rows = []
    for (label, seed), run in runs.items():
        name = f"{recipe}-{re.sub(r'[^A-Za-z0-9.]+', '-', label)}-{seed}"
        row = row_that_stands(run, standing or {}) or _measured(run)
        rows.append({"name": name, "variant": label} | {k: row[k] for k in row if k not in ("name", "variant")})
    return rows


def _measured(run: PlannedRun) -> dict[str, Any]:
    """Returns what a row says of a run, by its folder, whatever it is called."""
    (evaluation,) = evaluate([run.folder], run.protocol).values()
    return {
        "config": run.config.model_dump(mode="json"), **_sizes(run), **evaluation,
        "subject": run.folder.name,  # a result names no path of the machine that made it
    }  # fmt: skip


def _sizes(run: PlannedRun) -> dict[str, int]:
    """Returns a run's phases, generator updates in all, and trainable parameters of all experts together."""
    phases = run.config.plan.phases
    before = RunFolder(run.experts_from).config() if run.experts_from else run.config
    updates = sum(map(before.phase_iterations, range(1, phases))) + run.config.phase_iterations(phases)
    parameters = 0
    for phase in range(1, phases + 1):
        with safe_open(RunFolder(run.folder).expert_path(phase), "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 it is no mapping
        parameters += sum(math.prod(shape) for shape in shapes)
    return dict(zip(SIZES, (phases, updates, parameters), strict=True))


def study_of(recipe: str, budget: Budget, rows: Sequence[Mapping[str, Any]]) -> Study:
    """Returns the study of a recipe from the rows of a result file, which may hold rows of other recipes too."""
    rows = [row for row in rows if row.get("recipe") == recipe]
    evaluations = {(row["variant"], row["seed"]): row for row in rows if "sets" in row}
    sizes = {label: {name: row[name] for name in SIZES} for (label, _), row in evaluations.items()}
    summary = summarise(evaluations)
    changes = [row for row in rows if "structure" in row]  # of fig5, which no evaluation measures
    if changes:
        summary["change"] = {
            label: {
                name: interval([row[name] for row in changes if row["variant"] == label])
                for name in ("structure", "detail", "detail_over_structure", "agreement")
            }
            for label in dict.fromkeys(row["variant"] for row in changes)
        }
    return Study(recipe, budget, evaluations, sizes, summary)


def summarise(evaluations: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, Table]:
    """Returns a table of means over seeds for each prompt set: the bases' rows first, then a row a label.

    All labels of a seed share its base, since they share the noise that they are evaluated with.
    """
    found: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}  # by set, row and seed
    for (label, seed), evaluation in evaluations.items():
        for kind, of_set in evaluation["sets"].items():
            for row, measurements in of_set["rows"].items():
                name = row if row.startswith("base, ") else label
                found.setdefault(kind, {}).setdefault(name, {})[seed] = measurements
    return {
        kind: {row: _cells(list(rows[row].values())) for row in sorted(rows, key=_base_first)}
        for kind, rows in found.items()
    }


def _base_first(row: str) -> int:
    """Returns what sorts the base before all labels, at the most steps, at which gaps are 0, before all others."""
    return -int(row.split()[1]) if row.startswith("base, ") else 0


def _cells(of_seeds: Sequence[Mapping[str, Any]]) -> dict[str, Cell]:
    """Returns the cells of a row by measure, from its measurements by seed."""
    cells = {}
    for name in of_seeds[0]:
        values, gaps = ([measurements[name][key] for measurements in of_seeds] for key in ("value", "gap"))
        cells[name] = interval(values) | {"gaps": gaps}
    return cells
