"""What a role trains: a LoRA adapter injected into a network, or a copy of the network."""

import copy
import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from peft import LoraConfig
from peft.functional import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor

from phased_dmd.config import Lora


def copy_network(
    outline: nn.Module, network: nn.Module, shard: Callable[[nn.Module, torch.dtype | None], None]
) -> nn.Module:
    """Returns a copy of a network without its adapters, in float32 at least: a step of 1e-6 is lost in half precision.

    outline: the copy to be, without values, see `without_adapters`. shard: called with the copy, while its parameters
    have no values yet, and the dtype that its blocks compute in where that is not their own.
    """
    made = copy.deepcopy(outline)
    dtypes, trained = {p.dtype for p in made.parameters()}, trained_dtype(made)
    for p in made.parameters():
        p.data = p.data.to(trained)
    shard(made, torch.bfloat16 if torch.bfloat16 in dtypes else None)
    values = {name.replace(".base_layer", ""): p for name, p in network.named_parameters()}
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(values[name])  # shard by shard
    return made


def add_adapter(network: nn.Module, name: str, lora: Lora, targets: Sequence[str], seed: int) -> None:
    """Injects an adapter that changes nothing yet (its B is zero) and that does not train; a sharded network can take
    none, which is a RuntimeError.

    targets: the ends of the names of the layers that it adapts.
    """
    if any(isinstance(p, DTensor) for p in network.parameters()):
        raise RuntimeError(f"{name}: an adapter cannot follow once its network is sharded")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type] peft takes any number
        target_modules=list(targets),
    )
    trained = [p for p in network.parameters() if p.requires_grad]
    dtype = trained_dtype(network)  # of the base, not of what peft made: that differs where the base has no values
    with torch.random.fork_rng(devices=()), warnings.catch_warnings():  # peft draws A from torch's global generator
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # that is the point
        torch.manual_seed(seed)
        inject_adapter_in_model(config, network, adapter_name=name)
    network.requires_grad_(False)  # peft thaws what it adds
    for p in trained:
        p.requires_grad_()
    for parameter_name, p in network.named_parameters():
        if f".{name}." in parameter_name:
            p.data = p.data.to(dtype)


def without_adapters(network: nn.Module) -> nn.Module:
    """Takes off the adapters that an earlier run may have left on a network, in place; returns the network."""
    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, module.get_base_layer())
    return network


def trained_dtype(network: nn.Module) -> torch.dtype:
    """Returns the dtype of what trains on a network: float32, or the widest that the network has itself."""
    dtypes = {p.dtype for p in network.parameters() if p.is_floating_point()}
    return functools.reduce(torch.promote_types, dtypes, torch.float32)
