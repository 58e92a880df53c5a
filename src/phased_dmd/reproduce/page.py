"""A claim's results in Markdown, and the index of all."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phased_dmd.checkpoint import write_atomically
from phased_dmd.reproduce.claim import Claim, Measure, Trial
from phased_dmd.reproduce.intervals import shown
from phased_dmd.reproduce.study import Study, number, sizes, table, title

ARROWS = {"lower": "↓", "higher": "↑", "closer": "→ base"}
CONTEXT = {  # of a prompt set: what is shown beside the measures that decide
    "change": ("structure", "detail", "agreement"),
    "mixture": ("mode_histogram_kl", "energy_distance", "distance_to_nearest_mode"),
    "weak": ("frechet_features", "class_entropy"),
    "specific": ("frechet_features", "faithfulness"),
}


def claim_page(
    name: str, claim: Claim, studies: Mapping[str, Study], comparisons: Sequence[Mapping[str, Any]],
    verdict: str | None, about: Mapping[str, Any],
) -> str:  # fmt: skip
    """results/NAME.md."""
    parts = [f"# {name}", f"{claim.source}: {claim.says}", f"The evidence there: {claim.shown}"]
    parts += [
        verdict_line(verdict, about),
        comparison_table(comparisons),
        HOW_COMPARED,
        f"![{name}]({name}.png)",
        IN_THE_FIGURE,
    ]
    if claim.how:
        parts.append(claim.how)
    if claim.paper:
        parts += ["## Ours vs the paper's", beside_paper(claim, studies)]
    parts += ["## Measured", made_by(about) + EQUAL]
    for recipe, found in studies.items():
        parts += [f"{recipe}: {sizes(found)}.", *measured(claim.trials[recipe], found)]
    return "\n\n".join(parts) + "\n"


HOW_COMPARED = (
    "Equal seeds are compared: ratios by the geometric mean and the interval of their logarithms, claimed to lie above "
    "1; differences of shares and bounded scores claimed to lie above 0. Intervals are of 95 %, by Student's t over "
    "the seeds."
)
IN_THE_FIGURE = (
    "Means with their intervals, a dot a seed where there is room; dotted, the base at its own number of steps. "
    "Samples are of the runs of seed 0, of the same noise in every row."
)
EQUAL = (
    " Mean ± half width of the 95 % interval over seeds, in the base's rows over samples. Equal in all rows but the "
    "base's, unless the label says otherwise: teacher, seeds, batch, rank and generator updates in all. A method of "
    "more phases has more experts, and so more trainable parameters, which are counted over all of them."
)


def made_by(about: Mapping[str, Any]) -> str:
    return f"`{about['command']}`, {about['date']}, {about['budget']} budget."


def verdict_line(verdict: str | None, about: Mapping[str, Any]) -> str:
    if verdict is None:
        return "No verdict: that takes the full budget, and several seeds."
    return (
        f"Verdict: **{verdict}**. A claim holds where every interval lies where it is claimed to, and does not hold "
        f"where none does. {made_by(about)}"
    )


def comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| recipe | measure | compared | | 95 % interval | it shows |", "|---|---|---|---|---|---|"]
    for c in comparisons:
        measure = f"{title(c['measure'])}, {c['table']} {ARROWS[c['direction']]}"
        cells = (c["recipe"], measure, c["what"], f"{c['value']:.3g}", span(c) or "none of one seed", shown(c) or "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def span(comparison: Mapping[str, Any]) -> str | None:
    """The interval; None of one seed."""
    return None if comparison["low"] is None else f"{comparison['low']:.3g} to {comparison['high']:.3g}"


def decisive(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The first comparison, and how many are as claimed, in a line."""
    first = comparisons[0]
    text = f"{first['recipe']}, {title(first['measure'])}: {first['what']} = {first['value']:.3g}"
    if span(first) is None:
        return f"{text} (one seed)"
    count = [shown(comparison) for comparison in comparisons].count("as claimed")
    return f"{text} ({span(first)}); {count} of {len(comparisons)} intervals as claimed"


def beside_paper(claim: Claim, studies: Mapping[str, Study]) -> str:
    """Our measures that decide beside the paper's own figures, a row a label; ours of base are its many-step rows."""
    columns: dict[tuple[str, str, str], tuple[str, Measure]] = {}
    for recipe, trial in claim.trials.items():
        for measure in trial.measures:
            columns.setdefault((recipe, measure.table, measure.name), (recipe, measure))
    heads = [f"{recipe}: {title(m.name)}, {m.table} {ARROWS[m.direction]}" for recipe, m in columns.values()]
    lines = [f"| | {' | '.join([*heads, *(f'paper, {head}' for head in claim.paper[''])])} |"]
    lines.append("|" + "---|" * (len(heads) + len(claim.paper[""]) + 1))
    labels = ["base", *dict.fromkeys(label for trial in claim.trials.values() for label in trial.variants)]
    for label in labels:
        cells = []
        for recipe, measure in columns.values():
            rows = studies[recipe].summary[measure.table]
            row = next(iter(rows)) if label == "base" else label
            cells.append(number(rows[row].get(measure.name)) if row in rows else "-")
        lines.append(f"| {label} | {' | '.join([*cells, *claim.paper.get(label, ('-',) * len(claim.paper['']))])} |")
    return "\n".join(lines)


def measured(trial: Trial, found: Study) -> list[str]:
    """A table a prompt set: what decides, and a little beside it; the first also tells the runs' sizes."""
    first = next(iter(found.evaluations[next(iter(found.runs))]["sets"]))
    return [
        table(kind, rows, columns(trial, kind), found.facts if kind == first else None, found.nets)
        for kind, rows in found.summary.items()
    ]


def columns(trial: Trial, kind: str) -> list[str]:
    """The measures of a prompt set that a page shows."""
    return list(dict.fromkeys([*(m.name for m in trial.measures if m.table == kind), *CONTEXT[kind]]))


def write_index(results: Path, claims: Sequence[str], studies: Sequence[str]) -> Path:
    """Writes results/README.md from the JSONs that are there: a line a claim, and the studies."""
    lines = ["| claim | what is claimed | verdict | what decides |", "|---|---|---|---|"]
    for name in claims:
        if (results / f"{name}.json").exists():
            body = json.loads((results / f"{name}.json").read_text())
            lines.append(f"| [{name}]({name}.md) | {body['says']} | {body['verdict'] or 'none'} | {body['decides']} |")
    parts = ["# Results", "Made by `phased-dmd reproduce`; each page names its command, budget and date."]
    parts += ["\n".join(lines)] if len(lines) > 2 else []
    links = [f"[{name}]({name}.md)" for name in studies if (results / f"{name}.json").exists()]
    parts += (
        [f"Methods side by side, with all updates of their recipes, no verdict: {', '.join(links)}."] if links else []
    )
    write_atomically(results / "README.md", ("\n\n".join(parts) + "\n").encode())
    return results / "README.md"
