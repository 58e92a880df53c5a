"""An adapter is all that the rest of the program knows of a kind of pipeline: a file of this folder ends with it.

The kind's fields stand in `config/teacher.py`, which names the file, and the figures of a model in `recipes.SYSTEMS`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from phased_dmd.config.teacher import Size
from phased_dmd.models.source import Source

Names = Sequence[tuple[str, str]]  # patterns, and what the names that match become
Shape = tuple[int, ...]


class TextEncoder(NamedTuple):
    """Says how prompts are encoded, as far as `plan` must know."""

    kind: Any  # the encoder's class
    prompts: int | None = None  # in one call; None: as many as a file of the cache has
    template: int = 0  # tokens around each prompt, beyond the most
    options: Mapping[str, Any] = {"output_hidden_states": True}  # of the call


class Stock(NamedTuple):
    """Says how the stock pipeline is called, and what its latents are to ours, [b, c, f, h, w]."""

    unguided: tuple[str, float]  # the argument that turns guidance off, and its value
    scheduler: Callable[[float, int, bool], Any]  # nearest to the plan, of shift, steps and whether noise is added anew
    given: Callable[[Tensor], Tensor]  # ours, as it takes them
    stepped: Callable[[Tensor], Tensor]  # ours, as its scheduler sees them
    restored: Callable[[Tensor, int, int], Tensor]  # the inverse of that, of our height and width
    returned: Callable[[Any, Tensor, int, int], Tensor]  # what it gives, as ours, by the pipeline, height and width
    passes_sigmas: bool = True  # whether it hands evenly spaced times to its scheduler
    frames: bool = False  # whether it takes `num_frames` and gives `frames`
    cleans: bool = False  # whether it cleans prompts by ftfy
    limits: bool = True  # whether it takes `max_sequence_length`
    rounds: bool = False  # whether latents that it is given must be of the network's dtype
    alone: bool = False  # whether a sample depends on how long the other prompts of its call are
    fixed: Mapping[str, Any] = {}  # arguments of every call, beside that of `unguided`
    parts: Callable[[Source], Mapping[str, Any]] = lambda _: {}  # that it is handed, where it cannot load them alone
    flags: Mapping[str, Any] = {}  # what the index of a whole distilled pipeline says beside
    grid: str | None = None  # where it says the evenly spaced times that it is sampled at by default


class Comfy(NamedTuple):
    """Says what ComfyUI has built in of a model, and which files its own templates load."""

    config: Mapping[str, Any]  # of the transformer, of which it reads none off a file
    names: Names  # of bases, and their files; {} is the network's noise
    clip: tuple[str, str]  # the text encoder's file, and type
    vae: str
    latent: str  # the node of empty latents
    sampling: str  # the node that sets the shift
    tokens: int | None = None  # that text is padded to
    note: str = ""  # for the card


class Adapter(NamedTuple):
    """Holds a kind's model and codec, the classes of its parts, and what else differs between kinds."""

    model: Callable[..., Any]  # `VelocityModel` of a teacher, a device and a source
    codec: Callable[..., Any]  # `Codec` of the same
    transformer: Any
    vae: Any
    loader: Any  # diffusers' mixin that reads LoRA files
    encoder: TextEncoder
    condition: Callable[[Mapping[str, Any], int, Shape], dict[str, Shape]]  # of a prompt: its shapes, of the
    # transformer's configuration, the most tokens and the shape of a sample's latents
    padded: bool  # whether text stands at its full length, whatever the prompt's
    stock: Stock
    comfy: Comfy | None = None
    decoded: Callable[[Shape], Shape] = lambda shape: shape  # the shape of latents as the VAE has them
    takes_images: Callable[[Any, Source], bool] = lambda _teacher, _source: False  # a picture with every prompt
    alike: int = 3  # from which block on all cost the same, as FSDP gathers one, computes another and reduces a third
    places: int = 1  # transformers that the pipeline has room for
    prefix: str = "diffusion_model."  # before a layer's name in a LoRA file
    original: Names = ()  # layers in diffusers, and in the model's own program
    public: str | None = None  # a pattern of those that other programs know; None: all
    sigmas: Callable[[Source, Size, int], Sequence[float]] | None = None  # times of the stock pipeline's steps, and 0,
    # where the base is sampled at others than the plan's grid
    solver: Callable[[Source], Any] = lambda _: None  # the stock pipeline's scheduler, where that is no Euler's method
