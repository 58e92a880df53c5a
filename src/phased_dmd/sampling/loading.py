"""Finished runs, checkpoints and exports are read back as a config, the expert of each phase, and a sampler."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from phased_dmd.checkpoint import HEADER, Reference, RunFolder, load_header, load_tensors, resolve_inside
from phased_dmd.checkpoint.folders import read_part
from phased_dmd.config import Config
from phased_dmd.config.overrides import build
from phased_dmd.config.teacher import PipelineTeacher, Section, Teacher
from phased_dmd.engine.world import warn
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import PhasePlan
from phased_dmd.models.loader import adapter_of
from phased_dmd.networks.build import Own, add_expert, build_system, load_expert, load_teacher
from phased_dmd.networks.roles import expert_role
from phased_dmd.prompts import Prompt
from phased_dmd.sampling.sampler import Sampler, encode

EXPORT = "export.json"  # in an export's folder: the run's config, and the file of each expert
HEADER_FILE = f"{HEADER}.json"  # in the folder of an export's full transformer: what a LoRA file's header says
Experts = Callable[[int], dict[str, Tensor]]  # the tensors of the expert of a phase


class Trained(NamedTuple):
    """Holds what was trained: its config, its experts, and the last phase that has one."""

    config: Config
    experts: Experts
    last: int


def load(run: Path | str, own: Own | None = None, base: str | None = None, bucket: int = 0) -> Sampler:
    """Returns the sampler of a finished run folder, of a checkpoint (RUN@phase-2/300), or of an export.

    own: the model and codec of a run with a teacher of the user's own. base: the teacher's folder, for an export whose
    teacher was a local one. bucket: the resolution bucket to sample in.
    """
    trained = read(Path(run), base)
    return assemble(trained, load_teacher(trained.config, own, fit=False), bucket)


def read(subject: Path, base: str | None = None) -> Trained:
    """Returns what a run folder, a checkpoint or an export holds. base: see `load`."""
    if (subject / EXPORT).exists():
        return read_export(subject, base)
    if base is not None:
        raise UserError(f"{subject}: a run, which names its teacher itself; another base is for exports of a local one")
    reference = Reference.of(subject)
    return read_run(subject) if reference is None else read_checkpoint(reference)


def assemble(trained: Trained, teacher: Own, bucket: int = 0, prompts: Sequence[Prompt] = ()) -> Sampler:
    """Returns the sampler of what was trained; warns where that makes no whole samples. teacher, prompts: see
    `untrained`.
    """
    sampler = untrained(trained.config, teacher, bucket, prompts, last=trained.last)
    plan, last = sampler.system.plan, trained.last
    if last < plan.num_phases:
        warn(
            f"samples are predictions of x_0 at the end of phase {last} of {plan.num_phases}, t = {plan.end(last):.3g}"
        )
    for phase in range(1, trained.last + 1):
        load_expert(sampler.system, phase, trained.experts(phase), "experts")
    return sampler


def untrained(
    config: Config, teacher: Own, bucket: int = 0, prompts: Sequence[Prompt] = (), times: Sequence[float] = (),
    last: int | None = None,
) -> Sampler:  # fmt: skip
    """Returns the sampler of a config whose experts compute what its teacher does, from the teacher's model and codec.

    prompts: some that will be sampled. They are encoded before the networks are loaded, and others beside them, later.
    times: of a generator of one phase, down to 0, in place of the plan's. last: see `Sampler`.
    """
    model, codec = teacher
    if bucket >= len(model.sample_shapes):
        raise UserError(f"--bucket: {bucket}, but there are {len(model.sample_shapes)}, counted from 0")
    known, negative = encode(codec, prompts, bucket), codec.encode_text([config.teacher.negative_prompt])[0]
    codec.free()
    system = build_system(config, model, negative)
    if times:
        system = replace(system, plan=PhasePlan(tuple(times), switches=tuple(model.switches)))
    sampler = Sampler(system, codec, bucket, known, last)
    for phase in range(1, sampler.last + 1):
        add_expert(system, phase, trainable=False)
    return sampler


def read_run(folder: Path) -> Trained:
    """Returns what a run folder holds; raises UserError for one that is not finished."""
    run = RunFolder(folder)
    resolve_inside(folder, run.config_path)
    config = run.config()
    if not run.finished(config):
        raise UserError(
            f"{folder}: the run is not finished; `phased-dmd distill` with the same arguments goes on with it, and "
            f"{folder}@phase-K/N is its checkpoint after N iterations of phase K"
        )
    return Trained(config, lambda phase: read_expert(run, phase)[0], config.plan.phases)


def read_checkpoint(reference: Reference) -> Trained:
    """Returns a checkpoint's expert, averaged if it is, behind the run's experts of the phases before.

    Phases behind it have none: those that the run may have by now were trained on what its last iteration made.
    """
    folder, run = reference.find(), RunFolder(reference.run)
    config, last = run.config(), reference.phase
    if missing := [phase for phase in range(1, last) if not run.expert_path(phase).exists()]:
        raise UserError(f"{reference}: phase {missing[0]}, which comes before it, has no expert yet")

    def expert(phase: int) -> dict[str, Tensor]:
        return checkpoint_expert(folder, phase) if phase == last else read_expert(run, phase)[0]

    return Trained(config, expert, last)


def checkpoint_expert(folder: Path, phase: int) -> dict[str, Tensor]:
    """Returns the expert that a phase would end with at a verified checkpoint: averaged, if the run averages it."""
    role = expert_role(phase)
    return read_part(folder, f"{role}/ema/") or read_part(folder, f"{role}/weights/")


def read_expert(run: RunFolder, phase: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns a phase's expert and its header; raises UserError for a link out of the run, or another phase's file."""
    path = resolve_inside(run.path, run.expert_path(phase))
    tensors, header = load_tensors(path)
    if (found := header.get("phase")) != phase:
        raise UserError(f"{path}: its header says phase {found}, not {phase}; was it renamed?")
    return tensors, header


def experts_made_by(subject: Path) -> list[int | None]:
    """Returns how many iterations have made each expert of a run, or of a checkpoint; [] of what is no run.

    One that `promote` has chosen, or that goes on in a longer run, was made by another number than before.
    """
    reference = Reference.of(subject)
    run = RunFolder(subject if reference is None else reference.run)
    before = itertools.count(1) if reference is None else range(1, reference.phase)
    paths = itertools.takewhile(Path.exists, map(run.expert_path, before))
    made = [load_header(resolve_inside(run.path, path)).get("iteration") for path in paths]
    return made if reference is None else [*made, reference.iteration]


class ExportEntry(Section):
    """An entry names the file, or folder of shards, that holds an expert on a network."""

    phase: Annotated[int, Field(gt=0)]
    network: Annotated[int, Field(ge=0)]
    steps: tuple[int, ...]
    part: str
    name: str
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]  # beside export.json, nowhere else


class ExportIndex(Section):
    """What `export.json` holds. base: a hub id or a shipped teacher, never a path.

    The few-step pipeline reads all but the config, and `load` the experts' files and the config.
    """

    base: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")] | None
    revision: str | None
    fused: bool
    pipeline: str
    times: tuple[float, ...]
    boundary_ratio: float | None
    solver: str
    max_sequence_length: int | None
    size: dict[str, int]
    unguided: dict[str, float]
    fixed: dict[str, bool]
    padded: bool
    alone: bool
    cleans: bool
    experts: tuple[ExportEntry, ...]
    config: dict[str, Any]


def read_export(folder: Path, base: str | None) -> Trained:
    """Returns what an export holds."""
    try:
        index = ExportIndex.model_validate_json(resolve_inside(folder, folder / EXPORT).read_text("utf-8"))
        teacher = dict(index.config["teacher"]) | {"path": base or index.base}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason: object = error
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(f"{folder}: {EXPORT} cannot be read ({reason})") from error
    if index.base is None and base is None:
        raise UserError(f"{folder}: its teacher was a local folder, which `load` has to be told as base")
    config = build(index.config | {"teacher": teacher})

    def expert(phase: int) -> dict[str, Tensor]:
        entries = [entry for entry in index.experts if entry.phase == phase]
        tensors = {entry.network: read_entry(folder, entry, config.teacher) for entry in entries}
        return {f"{network}.{name}": tensor for network, own in tensors.items() for name, tensor in own.items()}

    return Trained(config, expert, config.plan.phases)


def read_entry(folder: Path, entry: ExportEntry, teacher: Teacher) -> dict[str, Tensor]:
    """Returns the tensors of one of an export's files by their names in the transformer.

    Raises UserError where the file is damaged, or is another expert's by its header.
    """
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
            tensors = read_lora(path, teacher)
        found = f"phase {header['phase']}, network {header['network']}"
    except Exception as error:  # safetensors raises its own, OSError, KeyError, ValueError: all mean a bad file
        raise UserError(f"{path}: not a file of an export, or damaged ({error})") from error
    if found != (named := f"phase {entry.phase}, network {entry.network}"):
        raise UserError(f"{path}: its header says {found}, but {EXPORT} that it is {named}; was it renamed?")
    return without_prefix(tensors)


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors by their names in the transformer, without the pipeline's name of it."""
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def read_lora(path: Path, teacher: Teacher) -> dict[str, Tensor]:
    """Returns an exported LoRA file's tensors by diffusers' names, to which the loader of the kind converts them."""
    assert isinstance(teacher, PipelineTeacher)
    return adapter_of(teacher).loader.lora_state_dict(str(path.parent), weight_name=path.name, use_safetensors=True)


def read_shards(folder: Path) -> dict[str, Tensor]:
    """Returns weights that diffusers has saved in one file or several; raises UserError for a tensor in two of them."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found = load_file(resolve_inside(folder, path))
        if twice := min(found.keys() & tensors.keys(), default=None):
            raise UserError(f"{path}: {twice} is in another file of its folder, too")
        tensors |= found
    return tensors
