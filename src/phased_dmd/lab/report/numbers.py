"""The tables of a page: a row a generator, a column a measure, with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phased_dmd.lab.evaluate import HEADINGS, NET_OF
from phased_dmd.lab.metrics.intervals import interval
from phased_dmd.lab.report.runs import Figure, Group, base_rows


@dataclass(frozen=True)
class Row:
    """A generator's figures by measure; seeds: the training seeds that they are means over."""

    name: str
    detail: str
    figures: Mapping[str, Figure]
    seeds: list[int]
    own: bool


@dataclass(frozen=True)
class Table:
    """A prompt set's numbers; base: the row that every gap is to; nets: what measured, by measure."""

    name: str
    about: str
    base: str
    measures: list[str]
    nets: dict[str, str]
    rows: list[Row]


def make_tables(groups: Sequence[Group]) -> list[Table]:
    """A table for each prompt set of the evaluations."""
    tables, known = [], groups[0].runs[0].evaluation["nets"]
    for name, first in groups[0].runs[0].evaluation["sets"].items():
        rows = [Row(row, "", run.figures(name, row), [], False) for row, run in base_rows(groups, name).items()]
        for group in groups:
            figures = combine([run.figures(name, run.row) for run in group.runs])
            rows.append(Row(group.name, group.detail, figures, [run.config.seed for run in group.runs], True))
        measures = [measure for measure in HEADINGS if any(measure in row.figures for row in rows)]
        nets = {measure: known[NET_OF[measure]] for measure in measures if NET_OF.get(measure) in known}
        tables.append(Table(name, first["about"], first["base"], measures, nets, rows))
    return tables


def combine(runs: Sequence[Mapping[str, Figure]]) -> dict[str, Figure]:
    """Means over training seeds with 95 % intervals; one run keeps the intervals of its own evaluation."""
    if len(runs) == 1:
        return dict(runs[0])
    return {measure: _over_seeds([run[measure] for run in runs]) for measure in runs[0]}


def _over_seeds(figures: Sequence[Figure]) -> Figure:
    value, gap = (interval([figure[key] for figure in figures]) for key in ("value", "gap"))
    return {
        "value": value["mean"], "half_width": value["half_width"], "gap": gap["mean"],
        "gap_half_width": gap["half_width"],
    }  # fmt: skip
