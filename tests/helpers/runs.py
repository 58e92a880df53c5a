"""Finished run folders without any training: a config, and experts of random numbers that differ from the teacher."""

from collections.abc import Callable
from pathlib import Path

import torch
from tiny import draw
from torch import Tensor

from phased_dmd.checkpoint import RunFolder, save_tensors
from phased_dmd.config import Config, phase_plan
from phased_dmd.models.loader import bare_model, load_model
from phased_dmd.networks.build import expert_shapes

TINY = {"plan.phases": 2, "plan.gradient": "last", "generator.lora.rank": 4, "generator.lora.alpha": 2}
Make = Callable[..., Path]  # makes a finished run by its teacher, method and overrides


def finished_run(folder: Path, config: Config) -> Path:
    """Writes what is read of a finished run; full experts are the teacher's weights, each changed by a tenth or so."""
    model = bare_model(config.teacher, config.seed)
    shapes = expert_shapes(config, model, phase_plan(config, model.switches))
    base: dict[str, Tensor] = {}
    if config.generator.weights == "full":
        students = load_model(config.teacher, config.seed, fit=False)[0].students
        base = {f"{i}.{name}": p for i, student in enumerate(students) for name, p in student.named_parameters()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.model_dump_json(), "utf-8")
    for phase, needed in shapes.items():
        tensors = {}
        for i, (name, shape) in enumerate(sorted(needed.items())):
            noise = draw(*shape, seed=100 * phase + i)
            if ".lora_" in name:
                tensors[name] = noise * (0.1 if ".lora_B" in name else 0.5 * shape[1] ** -0.5)
            else:
                tensors[name] = base[name].detach().to("cpu", torch.float32) * (1 + 0.1 * noise)
        save_tensors(
            RunFolder(folder).expert_path(phase), tensors, {"phase": phase, "iteration": config.phase_iterations(phase)}
        )
    return folder
