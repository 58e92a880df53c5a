"""A run is a function that returns a Config. Start here, then read `train.py`."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

from phased_dmd.config import Config, Fake, Generator, Lora, Method, Optimiser, Plan
from phased_dmd.config.overrides import apply_overrides, build, changed, read_file, with_method
from phased_dmd.config.teacher import (
    AnalyticTeacher,
    AnyPipeline,
    Flux2KleinTeacher,
    Krea2Teacher,
    Lumina2Teacher,
    PipelineTeacher,
    QwenImage21Teacher,
    QwenImageEditTeacher,
    QwenImageTeacher,
    Size,
    WanTeacher,
    ZImageTeacher,
)
from phased_dmd.errors import UserError, did_you_mean


def toy_1d() -> Config:
    """Distils the four points of the paper's Appendix D, in two steps with the boundary at .5."""
    return Config(
        recipe="toy-1d",
        teacher=AnalyticTeacher(means=((-1.0,), (0.0,), (1.0,), (2.0,))),
        plan=Plan(steps=2, phases=2, shift=1.0, gradient="all"),
        objective="posterior",  # of one element the default's mean is none
        generator=Generator(weights="full", lr=5e-4),
        fake=Fake(lr=1e-3),
        optimiser=Optimiser(decay="linear"),
        iterations=1000, batch_size=256, log_every=50, checkpoint_every=500, sample_every=500,
    )  # fmt: skip


def toy_2d() -> Config:
    """Distils a mixture of 25 narrow Gaussians on a 5 x 5 grid: how many modes does each method keep?"""
    axis = (-2.0, -1.0, 0.0, 1.0, 2.0)
    return Config(
        recipe="toy-2d",
        teacher=AnalyticTeacher(means=tuple((x, y) for x in axis for y in axis), std=0.05, fit_steps=4000),
        plan=Plan(steps=4, phases=4, shift=2.0, gradient="all"),
        generator=Generator(weights="full", lr=1e-3),
        fake=Fake(lr=2e-3),
        optimiser=Optimiser(decay="linear"),
        iterations=500, batch_size=256, log_every=50, checkpoint_every=500, sample_every=500,
    )  # fmt: skip


def exact_clips() -> Config:
    """Distils a mixture of 120 clips of a digit that moves: does each stay, and each speed?"""
    return Config(
        recipe="exact-clips",
        teacher=AnalyticTeacher(means="clips", std=0.1, fit_steps=5000),
        plan=Plan(steps=4, phases=4, shift=5.0, gradient="all"),
        generator=Generator(weights="full", lr=3e-4),
        fake=Fake(lr=6e-4),
        optimiser=Optimiser(decay="linear"),
        iterations=200, batch_size=32, log_every=10, checkpoint_every=100, sample_every=100,
    )  # fmt: skip


def nano_t2i() -> Config:
    """Distils the embedded teacher, text-to-image: 40 steps with guidance become 4 without, a LoRA expert a step."""
    return Config(
        recipe="nano-t2i",
        teacher=WanTeacher(path="nano", guidance=(1.5,), max_tokens=16),
        plan=Plan(steps=4, phases=4, shift=5.0, gradient="all"),
        generator=Generator(lora=Lora(rank=32, alpha=32), lr=1e-3, ema=0.97),
        fake=Fake(lr=3e-4),
        optimiser=Optimiser(decay="linear"),
        prompts="nano-t2i", iterations=120, batch_size=32, log_every=5, checkpoint_every=40, sample_every=40,
    )  # fmt: skip


# Of the *-fast recipes: docs/results/performance.md weighs nano's.
FEWER_CALLS = {"rollouts.reuse": True, "fake.pull": 1.0, "objective": "projected"}
PAIRED = FEWER_CALLS | {"rollouts.antithetic": "start"}
# Wan2.2 in the paper: while only the noisier network's steps are distilled, t is clamped to that network's range.
ABOVE_SWITCH = {"renoise.above_switch": "clamp"}
# On many GPUs each runs all networks in every update unless all samples of it are one network's.
TWO_NETWORKS = ABOVE_SWITCH | {"renoise.network": "update"}
CLIP = {"teacher.sizes": [{"num_frames": 9}], "iterations": 60, "batch_size": 24}  # of a digit that moves
SCENE = {"height": 32, "width": 48}  # of two or three coloured digits
SCENES = {
    "teacher.path": "scenes", "teacher.sizes": [SCENE], "teacher.guidance": [2.5], "teacher.max_tokens": 32,
    "prompts": "scenes-t2i",
}  # fmt: skip
SCENE_CLIP = SCENES | CLIP | {"teacher.sizes": [SCENE | {"num_frames": 9}], "prompts": "scenes-t2v"}

VARIANTS = {  # a recipe, and what this one changes in it
    "toy-2d-fast": (toy_2d, PAIRED | {
        "generator.lr": 5e-4, "fake.lr": 1e-3, "fake.updates": 1, "iterations": 200,
        "phase_shares": [0.125, 0.125, 0.25, 3.5],
    }),
    "nano-t2i-fast": (nano_t2i, PAIRED | {
        "generator.lr": 4e-3, "generator.ema": 0.9, "fake.lr": 1.5e-4, "fake.updates": 2, "iterations": 60,
        "phase_shares": [0.5, 0.5, 1.0, 2.25],
    }),
    "nano-t2v": (nano_t2i, CLIP | {"prompts": "nano-t2v"}),
    # A teacher of two networks like Wan2.2's, and an expert on each: as many updates in all as nano-t2i.
    "nano-moe": (nano_t2i, ABOVE_SWITCH | {"teacher.path": "nano-moe", "plan.phases": 2, "iterations": 240}),
    # A teacher that is told the first of nine frames, which comes with the prompt.
    "nano-i2v": (nano_t2i, CLIP | {"teacher.path": "nano-i2v", "prompts": "nano-i2v"}),
    # The harder embedded teacher, and its variant of two networks: as many updates in all as scenes-t2v.
    "scenes-t2i": (nano_t2i, SCENES),
    "scenes-t2v": (nano_t2i, SCENE_CLIP),
    "scenes-moe": (nano_t2i, SCENE_CLIP | ABOVE_SWITCH | {
        "teacher.path": "scenes-moe", "plan.phases": 2, "iterations": 120,
    }),
    # A model of the user's own, which `--own` names: the rates of a small network, and times that are evenly spaced.
    "own": (nano_t2i, {"teacher": {"kind": "own"}, "prompts": None, "plan.shift": 1.0}),
}  # fmt: skip


def variant(recipe: str) -> Config:
    """Returns another recipe with the changes of `VARIANTS`."""
    original, changes = VARIANTS[recipe]
    return changed(original(), {"recipe": recipe, **changes})


def _sizes(num_frames: int, weight: float, *shapes: tuple[int, int]) -> tuple[Size, ...]:
    """Returns buckets of height x width that have the same number of frames and share of the batches."""
    return tuple(Size(num_frames=num_frames, height=height, width=width, weight=weight) for height, width in shapes)


PICTURE = _sizes(1, 1.0, (720, 1280))
CLIPS_480P = _sizes(81, 0.4, (480, 832), (832, 480))  # the first size is what previews are made at
CLIPS = CLIPS_480P + _sizes(81, 0.1, (720, 1280), (1280, 720))
SEVEN = _sizes(1, 1.0, (1328, 1328), (1664, 928), (928, 1664), (1472, 1104), (1104, 1472), (1584, 1056), (1056, 1584))
MEGAPIXEL = _sizes(1, 1.0, (1024, 1024), (1280, 768), (768, 1280), (1152, 896), (896, 1152))
SHAPES = MEGAPIXEL[:1] + _sizes(1, 1.0, (768, 1344), (1344, 768), (832, 1248), (1248, 832), (896, 1152), (1152, 896))
FIRST_FRAMES = "first-frames.jsonl"  # of the user's own, in the working folder: none are shipped at these sizes
WAN_NEGATIVE = (  # `sample_neg_prompt` of Wan's own configuration, what its program samples with unless told
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


WAN = partial(WanTeacher, negative_prompt=WAN_NEGATIVE, max_tokens=512)
QWEN = partial(QwenImageTeacher, negative_prompt=" ", max_tokens=1024)
EDIT = partial(QwenImageEditTeacher, negative_prompt=" ", max_tokens=1024)
Z_IMAGE = partial(ZImageTeacher, max_tokens=512)
KLEIN = partial(Flux2KleinTeacher, max_tokens=512)
QWEN_21 = partial(QwenImage21Teacher, max_tokens=1024)
KREA = partial(Krea2Teacher, max_tokens=512)
LUMINA = partial(Lumina2Teacher, max_tokens=256)


class System(NamedTuple):
    """Holds what differs between the large models. docs/models.md says of each figure where it comes from.

    licence: of the base, which holds for what is distilled from it; APACHE, or its name.
    """

    teacher: Callable[..., AnyPipeline]
    path: str
    licence: str
    sizes: tuple[Size, ...]
    shift: float
    prompts: str
    more: Mapping[str, Any] = {}


FIFTY = {"teacher.base_steps": 50}  # of the bases that are younger than the paper, as their makers sample them
W4 = {"teacher.guidance": [5.0]}  # what its pipeline calls 4: cond + 4 (cond - uncond)
UNGUIDED = {"teacher.guidance": [1.0]}  # as its makers sample it
RAW = {"teacher.guidance": [4.5], "teacher.base_steps": 52}  # what its pipeline calls 3.5
ONE_CARD = FIFTY | {  # of 16 GB; docs/models.md says what was left out
    "teacher.quantise": "int8", "generator.lora.rank": 32, "fake.weights": "lora", "fake.lora.rank": 32,
    "fake.lr": 5e-5, "engine.micro_batch": 1, "engine.activation_checkpointing": True, "batch_size": 16,
}  # fmt: skip
FAST = FEWER_CALLS | {"fake.updates": 2}  # what saves calls in nano-t2i-fast; never run
APACHE, FLUX = "Apache-2.0", "FLUX Non-Commercial License"
RESEARCH, COMMUNITY = "Qwen Research License", "Krea 2 Community License"
T2I, T2V = "default-t2i", "default-t2v"
SYSTEMS = {  # wan21-t2v-1.3b, at the size it was made for, is not in the paper
    "wan21-t2i":      System(WAN, "Wan-AI/Wan2.1-T2V-14B-Diffusers",  APACHE, PICTURE, 5.0, T2I),
    "wan21-t2v-1.3b": System(WAN, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", APACHE, CLIPS_480P, 5.0, T2V),
    "wan22-t2i":      System(WAN, "Wan-AI/Wan2.2-T2V-A14B-Diffusers", APACHE, PICTURE, 5.0, T2I, TWO_NETWORKS),
    "wan22-t2v":      System(WAN, "Wan-AI/Wan2.2-T2V-A14B-Diffusers", APACHE, CLIPS, 5.0, T2V, TWO_NETWORKS),
    "wan22-t2v-fast": System(WAN, "Wan-AI/Wan2.2-T2V-A14B-Diffusers", APACHE, CLIPS, 5.0, T2V, TWO_NETWORKS | FAST),
    "wan22-i2v":      System(WAN, "Wan-AI/Wan2.2-I2V-A14B-Diffusers", APACHE, CLIPS, 5.0, FIRST_FRAMES, TWO_NETWORKS),
    "qwen-image":     System(QWEN, "Qwen/Qwen-Image",                 APACHE, SEVEN, 3.0, T2I),
    "qwen-image-fast": System(QWEN, "Qwen/Qwen-Image",                APACHE, SEVEN, 3.0, T2I, FAST),
    "z-image":        System(Z_IMAGE, "Tongyi-MAI/Z-Image",           APACHE, MEGAPIXEL, 6.0, T2I, FIFTY | W4),
    "flux2-klein-4b": System(KLEIN, "black-forest-labs/FLUX.2-klein-base-4B", APACHE, MEGAPIXEL, 7.5, T2I, FIFTY),
    "flux2-klein-9b": System(KLEIN, "black-forest-labs/FLUX.2-klein-base-9B", FLUX, MEGAPIXEL, 7.5, T2I, FIFTY),
    "qwen-image-2.1": System(QWEN_21, "Qwen/Qwen-Image-2.1",          RESEARCH, MEGAPIXEL, 2.0, T2I, UNGUIDED),
    "qwen-image-edit": System(EDIT, "Qwen/Qwen-Image-Edit-2509",      APACHE, SHAPES, 3.0, FIRST_FRAMES),
    "krea-2":         System(KREA, "krea/Krea-2-Raw",                 COMMUNITY, MEGAPIXEL, 2.5, T2I, RAW),
    "lumina-2":       System(LUMINA, "Alpha-VLLM/Lumina-Image-2.0",   APACHE, MEGAPIXEL, 6.0, T2I, ONE_CARD),
}  # fmt: skip


def large(recipe: str) -> Config:
    """Returns what the paper sets for all of its systems, and we for others: four steps in two phases with SGTS."""
    teacher, path, _, sizes, shift, prompts, more = SYSTEMS[recipe]
    config = Config(
        recipe=recipe,
        teacher=teacher(path=path, sizes=sizes, guidance=(4.0,), base_steps=40, dtype="bfloat16"),
        plan=Plan(steps=4, phases=2, shift=shift, gradient="last"),
        generator=Generator(weights="lora", lora=Lora(rank=64, alpha=8), lr=5e-5),
        fake=Fake(weights="full", lr=4e-7, updates=5),
        prompts=prompts, iterations=500, batch_size=64, log_every=1, checkpoint_every=50, sample_every=50,
    )  # fmt: skip
    return changed(config, more)


RECIPES: dict[str, Callable[[], Config]] = {
    "toy-1d": toy_1d, "toy-2d": toy_2d, "exact-clips": exact_clips, "nano-t2i": nano_t2i,
    **{name: partial(variant, name) for name in VARIANTS}, **{name: partial(large, name) for name in SYSTEMS},
}  # fmt: skip


def resolve(recipe: str | Path, overrides: Mapping[str, Any] | None = None, method: Method | None = None) -> Config:
    """Returns the Config of a recipe's name, or of a YAML or JSON file, with dotted overrides and a method.

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
            "prompts: this recipe needs a picture with every prompt: "
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
        own = changed(own, {"iterations": config.iterations})
    iterations = max(1, int(own.updates // sum(config.phase_shares or (1,) * config.plan.phases)))
    return changed(config, {"iterations": iterations})


def licence_of(path: str) -> str | None:
    """Returns the licence of a base by its hub id; None where the table has none of that name."""
    return next((system.licence for system in SYSTEMS.values() if system.path == path), None)


def licence(config: Config) -> str | None:
    """Returns a line on the licence of a run's base, known by its hub id, a folder's by the recipe; None if unknown."""
    path = config.teacher.path if isinstance(config.teacher, PipelineTeacher) else ""
    by_recipe = SYSTEMS.get(config.recipe) if "/" in path else None  # the teachers inside the package have none
    found = licence_of(path) or (by_recipe and by_recipe.licence)
    return found and f"licence of {path}: {found}, which holds for what is distilled from it too"


def fitting(pipeline: str) -> str:
    """Says which recipes fit the folder of a stock pipeline, by the name of its class."""
    names = []
    for name, system in SYSTEMS.items():
        kinds = system.teacher(path=system.path).pipelines
        if not name.endswith("-fast") and pipeline == kinds[-1 if system.prompts == FIRST_FRAMES else 0]:
            names.append(name)
    return f"it fits the recipe {' or '.join(names)}" if names else "no recipe fits it"


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """Returns all fields of a recipe, as JSON would hold them.

    recipe: its name, or a YAML or JSON file: with a recipe's name, what differs from it, else a whole configuration.
    """
    if not isinstance(recipe, str | Path):
        raise UserError(f"recipe: a name or a file is needed, not a {type(recipe).__name__}; a Config is resolved")
    if recipe in RECIPES:
        return RECIPES[str(recipe)]().model_dump(mode="json")
    if Path(recipe).suffix not in (".yaml", ".yml", ".json"):
        raise UserError(f"recipe: unknown recipe {str(recipe)!r}{did_you_mean(str(recipe), list(RECIPES))}")
    data = read_file(Path(recipe))
    if "recipe" not in data:
        raise UserError(f"{recipe}: recipe is missing: name the one that the rest of the file changes, as nano-t2i")
    name = str(data["recipe"])
    if name not in RECIPES:
        if "teacher" not in data:
            known = did_you_mean(name, list(RECIPES))
            raise UserError(f"{recipe}: teacher is missing, and recipe: {name} is none to inherit it from{known}")
        return build(data).model_dump(mode="json")
    if odd := [key for key in data if not isinstance(key, str)]:  # one of them may be null or 0
        raise UserError(f"{recipe}: {odd[0]!r}: unknown field")
    return changed(RECIPES[name](), data).model_dump(mode="json")
