"""`phased-dmd teach nano-moe`, `scenes-moe` and `nano-i2v`: new transformers around a teacher's VAE and text encoder.

Of each folder the package ships only what is its own: the transformers, the scheduler and the index.
"""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

from phased_dmd.config.teacher import Size
from phased_dmd.lab.metrics.digit_classifier import DIRECTIONS, SPEEDS, WORDS
from phased_dmd.lab.teach import nano as lessons
from phased_dmd.lab.teach.language import captions_table
from phased_dmd.lab.teach.mnist import NUM_FRAMES, PATH_JITTER, Digits, clip_batch, load_digits, place_on_canvas
from phased_dmd.lab.teach.nano import LatentSet, build_scheduler, build_transformer, train_transformer
from phased_dmd.lab.teach.worlds import DIGITS, TrainingBudget, World
from phased_dmd.media import save_image, to_images
from phased_dmd.models.wan import NANO, first_frame_condition

SWITCH = 0.875  # of the teachers of two networks, as in Wan2.2's text-to-video


def teach_moe(
    world: World, output: Path, data: Path, seed: int, budget: TrainingBudget, say: Callable[[str], None]
) -> None:
    """Does `phased-dmd teach nano-moe` and `teach scenes-moe`: two networks, each trained on its own side of the switch
    only, from scratch, or as the world says from the teacher's.
    """
    torch.manual_seed(seed + 2)
    rng, unfinished = torch.Generator().manual_seed(seed + 2), output / "unfinished"
    first, (training, _) = WanPipeline.from_pretrained(world.home, dtype=torch.float32), load_digits(data)
    turns = lessons.encode_digits(world, first.vae, training, budget, rng)
    networks = []
    for steps, interval in zip(budget.switch_steps, ((SWITCH, 1.0), (0.0, SWITCH)), strict=True):
        networks.append(build_transformer(world))
        if world.split:
            networks[-1].load_state_dict(first.transformer.state_dict())
        state = unfinished / f"transformer-{len(networks)}.pt"
        train_transformer(
            networks[-1],
            turns,
            captions_table(first.tokenizer, first.text_encoder),
            None,
            steps,
            rng,
            say,
            state,
            interval,
            further=world.split,
        )
    pipeline = WanPipeline(
        tokenizer=first.tokenizer, text_encoder=first.text_encoder, vae=first.vae,
        scheduler=build_scheduler(),  # type: ignore[arg-type] any scheduler with flow sigmas
        transformer=networks[0], transformer_2=networks[1], boundary_ratio=SWITCH,
    )  # fmt: skip
    pipeline.to(dtype=torch.float16).save_pretrained(output)
    shutil.rmtree(unfinished)
    say(f"{world.name}-moe: written to {output}")


def teach_i2v(output: Path, data: Path, seed: int, budget: TrainingBudget, say: Callable[[str], None]) -> None:
    """Does `phased-dmd teach nano-i2v`: a transformer that is told a clip's first frame as Wan2.2's image-to-video is.

    Beside it, in prompts/, two sets with first frames: of the digits it was taught, and of held-out ones.
    """
    torch.manual_seed(seed + 3)
    rng, unfinished = torch.Generator().manual_seed(seed + 3), output / "unfinished"
    nano, (training, held_out) = WanPipeline.from_pretrained(NANO, dtype=torch.float32), load_digits(data)
    transformer = build_transformer(DIGITS, further_channels=20)  # of the first frame
    pipeline = WanImageToVideoPipeline(
        tokenizer=nano.tokenizer, text_encoder=nano.text_encoder, vae=nano.vae,
        scheduler=build_scheduler(),  # type: ignore[arg-type]
        transformer=transformer,
    )  # fmt: skip
    latents, first_frames, captions, size = [], [], [], Size(num_frames=NUM_FRAMES)
    for start in range(0, budget.num_clips, 64):
        pixels, texts, _ = clip_batch(training, min(64, budget.num_clips - start), rng)
        with torch.no_grad():
            latents.append(nano.vae.encode(pixels, return_dict=False)[0].mode())
            first_frames += [
                first_frame_condition(pipeline, first, size, torch.device("cpu"))["image"]
                for first in to_images(pixels[:, :, 0].permute(0, 2, 3, 1) / 2 + 0.5)
            ]
        captions += texts
    clips = LatentSet(lessons.normalise(nano.vae, torch.cat(latents)), captions, 24, torch.stack(first_frames))
    state = unfinished / "transformer.pt"
    train_transformer(
        transformer,
        [clips],
        captions_table(nano.tokenizer, nano.text_encoder),
        None,
        budget.first_frame_steps,
        rng,
        say,
        state,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(output)
    shutil.rmtree(unfinished)
    write_first_frames(training, output / "prompts", "nano-i2v", rng)
    write_first_frames(held_out, output / "prompts", "nano-i2v-held-out", rng)
    say(f"nano-i2v: written to {output}")


def write_first_frames(digits: Digits, folder: Path, name: str, rng: torch.Generator) -> None:
    """Writes a prompt set of every digit, direction and speed, twice, with first frames of the digits given."""
    lines = []
    for i, (direction, speed, label) in enumerate(2 * list(itertools.product(DIRECTIONS, SPEEDS, range(10)))):
        members = (digits.labels == label).nonzero().squeeze(1)
        index = members[torch.randint(len(members), (1,), generator=rng)]
        velocity = torch.tensor(DIRECTIONS[direction]) * SPEEDS[speed]
        shift = PATH_JITTER * torch.randn(1, 1, 2, generator=rng) - velocity * (NUM_FRAMES - 1) / 2
        picture = place_on_canvas(digits.pixels[index], shift)[0, :, 0].permute(1, 2, 0) / 2 + 0.5
        save_image(to_images(picture[None])[0].convert("L"), folder / name / f"{i:03d}.png")
        prompt = f"a handwritten {WORDS[label]} moving {direction} {speed}"
        lines.append(json.dumps({"prompt": prompt, "image": f"{name}/{i:03d}.png"}) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
