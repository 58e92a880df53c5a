"""Claims and studies by their names, at a budget."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from phased_dmd.lab.reproduce.claim import FULL, QUICK, Budget
from phased_dmd.lab.reproduce.claim_page import write_index
from phased_dmd.lab.reproduce.claims import ALONE, CLAIMS, NAMES, STUDIES
from phased_dmd.lab.reproduce.decide import decide
from phased_dmd.lab.reproduce.fig2 import SEEDS, fig2
from phased_dmd.lab.reproduce.memory_study import memory
from phased_dmd.lab.reproduce.study import planned, study
from phased_dmd.lab.reproduce.workers import Run, Tell, Workers, default_jobs


def reproduce(
    name: str, budget: Literal["quick", "full"], seeds: int | None, samples: int | None, jobs: int | None,
    runs: Path, results: Path, tell: Tell,
) -> list[Path]:  # fmt: skip
    """Runs what is not done yet, `jobs` at a time, and writes the results; returns the tables' paths.

    name: one of NAMES, or all; a quick budget then leaves out the studies, whose runs are those of claims. seeds and
    samples replace the budget's; a verdict takes the full budget's own. Raises UserError where a folder holds another
    run.
    """
    names = [name] if name != "all" else [n for n in NAMES if budget == "full" or n not in STUDIES]
    budgets = {
        recipe: replace(found, seeds=seeds or found.seeds, samples=samples or found.samples)
        for recipe, found in {"quick": QUICK, "full": FULL}[budget].items()
    }
    whole = {  # a study's
        recipe: replace(found, updates=found.updates if budget == "quick" else 1.0) for recipe, found in budgets.items()
    }
    asked = [run for n in names for run in runs_of(n, whole if n in STUDIES else budgets, runs)]
    with Workers(jobs or default_jobs(), tell) as workers:
        workers.distil(asked)
        workers.evaluate(asked)
    flags = {"--budget": budget if budget == "quick" else None, "--seeds": seeds, "--samples": samples}
    told = "".join(f" {flag} {value}" for flag, value in flags.items() if value is not None)
    paths = []
    for n in names:
        about = {"command": f"phased-dmd reproduce {n}{told}", "date": f"{datetime.date.today()}", "budget": budget}
        if n == "memory":
            paths.append(memory(results, about))
        elif n == "fig2":
            paths.append(fig2(range(seeds or SEEDS[budget]), results, about))
        elif n in STUDIES:
            paths.append(study(n, STUDIES[n], whole[n], runs, results, about))
        else:
            paths.append(decide(n, CLAIMS[n], budgets, runs, results, about))
    write_index(results, (*ALONE, *CLAIMS), (*STUDIES,))
    return paths


def runs_of(name: str, budgets: Mapping[str, Budget], runs: Path) -> Sequence[Run]:
    """All runs of a claim or a study."""
    if name in STUDIES:
        return list(planned(name, STUDIES[name], budgets[name], runs).values())
    trials = CLAIMS[name].trials if name in CLAIMS else {}
    return [
        run
        for recipe, trial in trials.items()
        for run in planned(recipe, trial.variants, budgets[recipe], runs).values()
    ]
