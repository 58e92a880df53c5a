"""Fig. 5: what longer training of the last expert changes in a picture, its structure or its detail."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phased_dmd.config import Config
from phased_dmd.lab.evaluate import Protocol
from phased_dmd.lab.evaluate.sample_sets import sample_sets, world_of
from phased_dmd.lab.metrics.digit_classifier import classify, load_classifier
from phased_dmd.lab.metrics.intervals import LEAST
from phased_dmd.lab.metrics.scene_reader import load_reader
from phased_dmd.lab.reproduce.workers import PlannedRun, first_seed
from phased_dmd.sampling.loading import load

SAMPLES = 500  # of equal noise
METHODS = ("Phased+SGTS", "DMD+SGTS")
SHORT = "{}, short"
NYQUIST = 0.5  # cycles a pixel


def sample_pictures(folder: Path) -> Tensor:
    """Returns pictures [n, 1, h, w, 3] of a run for the weak prompt, with noise of its training seed's own."""
    sampler = load(folder)
    config = sampler.system.config
    weak, *_ = sample_sets(config, Protocol(samples=SAMPLES, first=first_seed(config.seed)), False)
    return sampler.decode(sampler(weak.prompts, weak.seeds))


def changes(
    recipe: str, runs: Mapping[tuple[str, int], PlannedRun], pictures: Callable[[Path], Tensor] = sample_pictures
) -> list[dict[str, Any]]:
    """Returns a row for each method and seed: how its pictures change from short to long training.

    runs: of the recipe, by label and seed. pictures: samples the run in a folder.
    """
    rows = []
    for method in METHODS:
        for seed in sorted({seed for _, seed in runs}):
            short, long = (runs[label, seed] for label in (SHORT.format(method), method))
            about = {"name": f"{recipe}-change-{method.replace('+', '-')}-{seed}", "recipe": recipe}
            before, after = (pictures(run.folder) for run in (short, long))
            about |= {"variant": method, "seed": seed, "samples": len(after)}
            rows.append(about | change(before, after) | {"agreement": agreement(long.config, before, after)})
    return rows


def change(short: Tensor, long: Tensor) -> dict[str, float]:
    """Compares pictures [n, f, h, w, 3] with others of equal noise: changes in shares of the latter's energy.

    structure: the change below a quarter of the Nyquist frequency, without the mean, since Fig. 5 counts the lighting
    to the detail. detail: the change above half of it. detail_over_structure: the one over the other.
    """
    grey = [pixels.mean(4) for pixels in (short, long)]
    difference, energy = (torch.fft.fft2(values).abs() ** 2 for values in (grey[0] - grey[1], grey[1]))
    rows, columns = (torch.fft.fftfreq(size).abs() for size in grey[0].shape[-2:])
    frequency = torch.maximum(rows[:, None], columns[None])
    bands = {"structure": (frequency > 0) & (frequency < NYQUIST / 4), "detail": frequency > NYQUIST / 2}
    found = {name: float(difference[..., band].sum() / energy[..., band].sum()) for name, band in bands.items()}
    return found | {"detail_over_structure": found["detail"] / max(found["structure"], LEAST)}


def agreement(config: Config, short: Tensor, long: Tensor) -> float:
    """Returns the share of pictures [n, 1, h, w, 3] in which the same is read: a digit, or all of a scene."""
    if world_of(config) == "scenes":
        reader, _, _ = load_reader()
        one, two = reader(short), reader(long)
        same = one["present"] == two["present"]
        for name in ("label", "cell"):
            same &= (one[name] == two[name]) | ~two["present"]
        return float(same.all(1).double().mean())
    classifier = load_classifier()[0]
    digits = [classify(classifier, pixels)[1].argmax(1) for pixels in (short, long)]
    return float((digits[0] == digits[1]).double().mean())
