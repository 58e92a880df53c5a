"""The architectures of the recipes' bases, and networks without weights: for what must run offline or load nothing."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import ModelMixin, no_init_weights
from torch import nn

SHIPPED = Path(__file__).parents[1] / "assets" / "architectures"


def architecture(path: str) -> Path | None:
    """The shipped folder of a hub id: each part's configuration, as on the hub, and no weights; None if unknown."""
    folders = {f"{index.parts[-3]}/{index.parts[-2]}": index.parent for index in SHIPPED.glob("*/*/model_index.json")}
    return folders.get(path)


def skeleton(kind: type[ModelMixin], config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """The model that `kind.from_pretrained(folder, dtype=dtype)` gives, its parameters on the meta device.

    Buffers and plain attributes are real. As there, what the class keeps in float32 is float32 whatever the dtype.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model: nn.Module = kind.from_config(config)  # type: ignore[attr-defined] every model is a ConfigMixin too
    finally:
        torch.set_default_dtype(before)
    kept = set(kind._keep_in_fp32_modules or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype if kept.isdisjoint(name.split(".")) else torch.float32)
    return model.eval()
