"""What stands beside the weights: the nearest stock scheduler, and the script and the card, from templates."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from phased_dmd.config.teacher import WanTeacher
from phased_dmd.export.subject import Subject

TEMPLATES = Path(__file__).parents[1] / "assets" / "export"
Scheduler = UniPCMultistepScheduler | FlowMatchEulerDiscreteScheduler


def nearest_scheduler(subject: Subject) -> Scheduler:
    """The stock scheduler, set from its configuration alone, that comes nearest to the trained times.

    Wan's pipelines pass it no times: of order 1 and without corrector, UniPC is Euler, and only it starts at 1 and
    shifts once. Qwen-Image's passes evenly spaced ones. For the re-noising solver there is but one.
    """
    shift, stochastic = subject.config.plan.shift, subject.config.ablation.solver == "renoise"
    if not isinstance(subject.teacher, WanTeacher):
        return FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=math.log(shift), max_shift=math.log(shift),
            shift_terminal=None, stochastic_sampling=stochastic,  # type: ignore[arg-type] None is its default
        )  # fmt: skip
    if stochastic:
        return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=1,
        disable_corrector=list(range(subject.plan.num_steps)),
    )  # fmt: skip


def stock_times(subject: Subject, scheduler: Scheduler) -> tuple[list[float], float]:
    """The times a stock pipeline runs with this scheduler, and the largest gap to the trained ones.

    The gap is that of the noise levels or of the times the network is told, which need not agree, whichever is larger.
    """
    steps, trained = subject.plan.num_steps, torch.tensor(subject.plan.times[:-1], dtype=torch.float64)
    if isinstance(subject.teacher, WanTeacher):
        scheduler.set_timesteps(steps)
    else:
        mu = math.log(subject.config.plan.shift)
        scheduler.set_timesteps(steps, sigmas=np.linspace(1, 1 / steps, steps), mu=mu)  # type: ignore[arg-type] as the pipeline does
    levels = torch.as_tensor(scheduler.sigmas, dtype=torch.float64)[:-1]
    told = torch.as_tensor(scheduler.timesteps, dtype=torch.float64) / 1000
    gap = torch.stack([levels - trained, told - trained]).abs().max()
    return levels.tolist(), gap.item()


def render(subject: Subject, template: str, **more: Any) -> str:
    """A template of the export's, filled."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters["python"] = lambda value: "None" if value is None else json.dumps(value)
    plan, config, wan = subject.plan, subject.config, isinstance(subject.teacher, WanTeacher)
    needs = ["torch", "diffusers 0.42 or later", "transformers", *["ftfy"] * wan, *["peft"] * (not subject.fused)]
    return environment.get_template(template).render(
        subject=subject, config=config, plan=plan, pieces=subject.pieces, size=subject.teacher.sizes[0],
        pipeline=subject.pipeline.__name__, transformer=subject.transformer.__name__,
        times=list(plan.times[:-1]), steps=sorted((step, piece) for piece in subject.pieces for step in piece.steps),
        wan=wan, image=subject.task == "i2v", needs=f"{', '.join(needs[:-1])} and {needs[-1]}",
        stochastic=config.ablation.solver == "renoise", **more,
    )  # fmt: skip
