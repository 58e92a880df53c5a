"""An evaluation as tables, and what its measures are."""

from typing import Any

from phased_dmd.lab.evaluate.measures import Figure
from phased_dmd.lab.metrics.formats import number

HEADINGS = {  # of a measure: title, how to read it
    "class_entropy": ("class entropy", "nats, of the digits read; 2.30 when all ten are equally frequent"),
    "least_class_share": ("rarest class", "share of the samples read as the least frequent digit"),
    "frechet_features": ("Fréchet, features", "of frames, to the base's many-step samples of other seeds"),
    "frechet_video": ("Fréchet, clips", "of the mean feature of a clip and its mean change from frame to frame"),
    "frechet_pca": ("Fréchet, pixels", "the same in 32 principal components of the pixels"),
    "frechet_features_paired": ("Fréchet, features, paired", "to the base's many-step samples of the same seeds"),
    "frechet_video_paired": ("Fréchet, clips, paired", "to the base's many-step samples of the same seeds"),
    "frechet_pca_paired": ("Fréchet, pixels, paired", "to the base's many-step samples of the same seeds"),
    "frechet_real": ("Fréchet to real data", "of frames; for nano to held-out digits"),
    "high_frequency_energy": ("high-frequency energy", "mean power above half the Nyquist frequency"),
    "contrast": ("contrast", "standard deviation of grey values"),
    "sharpness": ("sharpness", "variance of the Laplacian"),
    "saturation": ("saturation", "of the HSV model"),
    "faithfulness": ("faithfulness", "share of samples whose digit is read as the prompt names it"),
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
    "network_calls": ("network calls", "a sample"),
    "seconds_a_sample": ("seconds a sample", "prompt to latents, on the machine that sampled it"),
}
NET_OF = {  # of a measure: which of the evaluation's nets made it
    **{name: "features" for name in HEADINGS if name.startswith("frechet") and "pca" not in name},
    "pairwise_cosine": "features", "pairwise_perceptual": "perceptual", "alignment": "alignment",
    "optical_flow": "flow", "dynamic_degree": "flow",
}  # fmt: skip


def tables(evaluation: dict[str, Any]) -> dict[str, dict[str, dict[str, Figure]]]:
    """The evaluation's tables, {prompt set: {row: {measure: figure}}}."""
    return {name: found["rows"] for name, found in evaluation["sets"].items()}


def table(evaluation: dict[str, Any]) -> str:
    """The evaluation as Markdown, a table a prompt set; a figure is value ± half width (signed gap to the base)."""
    parts = []
    for name, found in evaluation["sets"].items():
        measures = list(dict.fromkeys(measure for row in found["rows"].values() for measure in row))
        head = [f"{name}: {found['about']}", *(title(measure, evaluation["nets"]) for measure in measures)]
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for row, figures in found["rows"].items():
            cells = [shown(figures.get(measure), row == found["base"]) for measure in measures]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def title(measure: str, nets: dict[str, str]) -> str:
    """A measure's title with the name of the net that made it."""
    net = nets.get(NET_OF.get(measure, ""))
    return f"{HEADINGS[measure][0]} ({net})" if net else HEADINGS[measure][0]


def shown(figure: Figure | None, is_base: bool) -> str:
    """One cell."""
    if figure is None:
        return ""
    text = _interval(figure["value"], figure["half_width"], False)
    return text if is_base else f"{text} ({_interval(figure['gap'], figure['gap_half_width'], True)})"


def _interval(value: float | None, half: float | None, signed: bool) -> str:
    assert value is not None
    text = number(value, signed=signed, scale=half)
    return f"{text} ± {number(half, 2)}" if half else text
