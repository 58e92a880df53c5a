"""What `cost` found, as Markdown and as curves."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from contests import FAST, PAPER

from phased_dmd.lab.reproduce.results import plus_minus

STYLES = ("o-", "s--")
COSTS = {"calls": "forwards a sample of the batch", "cpu_seconds": "CPU seconds"}
WORDS = {"as claimed": "better", "the reverse": "worse", "nothing": "nothing", None: "-"}


def show_cost(found: Mapping[str, Any]) -> list[str]:
    """Curves, ratios and losses as lines of Markdown."""
    rows = [line(p, found["base"]) for points in found["curves"].values() for p in points]
    return [*head(found), *rows, "", *verdict(found), "", *losses(found)]


def show_levers(found: Mapping[str, Any]) -> list[str]:
    """The levers as lines of Markdown."""
    told = "Alone, over the paper's schedule" if found["levers_of"] == PAPER else "Left out of `fast`"
    sgts = any("SGTS" in each["label"] for each in found["levers"])
    policy = (
        " SGTS's fake is fed its truncated rollouts (`ablation.fake_rollout=same`), no longer the default."
        if sgts
        else ""
    )
    return [
        f"{told}; seeds {seeds(found)}. Better or worse than {found['reference']} where the 95 % interval over seeds "
        f"says so, as one in twenty does where there is nothing.{policy}", "",
        *head(found), *(line(p, found["base"]) for p in found["levers"]),
    ]  # fmt: skip


def head(found: Mapping[str, Any]) -> list[str]:
    names, bases = list(found["base"]), " | ".join(f"{value:.4g}" for value in found["base"].values())
    return [
        f"| {found['recipe']} | generator updates | forwards | CPU s | {' | '.join(names)} |",
        "|" + "---|" * (len(names) + 4), f"| base, 40 steps | | | | {bases} |",
    ]  # fmt: skip


def seeds(found: Mapping[str, Any]) -> str:
    return f"{found['seeds'][0]} to {found['seeds'][-1]}"


def line(found: Mapping[str, Any], names: Iterable[str]) -> str:
    marks = {name: f" ({WORDS[shows]})" for name, shows in found.get("shows", {}).items() if shows != "nothing"}
    cells = " | ".join(plus_minus(found["values"][name]) + marks.get(name, "") for name in names)
    return f"| {found['label']} | {found['updates']} | {found['calls']:,.0f} | {found['cpu_seconds']:,.1f} | {cells} |"


def verdict(contest: Mapping[str, Any]) -> list[str]:
    told = [
        f"The paper's side has {json.dumps(contest['tuned'])[1:-1]}, which its own tuning found best. What it costs "
        f"each side to reach the best of the paper's, and to keep it; seeds {seeds(contest)}. *Reached in*: the share "
        "of a thousand bootstrap draws of the seeds in which `fast` does so within its budgets; in brackets the middle "
        "95 % of those.", "",
        "| decided by | target | paper's, forwards | fast, forwards | reached in | fewer calls | less CPU time | "
        "twice fewer calls in |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for i, found in enumerate(contest["races"]):
        paper, fast = (found["reached"][side]["calls"] for side in (PAPER, FAST))
        most_trained = contest["curves"][FAST][-1]["calls"]
        cells = [
            ", ".join(found["targets"]), ", ".join(f"{target:.4g}" for target in found["targets"].values()),
            f"{paper:,.0f}", f"more than {most_trained:,.0f}" if fast is None else f"{fast:,.0f}",
            f"{found['reached_in']['calls']:.1%}",
            *(times(found["ratios"][unit], *(found["middle"][unit] or (None, None))) for unit in found["ratios"]),
            f"{found['twice']['calls']:.0%}",
        ]  # fmt: skip
        told.append("| " + " | ".join(cells if i else [f"**{cell}**" for cell in cells]) + " |")
    return told


def losses(contest: Mapping[str, Any]) -> list[str]:
    """Whether `fast` loses anything at half of the calls."""
    pairs = list(contest["comparisons"][0]["each"])
    told = [
        f"At half of the paper's calls at most, over all of its budgets for which `fast` has one ({', '.join(pairs)}), "
        "the same seeds; above 1 for a ratio and 0 for a difference `fast` is better. With 95 % intervals over seeds; "
        "the margin was set before the runs, and `fast` is *no worse* where the whole interval is better than it:",
        "", f"| measure | all | could tell | `fast` is | margin | by the margin | {' | '.join(pairs)} |",
        "|" + "---|" * (len(pairs) + 6),
    ]  # fmt: skip
    for c in contest["comparisons"]:
        words = "not told apart" if c["shows"] == "nothing" else WORDS[c["shows"]]
        each = " | ".join(times(found["value"], found["low"], found["high"]) for found in c["each"].values())
        whole = times(c["value"], c["low"], c["high"])
        margin = f"{'x ' if c['scale'] == 'ratio' else ''}{c['margin']:g}"
        by_it, could = "no worse" if c["no_worse"] else "open", c["detectable"]
        told.append(
            f"| {c['measure']} ({c['scale']}) | {whole} | {'-' if could is None else f'{could:.3g}'} | {words} | "
            f"{margin} | {by_it} | {each} |"
        )
    return told


def times(ratio: float | None, low: float | None, high: float | None) -> str:
    value = "-" if ratio is None else f"{ratio:.3g}"
    return value if low is None or high is None else f"{value} ({low:.3g} to {high:.3g})"


def draw(found: Mapping[str, Any], unit: str, path: Path) -> None:
    """The curves, a row a recipe, a panel a measure, over the cost in a unit."""
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
                    [p[unit] for p in points], [c["mean"] for c in cells], [c["half_width"] or 0 for c in cells],
                    fmt=style, capsize=3, markersize=4, linewidth=1.2, label=side,
                )  # fmt: skip
            panel.axhline(base, color="#999999", linewidth=1, linestyle=":", zorder=0, label="base, 40 steps")
            if (target := contest["races"][0]["targets"].get(name)) is not None:
                panel.axhline(target, color="#36648b", linewidth=0.8, zorder=0, label="target")
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:,.0f}")
            panel.set_title(f"{recipe}: {name}", fontsize=8)
            panel.set_xlabel(COSTS[unit], fontsize=8)
            panel.tick_params(labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
            panel.legend(frameon=False, fontsize=7)
    figure.savefig(path)
