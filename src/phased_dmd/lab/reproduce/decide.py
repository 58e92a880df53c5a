"""A claim's verdict: its recipes' variants compared seed by seed, with the interval that decides."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phased_dmd.checkpoint import write_atomically
from phased_dmd.lab.reproduce.claim import FULL, Budget, Claim, Measure, Trial
from phased_dmd.lab.reproduce.claim_page import claim_page, decisive
from phased_dmd.lab.reproduce.comparisons import compare, judge
from phased_dmd.lab.reproduce.fig5 import changes
from phased_dmd.lab.reproduce.figure import draw
from phased_dmd.lab.reproduce.study import Summary, collect, planned


def decide(
    name: str, claim: Claim, budgets: Mapping[str, Budget], runs: Path, results: Path, about: Mapping[str, Any]
) -> Path:
    """Writes results/NAME.md, .json and .png, and into results/NAME/ a file a run, from runs that are finished.

    about: `command`, `date` and `budget`. Other seeds, samples or updates than those of FULL get no verdict.
    """
    studies = {}
    for recipe, trial in claim.trials.items():
        asked = planned(recipe, trial.variants, budgets[recipe], runs)
        studies[recipe] = collect(recipe, asked, budgets[recipe], results / name)
    if name == "fig5":
        changes(studies["nano-t2i"], results / name)
    comparisons = [
        c for recipe, trial in claim.trials.items() for c in compared(recipe, trial, studies[recipe].summary)
    ]
    verdict = judge(comparisons) if all(budgets[recipe] == FULL[recipe] for recipe in claim.trials) else None
    body = {
        "claim": name, "says": claim.says, "source": claim.source, **about, "verdict": verdict,
        "decides": decisive(comparisons), "comparisons": comparisons,
        "recipes": {recipe: found.body() for recipe, found in studies.items()},
    }  # fmt: skip
    write_atomically(results / f"{name}.json", (json.dumps(body, indent=1) + "\n").encode())
    draw(results / f"{name}.png", claim, studies)
    write_atomically(results / f"{name}.md", claim_page(name, claim, studies, comparisons, verdict, about).encode())
    return results / f"{name}.md"


def compared(recipe: str, trial: Trial, summary: Summary) -> list[dict[str, Any]]:
    """Of each pair and measure, how far they lie apart, as `compare` says."""
    result = []
    for better, worse in trial.pairs:
        for measure in trial.measures:
            rows = summary[measure.table]
            cells = (rows[better][measure.name], rows[worse][measure.name])
            comparison = compare(measure, *cells)
            result.append(
                {
                    "recipe": recipe, "table": measure.table, "measure": measure.name, "direction": measure.direction,
                    "better": better, "worse": worse, "what": in_words(measure, better, worse), **comparison,
                }
            )  # fmt: skip
    return result


def in_words(measure: Measure, better: str, worse: str) -> str:
    """What is divided by what, or subtracted from what."""
    if measure.direction == "closer":
        better, worse = f"gap of {better}", f"gap of {worse}"
    larger, smaller = (better, worse) if measure.direction == "higher" else (worse, better)
    return f"{larger} {'/' if measure.scale == 'ratio' else '-'} {smaller}"
