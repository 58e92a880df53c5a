"""Rows of one sample set side by side: their figures, and the pictures that are kept of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phased_dmd.checkpoint import write_atomically
from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate.instruments import Instruments, Readings
from phased_dmd.lab.evaluate.measures import Figure, Law, figures, plain, statistics
from phased_dmd.lab.evaluate.mixtures import mixture_statistics
from phased_dmd.lab.evaluate.sample_sets import SampleSet
from phased_dmd.lab.evaluate.samples import Row
from phased_dmd.media import grid, save_clip, save_image, save_points
from phased_dmd.models.analytic import ExactMixture
from phased_dmd.sampling.sampler import WAN_FPS

STRIP = 96  # pixels, at most, of the height of a clip's frames side by side


def compare(
    rows: Mapping[str, Row], chosen: SampleSet, floor: Row | None, tools: Instruments, folder: Path,
    seen: dict[str, Readings],
) -> dict[str, Any]:  # fmt: skip
    """Rows of pictures or clips, the base's many-step one first, as `evaluation.json` holds them.

    floor: the base's samples of other seeds. folder: of the pictures. seen: readings by a row's key, which are not
    taken again.
    """

    def read(row: Row) -> Readings:
        if row.key is None:
            return tools.read(row, chosen)
        if row.key not in seen:
            seen[row.key] = tools.read(row, chosen)
        return seen[row.key]

    readings, base = {name: read(row) for name, row in rows.items()}, next(iter(rows))
    if len({found["features"].shape[1] for found in readings.values()}) > 1:
        raise UserError("the samples that are compared are clips of different lengths")
    laws = {"": Law(read(floor))} if floor else {}
    laws["_paired"] = Law(readings[base], laws[""].basis if floor else None, paired=True)
    found = figures({n: statistics(r, chosen, laws, tools.real) for n, r in readings.items()}, base, chosen.groups)
    for name, row in rows.items():
        save_shown(row, chosen, readings[base]["features"].shape[1] > 1, folder / chosen.name / slug(name))
    return described(chosen, rows, found)


def compare_with_mixture(rows: Mapping[str, Row], chosen: SampleSet, exact: ExactMixture, folder: Path) -> dict:
    """The same for an analytic teacher's samples."""
    points = {name: row.pixels(range(len(chosen.seeds))) for name, row in rows.items()}
    found = figures({n: mixture_statistics(p, exact) for n, p in points.items()}, next(iter(rows)), chosen.groups)
    for name, cloud in points.items():
        save_points(folder / chosen.name / slug(name) / "points.png", name, cloud[:, :2], exact.means[:, :2].cpu())
    return described(chosen, rows, found)


def described(chosen: SampleSet, rows: Mapping[str, Row], found: dict[str, dict[str, Figure]]) -> dict[str, Any]:
    """A set with the figures of each row, and what its samples cost."""
    base = next(iter(rows.values()))
    for name, row in rows.items():
        if row.calls is not None and base.calls is not None:
            found[name]["network_calls"] = plain(row.calls, base.calls)
        if row.seconds is not None and base.seconds is not None:
            found[name]["seconds_a_sample"] = plain(row.seconds, base.seconds)
    return {"about": chosen.about, "base": next(iter(rows)), "rows": found}


def slug(row: str) -> str:
    """The name of a row's folder of pictures."""
    return row.replace(", ", "-").replace(" ", "-")


def save_shown(row: Row, chosen: SampleSet, clips: bool, folder: Path) -> None:
    """The shown samples of a row, a file each; of a clip also its frames side by side."""
    indices = chosen.shown(clips)
    about = [{"prompt": chosen.prompts[i].text, "seed": chosen.seeds[i]} for i in indices]
    write_atomically(folder.parent / "shown.json", (json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode())
    for place, i in enumerate(indices):
        pixels = row.pixels([i])
        if clips:
            save_clip(pixels[0], folder / f"{place:02d}.webp", row.fps or WAN_FPS)
            save_image(grid(pixels, most=STRIP), folder / f"{place:02d}-frames.png")
        else:
            save_image(grid(pixels), folder / f"{place:02d}.png")
