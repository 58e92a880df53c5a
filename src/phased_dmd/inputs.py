"""Checks the inputs of a run before anything is written, and knows them again by what they hold, wherever they lie."""

import hashlib
from collections.abc import Sequence

from phased_dmd.checkpoint import RunFolder
from phased_dmd.conditions import fitting
from phased_dmd.config import Config
from phased_dmd.config.teacher import PipelineTeacher
from phased_dmd.engine.world import device, warn
from phased_dmd.errors import UserError
from phased_dmd.models.hashes import file_hash
from phased_dmd.models.protocol import Codec, VelocityModel
from phased_dmd.models.source import Source
from phased_dmd.networks.build import Own, load_teacher
from phased_dmd.prompts import Prompt, read_prompts
from phased_dmd.sampling.initial import check_initial, initial_files
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
    if config.init_experts:
        check_initial(config, model)
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


def contents(
    config: Config, prompts: Sequence[Prompt], pictures: Sequence[str] | None = None
) -> dict[str, tuple[str, str]]:
    """Returns for each input that the config names by its place that place in words, and a hash of what is there.

    pictures: see `picture_hashes`; None where they are not looked at.
    """
    teacher = config.teacher
    places = ", ".join(config.init_experts or ()) or None
    held: dict[str, tuple[str, object]] = {
        "prompts": (f"prompts: {config.prompts}", [prompt.text for prompt in prompts]),
        "init_experts": (f"init_experts: {places}", [file_hash(path) for path in initial_files(config)]),
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
