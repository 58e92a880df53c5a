"""The paper's Fig. 2 at a size for tests, and the statistics of a study."""

import math
from pathlib import Path

import pytest
import torch

from phased_dmd.diffusion import FlowSchedule
from phased_dmd.models.analytic import ExactMixture
from phased_dmd.objectives import biased_target, subinterval_target
from phased_dmd.reproduce import fig2, fit_subinterval, interval, trajectories


def test_only_the_unbiased_objective_keeps_the_trajectories() -> None:
    """Four points, models of (.5, 1) from x_.5 alone: < .02 from the exact flow, the biased one 5 times that."""
    schedule = FlowSchedule()
    exact = ExactMixture(torch.tensor([[-1.0], [0.0], [1.0], [2.0]]), 0.0, torch.ones(4), schedule, "flow")
    noise = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    truth = trajectories(exact, noise, schedule)
    unbiased, biased = (
        float((trajectories(fit_subinterval(exact, 0.5, target, 0, 600, 64), noise, schedule) - truth).abs().mean())
        for target in (subinterval_target, biased_target)
    )
    assert unbiased < 0.02
    assert biased > 5 * unbiased


def test_fig2_writes_its_table_and_picture(tmp_path: Path) -> None:
    text = fig2([0], tmp_path, steps=5, hidden=8).read_text()
    assert "subinterval, biased" in text and "phased-dmd reproduce fig2" in text
    assert (tmp_path / "fig2.png").stat().st_size > 10_000


def test_the_interval_is_students() -> None:
    """Three values: the quantile of two degrees of freedom is 4.3027."""
    result = interval([1.0, 2.0, 3.0])
    assert result["mean"] == 2
    assert result["half_width"] == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert interval([1.0])["half_width"] is None
