"""The loss curves of a page: one inline SVG for all runs, whose text and axes take the page's colour."""

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
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


def make_curves(groups: Sequence[Group]) -> str:
    """Draws losses and the norms of gradients of all runs, a row each, a column a phase, a colour a method; "" where
    none was logged.
    """
    phases = max(group.runs[0].config.plan.phases for group in groups)
    logged = [row for group in groups for run in group.runs for row in run.metrics]
    lines = {key: title for key, title in LINES.items() if any(row.get(key) is not None for row in logged)}
    if not lines:
        return ""
    ink = {f"{part}.color": INK for part in ("text", "xtick", "ytick")}
    axes = {"edgecolor": INK, "labelcolor": INK, "spines.top": False, "spines.right": False}
    style = ink | {f"axes.{key}": value for key, value in axes.items()}
    style |= {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "curves"}
    with matplotlib.rc_context(style):  # type: ignore[arg-type] every key is one of matplotlib's
        figure = Figure((2.2 + 2 * max(phases, 2), 0.6 + 1.5 * len(lines)), layout="constrained")
        panels = figure.subplots(len(lines), phases, squeeze=False, sharey="row", sharex="col")
        for line, (key, title) in zip(panels, lines.items(), strict=True):
            line[0].set_ylabel(title)
            for phase, panel in enumerate(line, 1):
                panel.set_yscale("log")
                panel.yaxis.set_minor_formatter(NullFormatter())
                panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
                panel.grid(color=INK, alpha=0.12, linewidth=0.6)
                _plot(panel, groups, key, phase)
        for phase in range(1, phases + 1):
            panels[0][phase - 1].set_title(f"phase {phase}", fontsize=9)
        figure.supxlabel("generator updates", fontsize=9)
        return _svg(figure)


def _plot(panel: Axes, groups: Sequence[Group], key: str, phase: int) -> None:
    for group in groups:
        for run in group.runs:
            rows = [row for row in run.metrics if row["phase"] == phase and row.get(key) is not None]
            marker = "." if len(rows) == 1 else ""  # a line of one point is not seen
            x, y = [row["iteration"] for row in rows], [row[key] for row in rows]
            panel.plot(x, y, color=colours(groups)[group.label], linewidth=1.1, marker=marker)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
