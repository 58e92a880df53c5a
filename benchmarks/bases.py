"""What the embedded teachers of scenes themselves make at 40, 8 and 4 steps, beside what real scenes are.

`python benchmarks/bases.py` writes docs/results/bases.md, .jsonl and pictures of them: each seed has noise of its own,
and intervals are over seeds. With `--first 100 --guidance 1.5 --output FOLDER` it tries another guidance, on seeds that
nothing is reported of.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from phased_dmd.config import Config
from phased_dmd.config.overrides import changed
from phased_dmd.lab.evaluate import Protocol, title
from phased_dmd.lab.evaluate.instruments import load_instruments
from phased_dmd.lab.evaluate.measures import measurements
from phased_dmd.lab.evaluate.sample_sets import SampleSet, sample_sets
from phased_dmd.lab.evaluate.samples import Base
from phased_dmd.lab.evaluate.scene_measures import OF_SPECIFIC, OF_WEAK, scene_statistics
from phased_dmd.lab.metrics.formats import markdown_table
from phased_dmd.lab.metrics.intervals import interval
from phased_dmd.lab.reproduce.results import plus_minus, write_rows
from phased_dmd.lab.reproduce.workers import MOST_SAMPLES
from phased_dmd.media import save_image
from phased_dmd.networks.build import build_system, load_teacher
from phased_dmd.recipes import resolve
from phased_dmd.sampling.sampler import Sampler

ROOT = Path(__file__).parents[1]
RECIPES, STEPS = ("scenes-t2i", "scenes-t2v", "scenes-moe"), (40, 8, 4)
TRUTH = {"specific": OF_SPECIFIC, "weak": OF_WEAK}
SHOWN = {"specific": 4, "weak": 4}  # samples in the picture


def build_sampler(config: Config) -> Sampler:
    """Returns a sampler of a recipe's base, which no run has distilled."""
    model, codec = load_teacher(config)
    return Sampler(build_system(config, model, codec.encode_text([""])[0]), codec)


def measure_base(config: Config, seed: int, samples: int, cache: Path, picture: Path | None) -> list[dict[str, Any]]:
    """Returns a row for each prompt set and number of steps, of samples with noise of the seed's own.

    picture: where a few of the samples are drawn, a line a number of steps.
    """
    sampler, rows, drawn = build_sampler(config), [], {steps: [] for steps in STEPS}
    base = Base(sampler, cache)
    clips = sampler.shape[1] > 1
    protocol = Protocol(samples=samples, first=MOST_SAMPLES * seed)
    tools = load_instruments(protocol, config, clips)
    for sample_set in sample_sets(config, protocol, takes_images=False):
        found = {}
        for steps in STEPS:
            source = base.samples(sample_set.prompts, sample_set.seeds, steps, f"{config.recipe}, {steps} steps")
            readings = tools.read(source, sample_set, f"{config.recipe}, {steps} steps, measured")
            found[str(steps)] = scene_statistics(readings, [prompt.text for prompt in sample_set.prompts])
            drawn[steps] += [frame for i in range(SHOWN[sample_set.name]) for frame in shown(source.pixels([i])[0])]
        measured = measurements(found, str(STEPS[0]), sample_set.groups)
        rows += [row(config, seed, sample_set, steps, measured[str(steps)]) for steps in STEPS]
    if picture is not None:
        save_image(Image.fromarray(np.vstack([np.hstack(drawn[steps]) for steps in STEPS])), picture)
    return rows


def row(
    config: Config, seed: int, sample_set: SampleSet, steps: int, found: Mapping[str, Mapping[str, float | None]]
) -> dict[str, Any]:
    """Returns what is said of a set of samples, as a line of bases.jsonl."""
    values = {name: measurement["value"] for name, measurement in found.items()}
    about = {"name": f"{config.recipe}-{sample_set.name}-{steps}-{seed}", "recipe": config.recipe, "seed": seed}
    return about | {"set": sample_set.name, "steps": steps, "samples": len(sample_set.seeds), "values": values}


def shown(pixels: torch.Tensor) -> list[np.ndarray]:
    """Returns a picture [1, h, w, 3], or three frames of a clip [f, h, w, 3], as arrays of bytes."""
    frames = pixels[:: max(1, (len(pixels) - 1) // 2)]
    return [np.asarray((255 * frame.clamp(0, 1)).round().byte()) for frame in frames]


def table(rows: Sequence[Mapping[str, Any]], recipe: str, kind: str) -> str:
    """Returns the means over seeds of a prompt set, a line a measure, beside what real scenes are."""
    mine = [row for row in rows if (row["recipe"], row["set"]) == (recipe, kind)]
    lines = []
    for name in mine[0]["values"]:
        cells = [interval([row["values"][name] for row in mine if row["steps"] == steps]) for steps in STEPS]
        lines.append([title(name), f"{TRUTH[kind][name]:.3g}", *map(plus_minus, cells)])
    return markdown_table([kind, "real scenes", *(f"{steps} steps" for steps in STEPS)], lines)


def page(rows: Sequence[Mapping[str, Any]], command: str) -> str:
    """Returns docs/results/bases.md."""
    parts = ["# bases", f"`{command}`: what the teachers of scenes make themselves, with their recipes' guidance."]
    parts.append(
        "Mean ± half width of the 95 % interval over seeds, each with noise of its own. *Specific*: 48 prompts that "
        "name everything; shares of what is named that is read right, as faithfulness all of a sample. *Weak*: the "
        "prompt that leaves all open, KL of each attribute's histogram to equal shares. The reader reads .965 of real "
        "held-out pictures and .958 of clips right in all. Pictures: four specific and four weak samples, of clips "
        "three frames each; 40, 8 and 4 steps."
    )
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        mine = [row for row in rows if row["recipe"] == recipe]
        count = len({row["seed"] for row in mine})
        parts += [
            f"## {recipe}",
            f"{count} seeds, {mine[0]['samples']} samples a cell.",
            f"![{recipe}](bases-{recipe}.png)",
        ]
        parts += [table(rows, recipe, kind) for kind in TRUTH]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them: 100 and more are for tuning")
    parser.add_argument("--samples", type=int, default=480)
    parser.add_argument("--guidance", type=float, help="another than the recipe's")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "bases")
    arguments = parser.parse_args()
    rows = []
    for recipe in arguments.recipes:
        config = resolve(recipe)
        if arguments.guidance is not None:
            config = changed(config, {"teacher.guidance": [arguments.guidance]})
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            picture = None if seed > arguments.first else arguments.output / f"bases-{recipe}.png"
            rows += measure_base(config, seed, arguments.samples, arguments.cache, picture)
    write_rows(arguments.output / "bases.jsonl", rows)
    command = " ".join(["python", "benchmarks/bases.py", *sys.argv[1:]])
    (arguments.output / "bases.md").write_text(page(rows, command), "utf-8")
    for kind in TRUTH:
        for recipe in arguments.recipes:
            print(table(rows, recipe, kind))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
