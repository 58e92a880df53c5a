"""What `peer` found, as Markdown."""

import json
from collections.abc import Mapping
from typing import Any

from contests import FAST
from cost_page import head, line, seeds, times
from peer import PEER

NAME = "NVIDIA's Model Optimizer (`nvidia-modelopt`, DMD2 of `modelopt.torch.fastgen`)"


def show_peer(found: Mapping[str, Any]) -> list[str]:
    """Curves, ratios and memory as lines of Markdown."""
    ladder = "; ".join(f"{n} updates: {json.dumps(o)[1:-1]}" for n, o in found["ladder"].items()).replace('"', "")
    rows = [line(p, found["base"]) for side in (PEER, FAST) for p in found["curves"][side]]
    return [
        f"{NAME}, data-free, beside `fast`: the same teacher, prompts, batch, grid, seeds and measures. "
        f"Seeds {seeds(found)}. The peer's own tuning found best, by budget: {ladder}.", "",
        *head(found), *rows, "", *verdict(found["races"][0]), "", *memory(found["memory"], found["memory_ratio"]),
    ]  # fmt: skip


def verdict(found: Mapping[str, Any]) -> list[str]:
    reached, ratios, middle = found["reached"], found["ratios"], found["middle"]
    names = list(found["targets"])
    cells = [", ".join(f"{name} {found['targets'][name]:.4g}" for name in names)]
    cells += [f"{reached[PEER][unit]:,.0f} / {shown(reached[FAST][unit])}" for unit in ratios]
    cells += [times(ratios[unit], *middle["ratios"][unit]) for unit in ratios]
    told = [
        "What the peer's best costs it, and ours to reach it and keep it. In brackets the middle 95 % of a thousand "
        "bootstrap draws of the seeds; a draw in which ours does not get there counts as 0.", "",
        "| the peer's best | forwards, peer / ours | CPU s, peer / ours | fewer calls | less CPU time |",
        "|---|---|---|---|---|", f"| {' | '.join(cells)} |", "",
        "At the CPU seconds of the peer's best, its value over ours:", "",
        f"| {' | '.join(names)} |", "|" + "---|" * len(names),
    ]  # fmt: skip
    ahead = [times(found["distances"][name], *middle["distances"][name]) for name in names]
    return [*told, f"| {' | '.join(ahead)} |"]


def shown(cost: float | None) -> str:
    return "not reached" if cost is None else f"{cost:,.0f}"


def memory(peaks: Mapping[str, Mapping[str, int]], ratio: float) -> list[str]:
    told = [
        "What an update holds at its most, MB; networks, optimisers and averages stay throughout.", "",
        "| side | networks and optimisers | gradients | saved for backward | in all |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for side, peak in peaks.items():
        told.append(f"| {side} | " + " | ".join(f"{size / 1e6:.1f}" for size in peak.values()) + " |")
    return [*told, "", f"Ours over the peer's: {ratio:.2f}."]
