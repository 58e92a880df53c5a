"""An expert's LoRA file has the layout that diffusers, ComfyUI and every other reader that was tried take.

That is the module's name in the original checkpoint behind a prefix, `diffusion_model.` for most, then `lora_A` or
`lora_B`, alpha / rank in the latter: for any reader the scale is 1.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from phased_dmd.checkpoint import HEADER, write_atomically
from phased_dmd.errors import UserError
from phased_dmd.export.exported_run import ExportedExpert, ExportedRun, format_times

A, B = ".lora_A.weight", ".lora_B.weight"


def save_lora(run: ExportedRun, expert: ExportedExpert, path: Path) -> None:
    """Writes an expert's LoRA file; the same expert gives the same bytes in every process."""
    tensors = {original_name(run, name): tensor for name, tensor in run.tensors(expert, written=True).items()}
    ordered = {name: tensors[name].contiguous() for name in sorted(tensors)}
    about = {"format": "pt", HEADER: json.dumps(run.header(expert), sort_keys=True)} | model_spec(run, expert)
    write_atomically(path, with_sorted_header(save(ordered, about)))


def original_name(run: ExportedRun, name: str) -> str:
    """Returns an adapter's key as the file has it; raises UserError for a module that other programs do not know."""
    adapter, (module, _, side) = run.adapter, name.partition(".lora_")
    key = module
    for pattern, original in adapter.original:
        key = re.sub(pattern, original, key)
    if adapter.public is not None and not re.fullmatch(adapter.public, key):
        raise UserError(f"teacher.lora_targets: the original checkpoint has no name for {module}; export with --fused")
    return f"{adapter.prefix}{key}.lora_{side}"


def model_spec(run: ExportedRun, expert: ExportedExpert) -> dict[str, str]:
    """Returns what browsers of models show of a file, by modelspec's keys; a date would change the bytes."""
    size = run.teacher.sizes[0]
    steps = " and ".join(str(step + 1) for step in expert.steps)
    times = format_times(run.plan.times[:-1])
    hint = (
        f"{run.plan.num_steps} steps at {times}, guidance 1, strength 1; this file makes step {steps}, on the base's "
        f"{expert.part}"
    )
    return {
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"{run.model}/lora",
        "modelspec.implementation": "diffusers", "modelspec.title": path_stem(expert), "modelspec.license": run.licence,
        "modelspec.resolution": f"{size.width}x{size.height}", "modelspec.usage_hint": hint,
    }  # fmt: skip


def path_stem(expert: ExportedExpert) -> str:
    return expert.file.removesuffix(".safetensors")


def with_sorted_header(data: bytes) -> bytes:
    """Returns a safetensors file with its header's keys in order: the library writes those of its metadata in any."""
    length = int.from_bytes(data[:8], "little")
    header: Mapping[str, Any] = json.loads(data[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
