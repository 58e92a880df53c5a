"""Roles on shared networks: the teacher, the fake, and each phase's expert.

A base network is one frozen module. The teacher is that module with every adapter off; a LoRA expert is the same
module with its adapter on; the fake, and full-weight experts, are copies. Which adapter is on is a hidden state of
the module that forward, backward and activation checkpointing all read, so it is changed in one place only:
`Roles.active`, which restores what it found. Run every backward inside the role of its forward. Which parameters
train is another matter, and does not change with it: see `Roles.train` and `freeze`.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from peft.functional import delete_adapter
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import Parameter

from phased_dmd.config import Config, Engine, Lora, renoise_interval
from phased_dmd.engine.randomness import seed_of
from phased_dmd.engine.sharding import copy_full_tensors, full_tensor, meta_copy, parallelise
from phased_dmd.engine.world import device
from phased_dmd.maths.phases import Hop, PhasePlan, RenoiseInterval, step_times
from phased_dmd.maths.rollout import Rollout, rollout
from phased_dmd.models.protocol import NEGATIVE, Condition, VelocityModel, rows
from phased_dmd.models.sequence import split_sequences
from phased_dmd.networks.students import add_adapter, copy_network, without_adapters

TEACHER, FAKE = "teacher", "fake"


def expert_role(phase: int) -> str:
    """Returns the name of a phase's expert among the roles."""
    return f"phase_{phase}"


class Roles:
    """Knows which role computes on which network, and which role trains."""

    def __init__(self, model: VelocityModel) -> None:
        self.model = model
        for network in (*model.networks, *model.students):
            network.requires_grad_(False)
        self._outlines = [without_adapters(meta_copy(network)) for network in model.students]  # of copies
        self._engine = Engine()
        self._names: set[str] = set()
        self._copies: dict[tuple[str, int], nn.Module] = {}
        self._adapters: set[tuple[str, int]] = set()
        self._tuned: list[list[LoraLayer]] = [[] for _ in model.students]  # the layers that carry adapters
        self._on: list[str | None] = [None] * len(model.students)  # the adapter that is on, of each network

    def shard(self, engine: Engine) -> None:
        """Shards the networks over the processes, with the adapters that they carry by then: none can follow."""
        self._engine = engine
        for network in {id(network): network for network in (*self.model.networks, *self.model.students)}.values():
            self._shard_one(network)

    def _shard_one(self, network: nn.Module, compute: torch.dtype | None = None) -> None:
        if self._engine.sequence_parallel > 1:
            split_sequences(network, self.model.sample_shapes, self._engine.sequence_parallel)
        parallelise(network, self.model.blocks(network), self._engine, compute)

    def has(self, role: str) -> bool:
        """Says whether a role was added and not removed."""
        return role in self._names

    def add(self, role: str, networks: Sequence[int], lora: Lora | None, seed: int, trainable: bool = True) -> None:
        """Adds a role that computes what the student starts from: zero-initialised adapters, or copies (lora None)."""
        self._names.add(role)
        for network in networks:
            student = self.model.students[network]
            if lora is None:
                self._copies[role, network] = copy_network(self._outlines[network], student, self._shard_one)
                continue
            add_adapter(student, role, lora, self.model.lora_targets, seed_of(seed, role, network))
            self._adapters.add((role, network))
            self._tuned[network] = [module for module in student.modules() if isinstance(module, LoraLayer)]
            _switch(self._tuned[network], self._on[network])  # peft has switched the new adapter on
        if trainable:
            self.train(role)

    def train(self, role: str) -> None:
        """Lets the role's parameters take gradients from now on."""
        for parameter in self.parameters(role).values():
            parameter.requires_grad_()

    def remove(self, role: str) -> None:
        """Forgets a role, freeing its weights; one whose adapter is on now cannot be removed."""
        if role in self._on:
            raise RuntimeError(f"role {role} is active")
        self._names.discard(role)
        for network, base in enumerate(self.model.students):
            self._copies.pop((role, network), None)
            if (role, network) in self._adapters:
                self._adapters.remove((role, network))
                delete_adapter(base, role, prefix="lora_")

    def freeze(self, role: str) -> None:
        """Keeps the role's parameters as they are from now on, and drops their gradients."""
        for parameter in self.parameters(role).values():
            parameter.requires_grad_(False)
            parameter.grad = None

    @contextmanager
    def active(self, role: str) -> Iterator[None]:
        """Switches the role's adapters on, and all others off, on every network; at the end restores what was on."""
        before = list(self._on)
        if role != TEACHER and role not in self._names:
            raise KeyError(f"there is no role {role}")
        self._set([role if (role, network) in self._adapters else None for network in range(len(before))])
        try:
            yield
        finally:
            self._set(before)

    @contextmanager
    def following(self, expert: str, share: float) -> Iterator[None]:
        """Adds to the fake's copies, at the end, a share of the change that the expert's weights went through.

        A full expert's change is added as it is, a LoRA expert's as that of alpha / rank B A.
        """
        before = {name: p.detach().clone() for name, p in self.parameters(expert).items()} if share else {}
        yield
        if not share:
            return
        after, scalings = self.parameters(expert), (layer.scaling for layers in self._tuned for layer in layers)
        scale = next((scaling[expert] for scaling in scalings if expert in scaling), 1.0)  # alpha / rank
        with torch.no_grad():
            for name, p in self.parameters(FAKE).items():
                stem = name.removesuffix(".weight")
                a, b = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
                if name in before:
                    p.add_(after[name] - before[name], alpha=share)
                elif a in before:
                    p.add_(after[b] @ after[a] - before[b] @ before[a], alpha=share * scale)

    def predict(self, role: str, network: int, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Returns the role's native prediction on one network, [b, ...], at x [b, ...] and t [b]."""
        with self.active(role):
            return self.model.predict(self.module(role, network), x, t, condition)

    def module(self, role: str, network: int) -> nn.Module:
        """Returns the module to call for a role on a network, inside `active(role)`; a KeyError if there is none."""
        if role == TEACHER:
            return self.model.networks[network]
        if (role, network) in self._copies:
            return self._copies[role, network]
        if (role, network) not in self._adapters:
            raise KeyError(f"no {role} on network {network}")
        return self.model.students[network]

    def parameters(self, role: str) -> dict[str, Parameter]:
        """Returns the role's own parameters, named `<network>.<name in the module>`, the adapter's name left out."""
        named = {}
        for network in range(len(self.model.students)):
            if (role, network) in self._copies:
                named |= {f"{network}.{name}": p for name, p in self._copies[role, network].named_parameters()}
            elif (role, network) in self._adapters:
                own = f".{role}."
                for name, p in self.model.students[network].named_parameters():
                    if own in name:
                        named[f"{network}.{name.replace(own, '.')}"] = p
        return named

    def state(self, role: str) -> dict[str, Tensor]:
        """Returns a copy of the role's parameters on the CPU, gathered from their shards one by one; of several
        processes only the first gets values, see `full_tensor`.
        """
        return {name: full_tensor(p) for name, p in self.parameters(role).items()}

    def load(self, role: str, tensors: dict[str, Tensor]) -> None:
        """Overwrites all of the role's parameters; a missing or surplus name, or another shape, is a KeyError."""
        parameters = self.parameters(role)
        if parameters.keys() != tensors.keys():
            odd = sorted(parameters.keys() ^ tensors.keys())
            raise KeyError(f"{role}: {len(odd)} tensors missing or surplus, the first {odd[0]}")
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise KeyError(f"{role}: {name} is {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}")
        copy_full_tensors(parameters, tensors)

    def _set(self, adapters: list[str | None]) -> None:
        for network, adapter in enumerate(adapters):
            if adapter != self._on[network]:
                _switch(self._tuned[network], adapter)
                self._on[network] = adapter


def _switch(layers: list[LoraLayer], adapter: str | None) -> None:
    """Turns one LoRA adapter on and all others off; with none on, a layer is bit for bit its frozen base.

    peft's own `set_adapter` also freezes and thaws every adapter of the layer, at a tenth of a small network's time,
    so its private field is set here.
    """
    active = [] if adapter is None else [adapter]
    for layer in layers:
        layer._active_adapter = active


def route(
    network_of: Callable[[float], int],
    call: Callable[[int, Tensor, Tensor, Condition], Tensor],
    x: Tensor,
    t: Tensor,
    condition: Condition,
    present: Sequence[int] | None = None,
) -> Tensor:
    """Returns a prediction for a batch whose samples belong to different networks, each to network_of(its time).

    present: the networks that any process's samples belong to; where it is one, no time is read from the device.
    Sharded networks are called by all processes or none: where one has no sample of its own here, it is called on the
    first sample, to no effect.
    """
    if present is not None and len(present) == 1:
        return call(present[0], x, t, condition)
    networks = [network_of(time) for time in t.tolist()]
    present = sorted(set(networks)) if present is None else present
    if len(present) == 1:
        return call(present[0], x, t, condition)
    owner = torch.tensor(networks, device=x.device)
    parts, outputs = [], []
    for network in present:
        index = (owner == network).nonzero().squeeze(1)
        called = index if len(index) else index.new_zeros(1)
        outputs.append(call(network, x[called], t[called], rows(condition, called)))
        parts.append(index if len(index) else index.new_full((1,), len(x)))  # behind all others
    order = torch.cat(parts).argsort()[: len(x)]
    return torch.cat(outputs)[order]


@dataclass(frozen=True)
class System:
    """Binds a model and its roles to a config and a phase plan: all network calls of training and sampling pass here.

    negative: the unpadded condition that the teacher's guidance leads away from.
    """

    config: Config
    model: VelocityModel
    roles: Roles
    plan: PhasePlan
    negative: Condition

    @cached_property
    def device(self) -> torch.device:
        """Returns the device that the networks compute on."""
        return device()

    @cached_property
    def intervals(self) -> tuple[RenoiseInterval, ...]:
        """Returns where the re-noise times of each phase lie."""
        phases = range(1, self.plan.num_phases + 1)
        return tuple(renoise_interval(self.config, self.plan, phase) for phase in phases)

    def start(self, noise: Tensor, t: float | None = None) -> Tensor:
        """Returns x at t, or at the plan's t_0, where it is sigma(t) eps, [b, ...]."""
        time = torch.tensor([self.plan.times[0] if t is None else t], dtype=torch.float64)
        return noise * self.model.schedule.sigma(time).item()

    def roll(
        self, path: Sequence[Hop], x: Tensor, condition: Condition, gradient_steps: Collection[int] = (),
        noise: Callable[[int], Tensor] | None = None,
    ) -> Rollout:  # fmt: skip
        """Runs the experts along a path of the plan, from x [b, ...] at its first time."""

        def predict(step: int, x: Tensor, t: Tensor) -> Tensor:
            expert = self.plan.expert(step)
            return self.roles.predict(expert_role(expert.phase), expert.network, x, t, condition)

        model, solver = self.model, self.config.ablation.solver
        return rollout(predict, x, path, model.schedule, model.prediction, gradient_steps, solver, noise)

    def teacher(self, x: Tensor, t: Tensor, condition: Condition, present: Sequence[int] | None = None) -> Tensor:
        """Returns the guided teacher's prediction, each sample's by the network whose range holds its t.

        present: see `route`.
        """

        def call(network: int, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            guidance = self.model.guidance[network]
            if guidance == 1:
                return self.roles.predict(TEACHER, network, x, t, condition)
            conditional = self.roles.predict(TEACHER, network, x, t, condition)
            unconditional = self.roles.predict(TEACHER, network, x, t, self.unconditional(condition, len(x)))
            return self.model.guide(conditional, unconditional, guidance)

        return route(self.plan.network, call, x, t, condition, present)

    def unconditional(self, condition: Condition, size: int) -> Condition:
        """Returns what `size` samples are told in guidance's other half: the negative prompt, and the same pictures."""
        beside = {name.removeprefix(NEGATIVE): part for name, part in condition.items() if name.startswith(NEGATIVE)}
        return condition | (beside or self.model.batch([self.negative] * size))

    def fake(self, x: Tensor, t: Tensor, condition: Condition, present: Sequence[int] | None = None) -> Tensor:
        """Returns the fake score network's prediction, without guidance. present: see `route`."""
        call = partial(self.roles.predict, FAKE)
        return route(self.plan.network, call, x, t, condition, present)

    def sample_teacher(
        self, noise: Tensor, condition: Condition, steps: int, times: Sequence[float] | None = None
    ) -> Tensor:
        """Runs the teacher's own deterministic sampler on `steps` steps of the plan's shifted grid: x_0 [b, ...].

        times: of the steps, and where the last one ends, in place of that grid.
        """
        times = times or step_times(steps, self.config.plan.shift, self.config.plan.start)
        return self.roll_teacher(times, self.start(noise, times[0]), condition)

    @torch.no_grad()
    def solve_teacher(self, scheduler: Any, noise: Tensor, condition: Condition) -> Tensor:
        """Runs the teacher by a stock scheduler that is set to its steps, as the stock pipeline does: x_0 [b, ...]."""
        x = self.start(noise, float(scheduler.sigmas[0]))
        for timestep in scheduler.timesteps:
            t = (timestep / scheduler.config.num_train_timesteps).expand(len(x))
            x = scheduler.step(self.teacher(x, t, condition), timestep, x, return_dict=False)[0]
        return x

    @torch.no_grad()
    def roll_teacher(self, times: Sequence[float], x: Tensor, condition: Condition) -> Tensor:
        """Runs the teacher's own deterministic sampler along falling times, from x [b, ...] at the first of them."""
        path, model = [Hop(i, t, r) for i, (t, r) in enumerate(itertools.pairwise(times))], self.model
        return rollout(
            lambda _step, x, t: self.teacher(x, t, condition), x, path, model.schedule, model.prediction
        ).x  # fmt: skip
