"""Makes a network ready to run: shards it (FSDP2), and has its blocks recomputed in backward, or compiled.

FSDP2 keeps a shard of each parameter in every process, a DTensor, and gathers the parameters of one group, a block or
a module that stands around the blocks, while they are used. What is trained in a group has one dtype: adapters in
float32 stand in the group of their frozen bfloat16 block; a copy in float32 computes in the dtype of the network it
copies.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from phased_dmd.config import Engine
from phased_dmd.engine.collectives import run_on_first_rank
from phased_dmd.engine.world import device, mesh, rank, sharded

VARIANTS = 64  # of a compiled block: a shape each, with and without gradient, with each adapter and without


def meta_copy(network: nn.Module) -> nn.Module:
    """Copies a network, but its parameters as ones without values, on the meta device."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in network.parameters()
    }
    return copy.deepcopy(network, empty)  # type: ignore[arg-type] what deepcopy finds here it takes for copied


def parallelise(
    network: nn.Module, blocks: Sequence[nn.Module], engine: Engine, compute: torch.dtype | None = None
) -> None:
    """Shards a network's parameters if there is a group, and has its blocks recomputed or compiled as asked.

    Sharded parameters have the first process's values; a meta copy's are left unset. compute: the dtype that the
    blocks' parameters are gathered in, their own if None.
    """
    around = _around(network, blocks)
    if engine.activation_checkpointing:  # a graph of what stands around would keep autocast's copies of its weights
        for module in (*blocks, *around):
            recompute(module)
    has_values = run_on_first_rank(lambda: not any(p.is_meta for p in network.parameters()))
    if sharded():
        values = dict(network.named_parameters())
        _shard(network, blocks, around, engine, compute)
        if has_values:
            copy_full_tensors(dict(network.named_parameters()), values)
    elif not has_values:
        _allocate(network, device(), dict(network.named_buffers()))
    if engine.compile:
        torch._dynamo.config.recompile_limit = VARIANTS
        for block in blocks:
            block.compile()


def _around(network: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Returns the children of a network that have parameters and hold no block; each must be called as a module."""
    inside = {id(block) for block in blocks}
    return [
        child
        for child in network.children()
        if type(child).forward is not nn.Module.forward  # a list of modules is none
        and next(child.parameters(), None) is not None
        and inside.isdisjoint(map(id, child.modules()))
    ]


def _shard(
    network: nn.Module, blocks: Sequence[nn.Module], around: Sequence[nn.Module], engine: Engine,
    compute: torch.dtype | None,
) -> None:  # fmt: skip
    buffers = dict(network.named_buffers())
    network.to("meta")
    offload = CPUOffloadPolicy(pin_memory=device().type != "cpu") if engine.offload else OffloadPolicy()
    for block in blocks:
        policy = MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch.float32 if compute else None, cast_forward_inputs=False
        )
        fully_shard(block, mesh=mesh(engine.replicas), mp_policy=policy, offload_policy=offload)
    # What stands around the blocks is let go like them, or 1.4 GB of Wan 14B would be whole all through a backward.
    for module in around:
        fully_shard(module, mesh=mesh(engine.replicas), offload_policy=offload)
    # The network's own parameters are let go after each call too: between calls every parameter is its shard.
    fully_shard(network, mesh=mesh(engine.replicas), offload_policy=offload, reshard_after_forward=True)
    _allocate(network, torch.device("cpu") if engine.offload else device(), buffers)


def _allocate(network: nn.Module, where: torch.device, buffers: Mapping[str, Tensor]) -> None:
    """Gives parameters memory without setting it; the buffers have these values, on the device that computes."""
    network.to_empty(device=where)
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, buffer.to(device()))


def recompute(block: nn.Module) -> None:
    """Has the block keep only its inputs for backward; without gradient it runs as it is."""
    forward = block.forward

    def recomputed(*args: Any, **more: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **more)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **more)

    block.forward = recomputed


@torch.no_grad()
def copy_full_tensors(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies full tensors into parameters by name; into sharded ones, those of the first process."""
    for name, p in parameters.items():
        if not isinstance(p, DTensor):
            p.copy_(values[name])
            continue
        value = torch.empty(p.shape, dtype=p.dtype, device=p.device_mesh.device_type)
        if rank() == 0:
            value.copy_(values[name])
        p.copy_(distribute_tensor(value, p.device_mesh, p.placements))


def full_tensor(tensor: Tensor) -> Tensor:
    """Copies a tensor, gathered from its shards, to the first process's CPU; returns one without values (meta) in every
    other process, which drops what it has gathered, and where the tensor has none itself.
    """
    if tensor.is_meta:
        return tensor
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().clone() if rank() == 0 else torch.empty_like(full, device="meta")
