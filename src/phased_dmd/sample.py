"""Sampling: a run's or an export's generator, and the teacher on the same grid."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from phased_dmd.checkpoint import RunFolder, load_tensors, save_tensors, write_atomically
from phased_dmd.conditions import fitting
from phased_dmd.config import Config
from phased_dmd.engine.randomness import normal
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.experts import expert_role
from phased_dmd.media import grid, save_clip, save_image, save_preview
from phased_dmd.models.protocol import Codec, Condition
from phased_dmd.models.source import SHIPPED
from phased_dmd.overrides import build
from phased_dmd.prompts import Prompt
from phased_dmd.system import Own, System, add_expert, build_system, load_teacher
from phased_dmd.teachers import Section, WanTeacher

BATCH, BATCH_NUMBERS = 64, 2**18  # samples a network call when sampling, and the most numbers that they hold
SHEET, SHEET_HEIGHT = 64, 96  # samples on a contact sheet, and the most pixels of their height
NANO_FPS, WAN_FPS = 8.0, 16.0
MANIFEST = "samples.jsonl"  # beside written samples: the prompt, seed and file of each
EXPORT = "export.json"  # in an export's folder: the run's config, and the file of each expert
Experts = Callable[[int], dict[str, Tensor]]  # of a phase


class Sampler:
    """The few-step generator of a run, and its teacher on the same grid, in one resolution bucket."""

    def __init__(self, system: System, codec: Codec, bucket: int = 0) -> None:
        self.system, self.codec, self.bucket = system, codec, bucket
        self._known: dict[Prompt, Condition] = {}

    @property
    def fps(self) -> float:
        """Frames a second of the teacher's clips: of nano's, or of Wan's."""
        teacher = self.system.config.teacher
        return NANO_FPS if isinstance(teacher, WanTeacher) and teacher.path in SHIPPED else WAN_FPS

    def __call__(
        self, prompts: Sequence[Prompt | str], seeds: Sequence[int], teacher_steps: int | None = None
    ) -> Tensor:
        """Latents [n, ...] for n prompts with n seeds, on the CPU; teacher_steps: from the guided teacher instead."""
        asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        known = self.encode(list(dict.fromkeys(asked)))
        parts = []
        size = batch_size(self.system.model.sample_shapes[self.bucket])
        for i in range(0, len(seeds), size):
            rows = [known[prompt] for prompt in asked[i : i + size]]
            parts.append(self._batch(rows, seeds[i : i + size], teacher_steps))
        return torch.cat(parts)

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
        """Pixels [n, frames, height, width, 3] in [0, 1], or an analytic model's samples as they are."""
        return torch.cat([self.codec.decode(part).cpu() for part in latents.split(batch_size(latents.shape[1:]))])

    @torch.no_grad()
    def preview(self, phase: int, rows: Sequence[Condition]) -> Tensor:
        """What the generator predicts of x_0 at the end of a phase, decoded, a sample a condition, seeds 0, 1, ..."""
        system = self.system
        noise, renoise = self._noise(range(len(rows)))
        end = system.roll(system.plan.path(phase), system.start(noise), system.model.batch(rows), renoise=renoise)
        return self.codec.decode(end.x0).cpu()

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
        shape = self.system.model.sample_shapes[self.bucket]
        return (
            normal(shape, seeds, "sample").to(device()),
            lambda step: normal(shape, seeds, "sample renoise", step).to(device()),
        )


def batch_size(shape: Sequence[int]) -> int:
    """How many samples of a shape go through a network at once: one of a large model, many of nano."""
    return max(1, min(BATCH, BATCH_NUMBERS // math.prod(shape)))


def load(run: Path | str, own: Own | None = None, base: str | None = None, bucket: int = 0) -> Sampler:
    """The sampler of a finished run folder or of an export.

    own: the model and codec of a run with a teacher of the user's own. base: the teacher's folder, for an export whose
    teacher was a local one. bucket: the resolution bucket to sample in.
    """
    folder = Path(run)
    config, experts = read_export(folder, base) if (folder / EXPORT).exists() else read_run(folder)
    return assemble(config, experts, own, bucket)


def assemble(config: Config, experts: Experts, own: Own | None = None, bucket: int = 0) -> Sampler:
    """The sampler of a config and the experts of its phases."""
    model, codec = load_teacher(config, own, fit=False)
    if bucket >= len(model.sample_shapes):
        raise UserError(f"--bucket: {bucket}, but there are {len(model.sample_shapes)}, counted from 0")
    negative = codec.encode_text([config.teacher.negative_prompt])[0]
    system = build_system(config, model, negative)
    for phase in range(1, system.plan.num_phases + 1):
        add_expert(system, phase, trainable=False)
        try:
            system.roles.load(expert_role(phase), experts(phase))
        except KeyError as error:
            raise UserError(f"experts: {error.args[0]}") from error
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
    return config, lambda phase: load_tensors(inside(folder, run.expert_path(phase)))[0]


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

    def read(file: str) -> dict[str, Tensor]:
        path = inside(folder, folder / file)
        try:
            if path.is_dir():
                return read_shards(path)
            if path.suffix != ".safetensors":
                raise ValueError("only safetensors is read")
            tensors = reader.lora_state_dict(str(folder), weight_name=file, use_safetensors=True)
        except Exception as error:  # safetensors raises its own, OSError, KeyError, ValueError: all mean a bad file
            raise UserError(f"{path}: not a file of an export, or damaged ({error})") from error
        return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}  # type: ignore[union-attr] a dictionary unless asked for more

    def expert(phase: int) -> dict[str, Tensor]:
        mine = [(entry.network, read(entry.file)) for entry in about.experts if entry.phase == phase]
        return {f"{network}.{name}": tensor for network, tensors in mine for name, tensor in tensors.items()}

    return config, expert


def inside(folder: Path, path: Path) -> Path:
    """The path itself; a UserError if a symlink leads it out of the folder."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path}: leads out of {folder}")
    return path


def read_shards(folder: Path) -> dict[str, Tensor]:
    """The weights of a network that diffusers has saved, in one file or several."""
    files = [load_file(inside(folder, path)) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


def write_samples(
    sampler: Sampler, prompts: Sequence[Prompt], seeds: int, output: Path, teacher_steps: int | None = None
) -> list[Path]:
    """Every prompt with seeds 0, 1, ...: a PNG, or a WebP clip, each, and a contact sheet; returns the paths.

    samples.jsonl says which is which; of pictures it is a prompt file of first frames, too, see `read_prompts`.
    """
    pairs = [(prompt, seed) for prompt in prompts for seed in range(seeds)]
    latents = sampler([p for p, _ in pairs], [s for _, s in pairs], teacher_steps)
    if sampler.decode(latents[:1]).ndim != 5:
        samples = sampler.decode(latents)
        save_preview(output / "samples.png", samples)
        save_tensors(output / "samples.safetensors", {"samples": samples}, {"seeds": seeds})
        return [output / "samples.png", output / "samples.safetensors"]
    paths = []
    for i, (prompt, seed) in enumerate(pairs):
        pixels = sampler.decode(latents[i : i + 1])
        stem = "".join(c if c.isalnum() else "-" for c in prompt.text.lower())[:60]
        stem = stem.encode()[:180].decode(errors="ignore")  # file systems count bytes
        clip = pixels.shape[1] > 1
        paths.append(output / f"{i // seeds:04d}-{stem}-seed{seed}.{'webp' if clip else 'png'}")
        if clip:
            save_clip(pixels[0], paths[-1], sampler.fps)
        else:
            save_image(grid(pixels), paths[-1])
    rows = [{"prompt": p.text, "seed": s, "image": path.name} for (p, s), path in zip(pairs, paths, strict=True)]
    write_atomically(output / MANIFEST, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode())
    save_image(grid(sampler.decode(latents[:SHEET]), most=SHEET_HEIGHT), output / "contact-sheet.png")
    return [*paths, output / MANIFEST, output / "contact-sheet.png"]
