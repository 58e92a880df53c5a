"""Picture files as a viewer shows them, which is what a person chose them by."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from phased_dmd.errors import UserError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # none of them runs another program
ON_THEIR_SIDE = (5, 6, 7, 8)  # values of EXIF's orientation
PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # chunks that may come behind the pixels


def read_picture(path: Path) -> Image.Image:
    """A picture, or an animation's first frame, in RGB as `as_shown`."""
    with opened(path) as picture:
        return as_shown(picture)


def shown_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture as it is shown; from the file's head where that tells."""
    with opened(path) as picture:
        if picture.format == "TIFF":  # Pillow turns these itself, some versions the size alone beforehand
            return as_shown(picture).size
        if picture.format == "PNG" and not any(name in path.read_bytes() for name in PNG_EXIF):
            return picture.size
        on_its_side = picture.getexif().get(ExifTags.Base.Orientation) in ON_THEIR_SIDE
        width, height = picture.size
        return (height, width) if on_its_side else (width, height)


def as_shown(picture: Image.Image) -> Image.Image:
    """In RGB: turned as its EXIF says, 16 bits of grey scaled to 8, and what is transparent on white.

    White is what pages and most viewers put behind a picture; the colours stored under transparency are whatever a
    program left there, and nobody has seen them. Numbers without a white of their own are a ValueError.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):
        numbers = np.asarray(picture).astype(np.int64)
        if numbers.min() < 0 or numbers.max() > 65535:
            raise ValueError("its pixels are numbers beyond 16 bits; save it with 8 or 16 bits")
        grey = (numbers + 128) // 257
        grey[numbers == picture.info.get("transparency")] = 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A picture file; within it, too, all that is wrong with it is a UserError, and Pillow warns of nothing."""
    try:
        if not path.is_file():
            holder = next((parent for parent in path.parents if parent.is_file()), None)
            raise OSError(f"it is inside {holder}; save it as a file of its own" if holder else "no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as picture:
                yield picture
    except Exception as error:  # Pillow's plugins raise OSError, ValueError, SyntaxError, its own: all mean a bad file
        raise UserError(f"{path}: cannot be read as a picture ({' '.join(str(error).split())})") from error
