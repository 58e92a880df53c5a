"""`export`: what stock diffusers and ComfyUI load is what the run samples, at the trained times, all keys used."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers.loaders.lora_conversion_utils as conversion
import pipelines
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from PIL import Image
from runs import finished_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import draw

from phased_dmd.checkpoint import RunFolder, load_tensors, save_tensors
from phased_dmd.cli import main
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.export import export
from phased_dmd.export.exported_run import ExportedRun
from phased_dmd.export.verify import VerificationError, free_memory, precision, verify_comfyui, verify_diffusers
from phased_dmd.prompts import Prompt
from phased_dmd.recipes import resolve
from phased_dmd.sampling.loading import load
from phased_dmd.train import distill

TINY = {"plan.phases": 2, "plan.gradient": "last", "generator.lora.rank": 4, "generator.lora.alpha": 2}
TRAINED = [1, 15 / 16, 5 / 6, 5 / 8]  # shift 5 of 1, 3/4, 1/2, 1/4
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs."""
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def make(workshop: Path) -> Make:
    """A finished run by its teacher, with experts that differ from the teacher a lot; made once for all tests."""
    frame = workshop / "frame.png"
    Image.effect_noise((48, 32), 80).convert("RGB").save(frame)
    (workshop / "texts.txt").write_text("\n".join(pipelines.CAPTIONS))
    rows = [json.dumps({"prompt": text, "image": frame.name}) for text in pipelines.CAPTIONS]
    (workshop / "frames.jsonl").write_text("\n".join(rows))

    def build(name: str, method: Any = None, **overrides: Any) -> Path:
        changes = {key.replace("__", "."): value for key, value in overrides.items()}
        run = workshop / "-".join([name, *map(str, (method, *changes.values()))]).replace("/", "_")
        if RunFolder(run).config_path.exists():
            return run
        texts = str(workshop / ("frames.jsonl" if "_i2v" in name else "texts.txt"))
        settings = ({} if method else TINY) | {"prompts": texts}
        if name in pipelines.NAMES:
            teacher = workshop / "teachers" / name
            if not teacher.exists():
                pipelines.build(name, teacher)
            settings["teacher"] = json.loads(pipelines.teacher(name, teacher).model_dump_json())
        else:
            settings["teacher.path"] = name
        return finished_run(run, resolve("nano-t2i", settings | changes, method))

    return build


def verified(lines: list[str]) -> str:
    """What the last line says was compared."""
    return lines[-1].split(" differ")[0]


# ---------------------------------------------------------------- stock diffusers


@pytest.mark.parametrize("name", pipelines.NAMES)
def test_every_model_is_exported_and_verified(name: str, make: Make, tmp_path: Path) -> None:
    lines = export(make(name), "diffusers", tmp_path / "out", verify=True)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    pair = name.startswith("wan22")
    task = {"wan21_t2v": "t2i", "qwen_image": "t2i", "wan21_i2v": "i2v", "wan22_i2v": "i2v"}.get(name, "t2v")
    stem = f"{name.replace('_', '-')}-{task}-4step-rank4-phase"
    noise = ("-high-noise", "-low-noise") if pair else ("", "")
    assert files == [f"{stem}1{noise[0]}.safetensors", f"{stem}2{noise[1]}.safetensors"]
    for file in files:
        keys = len(load_file(tmp_path / "out" / file))
        assert f"{file}: all {keys} keys loaded" in lines
    assert verified(lines) == "verified: samples at 1, 0.9375, 0.833333, 0.625"


def test_a_first_frame_given_to_ti2v_5b_is_exported_as_image_to_video(
    make: Make, workshop: Path, tmp_path: Path
) -> None:
    Image.effect_noise((64, 32), 80).convert("RGB").save(workshop / "wide.png")
    (workshop / "wide.jsonl").write_text(json.dumps({"prompt": "a boat", "image": "wide.png"}))
    run = make("ti2v_5b", teacher__first_frame=True, prompts=str(workshop / "wide.jsonl"))
    lines = export(run, "diffusers", tmp_path / "out", verify=True)
    assert verified(lines) and "WanImageToVideoPipeline" in (tmp_path / "out" / "sample.py").read_text()


def test_the_script_gives_the_pipeline_a_first_frame_turned_as_a_viewer_shows_it(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(make("wan21_i2v"), "diffusers", tmp_path / "out")
    main = runpy.run_path(str(tmp_path / "out" / "sample.py"))["main"]
    pipe = SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.ones(1)))
    given: list[Image.Image] = []
    main.__globals__["load"] = lambda base: pipe
    main.__globals__["sample"] = lambda pipe, prompt, image, **options: given.append(image) or [[image]]
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    shown = Image.effect_noise((32, 48), 80).convert("RGB")
    shown.rotate(90, expand=True).save(tmp_path / "telephone.png", exif=exif)
    options = [
        "--prompt",
        "a fox",
        "--image",
        f"{tmp_path}/telephone.png",
        "--output",
        f"{tmp_path}/made.png",
        "--base",
        ".",
    ]
    monkeypatch.setattr(sys, "argv", ["sample.py", *options])
    main()
    assert given[0].tobytes() == shown.tobytes()


@pytest.mark.parametrize(
    ("name", "method", "overrides", "experts"),
    [
        ("nano", "phased", {}, ["phase1", "phase2", "phase3", "phase4"]),
        ("wan21_t2v", None, {}, ["phase1", "phase2"]),
        ("wan22_t2v", None, {}, ["phase1-high-noise", "phase2-low-noise"]),
        ("wan22_t2v", "dmd-sgts", {}, ["phase1-high-noise", "phase1-low-noise"]),
        (
            "wan22_t2v",
            None,
            {"plan__phases": 4},
            ["phase1-high-noise", "phase2-high-noise", "phase3-low-noise", "phase4-low-noise"],
        ),
        ("wan21_t2v", None, {"ablation__solver": "renoise"}, ["phase1", "phase2"]),
        ("qwen_image", None, {"ablation__solver": "renoise", "plan__shift": 3.0}, ["phase1", "phase2"]),
    ],
)
def test_every_plan_is_exported_and_verified_as_lora_and_fused(
    name: str, method: Any, overrides: dict[str, Any], experts: list[str], make: Make, tmp_path: Path
) -> None:
    run = make(name, method, **overrides)
    assert [expert.name for expert in ExportedRun.open(run, fused=False).experts] == experts
    shown = "1, 0.9, 0.75, 0.5" if "plan__shift" in overrides else "1, 0.9375, 0.833333, 0.625"
    for fused in (False, True):
        lines = export(run, "diffusers", tmp_path / str(fused), fused=fused, verify=True)
        assert verified(lines) == f"verified: samples at {shown}"
    folders = sorted(path.parent.name for path in (tmp_path / "True").glob("*/diffusion_pytorch_model.safetensors"))
    wan_pair = len(experts) == 2 and name != "qwen_image"
    assert folders == (
        ["transformer", "transformer_2"]
        if wan_pair
        else sorted(expert.file for expert in ExportedRun.open(run, True).experts)
    )


def test_scripts_that_know_only_torch_and_diffusers_make_the_runs_samples(make: Make, tmp_path: Path) -> None:
    """nano in four phases, where the adapters are switched, and the shipped pair; in one process, for its imports."""
    runs, prompts = {"nano": make("nano", "phased"), "pair": make("nano-moe")}, ["a handwritten seven", "a digit"]
    for name, run in runs.items():
        export(run, "diffusers", tmp_path / name)
    torch.save(draw(2, 16, 1, 4, 4, seed=0), tmp_path / "noise.pt")
    (tmp_path / "plain.py").write_text(f"""
import runpy, sys, torch
for name in {list(runs)}:
    script = runpy.run_path(f"{tmp_path}/{{name}}/sample.py")
    pipe = script["load"](dtype=torch.float32)
    noise = torch.load("{tmp_path}/noise.pt", weights_only=True)
    for again in "ab":
        made = script["sample"](pipe, {prompts}, latents=noise, output_type="latent")
        torch.save(made, f"{tmp_path}/{{name}}-{{again}}.pt")
    print([time / 1000 for time in pipe.scheduler.timesteps.tolist()])
    sys.argv = ["sample.py", "--prompt", "a digit", "--output", f"{tmp_path}/{{name}}.png"]
    script["main"]()
assert not any(name.startswith("phased_dmd") for name in sys.modules)
""")
    shown = subprocess.run([sys.executable, tmp_path / "plain.py"], capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    printed = [json.loads(line) for line in shown.stdout.splitlines() if line.startswith("[")]
    assert printed == [pytest.approx(TRAINED, abs=1e-6)] * 2
    for name, run in runs.items():
        system = (sampler := load(run)).system
        condition = system.model.batch(list(sampler.encode([Prompt(text) for text in prompts]).values()))
        noise = torch.load(tmp_path / "noise.pt", weights_only=True)
        with torch.no_grad():
            expected = system.roll(
                system.plan.path(system.plan.num_phases), system.start(noise.to(device())), condition
            ).x
        for again in "ab":
            found = torch.load(tmp_path / f"{name}-{again}.pt", weights_only=True)
            torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=0, atol=1e-4)
        assert Image.open(tmp_path / f"{name}.png").size == (32, 32)


def test_the_scale_is_in_the_weights_and_the_header_says_how_to_run_them(make: Make, tmp_path: Path) -> None:
    """alpha 2 at rank 4 is a scale of 1/2. Nothing in the header depends on the machine or the day."""
    run = make("wan22_t2v")
    export(run, "diffusers", tmp_path / "out")
    for phase, (network, part, steps) in enumerate([(0, "transformer", [0, 1]), (1, "transformer_2", [2, 3])], start=1):
        noise = ("high", "low")[network]
        path = tmp_path / "out" / f"wan22-t2v-t2v-4step-rank4-phase{phase}-{noise}-noise.safetensors"
        expert, written = load_tensors(RunFolder(run).expert_path(phase))[0], load_file(path)
        assert written.keys() == {name.replace(f"{network}.", "transformer.", 1) for name in expert}
        for name, tensor in expert.items():
            scale = 0.5 if ".lora_B" in name else 1
            assert torch.equal(written[name.replace(f"{network}.", "transformer.", 1)], scale * tensor)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata.keys() == {"format", "lora_adapter_metadata", "phased_dmd"}
        adapter = json.loads(metadata["lora_adapter_metadata"])
        assert (adapter["transformer.r"], adapter["transformer.lora_alpha"]) == (4, 4)
        header = json.loads(metadata["phased_dmd"])
        assert header.pop("grid") == pytest.approx([*TRAINED, 0])
        assert header.pop("boundary") == pytest.approx([5 / 6, 0][phase - 1])
        assert header.pop("boundary_ratio") == pytest.approx((15 / 16 + 5 / 6) / 2)
        assert header == {
            "base_model": None, "base_revision": None, "steps": steps, "shift": 5.0, "solver": "ddim", "guidance": 1.0,
            "phase": phase, "network": network, "part": part, "rank": 4, "alpha": 4, "method": "phased-sgts",
            "weighting": "normalised",
        }  # fmt: skip


def test_the_boundary_lies_between_grid_points_where_the_switch_is_one(make: Make, tmp_path: Path) -> None:
    """Shift 7: 1, .9545, .875, .7, and the teacher switches at .875, whose step its first network makes."""
    run = make("wan22_t2v", "dmd-sgts", plan__shift=7.0)
    lines = export(run, "diffusers", tmp_path / "out", verify=True)
    assert verified(lines) == "verified: samples at 1, 0.954545, 0.875, 0.7"
    assert ExportedRun.open(run, fused=False).boundary_ratio == pytest.approx((0.875 + 0.7) / 2)
    script = runpy.run_path(str(tmp_path / "out" / "sample.py"))
    assert script["BOUNDARY"] == pytest.approx(0.7875)


def test_fused_transformers_are_the_base_and_the_adapter(make: Make, workshop: Path, tmp_path: Path) -> None:
    run = make("wan21_t2v")
    export(run, "diffusers", tmp_path / "out", fused=True)
    base = load_file(workshop / "teachers" / "wan21_t2v" / "transformer" / "diffusion_pytorch_model.safetensors")
    for phase, part in ((1, "transformer"), (2, "transformer_2")):
        expert = load_tensors(RunFolder(run).expert_path(phase))[0]
        pipe = WanPipeline.from_pretrained(
            workshop / "teachers" / "wan21_t2v"
        ).components  # stock classes, plain folder
        fused = type(pipe["transformer"]).from_pretrained(tmp_path / "out" / part).state_dict()
        assert fused.keys() == base.keys()
        for name, tensor in base.items():
            a, b = (expert.get(f"0.{name.removesuffix('.weight')}.lora_{side}.weight") for side in "AB")
            expected = tensor if a is None or b is None else tensor + 0.5 * b @ a
            torch.testing.assert_close(fused[name], expected, rtol=0, atol=1e-6)
    assert "boundary_ratio" in (tmp_path / "out" / "README.md").read_text()


def test_full_experts_are_exported_as_they_are(make: Make, tmp_path: Path) -> None:
    run = make("wan21_t2v", generator__weights="full")
    with pytest.raises(UserError, match="full weights, not LoRA; .* --fused"):
        export(run, "diffusers", tmp_path / "out")
    export(run, "diffusers", tmp_path / "out", fused=True, verify=True)
    expert = load_tensors(RunFolder(run).expert_path(2))[0]
    written = load_file(tmp_path / "out" / "transformer_2" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == {name.removeprefix("0.") for name in expert}
    assert all(torch.equal(written[name.removeprefix("0.")], tensor) for name, tensor in expert.items())


def test_the_stock_scheduler_comes_as_near_as_is_said(make: Make, tmp_path: Path) -> None:
    """Wan: .999999, .9376, .8336, .6259, and whole timesteps 999, 937, 833, 625, of which 999 is farthest off.
    Qwen-Image: shift 3 without a terminal is exact."""
    lines = export(make("wan21_t2v"), "diffusers", tmp_path / "wan")
    scheduler = UniPCMultistepScheduler.from_pretrained(tmp_path / "wan" / "scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == pytest.approx([0.999999, 0.9376, 0.8336, 0.6259, 0], abs=5e-5)
    assert scheduler.timesteps.tolist() == [999, 937, 833, 625]
    said = "0.999999, 0.937578, 0.833611, 0.625936"
    assert lines[-1] == f"stock times (UniPCMultistepScheduler): {said}; off the trained ones by at most 0.001"
    assert f"{said}: off the trained times by at most 0.001." in (tmp_path / "wan" / "README.md").read_text()

    run = make("qwen_image", None, plan__shift=3.0)
    export(run, "diffusers", tmp_path / "qwen")
    pipe = DiffusionPipeline.from_pretrained(load(run).codec.source.folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "qwen" / "scheduler")
    pipe.set_progress_bar_config(disable=True)
    pipe("a boat", height=32, width=48, num_inference_steps=4, true_cfg_scale=1.0, output_type="latent")
    assert pipe.scheduler.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-6)


def test_a_hub_teacher_is_named_with_its_revision_and_a_local_one_is_not(
    make: Make, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no file, header or name holds a path of this machine."""
    local = make("wan22_t2v")
    for fused in (False, True):
        export(local, "diffusers", tmp_path / "local" / str(fused), fused=fused)
    export(local, "comfyui", tmp_path / "local" / "comfyui")
    for path in (path for path in (tmp_path / "local").rglob("*") if path.is_file()):
        assert str(workshop).encode() not in path.read_bytes(), path
        assert str(tmp_path).encode() not in path.read_bytes(), path

    run = tmp_path / "run"
    shutil.copytree(local, run)
    config = json.loads((run / "config.json").read_text())
    config["teacher"] |= {"path": "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "revision": "abc123"}
    (run / "config.json").write_text(json.dumps(config))
    teacher = workshop / "teachers" / "wan22_t2v"
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_, **__: str(teacher))
    export(run, "diffusers", tmp_path / "hub")
    file = tmp_path / "hub" / "wan2.2-t2v-a14b-t2v-4step-rank4-phase2-low-noise.safetensors"
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["phased_dmd"])
    assert (header["base_model"], header["base_revision"]) == ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "abc123")
    assert "base_model: Wan-AI/Wan2.2-T2V-A14B-Diffusers\n" in (tmp_path / "hub" / "README.md").read_text()

    asked, original = [], WanPipeline.from_pretrained

    def spy(base: str, revision: str, **options: Any) -> WanPipeline:
        asked.append((base, revision))
        return original(teacher, **options)

    monkeypatch.setattr(WanPipeline, "from_pretrained", spy)
    script = runpy.run_path(str(tmp_path / "hub" / "sample.py"))
    script["load"](dtype=torch.float32)
    assert asked == [("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "abc123")]


def test_fresh_noise_is_drawn_from_the_generator_that_is_given(make: Make, workshop: Path, tmp_path: Path) -> None:
    """Of the re-noising solver, whose first noise is the same here; diffusers' pipelines pass their scheduler none."""
    export(make("wan21_t2v", None, ablation__solver="renoise"), "diffusers", tmp_path / "out")
    script = runpy.run_path(str(tmp_path / "out" / "sample.py"))
    pipe, first = script["load"](str(workshop / "teachers" / "wan21_t2v"), device="cpu"), draw(1, 16, 1, 8, 12, seed=1)
    pipe.set_progress_bar_config(disable=True)

    def sample(seed: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed)
        size = {"height": 64, "width": 96, "num_frames": 1}
        return script["sample"](pipe, "a boat", generator=rng, latents=first, output_type="latent", **size)

    made = sample(0)
    torch.manual_seed(7)
    assert torch.equal(sample(0), made)
    assert (sample(1) - made).abs().max() > 0.1


@pytest.mark.parametrize(("name", "cleans"), [("wan21_t2v", True), ("wan21_i2v", True), ("qwen_image", False)])
def test_what_cleans_prompts_as_in_training_is_named_and_asked_for_at_once(
    name: str, cleans: bool, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ftfy one of Wan's pipelines samples other tokens without a word, and the other fails once it is there."""
    export(make(name), "diffusers", tmp_path / "out")
    for file in ("README.md", "sample.py"):
        assert ("ftfy" in (tmp_path / "out" / file).read_text()) == cleans
    monkeypatch.setitem(sys.modules, "ftfy", None)
    if cleans:
        with pytest.raises(ImportError, match="ftfy"):
            runpy.run_path(str(tmp_path / "out" / "sample.py"))
    else:
        runpy.run_path(str(tmp_path / "out" / "sample.py"))


def reconfigured(run: Path, to: Path, **teacher: Any) -> Path:
    """A copy of a finished run whose config says another thing of the teacher."""
    shutil.copytree(run, to)
    config = json.loads((to / "config.json").read_text())
    config["teacher"] |= teacher
    config["fake"]["weights"] = "lora"
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_text_padded_to_another_length_than_wans_is_warned_of(format: Any, make: Make, tmp_path: Path) -> None:
    """Wan attends to the zeros behind a prompt, and everybody else appends as many as make 512."""
    run = make("wan21_t2v")  # of 24 tokens
    (line,) = [line for line in export(run, format, tmp_path / "out") if line.startswith("warning")]
    assert line.startswith("warning: teacher.max_tokens: text was padded to 24 tokens")
    assert "padded to 24 tokens" in (tmp_path / "out" / "README.md").read_text()
    usual = reconfigured(run, tmp_path / "run", max_tokens=512)
    assert not [line for line in export(usual, format, tmp_path / "usual") if line.startswith("warning")]
    assert "padded" not in (tmp_path / "usual" / "README.md").read_text()
    qwen = make("qwen_image")  # of 24 tokens too, but it masks them
    assert not [line for line in export(qwen, format, tmp_path / "qwen") if line.startswith("warning")]


@pytest.mark.parametrize("fused", [False, True])
def test_a_run_on_a_packed_base_is_exported_and_verified_on_the_full_one(
    fused: bool, make: Make, workshop: Path, tmp_path: Path
) -> None:
    full, teacher = make("wan21_t2v"), str(workshop / "teachers" / "wan21_t2v")
    packed = reconfigured(full, tmp_path / "run", quantise="nf4")
    lines = export(packed, "diffusers", tmp_path / "out", fused=fused, verify=True)
    assert verified(lines) == "verified: samples at 1, 0.9375, 0.833333, 0.625"
    assert "trained on one packed to `nf4`" in (tmp_path / "out" / "README.md").read_text()
    expected = load(full)(["a boat"], [0])
    torch.testing.assert_close(load(tmp_path / "out", base=teacher)(["a boat"], [0]), expected, rtol=0, atol=1e-5)
    assert (load(packed)(["a boat"], [0]) - expected).abs().max() > 1e-3, "it is packed in the run itself"


# ---------------------------------------------------------------- ComfyUI

WAN_KEY = re.compile(  # FACTS: diffusion_model.<original name>.lora_down/up.weight or .alpha
    r"diffusion_model\.(blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])|img_emb\.proj\.[13])"
    r"(\.lora_(down|up)\.weight|\.alpha)"
)
QWEN_KEY = re.compile(  # bare names
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|(img|txt)_mlp\.net\.(0\.proj|2))"
    r"(\.lora_(down|up)\.weight|\.alpha)"
)


@pytest.mark.parametrize("name", pipelines.NAMES)
def test_comfyui_keys_have_its_patterns_and_convert_back(name: str, make: Make, tmp_path: Path) -> None:
    run = make(name)
    lines = export(run, "comfyui", tmp_path / "comfyui", verify=True)
    export(run, "diffusers", tmp_path / "diffusers")
    converter, pattern = (
        (conversion._convert_non_diffusers_qwen_lora_to_diffusers, QWEN_KEY)
        if name == "qwen_image"
        else (conversion._convert_non_diffusers_wan_lora_to_diffusers, WAN_KEY)
    )
    files = sorted((tmp_path / "comfyui").glob("*.safetensors"))
    assert len(files) == 2
    for path in files:
        keys = load_file(path)
        assert all(pattern.fullmatch(key) for key in keys)
        assert all(tensor == 4 for key, tensor in keys.items() if key.endswith(".alpha"))
        assert f"{path.name}: all {len(keys)} keys read" in lines
        back, stock = converter(dict(keys)), load_file(tmp_path / "diffusers" / path.name)
        assert back.keys() == stock.keys() and all(torch.equal(back[key], stock[key]) for key in stock)


@pytest.mark.parametrize(
    ("name", "overrides", "steps"),
    [
        ("wan22_t2v", {"plan__phases": 4}, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ("wan21_i2v", {}, [(0, 2), (2, 4)]),
        ("ti2v_5b", {}, [(0, 2), (2, 4)]),
        ("qwen_image", {"plan__shift": 3.0}, [(0, 2), (2, 4)]),
    ],
)
def test_the_workflow_chains_a_sampler_an_expert(
    name: str, overrides: dict[str, Any], steps: list[tuple[int, int]], make: Make, tmp_path: Path
) -> None:
    export(make(name, None, **overrides), "comfyui", tmp_path / "out")
    graph = json.loads((tmp_path / "out" / "workflow.json").read_text())
    for node in graph.values():
        assert all(value[0] in graph for value in node["inputs"].values() if isinstance(value, list))
    node = next(node for node in graph.values() if node["class_type"] == "VAEDecode")
    found = []
    while (node := graph[node["inputs"].get("samples", node["inputs"].get("latent_image"))[0]])[
        "class_type"
    ] == "KSamplerAdvanced":
        found.insert(0, node["inputs"])
    first, last = found[0], found[-1]
    assert [(sampler["start_at_step"], sampler["end_at_step"]) for sampler in found] == steps
    for sampler in found:
        assert (sampler["steps"], sampler["cfg"], sampler["sampler_name"], sampler["scheduler"]) == (
            4,
            1,
            "euler",
            "simple",
        )
        assert sampler["add_noise"] == ("enable" if sampler is first else "disable")
        assert sampler["return_with_leftover_noise"] == ("disable" if sampler is last else "enable")
    sampling = [graph[sampler["model"][0]] for sampler in found]
    assert {node["class_type"] for node in sampling} == {
        "ModelSamplingAuraFlow" if name == "qwen_image" else "ModelSamplingSD3"
    }
    assert {node["inputs"]["shift"] for node in sampling} == {overrides.get("plan__shift", 5.0)}
    loras = [graph[node["inputs"]["model"][0]]["inputs"] for node in sampling]
    assert [lora["lora_name"] for lora in loras] == sorted(
        path.name for path in (tmp_path / "out").glob("*.safetensors")
    )
    networks = [graph[lora["model"][0]]["inputs"]["unet_name"] for lora in loras]
    assert len(set(networks)) == (2 if name == "wan22_t2v" else 1) and networks == sorted(networks)
    kinds = {node["class_type"] for node in graph.values()}
    assert ("CLIPVisionEncode" in kinds) == (name == "wan21_i2v")


@pytest.mark.parametrize(("count", "shift"), [(4, 5.0), (3, 7.0)])
def test_comfyui_runs_at_the_times_that_are_said(count: int, shift: float, make: Make, tmp_path: Path) -> None:
    """Its `simple` schedule: every len / steps-th entry, from the end, of a table of 1000 shifted noise levels."""
    lines = export(make("wan21_t2v", "phased", plan__steps=count, plan__shift=shift), "comfyui", tmp_path / "out")
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    table = shift * u / (1 + (shift - 1) * u)
    picked = [table[-(1 + int(i * (len(table) / count)))].item() for i in range(count)]
    trained = [shift * u / (1 + (shift - 1) * u) for u in (1 - i / count for i in range(count))]
    gap = max(abs(a - b) for a, b in zip(picked, trained, strict=True))
    said = ", ".join(f"{time:.6g}" for time in picked)
    assert lines[-1] == f"stock times (simple): {said}; off the trained ones by at most {gap:.2g}"
    assert gap < (1e-9 if count == 4 else 1e-3)


# ---------------------------------------------------------------- verification


def rename(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name.replace("blocks.0", "blocks.7")] = tensors.pop(name)


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["transformer.blocks.0.attn1.to_q.lora_C.weight"] = torch.zeros(4, 4)


def scale(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = 2 * tensors[name]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (rename, "keys of .* unused: blocks.7|cannot load"),
        (add, "unused: blocks.0.attn1.to_q.lora_C"),
        (scale, "differ"),
    ],
)
def test_a_file_with_a_key_too_many_or_wrong_weights_is_not_verified(
    damage: Callable, says: str, make: Make, tmp_path: Path
) -> None:
    run = make("wan21_t2v")
    export(run, "diffusers", tmp_path / "out")
    path = tmp_path / "out" / "wan21-t2v-t2i-4step-rank4-phase2.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(VerificationError, match=f"verification failed: .*({says})"):
        verify_diffusers(ExportedRun.open(run, fused=False), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "written", "instead"),
    [
        ("wan21_t2v", '["phase1", "phase1", "phase2", "phase2"]', '["phase1", "phase2", "phase2", "phase2"]'),
        ("wan21_t2v", "0.9375", "0.9376"),
        ("wan21_t2v", "max_sequence_length=24", "max_sequence_length=23"),
        ("wan22_t2v", "BOUNDARY = 0.88541", "BOUNDARY = 0.95"),
        ("wan22_t2v", ', load_into_transformer_2=part == "transformer_2"', ""),
    ],
)
def test_a_script_with_other_times_experts_or_boundary_is_not_verified(
    name: str, written: str, instead: str, make: Make, tmp_path: Path
) -> None:
    run = make(name)
    export(run, "diffusers", tmp_path / "out")
    script = tmp_path / "out" / "sample.py"
    assert written in script.read_text()
    script.write_text(script.read_text().replace(written, instead))
    with pytest.raises(VerificationError, match="verification failed"):
        verify_diffusers(ExportedRun.open(run, fused=False), tmp_path / "out")


@pytest.mark.parametrize("name", ["wan21_t2v", "wan22_t2v", "wan22_i2v", "qwen_image"])
def test_a_base_too_large_for_float32_is_verified_in_bfloat16(name: str, make: Make, tmp_path: Path) -> None:
    """By what the experts change: theirs is told from the same with twice the scale, and from another expert's."""
    run = make(name, generator__lora__alpha=80.0)
    export(run, "diffusers", tmp_path / "out")
    opened = ExportedRun.open(run, fused=False)
    *_, last = verify_diffusers(opened, tmp_path / "out", torch.bfloat16)
    assert last.endswith("of what the experts change, in bfloat16")
    for expert in opened.experts[-1:]:
        tensors = load_file(tmp_path / "out" / expert.file)
        scale(tensors)
        save_file(tensors, tmp_path / "out" / expert.file)
    with pytest.raises(VerificationError, match=r"of what the experts change, in bfloat16, more than 0\.25$"):
        verify_diffusers(opened, tmp_path / "out", torch.bfloat16)


def test_experts_that_change_next_to_nothing_are_not_verified_in_bfloat16(make: Make, tmp_path: Path) -> None:
    run = make("wan21_t2v", generator__lora__alpha=0.1)
    export(run, "diffusers", tmp_path / "out")
    with pytest.raises(UserError, match=r"^--verify: the experts change too little to be told from rounding"):
        verify_diffusers(ExportedRun.open(run, fused=False), tmp_path / "out", torch.bfloat16)


def test_the_precision_is_the_widest_that_the_free_memory_holds() -> None:
    """Of Wan2.2's two networks and umT5, 34 billion numbers."""
    weights = 34 * 10**9
    assert precision(weights, 160e9) == torch.float32
    assert precision(weights, 80e9) == torch.bfloat16
    host = "; CUDA_VISIBLE_DEVICES= takes the host's memory" if device().type == "cuda" else ""
    with pytest.raises(UserError, match=rf"^--verify: the base takes 68 GB in bfloat16, and 24 GB are free{host}$"):
        precision(weights, 24e9)
    assert 0 < free_memory() < 1e15


@pytest.mark.parametrize("name", ["wan22_i2v", "qwen_image"])
def test_the_weights_of_a_base_are_those_of_all_its_parts(name: str, make: Make) -> None:
    """As the stock pipeline holds them."""
    opened = ExportedRun.open(make(name), fused=False)
    pipe = DiffusionPipeline.from_pretrained(opened.teacher.path)
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    numbers = sum(p.numel() for module in modules for p in module.parameters())
    assert opened.source.count_weights() == pytest.approx(numbers, rel=0.02)  # tied embeddings are stored once


def test_comfyui_files_that_do_not_convert_back_are_not_verified(make: Make, tmp_path: Path) -> None:
    run = make("wan21_t2v")
    export(run, "comfyui", tmp_path / "out")
    path = tmp_path / "out" / "wan21-t2v-t2i-4step-rank4-phase1.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"diffusion_model.blocks.0.norm.lora_up.weight": torch.zeros(1)}, path)
    with pytest.raises(VerificationError, match="cannot be read"):
        verify_comfyui(ExportedRun.open(run, fused=False), tmp_path / "out")
    save_file({name: t / 2 if name.endswith(".alpha") else t for name, t in tensors.items()}, path)
    with pytest.raises(VerificationError, match="is not what was loaded"):
        verify_comfyui(ExportedRun.open(run, fused=False), tmp_path / "out")


# ---------------------------------------------------------------- the package's own sampler, and the command


def test_an_export_is_sampled_like_its_run(make: Make, workshop: Path, tmp_path: Path) -> None:
    """LoRA files of either format, and fused; a teacher in a local folder has to be named."""
    run, teacher = make("wan22_t2v"), str(workshop / "teachers" / "wan22_t2v")
    expected = load(run)(["a boat", "two cats"], [0, 1])
    for format, fused in (("diffusers", False), ("comfyui", False), ("diffusers", True)):
        output = tmp_path / f"{format}-{fused}"
        export(run, format, output, fused=fused)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="its teacher was a local folder"):
            load(output)
        found = load(output, base=teacher)(["a boat", "two cats"], [0, 1])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    shipped = make("nano-moe")
    export(shipped, "diffusers", tmp_path / "shipped")
    torch.testing.assert_close(load(tmp_path / "shipped")(["a"], [0]), load(shipped)(["a"], [0]), rtol=0, atol=1e-5)


def test_a_damaged_export_is_one_clear_error(make: Make, workshop: Path, tmp_path: Path) -> None:
    export(make("wan21_t2v"), "diffusers", tmp_path / "out")
    path, teacher = next((tmp_path / "out").glob("*phase2.safetensors")), str(workshop / "teachers" / "wan21_t2v")
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: tensor for name, tensor in tensors.items() if "to_q" not in name}, path, metadata)
    with pytest.raises(UserError, match="experts: phase_2: 8 tensors missing or surplus"):
        load(tmp_path / "out", base=teacher)
    torch.save(tensors, path)  # a pickle
    with pytest.raises(UserError, match="phase2.safetensors: not a file of an export, or damaged"):
        load(tmp_path / "out", base=teacher)
    (tmp_path / "out" / "export.json").write_text("{}")
    with pytest.raises(UserError, match="export.json cannot be read"):
        load(tmp_path / "out", base=teacher)


@pytest.mark.parametrize(("format", "fused"), [("diffusers", False), ("comfyui", False), ("diffusers", True)])
def test_files_of_an_export_that_were_swapped_by_name_are_named(
    format: Any, fused: bool, make: Make, workshop: Path, tmp_path: Path
) -> None:
    folder, teacher = tmp_path / "out", str(workshop / "teachers" / "wan22_t2v")
    export(make("wan22_t2v"), format, folder, fused=fused)
    first, second = (folder / entry["file"] for entry in json.loads((folder / "export.json").read_text())["experts"])
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    says = f"{first.name}: its header says phase 2, network 1, but export.json that it is phase 1, network 0"
    with pytest.raises(UserError, match=re.escape(says)):
        load(folder, base=teacher)


def test_a_fused_export_with_a_stale_shard_beside_its_weights_is_refused(
    make: Make, workshop: Path, tmp_path: Path
) -> None:
    export(make("wan22_t2v"), "diffusers", tmp_path / "out", fused=True)
    stale = tmp_path / "out" / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    save_file({"proj_out.bias": torch.zeros(64)}, stale)
    with pytest.raises(UserError, match=r"proj_out\.bias is in another file of its folder, too"):
        load(tmp_path / "out", base=str(workshop / "teachers" / "wan22_t2v"))


@pytest.mark.parametrize("weights", ["lora", "full"])
@pytest.mark.parametrize("damage", ["lacks", "shape"])
def test_an_expert_that_lacks_a_tensor_or_has_one_of_another_shape_is_not_exported(
    weights: str, damage: str, make: Make, tmp_path: Path
) -> None:
    """What is not in its file would be the base's, and a tensor of one number would be spread over a whole one."""
    run = make("wan21_t2v", generator__weights=weights) if weights == "full" else make("wan21_t2v")
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    tensors, header = load_tensors(RunFolder(folder).expert_path(2))
    for name in [name for name in tensors if name.startswith("0.blocks.1.ffn.net.2.")]:
        if damage == "lacks":
            del tensors[name]
        else:
            tensors[name] = tensors[name].flatten()[:1]
    save_tensors(RunFolder(folder).expert_path(2), tensors, header)
    says = rf"expert of phase 2: 0\.blocks\.1\.ffn\.net\.2\.\S+ is {'missing' if damage == 'lacks' else r'.1.'}, where"
    with pytest.raises(UserError, match=says):
        export(folder, "diffusers", tmp_path / "out", fused=weights == "full")
    assert not (tmp_path / "out").exists()


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["phased-dmd", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command_prints_what_it_wrote_of_a_distilled_run_and_samples_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = {"teacher.path": "nano-moe", "iterations": 1, "batch_size": 2, "fake.updates": 1, "sample_every": None}
    run = distill(resolve("nano-t2i", TINY | quick), tmp_path / "run", quiet=True)
    capsys.readouterr()
    assert command(monkeypatch, "export", run, "--output", tmp_path / "out", "--verify") == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 7 and shown[-1].startswith("verified: samples at 1, 0.9375, 0.833333, 0.625 differ")
    assert command(monkeypatch, "sample", tmp_path / "out", "--output", tmp_path / "s", "--prompt", "a digit") == 0
    assert (tmp_path / "s" / "contact-sheet.png").exists()


def test_a_failed_verification_is_one_line_and_leaves_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base changes between the two: the pipeline is loaded with one weight doubled."""
    original = WanPipeline.from_pretrained

    def changed(*given: Any, **options: Any) -> WanPipeline:
        pipe = original(*given, **options)
        pipe.transformer.proj_out.weight.data *= 2
        return pipe

    monkeypatch.setattr(WanPipeline, "from_pretrained", changed)
    assert command(monkeypatch, "export", make("wan21_t2v"), "--output", tmp_path / "out", "--verify") == 1
    error = capsys.readouterr().err
    assert error.startswith("phased-dmd: verification failed: samples at 1, 0.9375") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("run", "options", "says"),
    [
        ("toy", [], "a teacher of kind analytic has no stock pipeline"),
        ("wan21_t2v", ["--format", "comfyui", "--fused"], "--fused: full experts are written for diffusers only"),
        ("unfinished", [], "the run is not finished"),
        ("moved", [], "teacher"),
        ("early", [], "starts at t = 0.99; stock pipelines start from noise alone, at 1"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    run: str, options: list[str], says: str, make: Make, workshop: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if run == "toy":
        folder = workshop / "toy"
        settings = {"teacher.fit_steps": 1, "batch_size": 4, "iterations": 1}
        distill(resolve("toy-1d", settings), folder, quiet=True)
    else:
        folder = shutil.copytree(make("wan21_t2v"), workshop / run / "run")
    if run == "unfinished":
        RunFolder(folder).expert_path(2).unlink()
    config = json.loads((folder / "config.json").read_text())
    if run == "moved":
        config["teacher"]["path"] = str(tmp_path / "gone")
    if run == "early":
        config["plan"]["start"] = 0.99
    (folder / "config.json").write_text(json.dumps(config))
    assert command(monkeypatch, "export", folder, "--output", tmp_path / "out", "--verify", *options) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_there_is_left_alone(make: Make, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for output in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            export(make("wan21_t2v"), "diffusers", output)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
