"""`evaluate`: a run's generator against its base, in numbers.

Every row is sampled from the same seeds. Digits are compared with the base at its own number of steps twice: with
samples of other seeds, where the base's own row is the floor that two sets of one law leave, and (`paired`) with those
of the same seeds, where a student that keeps to the base's trajectories may come closer than that floor. Mixtures are
compared with exact samples.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phased_dmd.checkpoint import RunFolder, write_atomically
from phased_dmd.config import AnalyticTeacher, Config, Size, UserError, WanTeacher
from phased_dmd.media import grid, save_clip, save_image, save_points
from phased_dmd.metrics.digits import DIRECTIONS, SPEEDS, WORDS, DigitClassifier, load_classifier, read
from phased_dmd.metrics.distances import (
    Moments,
    class_entropy,
    energy_distance,
    frechet,
    mode_histogram_kl,
    moments,
    pairwise_cosine,
    principal_components,
)
from phased_dmd.metrics.motion import optical_flow
from phased_dmd.metrics.pictures import contrast, displacement, high_frequency_energy
from phased_dmd.models.analytic import ExactMixture
from phased_dmd.models.source import SHIPPED
from phased_dmd.prompts import Prompt, read_prompts
from phased_dmd.sample import Sampler, load

REFERENCE_SEEDS, SEEDS = 1_000_000, 0  # the first seed of the reference's samples, and of every row's
COMPONENTS = 32  # of the pixels' principal component analysis
DIVERSITY_SEEDS = 8  # per prompt, as in the paper
SHOWN = 20  # pictures, or 5 clips, of each row
HEADINGS = {  # of a measure: title, how to read it
    "class_entropy": ("class entropy", "nats, of the digits read; 2.30 when all ten are equally frequent"),
    "least_class_share": ("rarest class", "share of the samples read as the least frequent digit"),
    "frechet_features": (
        "Fréchet, features",
        "to the base's many-step samples of other seeds, classifier features",
    ),
    "frechet_pca": ("Fréchet, pixels", "the same in 32 principal components of the pixels"),
    "frechet_features_paired": ("Fréchet, features, paired", "to the base's many-step samples of the same seeds"),
    "frechet_pca_paired": ("Fréchet, pixels, paired", "to the base's many-step samples of the same seeds"),
    "frechet_real": ("Fréchet to real digits", "held-out pictures, classifier features"),
    "high_frequency_energy": ("high-frequency energy", "mean power above half the Nyquist frequency"),
    "contrast": ("contrast", "standard deviation of grey values"),
    "faithfulness": ("faithfulness", "share of samples whose digit is read as the prompt names it"),
    "direction": ("direction", "share of clips that move the way the prompt names"),
    "optical_flow": ("optical flow", "mean absolute, pixels a frame, OpenCV DIS"),
    "pixels_moved_fast": ("moved, fast", "pixels, from the first third of a clip to its last"),
    "pixels_moved_slowly": ("moved, slowly", "pixels"),
    "pairwise_cosine": ("pairwise cosine", "mean over prompts, of features over seeds 0-7; lower is more diverse"),
    "mode_histogram_kl": ("KL of the modes", "nats, of the histogram over the modes to the mixture's weights"),
    "energy_distance": ("energy distance", "to exact samples"),
    "distance_to_nearest_mode": ("distance to a mode", "mean over samples"),
    "network_calls": ("network calls", "a sample"),
    "seconds_a_sample": ("seconds a sample", "prompt to latents, on this machine"),
}


@dataclass(frozen=True)
class Cell:
    """Samples of one row on one prompt set: latents decoded, with seconds and network calls a sample."""

    pixels: Tensor
    prompts: list[Prompt]
    seconds: float
    calls: int


def prompt_sets(teacher: WanTeacher) -> dict[str, list[Prompt]]:
    """The evaluation's prompts for nano: `weak` leaves the digit open, `specific` names all there is to name.

    A first frame shows the digit, so image-to-video has only specific ones, on held-out digits.
    """
    if teacher.path == "nano-i2v":
        return {"specific": read_prompts("nano-i2v-held-out")}
    if teacher.sizes[0].num_frames == 1:
        weak, specific = ["a handwritten digit"], [f"a handwritten {word}" for word in WORDS]
    else:
        moves = [f"{direction} {speed}" for direction in DIRECTIONS for speed in SPEEDS]
        weak = ["a handwritten digit moving"]
        specific = [f"a handwritten {word} moving {move}" for move in moves for word in WORDS]
    return {"weak": [Prompt(text) for text in weak], "specific": [Prompt(text) for text in specific]}


def evaluate(runs: Sequence[Path | str], samples: int = 1000, again: bool = False) -> dict[str, dict[str, Any]]:
    """Writes `evaluation.json` and pictures into each finished run folder; returns the evaluations by folder.

    A folder already evaluated with as many samples is left alone unless `again`. Runs of one teacher on one grid
    share the base's samples.
    """
    done, base_cells = {}, {}
    for run in runs:
        path = RunFolder(run).path / "evaluation.json"
        if path.exists() and not again and (known := json.loads(path.read_text()))["samples"] == samples:
            done[str(run)] = known
            continue
        sampler, config = load(run), RunFolder(run).config()
        match config.teacher:
            case AnalyticTeacher():
                result = _evaluate_mixture(sampler, config, samples, path.parent)
            case WanTeacher(path=name, sizes=(Size(height=32, width=32), *_)) if name in SHIPPED:
                result = _evaluate_digits(sampler, config, samples, path.parent, base_cells)
            case _:
                raise UserError(f"{run}: only nano, its variants and analytic teachers can be evaluated so far")
        done[str(run)] = {
            "recipe": config.recipe,
            "method": config.method,
            "seed": config.seed,
            "samples": samples,
            "weighting": config.objective.weighting,
        } | result
        write_atomically(path, (json.dumps(done[str(run)], indent=2) + "\n").encode())
    return done


def tables(evaluation: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """The evaluation's tables, {prompt set: {row: {measure: value}}}."""
    return evaluation["sets"] if evaluation["kind"] == "digits" else {"mixture": evaluation["rows"]}


def table(evaluation: dict[str, Any]) -> str:
    """The evaluation as Markdown, a table a prompt set."""
    parts = []
    for name, rows in tables(evaluation).items():
        measures = list(next(iter(rows.values())))
        lines = [[f"{name}, n = {evaluation['samples']}", *(HEADINGS[measure][0] for measure in measures)]]
        lines += [[row, *(f"{values[measure]:.3g}" for measure in measures)] for row, values in rows.items()]
        body = [f"| {' | '.join(line)} |" for line in lines]
        parts.append("\n".join([body[0], "|" + "---|" * len(lines[0]), *body[1:]]))
    return "\n\n".join(parts)


def _sample(sampler: Sampler, prompts: Sequence[Prompt], count: int, first_seed: int, steps: int | None) -> Cell:
    repeated = list(islice(cycle(prompts), count))
    started = time.perf_counter()
    latents = sampler(repeated, range(first_seed, first_seed + count), steps)
    seconds = (time.perf_counter() - started) / count
    guided = 2 if max(sampler.system.model.guidance) > 1 else 1
    calls = sampler.system.plan.num_steps if steps is None else steps * guided
    return Cell(sampler.decode(latents), repeated, seconds, calls)


def _rows(sampler: Sampler, config: Config, base_steps: int) -> dict[str, int | None]:
    steps = sampler.system.plan.num_steps
    return {
        f"base, {base_steps} steps": base_steps,
        f"base, {steps} steps": steps,
        f"{config.method}, {steps} steps": None,
    }


def _evaluate_mixture(sampler: Sampler, config: Config, samples: int, folder: Path) -> dict[str, Any]:
    exact = sampler.system.model.networks[0]
    assert isinstance(exact, ExactMixture)
    reference = exact.sample(samples, torch.Generator().manual_seed(REFERENCE_SEEDS))
    rows, clouds = {}, []
    for name, steps in _rows(sampler, config, 40).items():
        cell = _sample(sampler, [Prompt("")], samples, SEEDS, steps)
        points = cell.pixels
        distance = torch.cdist(points.double(), exact.means.cpu()).min(1).values
        rows[name] = {
            "mode_histogram_kl": mode_histogram_kl(points, exact.means.cpu(), exact.weights.cpu()),
            "energy_distance": energy_distance(points, reference),
            "distance_to_nearest_mode": float(distance.mean()),
            "network_calls": cell.calls,
            "seconds_a_sample": cell.seconds,
        }
        clouds.append((name, points[:, :2]))
    save_points(folder / "samples" / "comparison.png", clouds)
    return {"kind": "mixture", "rows": rows}


def _evaluate_digits(
    sampler: Sampler, config: Config, samples: int, folder: Path, cache: dict[tuple, Cell]
) -> dict[str, Any]:
    assert isinstance(config.teacher, WanTeacher)
    classifier, real, accuracy = load_classifier()
    base_steps, result = config.teacher.base_steps, {}

    def base(prompts: list[Prompt], first_seed: int, steps: int) -> Cell:
        key = (config.teacher.model_dump_json(), config.plan.shift, config.plan.start, kind, first_seed, steps)
        if key not in cache:
            cache[key] = _sample(sampler, prompts, samples, first_seed, steps)
        return cache[key]

    for kind, prompts in prompt_sets(config.teacher).items():
        reference, paired = (base(prompts, first, base_steps).pixels for first in (REFERENCE_SEEDS, SEEDS))
        centre, basis = principal_components(reference.mean(4).flatten(1), min(COMPONENTS, samples - 1))
        apart, same = (_laws(pixels, read(classifier, pixels)[0], centre, basis) for pixels in (reference, paired))
        rows = {}
        for name, steps in _rows(sampler, config, base_steps).items():
            cell = _sample(sampler, prompts, samples, SEEDS, None) if steps is None else base(prompts, SEEDS, steps)
            own, log_probabilities = read(classifier, cell.pixels)
            law = _laws(cell.pixels, own, centre, basis)
            rows[name] = {
                "frechet_features": frechet(law[0], apart[0]),
                "frechet_pca": frechet(law[1], apart[1]),
                "frechet_features_paired": frechet(law[0], same[0]),
                "frechet_pca_paired": frechet(law[1], same[1]),
                "high_frequency_energy": high_frequency_energy(cell.pixels),
                "contrast": contrast(cell.pixels),
                "network_calls": cell.calls,
                "seconds_a_sample": cell.seconds,
            } | _read_prompts(cell, log_probabilities.argmax(1))
            if config.teacher.sizes[0].num_frames == 1:
                rows[name]["frechet_real"] = frechet(moments(own), (real["mean"], real["covariance"]))
            if kind == "specific":
                rows[name]["pairwise_cosine"] = _diversity(sampler, classifier, prompts[:10], steps)
            _save_samples(folder, kind, name, cell)
        result[kind] = rows
    return {"kind": "digits", "classifier_accuracy": accuracy, "sets": result}


def _laws(pixels: Tensor, features: Tensor, centre: Tensor, basis: Tensor) -> tuple[Moments, Moments]:
    """Moments of the classifier's features, and of the pixels' principal components."""
    return moments(features), moments((pixels.mean(4).flatten(1) - centre) @ basis)


def _read_prompts(cell: Cell, labels: Tensor) -> dict[str, float]:
    """Faithfulness to what the prompts name; where no digit is named, the spread over the classes."""
    texts = [prompt.text.split() for prompt in cell.prompts]
    if not any(word in texts[0] for word in WORDS):
        share = labels.bincount(minlength=10).double() / len(labels)
        return {"class_entropy": class_entropy(labels, 10), "least_class_share": float(share.min())}
    digits = torch.tensor([next(i for i, word in enumerate(WORDS) if word in text) for text in texts])
    scores = {"faithfulness": float((labels == digits).double().mean())}
    if cell.pixels.shape[1] > 1:
        directions = [next(v for name, v in DIRECTIONS.items() if name in text) for text in texts]
        moved = displacement(cell.pixels)
        nearest = (moved @ torch.tensor(list(DIRECTIONS.values())).T).argmax(1)
        wanted_direction = torch.tensor([list(DIRECTIONS.values()).index(d) for d in directions])
        fast = torch.tensor(["fast" in text for text in texts])
        speed = moved.norm(dim=1)
        scores["direction"] = float((nearest == wanted_direction).double().mean())
        if find_spec("cv2"):
            scores["optical_flow"] = optical_flow(cell.pixels)
        scores |= {"pixels_moved_fast": float(speed[fast].mean()), "pixels_moved_slowly": float(speed[~fast].mean())}
    return scores


def _diversity(sampler: Sampler, classifier: DigitClassifier, prompts: list[Prompt], steps: int | None) -> float:
    """The paper's Table 2: mean over prompts of the pairwise cosine of features over seeds 0-7."""
    cosines = []
    for prompt in prompts:
        pixels = sampler.decode(sampler([prompt] * DIVERSITY_SEEDS, range(DIVERSITY_SEEDS), steps))
        cosines.append(pairwise_cosine(read(classifier, pixels)[0]))
    return sum(cosines) / len(cosines)


def _save_samples(folder: Path, kind: str, name: str, cell: Cell) -> None:
    stem = f"{kind}-{name.replace(', ', '-').replace(' ', '-')}"
    frames = cell.pixels.shape[1]
    shown = cell.pixels[:SHOWN] if frames == 1 else cell.pixels[:5]
    save_image(grid(shown, columns=10 if frames == 1 else frames), folder / "samples" / f"{stem}.png")
    if frames > 1:
        save_clip(cell.pixels[0], folder / "samples" / f"{stem}.webp")
