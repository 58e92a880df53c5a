"""What is said of a run's health: by lines of metrics whose truth is known, and by small runs that are spoilt."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from phased_dmd import health
from phased_dmd.config import Config
from phased_dmd.recipes import resolve
from phased_dmd.train import distill

Row = dict[str, Any]
UNKNOWN = 0.3  # what no denoiser can know, in every line


def line(iteration: int, teacher: float, fake: float, cosine: float = 1.0, **more: Any) -> Row:
    """A line of phase 1, where teacher and fake err by these lengths, at an angle of this cosine."""
    gap = teacher**2 + fake**2 - 2 * cosine * teacher * fake
    figures = {"teacher_error": UNKNOWN + teacher**2, "fake_error": UNKNOWN + fake**2, "gap": gap, "size": 0.5}
    row = {"phase": 1, "iteration": iteration, **figures, "clipped": 0.0, "fake_step": 1e-3, "generator_step": 0.02}
    return row | {"fake_gain": health.gain([figures]), "distance": health.distance([figures])} | more


def lines(count: int, teacher: float, fake: float, cosine: float = 1.0, **more: Any) -> list[Row]:
    """Lines that scatter a little, as lines do."""
    return [line(i, teacher * (1 + 0.05 * (-1) ** i), fake, cosine, **more) for i in range(1, count + 1)]


def nano(**overrides: Any) -> Config:
    return resolve("nano-t2i", {key.replace("__", "."): value for key, value in overrides.items()})


def toy(**overrides: Any) -> Config:
    quick = {"teacher.fit_steps": 20, "batch_size": 16, "sample_every": None}
    return resolve("toy-1d", quick | {key.replace("__", "."): value for key, value in overrides.items()})


def causes(rows: list[Row], config: Config | None = None) -> list[str]:
    return [finding.cause for finding in health.verdict(rows, config or nano())]


@pytest.mark.parametrize("part", [0.1, 0.5, 1.0, 1.5])
def test_gain_and_distance_of_a_fake_on_its_way(part: float) -> None:
    """At the part l of the way it errs by 1 - l of the teacher's error, whose square the distance is."""
    row = line(1, teacher=0.2, fake=(1 - part) * 0.2)
    assert health.gain([row]) == pytest.approx((2 - part) / part)
    assert health.distance([row]) == pytest.approx(0.2**2)


def test_gain_of_random_errors_lies_above_minus_one() -> None:
    """Errors at right angles: (t^2 - f^2) / (t^2 + f^2)."""
    assert health.gain([line(1, 0.1, 0.3, cosine=0.0)]) == pytest.approx((0.01 - 0.09) / 0.1)
    assert health.gain([line(1, 0.1, 0.2, cosine=1.0)]) == pytest.approx(-3)  # as the teacher does, only farther


def test_where_the_fake_is_the_teacher_there_is_no_gain() -> None:
    row = line(1, 0.1, 0.1)
    assert row["gap"] == pytest.approx(0, abs=1e-15) and health.gain([row | {"gap": 0.0}]) is None
    assert health.distance([row | {"gap": 0.0}]) is None


def test_the_spread_of_a_gain_is_that_of_the_jackknife() -> None:
    rows = [line(i, 0.2, 0.05 * i, 0.3) for i in range(1, 7)]
    left = [health.gain([row for row in rows if row is not out]) or 0.0 for out in rows]
    mean = sum(left) / 6
    assert health.spread(rows) == pytest.approx(math.sqrt(5 / 6 * sum((each - mean) ** 2 for each in left)))
    assert health.spread(rows[:3]) == math.inf


def test_a_line_holds_means_of_its_updates_whatever_order_they_came_in() -> None:
    """The thirds by the samples whose t fell there; none fell into the third."""
    updates = [
        {"gap": 0.1, "teacher_error": 0.5, "fake_error": 0.4, "fake_error_1": 0.1, "share_1": 0.25, "fake_error_2": 0.3,
         "share_2": 0.75, "fake_error_3": 0.0, "share_3": 0.0},
        {"gap": 0.3, "teacher_error": 0.7, "fake_error": 0.4, "fake_error_1": 0.2, "share_1": 0.5, "fake_error_2": 0.2,
         "share_2": 0.5, "fake_error_3": 0.0, "share_3": 0.0},
    ]  # fmt: skip
    sums: dict[str, float] = {}
    for update in (*updates, dict.fromkeys(updates[0])):  # the last was left out
        health.add(sums, update)
    found = health.line(sums)
    assert found["gap"] == pytest.approx(0.2) and found["teacher_error"] == pytest.approx(0.6)
    assert found["fake_error_1"] == pytest.approx(0.3 / 0.75) and found["fake_error_2"] == pytest.approx(0.5 / 1.25)
    assert found["fake_error_3"] is None and found["fake_gain"] == pytest.approx(1.0)
    assert list(found) == list(health.line(dict(reversed(sums.items()))))
    assert health.line({}) == {}


def test_a_healthy_run_is_left_alone() -> None:
    """A distance that falls; one that stays, while a fake sets out to follow and the gap opens 64 times; a slow fake's
    errors, at random, and so small beside what nobody can know that their direction tells nothing.
    """
    assert causes([line(i, 0.3 / i, 0.05 / i, cosine=0.2) for i in range(1, 12)]) == []
    assert causes([line(i, 0.2, (1 - i / 8) * 0.2) for i in range(1, 9)]) == []
    assert causes(lines(5, 0.1, 0.25, cosine=0.0)) == causes(lines(6, 0.001, 0.002)) == []


@pytest.mark.parametrize(("rows", "cause"), [
    (lines(5, 0.1, 0.25, cosine=0.0, fake_step=0.004), "fake rate"), (lines(1, 0.1, 0.05, fake_step=0.01), "fake rate"),
    (lines(6, 0.1, 0.2), "target"),
    ([line(i, 0.02 * 2**i, 0.005) for i in range(1, 6)], "generator rate"),
    (lines(1, 0.1, 0.05, generator_step=0.25), "generator rate"),
    (lines(3, 0.1, 0.1, cosine=0.5, fake_step=1e-13), "still"),
    (lines(3, 0.1, 0.05, size=140.0), "overflow"),
    (lines(5, 0.1, 0.05, clipped=1.0), "clipped"),
])  # fmt: skip
def test_each_cause_has_its_sign(rows: list[Row], cause: str) -> None:
    assert causes(rows) == [cause]
    (finding,) = health.verdict(rows, nano())
    assert str(finding).startswith(f"phase 1, iteration {finding.iteration}: ") and finding.evidence in str(finding)


def test_what_is_set_otherwise_than_in_the_recipe_is_said_once() -> None:
    rows = lines(3, 0.1, 0.02) + [row | {"phase": 2} for row in lines(3, 0.1, 0.02)]
    assert causes(rows, nano(teacher__guidance=[4.5])) == ["guidance"]
    assert causes(rows, nano(plan__shift=1.0)) == ["shift"]
    assert causes(rows, nano(plan__shift=3.0, teacher__guidance=[2.0])) == []
    assert causes(rows, nano(recipe="of my own", plan__shift=1.0)) == []


def test_a_phase_names_the_first_cause_it_shows() -> None:
    """Behind a fake that is too fast the generator moves away, too; another phase may name another cause."""
    first = lines(5, 0.1, 0.25, cosine=0.0, fake_step=0.004)
    behind = [line(i, 0.02 * 2 ** (i - 4), 0.005) for i in range(6, 10)]
    assert causes(first + behind) == ["fake rate"]
    assert causes(first + [row | {"phase": 2} for row in [line(i, 0.02 * 2**i, 0.005) for i in range(1, 6)]]) == [
        "fake rate", "generator rate"
    ]  # fmt: skip


def test_anchored_lines_and_fitted_fakes_are_not_judged() -> None:
    rows = lines(5, 0.1, 0.25, cosine=0.0, fake_step=0.004)
    assert causes(rows) == ["fake rate"] and causes(rows, toy()) == []
    anchored = {"phase": 1, "clipped": 0.0, "fake_step": None}
    assert causes([anchored | {"iteration": i} for i in range(1, 6)]) == []


def preview(iteration: int, phase: int = 1, **own: float) -> Row:
    base = {"saturation": 0.2, "contrast": 0.25, "likeness": 0.3}
    return {"phase": phase, "iteration": iteration, **base, **{f"base_{k}": v for k, v in base.items()}, **own}


@pytest.mark.parametrize(
    ("own", "cause"), [({"saturation": 0.3}, "colours"), ({"contrast": 0.4}, "contrast"), ({"likeness": 0.5}, "alike")]
)
def test_previews_that_drift_are_told_since_when(own: dict[str, float], cause: str) -> None:
    """Two in a row to the last; not one alone, nor one that came back, nor another phase's, nor without the base."""
    good, bad = [preview(i) for i in (10, 20)], [preview(i, **own) for i in (30, 40, 50)]
    (finding,) = health.verdict(lines(5, 0.1, 0.02), nano(), good + bad)
    assert (finding.cause, finding.phase, finding.iteration) == (cause, 1, 30) and "since iteration 30" in str(finding)
    assert health.seen([*good, bad[0]]) == health.seen([*bad, preview(60)]) == health.seen(good) == []
    assert health.seen([*bad, preview(10, phase=2)]) == []
    alone = [{key: value for key, value in row.items() if not key.startswith("base_")} for row in bad]
    assert health.seen(alone) == []


def test_looks_are_of_pictures_and_of_the_bases() -> None:
    """Half red and half black: saturation of red 1, of black 0; all alike. Points have none."""
    red = torch.zeros(2, 1, 4, 4, 3)
    red[..., :2, 0] = 1
    grey = torch.rand(2, 1, 4, 4, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, -1, -1, 3)
    found = health.looks(red, grey)
    assert found["saturation"] == pytest.approx(0.5) and found["likeness"] == pytest.approx(1)
    assert found["contrast"] == pytest.approx(float(torch.tensor([1 / 3] * 8 + [0.0] * 8).std()))
    assert found["base_saturation"] == pytest.approx(0) and abs(found["base_likeness"]) < 0.9
    assert set(health.looks(red[:1], None)) == {"saturation", "contrast", "detail"}
    assert health.looks(torch.zeros(5, 2), torch.zeros(5, 2)) == {}


def test_a_run_logs_its_figures_and_warns_of_a_fake_that_stands_still(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="health: phase 1, iteration 4: the fake stands still: raise fake.lr"):
        distill(toy(iterations=4, log_every=2, fake__lr=1e-14), tmp_path / "run", quiet=True)
    rows = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["fake_step"] < 1e-9 < row["generator_step"] for row in rows)
    for row in rows:
        assert row["fake_gain"] == pytest.approx((row["teacher_error"] - row["fake_error"]) / row["gap"])
        assert row["distance"] == pytest.approx(row["gap"] * max(0, 1 + row["fake_gain"]) ** 2 / 4)
        assert 0 < row["size"] < 10 and sum(row[f"fake_error_{third}"] is not None for third in (1, 2, 3))
