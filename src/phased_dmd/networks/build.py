"""The networks of a run, put together: a teacher loaded, its experts and fakes added, loaded and removed."""

from collections.abc import Mapping

import torch
from torch import Tensor

from phased_dmd.config import Config, Fake, Generator, Lora, phase_plan, renoise_interval
from phased_dmd.config.teacher import OwnTeacher
from phased_dmd.engine.randomness import seed_of
from phased_dmd.engine.world import device, sharded
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import PhasePlan
from phased_dmd.maths.schedules import check_start
from phased_dmd.models.loader import load_model
from phased_dmd.models.protocol import Codec, Condition, VelocityModel
from phased_dmd.models.source import META
from phased_dmd.networks.roles import FAKE, Roles, System, expert_role

Own = tuple[VelocityModel, Codec]


def load_teacher(config: Config, own: Own | None = None, fit: bool = True) -> Own:
    """Loads the teacher of a config and its codec, or takes the user's own of both; checks them against the plan.

    fit: see `load_model`.
    """
    check_own(config, own is not None)
    model, codec = own or load_model(config.teacher, config.seed, fit)
    if own is not None:
        check_devices(model)
    if isinstance(config.teacher, OwnTeacher) and len(config.teacher.weights) != len(model.sample_shapes):
        raise UserError(
            f"teacher.weights: {len(config.teacher.weights)} for the model's {len(model.sample_shapes)} sample_shapes"
        )
    try:
        check_start(model.prediction, model.schedule, config.plan.start)
        phase_plan(config, model.switches)
    except ValueError as error:
        raise UserError(str(error)) from None
    return model, codec


def check_own(config: Config, given: bool) -> None:
    """Raises a UserError where a model of the user's own is given to a teacher of another kind, or not given to one."""
    kind = config.teacher.kind
    if kind == "own" and not given:
        raise UserError(
            "teacher.kind: own is a model of yours: name it by --own module:function, from Python by "
            "own=(model, codec); see docs/extending.md"
        )
    if kind != "own" and given:
        raise UserError(f"teacher.kind: {kind}, which has a model already; one of your own is for the recipe own")


def check_devices(model: VelocityModel) -> None:
    """Raises a UserError where a network of the user's own is elsewhere than this process computes; sharding moves it
    there from the CPU.
    """
    allowed = {device(), torch.device("cpu")} if sharded() else {device()}
    for i, network in enumerate(model.networks):
        if where := next((p.device for p in network.parameters() if p.device not in allowed), None):
            here = f"this process computes on {device()}: `.to(phased_dmd.engine.world.device())` moves it there"
            raise UserError(f"networks[{i}] is on {where}, and {here}")


def build_system(config: Config, model: VelocityModel, negative: Condition) -> System:
    """Returns the system of a teacher that has no experts yet."""
    return System(config, model, Roles(model), phase_plan(config, model.switches), negative)


def lora_of(section: Generator | Fake) -> Lora | None:
    """Returns the size of the adapters that experts, or fakes, are; None for copies."""
    return section.lora if section.weights == "lora" else None


def add_expert(system: System, phase: int, trainable: bool) -> None:
    """Adds the phase's expert unless it is there; it computes what the teacher (or an analytic one's student) does."""
    config, role = system.config.generator, expert_role(phase)
    if not system.roles.has(role):
        networks = [expert.network for expert in system.plan.experts(phase)]
        system.roles.add(role, networks, lora_of(config), seed=system.config.seed, trainable=trainable)
    if trainable:
        system.roles.train(role)


def load_expert(system: System, phase: int, tensors: dict[str, Tensor], where: str) -> None:
    """Gives the phase's expert these tensors; a UserError, begun with `where`, if they are not exactly its own."""
    try:
        system.roles.load(expert_role(phase), tensors)
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]}") from error


def describe_expert(config: Config, plan: PhasePlan, phase: int, iteration: int) -> dict[str, object]:
    """Returns the header of an expert's file, what a reader needs to run it: its place on the grid, the iterations that
    have made it, and, for LoRA, its scale.
    """
    lora = lora_of(config.generator)
    return {
        "phase": phase, "steps": list(plan.steps(phase)), "grid": list(plan.times),
        "shift": config.plan.shift, "boundary": plan.end(phase), "solver": config.ablation.solver,
        "weights": config.generator.weights,
        "rank": lora and lora.rank, "alpha": lora and lora.alpha, "method": config.method,
        "weighting": config.objective, "iteration": iteration,
    }  # fmt: skip


def expert_shapes(config: Config, model: VelocityModel, plan: PhasePlan) -> dict[int, dict[str, torch.Size]]:
    """Returns the shapes of each phase's expert, by name; the model, on the meta device, is given the adapters."""
    phases = {k: sorted({expert.network for expert in plan.experts(k)}) for k in range(1, plan.num_phases + 1)}
    networks = sorted({network for own in phases.values() for network in own})
    if config.generator.weights == "lora":
        roles, role = Roles(model), expert_role(1)  # those on one network are alike
        with META:
            roles.add(role, networks, config.generator.lora, seed=0)
        held = {name: p.shape for name, p in roles.parameters(role).items()}
    else:
        named = [(network, model.students[network].named_parameters()) for network in networks]
        held = {f"{network}.{name}": p.shape for network, parameters in named for name, p in parameters}
    return {k: {n: shape for n, shape in held.items() if int(n.partition(".")[0]) in own} for k, own in phases.items()}


def check_shapes(where: str, needed: Mapping[str, torch.Size], found: Mapping[str, Tensor]) -> None:
    """Raises a UserError, begun with `where`, if an expert's tensors are not those needed, by name and shape."""
    shapes = {name: tensor.shape for name, tensor in found.items()}
    for name in sorted(needed.keys() | shapes.keys()):
        if needed.get(name) != shapes.get(name):
            has, needs = (list(each[name]) if name in each else "missing" for each in (shapes, needed))
            raise UserError(f"{where}: {name} is {has}, where this run has {needs}")


def add_adapters(system: System, only: int | None = None) -> dict[int, dict[str, Tensor]]:
    """Adds all adapters that training will need, since none can be added to a sharded network.

    Returns what fakes that are adapters start from, by phase. only: the one phase to be trained.
    """
    config, plan, roles = system.config, system.plan, system.roles
    phases = range(1, plan.num_phases + 1) if only is None else [only]
    if config.generator.weights == "lora":
        for phase in phases:
            add_expert(system, phase, trainable=False)
    if config.fake.weights == "full":
        return {}
    networks = sorted(
        {network for phase in phases for network in plan.fakes(phase, renoise_interval(config, plan, phase).support)}
    )
    fresh = {}
    for phase in phases:
        roles.remove(FAKE)
        roles.add(FAKE, networks, config.fake.lora, seed=seed_of(config.seed, phase), trainable=False)
        fresh[phase] = roles.state(FAKE)
    return fresh


def add_fake(system: System, phase: int, fresh: dict[str, Tensor] | None) -> None:
    """Adds the phase's fakes, which compute what the teacher does: copies, or the adapter that starts from `fresh`."""
    config, plan, roles = system.config, system.plan, system.roles
    if fresh is None:
        roles.add(FAKE, plan.fakes(phase, renoise_interval(config, plan, phase).support), None, seed=config.seed)
    else:
        roles.load(FAKE, fresh)
        roles.train(FAKE)


def remove_fake(system: System) -> None:
    """Frees fakes that are copies; one that is an adapter stays for the next phase."""
    if system.config.fake.weights == "full":
        system.roles.remove(FAKE)
    else:
        system.roles.freeze(FAKE)
