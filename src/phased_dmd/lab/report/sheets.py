"""The samples of a page: thumbnails as data URLs, a column a noise, a row a generator."""

import base64
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence

from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate import slug
from phased_dmd.lab.report.runs import Group, ReportedRun, base_rows
from phased_dmd.media import as_shown, opened

SMALL = 128  # pixels of the shorter side, up to which a file is taken as it is
BOX, PLOT = (256, 256), (512, 512)  # the most pixels of a thumbnail, and of a scatter plot's
STRIP = 16383, 96  # of one with a clip's frames side by side; WebP can hold no wider one
SHOWN, SHOWN_STRIP = 96, 64  # pixels that a small picture is enlarged to, in whole steps
QUALITY = 80


@dataclass(frozen=True)
class Picture:
    """An image as a data URL, the pixels it is shown at, and whether these are whole multiples of its own."""

    url: str
    width: int
    height: int
    pixelated: bool


def embed(path: Path, box: tuple[int, int] = BOX, shown: int = SHOWN) -> Picture:
    """Embeds a small file as it is, another as a lossy WebP that fits the box, animated as the file is.

    A UserError says what is wrong with one that is no picture.
    """
    return _embedded(path, path.stat().st_mtime_ns if path.exists() else 0, box, shown)


@lru_cache(maxsize=1024)
def _embedded(path: Path, _changed: int, box: tuple[int, int], shown: int) -> Picture:
    """Embeds a file, once for all pages that are made of it while it does not change."""
    try:
        with opened(path) as image:
            if min(image.size) <= SMALL:
                factor = max(1, round(shown / min(image.size)))
                kind, data = (image.format or "").lower(), path.read_bytes()
                return Picture(_data_url(data, kind), factor * image.width, factor * image.height, True)
            frames = [as_shown(frame) for frame in ImageSequence.Iterator(image)]
            duration = image.info.get("duration", 0)
    except UserError as error:
        raise UserError(f"{error}; evaluate the run again") from error
    return picture_of(frames, duration, box)


def picture_of(frames: Sequence[Image.Image], duration: int, box: tuple[int, int] = BOX, shown: int = SHOWN) -> Picture:
    """Embeds a picture, or a clip of frames of `duration` milliseconds: a small one without loss, another as a lossy
    WebP that fits the box.
    """
    small = min(frames[0].size) <= SMALL
    if not small:
        for frame in frames:
            frame.thumbnail(box, Image.Resampling.LANCZOS)
    buffer, (first, *rest) = io.BytesIO(), frames
    animation: dict[str, Any] = {"append_images": rest, "duration": duration, "loop": 0, "save_all": True}
    if small and not rest:
        first.save(buffer, "PNG", optimize=True)
    else:
        first.save(buffer, "WEBP", quality=QUALITY, lossless=small, **(animation if rest else {}))
    factor = max(1, round(shown / min(first.size))) if small else 1
    kind = "webp" if rest or not small else "png"
    return Picture(_data_url(buffer.getvalue(), kind), factor * first.width, factor * first.height, small)


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def make_sheets(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Returns a sheet for each prompt set, as the page's template takes it; samples of points are a scatter plot a row.

    prompts: each with the number of columns in a row that are its own. seeds: of the noise, by column. Of a row, `seed`
    is the training seed, `frames` are pictures of a clip's frames side by side.
    """
    sheets = []
    for name, of_set in (groups[0].runs[0].sets if groups else {}).items():
        shown = groups[0].runs[0].shown.get(name, [])
        rows = [
            {"name": row, "detail": "", "seed": None, **_files(run, name, row)}
            for row, run in base_rows(groups, name).items()
        ] + [
            {"name": run.row, "detail": group.detail, "seed": run.config.seed, **_files(run, name, run.row)}
            for group in groups
            for run in group.runs
        ]
        prompts = itertools.groupby(sample["prompt"] for sample in shown)
        sheets.append({
            "name": name, "about": of_set["about"], "prompts": [(prompt, len(list(same))) for prompt, same in prompts],
            "seeds": [sample["seed"] for sample in shown], "rows": rows, "clips": any(row["frames"] for row in rows),
        })  # fmt: skip
    return sheets


def _files(run: ReportedRun, name: str, row: str) -> dict[str, list[Picture]]:
    """Returns a row's pictures, and the frames of clips, in the order of the columns."""
    folder = run.path / "samples" / name / slug(row)
    if name not in run.shown:
        return {"pictures": [embed(folder / "points.png", PLOT)], "frames": []}
    stems = [f"{i:02d}" for i in range(len(run.shown[name]))]
    if not (folder / "00.webp").exists():
        return {"pictures": [embed(folder / f"{stem}.png") for stem in stems], "frames": []}
    frames = [embed(folder / f"{stem}-frames.png", STRIP, SHOWN_STRIP) for stem in stems]
    return {"pictures": [embed(folder / f"{stem}.webp") for stem in stems], "frames": frames}
