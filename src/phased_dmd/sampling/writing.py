"""Samples are written as pictures or clips, with a list that says which is which, and a contact sheet."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from phased_dmd.checkpoint import save_tensors, write_atomically
from phased_dmd.config import Config
from phased_dmd.contact_sheet import Caption, save_sheet
from phased_dmd.errors import UserError, refuse_full
from phased_dmd.media import save_clip, save_image, save_points, strip, thumbnails
from phased_dmd.progress import progress
from phased_dmd.prompts import Prompt
from phased_dmd.sampling.sampler import Sampler

SHEET, SHEET_HEIGHT = 64, 160  # samples on a contact sheet, and the most pixels of their height
MANIFEST = "samples.jsonl"  # beside written samples: the prompt, seed and file of each


def prompts_for(config: Config, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Returns the prompts to sample, or the empty one for a model that takes none; raises UserError if they differ."""
    if config.prompts is None and prompts:
        raise UserError(f"--prompt, --prompts: {config.recipe} takes none")
    if config.prompts is not None and not prompts:
        raise UserError(f"--prompt: {config.recipe} makes what it is told; give --prompt TEXT or --prompts FILE")
    return list(prompts) or [Prompt("")]


def write_samples(
    sampler: Sampler, prompts: Sequence[Prompt], seeds: int, output: Path, teacher_steps: int | None = None
) -> list[Path]:
    """Writes every prompt with seeds 0, 1, ...: a PNG, or a WebP clip, each, and a contact sheet; returns the paths.

    Each is written as soon as it is made, into a folder that must be empty. samples.jsonl says which is which of those
    that are there; of pictures it is a prompt file of first frames, too, see `read_prompts`.
    """
    refuse_full(output)
    pairs = [(prompt, seed) for prompt in prompts for seed in range(seeds)]
    made = sampler.batches([prompt for prompt, _ in pairs], [seed for _, seed in pairs], teacher_steps)
    points, paths, lines, shown = [], [], "", []
    captions = [Caption(prompt.text, seed) for prompt, seed in pairs]
    with progress("samples", len(pairs), unit="samples") as show:
        for i, ((prompt, seed), z) in enumerate(zip(pairs, (z for batch in made for z in batch), strict=True)):
            pixels = sampler.decode(z[None])
            show(i + 1)
            if pixels.ndim != 5:
                points.append(pixels)
                continue
            moves = pixels.shape[1] > 1
            path = output / f"{i // seeds:04d}-{file_stem(prompt.text)}-seed{seed}.{'webp' if moves else 'png'}"
            if moves:
                save_clip(pixels[0], path, sampler.fps)
            else:
                save_image(strip(pixels[0]), path)
            paths.append(path)
            row = {"prompt": prompt.text, "seed": seed, "image": path.name}
            lines += f"{json.dumps(row, ensure_ascii=False)}\n"
            write_atomically(output / MANIFEST, lines.encode())
            if i < SHEET:
                shown.append(thumbnails(pixels, SHEET_HEIGHT))
    if points:
        samples = torch.cat(points)
        shown = samples[:, :2]
        save_points(output / "samples.png", {"samples": shown}, shown)
        save_tensors(output / "samples.safetensors", {"samples": samples}, {"seeds": seeds})
        return [output / "samples.png", output / "samples.safetensors"]
    save_sheet(output / "contact-sheet.png", {"": torch.cat(shown).float() / 255}, captions[: len(shown)])
    return [*paths, output / MANIFEST, output / "contact-sheet.png"]


def file_stem(text: str) -> str:
    """Returns the part of a file name for a prompt: its letters and digits, as far as the locale can write them."""
    stem, encoding = "".join(c if c.isalnum() else "-" for c in text.lower())[:60], sys.getfilesystemencoding()
    return stem.encode(encoding, "ignore")[:180].decode(encoding, "ignore")  # file systems count bytes
