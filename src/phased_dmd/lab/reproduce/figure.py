"""A claim's figure: what decides, a dot a seed, and samples of equal seeds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phased_dmd.lab.evaluate import slug
from phased_dmd.lab.reproduce.claim import BOUNDED, Claim, Trial
from phased_dmd.lab.reproduce.claim_page import ARROWS, columns
from phased_dmd.lab.reproduce.study import Study, title
from phased_dmd.media import read_picture

WIDTH, DPI = 9.0, 150  # inches
SEEDS, ACROSS = 10, 4  # pictures a row, and scatter plots
COLOUR, DARK, GREY = "#36648b", "#1c3346", "#999999"
GAP = 2  # pixels between pictures
SMALL = {"fontsize": 8}


def draw(path: Path, claim: Claim, studies: Mapping[str, Study]) -> None:
    """Per recipe the measures that decide, and below them samples by variant; all runs have seed 0."""
    from matplotlib.figure import Figure

    heights = [h for recipe, found in studies.items() for h in block_heights(claim.trials[recipe], found, claim.curves)]
    figure = Figure((WIDTH, sum(heights)), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.1)
    blocks = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for i, (recipe, found) in enumerate(studies.items()):
        blocks[2 * i].suptitle(recipe, fontsize=10, fontweight="bold")
        (curves if claim.curves else dots)(blocks[2 * i], claim.trials[recipe], found)
        samples(blocks[2 * i + 1], claim.trials[recipe], found)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def block_heights(trial: Trial, found: Study, curves: bool) -> tuple[float, float]:
    """Of the measures and of the samples, in inches."""
    upper = 2.8 if curves else 0.9 + 0.27 * len(trial.variants)
    if shown_set(trial, found) == "mixture":
        return upper, 2.2 * -(-(len(trial.variants) + 1) // ACROSS)
    return upper, 0.76 * (len(trial.variants) + 1) + 0.2


def panels(trial: Trial, found: Study) -> list[tuple[str, str, str]]:
    """(table, measure, arrow) of each panel."""
    decide = {(m.table, m.name): ARROWS[m.direction] for m in reversed(trial.measures)}
    chosen = dict.fromkeys((m.table, m.name) for m in trial.measures)
    if "change" in found.summary:
        chosen = dict.fromkeys(("change", name) for name in columns(trial, "change"))
    return [(kind, name, decide.get((kind, name), "")) for kind, name in chosen]


def dots(block: Any, trial: Trial, found: Study) -> None:
    """A panel a measure, a line a variant: a dot a seed, and the mean with its interval; the base as a line."""
    chosen = panels(trial, found)
    row = block.subplots(1, len(chosen), squeeze=False, sharey=True)[0]
    for panel, (kind, name, arrow) in zip(row, chosen, strict=True):
        rows = found.summary[kind]
        labels = [label for label in trial.variants if label in rows]
        for y, cell in enumerate(rows[label][name] for label in labels):
            panel.plot(cell["values"], [y] * len(cell["values"]), "o", color=COLOUR, alpha=0.45, markersize=5)
            panel.errorbar(
                cell["mean"], y, xerr=cell["half_width"], fmt="|", color=DARK, capsize=3, markersize=11, linewidth=1.2
            )
        base_line(panel.axvline, rows, name)
        panel.set_yticks(range(len(labels)), labels, **SMALL)
        panel.set_ylim(len(labels) - 0.5, -0.5)
        if wide(name, [v for label in labels for v in rows[label][name]["values"]]):
            panel.set_xscale("log")
        else:
            panel.locator_params("x", nbins=5)
        finish(panel, f"{title(name)}, {kind} {arrow}")


def curves(block: Any, trial: Trial, found: Study) -> None:
    """A panel a measure over the generator updates, a curve a method, with intervals."""
    chosen = panels(trial, found)
    row = block.subplots(1, len(chosen), squeeze=False)[0]
    methods = {variant.method: [] for variant in trial.variants.values()}
    for label, variant in trial.variants.items():
        methods[variant.method].append(label)
    counts = sorted({facts["updates"] for facts in found.facts.values()})
    for panel, (kind, name, arrow) in zip(row, chosen, strict=True):
        rows = found.summary[kind]
        for (method, labels), style in zip(methods.items(), ("o-", "s--"), strict=False):
            cells = [rows[label][name] for label in labels]
            updates = [found.facts[label]["updates"] for label in labels]
            bars = [cell["half_width"] or 0 for cell in cells]
            means = [cell["mean"] for cell in cells]
            panel.errorbar(updates, means, bars, fmt=style, capsize=3, markersize=4, linewidth=1.2, label=method)
        base_line(panel.axhline, rows, name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, [str(count) for count in counts], **SMALL)
        panel.set_xlabel("generator updates in all", **SMALL)
        if wide(name, [v for labels in methods.values() for label in labels for v in rows[label][name]["values"]]):
            panel.set_yscale("log")
        panel.legend(frameon=False, **SMALL)
        finish(panel, f"{title(name)}, {kind} {arrow}")


def base_line(line: Any, rows: Mapping[str, Mapping[str, Any]], name: str) -> None:
    """The base's many-step row as a line, where the table has one."""
    first = next(iter(rows))
    if first.startswith("base, "):
        line(rows[first][name]["mean"], color=GREY, linewidth=1, linestyle=":", zorder=0)


def wide(name: str, values: list[float]) -> bool:
    """Whether a logarithmic axis shows more."""
    return name not in BOUNDED and min(values) > 0 and max(values) > 5 * min(values)


def finish(panel: Any, text: str) -> None:
    panel.set_title(text, **SMALL)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def shown_set(trial: Trial, found: Study) -> str:
    """The prompt set that samples are shown of: that of the first measure, if it is one."""
    sets = next(iter(found.evaluations.values()))["sets"]
    return trial.measures[0].table if trial.measures[0].table in sets else next(iter(sets))


def samples(block: Any, trial: Trial, found: Study) -> None:
    """The base and every variant of seed 0: ten pictures, a clip's frames, or a scatter plot each."""
    kind = shown_set(trial, found)
    folders = {}
    for label in trial.variants:
        rows = found.evaluations[label, 0]["sets"][kind]
        where = found.runs[label, 0].folder / "samples" / kind
        folders.setdefault(rows["base"], where / slug(rows["base"]))
        folders[label] = where / slug(next(row for row in rows["rows"] if not row.startswith("base, ")))
    if kind == "mixture":
        grid = block.subplots(-(-len(folders) // ACROSS), ACROSS, squeeze=False).flatten()
        for panel in grid:
            panel.set_axis_off()
        for panel, (label, folder) in zip(grid, folders.items(), strict=False):
            panel.imshow(picture(folder))
            panel.set_title(label, **SMALL)
        return
    grid = block.subplots(len(folders), 2, squeeze=False, width_ratios=(1, 4))
    for (left, right), (label, folder) in zip(grid, folders.items(), strict=True):
        left.text(1, 0.5, label, transform=left.transAxes, ha="right", va="center", **SMALL)
        right.imshow(picture(folder), interpolation="nearest")
        left.set_axis_off()
        right.set_axis_off()


def picture(folder: Path) -> np.ndarray:
    """A row of samples as one picture [h, w, 3]."""
    clip = folder / "00-frames.png"
    files = [folder / "points.png"] if (folder / "points.png").exists() else sorted(folder.glob("[0-9][0-9].png"))
    parts = [np.asarray(read_picture(file)) for file in ([clip] if clip.exists() else files[:SEEDS])]
    gap = np.full((parts[0].shape[0], GAP, 3), 255, np.uint8)
    return np.hstack([part for one in parts for part in (one, gap)][:-1])
