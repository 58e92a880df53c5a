"""A claim's verdict: its recipes' variants compared seed by seed, with the interval that decides."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phased_dmd.checkpoint import write_atomically
from phased_dmd.evaluate import HEADINGS
from phased_dmd.reproduce.claims import Budget, Claim
from phased_dmd.reproduce.intervals import judge, ratio
from phased_dmd.reproduce.study import markdown, run_variants, sizes


def decide(name: str, claim: Claim, budgets: Mapping[str, Budget], runs: Path, results: Path, command: str) -> Path:
    """Writes results/NAME.md and .json, and into results/NAME/ a file a run.

    One seed, or less than all of a recipe's updates, gets no verdict.
    """
    studies = {
        recipe: run_variants(recipe, claim.variants, budgets[recipe], runs, results / name) for recipe in claim.recipes
    }
    comparisons = compare(claim, studies)
    verdict = judge(comparisons) if all(budgets[recipe].updates == 1 for recipe in studies) else None
    body = {"command": command, "recipes": studies, "comparisons": comparisons, "verdict": verdict}
    write_atomically(results / f"{name}.json", (json.dumps(body, indent=1) + "\n").encode())
    parts = [f"# {name}", f"{claim.source}: {claim.says}", f"The evidence there: {claim.shown}"]
    parts.append(
        f"`{command}`: mean ± half width of the 95 % interval over seeds. Equal in all rows but the base's: teacher, "
        "seeds, generator updates in all."
    )
    for recipe, found in studies.items():
        parts += [f"{recipe}: {sizes(found)}.", *markdown(found)]
    parts += [
        "What decides, worse over better: geometric mean of the ratios of equal seeds, and its 95 % interval by "
        "Student's t on their logarithms.",
        comparison_table(comparisons),
        verdict_line(verdict),
    ]
    write_atomically(results / f"{name}.md", ("\n\n".join(parts) + "\n").encode())
    return results / f"{name}.md"


def compare(claim: Claim, studies: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each recipe and pair, how many times larger the deciding measure is for the one that is claimed worse."""
    found = []
    for recipe, (kind, measure) in claim.recipes.items():
        rows = {row.rpartition(", ")[0]: values for row, values in studies[recipe]["summary"][kind].items()}
        for better, worse in claim.pairs:
            pair = {"recipe": recipe, "table": kind, "measure": measure, "better": better, "worse": worse}
            found.append(pair | ratio(rows[worse][measure]["values"], rows[better][measure]["values"]))
    return found


def comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| recipe | measure | worse / better | ratio | 95 % interval |", "|---|---|---|---|---|"]
    for c in comparisons:
        span = "none of one seed" if c["low"] is None else f"{c['low']:.3g} to {c['high']:.3g}"
        measure = f"{HEADINGS[c['measure']][0]}, {c['table']}"
        lines.append(f"| {c['recipe']} | {measure} | {c['worse']} / {c['better']} | {c['ratio']:.3g} | {span} |")
    return "\n".join(lines)


def verdict_line(verdict: str | None) -> str:
    if verdict is None:
        return "No verdict: that takes several seeds, and all of the recipes' updates."
    return (
        f"Verdict: **{verdict}**. A claim holds where every interval lies above 1, and does not hold where none does; "
        "an interval that contains 1 shows nothing."
    )
