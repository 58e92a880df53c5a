"""Makes the picture of what wrong calls of a stock pipeline look like, and prints how far each is from the right one.

The committed picture, which every export's card shows, is of the recipe's own run:
    phased-dmd distill nano-t2i --output runs/demo
    phased-dmd export runs/demo --output exported
    python scripts/wrong_calls_picture.py exported src/phased_dmd/assets/export/wrong-calls.png
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image, ImageDraw, ImageFont

from phased_dmd import load_pipeline

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = [f"a handwritten {word}" for word in WORDS]
SCALE, GAP, LABEL = 2, 4, 330  # how often a pixel is repeated, and pixels of the picture


class Stock:
    """A stock pipeline of an export's base, and what its users would try."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.experts = folder, json.loads((folder / "export.json").read_text("utf-8"))["experts"]
        self.names = [expert["name"] for expert in self.experts]

    def pipe(self, names: Sequence[str] = (), scheduler: Any = None) -> Any:
        """Returns the base with these experts loaded, the last one active, at exactly the trained times unless told."""
        pipe = WanPipeline.from_pretrained(self.folder / "base")
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = scheduler or load_pipeline(self.folder).scheduler
        if scheduler is None:
            pipe.scheduler.switch = lambda step: None
        for expert in self.experts:
            if expert["name"] in names:
                pipe.load_lora_weights(str(self.folder), weight_name=expert["file"], adapter_name=expert["name"])
        return pipe

    def switch(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Puts the next step's expert to work by hand, at the end of a step."""
        for expert in self.experts:
            if step + 1 in expert["steps"]:
                pipe.set_adapters(expert["name"])
        return tensors

    def sample(
        self, pipe: Any, steps: int = 4, guidance: float = 1.0, tokens: int = 16, by_hand: bool = False
    ) -> torch.Tensor:
        """Returns pictures [10, 32, 32, 3] of the prompts, with seeds 0 to 9."""
        options: dict[str, Any] = {"callback_on_step_end": self.switch} if by_hand else {}
        if by_hand:
            self.switch(pipe, -1, None, {})
        made = pipe(
            PROMPTS, height=32, width=32, num_frames=1, num_inference_steps=steps, guidance_scale=guidance,
            max_sequence_length=tokens, output_type="pt",
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))], **options,
        ).frames  # fmt: skip
        return made[:, 0].permute(0, 2, 3, 1)


def rows(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the pictures of the right call, of the base, and of each wrong call by what was done."""
    stock = Stock(folder)
    right, own = load_pipeline(folder), WanPipeline.from_pretrained(folder / "base").scheduler
    right.set_progress_bar_config(disable=True)
    whole, every, hand = stock.pipe(), stock.pipe(stock.names), stock.pipe(stock.names)
    whole.load_lora_weights(str(folder))
    every.set_adapters(stock.names)
    shifted = stock.pipe(stock.names, FlowMatchEulerDiscreteScheduler(shift=5.0))
    return {
        "load_pipeline": stock.sample(right),
        "the base, 40 guided steps": stock.sample(stock.pipe(scheduler=own), 40, 1.5),
        "no experts, 4 steps": stock.sample(stock.pipe()),
        "load_lora_weights(folder)": stock.sample(whole),
        "all experts at once": stock.sample(every),
        "guidance_scale left at 5": stock.sample(hand, guidance=5.0, by_hand=True),
        "FlowMatchEuler(shift=5)": stock.sample(shifted, by_hand=True),
        "max_sequence_length left at 512": stock.sample(hand, tokens=512, by_hand=True),
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
