"""The roles bound to a model and a plan: what training and sampling ask of the networks goes through here."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phased_dmd.config import Config, phase_plan, renoise_interval
from phased_dmd.config.teacher import OwnTeacher
from phased_dmd.engine.randomness import seed_of
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import Hop, PhasePlan, step_times
from phased_dmd.maths.rollout import Rollout, rollout
from phased_dmd.maths.schedules import check_start
from phased_dmd.models.loader import load_model
from phased_dmd.models.protocol import Codec, Condition, VelocityModel, joined
from phased_dmd.models.weightless import META
from phased_dmd.networks.roles import FAKE, TEACHER, Roles, expert_role, route

Own = tuple[VelocityModel, Codec]


@dataclass(frozen=True)
class System:
    """A model, its roles and the phase plan: every network call of training and sampling goes through here."""

    config: Config
    model: VelocityModel
    roles: Roles
    plan: PhasePlan
    negative: Condition  # unpadded: what the teacher's guidance leads away from

    def start(self, noise: Tensor) -> Tensor:
        """x at t_0: sigma(t_0) eps [b, ...]."""
        return noise * self.model.schedule.sigma(torch.tensor(self.plan.times[:1], dtype=torch.float64)).item()

    def roll(
        self, path: Sequence[Hop], x: Tensor, condition: Condition, gradient_steps: Collection[int] = (),
        renoise: Callable[[int], Tensor] | None = None,
    ) -> Rollout:  # fmt: skip
        """The experts along a path of the plan, from x [b, ...] at its first time."""

        def predict(step: int, x: Tensor, t: Tensor) -> Tensor:
            expert = self.plan.expert(step)
            return self.roles.predict(expert_role(expert.phase), expert.network, x, t, condition)

        model, solver = self.model, self.config.ablation.solver
        return rollout(predict, x, path, model.schedule, model.prediction, gradient_steps, solver, renoise)

    def teacher(self, x: Tensor, t: Tensor, condition: Condition, present: Sequence[int] | None = None) -> Tensor:
        """The guided teacher, each sample on the network whose range holds its t. present: see `route`."""

        def call(network: int, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            guidance = self.model.guidance[network]
            if guidance == 1:
                return self.roles.predict(TEACHER, network, x, t, condition)
            negative = condition | self.model.batch([self.negative] * len(x))  # a first frame stays what it is
            if self.config.engine.batched_guidance:
                both = joined(condition, negative)
                pair = self.roles.predict(TEACHER, network, torch.cat([x, x]), torch.cat([t, t]), both)
                return self.model.guide(pair[: len(x)], pair[len(x) :], guidance)
            conditional = self.roles.predict(TEACHER, network, x, t, condition)
            return self.model.guide(conditional, self.roles.predict(TEACHER, network, x, t, negative), guidance)

        return route([self.plan.network(time) for time in t.tolist()], call, x, t, condition, present)

    def fake(self, x: Tensor, t: Tensor, condition: Condition, present: Sequence[int] | None = None) -> Tensor:
        """The fake score network, without guidance. present: see `route`."""

        def call(network: int, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return self.roles.predict(FAKE, network, x, t, condition)

        return route([self.plan.network(time) for time in t.tolist()], call, x, t, condition, present)

    def sample_teacher(self, noise: Tensor, condition: Condition, steps: int) -> Tensor:
        """The teacher's own deterministic sampler on `steps` steps of the plan's shifted grid: x_0 [b, ...]."""
        times = step_times(steps, self.config.plan.shift, self.config.plan.start)
        path = [Hop(i, times[i], times[i + 1]) for i in range(steps)]
        model = self.model
        with torch.no_grad():
            return rollout(
                lambda _step, x, t: self.teacher(x, t, condition),
                self.start(noise),
                path,
                model.schedule,
                model.prediction,
            ).x


def load_teacher(config: Config, own: Own | None = None, fit: bool = True) -> Own:
    """The teacher of a config and its codec, or the user's own of both, checked against the plan.

    fit: see `load_model`.
    """
    if own is None and config.teacher.kind == "own":
        raise UserError(
            "teacher.kind: own means a model given from Python: distill, load and evaluate of phased_dmd.lab take "
            "own=(model, codec), see docs/extending.md"
        )
    if own is not None and config.teacher.kind != "own":
        raise UserError(f"teacher.kind: {config.teacher.kind} with a model given from Python")
    model, codec = own or load_model(config.teacher, config.seed, fit)
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


def build_system(config: Config, model: VelocityModel, negative: Condition) -> System:
    """The teacher with no experts yet."""
    return System(config, model, Roles(model), phase_plan(config, model.switches), negative)


def add_expert(system: System, phase: int, trainable: bool) -> None:
    """The phase's expert, computing what the teacher (or an analytic teacher's student) does, unless it is there."""
    config, role = system.config.generator, expert_role(phase)
    if not system.roles.has(role):
        lora = config.lora if config.weights == "lora" else None
        networks = [expert.network for expert in system.plan.experts(phase)]
        system.roles.add(role, networks, lora, seed=system.config.seed, trainable=trainable)
    if trainable:
        system.roles.train(role)


def load_expert(system: System, phase: int, tensors: dict[str, Tensor], where: str) -> None:
    """Gives the phase's expert these tensors; a UserError, begun with `where`, if they are not exactly its own."""
    try:
        system.roles.load(expert_role(phase), tensors)
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]}") from error


def expert_shapes(config: Config, model: VelocityModel, plan: PhasePlan) -> dict[int, dict[str, torch.Size]]:
    """What each phase's expert holds, by name; of a model on the meta device, to which the adapters are added."""
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
    """A UserError where what an expert is to be has other tensors than it, by name or shape."""
    shapes = {name: tensor.shape for name, tensor in found.items()}
    for name in sorted(needed.keys() | shapes.keys()):
        if needed.get(name) != shapes.get(name):
            has, needs = (list(each[name]) if name in each else "missing" for each in (shapes, needed))
            raise UserError(f"{where}: {name} is {has}, where this run has {needs}")


def add_adapters(system: System) -> dict[int, dict[str, Tensor]]:
    """All adapters that training will need, before the networks are sharded; what fakes as adapters start from."""
    config, plan, roles = system.config, system.plan, system.roles
    phases = range(1, plan.num_phases + 1)
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
    """The phase's fakes, computing what the teacher does: copies, or the adapter that starts from `fresh`."""
    config, plan, roles = system.config, system.plan, system.roles
    if fresh is None:
        roles.add(FAKE, plan.fakes(phase, renoise_interval(config, plan, phase).support), None, seed=config.seed)
    else:
        roles.load(FAKE, fresh)
        roles.train(FAKE)


def remove_fake(system: System) -> None:
    """Frees copies; adapters stay for the next phase."""
    if system.config.fake.weights == "full":
        system.roles.remove(FAKE)
    else:
        system.roles.freeze(FAKE)
