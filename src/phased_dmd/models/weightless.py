"""Models without weights: from a folder's configurations or the shipped architectures, for what loads nothing."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from phased_dmd.config.teacher import PipelineTeacher
from phased_dmd.errors import UserError
from phased_dmd.models.architectures import architecture, skeleton
from phased_dmd.models.source import Source, quiet

META = torch.device("meta")


class BareSource(Source):
    """A pipeline's folder of which no weight is read: its networks are on the meta device.

    look: whether a folder of this machine must hold all that a run reads; else its configurations are enough.
    """

    def __init__(self, teacher: PipelineTeacher, look: bool = False) -> None:
        super().__init__(teacher)
        self.look = look

    @cached_property
    def folder(self) -> Path:
        if self.on_disk:
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

    def check_weights(self, name: str) -> None:
        if self.look and self.on_disk:
            super().check_weights(name)

    def load(self, kind: type, name: str, **options: Any) -> Any:
        """A skeleton; of a tokenizer, itself, or None where the folder is not on this machine."""
        if not issubclass(kind, nn.Module):
            return super().load(kind, name, **options) if self.on_disk else None
        self.check_weights(name)
        config = self.config(kind, name)
        try:
            with quiet():
                return skeleton(kind, config, options["dtype"]).requires_grad_(False)  # type: ignore[arg-type] of diffusers
        except Exception as error:  # what a class makes of another's configuration
            raise UserError(
                f"teacher.path: {self.part_folder(name)} makes no {kind.__name__}: {' '.join(str(error).split())}"
            ) from error
