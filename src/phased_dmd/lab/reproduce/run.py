"""Claims and studies by their names, at a budget: their runs, then their pages."""

import datetime
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from phased_dmd.errors import UserError
from phased_dmd.lab.reproduce.arms import BUDGETS
from phased_dmd.lab.reproduce.claim import FULL, QUICK, Budget, Claim, Variant
from phased_dmd.lab.reproduce.claim_page import claim_page, decisive
from phased_dmd.lab.reproduce.claims import ALONE, CLAIMS, NAMES, STUDIES, TABLES
from phased_dmd.lab.reproduce.fig2 import SEEDS, fig2
from phased_dmd.lab.reproduce.fig5 import changes
from phased_dmd.lab.reproduce.figure import draw_figure
from phased_dmd.lab.reproduce.known_rows import standing_rows, still_to_run
from phased_dmd.lab.reproduce.memory_study import memory
from phased_dmd.lab.reproduce.method_table import at_equal_cost, methods_page, row_verdicts
from phased_dmd.lab.reproduce.results import amounts, summary_table, write_index, write_page, write_rows
from phased_dmd.lab.reproduce.study import Study, plan_runs, rows_of, study_of
from phased_dmd.lab.reproduce.tdm_study import tdm_study
from phased_dmd.lab.reproduce.verdict import compare_pairs, in_a_line, judge_each
from phased_dmd.lab.reproduce.workers import Log, PlannedRun, Workers, default_jobs

NO_CLAIM = Claim("", "", "", {})


def reproduce(
    name: str, budget: Literal["quick", "full"], seeds: int | None, samples: int | None, updates: float | None,
    jobs: int | None, recipe: str | None, runs: Path, results: Path, log: Log,
) -> list[Path]:  # fmt: skip
    """Makes the runs that are missing, `jobs` at a time, and writes the results; returns the paths of the pages.

    A run is not missing where `results` has a row of it: a claim may be run on several days and machines, some seeds
    and recipes on each. name: one of NAMES, or all. seeds and samples replace the budget's; updates is a factor on its
    generator updates. recipe: the only one that is run; a claim's page keeps the others that have all their rows.
    Raises UserError where a folder holds another run, or a claim has no such recipe.
    """
    names = chosen(name, budget, recipe)
    budgets = {n: budgets_of(n, budget, seeds, samples, updates) for n in names}
    claims = {n: claim_of(n, budgets[n], recipe, runs, results) for n in names}
    asked = [
        run for n in names for run in still_to_run(runs_of(n, claims[n], budgets[n], runs), standing_rows(results, n))
    ]
    with Workers(jobs or default_jobs(), log) as workers:
        workers.distill(asked)
        workers.evaluate(asked)
    flags = {
        "--budget": budget if budget == "quick" else None, "--seeds": seeds, "--samples": samples, "--updates": updates,
    }  # fmt: skip
    options = "".join(f" {flag} {value}" for flag, value in flags.items() if value is not None)
    paths = []
    for n in names:
        command = "; ".join(f"phased-dmd reproduce {n}{options}{part}" for part in parts_of(n, claims[n]))
        about = {"command": command, "date": f"{datetime.date.today()}", "budget": budget}
        if n == "memory":
            paths.append(memory(results, about))
        elif n == "fig2":
            count = seeds or SEEDS[budget]
            paths.append(fig2(range(count), results, about, count == SEEDS["full"] and budget == "full"))
        elif n in STUDIES:
            paths.append(write_study(n, STUDIES[n], budgets[n][n], runs, results, about))
        elif n in TABLES:
            full = budgets[n] == budgets_of(n, "full") and claims[n].trials.keys() == TABLES[n].trials.keys()
            paths.append(weigh(n, claims[n], budgets[n], full, runs, results, about, tdm_study()))
        else:
            paths.append(decide(n, claims[n], budgets[n], full_recipes(budgets[n]), runs, results, about))
    write_index(results, (*ALONE, *CLAIMS, *TABLES), (*STUDIES,))
    return paths


def chosen(name: str, budget: Literal["quick", "full"], recipe: str | None = None) -> list[str]:
    """Returns what a name stands for: `all` for the claims on a recipe, if it is given, else for everything; quick, it
    leaves out the studies, whose runs are those of claims.
    """
    if name != "all":
        return [name]
    if recipe is not None:
        return [n for n, claim in {**CLAIMS, **TABLES}.items() if recipe in claim.trials]
    return [n for n in NAMES if budget == "full" or n not in STUDIES]


def budgets_of(
    name: str, budget: Literal["quick", "full"], seeds: int | None = None, samples: int | None = None,
    updates: float | None = None,
) -> dict[str, Budget]:  # fmt: skip
    """Returns the budget of each recipe for a claim or study, with other seeds, samples and a factor on the updates
    where they are given.

    A study's runs make all updates of its recipe, but at a quick budget.
    """
    found = QUICK if budget == "quick" else BUDGETS if name in TABLES else FULL
    if name in STUDIES and budget == "full":
        found = {recipe: replace(of_recipe, updates=1.0) for recipe, of_recipe in found.items()}
    return {
        recipe: replace(b, seeds=seeds or b.seeds, samples=samples or b.samples, updates=b.updates * (updates or 1.0))
        for recipe, b in found.items()
    }


def full_recipes(budgets: Mapping[str, Budget]) -> list[str]:
    """Returns the recipes whose budgets are as large as a verdict takes."""
    return [recipe for recipe, budget in budgets.items() if budget == FULL[recipe]]


def claim_of(name: str, budgets: Mapping[str, Budget], recipe: str | None, runs: Path, results: Path) -> Claim:
    """Returns the claim of a name, one without trials for all else.

    recipe: if given, only its trial and those of which `results` has all rows. Raises UserError where it has none.
    """
    claim = CLAIMS.get(name) or (at_equal_cost(TABLES[name], budgets) if name in TABLES else NO_CLAIM)
    if recipe is None:
        return claim
    if recipe not in claim.trials:
        raise UserError(f"--recipe: {name} is run on {', '.join(claim.trials) or 'nothing that can be left out'}")
    standing = standing_rows(results, name)
    planned = {r: list(plan_runs(r, t.variants, budgets[r], runs).values()) for r, t in claim.trials.items()}
    kept = {r: t for r, t in claim.trials.items() if r == recipe or not still_to_run(planned[r], standing)}
    return replace(claim, trials=kept)


def parts_of(name: str, claim: Claim) -> list[str]:
    """Returns what the command of a claim ends in: a recipe for each trial where there are not all, else nothing."""
    whole = {**CLAIMS, **TABLES}.get(name, NO_CLAIM).trials
    return [""] if claim.trials.keys() == whole.keys() else [f" --recipe {recipe}" for recipe in claim.trials]


def runs_of(name: str, claim: Claim, budgets: Mapping[str, Budget], runs: Path) -> list[PlannedRun]:
    """Returns all runs of a claim, or of the study of a name; what no distillation decides has none."""
    if name in STUDIES:
        return list(plan_runs(name, STUDIES[name], budgets[name], runs).values())
    planned = [plan_runs(recipe, trial.variants, budgets[recipe], runs) for recipe, trial in claim.trials.items()]
    return [run for of_recipe in planned for run in of_recipe.values()]


def decide(
    name: str, claim: Claim, budgets: Mapping[str, Budget], full: Collection[str], runs: Path, results: Path,
    about: Mapping[str, Any],
) -> Path:  # fmt: skip
    """Writes results/NAME.md, .json and .png, and the rows of its runs in NAME.jsonl, from runs that are finished.

    full: the recipes whose budgets suffice for a verdict. about: `command`, `date` and `budget`.
    """
    studies, comparisons = compared(name, claim, budgets, runs, results)
    verdicts = judge_each(comparisons, full)
    body = {
        "claim": name, "says": claim.says, "source": claim.source, **about, "verdict": in_a_line(verdicts),
        "verdicts": verdicts, "decides": decisive(comparisons), "comparisons": comparisons,
        "recipes": {recipe: study.as_json() for recipe, study in studies.items()},
    }  # fmt: skip
    return write_page(results, name, claim_page(name, claim, studies, comparisons, verdicts, about), body)


def weigh(
    name: str, table: Claim, budgets: Mapping[str, Budget], full: bool, runs: Path, results: Path,
    about: Mapping[str, Any], tdm: Mapping[str, Any],
) -> Path:  # fmt: skip
    """Writes the files of `decide` for a table of methods at equal cost, with a verdict for each of its rows.

    tdm: what `tdm_study` returns.
    """
    studies, comparisons = compared(name, table, budgets, runs, results)
    verdicts = row_verdicts(comparisons) if full else {}
    told = "; ".join(f"{row}: {verdict}" for row, verdict in verdicts.items() if verdict)
    body = {
        "claim": name, "says": table.says, "source": table.source, **about,
        "verdict": "a verdict a row" if full else None, "decides": told or "-",
        "verdicts": verdicts, "comparisons": comparisons, "tdm": tdm,
        "recipes": {recipe: study.as_json() for recipe, study in studies.items()},
    }  # fmt: skip
    return write_page(results, name, methods_page(studies, comparisons, verdicts, about, tdm), body)


def compared(
    name: str, claim: Claim, budgets: Mapping[str, Budget], runs: Path, results: Path
) -> tuple[dict[str, Study], list[dict[str, Any]]]:
    """Returns a claim's studies by recipe and their comparisons, from runs that are finished; draws its figure, and
    writes the rows of its runs.
    """
    planned = {recipe: plan_runs(recipe, t.variants, budgets[recipe], runs) for recipe, t in claim.trials.items()}
    standing = standing_rows(results, name)
    rows = [row for recipe in planned for row in rows_of(recipe, planned[recipe], standing)]
    if name == "fig5":
        rows += [row for recipe, of_recipe in planned.items() for row in changes(recipe, of_recipe)]
    write_rows(results / f"{name}.jsonl", rows)
    studies = {recipe: study_of(recipe, budgets[recipe], rows) for recipe in planned}
    draw_figure(results / f"{name}.png", claim, studies, planned)
    return studies, [
        comparison
        for recipe, trial in claim.trials.items()
        for comparison in compare_pairs(recipe, trial, studies[recipe].summary)
    ]


def write_study(
    recipe: str, variants: Mapping[str, Variant], budget: Budget, runs: Path, results: Path, about: Mapping[str, Any]
) -> Path:
    """Writes results/RECIPE.md, .json and .jsonl: a recipe's variants side by side, without a verdict."""
    rows = rows_of(recipe, plan_runs(recipe, variants, budget, runs), standing_rows(results, recipe))
    write_rows(results / f"{recipe}.jsonl", rows)
    study = study_of(recipe, budget, rows)
    return write_page(results, recipe, study_page(study, about), {**about, **study.as_json()})


def study_page(study: Study, about: Mapping[str, Any]) -> list[str]:
    """Returns the parts of results/RECIPE.md."""
    lead = f"`{about['command']}`, {about['date']}: {amounts(study)}; mean ± half width of the 95 % interval over "
    lead += "seeds."
    tables = [summary_table(kind, table, nets=study.nets) for kind, table in study.summary.items()]
    return [f"# {study.recipe}", lead, *tables]
