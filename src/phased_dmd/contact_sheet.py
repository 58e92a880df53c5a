"""Contact sheets: samples in columns under their prompts, a row for each that made them, large enough to be seen.

A sheet says what it shows in a text of its PNG, so that a page can cut the pictures out of it again.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from phased_dmd.media import as_shown, enlarged, opened, to_images

LEAST = 128  # pixels a side that a small picture is enlarged to, in whole steps
GAP, MARGIN = 8, 16  # pixels between pictures, and around them all
LINES = 3  # of a caption, at most
KEY = "phased-dmd"  # of the text in a PNG
INK, MUTED = "#1d1d1b", "#686862"


class Caption(NamedTuple):
    """Says what a sample was told, and the seed of its noise, where it has one of its own."""

    prompt: str
    seed: int | None

    def __str__(self) -> str:
        """Returns the words under which a sample is drawn, without a prompt that the font has no letters for."""
        drawn = all(ord(c) < 0x590 or 0x2000 <= ord(c) < 0x2500 for c in self.prompt)
        seed = "" if self.seed is None else f"seed {self.seed}"
        return ", ".join(filter(None, (self.prompt if drawn else "", seed)))


@dataclass(frozen=True)
class Layout:
    """Says where a sheet has which picture.

    rows: who made each row. captions: of each sample. frames: of a clip, side by side. tile: width and height of a
    frame. factor: how often each of its pixels is repeated. places: by row and sample, where the first frame begins.
    """

    rows: Sequence[str]
    captions: Sequence[Caption]
    frames: int
    tile: tuple[int, int]
    factor: int
    places: Sequence[Sequence[tuple[int, int]]]


def save_sheet(path: Path, rows: Mapping[str, Tensor], captions: Sequence[Caption]) -> None:
    """Writes a PNG of rows [n, f, h, w, 3] in [0, 1] by their names, of pictures (f = 1) or of few frames of clips."""
    first = next(iter(rows.values()))
    factor = max(1, round(LEAST / min(first.shape[2:4])))
    shown = {name: to_images(enlarged(pixels.flatten(0, 1), factor)) for name, pixels in rows.items()}
    frames, tile = first.shape[1], next(iter(shown.values()))[0].size
    font = _font(max(13, min(32, tile[1] // 11)))
    lines = [_wrapped(str(caption), frames * tile[0], font) for caption in captions]
    layout, size, heads, line = _laid_out(list(shown), captions, lines, frames, tile, factor, font)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, images) in enumerate(shown.items()):
        for i, (x, y) in enumerate(layout.places[number]):
            for frame in range(frames):
                sheet.paste(images[i * frames + frame], (x + frame * tile[0], y))
            if x == layout.places[number][0][0]:
                draw.text((MARGIN, y + tile[1] / 2), name, INK, font, anchor="lm")
    for text, (x, y) in zip(lines, heads, strict=True):
        for i, words in enumerate(text):
            draw.text((x, y + (i - len(text)) * line), words, MUTED, font, anchor="la")
    about = PngImagePlugin.PngInfo()
    about.add_itxt(KEY, json.dumps(asdict(layout), ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG", pnginfo=about)


def _laid_out(
    names: list[str], captions: Sequence[Caption], lines: Sequence[Sequence[str]], frames: int, tile: tuple[int, int],
    factor: int, font: ImageFont.FreeTypeFont,
) -> tuple[Layout, tuple[int, int], list[tuple[int, int]], int]:  # fmt: skip
    """Returns the layout, the sheet's size, the point below each caption, and a line's height."""
    count, line = len(captions), round(1.35 * font.size)
    left = MARGIN + max(round(font.getlength(name)) for name in names) + (2 * GAP if any(names) else 0)
    across, down = frames * tile[0] + GAP, tile[1] + GAP // 2
    head = max(map(len, lines)) * line + GAP
    band = head + len(names) * down + GAP
    least = 1 if frames > 1 else next(c for c in range(1, count + 1) if _is_wide(c, count, across, band))
    columns = next((c for c in range(least, 3 * least // 2 + 1) if count % c == 0), least)  # the last line full
    begins = [(left + i % columns * across, MARGIN + i // columns * band + head) for i in range(count)]
    places = [[(x, y + row * down) for x, y in begins] for row in range(len(names))]
    size = left + columns * across + MARGIN, 2 * MARGIN + math.ceil(count / columns) * band
    return Layout(names, captions, frames, tile, factor, places), size, [(x, y - GAP // 2) for x, y in begins], line


def _is_wide(columns: int, count: int, across: int, band: int) -> bool:
    """Says whether a sheet of so many columns is half as wide again as high, as a screen is, or has all in a line."""
    return columns == count or columns * across >= 1.5 * math.ceil(count / columns) * band


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Returns matplotlib's own font, which is there wherever the package is."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Breaks a text into lines of a width in pixels; of more than LINES, the end of the last seed stays."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"… {lines[-1]}"]
    return [_cut(line, width, font) for line in lines]


def _cut(line: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Shortens a line that is wider than so many pixels."""
    while font.getlength(line) > width and len(line) > 1:
        line = f"{line[:-2]}…"
    return line


def read_sheet(path: Path) -> tuple[Layout, list[list[list[Image.Image]]]] | None:
    """Reads the layout of a sheet and, by row and sample, the frames as they were before they were enlarged.

    Returns None for a picture that is no sheet; a UserError for a file that is no picture.
    """
    with opened(path) as file:
        file.load()
        text = getattr(file, "text", {}).get(KEY)
        if text is None:
            return None
        told, pixels = json.loads(text), np.asarray(as_shown(file))
        told["captions"] = [Caption(*caption) for caption in told["captions"]]
        layout = Layout(**told)
    w, h = layout.tile

    def frames(x: int, y: int) -> list[Image.Image]:
        step = layout.factor
        begins = range(x, x + layout.frames * w, w)
        return [Image.fromarray(pixels[y : y + h : step, begin : begin + w : step]) for begin in begins]

    return layout, [[frames(*place) for place in row] for row in layout.places]
