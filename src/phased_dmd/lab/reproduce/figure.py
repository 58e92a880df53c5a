"""A claim's figure: what decides, a dot a seed, and samples of equal seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from phased_dmd.lab.evaluate import slug, title
from phased_dmd.lab.reproduce.claim import BOUNDED, Claim, Trial
from phased_dmd.lab.reproduce.claim_page import ARROWS, page_measures
from phased_dmd.lab.reproduce.study import Study
from phased_dmd.lab.reproduce.workers import PlannedRun
from phased_dmd.media import read_picture

WIDTH, DPI = 9.0, 150  # inches
SEEDS, ACROSS = 10, 4  # pictures a row, and scatter plots
COLOUR, DARK, GREY = "#36648b", "#1c3346", "#999999"
GAP = 2  # pixels between pictures
SMALL = {"fontsize": 8}


def draw_figure(
    path: Path, claim: Claim, studies: Mapping[str, Study],
    runs: Mapping[str, Mapping[tuple[str, int], PlannedRun]],
) -> None:  # fmt: skip
    """Draws for each recipe the measures that decide, and below them samples of one seed's runs by variant.

    runs: by recipe, and by label and seed; those that rows of results stand for have no samples.
    """
    shown = {recipe: _sample_folders(claim.trials[recipe], study, runs[recipe]) for recipe, study in studies.items()}
    heights = [h for r, study in studies.items() for h in _heights(claim.trials[r], study, claim.curves, shown[r])]
    figure = Figure((WIDTH, sum(heights)), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.1)
    blocks = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for (upper, lower), (recipe, study) in zip(blocks.reshape(-1, 2), studies.items(), strict=True):
        upper.suptitle(recipe, fontsize=10, fontweight="bold")
        (_draw_curves if claim.curves else _draw_dots)(upper, claim.trials[recipe], study)
        if shown[recipe]:
            _draw_samples(lower, shown[recipe], _shown_set(claim.trials[recipe], study) == "mixture")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _heights(trial: Trial, study: Study, curves: bool, shown: Mapping[str, Path]) -> tuple[float, float]:
    """Returns the heights of the measures and of the samples in the folders of `_sample_folders`, in inches."""
    upper = 2.8 if curves else 0.9 + 0.27 * len(trial.variants)
    if not shown:
        return upper, 0.1
    if _shown_set(trial, study) == "mixture":  # scatter plots, or the frames of a clip, some in a row
        height, width, _ = _picture_row(next(iter(shown.values()))).shape
        return upper, (0.3 + 1.9 * height / width) * -(-len(shown) // ACROSS)
    return upper, 0.76 * len(shown) + 0.2


def _panels(block: Any, trial: Trial, study: Study, **options: Any) -> list[tuple[Any, Mapping[str, Any], str]]:
    """Makes a panel for each measure that decides; returns it with the table's rows and the name of the measure."""
    arrows = {(c.table, c.name): ARROWS[c.direction] for c in reversed(trial.criteria)}
    chosen = list(dict.fromkeys((c.table, c.name) for c in trial.criteria))
    if "change" in study.summary:
        chosen = [("change", name) for name in page_measures(trial, "change")]
    panels = block.subplots(1, len(chosen), squeeze=False, **options)[0]
    for panel, (kind, name) in zip(panels, chosen, strict=True):
        style_panel(panel, f"{title(name)}, {kind} {arrows.get((kind, name), '')}")
    return [(panel, study.summary[kind], name) for panel, (kind, name) in zip(panels, chosen, strict=True)]


def _draw_dots(block: Any, trial: Trial, study: Study) -> None:
    """Draws a line a variant: a dot a seed, and the mean with its interval; the base as a line across."""
    for panel, rows, name in _panels(block, trial, study, sharey=True):
        labels = [label for label in trial.variants if label in rows]
        for y, cell in enumerate(rows[label][name] for label in labels):
            panel.plot(cell["values"], [y] * len(cell["values"]), "o", color=COLOUR, alpha=0.45, markersize=5)
            panel.errorbar(
                cell["mean"], y, xerr=cell["half_width"], fmt="|", color=DARK, capsize=3, markersize=11, linewidth=1.2
            )
        _draw_base(panel.axvline, rows, name)
        panel.set_yticks(range(len(labels)), labels, **SMALL)
        panel.set_ylim(len(labels) - 0.5, -0.5)
        if _is_wide(name, [rows[label][name] for label in labels]):
            panel.set_xscale("log")
        else:
            panel.locator_params("x", nbins=5)


def _draw_curves(block: Any, trial: Trial, study: Study) -> None:
    """Draws the measures over the generator updates, a curve a method, with intervals."""
    methods = {variant.method: [] for variant in trial.variants.values()}
    for label, variant in trial.variants.items():
        methods[variant.method].append(label)
    counts = sorted({sizes["updates"] for sizes in study.sizes.values()})
    for panel, rows, name in _panels(block, trial, study):
        for (method, labels), style in zip(methods.items(), ("o-", "s--"), strict=False):
            cells = [rows[label][name] for label in labels]
            updates = [study.sizes[label]["updates"] for label in labels]
            bars = [cell["half_width"] or 0 for cell in cells]
            means = [cell["mean"] for cell in cells]
            panel.errorbar(updates, means, bars, fmt=style, capsize=3, markersize=4, linewidth=1.2, label=method)
        _draw_base(panel.axhline, rows, name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, [str(count) for count in counts], **SMALL)
        panel.set_xlabel("generator updates in all", **SMALL)
        if _is_wide(name, [rows[label][name] for labels in methods.values() for label in labels]):
            panel.set_yscale("log")
        panel.legend(frameon=False, **SMALL)


def _draw_base(line: Any, rows: Mapping[str, Mapping[str, Any]], name: str) -> None:
    """Draws the base's many-step row as a line, where the table has one."""
    first = next(iter(rows))
    if first.startswith("base, "):
        line(rows[first][name]["mean"], color=GREY, linewidth=1, linestyle=":", zorder=0)


def _is_wide(name: str, cells: Sequence[Mapping[str, Any]]) -> bool:
    """Says whether values lie so far apart that a logarithmic axis shows more."""
    values = [value for cell in cells for value in cell["values"]]
    return name not in BOUNDED and min(values) > 0 and max(values) > 5 * min(values)


def style_panel(panel: Any, text: str) -> None:
    """Gives a panel its title and the look that all figures of results have."""
    panel.set_title(text, **SMALL)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _shown_set(trial: Trial, study: Study) -> str:
    """Returns the prompt set that samples are shown of: that of the first criterion, if it is one."""
    sets = next(iter(study.evaluations.values()))["sets"]
    return trial.criteria[0].table if trial.criteria[0].table in sets else next(iter(sets))


def _sample_folders(trial: Trial, study: Study, runs: Mapping[tuple[str, int], PlannedRun]) -> dict[str, Path]:
    """Returns the folders of samples of the first seed of which every run is there: the base's, then by label."""
    kind = _shown_set(trial, study)
    for seed in study.seeds:
        shown = {}
        for label in trial.variants:
            found, folder = study.evaluations[label, seed]["sets"][kind], runs[label, seed].folder / "samples" / kind
            shown.setdefault(found["base"], folder / slug(found["base"]))
            shown[label] = folder / slug(next(row for row in found["rows"] if not row.startswith("base, ")))
        if all(folder.is_dir() for folder in shown.values()):
            return shown
    return {}


def _draw_samples(block: Any, shown: Mapping[str, Path], points: bool) -> None:
    """Draws the base and every variant: ten pictures of a prompt set, a clip's frames, or a scatter plot of points."""
    if points:
        panels = block.subplots(-(-len(shown) // ACROSS), ACROSS, squeeze=False).flatten()
        for panel in panels:
            panel.set_axis_off()
        for panel, (label, folder) in zip(panels, shown.items(), strict=False):
            panel.imshow(_picture_row(folder))
            panel.set_title(label, **SMALL)
        return
    panels = block.subplots(len(shown), 2, squeeze=False, width_ratios=(1, 4))
    for (left, right), (label, folder) in zip(panels, shown.items(), strict=True):
        left.text(1, 0.5, label, transform=left.transAxes, ha="right", va="center", **SMALL)
        right.imshow(_picture_row(folder), interpolation="nearest")
        left.set_axis_off()
        right.set_axis_off()


def _picture_row(folder: Path) -> np.ndarray:
    """Returns a row of samples as one picture [h, w, 3]."""
    clip = folder / "00-frames.png"
    files = [folder / "points.png"] if (folder / "points.png").exists() else sorted(folder.glob("[0-9][0-9].png"))
    parts = [np.asarray(read_picture(file)) for file in ([clip] if clip.exists() else files[:SEEDS])]
    gap = np.full((parts[0].shape[0], GAP, 3), 255, np.uint8)
    return np.hstack([part for picture in parts for part in (picture, gap)][:-1])
