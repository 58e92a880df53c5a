"""The previews of a page: each sample of the base's beside what the generator made of it, iteration by iteration."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from phased_dmd.contact_sheet import Layout, read_sheet
from phased_dmd.errors import UserError
from phased_dmd.lab.report.sheets import PLOT, Picture, embed, picture_of

NAME = re.compile(r"phase-(\d+)-iteration-(\d+)\.png", re.ASCII)
MOST = 40  # previews on a page: of more the last and, evenly, others
FRAME = 200  # milliseconds that a preview's frame of a clip is shown, which stands for several


def make_gallery(folder: Path) -> dict[str, Any]:
    """Returns the previews in a folder of samples, as the page's template takes them.

    steps: the title of each preview, in the order of training. left_out: how many others there are. phases: of each
    phase its `samples`, with the base's picture, if there is one, and by the number of the step the generator's;
    `plots` by step of a model of points.
    """
    files = sorted((int(m[1]), int(m[2]), path) for path in folder.glob("*.png") if (m := NAME.fullmatch(path.name)))
    read = []
    for phase, iteration, path in _thinned(files):
        stat = path.stat()
        read.append((phase, iteration, _pictures(path, stat.st_mtime_ns, stat.st_size)))
    phases: dict[int, dict[str, Any]] = {}
    for step, (phase, _, (layout, rows)) in enumerate(read):
        of_phase = phases.setdefault(phase, {"phase": phase, "steps": [], "samples": [], "plots": {}, "base": ""})
        of_phase["steps"].append(step)
        if layout is None:
            of_phase["plots"][step] = rows[0][0]
        else:
            _add(of_phase, step, layout, rows)
    titles = [f"phase {phase}, iteration {iteration}" for phase, iteration, _ in read]
    return {"steps": titles, "left_out": len(files) - len(read), "phases": list(phases.values())}


def _add(of_phase: dict[str, Any], step: int, layout: Layout, rows: list[list[Picture]]) -> None:
    """Adds a preview's pictures to those of its phase; the base's are the same in all of them."""
    if not of_phase["samples"]:
        base = rows[0] if len(rows) > 1 else [None] * len(rows[0])
        of_phase["base"] = layout.rows[0] if len(rows) > 1 else ""
        of_phase["width"] = rows[-1][0].width
        of_phase["samples"] = [
            {"caption": caption, "base": picture, "made": {}}
            for caption, picture in zip(layout.captions, base, strict=True)
        ]
    for sample, picture in zip(of_phase["samples"], rows[-1], strict=False):
        sample["made"][step] = picture


def _thinned(files: list[Any]) -> list[Any]:
    """Returns MOST of a list at most, the last among them, evenly spread."""
    count = min(len(files), MOST)
    return [files[(i + 1) * len(files) // count - 1] for i in range(count)]


@lru_cache(maxsize=4 * MOST)
def _pictures(path: Path, _changed: int, _size: int) -> tuple[Layout | None, list[list[Picture]]]:
    """Returns a preview's layout and pictures by row and sample; of one that is no sheet the whole picture."""
    try:
        sheet = read_sheet(path)
        if sheet is None:
            return None, [[embed(path, PLOT)]]
    except UserError as error:
        raise UserError(f"{error}; remove it") from error
    layout, rows = sheet
    return layout, [[picture_of(frames, FRAME) for frames in row] for row in rows]
