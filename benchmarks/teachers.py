"""Teachers with random weights: nano's folder with another transformer, so that nothing is downloaded."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from phased_dmd.models.source import ASSETS, quiet

TWENTY_MILLION = {"num_layers": 8, "num_attention_heads": 6, "attention_head_dim": 64, "ffn_dim": 1536}


def make_teacher(folder: Path, shape: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """A pipeline's folder, unless it is there. shape: fields of the transformer's config that differ from nano's."""
    if (folder / "model_index.json").exists():
        return
    nano = json.loads((ASSETS / "nano" / "transformer" / "config.json").read_text("utf-8"))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(ASSETS / "nano", partial, ignore=shutil.ignore_patterns("transformer"))
    torch.manual_seed(0)
    with quiet():
        network = WanTransformer3DModel.from_config({**nano, **shape, "text_dim": nano["text_dim"]}).to(dtype)
    network.save_pretrained(partial / "transformer")
    partial.replace(folder)
