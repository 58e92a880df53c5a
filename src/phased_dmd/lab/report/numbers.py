"""The tables of a page: a row a generator, a column a measure, with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phased_dmd.lab.evaluate import HEADINGS, NET_OF, Measurement
from phased_dmd.lab.metrics.intervals import interval
from phased_dmd.lab.report.runs import Group, base_rows


@dataclass(frozen=True)
class NumberRow:
    """A generator's measurements by measure; seeds: the training seeds of which they are means."""

    name: str
    detail: str
    figures: Mapping[str, Measurement]
    seeds: list[int]
    own: bool


@dataclass(frozen=True)
class NumberTable:
    """A prompt set's numbers; base: the row that every gap is taken to; nets: the network of each measure."""

    name: str
    about: str
    base: str
    measures: list[str]
    nets: dict[str, str]
    rows: list[NumberRow]


def make_tables(groups: Sequence[Group]) -> list[NumberTable]:
    """Returns a table for each prompt set of the evaluations."""
    tables, known = [], groups[0].runs[0].evaluation["nets"]
    for name, first in groups[0].runs[0].evaluation["sets"].items():
        bases = base_rows(groups, name).items()
        rows = [NumberRow(row, "", run.measurements(name, row), [], False) for row, run in bases]
        for group in groups:
            combined = combine([run.measurements(name, run.row) for run in group.runs])
            rows.append(NumberRow(group.name, group.detail, combined, [run.config.seed for run in group.runs], True))
        measures = [measure for measure in HEADINGS if any(measure in row.figures for row in rows)]
        nets = {measure: known[NET_OF[measure]] for measure in measures if NET_OF.get(measure) in known}
        tables.append(NumberTable(name, first["about"], first["base"], measures, nets, rows))
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
