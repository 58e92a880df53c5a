"""From readings to numbers: every measure is a function of the samples that are kept, so that all have an interval."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from phased_dmd.lab.evaluate.instruments import DRIFT, Readings
from phased_dmd.lab.evaluate.sample_sets import SampleSet
from phased_dmd.lab.evaluate.scene_measures import scene_statistics
from phased_dmd.lab.metrics.digit_classifier import DIRECTIONS, SPEEDS, WORDS
from phased_dmd.lab.metrics.distances import (
    Moments,
    class_entropy,
    frechet,
    histogram_kl,
    moments,
    pairwise_cosine,
    principal_components,
)
from phased_dmd.lab.metrics.intervals import Statistic, debiased, jackknife_half_width, leave_one_out
from phased_dmd.models.analytic import ExactMixture
from phased_dmd.models.exact_clips import Clips

COMPONENTS = 32  # of the pixels' principal component analysis
FEWEST = 4  # samples, for a Fréchet distance: two at least are left when a group is left out
BIASED = ("frechet", "_kl", "class_entropy")  # in the names of measures that few samples bias, in proportion to 1 / n
MEANS = (*DRIFT, "optical_flow", "dynamic_degree", "alignment")  # readings that are averaged as they are
EXACT_SEED = 10**9  # added to a set's first seed for the exact samples that an analytic teacher's are compared with
Measurement = dict[str, float | None]  # value, half_width, gap, gap_half_width; a half width may be None
Basis = tuple[Tensor, Tensor]  # centre [d] and directions [d, k] of pixels


class Reference:
    """The samples that Fréchet distances are taken to: frames and clips in features, and small pictures in pixels."""

    def __init__(self, readings: Readings, basis: Basis | None = None) -> None:
        """Takes the readings of the reference's samples. basis: of the pixels, by default their own principal
        components.
        """
        if basis is None and "grey" in readings:
            basis = principal_components(readings["grey"], min(COMPONENTS, len(readings["grey"]) - 1))
        self.basis = basis
        self.parts = self._parts(readings)

    def distances(self, readings: Readings) -> dict[str, Statistic]:
        """Returns the Fréchet distances of a row's samples to the reference, by the measure's name.

        Samples that are left out of a row are left out of the reference too, so that `debiased` sees both biases and
        an interval holds the error of both.
        """

        def distance(name: str, part: Tensor) -> Statistic:
            def of_kept(keep: Tensor) -> float:
                return frechet(*(moments(values[keep].flatten(0, 1)) for values in (part, self.parts[name])))

            return of_kept

        return {name: distance(name, part) for name, part in self._parts(readings).items()}

    def _parts(self, readings: Readings) -> dict[str, Tensor]:
        """Returns the vectors [n, k, d] that are compared, k a sample, by the measure's name."""
        parts = {"frechet_features": readings["features"]}
        if readings["features"].shape[1] > 1:
            parts["frechet_video"] = clip_features(readings["features"])[:, None]
        if self.basis is not None and "grey" in readings:
            centre, directions = self.basis
            parts["frechet_pca"] = ((readings["grey"] - centre) @ directions)[:, None]
        return parts


def clip_features(features: Tensor) -> Tensor:
    """Returns for clips' features [n, f, d] their mean over the frames and the mean size of their changes, [n, 2 d]."""
    return torch.cat([features.mean(1), features.diff(dim=1).abs().mean(1)], 1)


def statistics(
    readings: Readings, sample_set: SampleSet, references: Mapping[str, Reference], real: Moments | None
) -> dict[str, Statistic]:
    """Returns every measure that the readings allow; references: by the suffix of the measure's name."""
    found: dict[str, Statistic] = {}
    if len(sample_set.prompts) >= FEWEST:
        for suffix, reference in references.items():
            found |= {f"{name}{suffix}": statistic for name, statistic in reference.distances(readings).items()}
        if real is not None:
            found["frechet_real"] = lambda keep: frechet(moments(readings["features"][keep].flatten(0, 1)), real)
    ids = sample_set.prompt_ids
    if int(ids.bincount().max()) > 1:
        features = readings["features"].mean(1)
        found["pairwise_cosine"] = lambda keep: _mean_over_prompts(ids, keep, lambda i: pairwise_cosine(features[i]))
        if "perceptual" in readings:
            distances = readings["perceptual"].double()
            # The column of a sample in the distances is its place among the samples of its prompt.
            column = torch.tensor([int((ids[:i] == ids[i]).sum()) for i in range(len(ids))])
            found["pairwise_perceptual"] = lambda keep: _mean_over_prompts(
                ids, keep, lambda i: float(distances[i][:, column[i]].sum()) / (len(i) * (len(i) - 1))
            )
    found |= {name: _mean(readings[name]) for name in MEANS if name in readings}
    if "present" in readings:
        found |= scene_statistics(readings, [prompt.text for prompt in sample_set.prompts])
    return found | (_digit_statistics(readings, sample_set) if "digit" in readings else {})


def measurements(
    rows: Mapping[str, Mapping[str, Statistic]], base: str, groups: Tensor
) -> dict[str, dict[str, Measurement]]:
    """Returns {row: {measure: measurement}}: value and signed gap to the base's row, each with its 95 % half width.

    The gap leaves the same groups out of both rows, and so gains from equal prompts and seeds. Measures of BIASED are
    debiased.
    """
    tried = {
        row: {name: _tried(name, statistic, groups) for name, statistic in found.items()} for row, found in rows.items()
    }
    result: dict[str, dict[str, Measurement]] = {}
    for row, found in tried.items():
        result[row] = {}
        for name, (value, without) in found.items():
            of_base, without_base = tried[base][name]
            result[row][name] = {
                "value": value, "half_width": jackknife_half_width(without), "gap": value - of_base,
                "gap_half_width": jackknife_half_width([a - b for a, b in zip(without, without_base, strict=True)]),
            }  # fmt: skip
    return result


def _tried(name: str, statistic: Statistic, groups: Tensor) -> tuple[float, list[float]]:
    """Returns what `leave_one_out` does, and of the whole a value without the bias of few samples."""
    value, without = leave_one_out(statistic, groups)
    return debiased(value, without) if any(part in name for part in BIASED) else value, without


def _mean(values: Tensor) -> Statistic:
    return lambda keep: float(values[keep].double().mean())


def _mean_over_prompts(ids: Tensor, keep: Tensor, measure: Callable[[Tensor], float]) -> float:
    """Averages a measure of a prompt's samples over the prompts of which two samples at least are kept."""
    found = [measure(keep[ids[keep] == i]) for i in ids[keep].unique() if int((ids[keep] == i).sum()) > 1]
    return sum(found) / len(found)


def _digit_statistics(readings: Readings, sample_set: SampleSet) -> dict[str, Statistic]:
    """Returns how faithful samples are to what the prompts name; where no digit is named, how classes are spread."""
    digit, texts = readings["digit"], [prompt.text.split() for prompt in sample_set.prompts]
    if not any(word in text for text in texts for word in WORDS):
        return {
            "class_entropy": lambda keep: class_entropy(digit[keep], 10),
            "least_class_share": lambda keep: float(digit[keep].bincount(minlength=10).min()) / len(keep),
        }
    if not all(any(word in text for word in WORDS) for text in texts):
        return {}
    found = {"faithfulness": _mean(digit == _named(texts, WORDS))}
    if all(any(name in text for name in DIRECTIONS) for text in texts):
        moved = readings["displacement"]
        nearest = (moved @ torch.tensor(list(DIRECTIONS.values())).T).argmax(1)
        found["direction"] = _mean(nearest == _named(texts, list(DIRECTIONS)))
        speed = moved.norm(dim=1)
        for pace in SPEEDS:
            paced = torch.tensor([pace in text for text in texts])
            if len(sample_set.groups[paced].unique()) > 1:  # some are left whichever group is left out
                found[f"pixels_moved_{pace}"] = lambda keep, paced=paced: float(speed[keep][paced[keep]].mean())
    return found


def _named(texts: Sequence[Sequence[str]], words: Sequence[str]) -> Tensor:
    """Returns for each text the index of the first of the words that stands in it, [n]."""
    return torch.tensor([next(i for i, word in enumerate(words) if word in text) for text in texts])


def mixture_statistics(points: Tensor, exact: ExactMixture, first: int = 0) -> dict[str, Statistic]:
    """Returns the measures of an analytic teacher's samples [n, ...], all of which compare with the exact mixture.

    They are the KL of the histogram over the modes, the energy distance to as many exact samples, and the mean
    distance to a mode. first: the first seed of the set, which the exact samples depend on.
    """
    points, weights = points.double().flatten(1), exact.weights.cpu()
    reference = exact.sample(len(points), torch.Generator().manual_seed(EXACT_SEED + first)).double().flatten(1)
    distance, nearest = torch.cdist(points, exact.means.cpu().flatten(1)).min(1)
    across, within = torch.cdist(points, reference).mean(1), torch.cdist(points, points)
    of_reference = float(torch.cdist(reference, reference).sum() / (len(points) * (len(points) - 1)))

    def energy(keep: Tensor) -> float:
        """Estimates 2 E|x - y| - E|x - x'| - E|y - y'| without bias: 0 for equal distributions."""
        kept = torch.zeros(len(points), dtype=torch.float64).index_fill(0, keep, 1)
        own = kept @ within @ kept / (len(keep) * (len(keep) - 1))
        return float(2 * across[keep].mean() - own) - of_reference

    return {
        "mode_histogram_kl": lambda keep: histogram_kl(nearest[keep], weights),
        "energy_distance": energy,
        "distance_to_nearest_mode": _mean(distance),
    }


def clip_statistics(samples: Tensor, clips: Clips) -> dict[str, Statistic]:
    """Returns what of a mixture's clips samples [n, frames, height, width] keep, read off the clip nearest to each.

    They are the KL of the histograms over digits, directions and speeds to those of the clips, and the mean speed in
    pixels a frame.
    """
    nearest = torch.cdist(samples.double().flatten(1), clips.pixels.flatten(1)).argmin(1)
    found = {"clip_speed": _mean(clips.speed[nearest])}
    for name, values in (("class_kl", clips.digit), ("direction_kl", clips.direction), ("speed_kl", clips.speed)):
        label = values.unique(return_inverse=True)[1]
        law = label.bincount().double() / len(label)
        found[name] = lambda keep, read=label[nearest], law=law: histogram_kl(read[keep], law)
    return found
