"""Models without weights: what a plan is made of, from the shipped architectures or a folder's configurations."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from phased_dmd.config import AnalyticTeacher, Config, OwnTeacher, QwenImageTeacher, UserError, WanTeacher
from phased_dmd.models.architectures import architecture, skeleton
from phased_dmd.models.protocol import Condition, VelocityModel
from phased_dmd.models.source import SHIPPED, Source, quiet

META = torch.device("meta")


class BareSource(Source):
    """A pipeline's folder of which the configurations alone are read: its networks are on the meta device."""

    @cached_property
    def folder(self) -> Path:
        if self.path in SHIPPED or Path(self.path).exists():
            return super().folder
        if shipped := architecture(self.path):
            return shipped
        try:
            return Path(snapshot_download(self.path, revision=self.revision, allow_patterns=["*.json"]))
        except (OSError, ValueError) as error:
            raise UserError(
                f"teacher.path: {self.path} is no folder and no shipped architecture, and its configuration cannot be "
                "had from the hub"
            ) from error

    def load(self, kind: type, name: str, **options: Any) -> Any:
        with quiet():
            return skeleton(kind, self.config(kind, name), options["dtype"]).requires_grad_(False)


def bare_model(config: Config) -> VelocityModel:
    """The teacher with all but its weights, checked against the sizes; what cannot be is a UserError."""
    try:
        match config.teacher:
            case AnalyticTeacher():
                from phased_dmd.models.analytic import AnalyticModel

                return AnalyticModel(config.teacher, config.seed, fit=False)
            case WanTeacher():
                from phased_dmd.models import wan

                with _bare(wan):
                    return wan.WanModel(config.teacher, META)
            case QwenImageTeacher():
                from phased_dmd.models import qwen_image

                with _bare(qwen_image):
                    return qwen_image.QwenImageModel(config.teacher, META)
            case OwnTeacher():
                raise UserError("teacher.kind: own has no plan, since its model is given from Python")
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"teacher: {' '.join(str(error).split())}") from error


@contextmanager
def _bare(module: ModuleType) -> Iterator[None]:
    """Within it the module's models are built from a `BareSource`."""
    module.Source = BareSource  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.Source = Source  # type: ignore[attr-defined]


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
