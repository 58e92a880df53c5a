"""Contact sheets: large enough to be seen, with captions, and exactly what was put in comes out again."""

from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from phased_dmd.contact_sheet import LEAST, Caption, Layout, read_sheet, save_sheet

SHAPES = {"stills": (16, 1, 32, 32), "clips": (5, 9, 16, 24), "one": (1, 1, 8, 8), "large": (4, 1, 300, 500)}


def pixels(*shape: int, seed: int) -> torch.Tensor:
    """Whole numbers of 255ths, so that a file holds them exactly."""
    return torch.randint(256, (*shape, 3), generator=torch.Generator().manual_seed(seed)).float() / 255


def captions(count: int, prompt: str = "a handwritten seven moving right fast") -> list[Caption]:
    return [Caption(prompt, seed) for seed in range(count)]


def layout_of(path: Path) -> Layout:
    sheet = read_sheet(path)
    assert sheet is not None
    return sheet[0]


@pytest.mark.parametrize("kind", SHAPES)
def test_what_is_on_a_sheet_can_be_cut_out_again(kind: str, tmp_path: Path) -> None:
    rows = {"base, 40 steps": pixels(*SHAPES[kind], seed=0), "iteration 3": pixels(*SHAPES[kind], seed=1)}
    save_sheet(tmp_path / "s.png", rows, captions(SHAPES[kind][0]))
    sheet = read_sheet(tmp_path / "s.png")
    assert sheet is not None
    layout, found = sheet
    assert list(layout.rows) == list(rows) and list(layout.captions) == captions(SHAPES[kind][0])
    for of_row, given in zip(found, rows.values(), strict=True):
        frames = np.stack([np.stack([np.asarray(frame) for frame in sample]) for sample in of_row])
        assert np.array_equal(frames, given.mul(255).round().byte().numpy())


@pytest.mark.parametrize("kind", SHAPES)
def test_pictures_are_large_enough_and_none_lies_on_another(kind: str, tmp_path: Path) -> None:
    rows = {name: pixels(*SHAPES[kind], seed=0) for name in ("base", "own")}
    save_sheet(tmp_path / "s.png", rows, captions(SHAPES[kind][0]))
    layout = layout_of(tmp_path / "s.png")
    with Image.open(tmp_path / "s.png") as image:
        width, height = image.size
    (w, h), places = layout.tile, [place for row in layout.places for place in row]
    assert min(w, h) >= LEAST * 3 / 4, "whole multiples of 24 and 32 come near it"
    assert all(0 <= x <= width - layout.frames * w and 0 <= y <= height - h for x, y in places)
    for (x, y), (other_x, other_y) in combinations(places, 2):
        assert abs(x - other_x) >= layout.frames * w or abs(y - other_y) >= h
    for (x, base), (other_x, own) in zip(*layout.places, strict=True):
        assert x == other_x and base < own, "the base stands above"


def test_a_small_picture_is_enlarged_without_smoothing(tmp_path: Path) -> None:
    given = pixels(1, 1, 32, 32, seed=0)
    save_sheet(tmp_path / "s.png", {"": given}, captions(1))
    layout = layout_of(tmp_path / "s.png")
    ((x, y),) = layout.places[0]
    shown = np.asarray(Image.open(tmp_path / "s.png"))[y : y + 128, x : x + 128]
    assert np.array_equal(shown, np.kron(given[0, 0].mul(255).round().byte().numpy(), np.ones((4, 4, 1), np.uint8)))


def test_captions_and_names_of_rows_are_drawn(tmp_path: Path) -> None:
    """Beside white pictures everything that is not white is a letter."""

    def letters(name: str, prompt: str, seed: int | None) -> np.ndarray:
        save_sheet(tmp_path / "s.png", {name: torch.ones(1, 1, 200, 200, 3)}, [Caption(prompt, seed)])
        return np.asarray(Image.open(tmp_path / "s.png").convert("L")) < 255

    assert not letters("", "", None).any()
    seven, two = letters("", "a seven", None), letters("", "a two", None)
    assert seven.any() and two.any() and not np.array_equal(seven, two)
    assert letters("base, 40 steps", "", None).any()
    assert np.array_equal(letters("", "一只狐狸", 3), letters("", "", 3)), "letters that the font lacks are no boxes"
    assert layout_of(tmp_path / "s.png").captions == [Caption("", 3)]
    letters("", "一只狐狸", 3)
    assert layout_of(tmp_path / "s.png").captions == [Caption("一只狐狸", 3)]
    words = letters("", "word " * 400, 3)
    assert words[0].any() == words[-1].any() == False and not words[:, -1].any()  # noqa: E712 all of it is inside


@pytest.mark.parametrize(("count", "size"), list(product([1, 2, 7, 16, 64], [32, 256])))
def test_a_sheet_of_pictures_has_the_shape_of_a_screen(count: int, size: int, tmp_path: Path) -> None:
    save_sheet(tmp_path / "s.png", {"": torch.zeros(count, 1, size, size, 3)}, captions(count))
    with Image.open(tmp_path / "s.png") as image:
        assert image.width < 4.2 * image.height or count in (2, 7)
        assert count < 7 or image.width > 1.2 * image.height


def test_a_picture_of_another_kind_is_no_sheet(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "p.webp")
    assert read_sheet(tmp_path / "p.png") is None and read_sheet(tmp_path / "p.webp") is None
