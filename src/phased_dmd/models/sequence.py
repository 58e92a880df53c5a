"""Shares one sample among several processes: Ulysses, through the context-parallel hooks of diffusers."""

import math
from collections.abc import Sequence

from diffusers import ContextParallelConfig, WanTransformer3DModel
from torch import Tensor, nn

from phased_dmd.engine.world import sequence_mesh
from phased_dmd.errors import UserError
from phased_dmd.models.source import quiet


def split_sequences(network: nn.Module, shapes: Sequence[tuple[int, ...]], ways: int) -> None:
    """Makes `ways` neighbouring processes, which are given the same samples, share the work of each.

    Every one of them has the whole output, and gradients that add up to those of one process. A UserError where a
    length cannot be divided: there the hooks have no backward. shapes: of the latents.
    """
    if not isinstance(network, WanTransformer3DModel):
        raise UserError("engine.sequence_parallel: only Wan's transformers are known to train with it")
    heads, patch = network.config["num_attention_heads"], math.prod(network.config["patch_size"])
    if heads % ways:
        raise UserError(f"engine.sequence_parallel: {heads} attention heads cannot be shared by {ways} processes")
    for i, shape in enumerate(shapes):
        if (tokens := math.prod(shape[1:]) // patch) % ways:
            raise UserError(f"teacher.sizes.{i}: {tokens} tokens cannot be shared by {ways} processes")
    with quiet():  # that the feature is experimental: test_distributed.py holds its gradients to one process's
        network.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ways, mesh=sequence_mesh(ways)))
    for name, module in network.named_modules():
        if name.rpartition(".")[2] in ("norm_q", "norm_k", "norm_added_k"):
            module.register_forward_hook(_keep_dtype)


def _keep_dtype(_: nn.Module, given: tuple[Tensor, ...], normed: Tensor) -> Tensor:
    """Returns what a norm in front of attention made in the dtype that it was given.

    On CUDA autocast makes it float32, and attention casts queries and keys to the values' dtype. In backward the hooks
    call attention once more, where there is no autocast.
    """
    return normed.to(given[0].dtype)
