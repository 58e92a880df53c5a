"""Packs a frozen base into 8 or 4 bits with bitsandbytes, for runs on one GPU. Its adapters are not quantised."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn

from phased_dmd.errors import UserError


def check_installed() -> None:
    """Raises a UserError without bitsandbytes."""
    if find_spec("bitsandbytes") is None:
        raise UserError("teacher.quantise: needs bitsandbytes: pip install bitsandbytes")


def quantise(
    blocks: Sequence[nn.Module], kind: Literal["int8", "nf4"], compute: torch.dtype, where: torch.device
) -> None:
    """Replaces every linear layer of the blocks, one by one, by a quantised one of the same values on a device.

    What stands around the blocks, embeddings and the last projection, is left as it is, and so are adapters. compute:
    the dtype that nf4 weights are unpacked to. A UserError without bitsandbytes.
    """
    check_installed()
    import bitsandbytes as bnb

    for block in blocks:
        linears = [(name, layer) for name, layer in block.named_modules() if type(layer) is nn.Linear]
        for name, layer in (each for each in linears if ".lora_" not in each[0]):
            shape, bias = (layer.in_features, layer.out_features), layer.bias is not None
            made = (
                bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
                if kind == "int8"
                else bnb.nn.Linear4bit(*shape, bias=bias, compute_dtype=compute, quant_type="nf4")
            )
            made.load_state_dict({key: tensor.cpu() for key, tensor in layer.state_dict().items()})
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, made.to(where).requires_grad_(False))
