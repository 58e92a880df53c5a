"""A run is a function that returns a Config. Start here, then read `train.py`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from phased_dmd.config import Config, Fake, Generator, Lora, Method, Objective, Optimiser, Plan, Renoise, Rollouts
from phased_dmd.config.overrides import apply_overrides, build, read_file, with_method
from phased_dmd.config.teacher import AnalyticTeacher, QwenImageTeacher, Size, WanTeacher
from phased_dmd.errors import UserError, did_you_mean


def toy_1d() -> Config:
    """The four points of the paper's Appendix D, in two steps with the boundary at .5."""
    return Config(
        recipe="toy-1d",
        teacher=AnalyticTeacher(means=((-1.0,), (0.0,), (1.0,), (2.0,))),
        plan=Plan(steps=2, phases=2, shift=1.0, gradient="all"),
        objective=Objective(weighting="posterior"),  # of one element the default's mean is none
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


def toy_2d_fast() -> Config:
    """The same with less than half of the network calls; docs/results/performance.md weighs it."""
    changes = {
        "recipe": "toy-2d-fast", "rollouts": Rollouts(reuse=True, antithetic="start"),
        "generator": Generator(weights="full", optimiser=Optimiser(lr=5e-4, decay="linear")),
        "fake": Fake(optimiser=Optimiser(lr=1e-3, decay="linear"), updates=1, pull=1.0),
        "phase_shares": (0.125, 0.125, 0.25, 3.5),
    }  # fmt: skip
    return toy_2d().model_copy(update=changes)


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


def nano_t2i_fast() -> Config:
    """The same with less than half of the network calls; docs/results/performance.md weighs it."""
    nano = nano_t2i()
    changes = {
        "recipe": "nano-t2i-fast", "rollouts": Rollouts(reuse=True, antithetic="start"),
        "generator": nano.generator.model_copy(update={"ema": 0.9}),
        "fake": Fake(optimiser=Optimiser(lr=1.5e-4, decay="linear"), updates=2, pull=1.0),
        "phase_shares": (0.5, 0.5, 1.0, 2.25),
    }  # fmt: skip
    return nano.model_copy(update=changes)


def nano_t2v() -> Config:
    """The same teacher, text-to-video: nine frames of a digit that moves."""
    image = nano_t2i()
    teacher = image.teacher.model_copy(update={"sizes": (Size(num_frames=9),)})
    changes = {"recipe": "nano-t2v", "teacher": teacher, "prompts": "nano-t2v", "iterations": 60, "batch_size": 24}
    return image.model_copy(update=changes)


# Wan2.2 in the paper: while only the noisier network's steps are distilled, t is clamped to that network's range.
ABOVE_SWITCH = Renoise(above_switch=True, clamp=True)


def nano_moe() -> Config:
    """A teacher of two networks like Wan2.2's, and an expert on each: as many updates in all as nano-t2i."""
    image = nano_t2i()
    teacher = image.teacher.model_copy(update={"path": "nano-moe"})
    plan = Plan(steps=4, phases=2, shift=5.0, gradient="all")
    changes = {"recipe": "nano-moe", "teacher": teacher, "plan": plan, "renoise": ABOVE_SWITCH, "iterations": 240}
    return image.model_copy(update=changes)


def nano_i2v() -> Config:
    """A teacher that is told the first of nine frames, which comes with the prompt."""
    video = nano_t2v()
    teacher = video.teacher.model_copy(update={"path": "nano-i2v"})
    return video.model_copy(update={"recipe": "nano-i2v", "teacher": teacher, "prompts": "nano-i2v"})


# The paper's systems. docs/models.md says of each figure where it comes from.

PICTURE = (Size(num_frames=1, height=720, width=1280),)
CLIPS_480P = (
    Size(num_frames=81, height=480, width=832, weight=0.4),  # the first one: previews are made at it
    Size(num_frames=81, height=832, width=480, weight=0.4),
)
CLIPS = (
    *CLIPS_480P,
    Size(num_frames=81, height=720, width=1280, weight=0.1),
    Size(num_frames=81, height=1280, width=720, weight=0.1),
)
QWEN_SHAPES = ((1328, 1328), (1664, 928), (928, 1664), (1472, 1104), (1104, 1472), (1584, 1056), (1056, 1584))
FIRST_FRAMES = "first-frames.jsonl"  # of the user's own, in the working folder: none are shipped at these sizes
WAN_NEGATIVE = (  # `sample_neg_prompt` of Wan's own configuration, what its program samples with unless told
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def paper(
    recipe: str, teacher: WanTeacher | QwenImageTeacher, shift: float, prompts: str, renoise: Renoise | None = None
) -> Config:
    """What the paper sets for all of its models, in four steps and two phases with SGTS."""
    return Config(
        recipe=recipe,
        teacher=teacher,
        plan=Plan(steps=4, phases=2, shift=shift, gradient="last"),
        renoise=renoise or Renoise(),
        generator=Generator(weights="lora", lora=Lora(rank=64, alpha=8), optimiser=Optimiser(lr=5e-5)),
        fake=Fake(weights="full", optimiser=Optimiser(lr=4e-7), updates=5),
        prompts=prompts, iterations=500, batch_size=64, log_every=1, checkpoint_every=50, sample_every=50,
    )  # fmt: skip


def wan(path: str, sizes: tuple[Size, ...]) -> WanTeacher:
    return WanTeacher(
        path=path, sizes=sizes, guidance=(4.0,), negative_prompt=WAN_NEGATIVE, max_tokens=512, base_steps=40,
        dtype="bfloat16",
    )  # fmt: skip


def wan21_t2i() -> Config:
    """Wan2.1 14B, one frame of 1280 x 720."""
    return paper("wan21-t2i", wan("Wan-AI/Wan2.1-T2V-14B-Diffusers", PICTURE), 5.0, "default-t2i")


def wan21_t2v_small() -> Config:
    """Wan2.1 1.3B, five seconds at 480p, the size it was made for; the paper has no such model."""
    return paper("wan21-t2v-1.3b", wan("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", CLIPS_480P), 5.0, "default-t2v")


def wan22_t2i() -> Config:
    """Wan2.2's two networks of 14B, one frame of 1280 x 720."""
    return paper("wan22-t2i", wan("Wan-AI/Wan2.2-T2V-A14B-Diffusers", PICTURE), 5.0, "default-t2i", ABOVE_SWITCH)


def wan22_t2v() -> Config:
    """Wan2.2's two networks of 14B, five seconds at 480p and 720p."""
    return paper("wan22-t2v", wan("Wan-AI/Wan2.2-T2V-A14B-Diffusers", CLIPS), 5.0, "default-t2v", ABOVE_SWITCH)


def wan22_i2v() -> Config:
    """The same from a given first frame; prompts and pictures are the user's own."""
    return paper("wan22-i2v", wan("Wan-AI/Wan2.2-I2V-A14B-Diffusers", CLIPS), 5.0, FIRST_FRAMES, ABOVE_SWITCH)


def qwen_image() -> Config:
    """Qwen-Image 20B in its seven shapes."""
    teacher = QwenImageTeacher(
        path="Qwen/Qwen-Image", sizes=tuple(Size(height=height, width=width) for height, width in QWEN_SHAPES),
        guidance=(4.0,), negative_prompt=" ", max_tokens=1024, base_steps=40, dtype="bfloat16",
    )  # fmt: skip
    return paper("qwen-image", teacher, 3.0, "default-t2i")


RECIPES = {
    "toy-1d": toy_1d, "toy-2d": toy_2d, "toy-2d-fast": toy_2d_fast,
    "nano-t2i": nano_t2i, "nano-t2i-fast": nano_t2i_fast,
    "nano-t2v": nano_t2v, "nano-moe": nano_moe, "nano-i2v": nano_i2v,
    "wan21-t2i": wan21_t2i, "wan21-t2v-1.3b": wan21_t2v_small,
    "wan22-t2i": wan22_t2i, "wan22-t2v": wan22_t2v, "wan22-i2v": wan22_i2v, "qwen-image": qwen_image,
}  # fmt: skip


def resolve(recipe: str | Path, overrides: Mapping[str, Any] | None = None, method: Method | None = None) -> Config:
    """The Config of a recipe's name, or of a YAML or JSON file, with dotted overrides and a method.

    A method keeps the generator updates in all: where it changes the number of phases, `iterations` are converted, the
    recipe's or given ones.
    """
    data, overrides = read_recipe(recipe), {} if overrides is None else overrides
    if not isinstance(overrides, Mapping):
        raise UserError(f"overrides: {overrides!r} is no mapping of fields, as {{'seed': 1}}; a method is an argument")
    if "method" in overrides:
        raise UserError(f"method: not a field; from Python it is the third argument, resolve({recipe!r}, {{}}, 'dmd')")
    if method not in (None, *get_args(Method)):
        raise UserError(f"method: unknown method {method!r}{did_you_mean(str(method), list(get_args(Method)))}")
    own = build(data)
    data = apply_overrides(data, overrides)
    if data["prompts"] == FIRST_FRAMES and not Path(FIRST_FRAMES).is_file():
        raise UserError(
            "prompts: image-to-video needs a first frame with every prompt: "
            "--prompts FILE, a jsonl, csv or parquet with the columns prompt and image"
        )
    if method is None:
        return build(data)
    config = build(apply_overrides(with_method(method, data), overrides))
    if config.method != method:
        raise UserError(f"method: {method} contradicts plan.phases or plan.gradient, which make {config.method}")
    if "iterations" in overrides:
        if config.plan.phases == int(data["plan"]["phases"]):
            return config
        own = own.model_copy(update={"iterations": config.iterations})
    iterations = max(1, int(own.updates // sum(config.phase_shares or (1,) * config.plan.phases)))
    return config.model_copy(update={"iterations": iterations})


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """Returns all fields of a recipe, given by its name, or of a file, as JSON would hold them."""
    if not isinstance(recipe, str | Path):
        raise UserError(f"recipe: a name or a file is needed, not a {type(recipe).__name__}; a Config is resolved")
    if recipe in RECIPES:
        return json.loads(RECIPES[str(recipe)]().model_dump_json())
    if Path(recipe).suffix not in (".yaml", ".yml", ".json"):
        raise UserError(f"recipe: unknown recipe {str(recipe)!r}{did_you_mean(str(recipe), list(RECIPES))}")
    data = read_file(Path(recipe))
    for field in ("recipe", "teacher"):
        if field not in data:
            like = data.get("recipe") if data.get("recipe") in list(RECIPES) else "nano-t2i"
            raise UserError(
                f"{recipe}: {field} is missing: a file holds a whole configuration, and inherits from no recipe; "
                f"`phased-dmd distill {like} --dry-run > my-run.json` writes one to begin with"
            )
    return json.loads(build(data).model_dump_json())
