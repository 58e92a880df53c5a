"""A fused export is a whole pipeline: the experts merged into full transformers, the base's other parts beside them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phased_dmd.export.exported_run import PARTS, ExportedRun
from phased_dmd.export.lora import A, B
from phased_dmd.models.source import quiet
from phased_dmd.sampling.loading import HEADER_FILE


def save_fused(run: ExportedRun, folder: Path) -> None:
    """Writes a folder that `DiffusionPipeline.from_pretrained` takes."""
    save_transformers(run, folder)
    copy_parts(run, folder, without=(*PARTS, "scheduler"))
    scheduler = nearest_scheduler(run)
    with quiet():
        scheduler.save_pretrained(folder / "scheduler")
    parts = [expert.part for expert in run.experts]
    kind = ["diffusers", run.adapter.transformer.__name__]
    index = run.source.index | {"_class_name": run.pipeline, "scheduler": ["diffusers", type(scheduler).__name__]}
    index |= run.adapter.stock.flags
    if grid := run.adapter.stock.grid:
        index[grid] = evenly_spaced(run).tolist()
    if run.adapter.places > 1:
        index |= {part: kind if part in parts else [None, None] for part in PARTS}
        index["boundary_ratio"] = run.boundary_ratio
    index["dmd2_config"] = {  # for vLLM-Omni, whose few-step pipelines read it
        "num_inference_steps": run.plan.num_steps, "denoising_timesteps": [1000 * t for t in run.plan.times[:-1]],
        "solver": "sde" if run.stochastic else "ode", "guidance_scale": 1.0,
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def copy_parts(run: ExportedRun, folder: Path, without: tuple[str, ...] = ()) -> None:
    """Copies the parts of the base's pipeline, which may lie in two folders."""
    for part in run.source.index:
        if part not in without and run.source.has(part):
            shutil.copytree(run.source.part_folder(part), folder / part)


@torch.no_grad()
def save_transformers(run: ExportedRun, folder: Path) -> None:
    """Writes each expert as a whole transformer in the export's dtype, its adapter merged into the base in float32."""
    lora = run.config.generator.lora
    for expert in run.experts:
        network = run.source.load(run.adapter.transformer, run.networks[expert.network], dtype=torch.float32)
        parameters, tensors = dict(network.named_parameters()), run.tensors(expert)
        for name, tensor in tensors.items():
            if run.config.generator.weights == "full":
                parameters[name].copy_(tensor)
            elif name.endswith(A):
                module = name.removesuffix(A)
                parameters[f"{module}.weight"] += lora.alpha / lora.rank * (tensors[module + B] @ tensor)
        network.register_to_config(_name_or_path=run.base or run.model)  # else the folder that it came from
        with quiet():
            network.to(run.dtype).save_pretrained(folder / expert.file)
        header = json.dumps(run.header(expert), sort_keys=True)
        (folder / expert.file / HEADER_FILE).write_text(f"{header}\n", "utf-8")


def nearest_scheduler(run: ExportedRun) -> Any:
    """Returns the stock scheduler whose configuration alone brings a stock pipeline nearest to the trained times."""
    return run.adapter.stock.scheduler(run.config.plan.shift, run.plan.num_steps, run.stochastic)


def evenly_spaced(run: ExportedRun) -> np.ndarray:
    """Returns the times that stock pipelines hand to their schedulers, before these shift them."""
    return np.linspace(1, 1 / run.plan.num_steps, run.plan.num_steps)


def stock_times(run: ExportedRun) -> tuple[list[float], float]:
    """Returns the times that a stock pipeline runs at with that scheduler, and their largest gap to the trained ones.

    The noise levels and the times that the network is told need not agree; the gap is that of the farther ones.
    """
    scheduler = nearest_scheduler(run)
    steps, trained = run.plan.num_steps, torch.tensor(run.plan.times[:-1], dtype=torch.float64)
    options: dict[str, Any] = {}
    if run.adapter.stock.passes_sigmas:
        options = {"sigmas": evenly_spaced(run), "mu": math.log(run.config.plan.shift)}  # as it does
    scheduler.set_timesteps(steps, **options)
    levels = torch.as_tensor(scheduler.sigmas, dtype=torch.float64)[:-1]
    told = torch.as_tensor(scheduler.timesteps, dtype=torch.float64) / 1000
    return levels.tolist(), torch.stack([levels - trained, told - trained]).abs().max().item()
