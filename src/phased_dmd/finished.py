"""Finished runs and exports read back: the config, each phase's expert, and the sampler of both."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from phased_dmd.checkpoint import HEADER, RunFolder, load_tensors, resolve_inside
from phased_dmd.config import Config
from phased_dmd.config.overrides import build
from phased_dmd.config.teacher import Section
from phased_dmd.errors import UserError
from phased_dmd.networks.build import Own, add_expert, build_system, load_expert, load_teacher
from phased_dmd.sample import Sampler

EXPORT = "export.json"  # in an export's folder: the run's config, and the file of each expert
HEADER_FILE = f"{HEADER}.json"  # in the folder of an export's full transformer: what a LoRA file's header says
Experts = Callable[[int], dict[str, Tensor]]  # of a phase


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
    resolve_inside(folder, run.config_path)
    config = run.config()
    if not run.finished(config):
        raise UserError(
            f"{folder}: the run is not finished; `phased-dmd distill` with the same arguments goes on with it"
        )
    return config, lambda phase: read_expert(run, phase)[0]


def read_expert(run: RunFolder, phase: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A phase's expert and its header; one that leads out of the run, or is another phase's, is a UserError."""
    path = resolve_inside(run.path, run.expert_path(phase))
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
        about = Export.model_validate_json(resolve_inside(folder, folder / EXPORT).read_text("utf-8"))
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
        path = resolve_inside(folder, folder / entry.file)
        try:
            if path.is_dir():
                header = json.loads(resolve_inside(folder, path / HEADER_FILE).read_text("utf-8"))
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


def read_shards(folder: Path) -> dict[str, Tensor]:
    """The weights of a network that diffusers has saved, in one file or several; a tensor in two is a UserError."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found = load_file(resolve_inside(folder, path))
        if twice := min(found.keys() & tensors.keys(), default=None):
            raise UserError(f"{path}: {twice} is in another file of its folder, too")
        tensors |= found
    return tensors
