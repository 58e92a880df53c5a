"""Makes the README's picture from a finished run of nano-t2i: the base and its student, with equal prompts and seeds.

The committed picture is of the recipe's own run, and of seeds 0 to 19:
    phased-dmd distill nano-t2i --output runs/demo
    python scripts/readme_picture.py runs/demo docs/images/nano-before-after.png
"""

import argparse

import torch
from PIL import Image, ImageDraw, ImageFont

from phased_dmd import load

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = [f"a handwritten {word}" for word in WORDS] + ["a handwritten digit"] * len(WORDS)
ROWS = (  # two lines of label, and the steps of the base; None stands for the student
    ("base, 4 steps", "8 network calls", 4),
    ("Phased DMD, 4 steps", "4 network calls", None),
    ("base, 40 steps", "80 network calls", 40),
)
SCALE, GAP, LABEL, HEAD = 2, 4, 190, 30  # how often a pixel is repeated, and pixels of the picture


def picture(rows: list[torch.Tensor]) -> Image.Image:
    """Lays out rows of samples [n, 32, 32, 3] with values in [0, 1]: ten columns, one block for each kind of prompt."""
    half, side = len(WORDS), rows[0].shape[1] * SCALE
    block = HEAD + len(rows) * (side + GAP) + 2 * GAP
    sheet = Image.new("RGB", (LABEL + half * (side + GAP) + GAP, 2 * block), "white")
    draw, bold, small = ImageDraw.Draw(sheet), ImageFont.load_default(16), ImageFont.load_default(13)
    for part, title in enumerate(('"a handwritten zero" to "a handwritten nine"', 'ten times "a handwritten digit"')):
        draw.text((LABEL, part * block + 8), title, "#333333", small)
        for r, (samples, (label, calls, _)) in enumerate(zip(rows, ROWS, strict=True)):
            top = part * block + HEAD + r * (side + GAP)
            draw.text((10, top + 14), label, "black", bold)
            draw.text((10, top + 35), calls, "#666666", small)
            for column, sample in enumerate(samples[part * half : (part + 1) * half]):
                cell = Image.fromarray((sample.clamp(0, 1) * 255).round().byte().numpy())
                sheet.paste(cell.resize((side, side), Image.Resampling.NEAREST), (LABEL + column * (side + GAP), top))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the README's picture from a finished run of nano-t2i.")
    parser.add_argument("run", help="the folder of the run")
    parser.add_argument("output", help="the PNG to write")
    parser.add_argument("--seed", type=int, default=0, help="the first column's seed; the next ones follow it")
    arguments = parser.parse_args()
    sampler = load(arguments.run)
    seeds = range(arguments.seed, arguments.seed + len(PROMPTS))
    rows = [sampler.decode(sampler(PROMPTS, seeds, teacher_steps=steps))[:, 0] for _, _, steps in ROWS]
    picture(rows).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
