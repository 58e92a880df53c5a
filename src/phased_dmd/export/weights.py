"""The exported weights: LoRA files as diffusers reads them, full transformers, and a shipped base pipeline."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from phased_dmd.checkpoint import HEADER, write_atomically
from phased_dmd.export.subject import Piece, Subject
from phased_dmd.finished import HEADER_FILE
from phased_dmd.models.source import Source, quiet

A, B = ".lora_A.weight", ".lora_B.weight"


def lora_tensors(subject: Subject, piece: Piece) -> dict[str, Tensor]:
    """The adapter as diffusers names it; the scale alpha / rank is in lora_B, so that any reader's scale is 1."""
    lora = subject.config.generator.lora
    tensors = subject.tensors(piece)
    scaled = {name: t * (lora.alpha / lora.rank) if name.endswith(B) else t for name, t in tensors.items()}
    return {f"transformer.{name}": tensor for name, tensor in scaled.items()}


def save_lora(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], diffusers: bool = True) -> None:
    """A LoRA file with our header and, for diffusers, the adapter's configuration as its loader reads it."""
    metadata = {"format": "pt", HEADER: json.dumps(header, sort_keys=True)}
    if diffusers:
        modules = sorted({name.removeprefix("transformer.").removesuffix(A) for name in tensors if name.endswith(A)})
        adapter = {"r": header["rank"], "lora_alpha": header["alpha"], "target_modules": modules}
        packed = {f"transformer.{key}": value for key, value in adapter.items()}
        metadata["lora_adapter_metadata"] = json.dumps(packed, sort_keys=True)
    ordered = {name: tensors[name].contiguous() for name in sorted(tensors)}
    write_atomically(path, save(ordered, metadata))


@torch.no_grad()
def save_full(subject: Subject, folder: Path) -> None:
    """Each expert as a whole transformer in float32, base and adapter in one, as diffusers saves it."""
    lora = subject.config.generator.lora
    for piece in subject.pieces:
        part = subject.networks[piece.network]
        network = subject.source.load(subject.transformer, part, dtype=torch.float32)
        parameters, tensors = dict(network.named_parameters()), subject.tensors(piece)
        if subject.config.generator.weights == "full":
            for name, tensor in tensors.items():
                parameters[name].copy_(tensor)
        else:
            for name in (name.removesuffix(A) for name in tensors if name.endswith(A)):
                parameters[f"{name}.weight"] += lora.alpha / lora.rank * (tensors[name + B] @ tensors[name + A])
        network.register_to_config(_name_or_path=subject.base or subject.model)  # else the folder it came from
        with quiet():
            network.save_pretrained(folder / piece.file)
        (folder / piece.file / HEADER_FILE).write_text(
            json.dumps(subject.header(piece), sort_keys=True) + "\n", "utf-8"
        )


def copy_base(source: Source, folder: Path) -> None:
    """The complete pipeline of a shipped teacher, whose parts may lie in two folders."""
    folder.mkdir()
    shutil.copy(source.folder / "model_index.json", folder)
    for part, kind in source.index.items():
        if isinstance(kind, list | tuple) and kind[0] is not None:
            shutil.copytree(source.part_folder(part), folder / part)
