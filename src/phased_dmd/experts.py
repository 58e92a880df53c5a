"""Roles on shared networks: the teacher, the fake, and each phase's expert.

A base network is one frozen module. The teacher is that module with every adapter off; a LoRA expert is the same
module with its adapter on; the fake, and full-weight experts, are copies. Which adapter is on is a hidden state of
the module that forward, backward and activation checkpointing all read, so it is changed in one place only:
`Roles.active`, which restores what it found. Run every backward inside the role of its forward.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.functional import delete_adapter, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import Parameter

from phased_dmd.config import Lora
from phased_dmd.engine import seed_of
from phased_dmd.models.protocol import Condition, VelocityModel, rows

TEACHER, FAKE = "teacher", "fake"


def expert_role(phase: int) -> str:
    return f"phase_{phase}"


class Roles:
    """Who computes on which network, and who trains."""

    def __init__(self, model: VelocityModel) -> None:
        self.model = model
        for network in model.students:
            network.requires_grad_(False)
        self._copies: dict[tuple[str, int], nn.Module] = {}
        self._adapters: set[tuple[str, int]] = set()
        self._trainable: set[str] = set()
        self._tuned: list[list[BaseTunerLayer]] = [[] for _ in model.students]  # the layers that carry adapters
        self._on: list[str | None] = [None] * len(model.students)  # the adapter that is on, of each network

    def add(self, role: str, networks: Sequence[int], lora: Lora | None, seed: int, trainable: bool = True) -> None:
        """A new role that computes what the student starts from: a zero-initialised adapter, or a copy (lora None)."""
        for network in networks:
            base = self.model.students[network]
            if lora is None:
                self._copies[role, network] = _bare_copy(base).requires_grad_(trainable)
                continue
            config = LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,  # type: ignore[arg-type] peft takes any number
                target_modules=list(self.model.lora_targets),
            )
            with torch.random.fork_rng(devices=()), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # that is the point
                torch.manual_seed(seed_of(seed, role, network))
                inject_adapter_in_model(config, base, adapter_name=role)
            self._adapters.add((role, network))
            base.requires_grad_(False)
            self._tuned[network] = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
            _switch(self._tuned[network], self._on[network], trainable=self._on[network] in self._trainable)
        for parameter in self.parameters(role).values():  # a step of 1e-6 is lost in half precision
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        if trainable:
            self._trainable.add(role)

    def remove(self, role: str) -> None:
        """Forgets a role, freeing its weights; one whose adapter is on now cannot be removed."""
        if role in self._on:
            raise RuntimeError(f"role {role} is active")
        for network, base in enumerate(self.model.students):
            self._copies.pop((role, network), None)
            if (role, network) in self._adapters:
                self._adapters.remove((role, network))
                delete_adapter(base, role, prefix="lora_")
        self._trainable.discard(role)

    def freeze(self, role: str) -> None:
        """From now on the role computes but never trains."""
        self._trainable.discard(role)
        for parameter in self.parameters(role).values():
            parameter.requires_grad_(False)
            parameter.grad = None

    @contextmanager
    def active(self, role: str) -> Iterator[None]:
        """The role's adapters on and all others off, on every network; on the way out, whatever was on before."""
        if role != TEACHER and not any(key[0] == role for key in (*self._adapters, *self._copies)):
            raise KeyError(f"there is no role {role}")
        before = list(self._on)
        self._set([role if (role, network) in self._adapters else None for network in range(len(before))])
        try:
            yield
        finally:
            self._set(before)

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
        """A copy of the role's parameters on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters(role).items()}

    @torch.no_grad()
    def load(self, role: str, tensors: dict[str, Tensor]) -> None:
        """Overwrites all of the role's parameters; a missing or surplus name, or another shape, is a KeyError."""
        parameters = self.parameters(role)
        if parameters.keys() != tensors.keys():
            odd = sorted(parameters.keys() ^ tensors.keys())
            raise KeyError(f"{role}: {len(odd)} tensors missing or surplus, the first {odd[0]}")
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise KeyError(f"{role}: {name} is {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}")
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])

    def _set(self, adapters: list[str | None]) -> None:
        for network, adapter in enumerate(adapters):
            if adapter != self._on[network]:
                _switch(self._tuned[network], adapter, trainable=adapter in self._trainable)
                self._on[network] = adapter


def _bare_copy(base: nn.Module) -> nn.Module:
    """A copy of the base without its adapters."""
    bare = copy.deepcopy(base)
    for name, module in list(bare.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(bare.get_submodule(parent), child, module.get_base_layer())
    return bare


def _switch(layers: list[BaseTunerLayer], adapter: str | None, trainable: bool) -> None:
    """peft thaws any adapter it activates unless told not to. With no adapter on, the base computes, bit for bit."""
    for layer in layers:
        layer.set_adapter([] if adapter is None else [adapter], inference_mode=not trainable)


def route(
    networks: Sequence[int],
    call: Callable[[int, Tensor, Tensor, Condition], Tensor],
    x: Tensor,
    t: Tensor,
    condition: Condition,
) -> Tensor:
    """A prediction for a batch whose samples belong to different networks: networks[i] serves sample i."""
    present = sorted(set(networks))
    if len(present) == 1:
        return call(present[0], x, t, condition)
    owner = torch.tensor(networks, device=x.device)
    parts = [(owner == network).nonzero().squeeze(1) for network in present]
    outputs = [
        call(network, x[index], t[index], rows(condition, index)) for network, index in zip(present, parts, strict=True)
    ]
    order = torch.cat(parts).argsort()
    return torch.cat(outputs)[order]
