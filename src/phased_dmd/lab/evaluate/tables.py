"""What each measure is called and how it is read, and an evaluation as tables."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from phased_dmd.lab.evaluate.measures import Measurement
from phased_dmd.lab.metrics.formats import markdown_table, number

HEADINGS = {  # by measure: its title, and how to read it
    "law_kl": (
        "KL to the law",
        "nats, of what a scene's prompt leaves open: the sum of those that follow; 0 is right",
    ),
    "count_kl": ("KL of the counts", "nats, of two digits and of three"),
    "class_kl": ("KL of the classes", "nats, of the digits in scenes, or in a mixture's clips"),
    "colour_kl": ("KL of the colours", "nats"),
    "place_kl": ("KL of the places", "nats, of the four corners"),
    "direction_kl": ("KL of the directions", "nats"),
    "speed_kl": ("KL of the speeds", "nats, of slow and fast, or of the three in a mixture's clips"),
    "pan_kl": ("KL of the pans", "nats, of the camera's three"),
    "possible_count": ("possible counts", "share of the scenes that have two or three digits"),
    "world_speed": ("speed", "of a scene's digits before its background, pixels a frame; .95 is right"),
    "class_entropy": ("class entropy", "nats, of the digits read; 2.30 when all ten are equally frequent"),
    "least_class_share": ("rarest class", "share of the samples read as the least frequent digit"),
    "frechet_features": ("Fréchet, features", "of frames, to the guided base's many-step samples of other seeds"),
    "frechet_video": ("Fréchet, clips", "of the mean feature of a clip and its mean change from frame to frame"),
    "frechet_pca": ("Fréchet, pixels", "the same in 32 principal components of the pixels"),
    "frechet_features_paired": (
        "coupling, features",
        "Fréchet distance to the guided base's samples of the same seeds: low where a noise leads to the same sample",
    ),
    "frechet_video_paired": ("coupling, clips", "the same of clips"),
    "frechet_pca_paired": ("coupling, pixels", "the same in pixels"),
    "frechet_real": ("Fréchet to real data", "of frames; for nano to held-out digits"),
    "high_frequency_energy": ("high-frequency energy", "mean power above half the Nyquist frequency"),
    "contrast": ("contrast", "standard deviation of grey values"),
    "sharpness": ("sharpness", "variance of the Laplacian"),
    "saturation": ("saturation", "of the HSV model"),
    "faithfulness": ("faithfulness", "share of samples of which all is read as the prompt names it"),
    "digits_right": ("digits", "share of the digits that a scene's prompt names, read as they are named"),
    "colours_right": ("colours", "share of the colours named that are there"),
    "places_right": ("places", "share of those named"),
    "directions_right": ("directions", "share of those named"),
    "speeds_right": ("speeds", "share of those named"),
    "pan_right": ("pan", "share of clips whose camera moves as the prompt names it"),
    "direction": ("direction", "share of clips that move the way the prompt names"),
    "alignment": ("fit to the prompt", "cosine of picture and prompt"),
    "optical_flow": ("optical flow", "mean absolute, pixels a frame"),
    "dynamic_degree": ("dynamic degree", "share of clips that VBench's rule calls dynamic"),
    "pixels_moved_fast": ("moved, fast", "pixels, from the first third of a clip to its last"),
    "pixels_moved_slowly": ("moved, slowly", "pixels"),
    "pairwise_cosine": ("pairwise cosine", "of features, mean over pairs of one prompt; lower is more diverse"),
    "pairwise_perceptual": ("pairwise LPIPS", "mean over pairs of one prompt; higher is more diverse"),
    "mode_histogram_kl": ("KL of the modes", "nats, of the histogram over the modes to the mixture's weights"),
    "energy_distance": ("energy distance", "to exact samples"),
    "distance_to_nearest_mode": ("distance to a mode", "mean over samples"),
    "clip_speed": ("speed", "of the mixture's clip nearest to a sample, pixels a frame; .8 is right"),
    "network_calls": ("network calls", "a sample"),
    "seconds_a_sample": ("seconds a sample", "prompt to latents, on the machine that sampled it"),
    "structure": ("change of structure", "below a quarter of the Nyquist frequency; of `reproduce fig5`, as the next"),
    "detail": ("change of detail", "above half the Nyquist frequency"),
    "detail_over_structure": ("change of detail over that of structure", "the one over the other"),
    "agreement": ("digits read alike", "share of pictures of equal noise in which the same digit is read"),
    "deviation": ("deviation from the exact flow", "mean absolute, of trajectories; of `reproduce fig2`"),
}
COSTS = ("network_calls", "seconds_a_sample")  # what a sample takes, which has no interval
BETTER = {  # by measure: which way is better; the others should be as the base's are
    **{name: "lower" for name in HEADINGS if name.startswith("frechet")},
    **{name: "lower" for name in ("mode_histogram_kl", "energy_distance", "distance_to_nearest_mode", *COSTS)},
    **{name: "lower" for name in HEADINGS if name.endswith("_kl")},
    **{name: "higher" for name in HEADINGS if name.endswith("_right")},
    **{name: "higher" for name in ("faithfulness", "direction", "alignment", "possible_count")},
}  # fmt: skip
NET_OF = {  # by measure: which of the evaluation's nets makes it
    **{name: "features" for name in HEADINGS if name.startswith("frechet") and "pca" not in name},
    "pairwise_cosine": "features", "pairwise_perceptual": "perceptual", "alignment": "alignment",
    "optical_flow": "flow", "dynamic_degree": "flow",
}  # fmt: skip
FINER = {  # measures that say little beside the others, and stand in the file and the whole table alone
    "frechet_pca", "frechet_pca_paired", "frechet_video", "high_frequency_energy", "sharpness", "least_class_share",
    "count_kl", "class_kl", "colour_kl", "place_kl", "direction_kl", "speed_kl", "pan_kl",
}  # fmt: skip
WIDTH = 100  # columns that a terminal has at least, as most do


def show(evaluation: Mapping[str, Any], console: Console) -> None:
    """Prints what matters of an evaluation: a table a prompt set, a row a measure, and its gap to the base; and which
    law the base's row is of.
    """
    base = ""
    for name, found in evaluation["sets"].items():
        base, rows = found["base"], found["rows"]
        measures = dict.fromkeys(measure for row in rows.values() for measure in row if measure not in FINER)
        shown = Table("", *rows, title=f"{name}: {found['about']}", title_justify="left", box=None)
        for measure in measures:
            cells = [_format_cell(row.get(measure), column == base, True) for column, row in rows.items()]
            shown.add_row(title(measure), *map(Text, cells))
        console.print(shown)
    law = ": what its sampler makes, guided as the teacher is" if "recipe" in evaluation else ""
    console.print(f"(gap to {base}{law})", markup=False, highlight=False)
    if evaluation["nets"]:
        nets = ", ".join(f"{name}: {net}" for name, net in evaluation["nets"].items())
        console.print(nets, markup=False, highlight=False)


def table(evaluation: Mapping[str, Any]) -> str:
    """Returns an evaluation as Markdown, a table a prompt set, whose cells are value ± half width (gap to the base)."""
    parts = []
    for name, found in evaluation["sets"].items():
        measures = list(dict.fromkeys(measure for row in found["rows"].values() for measure in row))
        head = [f"{name}: {found['about']}", *(title(measure, evaluation["nets"]) for measure in measures)]
        rows = [
            [row, *(_format_cell(cells.get(measure), row == found["base"]) for measure in measures)]
            for row, cells in found["rows"].items()
        ]
        parts.append(markdown_table(head, rows))
    return "\n\n".join(parts)


def title(measure: str, nets: Mapping[str, str] | None = None) -> str:
    """Returns a measure's title, with the name of the net that made it where nets are given."""
    net = (nets or {}).get(NET_OF.get(measure, ""))
    return f"{HEADINGS[measure][0]} ({net})" if net else HEADINGS[measure][0]


def _format_cell(measurement: Measurement | None, is_base: bool, value_alone: bool = False) -> str:
    """Returns value ± half width (gap ± half width); value_alone: without the value's own."""
    if measurement is None:
        return ""
    text = _format_interval(measurement["value"], measurement["half_width"], False)
    text = text.partition(" ")[0] if value_alone else text
    if is_base:
        return text
    return f"{text} ({_format_interval(measurement['gap'], measurement['gap_half_width'], True)})"


def _format_interval(value: float | None, half: float | None, signed: bool) -> str:
    assert value is not None
    text = number(value, signed=signed, scale=half)
    return f"{text} ± {number(half, 2)}" if half else text
