"""Sampling: a run's or an export's generator, and the teacher on the same grid."""

import json
import math
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from phased_dmd.checkpoint import HEADER, RunFolder, load_tensors, save_tensors, write_atomically
from phased_dmd.conditions import fitting
from phased_dmd.config import Config
from phased_dmd.engine.randomness import normal
from phased_dmd.engine.world import device, rank, together, world_size
from phased_dmd.errors import UserError, refuse_full
from phased_dmd.media import FRAMES, grid, save_clip, save_image, save_preview, thumbnails
from phased_dmd.models.protocol import Codec, Condition
from phased_dmd.models.source import SHIPPED
from phased_dmd.overrides import build
from phased_dmd.prompts import Prompt
from phased_dmd.system import Own, System, add_expert, build_system, load_expert, load_teacher
from phased_dmd.teachers import Section, WanTeacher

BATCH, BATCH_NUMBERS = 64, 2**18  # samples a network call when sampling, and the most numbers that they hold
PREVIEWS, LEAST_PREVIEWS, PREVIEW_NUMBERS = 16, 4, 2**23  # samples of a preview, and the numbers that more may hold
PREVIEW_PIXELS = 2**22  # of its picture, about
SHEET, SHEET_HEIGHT = 64, 96  # samples on a contact sheet, and the most pixels of their height
NANO_FPS, WAN_FPS = 8.0, 16.0
MANIFEST = "samples.jsonl"  # beside written samples: the prompt, seed and file of each
EXPORT = "export.json"  # in an export's folder: the run's config, and the file of each expert
HEADER_FILE = f"{HEADER}.json"  # in the folder of an export's full transformer: what a LoRA file's header says
Experts = Callable[[int], dict[str, Tensor]]  # of a phase


class Sampler:
    """The few-step generator of a run, and its teacher on the same grid, in one resolution bucket."""

    def __init__(self, system: System, codec: Codec, bucket: int = 0) -> None:
        self.system, self.codec, self.bucket = system, codec, bucket
        self._known: dict[Prompt, Condition] = {}

    def __repr__(self) -> str:
        config, plan = self.system.config, self.system.plan
        steps = f"{plan.num_steps} steps in {plan.num_phases} phase{'s' if plan.num_phases > 1 else ''}"
        return f"Sampler({config.recipe}, {config.method}, {steps}, samples {list(self.shape)}, bucket {self.bucket})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample's latents."""
        return tuple(self.system.model.sample_shapes[self.bucket])

    @property
    def fps(self) -> float:
        """Frames a second of the teacher's clips: of nano's, or of Wan's."""
        teacher = self.system.config.teacher
        return NANO_FPS if isinstance(teacher, WanTeacher) and teacher.path in SHIPPED else WAN_FPS

    def __call__(
        self, prompts: Sequence[Prompt | str], seeds: Sequence[int], teacher_steps: int | None = None
    ) -> Tensor:
        """Latents [n, ...] for n prompts with n seeds, on the CPU; teacher_steps: from the guided teacher instead.

        A UserError where the arguments are of other kinds, or as many prompts as seeds are not given.
        """
        return torch.cat(list(self.batches(prompts, seeds, teacher_steps)))

    def batches(
        self, prompts: Sequence[Prompt | str], seeds: Sequence[int], teacher_steps: int | None = None
    ) -> Iterator[Tensor]:
        """The same, as many at a time as a network call takes."""
        asked, numbers, teacher_steps = _asked(prompts, seeds, teacher_steps)
        known = self.encode(list(dict.fromkeys(asked)))
        size = batch_size(self.shape)
        for i in range(0, len(asked), size):
            yield self._batch([known[prompt] for prompt in asked[i : i + size]], numbers[i : i + size], teacher_steps)

    def encode(self, prompts: Sequence[Prompt]) -> dict[Prompt, Condition]:
        """The condition of each prompt, and of all before; a UserError where a first frame is missing or does not fit.

        The encoders are let go: the networks need their place.
        """
        for prompt, buckets in zip(prompts, fitting(self.codec, prompts), strict=False):
            if self.bucket not in buckets:
                raise UserError(f"{prompt.image}: not of the shape of the samples, see teacher.sizes")
        new = [prompt for prompt in prompts if prompt not in self._known]
        for i in range(0, len(new), BATCH):
            part = new[i : i + BATCH]
            for prompt, row in zip(part, self.codec.encode_text([prompt.text for prompt in part]), strict=True):
                image = self.codec.encode_image(prompt.image, self.bucket) if self.codec.takes_images else {}  # type: ignore[arg-type] checked by fitting
                self._known[prompt] = row | image
        self.codec.free()
        return self._known

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [n, frames, height, width, 3] in [0, 1], or an analytic model's samples as they are.

        latents: whole samples, as the sampler gives them; anything else is a UserError.
        """
        if not isinstance(latents, Tensor) or latents.shape[1:] != self.shape or not len(latents):
            found = list(latents.shape) if isinstance(latents, Tensor) else f"a {type(latents).__name__}"
            raise UserError(f"latents: {found}, where a tensor [n, {', '.join(map(str, self.shape))}] is needed")
        return torch.cat([self.codec.decode(part).cpu() for part in latents.split(batch_size(self.shape))])

    @torch.no_grad()
    def preview(self, phase: int, rows: Sequence[Condition]) -> Tensor:
        """What the generator predicts of x_0 at the end of a phase, a sample a condition, seeds 0, 1, ...

        Points [n, d], or small pictures [n, k, h, w, 3] of few frames. The processes share the samples, and call the
        networks equally often: those that are left over repeat the last one.
        """
        ways, size = self.system.config.engine.sequence_parallel, preview_batch(self.system.config, self.shape)
        share = math.ceil(len(rows) * ways / world_size())
        first = rank() // ways * share
        batches = [range(i, min(i + size, first + share)) for i in range(first, first + share, size)]
        ends = [self._end(phase, rows, [min(i, len(rows) - 1) for i in batch]) for batch in batches]
        kept = [end[: max(0, len(rows) - batch.start)] for batch, end in zip(batches, ends, strict=True)]
        own = [end for end in kept if len(end)] if rank() % ways == 0 else []
        shown = together(lambda: [_small(self.codec.decode(end).cpu(), len(rows)) for end in own])
        pixels = torch.cat([part for parts in shown for part in parts])
        return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels

    def _end(self, phase: int, rows: Sequence[Condition], samples: Sequence[int]) -> Tensor:
        """x_0 of some of a preview's samples."""
        system, (noise, renoise) = self.system, self._noise(samples)
        condition = system.model.batch([rows[i] for i in samples])
        return system.roll(system.plan.path(phase), system.start(noise), condition, renoise=renoise).x0

    @torch.no_grad()
    def _batch(self, rows: Sequence[Condition], seeds: Sequence[int], teacher_steps: int | None) -> Tensor:
        system, condition = self.system, self.system.model.batch(rows)
        noise, renoise = self._noise(seeds)
        if teacher_steps is not None:
            return system.sample_teacher(noise, condition, teacher_steps).cpu()
        path = system.plan.path(system.plan.num_phases)
        return system.roll(path, system.start(noise), condition, renoise=renoise).x.cpu()

    def _noise(self, seeds: Sequence[int]) -> tuple[Tensor, Callable[[int], Tensor]]:
        """The start [n, ...], and what the renoise solver draws at a step."""
        return (
            normal(self.shape, seeds, "sample").to(device()),
            lambda step: normal(self.shape, seeds, "sample renoise", step).to(device()),
        )


def _asked(prompts: Any, seeds: Any, teacher_steps: Any) -> tuple[list[Prompt], list[int], int | None]:
    """What a sampler is called with, as it is meant; a UserError for what is not."""
    if isinstance(prompts, str | Prompt):
        raise UserError(f"prompts: a list is needed, with a prompt a seed; [{prompts!r}] * n has the same n times")
    try:
        asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    except TypeError:
        raise UserError(f"prompts: a list of texts is needed, and this is a {type(prompts).__name__}") from None
    if odd := [prompt for prompt in asked if not isinstance(prompt, Prompt)]:
        raise UserError(f"prompts: {odd[0]!r} is no text")
    try:
        numbers = [operator.index(seed) for seed in seeds]
    except TypeError:
        given = " ".join(repr(seeds).split())[:40]
        raise UserError(f"seeds: a list of whole numbers is needed, such as range(8), and this is {given}") from None
    if len(asked) != len(numbers) or not asked:
        raise UserError(
            f"prompts, seeds: {len(asked)} and {len(numbers)} of them; every sample has one of each: [prompt] * n has "
            "the same prompt n times"
        )
    try:
        steps = None if teacher_steps is None else operator.index(teacher_steps)
    except TypeError:
        steps = 0
    if steps is not None and steps < 1:
        raise UserError(f"teacher_steps: {teacher_steps!r} is no number of steps, from 1 on")
    return asked, numbers, steps


def _small(pixels: Tensor, count: int) -> Tensor:
    """One of the `count` samples of a preview, or some: bytes of few small frames, or points as they are."""
    if pixels.ndim != 5:
        return pixels
    f, h, w = pixels.shape[1:4]
    return thumbnails(pixels, int(math.sqrt(PREVIEW_PIXELS * h / (count * min(f, FRAMES) * w))))


def preview_size(shape: Sequence[int]) -> int:
    """How many samples of a shape a preview has."""
    return max(LEAST_PREVIEWS, min(PREVIEWS, PREVIEW_NUMBERS // math.prod(shape)))


def preview_batch(config: Config, shape: Sequence[int]) -> int:
    """How many of them go through a network, and are decoded, at once."""
    return min(batch_size(shape), config.engine.micro_batch or BATCH)


def batch_size(shape: Sequence[int]) -> int:
    """How many samples of a shape go through a network at once: one of a large model, many of nano."""
    return max(1, min(BATCH, BATCH_NUMBERS // math.prod(shape)))


def load(run: Path | str, own: Own | None = None, base: str | None = None, bucket: int = 0) -> Sampler:
    """The sampler of a finished run folder or of an export.

    own: the model and codec of a run with a teacher of the user's own. base: the teacher's folder, for an export whose
    teacher was a local one. bucket: the resolution bucket to sample in.
    """
    return assemble(*read(Path(run), base), own, bucket)


def read(folder: Path, base: str | None = None) -> tuple[Config, Experts]:
    """The config and the experts of a run folder or of an export; base: see `load`."""
    if (folder / EXPORT).exists():
        return read_export(folder, base)
    if base is not None:
        raise UserError(f"{folder}: a run, which names its teacher itself; another base is for exports of a local one")
    return read_run(folder)


def assemble(config: Config, experts: Experts, own: Own | None = None, bucket: int = 0) -> Sampler:
    """The sampler of a config and the experts of its phases."""
    model, codec = load_teacher(config, own, fit=False)
    if bucket >= len(model.sample_shapes):
        raise UserError(f"--bucket: {bucket}, but there are {len(model.sample_shapes)}, counted from 0")
    negative = codec.encode_text([config.teacher.negative_prompt])[0]
    system = build_system(config, model, negative)
    for phase in range(1, system.plan.num_phases + 1):
        add_expert(system, phase, trainable=False)
        load_expert(system, phase, experts(phase), "experts")
    return Sampler(system, codec, bucket)


def read_run(folder: Path) -> tuple[Config, Experts]:
    """The config and the experts of a run folder; one that is not finished is a UserError."""
    run = RunFolder(folder)
    inside(folder, run.config_path)
    config = run.config()
    if not run.finished(config):
        raise UserError(
            f"{folder}: the run is not finished; `phased-dmd distill` with the same arguments goes on with it"
        )
    return config, lambda phase: read_expert(run, phase)[0]


def read_expert(run: RunFolder, phase: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A phase's expert and its header; one that leads out of the run, or is another phase's, is a UserError."""
    path = inside(run.path, run.expert_path(phase))
    tensors, header = load_tensors(path)
    if (found := header.get("phase")) != phase:
        raise UserError(f"{path}: its header says phase {found}, not {phase}; was it renamed?")
    return tensors, header


class Entry(Section):
    """One of an export's files, or folders of shards: an expert on a network."""

    phase: Annotated[int, Field(gt=0)]
    network: Annotated[int, Field(ge=0)]
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]  # beside export.json, nowhere else


class Export(Section):
    """`export.json`. base: a hub id or a shipped teacher, never a path."""

    format: Literal["diffusers", "comfyui"]
    base: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")] | None
    experts: tuple[Entry, ...]
    config: dict[str, Any]


def read_export(folder: Path, base: str | None) -> tuple[Config, Experts]:
    """The config and the experts of an export, whatever its format: diffusers reads both."""
    from diffusers.loaders import QwenImageLoraLoaderMixin, WanLoraLoaderMixin

    try:
        about = Export.model_validate_json(inside(folder, folder / EXPORT).read_text("utf-8"))
        named, data = about.base, about.config
        teacher = dict(data["teacher"]) | {"path": base or named}
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{folder}: {EXPORT} cannot be read ({where}: {first['msg']})") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: {EXPORT} cannot be read ({error})") from error
    if named is None and base is None:
        raise UserError(f"{folder}: its teacher was a local folder, which `load` has to be told as base")
    config = build(data | {"teacher": teacher})
    reader = WanLoraLoaderMixin if config.teacher.kind == "wan" else QwenImageLoraLoaderMixin

    def read(entry: Entry) -> dict[str, Tensor]:
        path = inside(folder, folder / entry.file)
        try:
            if path.is_dir():
                header = json.loads(inside(folder, path / HEADER_FILE).read_text("utf-8"))
                tensors = read_shards(path)
            elif path.suffix != ".safetensors":
                raise ValueError("only safetensors is read")
            else:
                with safe_open(path, "pt") as file:
                    header = json.loads(file.metadata()[HEADER])
                tensors = reader.lora_state_dict(str(folder), weight_name=entry.file, use_safetensors=True)
            found = f"phase {header['phase']}, network {header['network']}"
        except Exception as error:  # safetensors raises its own, OSError, KeyError, ValueError: all mean a bad file
            raise UserError(f"{path}: not a file of an export, or damaged ({error})") from error
        if found != (named := f"phase {entry.phase}, network {entry.network}"):
            raise UserError(f"{path}: its header says {found}, but {EXPORT} that it is {named}; was it renamed?")
        return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}  # type: ignore[union-attr] a dictionary unless asked for more

    def expert(phase: int) -> dict[str, Tensor]:
        mine = [(entry.network, read(entry)) for entry in about.experts if entry.phase == phase]
        return {f"{network}.{name}": tensor for network, tensors in mine for name, tensor in tensors.items()}

    return config, expert


def inside(folder: Path, path: Path) -> Path:
    """The path itself; a UserError if a symlink leads it out of the folder."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path}: leads out of {folder}")
    return path


def read_shards(folder: Path) -> dict[str, Tensor]:
    """The weights of a network that diffusers has saved, in one file or several; a tensor in two is a UserError."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found = load_file(inside(folder, path))
        if twice := min(found.keys() & tensors.keys(), default=None):
            raise UserError(f"{path}: {twice} is in another file of its folder, too")
        tensors |= found
    return tensors


def prompts_for(config: Config, prompts: Sequence[Prompt]) -> list[Prompt]:
    """What a command samples: the prompts, or the empty one of a model that takes none; else a UserError."""
    if config.prompts is None and prompts:
        raise UserError(f"--prompt, --prompts: {config.recipe} takes none")
    if config.prompts is not None and not prompts:
        raise UserError(f"--prompt: {config.recipe} makes what it is told; give --prompt TEXT or --prompts FILE")
    return list(prompts) or [Prompt("")]


def write_samples(
    sampler: Sampler, prompts: Sequence[Prompt], seeds: int, output: Path, teacher_steps: int | None = None
) -> list[Path]:
    """Every prompt with seeds 0, 1, ...: a PNG, or a WebP clip, each, and a contact sheet; returns the paths.

    Each is written as soon as it is made, into a folder that must be empty. samples.jsonl says which is which of those
    that are there; of pictures it is a prompt file of first frames, too, see `read_prompts`.
    """
    refuse_full(output)
    pairs = [(prompt, seed) for prompt in prompts for seed in range(seeds)]
    made = sampler.batches([prompt for prompt, _ in pairs], [seed for _, seed in pairs], teacher_steps)
    points, paths, lines, shown = [], [], "", []
    for i, ((prompt, seed), z) in enumerate(zip(pairs, (z for batch in made for z in batch), strict=True)):
        pixels = sampler.decode(z[None])
        if pixels.ndim != 5:
            points.append(pixels)
            continue
        paths.append(_write(pixels, output / f"{i // seeds:04d}-{_stem(prompt)}-seed{seed}", sampler.fps))
        row = {"prompt": prompt.text, "seed": seed, "image": paths[-1].name}
        lines += f"{json.dumps(row, ensure_ascii=False)}\n"
        write_atomically(output / MANIFEST, lines.encode())
        if i < SHEET:
            shown.append(thumbnails(pixels, SHEET_HEIGHT))
    if points:
        samples = torch.cat(points)
        save_preview(output / "samples.png", samples)
        save_tensors(output / "samples.safetensors", {"samples": samples}, {"seeds": seeds})
        return [output / "samples.png", output / "samples.safetensors"]
    save_image(grid(torch.cat(shown).float() / 255), output / "contact-sheet.png")
    return [*paths, output / MANIFEST, output / "contact-sheet.png"]


def _stem(prompt: Prompt) -> str:
    """The letters and digits that a file is named by: those that the locale's file names may have."""
    stem, encoding = "".join(c if c.isalnum() else "-" for c in prompt.text.lower())[:60], sys.getfilesystemencoding()
    return stem.encode(encoding, "ignore")[:180].decode(encoding, "ignore")  # file systems count bytes


def _write(pixels: Tensor, stem: Path, fps: float) -> Path:
    """One sample [1, f, h, w, 3] as a picture or a clip; its path."""
    path = stem.with_name(f"{stem.name}.{'webp' if pixels.shape[1] > 1 else 'png'}")
    if pixels.shape[1] > 1:
        save_clip(pixels[0], path, fps)
    else:
        save_image(grid(pixels), path)
    return path
