"""Sampling: what a sampler takes, what is written when, and how much of it is held; previews in small calls."""

import json
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import finished_run
from tiny import CountingCodec, TinyCodec, TinyWan, draw
from torch import Tensor, nn

from phased_dmd import media
from phased_dmd.cli import main
from phased_dmd.config import Config, Engine, Generator, Lora, Plan
from phased_dmd.config.teacher import OwnTeacher
from phased_dmd.contact_sheet import read_sheet
from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate.samples import SampleFolder
from phased_dmd.networks.build import add_expert, build_system
from phased_dmd.plan.measure import meta_model
from phased_dmd.prompts import Prompt, read_prompts
from phased_dmd.recipes import resolve
from phased_dmd.sampling.previews import Preview
from phased_dmd.sampling.sampler import Sampler, preview_shares, preview_size
from phased_dmd.sampling.writing import write_samples

TEXTS = [f"{'a ' * i}digit" for i in range(8)]


class CountingWan(TinyWan):
    """Keeps how many samples each call of a network had."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.calls.append(len(x))
        return super().predict(network, x, t, condition)


class GreyCodec(TinyCodec):
    """Decodes whatever it is given to grey clips of one shape."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def decode(self, latents: Tensor) -> Tensor:
        return torch.tensor(0.5).expand(len(latents), *self.shape, 3)


@pytest.fixture(scope="module")
def tiny() -> Sampler:
    """Four steps in two phases of a random network, with experts that differ from it."""
    config = Config(
        recipe="mine", teacher=OwnTeacher(), plan=Plan(steps=4, phases=2),
        generator=Generator(lora=Lora(rank=2, alpha=2)), prompts="nano-t2i",
    )  # fmt: skip
    system = build_system(config, CountingWan(), TinyCodec().encode_text([""])[0])
    for phase in (1, 2):
        add_expert(system, phase, trainable=True)
        for name, p in system.roles.parameters(f"phase_{phase}").items():
            p.data = 0.3 * draw(*p.shape, seed=len(name) + phase).to(p.device)
    return Sampler(system, CountingCodec())


def with_engine(sampler: Sampler, **engine: Any) -> Sampler:
    config = sampler.system.config.model_copy(update={"engine": Engine(**engine)})
    made = Sampler(build_system(config, sampler.system.model, sampler.system.negative), sampler.codec)
    object.__setattr__(made.system, "roles", sampler.system.roles)
    return made


class Clips(Sampler):
    """A sampler of large clips that costs nothing; `held` counts the decoded ones that are there."""

    fps = 16.0  # type: ignore[assignment] of a teacher

    def __init__(self, *clip: int) -> None:
        self.clip, self.held, self.most, self.decoded = clip, 0, 0, 0

    def batches(self, prompts: Any, seeds: Any, teacher_steps: int | None = None) -> Iterator[Tensor]:
        yield from torch.arange(len(prompts)).float().split(3)

    def decode(self, latents: Tensor) -> Tensor:
        pixels = torch.tensor(0.5).expand(len(latents), *self.clip)
        self.held, self.decoded = self.held + len(latents), self.decoded + 1
        self.most = max(self.most, self.held)
        weakref.finalize(pixels, self._freed, len(latents))
        return pixels

    def _freed(self, count: int) -> None:
        self.held -= count


# What a sampler takes


@pytest.mark.parametrize(
    ("prompts", "seeds", "more", "message"),
    [
        ("a seven", range(7), {}, r"prompts: a list is needed, with a prompt a seed; \['a seven'\] \* n"),
        (Prompt("a seven"), range(2), {}, "prompts: a list is needed"),
        (None, [0], {}, "prompts: a list of texts is needed, and this is a NoneType"),
        ([None], [0], {}, "prompts: None is no text"),
        ([3], [0], {}, "prompts: 3 is no text"),
        ([], [], {}, "prompts, seeds: 0 and 0 of them"),
        (["a seven"], range(8), {}, r"prompts, seeds: 1 and 8 of them; every sample has one of each: \[prompt\] \* n"),
        (["a seven"] * 8, [0], {}, "prompts, seeds: 8 and 1 of them"),
        (["a seven"], 0, {}, "seeds: a list of whole numbers is needed, such as range.8., and this is 0"),
        (["a seven"], None, {}, "seeds: .* and this is None"),
        (["a seven"], [1.5], {}, r"seeds: .* and this is \[1.5\]"),
        (["a seven"], torch.tensor([1.0]), {}, "seeds: .* and this is tensor"),
        (["a seven"], [0], {"teacher_steps": 0}, "teacher_steps: 0 is no number of steps"),
        (["a seven"], [0], {"teacher_steps": -3}, "teacher_steps: -3 is no number of steps"),
        (["a seven"], [0], {"teacher_steps": 1.5}, "teacher_steps: 1.5 is no number of steps"),
    ],
)
def test_a_sampler_called_with_what_it_does_not_take_says_what_it_takes(
    tiny: Sampler, prompts: Any, seeds: Any, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tiny(prompts, seeds, **more)


def test_whole_numbers_of_torch_and_numpy_are_seeds(tiny: Sampler) -> None:
    expected = tiny(["a seven"] * 3, [0, 1, 2])
    assert torch.equal(tiny(["a seven"] * 3, torch.arange(3)), expected)  # type: ignore[arg-type]
    assert torch.equal(tiny(["a seven"] * 3, np.arange(3)), expected)  # type: ignore[arg-type]


def test_what_is_no_whole_sample_is_not_decoded(tiny: Sampler) -> None:
    z = tiny(["a seven"] * 2, [0, 1])
    for part in (z[0], z[:, :1], z[:0], z[..., :2], z.numpy(), None):
        with pytest.raises(UserError, match=r"latents: .* where a tensor \[n, 16, 1, 4, 4\] is needed"):
            tiny.decode(part)  # type: ignore[arg-type]
    assert tiny.decode(z).shape == (2, 1, 4, 4, 3)


def test_a_sampler_says_what_it_is(tiny: Sampler) -> None:
    assert repr(tiny) == "Sampler(mine, phased-sgts, 4 steps in 2 phases, samples [16, 1, 4, 4], bucket 0)"


# What is written


def test_samples_are_written_as_they_are_made_and_the_list_names_those_that_are_there(tmp_path: Path) -> None:
    """Interrupted at the sixth of eight."""
    sampler, decode = Clips(9, 16, 24, 3), Clips.decode

    def interrupted(latents: Tensor) -> Tensor:
        if sampler.decoded == 5:
            raise KeyboardInterrupt
        return decode(sampler, latents)

    sampler.decode = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        write_samples(sampler, [Prompt(text) for text in TEXTS], 1, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == TEXTS[:5]
    assert sorted(row["image"] for row in rows) == sorted(path.name for path in tmp_path.glob("*.webp"))
    assert [Image.open(tmp_path / row["image"]).n_frames for row in rows] == [1] * 5  # of nine equal frames
    assert [prompt.text for prompt in read_prompts(str(tmp_path / "samples.jsonl"))] == TEXTS[:5]
    assert len(SampleFolder(tmp_path).files) == 5


def test_one_decoded_clip_is_held_at_a_time_and_the_sheet_is_of_few_small_frames(tmp_path: Path) -> None:
    """81 frames of 240 x 416; a row of the sheet is every tenth of them, 160 pixels high."""
    sampler = Clips(81, 240, 416, 3)
    *_, sheet = write_samples(sampler, [Prompt(text) for text in TEXTS], 1, tmp_path)
    assert sampler.decoded == 8 and sampler.most <= 2, "the last one, and the one that takes its name"
    shown = read_sheet(sheet)
    assert shown is not None and (shown[0].frames, tuple(shown[0].tile)) == (9, (277, 160))
    assert [str(caption) for caption in shown[0].captions] == [f"{text}, seed 0" for text in TEXTS]


def test_frames_of_a_thumbnail_are_spread_over_the_clip() -> None:
    clip = torch.linspace(0, 1, 81)[:, None, None, None].expand(1, 81, 8, 12, 3)[0][None]
    shown = media.thumbnails(clip, 4)
    assert shown.shape == (1, 9, 4, 6, 3) and shown.dtype == torch.uint8
    torch.testing.assert_close(shown[0, :, 0, 0, 0].float() / 255, torch.linspace(0, 1, 9), rtol=0, atol=0.51 / 255)
    few = torch.rand(2, 9, 8, 12, 3)
    assert torch.equal(media.thumbnails(few, 8), (few * 255).round().byte()), "as they are"


@pytest.mark.parametrize("full", ["folder", "file"])
def test_a_place_that_is_taken_is_left_as_it_is(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "out"
    if full == "folder":
        place.mkdir()
        (place / "samples.jsonl").write_text("old\n")
    else:
        place.write_text("old\n")
    status = command(monkeypatch, "sample", str(tmp_path), "--prompt", "a seven", "--output", str(place))
    assert (status, capsys.readouterr().err) == (
        2,
        f"phased-dmd: --output: {place} exists and is not an empty folder\n",
    )
    with pytest.raises(UserError, match="--output: .* exists and is not an empty folder"):
        write_samples(Clips(9, 16, 24, 3), [Prompt("a seven")], 1, place)
    assert (place if place.is_file() else place / "samples.jsonl").read_text() == "old\n"


# The command


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["phased-dmd", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("nano-t2i", [], "--prompt: nano-t2i makes what it is told; give --prompt TEXT or --prompts FILE"),
        ("toy-2d", ["--prompt", "a seven"], "--prompt, --prompts: toy-2d takes none"),
        ("nano-i2v", ["--image", "first.png"], "--image: the picture of every --prompt, and there is none"),
        ("nano-i2v", ["--image", "a.png", "--prompts", "nano-t2v"], "--image: the picture of every --prompt, and"),
        ("nano-t2i", ["--prompt", "a", "--image", "noise.png"], "--image: nano-t2i takes no picture"),
        ("nano-t2i", ["--prompt", "a", "--seeds", "0-7"], "--seeds: '0-7' is no count of samples; 8 makes those of"),
        ("nano-t2i", ["--prompt", "a", "--seeds", "0"], "--seeds: '0' is no count of samples"),
        ("nano-t2i", ["--prompt", "a", "--teacher", "/nope"], "a run, which names its teacher itself"),
    ],
)
def test_what_a_model_is_not_told_or_does_not_take_is_one_line(
    recipe: str, arguments: list[str], message: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, out = finished_run(tmp_path / "run", resolve(recipe, {})), tmp_path / "out"
    assert command(monkeypatch, "sample", str(run), "--output", str(out), *arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not out.exists()


# Previews


def test_a_preview_goes_through_networks_and_codec_in_micro_batches(tiny: Sampler) -> None:
    model, codec, rows = tiny.system.model, tiny.codec, TinyCodec().encode_text(TEXTS)
    assert isinstance(model, CountingWan) and isinstance(codec, CountingCodec)
    model.calls.clear(), codec.calls.clear()
    whole = tiny.preview(2, rows)
    assert (model.calls, codec.calls) == ([8] * 4, [8])
    model.calls.clear(), codec.calls.clear()
    parts = with_engine(tiny, micro_batch=3).preview(2, rows)
    assert (model.calls, codec.calls) == ([3] * 8 + [2] * 4, [3, 3, 2])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1.01 / 255)
    of_one = tiny.decode(tiny([TEXTS[5]], [5])).clamp(0, 1)
    torch.testing.assert_close(whole[5:6], of_one, rtol=0, atol=0.51 / 255)  # at the end x_0 is what is sampled


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_processes_share_a_preview_and_call_the_networks_equally_often(processes: int, size: int) -> None:
    """Of eight samples each is shown once, in their order, and every process calls with equally many samples."""
    shares = [list(preview_shares(8, size, process, processes)) for process in range(processes)]
    calls = {tuple(len(samples) for samples, _ in share) for share in shares}
    assert len(calls) == 1 and max(*calls.pop(), 0) <= size
    assert [i for share in shares for samples, kept in share for i in samples[:kept]] == list(range(8))
    assert all(0 <= i < 8 for share in shares for samples, _ in share for i in samples)


@pytest.mark.parametrize("shape", [(81, 480, 832), (1, 1328, 1328)])
def test_a_preview_of_any_recipe_opens_in_pillow(shape: tuple[int, int, int], tiny: Sampler, tmp_path: Path) -> None:
    count, sampler = 16 if shape[0] == 1 else 4, with_engine(tiny, micro_batch=1)
    sampler.codec = GreyCodec(*shape)
    shown = sampler.preview(1, [tiny.system.negative] * count)
    Preview(shown, shown, [], range(count)).save(tmp_path / "preview.png", "own", "base", [])
    with Image.open(tmp_path / "preview.png") as image:  # an error above 179 megapixels, a warning above 89
        assert image.width * image.height < 1.25 * 2 * 2**22
    sheet = read_sheet(tmp_path / "preview.png")
    assert sheet is not None and sheet[0].frames == (1 if shape[0] == 1 else 9)
    width, height = sheet[0].tile
    assert count * sheet[0].frames * width * height == pytest.approx(2**22, rel=0.01)
    assert width / height == pytest.approx(shape[2] / shape[1], rel=0.01)


@pytest.mark.parametrize(
    ("recipe", "samples"),
    [("nano-t2v", 16), ("qwen-image", 16), ("wan22-t2v", 4)],
)
def test_previews_are_of_sixteen_pictures_or_four_large_clips(recipe: str, samples: int) -> None:
    assert preview_size(meta_model(resolve(recipe, {}).teacher).sample_shapes[0]) == samples
