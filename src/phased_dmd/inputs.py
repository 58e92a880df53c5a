"""Checks the inputs of a run before anything is written, and knows them again by what they hold, wherever they lie."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from phased_dmd.checkpoint import RunFolder
from phased_dmd.conditions import fitting
from phased_dmd.config import Config, phase_plan
from phased_dmd.config.teacher import PipelineTeacher
from phased_dmd.engine.world import device, warn
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import NEAR
from phased_dmd.models.hashes import file_hash
from phased_dmd.models.protocol import Codec, VelocityModel
from phased_dmd.models.source import Source
from phased_dmd.networks.build import Own, load_teacher
from phased_dmd.prompts import Prompt, read_prompts
from phased_dmd.sampling.loading import read_expert
from phased_dmd.trackers import check_trackers


def prepare(config: Config, own: Own | None = None, strict: bool = False) -> tuple[VelocityModel, Codec, list[Prompt]]:
    """Checks networks, codec, prompts and their first frames, before a run writes anything; loads all but the networks.

    Prompts that the encoder must cut off are counted in a warning, or, if strict, refused.
    """
    check_trackers(config.trackers)
    if config.engine.offload and device().type == "cpu":
        warn("engine.offload: there is no GPU to spare, so it changes nothing")
    prompts = read_prompts(config.prompts) if config.prompts is not None else []
    model, codec = load_teacher(config, own)
    for phase in range(1, config.plan.phases + 1) if config.init_experts else ():
        initial_expert(config, model, phase)
    if config.init_experts:
        warn_of_other_times(config, model)
    check_prompts(codec, prompts, strict)
    return model, codec, prompts


def check_prompts(codec: Codec, prompts: Sequence[Prompt], strict: bool) -> None:
    """Raises a UserError where a first frame is missing or does not fit; for the rest see `prepare`."""
    fitting(codec, prompts)
    if cut := codec.too_long([prompt.text for prompt in prompts]):
        message = f"prompts: {cut} of {len(prompts)} are longer than the text encoder takes, and are cut off"
        if strict:
            raise UserError(message)
        warn(message)


def warn_of_other_times(config: Config, model: VelocityModel) -> None:
    """Warns where the run `init_experts` has no step at a time at which a phase begins: the nearest is taken."""
    plan = phase_plan(config, model.switches)
    there = phase_plan(RunFolder(config.init_experts or "").config(), model.switches).times[:-1]
    begins = [plan.begin(phase) for phase in range(1, plan.num_phases + 1)]
    if any(min(abs(t - begin) for t in there) > NEAR for begin in begins):
        at, of = (", ".join(f"{t:.4g}" for t in times) for times in (begins, there))
        warn(f"init_experts: phases begin at {at}, and its steps at {of}; each starts from the expert of the nearest")


def initial_expert(config: Config, model: VelocityModel, phase: int) -> dict[str, Tensor]:
    """Reads the expert of the run `init_experts` that serves the step nearest to the time at which a phase begins.

    An adapter is rescaled to this run's alpha / rank, so that it computes what it did there.
    """
    other, t = RunFolder(config.init_experts or ""), phase_plan(config, model.switches).begin(phase)
    try:
        plan = phase_plan(other.config(), model.switches)
    except ValueError as error:
        raise UserError(f"init_experts: {error}") from error
    step = min(range(plan.num_steps), key=lambda step: abs(plan.times[step] - t))
    nearest = plan.expert(step).phase
    if not (path := other.expert_path(nearest)).exists():
        raise UserError(f"init_experts: {path} is not there yet")
    tensors, header = read_expert(other, nearest)
    if header["weights"] == "full":
        return tensors
    lora = config.generator.lora
    scale = (header["alpha"] / header["rank"]) / (lora.alpha / lora.rank)
    return {name: scale * tensor if ".lora_B." in name else tensor for name, tensor in tensors.items()}


def contents(
    config: Config, prompts: Sequence[Prompt], pictures: Sequence[str] | None = None
) -> dict[str, tuple[str, str]]:
    """Returns for each input that the config names by its place that place in words, and a hash of what is there.

    pictures: see `picture_hashes`; None where they are not looked at.
    """
    teacher = config.teacher
    experts = sorted(Path(config.init_experts, "experts").glob("phase-*")) if config.init_experts else []
    held: dict[str, tuple[str, object]] = {
        "prompts": (f"prompts: {config.prompts}", [prompt.text for prompt in prompts]),
        "init_experts": (f"init_experts: {config.init_experts}", [file_hash(path) for path in experts]),
    }
    if pictures is not None:
        held["pictures"] = f"prompts: a first frame of {config.prompts}", pictures
    if isinstance(teacher, PipelineTeacher):
        held["teacher"] = f"teacher.path: {teacher.path}", Source(teacher).contents()
    return {
        name: (where, hashlib.blake2b(repr(what).encode(), digest_size=16).hexdigest())
        for name, (where, what) in held.items()
    }


def compare_finished(run: RunFolder, config: Config) -> None:
    """Raises a UserError where the config's places, if they are others than the run's, lead to something else."""
    if run.moved(config):
        run.compare(contents(config, read_prompts(config.prompts) if config.prompts is not None else []))
