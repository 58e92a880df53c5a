"""`phased-dmd teach clips`: the clips that are the modes of an exact teacher."""

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from phased_dmd.checkpoint import save_tensors
from phased_dmd.lab.metrics.digit_classifier import DIRECTIONS
from phased_dmd.lab.teach.mnist import SIZE, Digits, load_digits, place_on_canvas
from phased_dmd.lab.teach.worlds import TrainingBudget

CLIP_FRAMES, CLIP_SIZE = 5, 16  # frames of a clip, and pixels a side
CLIP_SPEEDS = (0.4, 0.8, 1.2)  # pixels a frame


def make_clips(digits: Digits, rng: torch.Generator) -> dict[str, Tensor]:
    """Returns a clip for each class of digit, direction and speed, of one digit a class that the generator draws.

    pixels: [120, 5, 16, 16], bytes of grey. digit, direction: [120], the class, and the place among `DIRECTIONS`.
    speed: [120], pixels a frame. In the middle of its clip a digit is in the middle of the frame.
    """
    ways, times = list(DIRECTIONS.values()), torch.arange(CLIP_FRAMES) - (CLIP_FRAMES - 1) / 2
    members = [(digits.labels == label).nonzero().squeeze(1) for label in range(10)]
    drawn = torch.stack([each[torch.randint(len(each), (), generator=rng)] for each in members])
    kinds = list(itertools.product(range(10), range(len(ways)), CLIP_SPEEDS))
    digit, direction = (torch.tensor([kind[i] for kind in kinds]) for i in range(2))
    speed = torch.tensor([kind[2] for kind in kinds], dtype=torch.float64)
    velocity = torch.tensor(ways, dtype=torch.float64)[direction] * speed[:, None]
    factor = SIZE // CLIP_SIZE
    shift = (factor * times[:, None] * velocity[:, None]).float()
    large = place_on_canvas(digits.pixels[drawn[digit]], shift)[:, 0]
    pixels = ((F.avg_pool2d(large, factor) + 1) * 127.5).round().byte()
    return {"pixels": pixels, "digit": digit, "direction": direction, "speed": speed}


def teach_clips(output: Path, data: Path, seed: int, _budget: TrainingBudget, say: Callable[[str], None]) -> None:
    """Does `phased-dmd teach clips`: writes clips.safetensors, which needs no training."""
    training, _ = load_digits(data)
    clips = make_clips(training, torch.Generator().manual_seed(seed))
    save_tensors(output / "clips.safetensors", clips, {"speeds": CLIP_SPEEDS})
    say(f"clips: {len(clips['pixels'])} written to {output}")
