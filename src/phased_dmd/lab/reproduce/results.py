"""Results as files: a page and its JSON, the rows of a study, and the index; and cells of results as Markdown."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phased_dmd.checkpoint import write_atomically
from phased_dmd.lab.evaluate import title
from phased_dmd.lab.metrics.formats import markdown_table, number
from phased_dmd.lab.reproduce.study import Study


def write_page(results: Path, name: str, parts: Sequence[str], body: Mapping[str, Any]) -> Path:
    """Writes results/NAME.md of the parts of a page, and results/NAME.json; returns the page's path."""
    write_atomically(results / f"{name}.json", (json.dumps(body, indent=1) + "\n").encode())
    write_atomically(results / f"{name}.md", ("\n\n".join(parts) + "\n").encode())
    return results / f"{name}.md"


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a study's rows, a JSON object a line; each has a `name` of its own."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file that `write_rows` wrote; none where there is no file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def write_index(results: Path, claims: Sequence[str], studies: Sequence[str]) -> Path:
    """Writes results/README.md from the JSON files that are there: a line a claim, and links to the studies."""
    lines = []
    for name in claims:
        if (results / f"{name}.json").exists():
            body = json.loads((results / f"{name}.json").read_text("utf-8"))
            lines.append([f"[{name}]({name}.md)", body["says"], body["verdict"] or "none", body["decides"]])
    links = [f"[{name}]({name}.md)" for name in studies if (results / f"{name}.json").exists()]
    parts = ["# Results", "Made by `phased-dmd reproduce`; each page names its command, budget and date."]
    if lines:
        parts.append(markdown_table(["claim", "what is claimed", "verdict", "what decides"], lines))
    if links:
        parts.append(f"Methods side by side, with all updates of their recipes, no verdict: {', '.join(links)}.")
    write_atomically(results / "README.md", ("\n\n".join(parts) + "\n").encode())
    return results / "README.md"


def amounts(study: Study) -> str:
    """Says in words how much was run."""
    count, budget = len(study.seeds), study.budget
    updates = sorted({sizes["updates"] for sizes in study.sizes.values()})
    text = f"{count} {'seed' if count == 1 else 'seeds'}, {budget.samples} samples a cell, "
    text += f"{', '.join(map(str, updates))} generator updates in all"
    return text if budget.updates == 1 else f"{text} ({budget.updates:g} of the recipe's)"


def summary_table(
    kind: str, rows: Mapping[str, Mapping[str, Mapping[str, Any]]], measures: Sequence[str] | None = None,
    sizes: Mapping[str, Mapping[str, int]] | None = None, nets: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """Returns a table of a study's summary in Markdown: a row a base or label, a column a measure.

    measures: None stands for all of the first row's. sizes: further columns, of the rows that have any.
    """
    measures = list(next(iter(rows.values()))) if measures is None else measures
    columns = list(next(iter(sizes.values()))) if sizes else []
    head = [kind, *(name.replace("_", " ") for name in columns), *(title(name, nets) for name in measures)]
    lines = []
    for row, cells in rows.items():
        of_row = (sizes or {}).get(row, {})
        shown = [f"{of_row[name]:,}" if name in of_row else "" for name in columns]
        lines.append([row, *shown, *(plus_minus(cells.get(name)) for name in measures)])
    return markdown_table(head, lines)


def plus_minus(cell: Mapping[str, Any] | None) -> str:
    """Writes a cell as mean ± half width, to the latter's second digit and with equal decimals; None as a dash."""
    if cell is None:
        return "-"
    mean, half = cell["mean"], cell["half_width"]
    if not half:
        return number(mean)
    decimals = max(0, 1 - math.floor(math.log10(half)))
    if decimals > 7:
        return f"{number(mean, scale=half)} ± {number(half, digits=2)}"
    return f"{mean:,.{decimals}f} ± {half:,.{decimals}f}".replace("-", "−")
