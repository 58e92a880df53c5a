"""Fig. 5: what longer training of the last expert changes in a picture, its structure or its detail."""

import json
from pathlib import Path

import torch
from torch import Tensor

from phased_dmd.checkpoint import write_atomically
from phased_dmd.lab.metrics.digit_classifier import load_classifier, read
from phased_dmd.lab.metrics.intervals import interval
from phased_dmd.lab.reproduce.comparisons import LEAST
from phased_dmd.lab.reproduce.study import Study
from phased_dmd.prompts import Prompt
from phased_dmd.sampling.loading import load

PROMPT = Prompt("a handwritten digit")
SAMPLES = 500  # of equal noise
METHODS = ("Phased+SGTS", "DMD+SGTS")
SHORT = "{}, short"
NYQUIST = 0.5  # cycles a pixel


def changes(found: Study, results: Path, samples: int = SAMPLES) -> None:
    """Adds the table `change` to a study, from short to long training; writes a file a method and seed into results."""
    seeds = sorted({seed for _, seed in found.runs})
    found.summary["change"] = {}
    for method in METHODS:
        runs = [(found.runs[SHORT.format(method), seed].folder, found.runs[method, seed].folder) for seed in seeds]
        each = [change(*(pictures(folder, samples) for folder in pair)) for pair in runs]
        for seed, one in zip(seeds, each, strict=True):
            body = {"variant": method, "seed": seed, "samples": samples, **one}
            path = results / f"change-{method.replace('+', '-')}-{seed}.json"
            write_atomically(path, (json.dumps(body) + "\n").encode())
        found.summary["change"][method] = {name: interval([one[name] for one in each]) for name in each[0]}


def pictures(folder: Path, samples: int) -> Tensor:
    """A run's pictures of the weak prompt [n, 1, h, w, 3], seeds 0, 1, ..."""
    sampler = load(folder)
    return sampler.decode(sampler([PROMPT] * samples, range(samples)))


def change(short: Tensor, long: Tensor) -> dict[str, float]:
    """From pictures [n, f, h, w, 3] to others of equal noise, in shares of the latter's energy, and of digits alike.

    structure: below a quarter of the Nyquist frequency, without the mean, for Fig. 5 counts the lighting to the
    detail; detail: above half of it; detail_over_structure: the one over the other. agreement: the share of pictures
    in which the same digit is read.
    """
    grey = [pixels.mean(4) for pixels in (short, long)]
    difference, energy = (torch.fft.fft2(values).abs() ** 2 for values in (grey[0] - grey[1], grey[1]))
    rows, columns = (torch.fft.fftfreq(size).abs() for size in grey[0].shape[-2:])
    frequency = torch.maximum(rows[:, None], columns[None])
    bands = {"structure": (frequency > 0) & (frequency < NYQUIST / 4), "detail": frequency > NYQUIST / 2}
    found = {name: float(difference[..., band].sum() / energy[..., band].sum()) for name, band in bands.items()}
    found["detail_over_structure"] = found["detail"] / max(found["structure"], LEAST)
    classifier = load_classifier()[0]
    digits = [read(classifier, pixels)[1].argmax(1) for pixels in (short, long)]
    return found | {"agreement": float((digits[0] == digits[1]).double().mean())}
