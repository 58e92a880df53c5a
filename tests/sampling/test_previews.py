"""Previews: the base's part heads for the teacher's own samples, is made once, and not at all for short runs."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from recorded import Recorded
from tiny import TinyCodec, TinyWan, killed_after

from phased_dmd.conditions import Conditions
from phased_dmd.config import Config, Fake, Generator, Lora, Plan
from phased_dmd.config.teacher import OwnTeacher
from phased_dmd.contact_sheet import Caption, read_sheet
from phased_dmd.networks.build import add_expert, build_system
from phased_dmd.networks.roles import System
from phased_dmd.plan.measure import plan_of
from phased_dmd.plan.preview import base_steps
from phased_dmd.prompts import Prompt
from phased_dmd.recipes import resolve
from phased_dmd.sampling.previews import Preview, make_preview
from phased_dmd.sampling.sampler import Sampler, base_hops
from phased_dmd.train import distill

TEXTS = ["a seven", "a four moving", "a one"]
LONG = {"iterations": 1000, "batch_size": 64}


def tiny(model: TinyWan | Recorded, **fields: int) -> System:
    """Of two phases of two steps each, whose teacher takes eight on the same grid."""
    config = Config(
        recipe="mine", teacher=OwnTeacher(base_steps=8), plan=Plan(steps=4, phases=2, shift=3.0), prompts="nano-t2i",
        generator=Generator(lora=Lora(rank=2, alpha=2)), fake=Fake(updates=1), **fields,
    )  # fmt: skip
    system = build_system(config, model, TinyCodec().encode_text([""])[0])
    for phase in (1, 2):
        add_expert(system, phase, trainable=True)
    return system


def conditions(folder: Path) -> Conditions:
    return Conditions(TinyCodec(), [Prompt(text) for text in TEXTS], "", folder)


def test_the_bases_preview_of_the_last_phase_is_its_own_sample() -> None:
    """Of the same noise and prompts, decoded to bytes."""
    system, codec = tiny(TinyWan(guidance=2.0)), TinyCodec()
    rows = codec.encode_text(TEXTS)
    sampler = Sampler(system, codec)
    expected = sampler.decode(sampler(TEXTS, range(3), teacher_steps=8))
    torch.testing.assert_close(sampler.base_preview(2, rows), expected, rtol=0, atol=0.51 / 255)


def test_the_bases_preview_of_an_early_phase_is_what_a_step_must_predict_to_end_where_it_does() -> None:
    """Along the line from x at the phase's last step through x at its end, both the teacher's, to t = 0."""
    system, codec = tiny(TinyWan(guidance=2.0)), TinyCodec()
    rows, plan = codec.encode_text(TEXTS), system.plan
    sampler = Sampler(system, codec)
    condition = system.model.batch(rows)
    assert base_hops(plan, 1, [0.95, 0.9, 0.875, 0.5]) == [(1.0, 0.95, 0.9), (0.9, 0.875, 0.75)]
    grid = [3 * u / (1 + 2 * u) for u in (i / 8 for i in range(8, -1, -1))]  # shift 3
    x = sampler._noise(range(3))
    before = system.roll_teacher(grid[:3], x, condition)
    end = system.roll_teacher(grid[2:5], before, condition)
    t, r = grid[2], grid[4]
    line = (t * end - r * before) / (t - r)  # x = (1 - t) x_0 + t eps at both
    expected = codec.decode(line)
    torch.testing.assert_close(sampler.base_preview(1, rows), expected.cpu(), rtol=0, atol=0.51 / 255)


def test_the_bases_part_is_made_once_a_phase_and_kept(tmp_path: Path) -> None:
    model, codec = Recorded(TinyWan(), tmp_path), TinyCodec()
    system = tiny(model, **LONG)

    def teachers() -> int:
        made = make_preview(system, codec, 2, conditions(tmp_path / "c"), [1.0], tmp_path / "samples")
        assert made.base is not None and not torch.equal(made.base, torch.zeros_like(made.base))
        return sum(call.role == "teacher" for call in model.calls)

    once = teachers()
    assert once == 8 and teachers() == once


def test_a_preview_is_written_with_its_prompts_and_seeds_below_the_base(tmp_path: Path) -> None:
    """Sixteen samples of three prompts: five or six each."""
    made = make_preview(tiny(TinyWan(), **LONG), TinyCodec(), 2, conditions(tmp_path / "c"), [1.0], tmp_path)
    made.save(tmp_path / "p.png", "iteration 7", "base, 8 steps", TEXTS)
    sheet = read_sheet(tmp_path / "p.png")
    assert sheet is not None and list(sheet[0].rows) == ["base, 8 steps", "iteration 7"]
    assert sheet[0].captions == [Caption(TEXTS[i * 3 // 16], i) for i in range(16)]


def test_a_run_that_is_too_short_makes_no_part_of_the_bases(tmp_path: Path) -> None:
    short = tiny(TinyWan(), iterations=2, batch_size=4)
    made = make_preview(short, TinyCodec(), 1, conditions(tmp_path / "c"), [1.0], tmp_path / "samples")
    assert made.base is None and not (tmp_path / "samples").exists()
    made.save(tmp_path / "p.png", "iteration 2", "base, 8 steps", TEXTS)
    sheet = read_sheet(tmp_path / "p.png")
    assert sheet is not None and list(sheet[0].rows) == ["iteration 2"]


@pytest.mark.parametrize("recipe", ["nano-t2i", "nano-t2v", "wan22-t2v", "qwen-image", "toy-2d", "exact-clips"])
def test_every_recipes_run_is_long_enough(recipe: str) -> None:
    """And the plan counts it: 40 steps, and one more where a phase's bounds part one; twice that with guidance."""
    config = resolve(recipe)
    calls = [base_steps(config, plan_of(config), phase) for phase in range(1, config.plan.phases + 1)]
    assert all(calls) and calls == sorted(calls)
    assert 40 <= calls[-1] <= 2 * (40 + 4)


def test_points_are_plotted_beside_the_bases(tmp_path: Path) -> None:
    points = torch.randn(512, 2, generator=torch.Generator().manual_seed(0))
    for name, base in (("alone", None), ("beside", points)):
        Preview(points, base, [], []).save(tmp_path / f"{name}.png", "iteration 3", "base, 40 steps", [])
    alone, beside = (Image.open(tmp_path / f"{name}.png") for name in ("alone", "beside"))
    assert beside.size == (2 * alone.width, alone.height)


def test_previews_change_nothing_of_a_run_and_a_killed_one_shows_the_same(tmp_path: Path) -> None:
    """Of points, with the base's part: experts and metrics have the same bytes without previews."""
    quick = {"iterations": 8, "batch_size": 128, "teacher.fit_steps": 3, "teacher.base_steps": 4, "checkpoint_every": 4}
    for name, every in (("shown", 3), ("killed", 3), ("alone", None)):
        config = resolve("toy-2d", {**quick, "sample_every": every, "plan.phases": 2})
        if name == "killed":
            with killed_after(2, 4):
                distill(config, tmp_path / name, quiet=True)
        distill(config, tmp_path / name, quiet=True)
    files = ["experts/phase-1.safetensors", "experts/phase-2.safetensors", "metrics.jsonl"]
    for file in files:
        assert len({(tmp_path / name / file).read_bytes() for name in ("shown", "killed", "alone")}) == 1
    shown, killed = (sorted((tmp_path / name / "samples").iterdir()) for name in ("shown", "killed"))
    assert [path.name for path in shown] == [path.name for path in killed] and len(shown) == 2 * (3 + 1)
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(shown, killed, strict=True))
