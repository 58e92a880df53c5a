"""What `cost` found, as Markdown and as curves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contests import FAST, LEVER_SEEDS, PAPER

from phased_dmd.reproduce.study import plus_minus

STYLES = ("o-", "s--")
WORDS = {"as claimed": "better", "the reverse": "worse", "nothing": "nothing", None: "-"}


def page(found: Mapping[str, Any]) -> list[str]:
    """The figures as lines of Markdown."""
    lines: list[str] = []
    for recipe, contest in found.items():
        names = list(contest["base"])
        head = [f"| {recipe} | generator updates | forwards | CPU s | {' | '.join(names)} |"]
        head += ["|" + "---|" * (len(names) + 4), f"| base, 40 steps | | | | {bases(contest)} |"]
        rows = [line(p, names) for points in contest["curves"].values() for p in points]
        lines += ["", *head, *rows, "", *verdict(contest), ""]
        told = "alone, over the paper's schedule" if contest["levers_of"] == PAPER else "left out of `fast`"
        lines += [f"Levers {told}, {LEVER_SEEDS} seeds; better or worse than {contest['reference']} where the 95 % "
                  "interval over seeds says so, as one in twenty does where there is nothing:", ""]  # fmt: skip
        lines += [*head, *(line(p, names) for p in contest["levers"])]
    return lines


def bases(contest: Mapping[str, Any]) -> str:
    return " | ".join(f"{value:.4g}" for value in contest["base"].values())


def line(found: Mapping[str, Any], names: Sequence[str]) -> str:
    marks = {name: f" ({WORDS[shows]})" for name, shows in found.get("shows", {}).items() if shows != "nothing"}
    cells = " | ".join(plus_minus(found["values"][name]) + marks.get(name, "") for name in names)
    return f"| {found['label']} | {found['updates']} | {found['calls']:,.0f} | {found['cpu_seconds']:,.1f} | {cells} |"


def verdict(contest: Mapping[str, Any]) -> list[str]:
    told = [
        f"The paper's side has {json.dumps(contest['tuned'])[1:-1]}, which its own tuning found best. What it costs "
        "each side to reach the best of the paper's, and to keep it: by all measures of quality and seeds, by each "
        "measure, and by some of the seeds. In brackets the middle 95 % of a thousand bootstrap draws of the seeds; a "
        "draw in which `fast` does not keep the target counts as 0.", "",
        "| decided by | seeds | target | paper's, forwards | fast, forwards | fewer calls | less CPU time | "
        "twice fewer calls in |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for i, found in enumerate(contest["races"]):
        paper, fast = (found["reached"][side]["calls"] for side in (PAPER, FAST))
        most_trained = contest["curves"][FAST][-1]["calls"]
        cells = [
            ", ".join(found["targets"]), " ".join(map(str, found["seeds"])),
            ", ".join(f"{target:.4g}" for target in found["targets"].values()),
            f"{paper:,.0f}", f"more than {most_trained:,.0f}" if fast is None else f"{fast:,.0f}",
            *(times(found["ratios"][unit], *found["middle"][unit]) for unit in found["ratios"]),
            f"{found['twice']['calls']:.0%}",
        ]  # fmt: skip
        told.append("| " + " | ".join(cells if i else [f"**{cell}**" for cell in cells]) + " |")
    if not contest["comparisons"]:
        return told
    both = " against ".join(contest["compared"][side] for side in (FAST, PAPER))
    told += ["", f"At the least budgets trained that pay for it, {both}, the same seeds; above 1 for a ratio and 0 for "
             f"a difference `fast` is better:", ""]  # fmt: skip
    told += ["| measure | | 95 % interval | `fast` is |", "|---|---|---|---|"]
    for c in contest["comparisons"]:
        words = "not told apart" if c["shows"] == "nothing" else WORDS[c["shows"]]
        told.append(
            f"| {c['table']}/{c['measure']} ({c['scale']}) | {c['value']:.3g} | {c['low']:.3g} to {c['high']:.3g} | "
            f"{words} |"
        )
    return told


def times(ratio: float | None, low: float, high: float) -> str:
    return f"{'-' if ratio is None else f'{ratio:.2f}'} ({low:.2f} to {high:.2f})"


def draw(found: Mapping[str, Any], path: Path) -> None:
    """The curves, a row a recipe, a panel a measure, over the calls."""
    from matplotlib.figure import Figure

    columns = max(len(contest["base"]) for contest in found.values())
    figure = Figure((3 * columns, 2.8 * len(found)), dpi=150)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(found), columns, squeeze=False)
    for row, (recipe, contest) in zip(grid, found.items(), strict=True):
        for panel in row[len(contest["base"]) :]:
            panel.set_axis_off()
        for panel, (name, base) in zip(row, contest["base"].items(), strict=False):
            for (side, points), style in zip(contest["curves"].items(), STYLES, strict=True):
                cells = [p["values"][name] for p in points]
                panel.errorbar(
                    [p["calls"] for p in points], [c["mean"] for c in cells], [c["half_width"] or 0 for c in cells],
                    fmt=style, capsize=3, markersize=4, linewidth=1.2, label=side,
                )  # fmt: skip
            panel.axhline(base, color="#999999", linewidth=1, linestyle=":", zorder=0, label="base, 40 steps")
            if (target := contest["races"][0]["targets"].get(name)) is not None:
                panel.axhline(target, color="#36648b", linewidth=0.8, zorder=0, label="target")
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:,.0f}")
            panel.set_title(f"{recipe}: {name}", fontsize=8)
            panel.set_xlabel("forwards a sample of the batch", fontsize=8)
            panel.tick_params(labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
            panel.legend(frameon=False, fontsize=7)
    figure.savefig(path)
