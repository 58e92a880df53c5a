"""`distill --dry-run` checks all of a run that can be checked without reading a weight, on the meta device; a model of
the user's own by `check_model`.
"""

from phased_dmd.conditions import fitting
from phased_dmd.config import Config, phase_plan, renoise_interval
from phased_dmd.config.teacher import PipelineTeacher
from phased_dmd.engine.world import warn
from phased_dmd.errors import UserError
from phased_dmd.inputs import check_prompts, prepare
from phased_dmd.maths.phases import PhasePlan
from phased_dmd.maths.schedules import check_start
from phased_dmd.models.loader import bare_codec, bare_model
from phased_dmd.models.protocol import VelocityModel
from phased_dmd.models.source import META, BareSource
from phased_dmd.networks.build import Own, check_own
from phased_dmd.networks.roles import FAKE, Roles, expert_role
from phased_dmd.prompts import read_prompts
from phased_dmd.sampling.initial import check_initial
from phased_dmd.sampling.sampler import encode
from phased_dmd.testing import ModelError, check_model
from phased_dmd.trackers import check_trackers

TOLD = 8  # prompts, at most, that a model of the user's own is checked with


def dry_run(config: Config, strict: bool = False, own: Own | None = None) -> str | None:
    """Builds the networks, experts and fakes of a run without values, and checks its inputs.

    own: the user's model and codec, which are checked as they are; what passed is returned in words. Raises UserError
    for what is wrong, and, if strict, for prompts that would be cut off. Warns where the base is no folder of this
    machine: its shipped architecture, or its configurations on the hub, are checked instead.
    """
    check_own(config, own is not None)
    if own is not None:
        return check_run_of_own(config, own, strict)
    check_trackers(config.trackers)
    prompts = read_prompts(config.prompts) if config.prompts is not None else []
    source = BareSource(config.teacher, look=True) if isinstance(config.teacher, PipelineTeacher) else None
    model, codec = bare_model(config.teacher, config.seed, source), bare_codec(config.teacher, source)
    try:
        check_start(model.prediction, model.schedule, config.plan.start)
        plan = phase_plan(config, model.switches)
    except ValueError as error:
        raise UserError(str(error)) from None
    add_roles(config, model, plan)
    if config.init_experts:
        check_initial(config, model)
    if source is None or source.on_disk:
        check_prompts(codec, prompts, strict)
        return None
    fitting(codec, prompts)
    warn(
        f"teacher.path: {source.path} is no folder of this machine: its weights, and the lengths of prompts, "
        "are not checked"
    )
    return None


def check_run_of_own(config: Config, own: Own, strict: bool) -> str:
    """Checks the inputs of a run of the user's own model, and the model told some of its prompts; says what passed."""
    model, codec, prompts = prepare(config, own, strict)
    fits = fitting(codec, prompts) or [[0]] * len(prompts)
    told = [prompt for prompt, buckets in zip(prompts, fits, strict=True) if 0 in buckets][:TOLD]
    conditions = list(encode(codec, told, bucket=0).values()) or [{}]
    texts, start = [prompt.text for prompt in told], config.plan.start
    try:
        return str(check_model(
            model, codec, None, conditions, start, texts, config.teacher.negative_prompt, quiet=True
        ))  # fmt: skip
    except ModelError as error:
        raise UserError(f"--own: {error}") from error


def add_roles(config: Config, model: VelocityModel, plan: PhasePlan) -> None:
    """Adds the adapters of all experts and fakes; those of the phases on one network are alike."""
    phases, roles = range(1, plan.num_phases + 1), Roles(model)
    renoised = {phase: renoise_interval(config, plan, phase).support for phase in phases}
    experts = {expert.network for phase in phases for expert in plan.experts(phase)}
    fakes = {network for phase in phases for network in plan.fakes(phase, renoised[phase])}
    with META:
        if config.generator.weights == "lora":
            roles.add(expert_role(1), sorted(experts), config.generator.lora, seed=0)
        if config.fake.weights == "lora":
            roles.add(FAKE, sorted(fakes), config.fake.lora, seed=0)
