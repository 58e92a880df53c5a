"""Roles on shared networks: the teacher, the fake, and each phase's expert.

A base network is one frozen module. The teacher is that module with every adapter off; a LoRA expert is the same
module with its adapter on; the fake, and full-weight experts, are copies. Which adapter is on is a hidden state of
the module that forward, backward and activation checkpointing all read, so it is changed in one place only:
`Roles.active`, which restores what it found. Run every backward inside the role of its forward. Which parameters
train is another matter, and does not change with it: see `Roles.train` and `freeze`.
"""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.functional import delete_adapter, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from phased_dmd.config import Engine, Lora
from phased_dmd.engine.randomness import seed_of
from phased_dmd.engine.sharding import copy_full_tensors, full_tensor, meta_copy, parallelise
from phased_dmd.models.protocol import Condition, VelocityModel, rows
from phased_dmd.models.sequence import split_sequences

TEACHER, FAKE = "teacher", "fake"


def expert_role(phase: int) -> str:
    return f"phase_{phase}"


class Roles:
    """Who computes on which network, and who trains."""

    def __init__(self, model: VelocityModel) -> None:
        self.model = model
        for network in (*model.networks, *model.students):
            network.requires_grad_(False)
        self._outlines = [_bare(meta_copy(network)) for network in model.students]  # of copies
        self._engine = Engine()
        self._copies: dict[tuple[str, int], nn.Module] = {}
        self._adapters: set[tuple[str, int]] = set()
        self._tuned: list[list[LoraLayer]] = [[] for _ in model.students]  # the layers that carry adapters
        self._on: list[str | None] = [None] * len(model.students)  # the adapter that is on, of each network

    def spread(self, engine: Engine) -> None:
        """Spreads the networks over the processes, with the adapters that they carry by then: none can follow."""
        self._engine = engine
        for network in {id(network): network for network in (*self.model.networks, *self.model.students)}.values():
            self._spread(network)

    def _spread(self, network: nn.Module, compute: torch.dtype | None = None) -> None:
        if self._engine.sequence_parallel > 1:
            split_sequences(network, self.model.sample_shapes, self._engine.sequence_parallel)
        parallelise(network, self.model.blocks(network), self._engine, compute)

    def has(self, role: str) -> bool:
        return any(key[0] == role for key in (*self._adapters, *self._copies))

    def add(self, role: str, networks: Sequence[int], lora: Lora | None, seed: int, trainable: bool = True) -> None:
        """A new role that computes what the student starts from: a zero-initialised adapter, or a copy (lora None)."""
        for network in networks:
            if lora is None:
                self._copies[role, network] = self._copy(network)
            else:
                self._adapt(role, network, lora, seed_of(seed, role, network))
        if trainable:
            self.train(role)

    def _copy(self, network: int) -> nn.Module:
        """A copy of the base without its adapters, in float32 at least: a step of 1e-6 is lost in half precision."""
        made = copy.deepcopy(self._outlines[network])
        dtypes, trained = {p.dtype for p in made.parameters()}, _trained_dtype(made)
        for p in made.parameters():
            p.data = p.data.to(trained)
        self._spread(made, torch.bfloat16 if torch.bfloat16 in dtypes else None)
        base = {name.replace(".base_layer", ""): p for name, p in self.model.students[network].named_parameters()}
        with torch.no_grad():
            for name, p in made.named_parameters():
                p.copy_(base[name])  # shard by shard
        return made

    def _adapt(self, role: str, network: int, lora: Lora, seed: int) -> None:
        if any(isinstance(p, DTensor) for p in self.model.students[network].parameters()):
            raise RuntimeError(f"{role}: an adapter cannot follow once its network is sharded")
        base, config = (
            self.model.students[network],
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,  # type: ignore[arg-type] peft takes any number
                target_modules=list(self.model.lora_targets),
            ),
        )
        trained = [p for p in base.parameters() if p.requires_grad]
        dtype = _trained_dtype(base)  # of the base, not of what peft made: that differs where the base has no values
        with torch.random.fork_rng(devices=()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # that is the point
            torch.manual_seed(seed)
            inject_adapter_in_model(config, base, adapter_name=role)
        self._adapters.add((role, network))
        base.requires_grad_(False)  # peft thaws what it adds
        for p in trained:
            p.requires_grad_()
        self._tuned[network] = [module for module in base.modules() if isinstance(module, LoraLayer)]
        _switch(self._tuned[network], self._on[network])
        for p in self.parameters(role).values():
            p.data = p.data.to(dtype)

    def train(self, role: str) -> None:
        """From now on the role trains."""
        for parameter in self.parameters(role).values():
            parameter.requires_grad_()

    def remove(self, role: str) -> None:
        """Forgets a role, freeing its weights; one whose adapter is on now cannot be removed."""
        if role in self._on:
            raise RuntimeError(f"role {role} is active")
        for network, base in enumerate(self.model.students):
            self._copies.pop((role, network), None)
            if (role, network) in self._adapters:
                self._adapters.remove((role, network))
                delete_adapter(base, role, prefix="lora_")

    def freeze(self, role: str) -> None:
        """From now on the role computes but never trains."""
        for parameter in self.parameters(role).values():
            parameter.requires_grad_(False)
            parameter.grad = None

    @contextmanager
    def active(self, role: str) -> Iterator[None]:
        """The role's adapters on and all others off, on every network; on the way out, whatever was on before."""
        if role != TEACHER and not self.has(role):
            raise KeyError(f"there is no role {role}")
        before = list(self._on)
        self._set([role if (role, network) in self._adapters else None for network in range(len(before))])
        try:
            yield
        finally:
            self._set(before)

    @contextmanager
    def following(self, expert: str, share: float) -> Iterator[None]:
        """Afterwards the fake's copies have made a share of the change that the expert's weights went through."""
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
        """The role's native prediction on one network, x [b, ...], t [b]."""
        with self.active(role):
            return self.model.predict(self.module(role, network), x, t, condition)

    def module(self, role: str, network: int) -> nn.Module:
        """The module to call, inside `active(role)`."""
        if role == TEACHER:
            return self.model.networks[network]
        if (role, network) in self._copies:
            return self._copies[role, network]
        if (role, network) not in self._adapters:
            raise KeyError(f"no {role} on network {network}")
        return self.model.students[network]

    def parameters(self, role: str) -> dict[str, Parameter]:
        """The role's own parameters, named `<network>.<name in the module>`, the adapter's name left out."""
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
        """A copy of the role's parameters on the CPU, gathered from their shards."""
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


def _trained_dtype(network: nn.Module) -> torch.dtype:
    """Of what trains on a network: float32, or the widest that it has itself."""
    dtypes = {p.dtype for p in network.parameters() if p.is_floating_point()}
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def _bare(network: nn.Module) -> nn.Module:
    """The network without adapters, which an earlier run may have left on it."""
    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, module.get_base_layer())
    return network


def _switch(layers: list[LoraLayer], adapter: str | None) -> None:
    """With no adapter on, the base computes, bit for bit.

    peft's own `set_adapter` also freezes and thaws every adapter of the layer, at a tenth of a small network's time.
    """
    active = [] if adapter is None else [adapter]
    for layer in layers:
        layer._active_adapter = active


def route(
    networks: Sequence[int],
    call: Callable[[int, Tensor, Tensor, Condition], Tensor],
    x: Tensor,
    t: Tensor,
    condition: Condition,
    present: Sequence[int] | None = None,
) -> Tensor:
    """A prediction for a batch whose samples belong to different networks: networks[i] serves sample i.

    present: the networks that any process's samples belong to. Sharded networks are called by all processes or none:
    where one has no sample of its own here, it is called on the first sample, to no effect.
    """
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
