"""The loss curves of a page: one inline SVG for all runs, whose text and axes take the page's colour."""

import io
import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from phased_dmd.lab.report.runs import Group

LINES = {  # of metrics.jsonl, a row of panels each
    "distance": "distance to teacher", "fake_loss": "fake's loss", "generator_loss": "generator's loss",
    "fake_gradient_norm": "fake's gradient", "generator_gradient_norm": "generator's gradient",
}  # fmt: skip
COLOURS = ("#3b82c4", "#e0802b", "#35a06b", "#c8553d", "#8e6bbf", "#a08a2c", "#d16aa5", "#5b98a0")  # on light and dark
INK = "#010203"  # stands for the page's own colour


def colours(groups: Sequence[Group]) -> dict[str, str]:
    """Returns a colour for the label of each method; colours repeat where there are many."""
    return {group.label: COLOURS[i % len(COLOURS)] for i, group in enumerate(groups)}


class Curve(NamedTuple):
    """Is one run's line in a panel: its key of LINES, its phase, and points."""

    key: str
    phase: int
    colour: str
    x: tuple[float, ...]
    y: tuple[float, ...]


def make_curves(groups: Sequence[Group]) -> str:
    """Draws losses and the norms of gradients of all runs, a row each, a column a phase, a colour a method; "" where
    none was logged.
    """
    phases, colour_of, curves = max(group.runs[0].config.plan.phases for group in groups), colours(groups), []
    for group in groups:
        for run, key, phase in itertools.product(group.runs, LINES, range(1, phases + 1)):
            rows = [row for row in run.metrics if row["phase"] == phase and row.get(key)]  # a log has no 0
            if rows:
                x, y = (tuple(row[name] for row in rows) for name in ("iteration", key))
                curves.append(Curve(key, phase, colour_of[group.label], x, y))
    return _draw(phases, tuple(curves)) if curves else ""


@lru_cache(maxsize=4)
def _draw(phases: int, curves: tuple[Curve, ...]) -> str:
    lines = [key for key in LINES if any(curve.key == key for curve in curves)]
    ink = {f"{part}.color": INK for part in ("text", "xtick", "ytick")}
    axes = {"edgecolor": INK, "labelcolor": INK, "spines.top": False, "spines.right": False}
    style = ink | {f"axes.{key}": value for key, value in axes.items()}
    style |= {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "curves"}
    with matplotlib.rc_context(style):  # type: ignore[arg-type] every key is one of matplotlib's
        figure = Figure((2.2 + 2 * max(phases, 2), 0.6 + 1.5 * len(lines)), layout="constrained")
        panels = figure.subplots(len(lines), phases, squeeze=False, sharey="row", sharex="col")
        for line, key in zip(panels, lines, strict=True):
            line[0].set_ylabel(LINES[key])
            for panel in line:
                panel.set_yscale("log")
                panel.yaxis.set_minor_formatter(NullFormatter())
                panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
                panel.grid(color=INK, alpha=0.12, linewidth=0.6)
        for key, phase, colour, x, y in curves:
            marker = "." if len(x) == 1 else ""  # a line of one point is not seen
            panels[lines.index(key)][phase - 1].plot(x, y, color=colour, linewidth=1.1, marker=marker)
        for phase in range(1, phases + 1):
            panels[0][phase - 1].set_title(f"phase {phase}", fontsize=9)
        figure.supxlabel("generator updates", fontsize=9)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
