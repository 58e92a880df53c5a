"""Real handwritten digits as pictures and moving clips, each with a caption of a random specificity."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from phased_dmd.lab.metrics.digit_classifier import DIRECTIONS, SPEEDS, WORDS

SIZE = 32  # pixels a side of the canvas
NUM_FRAMES = 9  # of a clip
HELD_OUT = 100  # digits of each class kept from all training
JITTER = 0.5  # pixels, standard deviation of the centre of a picture
PATH_JITTER = 0.75  # the same of the middle of a path


@dataclass(frozen=True)
class Digits:
    """Digits: pixels [n, 28, 28] in [0, 1], labels [n], and weight [n], the tertile of ink in the class: -1 is thin."""

    pixels: Tensor
    labels: Tensor
    weight: Tensor


def load_digits(path: Path) -> tuple[Digits, Digits]:
    """Reads the 5,000 MNIST digits of a gzipped CSV (784 pixels, then the label): (training, held out)."""
    rows = torch.from_numpy(np.loadtxt(path, np.float32, delimiter=","))
    pixels, labels = rows[:, :784].reshape(-1, 28, 28) / 255, rows[:, 784].long()
    ink, weight, held_out = pixels.sum((1, 2)), torch.zeros_like(labels), torch.zeros_like(labels, dtype=torch.bool)
    for digit in range(10):
        members = (labels == digit).nonzero().squeeze(1)
        low, high = ink[members].quantile(torch.tensor([1 / 3, 2 / 3]))
        weight[members] = (ink[members] > high).long() - (ink[members] < low).long()
        held_out[members[-HELD_OUT:]] = True
    split = [Digits(pixels[m], labels[m], weight[m]) for m in (~held_out, held_out)]
    return split[0], split[1]


def place_on_canvas(pixels: Tensor, shift: Tensor) -> Tensor:
    """Puts digits [b, 28, 28] on black, moved by shift [b, f, 2] pixels (right, down): [b, 3, f, 32, 32] in [-1, 1]."""
    b, f, _ = shift.shape
    theta = torch.zeros(b, f, 2, 3)
    theta[..., 0, 0] = theta[..., 1, 1] = SIZE / 28
    theta[..., 2] = -2 * shift / 28
    grid = F.affine_grid(theta.flatten(0, 1), [b * f, 1, SIZE, SIZE], align_corners=False)
    source = pixels[:, None, None].expand(b, f, 1, 28, 28).flatten(0, 1)
    canvas = F.grid_sample(source, grid, align_corners=False).reshape(b, 1, f, SIZE, SIZE)
    return (canvas * 2 - 1).expand(b, 3, f, SIZE, SIZE)


def _pick(options: list[tuple[float, str]], generator: torch.Generator) -> str:
    weights = torch.tensor([weight for weight, _ in options])
    return options[int(torch.multinomial(weights, 1, generator=generator))][1]


def image_batch(
    digits: Digits, size: int, generator: torch.Generator, jitter: float = JITTER
) -> tuple[Tensor, list[str], Tensor]:
    """Draws still pictures: (pixels [size, 3, 1, 32, 32], captions, labels [size])."""
    index = torch.randint(len(digits.labels), (size,), generator=generator)
    shift = jitter * torch.randn(size, 1, 2, generator=generator)
    captions = []
    for label, weight in zip(digits.labels[index].tolist(), digits.weight[index].tolist(), strict=True):
        stroke = {-1: "thin ", 0: "", 1: "bold "}[weight]
        options = [
            (0.3, "a handwritten digit"),
            (0.1, f"an {'odd' if label % 2 else 'even'} handwritten digit"),
            (0.4, f"a handwritten {WORDS[label]}"),
            (0.2, f"a {stroke}handwritten {WORDS[label]}"),
        ]
        captions.append(_pick(options, generator))
    return place_on_canvas(digits.pixels[index], shift), captions, digits.labels[index]


def clip_batch(digits: Digits, size: int, generator: torch.Generator) -> tuple[Tensor, list[str], Tensor]:
    """Draws clips of a digit that moves: (pixels [size, 3, 9, 32, 32], captions, labels [size])."""
    index = torch.randint(len(digits.labels), (size,), generator=generator)
    names, speeds = list(DIRECTIONS), list(SPEEDS)
    direction = torch.randint(len(names), (size,), generator=generator).tolist()
    speed = torch.randint(len(speeds), (size,), generator=generator).tolist()
    pace = torch.tensor([SPEEDS[speeds[s]] for s in speed])
    velocity = torch.tensor([DIRECTIONS[names[d]] for d in direction]) * pace[:, None]
    centre = PATH_JITTER * torch.randn(size, 1, 2, generator=generator)
    frames = torch.arange(NUM_FRAMES) - (NUM_FRAMES - 1) / 2
    shift = centre + frames[None, :, None] * velocity[:, None]
    captions = []
    for label, d, s in zip(digits.labels[index].tolist(), direction, speed, strict=True):
        options = [
            (0.2, "a handwritten digit moving"),
            (0.15, f"a handwritten digit moving {names[d]}"),
            (0.15, f"a handwritten {WORDS[label]} moving"),
            (0.2, f"a handwritten {WORDS[label]} moving {names[d]}"),
            (0.3, f"a handwritten {WORDS[label]} moving {names[d]} {speeds[s]}"),
        ]
        captions.append(_pick(options, generator))
    return place_on_canvas(digits.pixels[index], shift), captions, digits.labels[index]


def all_captions() -> list[str]:
    """Returns every caption that can occur, which the tokenizer is trained on."""
    nouns = ["digit", *WORDS]
    images = [f"{head} handwritten {noun}" for head in ("a", "a thin", "a bold") for noun in nouns]
    parity = ["an even handwritten digit", "an odd handwritten digit"]
    moves = ["moving"] + [f"moving {d}{s}" for d in DIRECTIONS for s in ("", *(f" {s}" for s in SPEEDS))]
    return images + parity + [f"a handwritten {noun} {move}" for noun in nouns for move in moves]
