"""The samples of a page: thumbnails as data URLs, a column a noise, a row a generator."""

import base64
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageSequence

from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate import slug
from phased_dmd.lab.report.runs import Group, Run, base_rows
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


@dataclass(frozen=True)
class Row:
    """A generator's samples, a column each: stills or clips, and of clips the frames side by side too."""

    name: str
    detail: str
    seed: int | None
    pictures: list[Picture]
    frames: list[Picture]


@dataclass(frozen=True)
class Sheet:
    """A prompt set's samples; prompts: each with the number of columns in a row that are its own."""

    name: str
    about: str
    prompts: list[tuple[str, int]]
    seeds: list[int]
    rows: list[Row]
    clips: bool


def embed(path: Path, box: tuple[int, int] = BOX, shown: int = SHOWN) -> Picture:
    """A file as it is where it is small, else a lossy WebP that fits the box, animated as the file is."""
    try:
        with opened(path) as image:
            if min(image.size) <= SMALL:
                factor = max(1, round(shown / min(image.size)))
                kind, data = (image.format or "").lower(), path.read_bytes()
                return Picture(_data_url(data, kind), factor * image.width, factor * image.height, True)
            frames = [_fit(frame, box) for frame in ImageSequence.Iterator(image)]
            duration = image.info.get("duration", 0)
    except UserError as error:
        raise UserError(f"{error}; evaluate the run again") from error
    buffer, (first, *rest) = io.BytesIO(), frames
    animation = {"save_all": True, "append_images": rest, "duration": duration, "loop": 0} if rest else {}
    first.save(buffer, "WEBP", quality=QUALITY, **animation)
    return Picture(_data_url(buffer.getvalue(), "webp"), *first.size, pixelated=False)


def _fit(frame: Image.Image, box: tuple[int, int]) -> Image.Image:
    frame = as_shown(frame)
    frame.thumbnail(box, Image.Resampling.LANCZOS)
    return frame


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def make_sheets(groups: Sequence[Group]) -> list[Sheet]:
    """A sheet for each prompt set; of samples without pictures, a scatter plot a row."""
    return [_sheet(groups, name, s["about"]) for name, s in groups[0].runs[0].evaluation["sets"].items()]


def _sheet(groups: Sequence[Group], name: str, about: str) -> Sheet:
    shown = groups[0].runs[0].shown.get(name, [])
    rows = [Row(row, "", None, *_files(run, name, row)) for row, run in base_rows(groups, name).items()]
    for group in groups:
        rows += [Row(run.row, group.detail, run.config.seed, *_files(run, name, run.row)) for run in group.runs]
    prompts = itertools.groupby(sample["prompt"] for sample in shown)
    return Sheet(
        name, about, [(prompt, len(list(same))) for prompt, same in prompts],
        [sample["seed"] for sample in shown], rows, clips=any(row.frames for row in rows),
    )  # fmt: skip


def _files(run: Run, name: str, row: str) -> tuple[list[Picture], list[Picture]]:
    """A row's pictures, and where they are clips their frames, in the order of the columns."""
    folder = run.path / "samples" / name / slug(row)
    if name not in run.shown:
        return [embed(folder / "points.png", PLOT)], []
    stems = [f"{i:02d}" for i in range(len(run.shown[name]))]
    if not (folder / "00.webp").exists():
        return [embed(folder / f"{stem}.png") for stem in stems], []
    frames = [embed(folder / f"{stem}-frames.png", STRIP, SHOWN_STRIP) for stem in stems]
    return [embed(folder / f"{stem}.webp") for stem in stems], frames
