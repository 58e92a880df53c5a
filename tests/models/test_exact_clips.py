"""The exact mixture of clips: its prediction by closed forms, its clips, its student, and a run from end to end."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.autograd import grad

from phased_dmd.config.overrides import build
from phased_dmd.contact_sheet import read_sheet
from phased_dmd.engine.randomness import generator
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate import Protocol, evaluate
from phased_dmd.lab.evaluate.measures import clip_statistics, mixture_statistics
from phased_dmd.lab.metrics.digit_classifier import DIRECTIONS
from phased_dmd.lab.report import write_report
from phased_dmd.lab.teach.mixture import CLIP_SPEEDS, make_clips
from phased_dmd.lab.teach.mnist import load_digits
from phased_dmd.maths.schedules import coefficients
from phased_dmd.media import read_media
from phased_dmd.models.analytic import CLIP_FIT, SCHEDULES, ClipCodec, ExactMixture, fit_student
from phased_dmd.models.exact_clips import Clips, ClipTransformer, load_clips
from phased_dmd.pixels import displacement
from phased_dmd.prompts import Prompt
from phased_dmd.recipes import read_recipe, resolve
from phased_dmd.sampling.loading import load
from phased_dmd.sampling.writing import write_samples
from phased_dmd.train import distill

DATA = Path(__file__).parents[2] / "data" / "mnist_5k.csv.gz"
TIMES = torch.tensor([0.02, 0.3, 0.7, 0.9, 0.97, 1.0], dtype=torch.float64)
STD = 0.1


@pytest.fixture(scope="module")
def clips() -> Clips:
    return load_clips()


def noised(clips: Clips, exact: ExactMixture) -> Tensor:
    """Samples of six times, where the mode is known and where it is not."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(len(TIMES), *clips.pixels.shape[1:], generator=rng, dtype=torch.float64)
    alpha, sigma = (of(TIMES).view(-1, 1, 1, 1) for of in (exact.schedule.alpha, exact.schedule.sigma))
    return alpha * clips.pixels[:: len(clips.pixels) // len(TIMES)][: len(TIMES)] + sigma * noise


@pytest.mark.parametrize("name", ["flow", "vp-cosine"])
@pytest.mark.parametrize("prediction", ["flow", "x0", "eps", "v"])
def test_the_prediction_is_the_direct_formulas(name: str, prediction: str, clips: Clips) -> None:
    """The formula over all modes and dimensions, mode by mode, with unequal weights."""
    weights = torch.rand(len(clips.pixels), generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    exact = ExactMixture(clips.pixels, STD, weights, SCHEDULES[name], prediction)  # type: ignore[arg-type]
    x, shape = noised(clips, exact), (-1, 1, 1, 1, 1)
    alpha, sigma = exact.schedule.alpha(TIMES).view(shape), exact.schedule.sigma(TIMES).view(shape)
    p, q = (each.view(shape) for each in coefficients(exact.prediction, alpha.flatten(), sigma.flatten()))
    variance, offset = alpha**2 * STD**2 + sigma**2, x[:, None] - alpha * clips.pixels
    score = weights.log() - offset.square().sum((2, 3, 4)) / (2 * variance.view(-1, 1))
    of_mode = p * (clips.pixels + alpha * STD**2 / variance * offset) + q * sigma / variance * offset
    known = (score.softmax(1)[..., None, None, None] * of_mode).sum(1)
    assert torch.allclose(exact(x, TIMES), known, rtol=0, atol=1e-9)


def test_the_predicted_noise_is_the_score_of_the_mixtures_density(clips: Clips) -> None:
    """E[eps | x_t] = -sigma times the gradient of log p(x_t), by autograd."""
    exact = ExactMixture(clips.pixels, STD, torch.ones(len(clips.pixels)), SCHEDULES["flow"], "eps")
    x = noised(clips, exact).requires_grad_()
    alpha, sigma = 1 - TIMES, TIMES
    variance = (alpha**2 * STD**2 + sigma**2)[:, None]
    apart = (x[:, None] - alpha.view(-1, 1, 1, 1, 1) * clips.pixels).flatten(2).square().sum(2)
    (score,) = grad((-apart / (2 * variance)).logsumexp(1).sum(), x)
    known = -sigma.view(-1, 1, 1, 1) * score
    assert torch.allclose(exact(x.detach(), TIMES), known, rtol=0, atol=1e-9)


def test_exact_samples_have_the_mixtures_moments(clips: Clips) -> None:
    exact = ExactMixture(clips.pixels, STD, torch.ones(len(clips.pixels)), SCHEDULES["flow"], "flow")
    u, rng = (torch.arange(6000) + 0.5) / 6000, torch.Generator().manual_seed(0)
    noise = torch.randn(6000, *clips.pixels.shape[1:], generator=rng)
    for x in (exact.sample(6000, rng).double(), exact.marginal(1e-6, u, noise).double()):
        assert (x.mean(0) - clips.pixels.mean(0)).abs().max() < 0.07  # a pixel's deviation is at most 1
        variance = clips.pixels.var(0, correction=0) + STD**2
        assert float(x.var(0).mean()) == pytest.approx(float(variance.mean()), rel=0.05)


# ---------------------------------------------------------------- the clips


def test_a_clip_moves_as_its_labels_say(clips: Clips) -> None:
    """From the first frame to the last the ink's centre goes four times the speed, in the clip's direction."""
    ways = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float64)
    moved = displacement((clips.pixels[..., None] + 1) / 2)
    assert torch.allclose(moved, 4 * clips.speed[:, None] * ways[clips.direction], rtol=0, atol=0.25)
    kinds = set(zip(clips.digit.tolist(), clips.direction.tolist(), clips.speed.tolist(), strict=True))
    assert len(kinds) == len(clips.pixels) == 10 * len(DIRECTIONS) * len(CLIP_SPEEDS)


def test_the_shipped_clips_are_those_that_teach_makes(clips: Clips) -> None:
    """In whole numbers of grey, of which another build of torch may round one in a hundred the other way."""
    made = make_clips(load_digits(DATA)[0], torch.Generator().manual_seed(0))
    shipped = ((clips.pixels + 1) * 127.5).round()
    assert (made["pixels"] - shipped).abs().max() <= 1 and (made["pixels"] != shipped).double().mean() < 0.01
    assert all(made[name].equal(getattr(clips, name)) for name in ("digit", "direction", "speed"))


def test_what_is_read_off_samples_is_what_they_are(clips: Clips) -> None:
    """All clips lose nothing; the fast ones log 3 of the speeds, one digit's log 10, of the whole's entropies."""

    def read(chosen: Tensor) -> dict[str, float]:
        samples = clips.pixels[chosen] + 0.02
        return {name: of(torch.arange(len(samples))) for name, of in clip_statistics(samples, clips).items()}

    everything = torch.ones(len(clips.pixels), dtype=torch.bool)
    whole = {"clip_speed": 0.8, "class_kl": 0.0, "direction_kl": 0.0, "speed_kl": 0.0}
    assert read(everything) == pytest.approx(whole, abs=1e-9)
    assert read(clips.speed == 1.2) == pytest.approx(whole | {"clip_speed": 1.2, "speed_kl": math.log(3)}, abs=1e-9)
    assert read(clips.digit == 7) == pytest.approx(whole | {"class_kl": math.log(10)}, abs=1e-9)
    up = read(clips.direction == list(DIRECTIONS).index("up"))
    assert up == pytest.approx(whole | {"direction_kl": math.log(4)}, abs=1e-9)


def test_exact_samples_are_as_far_from_their_clip_as_the_noise_is_long(clips: Clips) -> None:
    """The mean length of noise of deviation std in d dimensions is std sqrt(d), but for 1 / (4 d) of it."""
    exact = ExactMixture(clips.pixels, STD, torch.ones(len(clips.pixels)), SCHEDULES["flow"], "flow")
    found = mixture_statistics(exact.sample(600, torch.Generator().manual_seed(3)), exact)
    keep, length = torch.arange(600), STD * math.sqrt(clips.pixels[0].numel())
    assert found["distance_to_nearest_mode"](keep) == pytest.approx(length, rel=0.005)
    assert abs(found["energy_distance"](keep)) < 0.05
    assert found["mode_histogram_kl"](keep) == pytest.approx(119 / 1200, abs=0.04)  # the bias of few samples


# ---------------------------------------------------------------- the student


@pytest.mark.parametrize("layers", [0, 1])
def test_frames_meet_in_the_blocks_alone(layers: int) -> None:
    """Without one, a change of a frame of the input is one of the same frame of the output, and of no other."""
    torch.manual_seed(0)
    student = ClipTransformer((3, 4, 6), lambda t: (t, 1 - t), width=32, layers=layers)
    torch.nn.init.normal_(student.head)
    x, t = torch.randn(2, 3, 4, 6), torch.rand(2, dtype=torch.float64)
    changed = x.clone()
    changed[:, 1] += torch.randn(2, 4, 6)
    apart = (student(changed, t) - student(x, t)).abs().amax((0, 2, 3))
    assert apart[1] > 0.1 and bool((apart[[0, 2]] > 0).all()) == (layers > 0)


def test_a_student_of_the_right_mean_is_exact(clips: Clips) -> None:
    """One clip is a mixture of one, whose mean is the same everywhere: a head that says it, of normed ones."""
    for name, prediction in itertools.product(SCHEDULES, ("flow", "x0", "eps", "v")):
        exact = ExactMixture(clips.pixels[:1], STD, torch.ones(1), SCHEDULES[name], prediction)  # type: ignore[arg-type]
        student = ClipTransformer(clips.pixels.shape[1:], exact.factors, width=1, layers=0)
        torch.nn.init.ones_(student.norm.bias)
        student.head.data[:, 0] = clips.pixels[0].flatten(1).float()
        x = torch.randn(4, *clips.pixels.shape[1:], generator=torch.Generator().manual_seed(0))
        t = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
        assert torch.allclose(student(x, t), exact(x, t), rtol=1e-5, atol=1e-5)


def test_a_sample_is_shown_in_grey() -> None:
    shown = ClipCodec().decode(torch.tensor([-1.2, -1.0, 0.0, 1.0, 3.0]).view(1, 5, 1, 1))
    assert shown.shape == (1, 5, 1, 1, 3)
    assert shown[0, :, 0, 0].tolist() == [[value] * 3 for value in (0.0, 0.0, 0.5, 1.0, 1.0)]


# ---------------------------------------------------------------- a run


def test_clips_have_no_weights() -> None:
    recipe = read_recipe("exact-clips")
    with pytest.raises(UserError, match="weights: clips are all alike"):
        build(recipe | {"teacher": recipe["teacher"] | {"weights": [1.0, 2.0]}})


def test_a_run_is_previewed_sampled_evaluated_and_reported_as_clips(tmp_path: Path) -> None:
    quick = {
        "iterations": 1, "batch_size": 2, "fake.updates": 1, "teacher.fit_steps": 1, "teacher.base_steps": 8,
        "plan.phases": 2, "sample_every": 1, "log_every": 1,
    }  # fmt: skip
    run = tmp_path / "run"
    distill(resolve("exact-clips", quick), run, quiet=True)
    (sheet,) = [found for path in sorted(run.rglob("samples/*.png"))[-1:] if (found := read_sheet(path))]
    assert sheet[0].frames == 5 and sheet[0].tile == [128, 128]
    sampler = load(run)
    paths = write_samples(sampler, [Prompt("")], 2, tmp_path / "shown", 8)
    assert [path.suffix for path in paths] == [".webp", ".webp", ".jsonl", ".png"]
    frames, fps = read_media(paths[0])
    assert frames.shape == (5, 128, 128, 3) and fps == pytest.approx(8, rel=0.02)
    (found,) = evaluate([run], Protocol(samples=64)).values()
    (row, *_), cells = found["sets"]["mixture"]["rows"], found["sets"]["mixture"]["rows"]
    assert row == "base, 8 steps" and cells[row]["clip_speed"]["value"] == pytest.approx(0.8, abs=0.15)
    with Image.open(run / "samples" / "mixture" / "base-8-steps" / "00-frames.png") as strip:
        assert strip.size == (5 * 16, 16)
    page = write_report([run], tmp_path / "page.html").read_text()
    assert "a mixture of the shipped clips" in page and "data:image/webp" in page


@pytest.mark.skipif(device().type != "cpu", reason="a bound that CPUs were seen to keep")
def test_the_fit_brings_the_student_near_the_exact_prediction(clips: Clips) -> None:
    """Of the energy of the prediction at one time, a few steps leave less than a third; an untrained one has all."""
    exact = ExactMixture(clips.pixels, STD, torch.ones(len(clips.pixels)), SCHEDULES["flow"], "flow")
    torch.manual_seed(0)
    student = ClipTransformer(clips.pixels.shape[1:], exact.factors)
    fit_student(student, exact, 100, generator(0, "fit"), **CLIP_FIT | {"batch": 16})
    t = torch.full((64,), 0.9, dtype=torch.float64)
    x = exact.marginal(0.9, torch.rand(64), torch.randn(64, *clips.pixels.shape[1:]))
    with torch.no_grad():
        left = (student(x, t) - exact(x, t)).square().mean() / exact(x, t).square().mean()
    assert left < 1 / 3
