"""The measures against closed forms and reference libraries."""

import math
from pathlib import Path

import pytest
import scipy.linalg
import torch
from torch import Tensor

from phased_dmd.metrics.digits import DIRECTIONS, load_classifier, read
from phased_dmd.metrics.distances import (
    class_entropy,
    energy_distance,
    frechet,
    mode_histogram_kl,
    moments,
    pairwise_cosine,
    principal_components,
)
from phased_dmd.metrics.pictures import contrast, displacement, high_frequency_energy, optical_flow

RNG = torch.Generator().manual_seed(0)
DATA = Path(__file__).parents[1] / "data" / "mnist_5k.csv.gz"


def covariance(dims: int) -> Tensor:
    root = torch.randn(dims, dims, generator=RNG, dtype=torch.float64)
    return root @ root.T / dims


def test_frechet_of_diagonal_gaussians_has_a_closed_form() -> None:
    """|m_a - m_b|^2 + sum (std_a - std_b)^2."""
    mean_a, mean_b = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.0, 1.0, 3.0])
    std_a, std_b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([2.0, 2.0, 0.0])
    expected = float((mean_a - mean_b).square().sum() + (std_a - std_b).square().sum())
    assert frechet((mean_a, std_a.square().diag()), (mean_b, std_b.square().diag())) == pytest.approx(
        expected, abs=1e-9
    )


def test_frechet_equals_the_definition_through_scipy() -> None:
    a, b = covariance(6), covariance(6)
    root = scipy.linalg.sqrtm((a @ b).numpy()).real
    zero = torch.zeros(6)
    assert frechet((zero, a), (zero, b)) == pytest.approx(float(a.trace() + b.trace()) - 2 * root.trace(), abs=1e-8)
    assert frechet((zero, a), (zero, a)) == pytest.approx(0, abs=1e-8)


def test_moments_are_those_of_numpy() -> None:
    features = torch.randn(50, 4, generator=RNG, dtype=torch.float64)
    mean, cov = moments(features)
    assert torch.allclose(mean, features.mean(0))
    centred = features - mean
    assert torch.allclose(cov, centred.T @ centred / 49)


def test_principal_components_find_the_directions_of_variance() -> None:
    basis = torch.linalg.qr(torch.randn(8, 8, generator=RNG, dtype=torch.float64))[0]
    scales = torch.tensor([5.0, 3.0] + [0.01] * 6, dtype=torch.float64)
    vectors = torch.randn(4000, 8, generator=RNG, dtype=torch.float64) * scales @ basis.T + 7
    mean, found = principal_components(vectors, 2)
    assert torch.allclose(mean, torch.full((8,), 7.0, dtype=torch.float64), atol=0.5)
    assert (found.T @ basis[:, :2]).abs().diag().min() > 0.999


def test_entropy_of_known_histograms() -> None:
    assert class_entropy(torch.arange(1000) % 10, 10) == pytest.approx(math.log(10))
    assert class_entropy(torch.zeros(9, dtype=torch.long), 10) == 0
    assert class_entropy(torch.tensor([0, 0, 0, 1]), 10) == pytest.approx(
        -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    )


def test_pairwise_cosine_of_known_angles() -> None:
    assert pairwise_cosine(torch.eye(5)) == pytest.approx(0)
    assert pairwise_cosine(torch.ones(4, 3) * torch.tensor([[1.0], [2.0], [3.0], [4.0]])) == pytest.approx(1)
    angle = math.radians(60)
    pair = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
    assert pairwise_cosine(pair) == pytest.approx(0.5, abs=1e-6)


def test_mode_histogram_kl_is_zero_for_the_weights_and_known_for_a_dropped_mode() -> None:
    means = torch.tensor([[0.0], [10.0]])
    weights = torch.tensor([0.5, 0.5])
    assert mode_histogram_kl(torch.tensor([[0.1], [9.0], [0.3], [11.0]]), means, weights) == pytest.approx(0)
    assert mode_histogram_kl(torch.tensor([[0.1], [-9.0]]), means, weights) == pytest.approx(math.log(2))


def test_energy_distance_of_shifted_points() -> None:
    """For two point masses a distance d apart it is 2 d."""
    assert energy_distance(torch.zeros(5, 1), torch.full((7, 1), 3.0)) == pytest.approx(6)
    x, y = (torch.randn(2000, 2, generator=RNG) for _ in range(2))
    assert abs(energy_distance(x, y)) < 0.01


@pytest.mark.parametrize(("cycles", "high"), [(2, False), (8, False), (9, True), (16, True)])
def test_high_frequencies_and_contrast_of_gratings(cycles: int, high: bool) -> None:
    """By Parseval a grating's whole power lies at its frequency; half of Nyquist is 8 cycles in 32 pixels."""
    wave = torch.cos(2 * math.pi * torch.arange(32.0) * cycles / 32).expand(32, 32)
    frame = wave[None, None, :, :, None].expand(1, 1, 32, 32, 3)
    frequency = torch.fft.fftfreq(32).abs()
    above = int((torch.maximum(frequency[:, None], frequency[None]) > 0.25).sum())
    expected = float(wave.square().sum()) / above if high else 0.0
    assert high_frequency_energy(frame) == pytest.approx(expected, abs=1e-5)
    assert contrast(frame) == pytest.approx(float(wave.flatten().std()), rel=1e-5)


def test_displacement_of_a_moving_square() -> None:
    """A 4 x 4 square at 1 pixel a frame over nine frames: its thirds' mean centres are six pixels apart."""
    for name, (right, down) in DIRECTIONS.items():
        clip = torch.zeros(1, 9, 32, 32, 3)
        for frame in range(9):
            x, y = round(14 + right * (frame - 4)), round(14 + down * (frame - 4))
            clip[0, frame, y : y + 4, x : x + 4] = 1
        assert displacement(clip)[0].tolist() == pytest.approx([6 * right, 6 * down], abs=1e-4), name


def test_optical_flow_of_a_shifted_texture() -> None:
    """Smooth noise that moves three pixels a frame."""
    texture = torch.nn.functional.interpolate(torch.rand(1, 1, 24, 24, generator=RNG), scale_factor=4, mode="bicubic")
    frames = torch.stack([texture[0, 0, 10:74, 10 + 3 * i : 74 + 3 * i] for i in range(3)]).clamp(0, 1)
    assert optical_flow(frames[None, ..., None].expand(1, 3, 64, 64, 3)) == pytest.approx(3, abs=0.2)


def test_the_shipped_classifier_reads_held_out_digits() -> None:
    """The accuracy and the moments that it carries, measured again on other draws of the held-out digits."""
    from phased_dmd.teach.digits import image_batch, load_digits

    classifier, real, stated = load_classifier()
    pixels, _, labels = image_batch(load_digits(DATA)[1], 4000, torch.Generator().manual_seed(1))
    features, log_probabilities = read(classifier, pixels.permute(0, 2, 3, 4, 1) / 2 + 0.5)
    assert stated > 0.97
    assert float((log_probabilities.argmax(1) == labels).double().mean()) == pytest.approx(stated, abs=0.01)
    assert frechet(moments(features), (real["mean"], real["covariance"])) < 0.6  # .3 from the draws alone
