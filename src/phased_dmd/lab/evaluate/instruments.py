"""The networks of an evaluation, and what they read off each sample: a batch of samples is read, then let go."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phased_dmd.config import Config
from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate.sample_sets import Protocol, SampleSet, World, world_of
from phased_dmd.lab.evaluate.samples import SampleFolder, SampleSource
from phased_dmd.lab.metrics.alignment import Alignment, load_alignment
from phased_dmd.lab.metrics.digit_classifier import classify, load_classifier
from phased_dmd.lab.metrics.distances import LPIPS, Moments, PictureDistance, lpips, moments
from phased_dmd.lab.metrics.features import EFFICIENTNET, FeatureNet, load_features
from phased_dmd.lab.metrics.motion import Flow, clip_flows, dynamic_clips, load_flow
from phased_dmd.lab.metrics.scene_reader import load_reader
from phased_dmd.media import read_media
from phased_dmd.pixels import contrast, displacement, high_frequency_energy, saturation, sharpness
from phased_dmd.progress import progress
from phased_dmd.sampling.sampler import WAN_FPS

Readings = dict[str, Tensor]  # by name, [n, ...]: what was read off each of n samples
Reader = Callable[[Tensor], Readings]  # of pixels [n, f, h, w, 3]: what an embedded teacher's samples show
DRIFT = {
    "high_frequency_energy": high_frequency_energy, "contrast": contrast, "sharpness": sharpness,
    "saturation": saturation,
}  # fmt: skip
MOST_SEEDS = 16  # a prompt, that pairs of pictures are compared among


@dataclass(frozen=True)
class Instruments:
    """The networks of an evaluation.

    flow_name: the name of the optical flow. fps: frames a second of clips, where the user says so. perceptual: LPIPS.
    reader: of an embedded teacher's samples, and `accuracy` how well it reads real ones. real: the moments of the
    features of real pictures. None stands for what is not measured.
    """

    features: FeatureNet
    flow: Flow
    flow_name: str
    fps: float | None
    perceptual: PictureDistance | None
    alignment: Alignment | None
    reader: Reader | None
    real: Moments | None
    accuracy: str | None

    def nets(self, clips: bool) -> dict[str, str]:
        """Returns the names of the networks, which stand beside the numbers."""
        names = {"features": self.features.name} | ({"flow": self.flow_name} if clips else {})
        if self.perceptual:
            names["perceptual"] = LPIPS
        if self.alignment:
            names["alignment"] = self.alignment.name
        if self.accuracy is not None:
            names["reader"] = self.accuracy
        return names

    @torch.no_grad()
    def read(self, source: SampleSource, sample_set: SampleSet, what: str) -> Readings:
        """Returns the readings of all samples of a source; a perceptual distance needs all of a prompt's at once. what:
        the work's name for the user.
        """
        n, size = len(sample_set.prompts), source.size
        batches = whole_prompts(sample_set) if self.perceptual else [range(n)[i : i + size] for i in range(0, n, size)]
        parts = []
        with progress(what, n, unit="samples") as show:
            for batch in batches:
                pixels = source.pixels(batch)
                if pixels.ndim != 5:
                    raise UserError(f"the codec decodes to {pixels.ndim} dimensions; pictures and clips have 5")
                texts = [sample_set.prompts[i].text for i in batch]
                parts.append(self._batch(pixels, texts, self.fps or source.fps or WAN_FPS))
                show(show.count + len(batch))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _batch(self, pixels: Tensor, texts: Sequence[str], fps: float) -> Readings:
        n, f = pixels.shape[:2]
        features = self.features(pixels.flatten(0, 1)).unflatten(0, (n, f))
        found = {"features": features}
        found |= {name: torch.tensor([measure(one[None]) for one in pixels]) for name, measure in DRIFT.items()}
        if f > 1:
            found["optical_flow"] = clip_flows(pixels, self.flow)
            found["dynamic_degree"] = dynamic_clips(pixels, fps, self.flow).double()
        if self.perceptual and f == 1:
            distances = torch.zeros(n, MOST_SEEDS)
            for a, b in itertools.combinations(range(n), 2):
                distances[a, b] = distances[b, a] = self.perceptual(pixels[a, 0], pixels[b, 0])
            found["perceptual"] = distances
        if self.alignment:
            found["alignment"] = self.alignment(pixels, texts)
        if self.reader:
            found |= self.reader(pixels) | {"grey": pixels.mean(4).flatten(1)}
        return found


def whole_prompts(sample_set: SampleSet) -> list[range]:
    """Returns the range of each prompt's samples, between which pairs of pictures are compared."""
    ids = sample_set.prompt_ids
    counts = ids.unique_consecutive(return_counts=True)[1]
    if len(counts) != int(ids.max()) + 1 or int(counts.max()) > MOST_SEEDS:
        raise UserError(f"--perceptual: needs each prompt's samples together, at most {MOST_SEEDS} of them")
    ends = counts.cumsum(0).tolist()
    return [range(end - count, end) for end, count in zip(ends, counts.tolist(), strict=True)]


def load_instruments(protocol: Protocol, config: Config | None, clips: bool) -> Instruments:
    """Loads the instruments that a protocol names, or the defaults for a teacher; config None: for folders of samples.

    Raises UserError for what they lack, before anything is sampled.
    """
    world = None if config is None else world_of(config)
    features = load_features(protocol.features or world or EFFICIENTNET)
    features(torch.zeros(1, *features.size, 3))
    flow, flow_name = load_flow(protocol.flow)
    if clips:
        flow(torch.zeros(64, 64, 3), torch.zeros(64, 64, 3))
    reader, real, accuracy = _load_world(world) if world else (None, None, None)
    of_real = real if features.name == world else None
    if protocol.real is not None:
        files = SampleFolder(Path(protocol.real)).files.values()
        real_features = torch.cat([features(read_media(file)[0]) for file in files])
        if len(real_features) < 2:
            raise UserError(f"--real: {protocol.real} holds one picture; two at least")
        of_real = moments(real_features)
    perceptual = lpips() if protocol.perceptual and not clips else None
    alignment = load_alignment(protocol.alignment) if protocol.alignment else None
    return Instruments(features, flow, flow_name, protocol.fps, perceptual, alignment, reader, of_real, accuracy)


def _load_world(world: World) -> tuple[Reader, Moments, str]:
    """Loads the reader of a world, the moments of its net's features of real pictures, and its accuracy in words."""
    if world == "scenes":
        reader, real, shares = load_reader()
        told = ", ".join(f"{100 * shares[kind]['all']:.1f} % of held-out real {kind}" for kind in shares)
        return reader, (real["mean"], real["covariance"]), f"{world}, {told} read right in all"
    classifier, real, accuracy = load_classifier()

    def read(pixels: Tensor) -> Readings:
        return {"digit": classify(classifier, pixels)[1].argmax(1), "displacement": displacement(pixels)}

    told = f"{world}, {100 * accuracy:.1f} % of held-out real digits read right"
    return read, (real["mean"], real["covariance"]), told
