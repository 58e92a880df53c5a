"""The prompts and seeds that an evaluation samples, and how the samples are grouped for its intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from phased_dmd.config import Config
from phased_dmd.config.teacher import AnalyticTeacher, PipelineTeacher, Size, WanTeacher
from phased_dmd.errors import UserError
from phased_dmd.lab.metrics.digit_classifier import DIRECTIONS, SPEEDS, WORDS
from phased_dmd.lab.metrics.scenes import HEIGHT, WIDTH, Scene, caption
from phased_dmd.models.source import SHIPPED
from phased_dmd.prompts import Prompt, read_prompts

PICTURE_SEEDS, CLIP_SEEDS = tuple(range(8)), (42,)  # a prompt, Sec. 3.1 and 3.2
BLOCKS = 10  # groups of samples, at most
World = Literal["digits", "scenes"]  # what an embedded teacher makes: a digit, or a scene of several
WORLDS: dict[tuple[str | None, int, int], World] = {  # by the teacher, and the height and width of what is read
    ("nano", 32, 32): "digits", ("scenes", HEIGHT, WIDTH): "scenes",
}  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """What an evaluation is asked for; None stands for what the teacher's kind asks for, see `sample_sets`.

    samples: the size of a set, for the embedded teachers and analytic ones. first: the first of its seeds; sets that
    share none have noise of their own. prompts: a shipped set's name or a file; then every prompt is sampled with each
    of `seeds`. features: see `load_features`. perceptual: whether LPIPS is measured. alignment: a CLIP model of
    transformers, hub id or folder. real: a folder of real pictures or clips. flow: `dis` or `raft`. fps: frames a
    second of the clips, for the dynamic degree. floor: whether the base is sampled with other seeds too, as it always
    is for the embedded teachers. bucket: which of the teacher's sizes is sampled.
    """

    samples: int = 1000
    first: int = 0
    prompts: str | None = None
    seeds: tuple[int, ...] | None = None
    features: str | None = None
    perceptual: bool = False
    alignment: str | None = None
    real: str | None = None
    flow: str = "dis"
    fps: float | None = None
    floor: bool = False
    bucket: int = 0


@dataclass(frozen=True)
class SampleSet:
    """Prompts, one a sample, with their seeds.

    about: the set in words. groups: [n], the group of each sample; groups are left out one after the other for the
    intervals. floor: whether the base is sampled with other seeds too, which shows how far apart two sets of one
    distribution are.
    """

    name: str
    about: str
    prompts: Sequence[Prompt]
    seeds: Sequence[int]
    groups: Tensor
    floor: bool = False

    @property
    def prompt_ids(self) -> Tensor:
        """Returns the number of each sample's prompt, [n]."""
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(self.prompts))}
        return torch.tensor([number[prompt] for prompt in self.prompts])

    def shown(self, clips: bool) -> list[int]:
        """Returns which samples are kept as pictures: 6 clips, 4 seeds of 5 prompts, or the first 20."""
        n = len(self.prompts)
        if clips:
            return [i * n // 6 for i in range(6)] if n > 6 else list(range(n))
        ids = self.prompt_ids
        if int(ids.max()) == 0 or n < 2 or ids[0] != ids[1]:
            return list(range(min(n, 20)))
        return [i for prompt in range(min(5, int(ids.max()) + 1)) for i in (ids == prompt).nonzero()[:4, 0].tolist()]


def sample_sets(config: Config, protocol: Protocol, takes_images: bool) -> list[SampleSet]:
    """Returns the sets of an evaluation, in the paper's protocol where the teacher is no toy.

    Text-to-image: 21 prompts with seeds 0 to 7 (Sec. 3.1); text-to-video: 220 prompts with seed 42 (Sec. 3.2), and
    image-to-video as many, which need the user's pictures. The embedded teachers: `weak` leaves the digit open,
    `specific` names all there is to name, each sample with a seed of its own; image-to-video has specific ones only,
    on held-out digits. Analytic teachers: samples without a prompt.
    """
    frames = config.teacher.sizes[protocol.bucket].num_frames if isinstance(config.teacher, PipelineTeacher) else 1
    seeds = protocol.seeds or (PICTURE_SEEDS if frames == 1 else CLIP_SEEDS)
    if protocol.prompts is not None:
        return [_every_prompt_and_seed("prompts", protocol.prompts, seeds, protocol.floor)]
    if protocol.seeds is not None and (config.prompts is None or world_of(config)):
        raise UserError("--seeds: needs --prompts here; without, every sample has a seed of its own")
    if isinstance(config.teacher, AnalyticTeacher):
        return [_seed_a_sample("mixture", [Prompt("")], protocol)]
    if config.prompts is None:
        return [_seed_a_sample("samples", [Prompt("")], protocol)]
    if world := world_of(config):
        sets = _world_prompts(world, config, frames)
        return [_seed_a_sample(name, prompts, protocol) for name, prompts in sets.items()]
    if takes_images:
        raise UserError(
            "--prompts: a model that takes pictures is evaluated on your own: a jsonl, csv or parquet with the columns "
            "prompt and image (the paper: 220); `phased-dmd sample` writes one, samples.jsonl, beside what it samples"
        )
    return [_every_prompt_and_seed("paper", "paper-t2i" if frames == 1 else "paper-t2v", seeds, protocol.floor)]


def world_of(config: Config) -> World | None:
    """Returns which world an embedded teacher makes, so that it can be read; None of all others."""
    match config.teacher:
        case WanTeacher(path=name, sizes=(Size(height=height, width=width), *_)):
            return WORLDS.get((SHIPPED.get(name), height, width))
    return None


def parse_seeds(text: str) -> tuple[int, ...]:
    """Returns the numbers that `0-7`, `42` or `1,5,9` stand for; raises UserError for other text."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"--seeds: {text!r} is not of the form 0-7, 42 or 1,5,9")
        found += range(int(first), int(last or first) + 1)
    if len(set(found)) != len(found) or not found:
        raise UserError(f"--seeds: {text!r} names no seed, or one twice")
    return tuple(found)


def group_by_seed(prompt_ids: Tensor, seeds: Sequence[int]) -> Tensor:
    """Returns a group [n] for each sample: its seed, where every prompt has the same three or more; else its prompt.

    There are at most BLOCKS groups, and neighbours are in different ones: prompts may be ordered by their subjects.
    """
    numbers, prompts = sorted(set(seeds)), int(prompt_ids.max()) + 1
    if len(numbers) > 2 and prompts * len(numbers) == len(seeds):
        return torch.tensor([numbers.index(seed) for seed in seeds]) % BLOCKS
    return prompt_ids % BLOCKS


def deal_out(count: int) -> Tensor:
    """Returns a group [count] for each of the samples that go round the prompts: all groups hold every prompt alike."""
    i = torch.arange(count)
    return (i + i // BLOCKS) % min(count, BLOCKS)


def _every_prompt_and_seed(name: str, source: str, seeds: Sequence[int], floor: bool) -> SampleSet:
    """Pairs every prompt of a file with every seed; a prompt that stands there twice is taken once."""
    prompts = list(dict.fromkeys(read_prompts(source)))
    numbers = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    all_seeds = list(seeds) * len(prompts)
    groups = group_by_seed(torch.arange(len(prompts)).repeat_interleave(len(seeds)), all_seeds)
    about = f"{len(prompts)} prompt{'s' if len(prompts) > 1 else ''} ({Path(source).name}), {numbers}"
    return SampleSet(name, about, [p for p in prompts for _ in seeds], all_seeds, groups, floor)


def _seed_a_sample(name: str, prompts: Sequence[Prompt], protocol: Protocol) -> SampleSet:
    """Goes round the prompts until there are as many samples as asked for, each with a seed of its own."""
    count, first = protocol.samples, protocol.first
    about, prompts = f"{count} samples", prompts[:count]
    if prompts != [Prompt("")]:
        about += f" of {len(prompts)} prompts" if len(prompts) > 1 else f" of {prompts[0].text!r}"
    seeds = range(first, first + count)
    return SampleSet(name, about, list(islice(cycle(prompts), count)), seeds, deal_out(count), floor=True)


def _world_prompts(world: World, config: Config, frames: int) -> dict[str, list[Prompt]]:
    assert isinstance(config.teacher, WanTeacher)
    if world == "scenes":
        weak = [Prompt(caption(Scene(), frames > 1))]
        return {"weak": weak, "specific": read_prompts(f"scenes-{'t2i' if frames == 1 else 't2v'}-specific")}
    if config.teacher.path == "nano-i2v":
        return {"specific": read_prompts("nano-i2v-held-out")}
    if frames == 1:
        weak, specific = ["a handwritten digit"], [f"a handwritten {word}" for word in WORDS]
    else:
        moves = [f"{direction} {speed}" for direction in DIRECTIONS for speed in SPEEDS]
        weak = ["a handwritten digit moving"]
        specific = [f"a handwritten {word} moving {move}" for move in moves for word in WORDS]
    return {"weak": [Prompt(text) for text in weak], "specific": [Prompt(text) for text in specific]}
