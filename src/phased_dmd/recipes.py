"""A run is a function that returns a Config. Start here, then read `train.py`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phased_dmd.config import (
    AnalyticTeacher,
    Config,
    Fake,
    Generator,
    Lora,
    Method,
    Optimiser,
    Plan,
    Size,
    UserError,
    WanTeacher,
    apply_overrides,
    build,
    nearest,
    read_file,
    with_method,
)


def toy_1d() -> Config:
    """The four points of the paper's Appendix D, in two steps with the boundary at .5."""
    return Config(
        recipe="toy-1d",
        teacher=AnalyticTeacher(means=((-1.0,), (0.0,), (1.0,), (2.0,))),
        plan=Plan(steps=2, phases=2, shift=1.0, gradient="all"),
        generator=Generator(weights="full", optimiser=Optimiser(lr=5e-4, decay="linear")),
        fake=Fake(optimiser=Optimiser(lr=1e-3, decay="linear")),
        iterations=1000, batch_size=256, log_every=50, checkpoint_every=500, sample_every=500,
    )  # fmt: skip


def toy_2d() -> Config:
    """An exact mixture of 25 narrow Gaussians on a 5 x 5 grid: how many modes does each method keep?"""
    axis = (-2.0, -1.0, 0.0, 1.0, 2.0)
    return Config(
        recipe="toy-2d",
        teacher=AnalyticTeacher(means=tuple((x, y) for x in axis for y in axis), std=0.05, fit_steps=4000),
        plan=Plan(steps=4, phases=4, shift=2.0, gradient="all"),
        generator=Generator(weights="full", optimiser=Optimiser(lr=1e-3, decay="linear")),
        fake=Fake(optimiser=Optimiser(lr=2e-3, decay="linear")),
        iterations=500, batch_size=256, log_every=50, checkpoint_every=500, sample_every=500,
    )  # fmt: skip


def nano_t2i() -> Config:
    """The embedded teacher, text-to-image: 40 steps with guidance become 4 without, a LoRA expert a step."""
    return Config(
        recipe="nano-t2i",
        teacher=WanTeacher(path="nano", guidance=(1.5,), max_tokens=16),
        plan=Plan(steps=4, phases=4, shift=5.0, gradient="all"),
        generator=Generator(lora=Lora(rank=32, alpha=32), optimiser=Optimiser(lr=1e-3, decay="linear"), ema=0.97),
        fake=Fake(optimiser=Optimiser(lr=3e-4, decay="linear")),
        prompts="nano-t2i", iterations=120, batch_size=32, log_every=5, checkpoint_every=40, sample_every=40,
    )  # fmt: skip


def nano_t2v() -> Config:
    """The same teacher, text-to-video: nine frames of a digit that moves."""
    image = nano_t2i()
    teacher = image.teacher.model_copy(update={"sizes": (Size(num_frames=9),)})
    changes = {"recipe": "nano-t2v", "teacher": teacher, "prompts": "nano-t2v", "iterations": 60, "batch_size": 24}
    return image.model_copy(update=changes)


RECIPES = {"toy-1d": toy_1d, "toy-2d": toy_2d, "nano-t2i": nano_t2i, "nano-t2v": nano_t2v}


def resolve(recipe: str, overrides: Mapping[str, Any], method: Method | None = None) -> Config:
    """The Config of a recipe's name, or of a YAML or JSON file, with dotted overrides and a method.

    A method keeps the generator updates in all, so it sets `iterations`, those of a phase, unless they are given.
    """
    if recipe in RECIPES:
        data = json.loads(RECIPES[recipe]().model_dump_json())
    elif Path(recipe).suffix in (".yaml", ".yml", ".json"):
        data = json.loads(build(read_file(Path(recipe))).model_dump_json())
    else:
        raise UserError(f"recipe: unknown recipe {recipe!r}{nearest(recipe, list(RECIPES))}")
    updates = data["iterations"] * data["plan"]["phases"]
    data = apply_overrides(data, overrides)
    if method is None:
        return build(data)
    try:
        data = apply_overrides(with_method(method, data), overrides)
    except TypeError:
        raise UserError(f"plan: no method can be laid over {data['plan']}") from None
    config = build(data)
    if config.method != method:
        raise UserError(f"method: {method} contradicts plan.phases or plan.gradient, which make {config.method}")
    iterations = data["iterations"] if "iterations" in overrides else max(1, updates // config.plan.phases)
    return config.model_copy(update={"iterations": iterations})
