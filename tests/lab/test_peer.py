"""What the benchmarks say of a peer, and, where its package is installed, whether it is used as it is meant."""

import itertools
from pathlib import Path
from typing import Any

import peer_page
import pytest
import torch
from contests import FAST, key
from peak import Peak, Update, largest, peak
from peer import MATCHES, PEER, Options, likely, meet, value_at
from torch import nn

from phased_dmd.engine.randomness import normal
from phased_dmd.lab.reproduce.claim import Criterion
from phased_dmd.maths.schedules import predicted_x0
from phased_dmd.recipes import resolve
from phased_dmd.sampling.loading import load

WEAK, SPECIFIC = Criterion("weak", "f"), Criterion("specific", "f")
OPTIONS = Options(lr=1e-3, fake_lr=1e-3)


def curve(costs: list[float], *by_measure: list[list[float]]) -> list[dict[str, Any]]:
    """Points of a side, for each measure the values by seed; a call costs a second."""
    return [
        {
            "calls": cost, "cpu_seconds": cost,
            "values": {key(m): {"values": values[i]} for m, values in zip((WEAK, SPECIFIC), by_measure, strict=False)},
        }
        for i, cost in enumerate(costs)
    ]  # fmt: skip


def test_the_peers_best_is_that_of_any_of_its_budgets_at_that_budgets_cost() -> None:
    """It falls apart after 200; ours gets there between 10 and 40, half way in the logarithm."""
    curves = {PEER: curve([100, 200, 400], [[4], [2], [9]]), FAST: curve([10, 40], [[3], [1]])}
    found = meet(curves, [WEAK], [0])
    assert found["targets"] == {"weak/f": 2}
    assert found["reached"] == {
        PEER: {"calls": 200, "cpu_seconds": 200},
        FAST: pytest.approx(dict.fromkeys(("calls", "cpu_seconds"), 20)),
    }
    assert found["ratios"]["cpu_seconds"] == pytest.approx(10)
    assert found["distances"] == {"weak/f": 2}, "ours has ended at 1 before 200 seconds"


def test_of_two_measures_the_slower_decides_what_a_best_costs() -> None:
    curves = {
        PEER: curve([100, 200], [[2], [3]], [[4], [1]]), FAST: curve([10, 80], [[2], [1]], [[8], [0.5]]),
    }  # fmt: skip
    found = meet(curves, [WEAK, SPECIFIC], [0])
    assert found["reached"][PEER]["calls"] == 200 and found["reached"][FAST]["calls"] > 10
    assert found["distances"] == {"weak/f": 2, "specific/f": 2}


def test_a_draw_in_which_ours_is_not_there_counts_as_nothing() -> None:
    """By seed 1 ours never gets there; all draws of one seed are that seed."""
    curves = {PEER: curve([100], [[2, 2]]), FAST: curve([10], [[1, 9]])}
    found = likely(curves, [WEAK], 2)
    assert found["ratios"]["calls"] is None and found["middle"]["ratios"]["calls"] == [0, 10]
    assert found["middle"]["distances"]["weak/f"] == [pytest.approx(2 / 9), 2]
    lines = peer_page.verdict(found)
    assert "| weak/f 2 | 100 / not reached | 100 / not reached | - (0 to 10) | - (0 to 10) |" in lines


def test_a_curve_is_read_between_its_budgets_and_not_before_the_first() -> None:
    assert value_at([10, 1000], [4, 2], 100) == pytest.approx(3)
    assert value_at([10, 1000], [4, 2], 5) is None
    assert value_at([10, 1000], [4, 2], 5000) == 2
    assert value_at([10, 1000], [2, 4], 5000) == 3, "what rises again is averaged"


def test_the_peak_is_that_of_the_largest_update() -> None:
    """w x keeps x [5], the gradient is that of w [5], and the other update's are shorter by half."""
    large, small = (nn.Parameter(torch.ones(n)) for n in (6, 3))
    updates = [
        Update([p], lambda p=p: (p * torch.rand(len(p))).sum().backward()) for p in (large, small)
    ]  # fmt: skip
    assert largest(updates, [large, small]) == Peak(resident=4 * 9, gradients=4 * 6, saved=4 * 6)
    assert large.grad is None and small.grad is None


@pytest.mark.parametrize("recipe", MATCHES)
def test_smaller_calls_save_what_backward_needs_and_nothing_else(recipe: str) -> None:
    quick = {"teacher.fit_steps": 2} if recipe == "toy-2d" else {}
    whole = peak(fast := resolve(f"{recipe}-fast", quick))
    parts = peak(resolve(f"{recipe}-fast", quick | {"engine.micro_batch": fast.batch_size // 4}))
    assert (parts.resident, parts.gradients) == (whole.resident, whole.gradients)
    assert parts.saved < whole.saved / 2


def test_the_matches_are_on_the_contests_recipes_with_five_seeds_at_least() -> None:
    for recipe, match in MATCHES.items():
        assert match.contest.recipe == recipe and len(match.seeds) >= 5
        options = next(iter(match.ladder.values()))
        assert options.grid(options.config(recipe, 1, 0)) == pytest.approx(
            resolve(recipe).plan.shift * torch.tensor([1, 0.75, 0.5, 0.25, 0]).double()
            / (1 + (resolve(recipe).plan.shift - 1) * torch.tensor([1, 0.75, 0.5, 0.25, 0]).double())
        )  # fmt: skip
        assert set(match.seeds).isdisjoint(range(100, 200)), "those of tuning"


class TestThePackage:
    """Its conventions of time, guidance and sampling, and its calls."""

    @pytest.fixture(autouse=True)
    def package(self) -> None:
        pytest.importorskip("modelopt.torch.fastgen")

    def test_its_student_is_sampled_as_its_own_pipeline_unrolls_it(self, tmp_path: Path) -> None:
        from modelopt.torch.fastgen.flow_matching import add_noise, x0_to_eps
        from modelopt_dmd2 import begin, train

        config = OPTIONS.config("toy-2d", 3, seed=1)
        train(config, OPTIONS, tmp_path / "run")
        sampler = load(tmp_path / "run")
        training = begin(config, OPTIONS, tmp_path)
        training.pipeline.student = sampler.system.roles.module("phase_1", 0)
        x = normal((2,), [5, 6], "any")
        ours = sampler.system.roll(sampler.system.plan.path(1), x, {}).x
        for time, end in itertools.pairwise(OPTIONS.grid(config)):
            t = torch.full((2,), time)
            x0 = training.pipeline._predict_x0(training.pipeline.student, x, t)
            x = add_noise(x0, x0_to_eps(x0, x, t), torch.full((2,), end)) if end else x0
        assert torch.allclose(x, ours, atol=1e-5)
        assert config.method == "dmd" and len((tmp_path / "run" / "timing.jsonl").read_text().splitlines()) == 3

    def test_its_teacher_is_told_our_times_and_guided_as_ours(self, tmp_path: Path) -> None:
        from modelopt.torch.fastgen.utils import classifier_free_guidance
        from modelopt_dmd2 import begin

        from phased_dmd.networks.build import build_system

        config = OPTIONS.config("nano-t2i", 1, seed=1)
        training = begin(config, OPTIONS, tmp_path)
        pipeline, conditions = training.pipeline, training.conditions
        assert conditions is not None
        system = build_system(config, training.model, conditions.negative)
        condition = training.model.batch([conditions.row(0, 0), conditions.row(1, 0)])
        x, t = normal(training.model.sample_shapes[0], [1, 2], "any"), torch.tensor([0.9, 0.3])
        ours = predicted_x0(system.teacher(x, t.double(), condition), x, t.double(), training.model.schedule, "flow")
        texts = condition["text"], training.model.batch([conditions.negative] * 2)["text"]
        theirs = [pipeline._predict_x0(pipeline.teacher, x, t, encoder_hidden_states=text) for text in texts]
        guided = classifier_free_guidance(*theirs, pipeline.config.guidance_scale or 1.0)
        assert torch.allclose(ours, guided, atol=1e-5)
        assert not torch.allclose(ours, theirs[0], atol=1e-2), "guidance does something"

    def test_an_update_makes_the_calls_that_are_counted(self, tmp_path: Path) -> None:
        """In the mean over the steps that are drawn for the students' inputs; backwards count two."""
        from modelopt_dmd2 import begin

        config = OPTIONS.config("toy-2d", 1, seed=1)
        training, calls = begin(config, OPTIONS, tmp_path), [0.0]

        def count(module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            calls[0] += 3 if output.requires_grad else 1

        pipeline, rounds = training.pipeline, 150
        for network in (pipeline.student, pipeline.teacher, pipeline.fake_score):
            network.register_forward_hook(count)
        for _ in range(rounds):
            for student in (*[False] * (OPTIONS.frequency - 1), True):
                training.loss(student)
        assert calls[0] / rounds == pytest.approx(OPTIONS.forwards(config), rel=0.03)

    def test_a_student_that_is_an_adapter_is_written_merged(self, tmp_path: Path) -> None:
        from modelopt_dmd2 import begin, student_weights

        options = Options(lr=1e-2, fake_lr=1e-3, lora=4, ema=None)
        config = options.config("nano-t2i", 1, seed=1)
        training = begin(config, options, tmp_path)
        before = student_weights(training)
        training.loss(True).backward()
        training.step(True, 0)
        after = student_weights(training)
        names = {f"0.{name}" for name, _ in training.model.networks[0].named_parameters()}
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        assert after.keys() == names and moved and all(".to_" in name or ".ffn." in name for name in moved)
