"""`export`: one folder, in one layout, that holds what the run samples; the same run gives the same bytes."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler, WanPipeline
from PIL import Image
from runs import TINY, Make
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from phased_dmd.checkpoint import RunFolder, load_tensors, save_tensors
from phased_dmd.cli import main
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.export import export
from phased_dmd.export.exported_run import ExportedRun
from phased_dmd.export.verify import VerificationError, free_memory, precision, verify
from phased_dmd.recipes import resolve
from phased_dmd.sampling.loading import load, read_export
from phased_dmd.train import distill

TRAINED = [1, 15 / 16, 5 / 6, 5 / 8]  # shift 5 of 1, 3/4, 1/2, 1/4
SAME = "verified, by load_pipeline and as a custom pipeline: samples at"


def verified(lines: list[str]) -> str:
    """What the last line says was compared."""
    return lines[-1].split(" differ")[0]


def lora_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# ---------------------------------------------------------------- what is written, and that it is the run


@pytest.mark.parametrize("name", pipelines.NAMES)
def test_every_model_is_exported_and_verified(name: str, make: Make, tmp_path: Path) -> None:
    lines = export(make(name), tmp_path / "out", verify=True)
    files = [path.name for path in lora_files(tmp_path / "out")]
    stills = ("wan21_t2v", *pipelines.PICTURES)
    task = {"ti2v_5b": "_t2v", "qwen_image_edit": "_i2i"}.get(name, "_t2i" if name in stills else "")
    sizes = {"ti2v_5b": "5x32x64", "qwen_image_edit": "64x96", "qwen_image_21": "32x64"}
    size = sizes.get(name, "32x48" if name in stills else "5x32x48")
    noise = ("_high_noise", "_low_noise") if name.startswith("wan22") else ("", "")
    assert files == [f"{name}{task}_4step{noise[i]}_phase{i + 1}_rank4_{size}.safetensors" for i in (0, 1)]
    for file in files:
        assert f"{file}: all {len(load_file(tmp_path / 'out' / file))} keys loaded" in lines
    assert verified(lines) == f"{SAME} 1, 0.9375, 0.833333, 0.625"
    assert any(line.startswith("warning: the base is a folder of this machine; --base-model") for line in lines)


def test_a_first_frame_given_to_ti2v_5b_is_exported_as_image_to_video(
    make: Make, workshop: Path, tmp_path: Path
) -> None:
    Image.effect_noise((64, 32), 80).convert("RGB").save(workshop / "wide.png")
    (workshop / "wide.jsonl").write_text(json.dumps({"prompt": "a boat", "image": "wide.png"}))
    run = make("ti2v_5b", teacher__first_frame=True, prompts=str(workshop / "wide.jsonl"))
    lines = export(run, tmp_path / "out", verify=True)
    assert verified(lines) and read_export(tmp_path / "out", "x")[0].recipe
    assert json.loads((tmp_path / "out" / "export.json").read_text())["pipeline"] == "WanImageToVideoPipeline"


@pytest.mark.parametrize(
    ("name", "method", "overrides", "experts", "fits"),
    [
        ("nano", "phased", {}, ["phase1", "phase2", "phase3", "phase4"], False),
        ("wan21_t2v", None, {}, ["phase1", "phase2"], True),
        ("wan22_t2v", "dmd-sgts", {}, ["high_noise_phase1", "low_noise_phase1"], True),
        (
            "wan22_t2v",
            None,
            {"plan__phases": 4},
            ["high_noise_phase1", "high_noise_phase2", "low_noise_phase3", "low_noise_phase4"],
            False,
        ),
        ("wan21_t2v", None, {"ablation__solver": "renoise"}, ["phase1", "phase2"], True),
        ("qwen_image", None, {"ablation__solver": "renoise", "plan__shift": 3.0}, ["phase1", "phase2"], False),
        ("qwen_image", "dmd", {"plan__shift": 3.0}, ["phase1"], True),
        ("z_image", None, {"ablation__solver": "renoise", "plan__shift": 3.0}, ["phase1", "phase2"], False),
        ("z_image", "dmd", {"plan__shift": 3.0}, ["phase1"], True),
        ("flux2_klein", None, {"ablation__solver": "renoise", "plan__shift": 3.0}, ["phase1", "phase2"], False),
        ("flux2_klein", "dmd", {"plan__shift": 3.0}, ["phase1"], True),
    ],
)
def test_every_plan_is_exported_and_verified_as_lora_and_fused(
    name: str, method: Any, overrides: dict[str, Any], experts: list[str], fits: bool, make: Make, tmp_path: Path
) -> None:
    """Fused as far as a stock pipeline has transformers for the experts."""
    run = make(name, method, **overrides)
    assert [expert.name for expert in ExportedRun.open(run).experts] == experts
    shown = "1, 0.9, 0.75, 0.5" if "plan__shift" in overrides else "1, 0.9375, 0.833333, 0.625"
    assert verified(export(run, tmp_path / "lora", verify=True)) == f"{SAME} {shown}"
    if not fits:
        with pytest.raises(UserError, match=r"^--fused: \d experts, where a \w+ has [12] transformer\(s\) at most$"):
            export(run, tmp_path / "fused", fused=True)
        assert not (tmp_path / "fused").exists()
        return
    assert verified(export(run, tmp_path / "fused", fused=True, verify=True)) == f"{SAME} {shown}"
    parts = sorted(path.parent.name for path in (tmp_path / "fused").glob("transformer*/*.safetensors"))
    assert parts == ["transformer", "transformer_2"][: len(experts)]


def test_the_scale_is_in_the_weights_and_the_header_says_how_to_run_them(make: Make, tmp_path: Path) -> None:
    """alpha 2 at rank 4 is a scale of 1/2. Nothing in the header depends on the machine or the day."""
    run = make("wan22_t2v")
    export(run, tmp_path / "out")
    names = {"attn1.to_out.0": "self_attn.o", "ffn.net.0.proj": "ffn.0"}
    for phase, (network, part, steps) in enumerate([(0, "transformer", [0, 1]), (1, "transformer_2", [2, 3])], start=1):
        stem = f"wan22_t2v_4step_{('high', 'low')[network]}_noise_phase{phase}_rank4_5x32x48"
        path = tmp_path / "out" / f"{stem}.safetensors"
        expert, written = load_tensors(RunFolder(run).expert_path(phase))[0], load_file(path)
        assert len(written) == len(expert)
        for ours, theirs in names.items():
            for side, scale in (("A", 1), ("B", 0.5)):
                found = written[f"diffusion_model.blocks.1.{theirs}.lora_{side}.weight"]
                assert torch.equal(found, scale * expert[f"{network}.blocks.1.{ours}.lora_{side}.weight"])
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        header = json.loads(metadata.pop("phased_dmd"))
        assert header.pop("grid") == pytest.approx([*TRAINED, 0])
        assert header.pop("boundary") == pytest.approx([5 / 6, 0][phase - 1])
        assert header.pop("boundary_ratio") == pytest.approx((15 / 16 + 5 / 6) / 2)
        assert header == {
            "base_model": None, "base_revision": None, "steps": steps, "shift": 5.0, "solver": "ddim", "guidance": 1.0,
            "phase": phase, "network": network, "part": part, "rank": 4, "alpha": 4, "method": "phased-sgts",
            "weighting": "normalised",
        }  # fmt: skip
        hint = metadata.pop("modelspec.usage_hint")
        made = f"this file makes step {steps[0] + 1} and {steps[1] + 1}, on the base's {part}"
        assert hint == f"4 steps at 1, 0.9375, 0.833333, 0.625, guidance 1, strength 1; {made}"
        assert metadata == {
            "format": "pt", "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": "wan22_t2v/lora",
            "modelspec.implementation": "diffusers", "modelspec.title": stem, "modelspec.license": "other",
            "modelspec.resolution": "48x32",
        }  # fmt: skip


@pytest.mark.parametrize("name", ["wan22_t2v", *pipelines.PICTURES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_that_is_read_and_exported_again_has_the_same_bytes(
    name: str, dtype: Any, make: Make, workshop: Path, tmp_path: Path
) -> None:
    """The experts that `load` reads of an export, put into a run of the export's own configuration."""
    export(make(name), tmp_path / "first", dtype=dtype)
    trained = read_export(tmp_path / "first", str(workshop / "teachers" / name))
    folder = RunFolder(tmp_path / "run")
    for phase in (1, 2):
        save_tensors(folder.expert_path(phase), trained.experts(phase), {"phase": phase})
    folder.config_path.write_text(trained.config.model_dump_json())
    export(folder.path, tmp_path / "again", dtype=dtype)
    first, again = ([path.read_bytes() for path in lora_files(tmp_path / each)] for each in ("first", "again"))
    assert len(first) == 2 and first == again


def test_bfloat16_halves_the_files_and_is_the_default_of_a_base_in_bfloat16(make: Make, tmp_path: Path) -> None:
    run = make("wan21_t2v")
    export(run, tmp_path / "full")
    lines = export(run, tmp_path / "half", dtype="bfloat16", verify=True)
    full, half = (load_file(lora_files(tmp_path / each)[0]) for each in ("full", "half"))
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in full.items())
    assert verified(lines) == f"{SAME} 1, 0.9375, 0.833333, 0.625" and "bfloat16" not in lines[-1], "it is exact"
    large = reconfigured(run, tmp_path / "run", dtype="bfloat16")
    assert ExportedRun.open(large).dtype == torch.bfloat16
    export(make("nano", generator__lora__alpha=40.0), tmp_path / "fused", fused=True, dtype="bfloat16", verify=True)
    assert load_file(tmp_path / "fused" / "transformer" / "diffusion_pytorch_model.safetensors")[
        "blocks.0.attn1.to_q.weight"
    ].dtype == torch.bfloat16  # fmt: skip


def test_the_boundary_lies_between_grid_points_where_the_switch_is_one(make: Make, tmp_path: Path) -> None:
    """Shift 7: 1, .9545, .875, .7, and the teacher switches at .875, whose step its first network makes."""
    run = make("wan22_t2v", "dmd-sgts", plan__shift=7.0)
    lines = export(run, tmp_path / "out", verify=True)
    assert verified(lines) == f"{SAME} 1, 0.954545, 0.875, 0.7"
    assert ExportedRun.open(run).boundary_ratio == pytest.approx((0.875 + 0.7) / 2)


def test_fused_transformers_are_the_base_and_the_adapter(make: Make, workshop: Path, tmp_path: Path) -> None:
    """In a folder that the stock pipeline loads, which then has two transformers and the boundary between them."""
    run = make("wan21_t2v")
    export(run, tmp_path / "out", fused=True)
    base = load_file(workshop / "teachers" / "wan21_t2v" / "transformer" / "diffusion_pytorch_model.safetensors")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe) is WanPipeline and pipe.config.boundary_ratio == pytest.approx((15 / 16 + 5 / 6) / 2)
    for phase, part in ((1, pipe.transformer), (2, pipe.transformer_2)):
        expert, fused = load_tensors(RunFolder(run).expert_path(phase))[0], part.state_dict()
        assert fused.keys() == base.keys()
        for name, tensor in base.items():
            a, b = (expert.get(f"0.{name.removesuffix('.weight')}.lora_{side}.weight") for side in "AB")
            expected = tensor if a is None or b is None else tensor + 0.5 * b @ a
            torch.testing.assert_close(fused[name], expected, rtol=0, atol=1e-6)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["dmd2_config"].pop("denoising_timesteps") == pytest.approx([1000 * t for t in TRAINED])
    assert index["dmd2_config"] == {"num_inference_steps": 4, "solver": "ode", "guidance_scale": 1.0}


def test_full_experts_are_exported_as_they_are(make: Make, tmp_path: Path) -> None:
    run = make("wan21_t2v", generator__weights="full")
    with pytest.raises(UserError, match="full weights, not LoRA; .* --fused"):
        export(run, tmp_path / "out")
    export(run, tmp_path / "out", fused=True, verify=True)
    expert = load_tensors(RunFolder(run).expert_path(2))[0]
    written = load_file(tmp_path / "out" / "transformer_2" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == {name.removeprefix("0.") for name in expert}
    assert all(torch.equal(written[name.removeprefix("0.")], tensor) for name, tensor in expert.items())


def test_the_stock_scheduler_of_a_fused_export_comes_as_near_as_is_said(make: Make, tmp_path: Path) -> None:
    """Wan: .999999, .9376, .8336, .6259, and whole timesteps 999, 937, 833, 625, of which 999 is farthest off.
    Other models, which are handed times: exact, as distilled by their own index where it can say so."""
    lines = export(make("wan21_t2v"), tmp_path / "wan", fused=True)
    scheduler = UniPCMultistepScheduler.from_pretrained(tmp_path / "wan" / "scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == pytest.approx([0.999999, 0.9376, 0.8336, 0.6259, 0], abs=5e-5)
    assert scheduler.timesteps.tolist() == [999, 937, 833, 625]
    said = "0.999999, 0.937578, 0.833611, 0.625936"
    assert lines[-1] == f"stock times: {said}; off the trained ones by at most 0.001"
    assert f"{said}: off the\ntrained times by at most 0.001." in (tmp_path / "wan" / "README.md").read_text()

    for name, off in {"qwen_image": "true_cfg_scale=1.0", "z_image": "guidance_scale=0.0"}.items() | {
        ("flux2_klein", "guidance_scale=1.0")
    }:
        export(make(name, "dmd", plan__shift=3.0), tmp_path / name, fused=True)
        assert f"`{off}`" in (tmp_path / name / "README.md").read_text()
        pipe = DiffusionPipeline.from_pretrained(tmp_path / name)
        pipe.set_progress_bar_config(disable=True)
        key, value = off.split("=")
        sizes = {"height": 32, "width": 48, "num_inference_steps": 4}
        pipe(prompt="a boat", output_type="latent", **sizes, **{key: float(value)})
        assert pipe.scheduler.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-6)
        assert pipe.config.get("is_distilled") == (True if name == "flux2_klein" else None)


def test_a_hub_teacher_is_named_with_its_revision_and_a_local_one_as_it_is_told(
    make: Make, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no file, header or name holds a path of this machine."""
    local, hub = make("wan22_t2v"), "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    for fused in (False, True):
        export(local, tmp_path / "local" / str(fused), fused=fused)
    export(local, tmp_path / "local" / "named", base_model=hub)
    for path in (path for path in (tmp_path / "local").rglob("*") if path.is_file()):
        assert str(workshop).encode() not in path.read_bytes(), path
        assert str(tmp_path).encode() not in path.read_bytes(), path

    run = reconfigured(local, tmp_path / "run", path=hub, revision="abc123")
    teacher = workshop / "teachers" / "wan22_t2v"
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_, **__: str(teacher))
    export(run, tmp_path / "hub")
    for folder, revision in ((tmp_path / "hub", "abc123"), (tmp_path / "local" / "named", None)):
        file = folder / "wan2.2_t2v_a14b_4step_low_noise_phase2_rank4_5x32x48.safetensors"
        with safe_open(file, "pt") as opened:
            header = json.loads(opened.metadata()["phased_dmd"])
        assert (header["base_model"], header["base_revision"]) == (hub, revision)
        card = (folder / "README.md").read_text()
        assert f"license: apache-2.0\nbase_model: {hub}\nbase_model_relation: adapter\n" in card
        index = json.loads((folder / "export.json").read_text())
        assert (index["base"], index["revision"]) == (hub, revision)
    with pytest.raises(UserError, match=r"^--base-model: names the hub id of a teacher in a folder; nano is its own"):
        export(make("nano"), tmp_path / "nano", base_model="me/nano")


def reconfigured(run: Path, to: Path, **teacher: Any) -> Path:
    """A copy of a finished run whose config says another thing of the teacher."""
    shutil.copytree(run, to)
    config = json.loads((to / "config.json").read_text())
    config["teacher"] |= teacher
    config["fake"]["weights"] = "lora"
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("fused", [False, True])
def test_a_run_on_a_packed_base_is_exported_for_the_full_one(
    fused: bool, make: Make, workshop: Path, tmp_path: Path
) -> None:
    """It is verified on the packed one, unless its experts are merged."""
    full, teacher = make("wan21_t2v"), str(workshop / "teachers" / "wan21_t2v")
    packed = reconfigured(full, tmp_path / "run", quantise="nf4")
    lines = export(packed, tmp_path / "out", fused=fused, verify=True)
    assert verified(lines) == f"{SAME} 1, 0.9375, 0.833333, 0.625"
    assert lines[-2].startswith("verified on the full base" if fused else "verified on the run's own base")
    assert "trained on one packed to `nf4`" in (tmp_path / "out" / "README.md").read_text()
    expected = load(full)(["a boat"], [0])
    torch.testing.assert_close(load(tmp_path / "out", base=teacher)(["a boat"], [0]), expected, rtol=0, atol=1e-5)
    assert (load(packed)(["a boat"], [0]) - expected).abs().max() > 1e-3, "it is packed in the run itself"


WAN_KEY = re.compile(
    r"diffusion_model\.blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])\.lora_[AB]\.weight"
)  # fmt: skip
QWEN_KEY = re.compile(
    r"diffusion_model\.transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
    r"|(img|txt)_mlp\.net\.(0\.proj|2))\.lora_[AB]\.weight"
)
KEYS = {
    "qwen_image": QWEN_KEY,
    "qwen_image_edit": QWEN_KEY,
    "z_image": re.compile(
        r"diffusion_model\.(layers|(noise|context)_refiner)\.\d+\.(attention\.to_([qkv]|out\.0)|feed_forward\.w[123])"
        r"\.lora_[AB]\.weight"
    ),
    "flux2_klein": re.compile(
        r"transformer\.(transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?"
        r"\.linear_(in|out))|single_transformer_blocks\.\d+\.attn\.to_(qkv_mlp_proj|out))\.lora_[AB]\.weight"
    ),
    "qwen_image_21": re.compile(
        r"diffusion_model\.transformer_blocks\.\d+\.(attn\.to_([qkv]|out\.0)|img_mlp\.(proj|gate_layer|out))"
        r"\.lora_[AB]\.weight"
    ),
    "krea_2": re.compile(
        r"transformer\.(transformer_blocks|text_fusion\.(layerwise|refiner)_blocks)\.\d+"
        r"\.(attn\.to_([qkv]|gate|out\.0)|ff\.(gate|up|down))\.lora_[AB]\.weight"
    ),
    "lumina_2": re.compile(
        r"transformer\.(layers|(noise|context)_refiner)\.\d+\.(attn\.to_([qkv]|out\.0)|feed_forward\.linear_[123])"
        r"\.lora_[AB]\.weight"
    ),
}


@pytest.mark.parametrize("name", pipelines.NAMES)
def test_files_have_the_layout_that_every_reader_takes(name: str, exported: Callable[[str], Path]) -> None:
    for path in lora_files(exported(name)):
        keys = load_file(path)
        assert keys and all(KEYS.get(name, WAN_KEY).fullmatch(key) for key in keys)
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0, "tensors that are mapped must be aligned"


def test_adapters_outside_of_the_blocks_are_named_and_read_back_too(make: Make, tmp_path: Path) -> None:
    """diffusers' own converter, which `--verify` asks, knows them all; a convolution's has no name of the kind."""
    targets = ("to_q", "time_embedder.linear_1", "text_embedder.linear_2", "time_proj", "proj_out", "ff.net.0.proj")
    export(make("wan21_i2v", teacher__lora_targets=targets), tmp_path / "out", verify=True)
    keys = load_file(lora_files(tmp_path / "out")[0])
    outside = {key.split(".lora_")[0].removeprefix("diffusion_model.") for key in keys if "blocks." not in key}
    assert outside == {"time_embedding.0", "text_embedding.2", "time_projection.1", "head.head", "img_emb.proj.1"}
    with pytest.raises(UserError, match=r"^teacher\.lora_targets: the original checkpoint has no name for patch_emb"):
        export(make("wan21_t2v", teacher__lora_targets=("to_q", "patch_embedding")), tmp_path / "conv")


# ---------------------------------------------------------------- verification


def rename(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name.replace("blocks.0", "blocks.7")] = tensors.pop(name)


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["diffusion_model.blocks.0.self_attn.q.lora_C.weight"] = torch.zeros(4, 4)


def scale(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = 2 * tensors[name]


@pytest.mark.parametrize("damage", [rename, add, scale])
def test_a_file_with_a_key_too_many_or_wrong_weights_is_not_verified(
    damage: Callable[[dict[str, torch.Tensor]], None], make: Make, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(exported("wan21_t2v"), tmp_path / "out")
    path = lora_files(folder)[1]
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(VerificationError, match="verification failed: .*(unused|cannot load the export|differ)"):
        verify(ExportedRun.open(make("wan21_t2v")), folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("wan21_t2v", lambda index: index["experts"][0].update(steps=[0, 1, 2])),
        ("wan21_t2v", lambda index: index["times"].__setitem__(1, 0.9376)),
        ("wan21_t2v", lambda index: index.update(max_sequence_length=23)),
        ("wan22_t2v", lambda index: index.update(boundary_ratio=0.95)),
        ("wan22_t2v", lambda index: index["experts"][1].update(part="transformer")),
    ],
)
def test_an_index_with_other_times_experts_or_boundary_is_not_verified(
    name: str, change: Callable[[dict[str, Any]], None], make: Make, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    path = shutil.copytree(exported(name), tmp_path / "out") / "export.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(VerificationError, match="verification failed"):
        verify(ExportedRun.open(make(name)), tmp_path / "out")


def test_a_pipeline_file_that_does_another_thing_is_not_verified(
    make: Make, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """It is a stranger's only way in, and is run as diffusers runs it."""
    path = shutil.copytree(exported("wan21_t2v"), tmp_path / "out") / "pipeline.py"
    path.write_text(path.read_text().replace('few["fixed"] | few["unguided"]', '{"guidance_scale": 1.5}'))
    with pytest.raises(VerificationError, match="verification failed: samples"):
        verify(ExportedRun.open(make("wan21_t2v")), tmp_path / "out")


@pytest.mark.parametrize("name", ["wan21_t2v", "wan22_t2v", "wan22_i2v", *pipelines.PICTURES])
def test_a_base_too_large_for_float32_is_verified_in_bfloat16(name: str, make: Make, tmp_path: Path) -> None:
    """By what the experts change: theirs is told from the same with twice the scale, and from another expert's."""
    run = make(name, generator__lora__alpha=80.0)
    export(run, tmp_path / "out")
    opened = ExportedRun.open(run)
    *_, last = verify(opened, tmp_path / "out", torch.bfloat16)
    assert last.endswith("of what the experts change, in bfloat16")
    path = tmp_path / "out" / opened.experts[-1].file
    tensors = load_file(path)
    scale(tensors)
    save_file(tensors, path)
    with pytest.raises(VerificationError, match=r"of what the experts change, in bfloat16, more than 0\.25$"):
        verify(opened, tmp_path / "out", torch.bfloat16)


def test_experts_that_change_next_to_nothing_are_not_verified_in_bfloat16(make: Make, tmp_path: Path) -> None:
    run = make("wan21_t2v", generator__lora__alpha=0.1)
    export(run, tmp_path / "out")
    with pytest.raises(UserError, match=r"^--verify: the experts change too little to be told from rounding"):
        verify(ExportedRun.open(run), tmp_path / "out", torch.bfloat16)


def test_the_precision_is_the_widest_that_the_free_memory_holds() -> None:
    """Of Wan2.2's two networks and umT5, 34 billion numbers."""
    weights = 34 * 10**9
    assert precision(weights, 160e9) == torch.float32
    assert precision(weights, 80e9) == torch.bfloat16
    host = "; CUDA_VISIBLE_DEVICES= takes the host's memory" if device().type == "cuda" else ""
    with pytest.raises(UserError, match=rf"^--verify: the base takes 68 GB in bfloat16, and 24 GB are free{host}$"):
        precision(weights, 24e9)
    assert 0 < free_memory() < 1e15


@pytest.mark.parametrize("name", ["wan22_i2v", *pipelines.PICTURES])
def test_the_weights_of_a_base_are_those_of_all_its_parts(name: str, make: Make) -> None:
    """As the stock pipeline holds them."""
    opened = ExportedRun.open(make(name))
    pipe = DiffusionPipeline.from_pretrained(opened.teacher.path, **opened.adapter.stock.parts(opened.source))
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    numbers = sum(p.numel() for module in modules for p in module.parameters())
    assert opened.source.count_weights() == pytest.approx(numbers, rel=0.02)  # tied embeddings are stored once


# ---------------------------------------------------------------- the package's own sampler, and the command


def test_an_export_is_sampled_like_its_run(make: Make, workshop: Path, tmp_path: Path) -> None:
    """LoRA files, and fused; a teacher in a local folder has to be named."""
    run, teacher = make("wan22_t2v"), str(workshop / "teachers" / "wan22_t2v")
    expected = load(run)(["a boat", "two cats"], [0, 1])
    for fused in (False, True):
        output = tmp_path / str(fused)
        export(run, output, fused=fused)
        with pytest.raises(UserError, match="its teacher was a local folder"):
            load(output)
        found = load(output, base=teacher)(["a boat", "two cats"], [0, 1])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    shipped = make("nano-moe")
    export(shipped, tmp_path / "shipped")
    torch.testing.assert_close(load(tmp_path / "shipped")(["a"], [0]), load(shipped)(["a"], [0]), rtol=0, atol=1e-5)


def test_a_damaged_export_is_one_clear_error(exported: Callable[[str], Path], workshop: Path, tmp_path: Path) -> None:
    shutil.copytree(exported("wan21_t2v"), tmp_path / "out")
    path, teacher = lora_files(tmp_path / "out")[1], str(workshop / "teachers" / "wan21_t2v")
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    kept = {name: tensor for name, tensor in tensors.items() if "attn.q" not in name}
    save_file(kept, path, metadata)
    with pytest.raises(UserError, match="experts: phase_2: 8 tensors missing or surplus"):
        load(tmp_path / "out", base=teacher)
    torch.save(tensors, path)  # a pickle
    with pytest.raises(UserError, match=r"phase2_\S+: not a file of an export, or damaged"):
        load(tmp_path / "out", base=teacher)
    (tmp_path / "out" / "export.json").write_text("{}")
    with pytest.raises(UserError, match="export.json cannot be read"):
        load(tmp_path / "out", base=teacher)


@pytest.mark.parametrize("fused", [False, True])
def test_files_of_an_export_that_were_swapped_by_name_are_named(
    fused: bool, make: Make, workshop: Path, tmp_path: Path
) -> None:
    folder, teacher = tmp_path / "out", str(workshop / "teachers" / "wan22_t2v")
    export(make("wan22_t2v"), folder, fused=fused)
    first, second = (folder / entry["file"] for entry in json.loads((folder / "export.json").read_text())["experts"])
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    says = f"{first}: its header says phase 2, network 1, but export.json that it is phase 1, network 0"
    with pytest.raises(UserError, match=re.escape(says)):
        load(folder, base=teacher)


def test_a_fused_export_with_a_stale_shard_beside_its_weights_is_refused(
    make: Make, workshop: Path, tmp_path: Path
) -> None:
    export(make("wan22_t2v"), tmp_path / "out", fused=True)
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
        export(folder, tmp_path / "out", fused=weights == "full")
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
    send = ["--push", "me/few", "--dry-run"]
    assert command(monkeypatch, "export", run, "--output", tmp_path / "out", "--verify", *send) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[2].startswith("no workflow for ComfyUI: it cannot load this base, whose transformer has patch_size")
    assert shown[5].startswith(f"{SAME} 1, 0.9375, 0.833333, 0.625 differ")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert (
        len(shown) == 6 + len(files) + 1
        and f"README.md: {(tmp_path / 'out' / 'README.md').stat().st_size:,} bytes" in shown
    )
    whole = f"{len(files)} files, {sum(path.stat().st_size for path in files):,} bytes"
    assert shown[-1] == f"me/few: {whole} would go there, private; nothing was sent"
    assert command(monkeypatch, "sample", tmp_path / "out", "--output", tmp_path / "s", "--prompt", "a digit") == 0
    assert (tmp_path / "s" / "contact-sheet.png").exists()


def test_a_failed_verification_is_one_line_and_leaves_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base changes between the two: the pipeline is loaded with one weight doubled."""
    original = WanPipeline.from_pretrained.__func__

    def changed(kind: Any, *given: Any, **options: Any) -> WanPipeline:
        pipe = original(kind, *given, **options)
        pipe.transformer.proj_out.weight.data *= 2
        return pipe

    monkeypatch.setattr(WanPipeline, "from_pretrained", classmethod(changed))
    assert command(monkeypatch, "export", make("wan21_t2v"), "--output", tmp_path / "out", "--verify") == 1
    error = capsys.readouterr().err
    assert error.startswith("phased-dmd: verification failed: samples at 1, 0.9375") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("run", "options", "says"),
    [
        ("toy", [], "a teacher of kind analytic has no stock pipeline"),
        ("wan21_t2v", ["--dry-run"], "--dry-run: is of --push, which is not given"),
        ("wan21_t2v", ["--public"], "--public: is of --push, which is not given"),
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
        folder = shutil.copytree(make("wan21_t2v"), tmp_path.with_name(f"{tmp_path.name}-{run}"))
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
            export(make("wan21_t2v"), output)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
