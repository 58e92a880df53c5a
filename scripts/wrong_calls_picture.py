"""Makes the picture of what wrong calls of a stock pipeline look like, and prints how far each is from the right one.

The committed picture, which every export's card shows, is of the recipe's own run:
    phased-dmd distill nano-t2i --output runs/demo
    phased-dmd export runs/demo --output exported
    python scripts/wrong_calls_picture.py exported src/phased_dmd/assets/export/wrong-calls.png
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image, ImageDraw, ImageFont

from phased_dmd import load_pipeline

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = [f"a handwritten {word}" for word in WORDS]
SCALE, GAP, LABEL = 2, 4, 330  # how often a pixel is repeated, and pixels of the picture
Switch = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


class Stock:
    """A stock pipeline of the base, and the calls that its users would try."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = folder, json.loads((folder / "export.json").read_text("utf-8"))
        self.files = {expert["name"]: expert["file"] for expert in self.index["experts"]}

    def pipe(self, *names: str) -> Any:
        """Returns the base with these experts loaded, the last one active, at its own times made those of Euler."""
        pipe = WanPipeline.from_pretrained(self.folder / "base")
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = load_pipeline(self.folder).scheduler
        pipe.scheduler.switch = lambda step: None
        for name in names:
            pipe.load_lora_weights(str(self.folder), weight_name=self.files[name], adapter_name=name)
        return pipe

    def switch(self, pipe: Any) -> Any:
        """Has the experts switched between steps, as by hand."""
        names = [next(e["name"] for e in self.index["experts"] if step in e["steps"]) for step in range(4)]
        pipe.scheduler.switch = lambda step: pipe.set_adapters(names[step])
        return pipe

    def sample(self, pipe: Any, steps: int = 4, guidance: float = 1.0, tokens: int = 16) -> torch.Tensor:
        """Returns pictures [10, 32, 32, 3] of the prompts, with seeds 0 to 9."""
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
        made = pipe(
            PROMPTS, height=32, width=32, num_frames=1, num_inference_steps=steps, guidance_scale=guidance,
            max_sequence_length=tokens, generator=generators, output_type="pt",
        ).frames  # fmt: skip
        return made[:, 0].permute(0, 2, 3, 1)


def rows(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the pictures of the right call, and of each wrong one by what was done."""
    stock = Stock(folder)
    base, names = stock.pipe(), list(stock.files)
    base.scheduler = WanPipeline.from_pretrained(folder / "base").scheduler
    whole = stock.pipe()
    whole.load_lora_weights(str(folder))
    every = stock.pipe(*names)
    every.set_adapters(names)
    shifted = stock.switch(stock.pipe(*names))
    callback = shifted.scheduler.switch
    shifted.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)

    def switch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        callback(min(step + 1, 3))
        return tensors

    callback(0)
    once = shifted.__call__
    shifted_call = lambda *given, **options: once(*given, callback_on_step_end=switch, **options)  # noqa: E731
    hand = stock.switch(stock.pipe(*names))
    right = load_pipeline(folder)
    right.set_progress_bar_config(disable=True)
    return {
        "load_pipeline": stock.sample(right),
        "the base, 40 guided steps": stock.sample(base, 40, 1.5),
        "no experts, 4 steps": stock.sample(stock.pipe()),
        "load_lora_weights(folder)": stock.sample(whole),
        "all experts at once": stock.sample(every),
        "guidance_scale left at 5": stock.sample(hand, guidance=5.0),
        "FlowMatchEuler(shift=5)": stock.sample(shifted_call),
        "max_sequence_length left at 512": stock.sample(hand, tokens=512),
    }


def picture(samples: dict[str, torch.Tensor]) -> Image.Image:
    """Lays out one row a call, one column a prompt."""
    side = 32 * SCALE
    sheet = Image.new("RGB", (LABEL + len(PROMPTS) * (side + GAP), len(samples) * (side + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(17)
    for r, (label, row) in enumerate(samples.items()):
        top = GAP + r * (side + GAP)
        draw.text((10, top + side // 2 - 10), label, "black", font)
        for column, sample in enumerate(row):
            cell = Image.fromarray((sample.clamp(0, 1) * 255).round().byte().numpy())
            sheet.paste(cell.resize((side, side), Image.Resampling.NEAREST), (LABEL + column * (side + GAP), top))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the picture of wrong calls from an export of nano-t2i.")
    parser.add_argument("export", type=Path, help="the export's folder")
    parser.add_argument("output", help="the PNG to write")
    arguments = parser.parse_args()
    samples = rows(arguments.export)
    right = next(iter(samples.values()))
    for label, row in samples.items():
        print(f"{label}: {((row - right).square().mean().sqrt() / right.std()).item():.3f} of the standard deviation")
    picture(samples).convert("P", palette=Image.Palette.ADAPTIVE, colors=32).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
