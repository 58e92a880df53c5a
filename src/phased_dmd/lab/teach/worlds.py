"""The embedded worlds, nano's digit and the scenes: what their teachers' data is, and how large their networks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phased_dmd.lab.teach import mnist, scene_batches
from phased_dmd.lab.teach.mnist import Digits
from phased_dmd.models.wan import NANO, SCENES

VAE_CHANNELS = 16  # of the latents, as Wan2.1's
WIDE = 1.5  # pixels, the jitter that nano's VAE and the classifier learn from
Batch = Callable[[Digits, int, torch.Generator], tuple[Tensor, list[str], object]]


@dataclass(frozen=True)
class TrainingBudget:
    """The steps and sizes of each stage; the shipped weights are of the defaults, or of the world's own."""

    vae_steps: int = 2400
    encoder_steps: int = 600  # of a text encoder that learns a grammar first
    num_images: int = 32_000
    num_clips: int = 16_000
    transformer_steps: int = 10_500  # two of three on pictures
    further_steps: int = 0  # of a second descent, two of three on clips
    switch_steps: tuple[int, int] = (3000, 7500)  # of the two networks of a variant, noisiest first
    first_frame_steps: int = 6000
    classifier_steps: int = 1500
    reader_steps: tuple[int, int] = (3000, 2500)  # of the networks of single digits and of whole frames


@dataclass(frozen=True)
class Grammar:
    """What captions say, word by word.

    draw: captions, so many, and for their first tokens, so many, a number of a class for each of several questions,
    [b, tokens, questions], -1 where none is asked. classes: how many answers each question has.
    """

    draw: Callable[[int, int, torch.Generator], tuple[list[str], Tensor]]
    classes: Sequence[int]


@dataclass(frozen=True)
class World:
    """What a teacher is taught.

    home: the package's folder of the teacher, whose VAE and text encoder its variants share. pictures, clips: draw a
    batch of digits: (pixels [b, 3, f, h, w], captions, what they show). vae_pictures: those the VAE learns from.
    channels: of the latents, fewer than the VAE is taught with where it leaves others nearly empty (`narrow.py`).
    captions: lists every caption, or enough of them to hold every word. max_tokens: of a prompt, its end included.
    vae, text, transformer: their sizes. chroma: the weight, in the VAE's loss, of what the channels of a pixel differ
    in. grammar: what the text encoder learns before the transformer; without one it learns along with it. split:
    whether a variant's two networks begin as the teacher's own, or anew. budget: of what ships.
    """

    home: Path
    pictures: Batch
    clips: Batch
    vae_pictures: Batch
    captions: Callable[[], list[str]]
    max_tokens: int
    vae: Mapping[str, Any]
    chroma: float
    text: Mapping[str, Any]
    transformer: Mapping[str, Any]
    channels: int = VAE_CHANNELS
    grammar: Grammar | None = None
    split: bool = False
    budget: TrainingBudget = TrainingBudget()

    @property
    def name(self) -> str:
        """Returns the name of the teacher."""
        return self.home.name


DIGITS = World(
    NANO, mnist.image_batch, mnist.clip_batch, partial(mnist.image_batch, jitter=WIDE), mnist.all_captions,
    max_tokens=16, vae={"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]}, chroma=0.0,
    text={"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2},
    transformer={"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 384, "num_layers": 4,
                 "patch_size": (1, 1, 1)},
)  # fmt: skip
COLOURED = World(
    SCENES, scene_batches.picture_batch, scene_batches.clip_batch, scene_batches.picture_batch, scene_batches.all_words,
    max_tokens=32,
    vae={  # strokes are thin and digits fast
        "dim_mult": [1, 2, 4], "temperal_downsample": [False, True], "scale_factor_spatial": 4,
        "scale_factor_temporal": 2,
    },
    chroma=10.0,  # without it blue and green stay one colour for a thousand steps and more
    text={"d_model": 96, "d_kv": 24, "d_ff": 256, "num_layers": 3},
    transformer={"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 384, "num_layers": 5,
                 "patch_size": (1, 2, 2)},
    channels=4, grammar=Grammar(scene_batches.draw_captions, scene_batches.ANSWERS), split=True,
    budget=TrainingBudget(
        num_images=24_000, num_clips=24_000, transformer_steps=8000, further_steps=9000, switch_steps=(1500, 1500)
    ),
)  # fmt: skip
