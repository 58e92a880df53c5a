"""What is said of a set of scenes: whether they are as they are asked for, or how what is left open is spread."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from phased_dmd.lab.evaluate.instruments import Readings
from phased_dmd.lab.metrics.digit_classifier import DIRECTIONS, SPEEDS, WORDS
from phased_dmd.lab.metrics.distances import class_entropy
from phased_dmd.lab.metrics.intervals import Statistic
from phased_dmd.lab.metrics.scene_reader import named_motion, truth
from phased_dmd.lab.metrics.scenes import CELLS, COLOURS, COUNTS, PANS, Scene, parse

# By measure: its value for real scenes that are read without error.
OF_SPECIFIC = {
    "faithfulness": 1.0, "digits_right": 1.0, "colours_right": 1.0, "places_right": 1.0, "directions_right": 1.0,
    "speeds_right": 1.0, "pan_right": 1.0,
}  # fmt: skip
OF_WEAK = {
    "law_kl": 0.0, "count_kl": 0.0, "class_kl": 0.0, "colour_kl": 0.0, "place_kl": 0.0, "direction_kl": 0.0,
    "speed_kl": 0.0, "pan_kl": 0.0, "possible_count": 1.0, "class_entropy": math.log(len(WORDS)),
    "world_speed": sum(SPEEDS.values()) / len(SPEEDS),
}  # fmt: skip


def scene_statistics(readings: Readings, texts: Sequence[str]) -> dict[str, Statistic]:
    """Returns the measures of scenes whose prompts name all there is, or nothing; of others there are none."""
    clips = "velocity" in readings
    try:
        scenes = [parse(text) for text in texts]
    except ValueError:  # a prompt of the user's own
        return {}
    found = named_motion(readings) if clips else readings
    if all(scene.is_whole(clips) for scene in scenes):
        return _of_specific(found, scenes)
    return _of_weak(found) if all(scene == Scene() for scene in scenes) else {}


def _of_specific(found: Readings, scenes: Sequence[Scene]) -> dict[str, Statistic]:
    """Returns the share of samples in which everything is as named, and the shares of what is named that are right.

    A digit is sought by its colour: where that is missing, all of it is wrong. One that is not asked for makes the
    sample unfaithful.
    """
    true = truth(scenes)
    there = true["present"]
    parts = {"colours_right": found["present"]} | {
        part: found["present"] & (found[name] == true[name])
        for part, name in (
            ("digits_right", "label"), ("places_right", "cell"), ("directions_right", "direction"),
            ("speeds_right", "speed"),
        )
        if name in found
    }  # fmt: skip
    faithful = (found["present"] == there).all(1)
    for right in parts.values():
        faithful = faithful & (right | ~there).all(1)
    measures: dict[str, Tensor] = {}
    if "pan" in found:
        measures["pan_right"] = found["pan"] == true["pan"]
        faithful = faithful & measures["pan_right"]
    statistics: dict[str, Statistic] = {"faithfulness": _share(faithful)}
    statistics |= {part: _share_of(right, there) for part, right in parts.items()}
    return statistics | {name: _share(right) for name, right in measures.items()}


def _of_weak(found: Readings) -> dict[str, Statistic]:
    """Returns how far the histogram of each attribute is from its law, which gives equal shares to all its values."""
    present, counts = found["present"], found["present"].sum(1)
    least, most = min(COUNTS.values()), max(COUNTS.values())
    all_colours = torch.arange(len(COLOURS)).expand(present.shape)
    values: dict[str, tuple[Tensor, Tensor | None, int]] = {  # [n] or [n, 4], of which those that are there, and kinds
        "count_kl": (counts.clamp(least, most) - least, None, len(COUNTS)),
        "class_kl": (found["label"], present, len(WORDS)),
        "colour_kl": (all_colours, present, len(COLOURS)),
        "place_kl": (found["cell"], present, len(CELLS)),
    }  # fmt: skip
    statistics: dict[str, Statistic] = {"possible_count": _share((counts >= least) & (counts <= most))}
    if "velocity" in found:
        values["direction_kl"] = found["direction"], present, len(DIRECTIONS)
        values["speed_kl"] = found["speed"], present, len(SPEEDS)
        values["pan_kl"] = found["pan"], None, len(PANS)
        statistics["world_speed"] = _share_of(found["velocity"].norm(dim=2), present)
    divergences = {name: _divergence(*value) for name, value in values.items()}
    statistics["class_entropy"] = lambda keep: math.log(len(WORDS)) - divergences["class_kl"](keep)
    statistics["law_kl"] = lambda keep: sum(divergence(keep) for divergence in divergences.values())
    return statistics | divergences


def _divergence(values: Tensor, there: Tensor | None, kinds: int) -> Statistic:
    """Returns KL(histogram of the values that are there || equal shares) in nats: at most log(kinds), as of nothing."""

    def of_kept(keep: Tensor) -> float:
        kept = values[keep] if there is None else values[keep][there[keep]]
        return math.log(kinds) - (class_entropy(kept, kinds) if len(kept) else 0.0)

    return of_kept


def _share(right: Tensor) -> Statistic:
    return lambda keep: float(right[keep].double().mean())


def _share_of(values: Tensor, there: Tensor) -> Statistic:
    """Returns the mean of values [n, 4] over those that are there; 0 where none is."""
    return lambda keep: float((values[keep] * there[keep]).double().sum() / there[keep].sum().clamp(min=1))
