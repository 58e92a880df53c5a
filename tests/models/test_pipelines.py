"""The adapters against the stock diffusers pipelines, on tiny random weights: predictions, conditions, whole runs."""

import gc
import inspect
import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
)
from PIL import Image
from pipelines import NAMES, PICTURES, build, direct, guided, teacher
from recorded import watched_steps
from safetensors.torch import load_file, save_file
from tiny import draw, killed_after
from torch import Tensor
from torch.nn import Parameter

import phased_dmd
from phased_dmd.checkpoint import RunFolder, load_tensors
from phased_dmd.cli import main
from phased_dmd.conditions import fitting
from phased_dmd.config import Config, Fake, Generator, Lora, Plan
from phased_dmd.config.teacher import PipelineTeacher, WanTeacher
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.export import export
from phased_dmd.maths.schedules import predicted_x0
from phased_dmd.models.loader import adapter_of, load_model, stock_solver, stock_times
from phased_dmd.models.protocol import Codec, Condition, VelocityModel
from phased_dmd.models.source import Source, quiet
from phased_dmd.networks.build import add_expert, build_system
from phased_dmd.networks.roles import FAKE, System
from phased_dmd.prompts import Prompt
from phased_dmd.sampling.sampler import Sampler
from phased_dmd.sampling.writing import write_samples

PROMPTS = ["a red fox in the snow", "a boat"]
FIRST_FRAME = ("wan21_i2v", "wan22_i2v", "ti2v_5b from a frame", "qwen_image_edit")
CASES = (*NAMES, "ti2v_5b from a frame")
VARIANTS = {"from a frame": {"first_frame": True}, "of a limited norm": {"norm_limit": 0.9}}
EXACT = {"rtol": 0, "atol": 1e-5}


class Tiny(NamedTuple):
    """A pipeline of random weights: the stock one, and ours with the conditions of PROMPTS and of a first frame."""

    stock: Any
    system: System
    codec: Codec
    rows: list[Condition]
    picture: Path

    @property
    def condition(self) -> Condition:
        return self.model.batch(self.rows)

    @property
    def model(self) -> VelocityModel:
        return self.system.model

    @property
    def teacher(self) -> PipelineTeacher:
        assert isinstance(self.system.config.teacher, PipelineTeacher)
        return self.system.config.teacher

    @property
    def networks(self) -> list[Any]:
        """The stock pipeline's."""
        parts = sorted(self.stock.components.items())
        return [part for name, part in parts if name.startswith("transformer") and part is not None]


class Told(NamedTuple):
    """What a stock pipeline did: its networks' arguments, its scheduler's, the last latents and the pixels."""

    inputs: list[dict[str, Any]]
    steps: list[tuple[Tensor, float, Tensor]]  # guided prediction, timestep, latents
    latents: Tensor
    pixels: Tensor


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return cache(lambda name: build(name, root / name))


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A picture of random colours, twice the size of the samples."""
    root = tmp_path_factory.mktemp("pictures")

    def make(height: int, width: int) -> Path:
        path = root / f"{height}x{width}.png"
        colours = draw(height // 8, width // 8, 3, seed=height).sigmoid().mul(255).byte().numpy()
        Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC).save(path)
        return path

    return make


def teacher_of(case: str, folders: Callable[[str], Path], **changes: Any) -> PipelineTeacher:
    name, _, more = case.partition(" ")
    changes = VARIANTS.get(more, {}) | changes
    section = teacher(name, folders(name))
    return type(section).model_validate(section.model_dump() | changes)


def encoded(codec: Codec, text: str, picture: Path) -> Condition:
    """What the networks are told of a prompt, beside a picture where the model takes one."""
    beside = codec.encode_picture(text, picture, 0) if codec.takes_images else {}
    return codec.encode_text([text])[0] | beside


def config_of(section: PipelineTeacher, prompts: str = "nano-t2i", **changes: Any) -> Config:
    """A run of two phases of two steps that takes seconds."""
    fields = {
        "recipe": "tiny", "teacher": section, "plan": Plan(steps=4, phases=2, shift=5.0),
        "generator": Generator(lora=Lora(rank=4, alpha=4), lr=1e-3),
        "fake": Fake(updates=1, lr=1e-3, lora=Lora(rank=4, alpha=4)),
        "prompts": prompts, "iterations": 2, "batch_size": 2, "log_every": 1, "checkpoint_every": 1,
        "sample_every": None,
    }  # fmt: skip
    return Config(**fields | changes)


@pytest.fixture(scope="session")
def tinies(folders: Callable[[str], Path], picture: Callable[..., Path]) -> Callable[[str], Tiny]:
    @cache
    def make(case: str) -> Tiny:
        section = teacher_of(case, folders)
        model, codec = load_model(section, 0)
        system = build_system(config_of(section), model, codec.encode_text([section.negative_prompt])[0])
        size = section.sizes[0]
        path = picture(2 * size.height, 2 * size.width)
        rows = [encoded(codec, text, path) for text in PROMPTS]
        kind = WanImageToVideoPipeline if case == "ti2v_5b from a frame" else DiffusionPipeline
        with quiet():
            parts = adapter_of(section).stock.parts(Source(section))
            stock = kind.from_pretrained(section.path, **parts).to(device())
        stock.set_progress_bar_config(disable=True)
        return Tiny(stock, system, codec, rows, path)

    return make


@pytest.fixture(params=CASES)
def tiny(request: pytest.FixtureRequest, tinies: Callable[[str], Tiny]) -> Tiny:
    return tinies(request.param)


@pytest.fixture(scope="session")
def told() -> Callable[[Tiny], Told]:
    """Four guided steps of the stock pipeline; for Wan on a grid of both sides of the switch, 1, .91, .72, .02."""
    known: dict[int, Told] = {}
    return lambda tiny: known.get(id(tiny.stock)) or known.setdefault(id(tiny.stock), run_stock(tiny))


def run_stock(tiny: Tiny) -> Told:
    if not adapter_of(tiny.teacher).stock.alone:
        return call_stock(tiny, slice(2))
    one, other = call_stock(tiny, slice(1)), call_stock(tiny, slice(1, 2))
    inputs = [
        {"encoder_hidden_states": [told["encoder_hidden_states"][0] for told in both]}
        for both in zip(one.inputs, other.inputs, strict=True)
    ]
    pairs = zip(one.steps, other.steps, strict=True)
    steps = [(torch.cat([a[0], b[0]]), a[1], torch.cat([a[2], b[2]])) for a, b in pairs]
    return Told(
        inputs, steps, torch.cat([one.latents, other.latents]), torch.cat([one.pixels, other.pixels])
    )  # fmt: skip


def call_stock(tiny: Tiny, which: slice) -> Told:
    """What the stock pipeline did, asked for some of two samples."""
    stock, section, size = tiny.stock, tiny.teacher, tiny.teacher.sizes[0]
    noise = draw(2, *tiny.model.sample_shapes[0], seed=1).to(device())
    options: dict[str, Any] = {
        key: value[which] if isinstance(value, list) else value
        for key, value in (guided(section) | {"prompt": list(PROMPTS)}).items()
    }
    options |= {
        "num_inference_steps": 4, "height": size.height, "width": size.width, "output_type": "pt",
        "latents": adapter_of(section).stock.given(noise)[which],
    } | limit(section, section.max_tokens)  # fmt: skip
    if isinstance(section, WanTeacher):
        stock.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
        options |= {"num_frames": size.num_frames}
    options |= {"image": Image.open(tiny.picture)} if tiny.codec.takes_images else {}
    inputs, steps, last = [], [], []
    step = stock.scheduler.step

    def spy(prediction: Tensor, t: Tensor, x: Tensor, **kwargs: Any) -> Any:
        steps.append((latents_of(tiny, prediction), t.item(), latents_of(tiny, x)))
        last[:] = step(prediction, t, x, **kwargs)
        return tuple(last)

    stock.scheduler.step = spy

    def listen(network: Any, args: Any, kwargs: Any) -> None:
        inputs.append(inspect.signature(network.forward).bind(*args, **kwargs).arguments)

    hooks = [network.register_forward_pre_hook(listen, with_kwargs=True) for network in tiny.networks]
    output = stock(**options)
    stock.scheduler.step = step
    for hook in hooks:
        hook.remove()
    pixels = output.frames if isinstance(section, WanTeacher) else output.images[:, None]
    return Told(inputs, steps, latents_of(tiny, last[0]), pixels.movedim(2, 4))


def limit(section: PipelineTeacher, tokens: int) -> dict[str, int]:
    """How a stock pipeline is told the most tokens of a prompt, if it can be."""
    return {"max_sequence_length": tokens} if adapter_of(section).stock.limits else {}


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device())


def latents_of(tiny: Tiny, x: Tensor) -> Tensor:
    """As ours are; a copy, since diffusers' networks may return views."""
    return adapter_of(tiny.teacher).stock.restored(x, *tiny.model.sample_shapes[0][-2:]).clone()


# ---------------------------------------------------------------- against the stock pipelines


def test_conditions_are_what_the_stock_pipeline_tells_its_network(tiny: Tiny, told: Callable[[Tiny], Told]) -> None:
    """Text, mask and first frame, of the prompts (its first call) and of the negative prompt (its second)."""
    negative = tiny.system.unconditional(tiny.condition, 2)
    for i, (ours, theirs) in enumerate(zip((tiny.condition, negative), told(tiny).inputs, strict=False)):
        if texts := told_apart(theirs, told(tiny).inputs[0], i):
            lengths = ours["mask"].sum(1)
            for a, b, n in zip(ours["text"], texts, lengths, strict=True):
                torch.testing.assert_close(a[:n], b, **EXACT)
            continue
        assert torch.equal(ours["text"], theirs["encoder_hidden_states"])
        if "mask" in ours:
            mask = theirs["encoder_hidden_states_mask"]
            assert ours["mask"].all() if mask is None else torch.equal(ours["mask"].cpu(), mask.bool().cpu())
        if "image" in ours:
            torch.testing.assert_close(ours["image"], theirs["hidden_states"][:, -20:], **EXACT)
        if "first_frame" in ours:
            torch.testing.assert_close(ours["first_frame"], theirs["hidden_states"][:, :, :1], **EXACT)
        features = theirs.get("encoder_hidden_states_image")
        assert (features is None) == ("image_features" not in ours)
        if features is not None:
            torch.testing.assert_close(ours["image_features"], features, **EXACT)


def told_apart(told: dict[str, Any], first: dict[str, Any], half: int) -> list[Tensor]:
    """The prompts' texts where they were told without padding; those of Z-Image's two halves came in one call."""
    if "cap_feats" in first:
        return first["cap_feats"][2 * half : 2 * half + 2]
    texts = told["encoder_hidden_states"]
    if "encoder_attention_mask" in told:  # as long for all prompts
        return [text[mask.bool()] for text, mask in zip(texts, told["encoder_attention_mask"], strict=True)]
    return texts if isinstance(texts, list) else []


def test_the_prediction_is_the_networks_own(tiny: Tiny) -> None:
    """At t of .9 and .3, with the network called as its own documentation says, each of a pair."""
    x, t = draw(2, *tiny.model.sample_shapes[0], seed=2).to(device()), times(0.9, 0.3)
    outputs = []
    for network, theirs in zip(tiny.model.networks, tiny.networks, strict=True):
        with torch.no_grad():
            ours, expected = tiny.model.predict(network, x, t, tiny.condition), direct_call(tiny, theirs, x)
        known = int("first_frame" in tiny.condition)  # latent frames that need no network
        torch.testing.assert_close(ours[:, :, known:], expected[:, :, known:], **EXACT)
        assert ours.dtype == x.dtype and expected.std() > 0.01
        outputs.append(ours)
    assert len(outputs) == 1 or (outputs[0] - outputs[1]).abs().max() > 0.01


def direct_call(tiny: Tiny, network: Any, x: Tensor) -> Tensor:
    """The network's prediction at t of .9 and .3 for PROMPTS, by the stock pipeline's own preparations."""
    stock, size, options = tiny.stock, tiny.teacher.sizes[0], {}
    if not isinstance(tiny.teacher, WanTeacher):
        return direct(stock, x, times(0.9, 0.3).float(), PROMPTS, tiny.teacher.max_tokens, Image.open(tiny.picture))
    text, _ = stock.encode_prompt(PROMPTS, max_sequence_length=tiny.teacher.max_tokens)
    timestep = times(900, 300).float()
    if tiny.codec.takes_images:
        picture = Image.open(tiny.picture)
        pixels = stock.video_processor.preprocess(picture, size.height, size.width).to(device())
        frames = {"height": size.height, "width": size.width, "num_frames": size.num_frames}
        prepared = stock.prepare_latents(
            pixels, 2, tiny.model.sample_shapes[0][0], **frames, dtype=torch.float32, device=device()
        )
        x = torch.where(prepared[2] == 1, x, prepared[1]) if len(prepared) == 3 else torch.cat([x, prepared[1]], 1)
        if stock.image_encoder is not None:
            options["encoder_hidden_states_image"] = stock.encode_image(picture, device()).repeat(2, 1, 1)
    if stock.config.expand_timesteps:
        tokens = x.shape[3] // 2 * x.shape[4] // 2
        first = torch.full((tokens,), 0.0 if tiny.codec.takes_images else 1.0)
        timestep = timestep[:, None] * torch.cat([first, torch.ones(tokens * (x.shape[2] - 1))]).to(device())
    return network(x, timestep, text, **options).sample


def test_a_sample_does_not_depend_on_the_prompt_beside_it(tiny: Tiny) -> None:
    """Two prompts of different lengths in one batch, and each alone."""
    x, t = draw(2, *tiny.model.sample_shapes[0], seed=2).to(device()), times(0.9, 0.3)
    assert tiny.condition["text"].shape[1] >= max(len(row["text"]) for row in tiny.rows)
    with torch.no_grad():
        for network in tiny.model.networks:
            both = tiny.model.predict(network, x, t, tiny.condition)
            for i, row in enumerate(tiny.rows):
                alone = tiny.model.predict(network, x[i : i + 1], t[i : i + 1], tiny.model.batch([row]))
                torch.testing.assert_close(both[i : i + 1], alone, **EXACT)


@pytest.mark.parametrize("name", PICTURES)
def test_the_base_is_sampled_at_its_own_pipelines_times(name: str, tinies: Callable[[str], Tiny]) -> None:
    """Of four steps and of nine, whatever shift is the plan's, which is 5; samples are of four."""
    tiny = tinies(name)
    noise, size = draw(1, *tiny.model.sample_shapes[0], seed=6).to(device()), tiny.teacher.sizes[0]
    prompt = Prompt("a boat", tiny.picture if tiny.codec.takes_images else None)
    shown = {"image": Image.open(tiny.picture)} if prompt.image else {}
    for steps in (9, 4):
        found = stock_times(tiny.teacher, 0, steps)
        assert found is not None
        tiny.stock(
            prompt="a boat", height=size.height, width=size.width, num_inference_steps=steps, output_type="latent",
            latents=adapter_of(tiny.teacher).stock.given(noise), **limit(tiny.teacher, 8), **shown,
        )  # fmt: skip
        assert found == pytest.approx(tiny.stock.scheduler.sigmas.tolist(), abs=1e-6) and len(found) == steps + 1
    sampler = Sampler(tiny.system, tiny.codec)
    condition = tiny.model.batch([sampler.encode([prompt])[prompt]])
    expected = tiny.system.sample_teacher(sampler._noise([0]), condition, steps, found)
    torch.testing.assert_close(sampler([prompt], [0], teacher_steps=steps), expected.cpu(), **EXACT)
    own = tiny.system.sample_teacher(sampler._noise([0]), condition, steps)
    assert (own - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", [case for case in CASES if case.startswith(("wan", "ti2v"))])
def test_wans_base_is_sampled_by_its_own_pipelines_scheduler(name: str, tinies: Callable[[str], Tiny]) -> None:
    """UniPC of order 2 with its corrector, on the folder's own shift, whatever the plan's is."""
    tiny, steps = tinies(name), 6
    section, size = tiny.teacher, tiny.teacher.sizes[0]
    sampler = Sampler(tiny.system, tiny.codec)
    prompt = Prompt("a boat", tiny.picture if tiny.codec.takes_images else None)
    noise, condition = sampler._noise([0]), tiny.model.batch([sampler.encode([prompt])[prompt]])
    tiny.stock.scheduler = Source(section).load(UniPCMultistepScheduler, "scheduler")
    shown = {"image": Image.open(tiny.picture)} if prompt.image else {}
    asked = guided(section) | {"prompt": prompt.text, "negative_prompt": section.negative_prompt}
    expected = tiny.stock(
        **asked, **shown, height=size.height, width=size.width, num_frames=size.num_frames, num_inference_steps=steps,
        output_type="latent", latents=noise, **limit(section, section.max_tokens),
    ).frames  # fmt: skip
    found = sampler([prompt], [0], teacher_steps=steps)
    known = int("first_frame" in condition)  # as exact as the scheduler's times, which are rounded to thousandths
    torch.testing.assert_close(found[:, :, known:], expected[:, :, known:].cpu(), **EXACT)
    torch.testing.assert_close(found, expected.cpu(), rtol=0, atol=2e-3)
    euler = tiny.system.sample_teacher(noise, condition, steps)
    assert (euler.cpu() - found).abs().max() > 1e-3


def test_a_solver_of_many_steps_begins_at_the_first(folders: Callable[[str], Path]) -> None:
    """Its times are cut down to whole numbers: at shift 12 the first two of 100 are both 999."""
    folder = build("wan21_t2v", folders("wan21_t2v").parent / "steep")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"flow_shift": 5.0', '"flow_shift": 12.0'))
    solver, x = stock_solver(teacher("wan21_t2v", folder), 100), torch.zeros(1, 2)
    assert solver.timesteps[:2].tolist() == [999, 999]
    for timestep in solver.timesteps:
        x = solver.step(torch.ones(1, 2), timestep, x, return_dict=False)[0]
    torch.testing.assert_close(x, torch.full((1, 2), -1.0), rtol=0, atol=1e-4)  # one velocity from t = 1 to 0


def test_the_guided_teacher_is_what_the_stock_pipeline_steps_with(tiny: Tiny, told: Callable[[Tiny], Told]) -> None:
    """From the first step, at t = 1, to the last: Qwen's rescaling, each network's guidance on its side of a switch."""
    assert_guided_alike(tiny, told(tiny))


def test_a_guided_norm_is_limited_as_z_images_pipeline_does(
    tinies: Callable[[str], Tiny], told: Callable[[Tiny], Told]
) -> None:
    limited, free = tinies("z_image of a limited norm"), tinies("z_image")
    assert_guided_alike(limited, told(limited))
    assert (told(limited).steps[0][0] - told(free).steps[0][0]).abs().max() > 0.01


def assert_guided_alike(tiny: Tiny, told: Told) -> None:
    used = set()
    for i, (expected, timestep, x) in enumerate(told.steps):
        assert i > 0 or timestep == 1000
        t = times(timestep, timestep) / 1000
        with torch.no_grad():
            ours = tiny.system.teacher(x, t, tiny.condition)
        known = int("first_frame" in tiny.condition)
        torch.testing.assert_close(ours[:, :, known:], expected[:, :, known:], **EXACT)
        used.add(tiny.system.plan.network(timestep / 1000))
    assert used == set(range(len(tiny.model.networks)))


def test_a_guided_token_of_zeros_is_zero(tinies: Callable[[str], Tiny]) -> None:
    """Where both predictions are, and where guidance cancels them; Qwen-Image divides by its norm."""
    model = tinies("qwen_image").model
    x = draw(1, *model.sample_shapes[0], seed=4).to(device())
    x[..., :2, :2] = 0  # a token
    guided = model.guide(x, x / 3, 4.0)
    assert torch.equal(guided[..., :2, :2], torch.zeros_like(x[..., :2, :2]))
    torch.testing.assert_close(guided, x)  # of one direction: its norm is the conditional's
    assert torch.equal(model.guide(x, 2 * x, 2.0), torch.zeros_like(x))


def test_pixels_are_the_stock_pipelines(tiny: Tiny, told: Callable[[Tiny], Told]) -> None:
    latents = told(tiny).latents
    if "first_frame" in tiny.condition:
        latents = torch.cat([tiny.condition["first_frame"], latents[:, :, 1:]], 2)
    colours, alpha = told(tiny).pixels[..., :3], told(tiny).pixels[..., 3:]  # Qwen-Image-2.1's, to be shown on white
    expected = colours * alpha + 1 - alpha if alpha.shape[-1] else colours
    torch.testing.assert_close(tiny.codec.decode(latents), expected, **EXACT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_given_first_latent_frame_is_known_exactly(
    dtype: str, folders: Callable[[str], Path], tinies: Callable[[str], Tiny]
) -> None:
    """With expanded timesteps, x_0 of that frame is the picture's latent at any t; the teacher's sample ends on it."""
    tiny = tinies("ti2v_5b from a frame")
    model, _ = load_model(teacher_of("ti2v_5b from a frame", folders, dtype=dtype), 0)
    system = build_system(tiny.system.config, model, tiny.system.negative)
    first, condition = tiny.condition["first_frame"], model.batch(tiny.rows)
    x, t = draw(2, *model.sample_shapes[0], seed=3).to(device()), times(1.0, 0.02)
    with torch.no_grad():
        x_0 = predicted_x0(system.teacher(x, t, condition), x, t, model.schedule, model.prediction)
    torch.testing.assert_close(x_0[:, :, :1], first, **EXACT)
    assert (x_0[:, :, 1:] - first).abs().max() > 0.01
    torch.testing.assert_close(system.sample_teacher(x, condition, 3)[:, :, :1], first, **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_a_freed_encoder_is_gone_until_it_is_needed_again(
    name: str, folders: Callable[[str], Path], picture: Callable[..., Path]
) -> None:
    section = teacher_of(name, folders)
    shown = picture(2 * section.sizes[0].height, 2 * section.sizes[0].width)
    _, codec = load_model(section, 0)
    without = storages(living_parameters())
    before = [encoded(codec, text, shown) for text in PROMPTS]
    loaded = storages(living_parameters())
    codec.free()
    assert len(loaded) > len(without) and storages(living_parameters()) == without
    for old, text in zip(before, PROMPTS, strict=True):
        assert torch.equal(old["text"], encoded(codec, text, shown)["text"])


# ---------------------------------------------------------------- whole runs


def prompts_file(folder: Path, codec: Codec, picture: Path) -> str:
    """PROMPTS, each with the picture where the model takes one."""
    path = folder / "prompts.jsonl"
    path.write_text("".join(Prompt(text, picture if codec.takes_images else None).line() + "\n" for text in PROMPTS))
    return str(path)


def experts(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "experts").iterdir())}


@pytest.mark.parametrize("case", CASES)
def test_it_is_distilled_resumed_to_the_byte_sampled_and_exported(
    case: str, folders: Callable[[str], Path], tinies: Callable[[str], Tiny], tmp_path: Path
) -> None:
    """In the second phase, between two updates of the expert. Of each model's exports tests/export has the samples."""
    tiny = tinies(case)
    size = tiny.teacher.sizes[0].model_copy(update={"num_frames": 1 if case in PICTURES else 5})
    section = teacher_of(case, folders, sizes=[size.model_dump()])
    prompts = prompts_file(tmp_path, tiny.codec, tiny.picture)
    config = config_of(section, prompts, iterations=1, phase_shares=(1, 2))
    whole = phased_dmd.distill(config.model_copy(update={"sample_every": 2}), tmp_path / "whole", quiet=True)
    assert len(list((whole / "samples").iterdir())) == 2
    with killed_after(2, 1):
        phased_dmd.distill(config, tmp_path / "run", quiet=True)
    run = phased_dmd.distill(config, tmp_path / "run", quiet=True)
    assert experts(run) == experts(whole) and len(experts(run)) == 2
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for phase in (1, 2):
        assert_trained(case, load_tensors(RunFolder(run).expert_path(phase))[0], len(tiny.networks), phase)

    sampler = phased_dmd.load(run)
    asked = [Prompt(text, tiny.picture if tiny.codec.takes_images else None) for text in PROMPTS]
    *samples, _, sheet = write_samples(sampler, asked, 1, tmp_path / "samples")
    assert len(samples) == 2 and Image.open(sheet).size[0] >= size.width
    for path, pixels in zip(samples, sampler.decode(sampler(asked, [0, 0])), strict=True):
        picture = Image.open(path)
        assert path.suffix == (".png" if size.num_frames == 1 else ".webp")
        assert getattr(picture, "n_frames", 1) == size.num_frames
        factor = 1 if size.num_frames == 1 else 128 // size.height
        assert picture.size == (factor * size.width, factor * size.height)
        first = np.asarray(picture.convert("RGB"))[::factor, ::factor] / 255
        assert np.abs(first - pixels[0].numpy()).max() < 0.51 / 255

    lines = export(run, tmp_path / "export")
    files = sorted(path.name for path in (tmp_path / "export").glob("*.safetensors"))
    for file, line, times in zip(files, lines, ("1, 0.9375", "0.833333, 0.625"), strict=False):
        assert line.startswith(f"{file}: transformer") and line.endswith(f" from {times}")
    assert len(files) == 2


def assert_trained(case: str, expert: dict[str, Tensor], networks: int, phase: int) -> None:
    """Every adapter has moved, on the network that serves the phase (of shift 5: 1, .9375 | .8333, .625).

    Qwen-Image's last block computes a text stream that nothing reads: its adapters get no gradient.
    """
    still = {name for name, tensor in expert.items() if "lora_B" in name and not tensor.any()}
    unread = ("transformer_blocks.1.txt_mlp", "transformer_blocks.1.attn.to_add_out", "transformer_blocks.1.attn.add_q")
    assert all(any(part in name for part in unread) for name in still) and (case.startswith("qwen_image") or not still)
    assert {name.split(".")[0] for name in expert} == {str(phase - 1) if networks == 2 else "0"}


# ---------------------------------------------------------------- half precision and memory


@pytest.mark.parametrize(
    ("name", "fake"), [*((name, "full") for name in ("wan22_t2v", "wan21_i2v", *PICTURES)), ("wan22_t2v", "lora")]
)  # a fake's adapter is made as an expert's, which every case has
def test_a_bfloat16_teacher_trains_float32_weights(
    name: str, fake: Any, folders: Callable[[str], Path], tinies: Callable[[str], Tiny], tmp_path: Path
) -> None:  # fmt: skip
    """Steps of 1e-6, lost in bfloat16, move all whose gradient is above AdamW's eps; the base stays bfloat16."""
    tiny, dtypes, moved, old = tinies(name), defaultdict(set), defaultdict(set), {}

    def before(_: str, group: dict[str, Any]) -> None:
        old.clear()
        old.update({p: p.detach().clone() for p in group["params"] if p.grad is not None and p.grad.abs().max() > 1e-6})

    def after(role: str, group: dict[str, Any]) -> None:
        dtypes[role] |= {p.dtype for p in group["params"]}
        moved[role] |= {not torch.equal(value, p) for p, value in old.items()}

    config = config_of(
        teacher_of(name, folders, dtype="bfloat16"), prompts_file(tmp_path, tiny.codec, tiny.picture),
        generator=Generator(lora=Lora(rank=4, alpha=4), lr=1e-6),
        fake=Fake(weights=fake, updates=1, lora=Lora(rank=4, alpha=4), lr=1e-6), iterations=1,
    )  # fmt: skip
    with watched_steps(before, after):
        run = phased_dmd.distill(config, tmp_path / "run", quiet=True)
    sampler = phased_dmd.load(run)
    assert dtypes == dict.fromkeys(("phase_1", "phase_2", FAKE), {torch.float32})
    assert moved == dict.fromkeys(("phase_1", "phase_2", FAKE), {True})
    for network, theirs in zip(sampler.system.model.networks, tiny.networks, strict=True):
        kept = [p for key, p in network.named_parameters() if "lora_" not in key]
        stock = type(theirs).from_pretrained(Path(tiny.teacher.path) / "transformer", torch_dtype=torch.bfloat16)
        assert [p.dtype for p in kept] == [p.dtype for p in stock.parameters()]  # a few of Wan's stay float32
        assert sum(p.dtype == torch.bfloat16 for p in kept) > len(kept) / 2
    x, t = draw(2, *tiny.model.sample_shapes[0], seed=2).to(device()), times(0.9, 0.3)
    with torch.no_grad():
        ours, precise = (
            system.teacher(x, t, system.model.batch(tiny.rows)) for system in (sampler.system, tiny.system)
        )
    assert ours.dtype == torch.float32
    assert 0 < (ours - precise).norm() < 0.1 * precise.norm()


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def living_parameters() -> list[Parameter]:
    """Those that have bytes."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is Parameter and not thing.is_meta]


@pytest.mark.parametrize("fake", ["full", "lora"])
def test_each_base_is_held_once_each_full_fake_once_and_the_adapters(fake: Any, folders: Callable[[str], Path]) -> None:
    """All parameters alive, of two networks with an expert on each and a fake on both."""
    section, before = teacher_of("wan22_t2v", folders), storages(living_parameters())
    config = config_of(section, fake=Fake(weights=fake, lora=Lora(rank=4, alpha=4)))
    model = load_model(section, 0)[0]
    system = build_system(config, model, {})
    bases = storages(p for network in model.networks for p in network.parameters())
    modules = [pair for network in model.networks for pair in network.named_modules()]
    adapted = [module for name, module in modules if name.endswith(section.lora_targets)]
    for phase in (1, 2):
        add_expert(system, phase, trainable=True)
    system.roles.add(FAKE, (0, 1), config.fake.lora if fake == "lora" else None, seed=0)
    after = storages(living_parameters())
    new = {address: size for address, size in after.items() if address not in before}
    own = {role: storages(system.roles.parameters(role).values()) for role in ("phase_1", "phase_2", FAKE)}
    assert new == bases | own["phase_1"] | own["phase_2"] | own[FAKE]
    assert len(new) == len(bases) + sum(map(len, own.values()))
    bytes_of = {role: sum(sizes.values()) for role, sizes in own.items()}
    rank4 = sum(4 * 4 * (module.in_features + module.out_features) for module in adapted)  # float32, both networks
    assert bytes_of["phase_1"] + bytes_of["phase_2"] == rank4
    assert bytes_of[FAKE] == (rank4 if fake == "lora" else sum(bases.values()))


# ---------------------------------------------------------------- what the user can mend


def with_pickle(part: str) -> Callable[[Path], None]:
    def swap(folder: Path) -> None:
        (weights,) = (folder / part).glob("*.safetensors")
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
        weights.unlink()

    return swap


def with_json(file: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


DAMAGED = [  # a pipeline, what is done to its folder, what the line says
    ("wan21_t2v", with_pickle("transformer"), r"transformer holds no weights in safetensors"),
    ("wan21_t2v", with_pickle("text_encoder"), r"text_encoder holds no weights in safetensors"),
    ("qwen_image", with_pickle("text_encoder"), r"text_encoder holds no weights in safetensors"),
    ("wan21_i2v", with_pickle("vae"), r"vae holds no weights in safetensors"),
    ("wan21_t2v", lambda folder: shutil.rmtree(folder / "vae"), r"holds no vae"),
    ("wan22_t2v", lambda folder: shutil.rmtree(folder / "transformer_2"), r"holds no transformer_2"),
    ("wan21_t2v", lambda folder: (folder / "model_index.json").unlink(), r"model_index.json"),
    ("qwen_image", with_json("transformer/config.json", guidance_embeds=True), r"distilled from its guidance already"),
    ("flux2_klein", with_json("transformer/config.json", guidance_embeds=True), r"distilled from its guidance already"),
    ("flux2_klein", with_json("model_index.json", is_distilled=True), r"is distilled already .* flux2-klein-9b distil"),
    ("z_image", with_json("scheduler/scheduler_config.json", shift=3.0), r"is Z-Image-Turbo, .* distils the base"),
    ("z_image", lambda folder: shutil.rmtree(folder / "vae"), r"holds no vae.* the recipe z-image"),
    (
        "qwen_image_21",
        with_json("model_index.json", sample_sigmas=[1.0, 0.5]),
        r"\(sample_sigmas\): .* the base",
    ),
    ("krea_2", with_json("model_index.json", is_distilled=True), r"is distilled already .* base, krea/Krea-2-Raw"),
    ("krea_2", lambda folder: shutil.rmtree(folder / "vae"), r"holds no vae.* the recipe krea-2"),
    ("lumina_2", lambda folder: shutil.rmtree(folder / "text_encoder"), r"holds no text_encoder.* recipe lumina-2"),
    ("qwen_image_edit", lambda folder: shutil.rmtree(folder / "processor"), r"holds no processor.* qwen-image-edit"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGED)
def test_a_damaged_folder_is_refused_before_anything_is_encoded(
    name: str, damage: Callable[[Path], None], message: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    path = shutil.copytree(folders(name), tmp_path / "copy")
    damage(path)
    with pytest.raises(UserError, match=message):
        load_model(teacher_of(name, folders, path=str(path)), 0)


def without(name: str, tensors: dict[str, Tensor]) -> None:
    del tensors[name]


def of_another_shape(name: str, tensors: dict[str, Tensor]) -> None:
    tensors[name] = tensors[name].flatten()[:1].clone()


def prefixed(_name: str, tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        tensors[f"module.{key}"] = tensors.pop(key)


PARTIAL = [  # a pipeline, a part, a tensor of it
    ("wan21_i2v", "text_encoder", "encoder.block.0.layer.1.DenseReluDense.wo.weight"),
    ("wan21_i2v", "image_encoder", "encoder.layers.0.mlp.fc1.weight"),
    ("wan21_i2v", "transformer", "blocks.1.ffn.net.2.weight"),
    ("wan21_i2v", "vae", "decoder.conv_in.weight"),
    ("qwen_image", "text_encoder", "model.layers.0.mlp.up_proj.weight"),
    ("qwen_image", "transformer", "img_in.weight"),
    ("qwen_image", "vae", "encoder.conv_in.weight"),
]


@pytest.mark.parametrize(
    ("change", "shards"), [(without, False), (without, True), (of_another_shape, False), (prefixed, False)]
)
@pytest.mark.parametrize(("name", "part", "tensor"), PARTIAL)
def test_a_part_whose_file_lacks_a_tensor_or_has_another_is_named_and_never_filled_in(
    name: str, part: str, tensor: str, change: Callable[[str, dict[str, Tensor]], None], shards: bool,
    folders: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    """As one file, and as shards whose index still speaks of what they held before."""
    path = Path(shutil.copytree(folders(name), tmp_path / "copy"))
    (weights,) = (path / part).glob("*.safetensors")
    tensors = load_file(weights)
    assert tensor in tensors
    if shards:
        shard = f"{weights.stem}-00001-of-00001.safetensors"
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, shard)}
        weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
        weights.unlink()
        weights = weights.with_name(shard)
    first = min(tensors) if change is prefixed else tensor
    change(tensor, tensors)
    save_file(tensors, weights, {"format": "pt"})
    found = (
        rf"{part}: {first} is \[1\], where its"
        if change is of_another_shape
        else rf"{part} lacks {first}( and| of its)"
    )
    found = found.replace("model.layers", r"model\.(language_model\.)?layers")
    with pytest.raises(UserError, match=rf"^teacher\.path: \S+/{found}"):
        codec = load_model(teacher_of(name, folders, path=str(path)), 0)[1]
        codec.encode_text(PROMPTS)


@pytest.mark.parametrize("names", [["shared"], ["encoder.embed_tokens"], ["shared", "encoder.embed_tokens"]])
def test_a_tied_tensor_may_be_in_the_file_by_any_of_its_names(
    names: list[str], folders: Callable[[str], Path], tinies: Callable[[str], Tiny], tmp_path: Path
) -> None:
    """UMT5's token embedding: of either name alone, and of both, the text is encoded as before; of none, refused."""
    path = Path(shutil.copytree(folders("wan21_t2v"), tmp_path / "copy"))
    (weights,) = (path / "text_encoder").glob("*.safetensors")
    tensors = load_file(weights)
    shared = tensors.pop("shared.weight")
    save_file(tensors | {f"{name}.weight": shared.clone() for name in names}, weights, {"format": "pt"})
    found = load_model(teacher_of("wan21_t2v", folders, path=str(path)), 0)[1].encode_text(PROMPTS)
    for ours, expected in zip(found, tinies("wan21_t2v").codec.encode_text(PROMPTS), strict=True):
        assert torch.equal(ours["text"], expected["text"])
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks encoder\.embed_tokens\.weight and 1 more tensors of its UMT5Encoder"):
        load_model(teacher_of("wan21_t2v", folders, path=str(path)), 0)[1].encode_text(PROMPTS)


def sized(num_frames: int, height: int, width: int) -> dict[str, Any]:
    return {"sizes": [{"num_frames": num_frames, "height": height, "width": width}]}


WRONG = [  # a pipeline, what its section says instead, what the line says
    ("wan21_t2v", {"path": "/absent"}, r"teacher.path: /absent is no folder"),
    ("wan21_t2v", sized(1, 30, 48), r"teacher.sizes.0: 1x30x48 .* nearest is 1x32x48"),
    ("wan21_t2v", sized(4, 32, 48), r"teacher.sizes.0: 4x32x48 .* nearest is 5x32x48"),
    ("ti2v_5b", sized(5, 32, 48), r"strides 4, 32, 32 .* nearest is 5x32x64"),
    ("qwen_image", sized(1, 32, 40), r"teacher.sizes.0: 1x32x40 .* nearest is 1x32x32"),
    ("qwen_image", sized(5, 32, 48), r"teacher.sizes.0: .* 5 frames"),
    ("z_image", sized(1, 40, 48), r"teacher.sizes.0: 1x40x48 .* nearest is 1x32x48"),
    ("flux2_klein", sized(5, 32, 48), r"teacher.sizes.0: .* 5 frames; FLUX.2 klein makes pictures"),
    ("wan21_t2v", sized(1, 32, 528), r"sizes.0: 1x32x528 is beyond .* positions, which ends at 125x512x512"),
    ("wan21_t2v", sized(129, 32, 48), r"sizes.0: 129x32x48 is beyond .* positions, which ends at 125x512x512"),
    ("qwen_image", {"max_tokens": 2000}, r"teacher.max_tokens: 2000 is more than Qwen-Image's 1024"),
    ("qwen_image", {"guidance": (3.0, 2.0)}, r"teacher.guidance: 2 values for 1 network"),
    ("wan22_t2v", {"guidance": (3.0, 2.0, 1.0)}, r"teacher.guidance: 3 values for 2 network"),
    ("wan21_t2v", {"lora_targets": ("to_q", "to_z")}, r"teacher.lora_targets: to_z"),
    ("qwen_image", {"lora_targets": ("q",)}, r"teacher.lora_targets: q "),
    ("wan21_t2v", {"first_frame": True}, r"teacher.first_frame: .* 16 input channels"),
    ("wan21_i2v", {"first_frame": False}, r"teacher.first_frame: .* 36 input channels"),
]


@pytest.mark.parametrize(("name", "changes", "message"), WRONG)
def test_a_wrong_field_is_named(
    name: str, changes: dict[str, Any], message: str, folders: Callable[[str], Path]
) -> None:
    with pytest.raises(UserError, match=message):
        load_model(teacher_of(name, folders, **changes), 0)


def test_a_target_that_ends_names_of_lists_too_stands_for_the_layers_alone(folders: Callable[[str], Path]) -> None:
    """FLUX.2's attn.to_out is a layer in one kind of block, and a list of two in the other."""
    model, _ = load_model(teacher_of("flux2_klein", folders, lora_targets=("attn.to_out", "ff.linear_in")), 0)
    singles = [f"single_transformer_blocks.{i}.attn.to_out" for i in range(2)]
    assert list(model.lora_targets) == [*singles, "ff.linear_in"]


def test_another_pipelines_folder_is_refused(folders: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="is a QwenImagePipeline, not a WanPipeline"):
        load_model(teacher_of("wan21_t2v", folders, path=str(folders("qwen_image"))), 0)
    with pytest.raises(UserError, match=r"is a ZImagePipeline, not a Flux2KleinPipeline; it fits the recipe z-image$"):
        load_model(teacher_of("flux2_klein", folders, path=str(folders("z_image"))), 0)
    with pytest.raises(UserError, match="it fits the recipe flux2-klein-4b or flux2-klein-9b$"):
        load_model(teacher_of("z_image", folders, path=str(folders("flux2_klein"))), 0)
    with pytest.raises(UserError, match="is a WanImageToVideoPipeline, .*; it fits the recipe wan22-i2v$"):
        load_model(teacher_of("qwen_image", folders, path=str(folders("wan22_i2v"))), 0)
    for case, recipe in {
        "qwen_image_21": "qwen-image-2.1",
        "qwen_image_edit": "qwen-image-edit",
        "krea_2": "krea-2",
    }.items():
        with pytest.raises(UserError, match=rf"not a QwenImagePipeline; it fits the recipe {recipe}$"):
            load_model(teacher_of("qwen_image", folders, path=str(folders(case))), 0)
    with pytest.raises(UserError, match="is a WanPipeline, not a QwenImagePipeline"):
        load_model(teacher_of("qwen_image", folders, path=str(folders("wan21_t2v"))), 0)


def test_without_a_boundary_the_second_network_is_left_alone(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """As in the stock pipeline."""
    path = shutil.copytree(folders("wan22_t2v"), tmp_path / "copy")
    with_json("model_index.json", boundary_ratio=None)(path)
    model, _ = load_model(teacher_of("wan22_t2v", folders, path=str(path), guidance=3.0), 0)
    assert len(model.networks) == 1 and not model.switches


@pytest.mark.parametrize("case", FIRST_FRAME)
def test_a_first_frame_must_be_a_picture_of_the_samples_shape(
    case: str, tinies: Callable[[str], Tiny], picture: Callable[..., Path], tmp_path: Path
) -> None:
    tiny = tinies(case)
    size = tiny.teacher.sizes[0]
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(tiny.picture.read_bytes()[:60])
    assert tiny.codec.fits(picture(3 * size.height, 3 * size.width)) == [0]
    refused = [
        (Prompt("a fox"), "needs a picture with every prompt; 'a fox' has none"),
        (Prompt("a fox", picture(2 * size.width, 2 * size.height)), "fits none of the sizes"),
        (Prompt("a fox", tmp_path / "text.png"), "text.png: cannot be read as a picture"),
        (Prompt("a fox", tmp_path / "absent.png"), "absent.png: cannot be read as a picture"),
    ]
    for prompt, message in refused:
        with pytest.raises(UserError, match=message):
            fitting(tiny.codec, [prompt])
    with pytest.raises(UserError, match="cut.png: cannot be read as a picture"):
        tiny.codec.encode_picture("a fox", tmp_path / "cut.png", 0)


def test_prompts_beyond_the_encoder_are_counted(tinies: Callable[[str], Tiny]) -> None:
    """As many tokens as are kept are not too many: the stock encoding of one word more is no longer."""
    for case in ("wan21_t2v", "qwen_image"):
        tiny = tinies(case)
        texts = [" ".join(["fox"] * count) for count in range(1, 40)]
        lengths = [len(row["text"]) for row in tiny.codec.encode_text(texts)]
        longest = max(range(len(texts)), key=lambda i: (lengths[i], -i))
        assert lengths[longest] == tiny.teacher.max_tokens and lengths[longest - 1] < lengths[longest]
        assert tiny.codec.too_long(texts[: longest + 1]) == 0
        assert tiny.codec.too_long(texts) == len(texts) - longest - 1


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("flux2_klein", "qwen_image_edit", "krea_2")])
def test_lengths_are_those_of_the_rows_that_are_encoded(name: str, tinies: Callable[[str], Tiny]) -> None:
    """Klein's rows keep their padding, Qwen-Image-Edit reads a prompt beside its picture, and Krea's template has a
    number of tokens that only its own tokenizer makes of it.
    """
    codec, texts = tinies(name).codec, ["fox", "a red fox"]
    assert codec.lengths(texts) == [len(row["text"]) for row in codec.encode_text(texts)]


@pytest.mark.parametrize(
    ("name", "changes", "prompts", "message"),
    [
        ("wan22_t2v", {"path": "/absent"}, "a fox", "/absent is no folder"),
        ("wan21_t2v", {"path": "qwen_image"}, "a fox", "not a WanPipeline"),
        ("wan21_t2v", {"lora_targets": ("to_z",)}, "a fox", "teacher.lora_targets: to_z"),
        ("qwen_image", sized(1, 32, 40), "a fox", "nearest is 1x32x32"),
        ("wan22_i2v", {}, "a fox", "needs a picture with every prompt"),
        ("qwen_image_edit", {}, "a fox", "needs a picture with every prompt"),
    ],
)
def test_the_command_says_one_line_and_leaves_nothing_behind(
    name: str, changes: dict[str, Any], prompts: str, message: str, folders: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if changes.get("path") in NAMES:
        changes = {"path": str(folders(changes["path"]))}
    (tmp_path / "prompts.txt").write_text(prompts)
    config = config_of(teacher_of(name, folders, **changes), str(tmp_path / "prompts.txt"))
    (tmp_path / "run.json").write_text(config.model_dump_json())
    arguments = ["phased-dmd", "distill", str(tmp_path / "run.json"), "--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
