"""An export for diffusers has weights as it reads them, the nearest stock scheduler, and a script."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors.torch import save
from torch import Tensor

from phased_dmd.checkpoint import HEADER, write_atomically
from phased_dmd.export.exported_run import ExportedExpert, ExportedRun
from phased_dmd.models.source import quiet
from phased_dmd.sampling.loading import HEADER_FILE

TRANSFORMERS = {"wan": WanTransformer3DModel, "qwen-image": QwenImageTransformer2DModel}
TEMPLATES = Path(__file__).parents[1] / "assets" / "export"
A, B = ".lora_A.weight", ".lora_B.weight"
Scheduler = UniPCMultistepScheduler | FlowMatchEulerDiscreteScheduler


def write_diffusers(run: ExportedRun, folder: Path) -> tuple[str, list[float], float]:
    """Writes the weights, `sample.py`, the nearest stock scheduler and, for a shipped teacher, the base pipeline.

    Returns the scheduler's name, the times that a stock pipeline runs at with it, and their largest gap to the
    trained ones.
    """
    if run.fused:
        save_full(run, folder)
    else:
        for expert in run.experts:
            tensors, rank = lora_tensors(run, expert), run.config.generator.lora.rank
            modules = sorted(name.removeprefix("transformer.").removesuffix(A) for name in tensors if name.endswith(A))
            adapter = {"transformer.r": rank, "transformer.lora_alpha": rank, "transformer.target_modules": modules}
            metadata = {"lora_adapter_metadata": json.dumps(adapter, sort_keys=True)}  # where diffusers looks for it
            save_lora(folder / expert.file, tensors, run.header(expert), metadata)
    if run.base_is_shipped:  # its parts may lie in two folders
        (folder / "base").mkdir()
        shutil.copy(run.source.folder / "model_index.json", folder / "base")
        for part, kind in run.source.index.items():
            if isinstance(kind, list | tuple) and kind[0] is not None:
                shutil.copytree(run.source.part_folder(part), folder / "base" / part)
    scheduler = nearest_scheduler(run)
    with quiet():
        scheduler.save_pretrained(folder / "scheduler")
    (folder / "sample.py").write_text(render(run, "sample.py.j2"), "utf-8")
    return type(scheduler).__name__, *stock_times(run, scheduler)


def lora_tensors(run: ExportedRun, expert: ExportedExpert) -> dict[str, Tensor]:
    """Returns the adapter by diffusers' names, with its scale alpha / rank in lora_B: for any reader the scale is 1."""
    scale = run.config.generator.lora.alpha / run.config.generator.lora.rank
    tensors = run.tensors(expert)
    return {f"transformer.{name}": t * scale if name.endswith(B) else t for name, t in tensors.items()}


def save_lora(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a LoRA file with the header of this package, and further metadata."""
    ordered = {name: tensors[name].contiguous() for name in sorted(tensors)}
    own = {"format": "pt", HEADER: json.dumps(header, sort_keys=True)}
    write_atomically(path, save(ordered, own | dict(metadata or {})))


@torch.no_grad()
def save_full(run: ExportedRun, folder: Path) -> None:
    """Writes each expert as a whole transformer in float32, its adapter merged into the base."""
    lora = run.config.generator.lora
    for expert in run.experts:
        network = run.source.load(TRANSFORMERS[run.teacher.kind], run.networks[expert.network], dtype=torch.float32)
        parameters, tensors = dict(network.named_parameters()), run.tensors(expert)
        for name, tensor in tensors.items():
            if run.config.generator.weights == "full":
                parameters[name].copy_(tensor)
            elif name.endswith(A):
                module = name.removesuffix(A)
                parameters[f"{module}.weight"] += lora.alpha / lora.rank * (tensors[module + B] @ tensor)
        network.register_to_config(_name_or_path=run.base or run.model)  # else the folder that it came from
        with quiet():
            network.save_pretrained(folder / expert.file)
        header = json.dumps(run.header(expert), sort_keys=True)
        (folder / expert.file / HEADER_FILE).write_text(f"{header}\n", "utf-8")


def nearest_scheduler(run: ExportedRun) -> Scheduler:
    """Returns the stock scheduler whose configuration alone brings a stock pipeline nearest to the trained times.

    Wan's pipelines pass it no times: of order 1 and without corrector, UniPC is Euler, and only it starts at 1 and
    shifts once. Qwen-Image's pipeline passes evenly spaced times. Only one scheduler has the re-noising solver.
    """
    shift, stochastic = run.config.plan.shift, run.config.ablation.solver == "renoise"
    if not run.is_wan:
        return FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=math.log(shift), max_shift=math.log(shift),
            shift_terminal=None, stochastic_sampling=stochastic,  # type: ignore[arg-type] None is its default
        )  # fmt: skip
    if stochastic:
        return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=1,
        disable_corrector=list(range(run.plan.num_steps)),
    )  # fmt: skip


def stock_times(run: ExportedRun, scheduler: Scheduler) -> tuple[list[float], float]:
    """Returns the times that a stock pipeline runs at with this scheduler, and their largest gap to the trained ones.

    The noise levels and the times that the network is told need not agree; the gap is that of the farther ones.
    """
    steps, trained = run.plan.num_steps, torch.tensor(run.plan.times[:-1], dtype=torch.float64)
    if run.is_wan:
        scheduler.set_timesteps(steps)
    else:
        mu = math.log(run.config.plan.shift)
        scheduler.set_timesteps(steps, sigmas=np.linspace(1, 1 / steps, steps), mu=mu)  # type: ignore[arg-type] as the pipeline does
    levels = torch.as_tensor(scheduler.sigmas, dtype=torch.float64)[:-1]
    told = torch.as_tensor(scheduler.timesteps, dtype=torch.float64) / 1000
    return levels.tolist(), torch.stack([levels - trained, told - trained]).abs().max().item()


def render(run: ExportedRun, template: str, **more: Any) -> str:
    """Returns one of the export's templates, filled in."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters["python"] = lambda value: "None" if value is None else json.dumps(value)
    image = run.task == "i2v"
    pipeline = (WanImageToVideoPipeline if image else WanPipeline) if run.is_wan else QwenImagePipeline
    needs = ["torch", "diffusers 0.42 or later", "transformers", *["ftfy"] * run.is_wan, *["peft"] * (not run.fused)]
    return environment.get_template(template).render(
        run=run, config=run.config, plan=run.plan, experts=run.experts, size=run.teacher.sizes[0],
        pipeline=pipeline.__name__, transformer=TRANSFORMERS[run.teacher.kind].__name__,
        steps=sorted((step, expert) for expert in run.experts for step in expert.steps),
        times=list(run.plan.times[:-1]), wan=run.is_wan, image=image,
        needs=f"{', '.join(needs[:-1])} and {needs[-1]}", stochastic=run.config.ablation.solver == "renoise", **more,
    )  # fmt: skip
