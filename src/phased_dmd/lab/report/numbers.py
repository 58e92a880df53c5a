"""The tables of a page: a row a generator, a column a measure, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from phased_dmd.lab.evaluate import COSTS, HEADINGS, NET_OF, Measurement
from phased_dmd.lab.metrics.intervals import interval
from phased_dmd.lab.report.runs import Group, base_rows


def make_tables(groups: Sequence[Group], tones: Mapping[tuple[str, str], str]) -> list[dict[str, Any]]:
    """Returns a table for each prompt set, as the page's template takes it.

    tones: by the label of a method and the prompt set, how its row is coloured, see `finding`.
    base: the row that every gap is taken to. nets: the network of each measure. Of a row, `figures` are measurements by
    measure, `seeds` the training seeds of which they are means, `own` says that it is no row of the base.
    """
    if not groups:
        return []
    first = groups[0].runs[0]
    tables, known = [], first.evaluation["nets"] if first.evaluation else {}
    for name, of_set in first.sets.items():
        rows: list[dict[str, Any]] = [
            {"name": row, "detail": "", "figures": run.measurements(name, row), "seeds": [], "own": False}
            for row, run in base_rows(groups, name).items()
        ]
        for group in groups:
            rows.append({
                "name": group.name, "detail": group.detail, "own": True, "seeds": [r.config.seed for r in group.runs],
                "figures": combine([run.measurements(name, run.row) for run in group.runs]),
                "tone": tones[group.label, name],
            })  # fmt: skip
        found = {measure for row in rows for measure in row["figures"]}
        measures = [measure for measure in dict.fromkeys((*COSTS, *HEADINGS)) if measure in found]
        nets = {measure: known[NET_OF[measure]] for measure in measures if NET_OF.get(measure) in known}
        about = {"name": name, "about": of_set["about"], "base": of_set["base"]}
        tables.append(about | {"measures": measures, "nets": nets, "rows": rows})
    return tables


def combine(runs: Sequence[Mapping[str, Measurement]]) -> dict[str, Measurement]:
    """Returns means over training seeds with 95 % intervals; one run keeps the intervals of its own evaluation."""
    if len(runs) == 1:
        return dict(runs[0])
    combined = {}
    for measure in runs[0]:
        value, gap = (interval([run[measure][key] for run in runs]) for key in ("value", "gap"))  # type: ignore[misc]
        combined[measure] = {
            "value": value["mean"], "half_width": value["half_width"], "gap": gap["mean"],
            "gap_half_width": gap["half_width"],
        }  # fmt: skip
    return combined
