"""What a plan asks of models without weights: of the conditions that they take, and of bytes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from phased_dmd.config import Config
from phased_dmd.config.teacher import AnalyticTeacher, OwnTeacher
from phased_dmd.errors import UserError
from phased_dmd.models import loader
from phased_dmd.models.protocol import Condition, VelocityModel
from phased_dmd.models.source import META

__all__ = ["META", "bare_model", "bytes_of", "condition_of", "image_shapes", "largest", "text_width"]


def bare_model(config: Config) -> VelocityModel:
    """The teacher with all but its weights, checked against the sizes; what cannot be is a UserError."""
    if isinstance(config.teacher, OwnTeacher):
        raise UserError("teacher.kind: own has no plan, since its model is given from Python")
    return loader.bare_model(config.teacher, config.seed)


def text_width(network: nn.Module) -> int:
    """Numbers a token of the text that a network is told; 0 for one without."""
    config: Any = network.config if isinstance(network, ModelMixin) else {}
    return config.get("text_dim") or config.get("joint_attention_dim") or 0


def image_shapes(network: nn.Module, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """What a first frame adds to a sample's condition: see `WanModel`; empty for text-to-anything."""
    config: Any = network.config if isinstance(network, ModelMixin) else {}
    if config.get("text_dim") is None or config["in_channels"] == config["out_channels"]:
        return {}
    shapes = {"image": (config["in_channels"] - config["out_channels"], *shape[1:])}
    if config["image_dim"] is not None:
        shapes["image_features"] = (257, config["image_dim"])  # CLIP's: 16 x 16 patches and the class
    return shapes


def condition_of(config: Config, network: nn.Module, shape: Sequence[int], batch: int, dtype: torch.dtype) -> Condition:
    """A batched condition of the longest prompts, on the default device."""
    if isinstance(config.teacher, AnalyticTeacher | OwnTeacher):
        return {}
    condition = {"text": torch.zeros(batch, config.teacher.max_tokens, text_width(network), dtype=dtype)}
    for name, more in image_shapes(network, shape).items():
        condition[name] = torch.zeros(batch, *more, dtype=torch.float32 if name == "image" else dtype)
    return condition


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def largest(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The resolution bucket of the most latents."""
    return max(shapes, key=math.prod)
