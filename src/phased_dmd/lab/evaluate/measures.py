"""From readings to numbers: every measure a function of which samples are kept, so that all have an interval."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from phased_dmd.lab.evaluate.instruments import DRIFT, Readings
from phased_dmd.lab.evaluate.sample_sets import SampleSet
from phased_dmd.lab.metrics.digit_classifier import DIRECTIONS, SPEEDS, WORDS
from phased_dmd.lab.metrics.distances import (
    Moments,
    class_entropy,
    frechet,
    moments,
    pairwise_cosine,
    principal_components,
)
from phased_dmd.lab.metrics.intervals import Statistic, leave_one_out, spread

COMPONENTS = 32  # of the pixels' principal component analysis
FEWEST = 4  # samples, for a Fréchet distance: two at least are left when a group is left out
MEANS = (*DRIFT, "optical_flow", "dynamic_degree", "alignment")  # readings that are averaged as they are
Figure = dict[str, float | None]
Basis = tuple[Tensor, Tensor]  # centre [d] and directions [d, k] of pixels


class Law:
    """What Fréchet distances are measured to: frames and clips in features, and small pictures in pixels."""

    def __init__(self, readings: Readings, basis: Basis | None = None, paired: bool = False) -> None:
        """basis: of another law's pixels; None: their own principal components, if there are pixels.

        paired: samples that are left out of a row are left out here, too.
        """
        if basis is None and "grey" in readings:
            basis = principal_components(readings["grey"], min(COMPONENTS, len(readings["grey"]) - 1))
        self.basis, self.paired = basis, paired
        self.parts = self._parts(readings)
        self.whole = {name: moments(part.flatten(0, 1)) for name, part in self.parts.items()}

    def distances(self, readings: Readings) -> dict[str, Statistic]:
        """Of readings' Gaussians to this law's."""

        def distance(name: str, part: Tensor) -> Statistic:
            def of_kept(keep: Tensor) -> float:
                law = moments(self.parts[name][keep].flatten(0, 1)) if self.paired else self.whole[name]
                return frechet(moments(part[keep].flatten(0, 1)), law)

            return of_kept

        return {name: distance(name, part) for name, part in self._parts(readings).items()}

    def _parts(self, readings: Readings) -> dict[str, Tensor]:
        """[n, k, d] by the measure's name, of k vectors a sample."""
        parts = {"frechet_features": readings["features"]}
        if readings["features"].shape[1] > 1:
            parts["frechet_video"] = clip_features(readings["features"])[:, None]
        if self.basis is not None and "grey" in readings:
            centre, directions = self.basis
            parts["frechet_pca"] = ((readings["grey"] - centre) @ directions)[:, None]
        return parts


def clip_features(features: Tensor) -> Tensor:
    """[n, 2 d] of a clip's frames' features [n, f, d]: their mean, and the mean size of their changes over time."""
    return torch.cat([features.mean(1), features.diff(dim=1).abs().mean(1)], 1)


def statistics(
    readings: Readings, sample_set: SampleSet, laws: Mapping[str, Law], real: Moments | None
) -> dict[str, Statistic]:
    """Every measure that the readings allow. laws: by the suffix of the measure's name."""
    found: dict[str, Statistic] = {}
    for suffix, law in laws.items() if len(sample_set.prompts) >= FEWEST else ():
        found |= {f"{name}{suffix}": statistic for name, statistic in law.distances(readings).items()}
    if real is not None and len(sample_set.prompts) >= FEWEST:
        found["frechet_real"] = lambda keep: frechet(moments(readings["features"][keep].flatten(0, 1)), real)
    ids = sample_set.prompt_ids
    if int(ids.bincount().max()) > 1:
        features = readings["features"].mean(1)
        found["pairwise_cosine"] = lambda keep: _per_prompt(ids, keep, lambda i: pairwise_cosine(features[i]))
        if "perceptual" in readings:
            distances, column = readings["perceptual"].double(), _places(ids)
            found["pairwise_perceptual"] = lambda keep: _per_prompt(
                ids, keep, lambda i: float(distances[i][:, column[i]].sum()) / (len(i) * (len(i) - 1))
            )
    found |= {name: _mean(readings[name]) for name in MEANS if name in readings}
    return found | (_digits(readings, sample_set) if "digit" in readings else {})


def figures(rows: Mapping[str, Mapping[str, Statistic]], base: str, groups: Tensor) -> dict[str, dict[str, Figure]]:
    """{row: {measure: figure}}: value, and the signed gap to the base's row, each with its 95 % half width.

    The gap leaves the same groups out of both rows, and so gains from equal prompts and seeds. Samples of other seeds,
    which Fréchet distances are measured to, stay as they are.
    """
    tried = {
        row: {name: leave_one_out(statistic, groups) for name, statistic in found.items()}
        for row, found in rows.items()
    }
    result: dict[str, dict[str, Figure]] = {}
    for row, found in tried.items():
        result[row] = {}
        for name, (value, without) in found.items():
            of_base, without_base = tried[base][name]
            result[row][name] = {
                "value": value, "half_width": spread(without),
                "gap": value - of_base,
                "gap_half_width": spread([a - b for a, b in zip(without, without_base, strict=True)]),
            }  # fmt: skip
    return result


def plain(value: float, of_base: float) -> Figure:
    """A figure without intervals."""
    return {"value": value, "half_width": None, "gap": value - of_base, "gap_half_width": None}


def _mean(values: Tensor) -> Statistic:
    return lambda keep: float(values[keep].double().mean())


def _per_prompt(ids: Tensor, keep: Tensor, measure: Any) -> float:
    """The mean over prompts of a measure of a prompt's samples, where two of them at least are kept."""
    found = [measure(keep[ids[keep] == i]) for i in ids[keep].unique() if int((ids[keep] == i).sum()) > 1]
    return sum(found) / len(found)


def _places(ids: Tensor) -> Tensor:
    """Each sample's place among those of its prompt, [n]."""
    return torch.tensor([int((ids[:i] == ids[i]).sum()) for i in range(len(ids))])


def _digits(readings: Readings, sample_set: SampleSet) -> dict[str, Statistic]:
    """Faithfulness to what the prompts name; where no digit is named, the spread over the classes."""
    digit, texts = readings["digit"], [prompt.text.split() for prompt in sample_set.prompts]
    if not any(word in text for text in texts for word in WORDS):
        return {
            "class_entropy": lambda keep: class_entropy(digit[keep], 10),
            "least_class_share": lambda keep: float(digit[keep].bincount(minlength=10).min()) / len(keep),
        }
    if not all(any(word in text for word in WORDS) for text in texts):
        return {}
    named = torch.tensor([next(i for i, word in enumerate(WORDS) if word in text) for text in texts])
    found = {"faithfulness": _mean(digit == named)}
    if all(any(name in text for name in DIRECTIONS) for text in texts):
        moved = readings["displacement"]
        wanted = torch.tensor([[name in text for name in DIRECTIONS].index(True) for text in texts])
        nearest = (moved @ torch.tensor(list(DIRECTIONS.values())).T).argmax(1)
        found["direction"] = _mean(nearest == wanted)
        speed = moved.norm(dim=1)
        for pace in SPEEDS:
            paced = torch.tensor([pace in text for text in texts])
            if len(sample_set.groups[paced].unique()) > 1:  # some are left whichever group is left out
                found[f"pixels_moved_{pace}"] = lambda keep, paced=paced: float(speed[keep][paced[keep]].mean())
    return found
