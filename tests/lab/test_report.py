"""The report page on folders made by hand, in the format of `evaluate`: every picture has a colour of its own."""

import base64
import html
import io
import json
import re
import statistics
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageSequence

from phased_dmd.checkpoint import RunFolder, save_tensors
from phased_dmd.checkpoint.lock import locked
from phased_dmd.cli import main
from phased_dmd.config import Config
from phased_dmd.config.overrides import build
from phased_dmd.contact_sheet import Caption, save_sheet
from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate import BETTER, HEADINGS
from phased_dmd.lab.metrics.formats import number
from phased_dmd.lab.report import write_report
from phased_dmd.recipes import resolve

BASE = ("base, 40 steps", "base, 4 steps")
WAY = re.compile(" (↓ better|↑ better|≈ base)$")  # of a title: which way is better
Colour = tuple[int, int, int]


class Page(HTMLParser):
    """What the tests look at: pictures in their table rows, the cells of every row, attributes that are addresses."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text()
        self.rows: list[dict[str, Any]] = []
        self.cells: list[str] | None = None
        self.addresses: list[str] = []
        self.images: list[dict[str, str]] = []
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.addresses += [values[key] for key in ("src", "href") if key in values]
        if tag == "tr":
            self.rows.append({"cells": [], "images": [], **values})
        elif tag in ("td", "th"):
            self.rows[-1]["cells"].append("")
            self.cells = self.rows[-1]["cells"]
        elif tag == "img":
            self.images.append(values)
            if self.rows:
                self.rows[-1]["images"].append(values)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.cells = None

    def handle_data(self, data: str) -> None:
        if self.cells is not None:
            self.cells[-1] = " ".join(f"{self.cells[-1]} {data}".split())

    def samples(self) -> dict[str, list[dict[str, str]]]:
        """The rows that hold pictures, by their heading."""
        return {row["cells"][0]: row["images"] for row in self.rows if row["images"]}

    def numbers(self) -> dict[str, dict[str, str]]:
        """The cells of the first table of numbers, by row and title of the column."""
        heads = [[WAY.sub("", cell) for cell in row["cells"]] for row in self.rows]
        start = next(i for i, cells in enumerate(heads) if "network calls" in cells)
        titles, result = heads[start], {}
        for row in self.rows[start + 1 :]:
            if not row["cells"][0]:  # the head of the next table
                break
            result[row["cells"][0]] = dict(zip(titles, row["cells"], strict=True))
        return result


def picture_of(image: dict[str, str]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))


def colours_of(image: dict[str, str]) -> list[Colour]:
    """The colour of the middle of each frame."""
    picture = picture_of(image)
    middle = (picture.width // 2, picture.height // 2)
    return [frame.convert("RGB").getpixel(middle) for frame in ImageSequence.Iterator(picture)]  # type: ignore[misc]


def milliseconds(image: dict[str, str]) -> list[int]:
    """How long each frame is shown."""
    picture = picture_of(image)
    return [frame.convert("RGB").info["duration"] for frame in ImageSequence.Iterator(picture)]


def colour(*key: Any) -> Colour:
    """Of a set, row, seed and so on: another one for another key."""
    return tuple(hash_byte(repr((key, channel))) for channel in range(3))  # type: ignore[return-value]


def hash_byte(text: str) -> int:
    return sum(ord(c) * (i + 1) * 31 for i, c in enumerate(text)) % 256


def figure(value: float, gap: float, half: float | None = 0.01) -> dict[str, float | None]:
    return {"value": value, "half_width": half, "gap": gap, "gap_half_width": half}


def save_clip(path: Path, shade: Colour, size: tuple[int, int], frames: int = 3) -> None:
    """A clip whose frames fade, so that no two are equal, and its frames in a row."""
    images = [Image.new("RGB", size, tuple(c // (i + 1) for c in shade)) for i in range(frames)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=125, loop=0, lossless=True)
    strip = Image.new("RGB", (frames * size[0], size[1]), shade)
    strip.save(path.with_name(f"{path.stem}-frames.png"))


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(name, method=..., seed=..., frechet=..., ...) writes the folder of a finished and evaluated run."""

    def write(
        name: str, recipe: str = "nano-t2i", method: Any = "phased", seed: int = 0, frechet: float = 1.5,
        size: tuple[int, int] = (32, 32), nets: dict[str, str] | None = None, samples: int = 64,
        seeds: tuple[int, ...] = (0, 1, 2), **overrides: Any,
    ) -> Path:  # fmt: skip
        fields = {key.replace("__", "."): value for key, value in overrides.items()}
        config = resolve(recipe, {"seed": seed, **fields}, method)
        own = f"{config.method}, {config.plan.steps} steps"
        folder = tmp_path / name
        write_run(folder, config)
        sets = {}
        for kind in ["mixture"] if config.teacher.kind == "analytic" else ["weak", "specific"]:
            measured = {BASE[0]: (1.0, 0.0), BASE[1]: (20.25, 19.25), own: (frechet, frechet - 1.0)}
            calls = {row: figure(80 if row == BASE[0] else 4, -76, None) for row in measured}
            rows = {row: {"frechet_features": figure(*measured[row]), "network_calls": calls[row]} for row in measured}
            sets[kind] = {"about": f"{samples} samples", "base": BASE[0], "rows": rows}
            write_samples(folder / "samples" / kind, config, seeds, size)
        evaluation = {
            "subject": str(folder), "recipe": recipe, "method": config.method, "seed": seed, "weighting": "normalised",
            "protocol": {"samples": samples}, "nets": {"features": "digits"} if nets is None else nets, "sets": sets,
            "row": own, "experts": [config.phase_iterations(phase) for phase in range(1, config.plan.phases + 1)],
        }  # fmt: skip
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
        return folder

    return write


def write_run(folder: Path, config: Config) -> None:
    """Config, empty experts and a line of metrics a phase."""
    (folder / "experts").mkdir(parents=True)
    (folder / "config.json").write_text(config.model_dump_json())
    with (folder / "metrics.jsonl").open("w") as file:
        for phase in range(1, config.plan.phases + 1):
            save_tensors(RunFolder(folder).expert_path(phase), {}, {"iteration": config.phase_iterations(phase)})
            for iteration in (1, 2):
                losses = {"fake_loss": 1 / iteration, "generator_loss": 0.1 * phase}
                file.write(json.dumps({"phase": phase, "iteration": iteration, **losses}) + "\n")


def write_samples(folder: Path, config: Config, seeds: tuple[int, ...], size: tuple[int, int]) -> None:
    """Pictures of three rows; the base's are the same in every run, the own ones have the training seed's colour."""
    own = f"{config.method}, {config.plan.steps} steps"
    for row in (*BASE, own):
        place = folder / row.replace(", ", "-").replace(" ", "-")
        place.mkdir(parents=True)
        trained = config.seed if row == own else None
        if config.teacher.kind == "analytic":
            Image.new("RGB", (300, 300), colour(folder.name, row, trained)).save(place / "points.png")
            continue
        for i, seed in enumerate(seeds):
            shade = colour(folder.name, row, trained, seed)
            if config.teacher.sizes[0].num_frames > 1:  # type: ignore[union-attr] a pipeline's teacher
                save_clip(place / f"{i:02d}.webp", shade, size)
            else:
                Image.new("RGB", size, shade).save(place / f"{i:02d}.png")
    if config.teacher.kind != "analytic":
        prompts = ["a handwritten digit"] * 3 if folder.name == "weak" else ["a one", "a one", "a <b>two</b>"]
        shown = [{"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]
        (folder / "shown.json").write_text(json.dumps(shown))


def test_the_base_is_there_once_and_a_run_has_a_row_with_the_noise_of_its_column(make: Make, tmp_path: Path) -> None:
    runs = [make("a", seed=0), make("b", seed=1), make("c", method="dmd")]
    page = Page(write_report(runs, tmp_path / "page.html"))
    rows = [row for row in page.rows if row["images"]]
    names = ["base, 40 steps", "base, 4 steps", "phased, 4 steps training seed 0", "phased, 4 steps training seed 1"]
    assert [row["cells"][0] for row in rows] == 2 * [*names, "dmd, 4 steps training seed 0"]
    assert [row.get("data-seed") for row in rows[:5]] == [None, None, "0", "1", "0"]
    trained = [None, None, 0, 1, 0]
    for i, row in enumerate(rows):
        kind, name = ("weak", "specific")[i // 5], row["cells"][0].partition(" training")[0]
        expected = [[colour(kind, name, trained[i % 5], seed)] for seed in range(3)]
        assert [colours_of(image) for image in row["images"]] == expected


def test_a_column_says_its_prompt_and_its_seed(make: Make, tmp_path: Path) -> None:
    page = Page(write_report([make("a", seeds=(7, 3, 11))], tmp_path / "page.html"))
    heads = [row for row in page.rows if row["cells"][:1] in (["prompt"], ["seed of the noise"])]
    assert [row["cells"][1:] for row in heads] == [
        ["a handwritten digit"], ["7", "3", "11"], ["a one", "a <b>two</b>"], ["7", "3", "11"]
    ]  # fmt: skip
    assert 'colspan="3"' in page.html and 'colspan="2"' in page.html


def test_small_pictures_stay_as_they_are_and_large_ones_become_thumbnails(make: Make, tmp_path: Path) -> None:
    small = Page(write_report([make("small")], tmp_path / "small.html")).samples()["phased, 4 steps"][0]
    file = tmp_path / "small" / "samples" / "specific" / "phased-4-steps" / "00.png"
    assert base64.b64decode(small["src"].partition(",")[2]) == file.read_bytes()
    assert (small["class"], small["width"]) == ("pixelated", "96")
    page = Page(write_report([make("large", size=(832, 480))], tmp_path / "large.html"))
    large = page.samples()["phased, 4 steps"][0]
    assert picture_of(large).size == (256, 148) == (int(large["width"]), int(large["height"]))
    assert picture_of(large).format == "WEBP" and "class" not in large
    expected = colour("specific", "phased, 4 steps", 0, 0)
    assert all(abs(a - b) < 8 for a, b in zip(colours_of(large)[0], expected, strict=True))


@pytest.mark.parametrize("size", [(32, 32), (320, 192)])
def test_clips_play_and_have_their_frames_beside(make: Make, tmp_path: Path, size: tuple[int, int]) -> None:
    page = Page(write_report([make("a", recipe="nano-t2v", size=size)], tmp_path / "page.html"))
    clip, frames, *_ = page.samples()["phased, 4 steps"]
    assert (clip["data-view"], frames["data-view"]) == ("clip", "frames")
    shade = colour("specific", "phased, 4 steps", 0, 0)
    shades = colours_of(clip)
    assert len(shades) == 3 and milliseconds(clip) == [125] * 3
    for i, shown in enumerate(shades):
        assert all(abs(a - b // (i + 1)) < 8 for a, b in zip(shown, shade, strict=True))
    assert picture_of(frames).size == ((96, 32) if size == (32, 32) else (480, 96))


def test_an_analytic_run_shows_its_scatter_plots_side_by_side(make: Make, tmp_path: Path) -> None:
    runs = [make("a", recipe="toy-2d"), make("b", recipe="toy-2d", method="dmd")]
    page = Page(write_report(runs, tmp_path / "page.html"))
    expected = [(BASE[0], None), (BASE[1], None), ("phased, 4 steps", 0), ("dmd, 4 steps", 0)]
    assert [image["alt"] for image in page.images] == [row for row, _ in expected]
    for image, key in zip(page.images, expected, strict=True):
        assert all(abs(a - b) < 8 for a, b in zip(colours_of(image)[0], colour("mixture", *key), strict=True))


def test_several_seeds_become_a_mean_with_students_interval_and_one_keeps_its_own(make: Make, tmp_path: Path) -> None:
    values = [1.5, 2.5, 2.0]
    runs = [make(f"p{i}", seed=i, frechet=value) for i, value in enumerate(values)]
    page = Page(write_report([*runs, make("d", method="dmd", frechet=3.25)], tmp_path / "page.html"))
    column = f"{HEADINGS['frechet_features'][0]} digits"
    found = {row: cells[column] for row, cells in page.numbers().items()}
    half = 4.302653 * statistics.stdev(values) / 3**0.5  # Student's t of 2 degrees of freedom at 97.5 %, from a table
    assert found == {
        "base, 40 steps": "1 ± 0.010 0",
        "base, 4 steps": "20.2 ± 0.010 +19.2 ± 0.010",
        "phased, 4 steps mean of 3 training seeds": f"2 ± {half:.1f} +1 ± {half:.1f}",
        "dmd, 4 steps": "3.25 ± 0.010 +2.25 ± 0.010",
    }
    assert page.numbers()["dmd, 4 steps"]["network calls"] == "4 −76"
    text = html.unescape(page.html)
    assert HEADINGS["frechet_features"][1] in text and HEADINGS["contrast"][1] not in text


def test_methods_of_one_name_are_told_apart_by_what_differs(make: Make, tmp_path: Path) -> None:
    runs = [
        make("n"), make("n1", seed=1), make("d", ablation__renoise="disjoint"), make("x", method="dmd", log_every=1),
        make("y", method="dmd", generator__lora__alpha=64),
    ]  # fmt: skip
    page = Page(write_report(runs, tmp_path / "page.html"))
    assert list(page.numbers()) == [
        *BASE,
        "phased, 4 steps ablation. renoise= nested mean of 2 training seeds",
        "phased, 4 steps ablation. renoise= disjoint",
        "dmd, 4 steps generator. lora. alpha= 32",
        "dmd, 4 steps generator. lora. alpha= 64",
    ]
    differing = next(row for row in page.rows if "ablation. renoise" in row["cells"])
    assert differing["cells"] == ["", "plan. phases", "generator. lora. alpha", "ablation. renoise", "iterations"]


def test_only_what_there_is_to_choose_can_be_switched(make: Make, tmp_path: Path) -> None:
    def switches(runs: list[Path]) -> dict[str, list[str]]:
        text = write_report(runs, tmp_path / "page.html").read_text()
        found: dict[str, list[str]] = {}
        for name, value in re.findall(r'<input type="radio" name="(\w+)" value="(\w+)"', text):
            found.setdefault(name, []).append(value)
        return found

    sets, figures = {"set": ["weak", "specific"]}, {"figure": ["value", "gap"]}
    assert switches([make("toy", recipe="toy-2d")]) == figures
    assert switches([make("a"), make("b", seed=4)]) == {**sets, "seed": ["all", "0", "4"], **figures}
    assert switches([make("clips", recipe="nano-t2v")]) == {**sets, "view": ["clip", "frames"], **figures}


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        (0.0312, {}, "0.0312"), (1234.5, {}, "1,234"), (80.0, {}, "80"), (-0.5, {}, "−0.500"),
        (0.5, {"signed": True}, "+0.500"), (2e-14, {"scale": 0.6, "signed": True}, "0.000"), (2e-9, {}, "2.00e-09"),
    ],
)  # fmt: skip
def test_figures_have_as_many_digits_as_say_something(value: float, options: dict[str, Any], text: str) -> None:
    assert number(value, **options) == text


def test_every_run_has_its_curves_in_the_colour_of_its_method(make: Make, tmp_path: Path) -> None:
    page = Page(write_report([make("a"), make("b", seed=1), make("c", method="dmd")], tmp_path / "page.html"))
    svg = page.html[page.html.index("<svg") : page.html.index("</svg>")]
    lines = re.findall(r'<path d="M[^"]*" clip-path="[^"]*" style="fill: none; stroke: (#\w{6}); stroke-width', svg)
    phased, dmd = re.findall(r'<i style="background:(#\w{6})">', page.html)
    assert len(lines) == 2 * (2 * 4 + 1) and (lines.count(phased), lines.count(dmd)) == (16, 2)
    assert "phase 4" in svg and "currentColor" in svg


def test_the_page_needs_nothing_from_outside(make: Make, tmp_path: Path) -> None:
    page = Page(write_report([make("a"), make("b", recipe="nano-t2i", seed=1)], tmp_path / "page.html"))
    assert page.addresses and all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"@import|url\(\s*['\"]?http|<script[^>]*src", page.html)
    assert "a <b>two</b>" not in page.html, "what a prompt says is text"


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"teacher__guidance": 2.0}, "differ in teacher.guidance, [1.5] and [2.0]"),
        ({"plan__shift": 3.0}, "differ in plan.shift, 5.0 and 3.0"),
        ({"recipe": "nano-t2v"}, "differ in teacher.sizes, "),
        ({"samples": 128, "seed": 1}, "differ in protocol.samples, 64 and 128"),
        ({"nets": {"features": "dino"}, "seed": 1}, 'differ in nets.features, "digits" and "dino"'),
        ({"seeds": (0, 1, 5), "seed": 1}, "differ in shown.weak, "),
        ({}, "are one run: same configuration, same seed"),
    ],
)
def test_what_cannot_be_compared_is_said_with_the_two_runs(
    make: Make, tmp_path: Path, other: dict[str, Any], says: str
) -> None:
    runs = [make("a"), make("b", method="dmd"), make("c", **other)]
    with pytest.raises(UserError) as error:
        write_report(runs, tmp_path / "page.html")
    assert says in str(error.value)
    assert str(runs[0]) in str(error.value) and str(runs[2]) in str(error.value)
    assert not (tmp_path / "page.html").exists()


def test_an_evaluation_that_cannot_be_read_is_said(make: Make, tmp_path: Path) -> None:
    run = make("a")

    def complaint() -> str:
        with pytest.raises(UserError) as error:
            write_report([run], tmp_path / "page.html")
        return str(error.value)

    (run / "samples" / "specific" / "phased-4-steps" / "02.png").unlink()
    assert (
        "specific/phased-4-steps/02.png: cannot be read as a picture (no such file); evaluate the run again"
        in complaint()
    )
    (run / "evaluation.json").write_text('{"recipe": "nano-t2i", "samples": 64, "sets": {}}')
    assert "evaluated by an older version" in complaint() and "--again" in complaint()
    (run / "evaluation.json").write_text('{"recipe": ')
    assert "evaluation.json: cannot be read" in complaint()
    with pytest.raises(UserError, match="is a folder"):
        write_report([run], tmp_path)
    assert not (tmp_path / "page.html").exists()


def test_a_run_of_ones_own_model_is_sent_to_the_command_with_the_flag_that_it_needs(tmp_path: Path) -> None:
    teacher = {"kind": "own"}
    write_run(tmp_path / "run", build({"recipe": "mine", "teacher": teacher, "prompts": "nano-t2i"}))
    text = html.unescape(write_report([tmp_path / "run"], tmp_path / "page.html").read_text())
    assert f"Not evaluated yet: run `phased-dmd evaluate {tmp_path / 'run'} --own module:function`." in text


# ---------------------------------------------------------------- what a page opens with


def opening(page: Path) -> str:
    """What stands above the first heading of a section, without tags."""
    text = page.read_text()
    top = text[text.index('<section id="top"') : text.index('<section id="previews"')]
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", top)).split())


def test_a_page_opens_with_the_calls_and_the_share_of_the_gap_that_is_closed(make: Make, tmp_path: Path) -> None:
    """Few steps of the base are 19.25 from it, the run .5: 1 - .5 / 19.25 is closed, and .01 of each gap is doubt."""
    page = write_report([make("a")], tmp_path / "page.html")
    half = 100 * ((0.01 / 19.25) ** 2 + (0.5 * 0.01 / 19.25**2) ** 2) ** 0.5
    share = f"97.4 ± {half:.3f} %"
    closed = f"closes {share} on “weak” and {share} on “specific” of the gap between 4 steps of the base and 40"
    assert f"4 network calls instead of 80: {closed} (Fréchet, features)." in opening(page)
    assert '<p class="finding good">' in page.read_text()


def test_a_ruined_run_is_shown_as_ruined(make: Make, tmp_path: Path) -> None:
    """Its distance is 143 where the base's in as few steps is 20.25 and its own floor 1."""
    page = write_report([make("a", frechet=143.0), make("b", method="dmd")], tmp_path / "page.html")
    worse = "phased, 4 steps: 4 network calls instead of 80, and worse than the base in as few steps"
    gaps = [f"142 from it on “{name}”, where that is 19.2" for name in ("weak", "specific")]
    assert f"{worse}: {' and '.join(gaps)} (Fréchet, features)." in opening(page)
    rows = {row["cells"][0]: row.get("class") for row in Page(page).rows if row.get("class")}
    assert rows == {"phased, 4 steps": "own bad", "dmd, 4 steps": "own good"}
    assert page.read_text().count('<p class="finding bad">') == 1


def test_what_lies_within_its_interval_is_neither_good_nor_bad(make: Make, tmp_path: Path) -> None:
    page = write_report([make("a", frechet=20.255)], tmp_path / "page.html").read_text()
    assert '<p class="finding ">' in page and "finding good" not in page and "finding bad" not in page
    assert "nothing that shows on “weak” (−0.0260 ± 0.073 %)" in page


def test_a_run_that_is_far_where_few_steps_of_the_base_are_near_is_bad(make: Make, tmp_path: Path) -> None:
    """There is no gap to close, and one was opened."""
    run = make("a", frechet=9.0)
    evaluation = json.loads((run / "evaluation.json").read_text())
    for of_set in evaluation["sets"].values():
        of_set["rows"][BASE[1]]["frechet_features"] = figure(0.9, -0.1)
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    page = write_report([run], tmp_path / "page.html")
    assert "worse than the base in as few steps: 8 from it on “weak”, where that is 0" in opening(page)
    for of_set in evaluation["sets"].values():
        of_set["rows"]["phased, 4 steps"]["frechet_features"] = figure(1.0, 0.0)
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    write_report([run], page)
    assert "the base in as few steps is as good, as far as this evaluation tells" in opening(page)


def test_every_measure_says_which_way_is_better(make: Make, tmp_path: Path) -> None:
    page = Page(write_report([make("a")], tmp_path / "page.html"))
    heads = next(row["cells"] for row in page.rows if "network calls ↓ better" in row["cells"])
    assert heads == ["", "network calls ↓ better", "Fréchet, features digits ↓ better"]
    assert set(BETTER) < set(HEADINGS) and BETTER["faithfulness"] == "higher" and "contrast" not in BETTER


def test_a_run_that_is_not_evaluated_has_a_page_that_says_so(make: Make, tmp_path: Path) -> None:
    one, other = make("a"), make("b", method="dmd")
    (other / "evaluation.json").unlink()
    page = write_report([one, other], tmp_path / "page.html")
    assert list(Page(page).numbers()) == [*BASE, "phased, 4 steps"]
    assert f"Not evaluated yet: run `phased-dmd evaluate {other}`." in opening(page)
    alone = write_report([other], tmp_path / "alone.html").read_text()
    assert '<section id="numbers" hidden>' in alone and '<section id="samples" hidden>' in alone and "<svg" in alone


def test_runs_of_two_teachers_are_not_compared_before_they_are_evaluated_either(make: Make, tmp_path: Path) -> None:
    runs = [make("a"), make("b", teacher__guidance=2.0)]
    for run in runs:
        (run / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"differ in teacher.guidance, \[1.5\] and \[2.0\]"):
        write_report(runs, tmp_path / "page.html")


# ---------------------------------------------------------------- unfinished runs, and previews


def unfinished(make: Make, done: int) -> Path:
    """A run of 4 phases of 120 updates, so many of whose third are logged, 2 seconds each, and 1 in those before."""
    run = make("a", iterations=120, log_every=5)
    (run / "evaluation.json").unlink()
    for phase in (3, 4):
        (run / "experts" / f"phase-{phase}.safetensors").unlink()
    rows = [(1, 120), (2, 120), *((3, i) for i in range(5, done + 1, 5))]
    losses = {"fake_loss": 0.5, "generator_loss": 0.1}
    lines = [json.dumps({"phase": phase, "iteration": i, **losses}) for phase, i in rows]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    timing = [{"phase": phase, "iteration": i, "seconds": 2.0 if phase == 3 else 1.0} for phase, i in rows]
    timing.insert(1, {"phase": 2, "iteration": 0, "pool_calls": 9, "seconds": 1000.0})
    (run / "timing.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in timing))
    return run


def test_a_page_says_how_far_a_run_is_and_how_long_it_takes_yet(make: Make, tmp_path: Path) -> None:
    """90 of 120 updates of 2 s are left in the phase, and 120 more of it behind: 3 and 7 minutes."""
    run = unfinished(make, 30)
    with locked(run / ".lock"):
        found = opening(write_report([run], tmp_path / "page.html"))
    assert "Training: phase 3 of 4, iteration 30 of 120." in found
    assert "About 3 min left in this phase, 7 min in all, if later phases take no longer." in found
    assert "phase 2 120 / 120 phase 3 30 / 120 phase 4 0 / 120" in found
    stopped = opening(write_report([run], tmp_path / "page.html"))
    assert "Stopped in phase 3 of 4, iteration 30 of 120; the command that began it goes on" in stopped
    assert "About" not in stopped


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    config = resolve("nano-t2i")
    write_run(tmp_path / "run", config)
    for path in ((tmp_path / "run").glob("experts/*"), [tmp_path / "run" / "metrics.jsonl"]):
        [file.unlink() for file in path]
    with locked(tmp_path / "run" / ".lock"):
        assert "Begun: no update is logged yet" in opening(write_report([tmp_path / "run"], tmp_path / "page.html"))


def test_a_failed_run_says_where_and_why_until_it_has_gone_on(make: Make, tmp_path: Path) -> None:
    run = unfinished(make, 30)
    (run / "failures" / "phase-3-iteration-000030-update-2").mkdir(parents=True)
    found = opening(write_report([run], tmp_path / "page.html"))
    assert "Failed in phase 3 of 4, iteration 30 of 120." in found
    assert "phase 3, iteration 30, update 2: a loss or a gradient was not finite" in found and "fake.lr" in found
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"phase": 3, "iteration": 35, "skipped": 2}) + "\n")
    found = opening(write_report([run], tmp_path / "page.html"))
    assert "Stopped in phase 3 of 4, iteration 35" in found and "update 2:" not in found
    assert "phase 3: updates left out because a loss or a gradient was not finite: 2" in found


def previews(run: Path, steps: list[tuple[int, int]], frames: int = 1, base: bool = True) -> None:
    """Two samples each; the base's have the phase's colour, the generator's that of the phase and the iteration."""
    for phase, iteration in steps:
        shades = ([colour(phase)] if base else []) + [colour(phase, iteration)]
        rows = {
            name: torch.tensor(shade).div(255).expand(2, frames, 32, 32, 3)
            for name, shade in zip(["base, 40 steps", "iteration"][not base :], shades, strict=True)
        }
        path = run / "samples" / f"phase-{phase}-iteration-{iteration:06d}.png"
        save_sheet(path, rows, [Caption("a <b>one</b>", 0), Caption("a two", 1)])


@pytest.mark.parametrize("frames", [1, 3])
def test_previews_stand_beside_the_bases_which_is_there_once_a_phase(frames: int, make: Make, tmp_path: Path) -> None:
    steps = [(1, 40), (1, 120), (2, 40)]
    run = unfinished(make, 30)
    previews(run, steps, frames)
    page = Page(write_report([run], tmp_path / "page.html"))
    shown = [image for image in page.images if image["alt"].startswith(("base, 40", "phase"))]
    expected = [colour(1), colour(1, 40), colour(1, 120)] * 2 + [colour(2), colour(2, 40)] * 2
    assert [colours_of(image)[0] for image in shown] == expected
    assert [image["alt"] for image in shown[:3]] == [
        "base, 40 steps",
        "phase 1, iteration 40",
        "phase 1, iteration 120",
    ]
    assert "a &lt;b&gt;one&lt;/b&gt;" in page.html and 'data-steps="0 1"' in page.html and 'max="2"' in page.html


def test_a_preview_without_the_bases_and_one_of_points_are_shown_too(make: Make, tmp_path: Path) -> None:
    run = unfinished(make, 30)
    previews(run, [(1, 40)], base=False)
    Image.new("RGB", (300, 300), colour("points")).save(run / "samples" / "phase-2-iteration-000040.png")
    page = Page(write_report([run], tmp_path / "page.html"))
    assert [image["alt"] for image in page.images] == ["phase 2, iteration 40", *["phase 1, iteration 40"] * 2][::-1]
    assert all(abs(a - b) < 8 for a, b in zip(colours_of(page.images[-1])[0], colour("points"), strict=True))


def test_of_many_previews_the_last_and_others_are_shown(make: Make, tmp_path: Path) -> None:
    run = unfinished(make, 30)
    previews(run, [(1, i) for i in range(1, 51)])
    text = write_report([run], tmp_path / "page.html").read_text()
    titles = json.loads(html.unescape(re.search("data-titles='([^']*)'", text)[1]))  # type: ignore[index]
    assert len(titles) == 40 and titles[-1] == "phase 1, iteration 50" and len(set(titles)) == 40
    assert "10 previews between these are left out" in text


def test_the_command_has_a_place_for_one_run_and_asks_for_that_of_several(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = make("a"), make("b", seed=1)

    def command(*arguments: Path | str) -> None:
        monkeypatch.setattr(sys, "argv", ["phased-dmd", "report", *map(str, arguments)])
        main()

    command(one)
    assert capsys.readouterr().out.split() == [str(one / "report.html")] and (one / "report.html").exists()
    with pytest.raises(SystemExit) as stop:
        command(other, one)
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("phased-dmd: --output: ")
    assert not (other / "report.html").exists()
    command(one, other, "--output", tmp_path / "both.html")
    assert "training seed 1" in (tmp_path / "both.html").read_text()
