"""The study of guidance's ceiling: without guidance all laws are one, and its functional is what DMD descends."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from phased_dmd.maths.losses import matching_gradient
from phased_dmd.maths.phases import T_MIN
from phased_dmd.maths.schedules import renoise_times, times_like


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = spec_from_file_location("guidance", Path(__file__).parents[1] / "scripts" / "guidance.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_guidance_the_class_the_sampler_and_matching_are_one_law(study: ModuleType) -> None:
    """And four steps are not: .032, of an energy distance that is 0 for the rest, but for the steps of the grid."""
    laws = study.laws_of(1.0)
    for name in ("the sampler", "matching at rest"):
        assert study.energy(laws[name], laws["the class"]) < 1e-4
    assert study.energy(laws["its 4 steps"], laws["the class"]) == pytest.approx(0.032, abs=0.002)
    assert study.Matching(1.0)(laws["the class"])[0] == pytest.approx(0, abs=1e-12)


def test_the_functional_falls_to_where_no_law_is_better(study: ModuleType) -> None:
    """By the certificate of a convex functional; the sampler's law and the class are higher."""
    matching = study.Matching(2.0)
    law, value, above = matching.rest()
    assert above < 6e-4 and 0 < value < matching(study.shares_of_class())[0] / 5
    sampler = np.histogram(study.sampled(2.0, study.MANY), np.append(study.GRID, 2 * study.GRID[-1]))[0] + 1e-9
    assert value + above < matching(sampler / sampler.sum())[0]


@pytest.mark.parametrize("scale", [1.5, 3.0])
def test_the_functional_is_what_dmd_descends(scale: float, study: ModuleType) -> None:
    """Its gradient in the shares, differentiated in x_0, is the mean gradient of a sample there (posterior weighting).

    The fake is exact for the class, the noise by Gauss-Hermite quadrature, the times the study's own.
    """
    _, gradient = study.Matching(scale)(study.shares_of_class())
    slope = np.gradient(gradient, study.GRID)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    eps = torch.tensor(nodes)[:, None]
    u = (torch.arange(study.TIMES, dtype=torch.float64) + 0.5) / study.TIMES
    times = renoise_times(u, T_MIN, 1.0, shift=1.0).tolist()
    teacher, fake = study.Guided(scale), study.mixture(study.CLASS)
    for place in (60, 115, 150, 205, 240):
        x = torch.full_like(eps, study.GRID[place])

        def mean(t: float, x: Tensor = x) -> float:
            zero = times_like(0.0, x)
            found, _ = matching_gradient(
                x, eps, zero, times_like(t, x), study.FLOW, "flow", teacher, fake, "posterior"
            )  # fmt: skip
            return float((torch.tensor(weights) @ found)[0] / weights.sum())

        expected = sum(map(mean, times)) / len(times)
        assert slope[place] == pytest.approx(expected, rel=0.02, abs=2e-3)
