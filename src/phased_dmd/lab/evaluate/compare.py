"""Samples of one set from several sources side by side: their measurements, and the pictures that are kept of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phased_dmd.checkpoint import write_atomically
from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate.instruments import Instruments, Readings
from phased_dmd.lab.evaluate.measures import (
    Measurement,
    Reference,
    clip_statistics,
    measurements,
    mixture_statistics,
    statistics,
)
from phased_dmd.lab.evaluate.sample_sets import SampleSet
from phased_dmd.lab.evaluate.samples import SampleSource
from phased_dmd.media import save_clip, save_image, save_points, strip
from phased_dmd.models.analytic import ExactMixture
from phased_dmd.models.exact_clips import Clips
from phased_dmd.sampling.sampler import WAN_FPS

STRIP = 96  # pixels, at most, of the height of a clip's frames side by side
Sources = Mapping[str, SampleSource]  # by the name of the row; the base at its most steps comes first


def compare_media(
    sources: Sources, sample_set: SampleSet, floor: SampleSource | None, tools: Instruments, folder: Path,
    seen: dict[str, Readings],
) -> dict[str, Any]:  # fmt: skip
    """Measures pictures or clips; returns a set as `evaluation.json` holds it.

    floor: the base's samples of other seeds. folder: where pictures go. seen: readings by a source's key, which are
    not taken again.
    """

    def read(name: str, source: SampleSource) -> Readings:
        if source.key in seen:
            return seen[source.key]
        found = tools.read(source, sample_set, f"{folder.parent.name}, {sample_set.name}: {name}, measured")
        if source.key is not None:
            seen[source.key] = found
        return found

    readings, base = {name: read(name, source) for name, source in sources.items()}, next(iter(sources))
    if len({of_row["features"].shape[1] for of_row in readings.values()}) > 1:
        raise UserError("the samples that are compared are clips of different lengths")
    references = {"": Reference(read("other seeds", floor))} if floor else {}
    references["_paired"] = Reference(readings[base], references[""].basis if floor else None)
    found = {name: statistics(r, sample_set, references, tools.real) for name, r in readings.items()}
    for name, source in sources.items():
        _save_media(source, sample_set, readings[base]["features"].shape[1] > 1, folder / sample_set.name / slug(name))
    return _as_json(sample_set, sources, measurements(found, base, sample_set.groups))


def compare_mixture(
    sources: Sources, sample_set: SampleSet, exact: ExactMixture, clips: Clips | None, folder: Path
) -> dict[str, Any]:
    """Measures an analytic teacher's samples against its exact mixture; returns the same as `compare_media`.

    clips: those that the mixture is of, unless it is one of points.
    """
    found = {}
    for name, source in sources.items():
        latents, path = source.latents, folder / sample_set.name / slug(name)
        assert latents is not None
        found[name] = mixture_statistics(latents, exact, sample_set.seeds[0])
        if clips is None:
            save_points(path / "points.png", {name: latents[:, :2]}, exact.means[:, :2].cpu())
        else:
            found[name] |= clip_statistics(latents, clips)
            _save_media(source, sample_set, True, path)
    return _as_json(sample_set, sources, measurements(found, next(iter(sources)), sample_set.groups))


def _as_json(sample_set: SampleSet, sources: Sources, rows: dict[str, dict[str, Measurement]]) -> dict[str, Any]:
    """Adds to the measurements what the samples cost, which has no interval."""
    base, of_base = next(iter(sources.items()))
    for name, source in sources.items():
        for measure, cost, base_cost in (
            ("network_calls", source.calls, of_base.calls), ("seconds_a_sample", source.seconds, of_base.seconds),
        ):  # fmt: skip
            if cost is not None and base_cost is not None:
                gap = cost - base_cost
                rows[name][measure] = {"value": cost, "half_width": None, "gap": gap, "gap_half_width": None}
    return {"about": sample_set.about, "base": base, "rows": rows}


def slug(row: str) -> str:
    """Returns the name of a row's folder of pictures."""
    return row.replace(", ", "-").replace(" ", "-")


def _save_media(source: SampleSource, sample_set: SampleSet, clips: bool, folder: Path) -> None:
    """Saves the shown samples of a source, a file each; of a clip also its frames side by side."""
    shown = sample_set.shown(clips)
    about = [{"prompt": sample_set.prompts[i].text, "seed": sample_set.seeds[i]} for i in shown]
    write_atomically(folder.parent / "shown.json", (json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode())
    for place, i in enumerate(shown):
        pixels = source.pixels([i])
        if clips:
            save_clip(pixels[0], folder / f"{place:02d}.webp", source.fps or WAN_FPS)
            save_image(strip(pixels[0], STRIP), folder / f"{place:02d}-frames.png")
        else:
            save_image(strip(pixels[0]), folder / f"{place:02d}.png")
