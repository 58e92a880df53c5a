"""Picture files come in as a viewer shows them, whatever they are stored as."""

import io
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from phased_dmd.errors import UserError
from phased_dmd.lab.report.sheets import embed
from phased_dmd.media import read_media, read_picture, shown_size

Y, X = np.mgrid[:48, :32]
SHOWN = np.stack([4 * X, 2 * Y, 60 + 0 * X], -1).astype(np.uint8)  # a portrait of 32 x 48
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # by the orientation that turns it back, as EXIF 2.3 has it
    1: lambda p: p, 2: np.fliplr, 3: lambda p: np.rot90(p, 2), 4: np.flipud, 5: lambda p: np.swapaxes(p, 0, 1),
    6: lambda p: np.rot90(p, 1), 7: lambda p: np.rot90(np.swapaxes(p, 0, 1), 2), 8: lambda p: np.rot90(p, -1),
}  # fmt: skip
OPTIONS = {"png": {}, "webp": {"lossless": True}, "tiff": {}, "jpg": {"quality": 95, "subsampling": 0}}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def save(path: Path, pixels: np.ndarray, orientation: int, **options: Any) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("suffix", OPTIONS)
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_is_turned_as_its_exif_says_and_so_is_its_size(orientation: int, suffix: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"p.{suffix}", STORED[orientation](SHOWN), orientation, **OPTIONS[suffix])
    assert shown_size(path) == read_picture(path).size == (32, 48)
    found = np.asarray(read_picture(path)).astype(int)
    assert np.abs(found - SHOWN).max() <= (6 if suffix == "jpg" else 0)


def test_exif_behind_a_pngs_pixels_turns_it_too(tmp_path: Path) -> None:
    data = save(tmp_path / "p.png", STORED[6](SHOWN), 6).read_bytes()
    at = data.index(b"eXIf") - 4
    chunk = data[at : at + 12 + int.from_bytes(data[at : at + 4], "big")]
    end = data.index(b"IEND") - 4
    (tmp_path / "p.png").write_bytes(data[:at] + data[at + len(chunk) : end] + chunk + data[end:])
    assert shown_size(tmp_path / "p.png") == read_picture(tmp_path / "p.png").size == (32, 48)


# ---------------------------------------------------------------- 16 bits

GREY = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)


def grey16(path: Path, kind: str) -> Path:
    pixels = GREY.astype({"big": ">u2", "int32": "<i4"}.get(kind, "<u2"))
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("name", ["p.png", "p.tiff", "big.tiff", "int32.tiff"])
def test_grey_of_16_bits_is_scaled_to_8(name: str, tmp_path: Path) -> None:
    """65535 is white: a 257th of it is 255."""
    path = grey16(tmp_path / name, name.partition(".")[0])
    with Image.open(path) as stored:
        assert stored.mode.startswith("I")
    assert np.array_equal(np.asarray(read_picture(path)), np.rint(GREY / 257).astype(np.uint8)[..., None].repeat(3, 2))


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8), "floating-point"),
        (np.full((8, 8), 65536, np.int32), "beyond 16 bits"),
        (np.full((8, 8), -1, np.int32), "beyond 16 bits"),
    ],
)
def test_numbers_that_have_no_white_are_refused_in_one_line(pixels: np.ndarray, says: str, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "p.tiff")
    with pytest.raises(UserError, match=rf"p\.tiff: cannot be read as a picture \(.*{says}.*save it with 8 or 16 bits"):
        read_picture(tmp_path / "p.tiff")


# ---------------------------------------------------------------- transparency and colour


def transparent(path: Path, kind: str) -> Path:
    """Three pixels: red, red that is transparent, and where the kind has it red that is half transparent."""
    alpha, red = np.array([[255, 0, 128]], np.uint8), np.array([[[255, 0, 0]] * 3], np.uint8)
    match kind:
        case "RGBA":
            Image.fromarray(np.concatenate([red, alpha[..., None]], 2)).save(path, lossless=True)
        case "LA":
            Image.fromarray(np.stack([0 * alpha, alpha], -1)).save(path)
        case "palette":
            picture = Image.fromarray(np.array([[0, 1, 0]], np.uint8), "P")
            picture.putpalette([255, 0, 0, 255, 0, 0])
            picture.save(path, transparency=1)
        case "palette of alphas":
            picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
            picture.putpalette([255, 0, 0] * 3)
            picture.save(path, transparency=alpha.tobytes())
        case "colour":
            Image.fromarray(np.array([[[255, 0, 0], [255, 0, 1], [255, 0, 0]]], np.uint8)).save(
                path, transparency=(255, 0, 1)
            )
        case "16 bits":
            Image.fromarray(np.array([[0, 1, 0]], np.uint16)).save(path, transparency=1)
    return path


RED, BLACK, WHITE = (255, 0, 0), (0, 0, 0), (255, 255, 255)
TRANSPARENT = [
    ("p.png", "RGBA", [RED, WHITE, (255, 127, 127)]), ("p.webp", "RGBA", [RED, WHITE, (255, 127, 127)]),
    ("p.png", "LA", [BLACK, WHITE, (127, 127, 127)]), ("p.png", "palette", [RED, WHITE, RED]),
    ("p.gif", "palette", [RED, WHITE, RED]), ("p.png", "palette of alphas", [RED, WHITE, (255, 127, 127)]),
    ("p.png", "colour", [RED, WHITE, RED]), ("p.png", "16 bits", [BLACK, WHITE, BLACK]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "shown"), TRANSPARENT)
def test_what_is_transparent_is_white_and_hides_its_colour(
    name: str, kind: str, shown: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    path = transparent(tmp_path / name, kind)
    found = np.asarray(read_picture(path)).astype(int)
    assert np.abs(found - [shown]).max() <= 1  # a half of 255 may be rounded either way
    assert (read_media(path)[0].mul(255).round().int() == torch.from_numpy(found)).all()


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_an_alpha_that_is_opaque_changes_nothing(suffix: str, tmp_path: Path) -> None:
    opaque = np.concatenate([SHOWN, np.full((48, 32, 1), 255, np.uint8)], 2)
    Image.fromarray(opaque).save(tmp_path / f"p.{suffix}", lossless=True)
    assert np.array_equal(np.asarray(read_picture(tmp_path / f"p.{suffix}")), SHOWN)


def test_other_kinds_of_pixels_become_the_colours_they_stand_for(tmp_path: Path) -> None:
    ink = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    ink.save(tmp_path / "ink.jpg", quality=100)
    Image.new("1", (8, 8), 1).save(tmp_path / "bit.png")
    Image.new("L", (8, 8), 100).save(tmp_path / "grey.bmp")
    for name, colour in {"ink.jpg": (0, 255, 255), "bit.png": WHITE, "grey.bmp": (100, 100, 100)}.items():
        assert np.abs(np.asarray(read_picture(tmp_path / name)).astype(int) - colour).max() <= 2


# ---------------------------------------------------------------- whoever reads


def test_samples_and_thumbnails_are_shown_alike(tmp_path: Path) -> None:
    """A folder of samples, --real, and the report's thumbnails; each frame of an animation."""
    large = np.kron(SHOWN, np.ones((8, 8, 1), np.uint8))
    path = save(tmp_path / "p.png", STORED[6](large), 6)
    assert np.array_equal(read_media(path)[0][0].mul(255).round().byte().numpy(), large)
    shown = embed(path, (100, 150))
    assert (shown.width, shown.height) == (100, 150)
    clear, red = Image.new("RGBA", (160, 160), (255, 0, 0, 0)), Image.new("RGBA", (160, 160), (255, 0, 0, 255))
    clear.save(tmp_path / "c.webp", save_all=True, append_images=[red], duration=100, lossless=True)
    frames = read_media(tmp_path / "c.webp")[0]
    assert (frames[0] == 1).all() and (frames[1, ..., 0] == 1).all() and (frames[1, ..., 1:] == 0).all()


@pytest.mark.parametrize("damage", ["cut", "sum", "bomb", "text"])
def test_a_damaged_picture_is_one_line_whatever_pillow_raises(damage: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(SHOWN).save(buffer, "PNG")
    data = buffer.getvalue()
    match damage:
        case "cut":
            data = data[: len(data) // 2]
        case "sum":
            data = data.replace(b"IDAT", b"IDAZ", 1)
        case "bomb":
            head = b"IHDR" + (2**16).to_bytes(4, "big") * 2 + data[24:29]
            data = data[:12] + head + zlib.crc32(head).to_bytes(4, "big") + data[33:]
        case "text":
            info = PngImagePlugin.PngInfo()
            info.add_text("a", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
            Image.fromarray(SHOWN).save(buffer := io.BytesIO(), "PNG", pnginfo=info)
            data = buffer.getvalue()
    (tmp_path / "p.png").write_bytes(data)
    for read in (read_picture, read_media):
        with pytest.raises(UserError, match=r"^[^\n]*p\.png: cannot be read as a picture \([^\n]+\)$"):
            read(tmp_path / "p.png")
