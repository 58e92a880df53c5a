"""A claim's results in Markdown, and the index of all."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phased_dmd.checkpoint import write_atomically
from phased_dmd.lab.metrics.formats import number
from phased_dmd.lab.reproduce.claim import Claim, Measure, Trial
from phased_dmd.lab.reproduce.comparisons import judge, shown, tally
from phased_dmd.lab.reproduce.study import Study, plus_minus, sizes, table, title

ARROWS = {"lower": "↓", "higher": "↑", "closer": "→ base"}
CONTEXT = {  # of a prompt set: what is shown beside the measures that decide
    "change": ("structure", "detail", "detail_over_structure", "agreement"),
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
        verdict_line(verdict, comparisons, about),
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
    "1; differences of shares, bounded scores and gaps to the base, whose sign is left out, claimed to lie above 0. "
    "Intervals are of 95 %, by Student's t over the seeds."
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


def verdict_line(verdict: str | None, comparisons: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    if verdict is None:
        return "No verdict: that takes the full budget, with its seeds, samples and updates."
    size = {"digits" if c["recipe"].startswith("nano-") else "an exact mixture" for c in comparisons}
    return (
        f"Verdict: **{verdict}** at this size ({' and '.join(sorted(size, reverse=True))}): {counted(comparisons)}. "
        "A claim holds where every interval lies where it is claimed to; it holds partly where more do than are "
        "reversed, one of them still after Bonferroni's correction for their number; else it does not hold. "
        f"{made_by(about)}"
    )


def counted(comparisons: Sequence[Mapping[str, Any]]) -> str | None:
    """How many intervals show what, in words; None where one is missing."""
    counts = tally(comparisons)
    if counts is None:
        return None
    text = "{} as claimed, {} reversed, {} undecided".format(*counts)
    unclear = counts[1] == 0 and judge(comparisons) == "does not hold"
    return f"{text}; the seeds are too few to tell" if unclear else text


def comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| recipe | measure | compared | | 95 % interval | it shows |", "|---|---|---|---|---|---|"]
    for c in comparisons:
        measure = f"{title(c['measure'])}, {c['table']} {ARROWS[c['direction']]}"
        value, span = in_numbers(c)
        cells = (c["recipe"], measure, c["what"], value, span or "none of one seed", shown(c) or "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_numbers(comparison: Mapping[str, Any]) -> tuple[str, str | None]:
    """The value and its interval, None of one seed; of a difference with equal decimals."""
    value, low, high = (comparison[key] for key in ("value", "low", "high"))
    if low is None:
        return number(value), None
    scale = max(abs(low), abs(high)) if comparison["scale"] == "difference" else None
    return number(value, scale=scale), f"{number(low, scale=scale)} to {number(high, scale=scale)}"


def decisive(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The first comparison, and how many show what, in a line."""
    first, counts = comparisons[0], counted(comparisons)
    value, span = in_numbers(first)
    text = f"{first['recipe']}, {title(first['measure'])}: {first['what']} = {value}"
    return f"{text} ({span}); {counts}" if counts else f"{text} (one seed)"


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
            cells.append(plus_minus(rows[row].get(measure.name)) if row in rows else "-")
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
            body = json.loads((results / f"{name}.json").read_text("utf-8"))
            lines.append(f"| [{name}]({name}.md) | {body['says']} | {body['verdict'] or 'none'} | {body['decides']} |")
    parts = ["# Results", "Made by `phased-dmd reproduce`; each page names its command, budget and date."]
    parts += ["\n".join(lines)] if len(lines) > 2 else []
    links = [f"[{name}]({name}.md)" for name in studies if (results / f"{name}.json").exists()]
    parts += (
        [f"Methods side by side, with all updates of their recipes, no verdict: {', '.join(links)}."] if links else []
    )
    write_atomically(results / "README.md", ("\n\n".join(parts) + "\n").encode())
    return results / "README.md"
