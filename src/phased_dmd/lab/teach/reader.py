"""`phased-dmd teach scenes-reader`: the evaluation's two networks that read scenes, and how often they are right."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from phased_dmd.checkpoint import save_tensors
from phased_dmd.lab.metrics.digit_classifier import DigitClassifier
from phased_dmd.lab.metrics.distances import moments
from phased_dmd.lab.metrics.scene_reader import (
    OUTPUTS,
    Readings,
    SceneReader,
    colour_masks,
    cut_out,
    named_motion,
    places,
    truth,
)
from phased_dmd.lab.metrics.scenes import HEIGHT, WIDTH, Scene
from phased_dmd.lab.teach.descent import Descent
from phased_dmd.lab.teach.mnist import Digits, load_digits
from phased_dmd.lab.teach.scene_batches import clip_batch, picture_batch
from phased_dmd.lab.teach.worlds import TrainingBudget

BLUR, WARP, SHIFT = 0.7, 0.12, 0.5  # of training pictures: the most blur, and deviations of the matrix and in pixels
HELD_OUT_PICTURES, HELD_OUT_CLIPS = 4000, 2000  # that the accuracies are measured on


def draw_frames(digits: Digits, clips: bool, generator: torch.Generator) -> tuple[Tensor, list[Scene]]:
    """Draws 48 pictures, or 8 clips, each more or less blurred: (pixels [b, f, 32, 48, 3] in [0, 1], scenes)."""
    pixels, _, scenes = clip_batch(digits, 8, generator) if clips else picture_batch(digits, 48, generator)
    blurred = F.avg_pool3d(pixels, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)
    mixed = pixels.lerp(blurred, BLUR * torch.rand(len(scenes), 1, 1, 1, 1, generator=generator))
    return mixed.permute(0, 2, 3, 4, 1) / 2 + 0.5, scenes


def train_digits(digits: Digits, steps: int, generator: torch.Generator) -> DigitClassifier:
    """Trains the network of single digits on what is cut out of scenes, warped a little."""
    network = DigitClassifier().train()
    descent = Descent(network, steps, lr=2e-3, clip=math.inf)
    for step in range(steps):
        pixels, scenes = draw_frames(digits, step % 2 == 1, generator)
        masks, true = colour_masks(pixels), truth(scenes)
        position, weight, _ = places(masks)
        shown = (weight > 0) & true["present"][:, None]
        labels = true["label"][:, None].expand(shown.shape)[shown]
        position = position[shown] + SHIFT * torch.randn(len(labels), 2, generator=generator)
        warp = torch.eye(2) + WARP * torch.randn(len(labels), 2, 2, generator=generator)
        logits = network(cut_out(masks[shown], position, warp))[1]
        descent.step(F.cross_entropy(logits, labels, label_smoothing=0.05))
    return network.eval()


def train_frames(digits: Digits, steps: int, generator: torch.Generator) -> DigitClassifier:
    """Trains the network of whole frames to tell which colours are there, and the digit and the cell of each."""
    network = DigitClassifier(3, (HEIGHT, WIDTH), OUTPUTS).train()
    descent = Descent(network, steps, lr=2e-3, clip=math.inf)
    for step in range(steps):
        pixels, scenes = draw_frames(digits, step % 2 == 1, generator)
        frames, true = pixels[:, step % pixels.shape[1]], truth(scenes)
        there = true["present"]
        present, label, cell = network(frames.permute(0, 3, 1, 2))[1].unflatten(1, (4, -1)).split((1, 10, 4), dim=2)
        loss = F.binary_cross_entropy_with_logits(present[..., 0], there.float())
        loss = loss + F.cross_entropy(label[there], true["label"][there], label_smoothing=0.05)
        descent.step(loss + F.cross_entropy(cell[there], true["cell"][there], label_smoothing=0.05))
    return network.eval()


def accuracies(readings: Readings, true: Readings) -> dict[str, float]:
    """Returns the shares of scenes, and of the digits in them, of which each attribute is read right."""
    there, clips = true["present"], "velocity" in readings
    found = named_motion(readings) if clips else readings
    scenes = {
        "count": found["present"].sum(1) == there.sum(1), "colours": (found["present"] == there).all(1),
    } | ({"pan": found["pan"] == true["pan"]} if clips else {})  # fmt: skip
    parts = {name: found[name] == true[name] for name in ("label", "cell", *(("direction", "speed") if clips else ()))}
    whole = torch.stack(list(scenes.values())).all(0)
    for right in parts.values():
        whole &= (right | ~there).all(1)
    shares = scenes | {name: right[there] for name, right in parts.items()} | {"all": whole}
    return {name: float(right.double().mean()) for name, right in shares.items()}


def measure(reader: SceneReader, digits: Digits, generator: torch.Generator) -> dict[str, dict[str, float]]:
    """Returns the accuracies of a reader on real pictures and clips of digits."""
    found = {}
    for name, make, count in (
        ("pictures", picture_batch, HELD_OUT_PICTURES), ("clips", clip_batch, HELD_OUT_CLIPS),
    ):  # fmt: skip
        readings, scenes = [], []
        for start in range(0, count, 250):
            pixels, _, drawn = make(digits, min(250, count - start), generator)
            readings.append(reader(pixels.permute(0, 2, 3, 4, 1) / 2 + 0.5))
            scenes += drawn
        joined = {key: torch.cat([part[key] for part in readings]) for key in readings[0]}
        found[name] = accuracies(joined, truth(scenes))
    return found


def teach_scenes_reader(
    output: Path, data: Path, seed: int, budget: TrainingBudget, say: Callable[[str], None]
) -> None:
    """Does `phased-dmd teach scenes-reader`: both networks, with the statistics of real held-out scenes' features."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    training, held_out = load_digits(data)
    reader = SceneReader(
        train_digits(training, budget.reader_steps[0], rng), train_frames(training, budget.reader_steps[1], rng)
    )
    found = measure(reader, held_out, rng)
    pixels, _, _ = picture_batch(held_out, HELD_OUT_PICTURES, rng)
    with torch.no_grad():
        mean, covariance = moments(reader.frames(pixels[:, :, 0] / 2 + 0.5)[0])
    tensors = {"real.mean": mean, "real.covariance": covariance}
    for name, network in (("digits", reader.digits), ("frames", reader.frames)):
        tensors |= {f"{name}.{key}": tensor for key, tensor in network.state_dict().items()}
    save_tensors(output / "scenes.safetensors", tensors, {"accuracies": found})
    for name, shares in found.items():
        say(f"scenes, {name}: " + ", ".join(f"{what} {share:.4f}" for what, share in shares.items()))
