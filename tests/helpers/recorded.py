"""Runs that are watched from outside: a model of the user's own that writes down its calls, and hooks of torch's."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook, register_module_module_registration_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from phased_dmd.checkpoint import RunFolder
from phased_dmd.config import Config, phase_plan
from phased_dmd.config.teacher import OwnTeacher
from phased_dmd.maths.rollout import rollout
from phased_dmd.maths.schedules import add_noise
from phased_dmd.models.analytic import AnalyticModel, PlainCodec
from phased_dmd.models.protocol import Codec, Condition, VelocityModel
from phased_dmd.networks.optim import MomentumFreeAdamW
from phased_dmd.networks.roles import FAKE, TEACHER, System, expert_role
from phased_dmd.step import Batch, draw
from phased_dmd.train import distill


class Call(NamedTuple):
    """One call of a network. phase: that was trained meanwhile. differentiated: with a graph that leads to weights."""

    phase: int
    role: str
    network: int
    x: Tensor
    t: Tensor
    out: Tensor
    differentiated: bool


class Recorded:
    """`VelocityModel`: another one, of which every call is written down; `then` is called with it and what is made.

    run: the folder of the run, which says by its experts what phase it is in. The roles are told apart by the adapter
    that is on. A copy is a fake's; where experts are copies too, the first new one of a phase is its expert.
    """

    def __init__(self, model: VelocityModel, run: Path | None = None) -> None:
        self.model, self.run, self.phase = model, run, 1
        self.networks, self.students, self.switches = model.networks, model.students, model.switches
        self.schedule, self.prediction, self.guidance = model.schedule, model.prediction, model.guidance
        self.sample_shapes, self.lora_targets = model.sample_shapes, model.lora_targets
        self.calls: list[Call] = []
        self.then: Callable[[Call, nn.Module, Tensor], object] = lambda *_: None
        self._copies: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        for i, network in enumerate(self.students):
            vars(network)["number"] = i  # which its copies have too

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        return self.model.blocks(network)

    def batch(self, rows: Sequence[Condition]) -> Condition:
        return self.model.batch(rows)

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        return self.model.guide(conditional, unconditional, guidance)

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        out = self.model.predict(network, x, t, condition)
        while self.run and RunFolder(self.run).expert_path(self.phase).exists():
            self.phase += 1
        own = [i for i, each in enumerate(self.networks) if each is network]
        role = adapter_on(network) or TEACHER if own else self._copy(network)
        number = own[0] if own else vars(network)["number"]
        call = Call(self.phase, role, number, x.detach(), t, out.detach(), out.requires_grad)
        self.calls.append(call)
        self.then(call, network, out)
        return out

    def of(self, role: str, phase: int | None = None) -> list[Call]:
        """The calls of a role, in one phase or in all."""
        return [call for call in self.calls if call.role == role and phase in (None, call.phase)]

    def _copy(self, network: nn.Module) -> str:
        if network not in self._copies:
            full = not any(isinstance(module, LoraLayer) for module in self.students[0].modules())
            experts = [expert_role(phase) for phase in range(1, self.phase + 1)] if full else []
            self._copies[network] = next((role for role in experts if role not in self._copies.values()), FAKE)
        return self._copies[network]


def adapter_on(network: nn.Module) -> str | None:
    """The adapter that a network computes with."""
    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    on = {name for layer in layers for name in layer.active_adapters}
    assert len(on) <= 1
    return next(iter(on), None)


def adapters(network: nn.Module) -> set[str]:
    """All adapters that a network carries."""
    return {name for layer in network.modules() if isinstance(layer, LoraLayer) for name in layer.lora_A}


def weights(network: nn.Module, number: int = 0, adapter: str | None = None) -> dict[str, Tensor]:
    """A copy of a network's weights on the CPU, or of an adapter's on it, by the names that a run gives them."""
    own = f".{adapter}."
    return {
        f"{number}.{name.replace(own, '.')}": p.detach().to("cpu", copy=True)
        for name, p in network.named_parameters()
        if adapter is None or own in name
    }


def as_own(config: Config) -> Config:
    """The same run, of a teacher that is given from Python."""
    return config.model_copy(update={"teacher": OwnTeacher()})


def recorded(config: Config, run: Path) -> Recorded:
    """The teacher of an analytic config, for a run of `as_own(config)`."""
    return Recorded(AnalyticModel(config.teacher, config.seed), run)  # type: ignore[arg-type]


def distill_recorded(config: Config, run: Path) -> Recorded:
    """Distils an analytic teacher, and returns what was asked of it."""
    model = recorded(config, run)
    distill_own(config, run, model)
    return model


def distill_own(config: Config, run: Path, model: VelocityModel, codec: Codec | None = None) -> Path:
    """Distils a model by a config that names another teacher."""
    return distill(as_own(config), run, quiet=True, own=(model, codec or PlainCodec()))


# ---------------------------------------------------------------- optimisers

Watch = Callable[[str, dict[str, Any]], object]  # with the role that steps, and its "params" and "lr"


@contextmanager
def watched_steps(before: Watch = lambda *_: None, after: Watch = lambda *_: None) -> Iterator[None]:
    """Around a run from its start: calls these before and after each optimiser's step.

    In every phase the fake steps first, by which the optimisers are told apart.
    """
    optimisers: list[MomentumFreeAdamW] = []

    def hook(watch: Watch) -> Callable[..., None]:
        def step(optimiser: torch.optim.Optimizer, *_: Any) -> None:
            if not isinstance(optimiser, MomentumFreeAdamW):  # such as what fits an analytic teacher's student
                return
            if not any(optimiser is each for each in optimisers):
                optimisers.append(optimiser)
            index = next(i for i, each in enumerate(optimisers) if each is optimiser)
            watch(expert_role(index // 2 + 1) if index % 2 else FAKE, optimiser.param_groups[0])

        return step

    handles = register_optimizer_step_pre_hook(hook(before)), register_optimizer_step_post_hook(hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------- updates


class Update(NamedTuple):
    """What an update drew, its calls of experts, those of teacher and fake, and x_s, where its rollout ended."""

    batch: Batch
    experts: list[Call]
    scores: list[Call]
    x_s: Tensor

    def differentiated(self) -> tuple[int, ...]:
        """The steps that have a graph."""
        steps = {hop.t: hop.step for hop in self.batch.path}
        return tuple(steps[call.t[0].item()] for call in self.experts if call.differentiated)


def updates(config: Config, model: Recorded) -> Iterator[Update]:
    """The updates of a run in whole batches that descends a KL, in order; fails where a call was not given what `draw`
    draws for its update: the x of each hop, and at last x_s with its noise.

    Updates that share a rollout find its calls among those of their iteration.
    """
    system: Any = System(config, model, None, phase_plan(config, model.switches), {})  # type: ignore[arg-type]
    count: Counter[int] = Counter()
    shared: list[Call] = []
    for calls in _split(model.calls):
        phase = calls[0].phase
        iteration, update = divmod(count[phase], config.fake.updates + 1)
        count[phase] += 1
        shared = shared if config.rollouts.reuse and update else []
        shared += [call for call in calls if call.role not in (TEACHER, FAKE)]
        number = (update + 1) % (config.fake.updates + 1)
        batch = draw(system, phase, iteration, number, range(config.batch_size), [1.0], None)
        x_s = _end(batch, shared)
        scores = [call for call in calls if call.role in (TEACHER, FAKE)]
        x_t = add_noise(x_s, batch.eps, batch.s, batch.t, model.schedule)
        assert all(torch.equal(call.x, x_t) and torch.equal(call.t, batch.t) for call in scores)
        yield Update(batch, [call for call in calls if call.role not in (TEACHER, FAKE)], scores, x_s)


def _split(calls: Sequence[Call]) -> Iterator[list[Call]]:
    """A fake's update ends with its own call, an expert's with the calls of teacher and fake."""
    part: list[Call] = []
    for call in calls:
        part.append(call)
        if (call.role == FAKE and call.differentiated) or {TEACHER, FAKE} <= {each.role for each in part}:
            yield part
            part = []
    assert not part


def _end(batch: Batch, calls: Sequence[Call]) -> Tensor:
    def predict(step: int, x: Tensor, t: Tensor) -> Tensor:
        role = expert_role(batch.system.plan.expert(step).phase)
        made = [call.out for call in calls if call.role == role and torch.equal(call.t, t) and torch.equal(call.x, x)]
        assert made and all(torch.equal(out, made[0]) for out in made)
        return made[0]

    model, solver = batch.system.model, batch.system.config.ablation.solver
    start = batch.system.start(batch.first_noise())
    return rollout(predict, start, batch.path, model.schedule, model.prediction, (), solver, batch.step_noise).x


# ---------------------------------------------------------------- what is loaded when


@contextmanager
def loaded_together(*kinds: type[nn.Module]) -> Iterator[list[set[str]]]:
    """Around a run from its start: at each forward of a module of these classes, the names of those with weights."""
    made: WeakSet[nn.Module] = WeakSet()
    seen: list[set[str]] = []

    def built(module: nn.Module, _name: str, _child: nn.Module | None) -> None:
        if isinstance(module, kinds):
            made.add(module)

    def called(module: nn.Module, _inputs: Any) -> None:
        if isinstance(module, kinds):
            seen.append({type(each).__name__ for each in made if not next(each.parameters()).is_meta})

    handles = register_module_module_registration_hook(built), register_module_forward_pre_hook(called)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
