"""`distill --dry-run`: the whole run on the meta device, from configurations alone, offline."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines
import pytest
import safetensors
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import TinyCodec, TinyWan

from phased_dmd import cli
from phased_dmd.checkpoint import save_tensors
from phased_dmd.config import Config, Generator, Lora
from phased_dmd.config.teacher import OwnTeacher
from phased_dmd.dry_run import dry_run
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.models.loader import bare_model, load_model
from phased_dmd.models.source import BareSource
from phased_dmd.recipes import RECIPES, SYSTEMS, resolve

PICTURES = [name for name in pipelines.PICTURES if name != "qwen_image_edit"]  # whose prompts need no picture


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("wan21_t2v", "wan21_i2v", "wan22_t2v", *PICTURES)
    return {name: pipelines.build(name, tmp_path_factory.mktemp(name)) for name in names}


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a file of weights, or downloads one, fails the test."""

    def refuse(*args: Any, **_: Any) -> Any:
        raise AssertionError(f"read {args}")

    for module in (safetensors, safetensors.torch, sys.modules["transformers.modeling_utils"]):
        monkeypatch.setattr(module, "safe_open", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("diffusers.models.model_loading_utils.load_state_dict", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(DiffusionPipeline, "download", refuse)
    monkeypatch.setattr(HfApi, "repo_info", refuse)  # what `snapshot_download` begins with


def tiny(name: str, folder: Path, prompts: str = "nano-t2i", **changes: Any) -> Config:
    """A run on a tiny pipeline's folder; a prompt of nano's has fewer than 200 of its letters."""
    teacher = pipelines.teacher(name, folder).model_copy(update={"max_tokens": 200})
    return Config(
        recipe="tiny", teacher=teacher, prompts=prompts, batch_size=2, generator=Generator(lora=Lora(rank=2, alpha=2)),
        **changes,
    )  # fmt: skip


@pytest.mark.parametrize("recipe", ["toy-1d", "toy-2d", "nano-t2i", "nano-t2v", "nano-moe", "nano-i2v"])
def test_the_embedded_recipes_pass_without_a_weight_read(recipe: str, no_weights: None) -> None:
    dry_run(resolve(recipe, {}))


@pytest.mark.parametrize("recipe", SYSTEMS)
def test_the_papers_recipes_pass_offline_without_their_base(
    recipe: str, no_weights: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (1280, 720)).save("landscape.png")
    Image.new("RGB", (720, 1280)).save("portrait.png")
    rows = [{"prompt": name, "image": f"{name}.png"} for name in ("landscape", "portrait")]
    Path("first-frames.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["phased-dmd", "distill", recipe, "--dry-run"])
    with pytest.warns(UserWarning, match="is no folder of this machine: its weights, and the lengths of prompts, are"):
        cli.main()
    assert Config.model_validate_json(capsys.readouterr().out) == RECIPES[recipe]()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first-frames.jsonl", "landscape.png", "portrait.png"]


@pytest.mark.parametrize(
    ("name", "lora"),
    [("wan21_t2v", False), ("wan22_t2v", True), *((name, True) for name in PICTURES)],
)
def test_a_whole_folder_passes_without_a_weight_read(
    name: str, lora: bool, folders: dict[str, Path], no_weights: None
) -> None:
    more = {"fake": {"weights": "lora", "lora": {"rank": 2}}} if lora else {}
    dry_run(tiny(name, folders[name], **more))


@pytest.mark.parametrize("name", ["wan22_t2v", *PICTURES])
def test_a_bare_model_is_the_loaded_one_but_for_the_weights(name: str, folders: dict[str, Path]) -> None:
    teacher = pipelines.teacher(name, folders[name])
    bare, real = bare_model(teacher, 0), load_model(teacher, 0)[0]
    for field in ("sample_shapes", "guidance", "switches", "lora_targets", "prediction"):
        assert getattr(bare, field) == getattr(real, field)
    for one, other in zip(bare.networks, real.networks, strict=True):
        described = [[(n, p.shape, p.dtype) for n, p in network.named_parameters()] for network in (one, other)]
        assert described[0] == described[1]
        assert all(p.is_meta for p in one.parameters()) and not any(p.is_meta for p in other.parameters())


def test_a_bare_toy_has_no_values_and_the_shapes_of_the_fitted_one() -> None:
    teacher = resolve("toy-2d", {"teacher.fit_steps": 1}).teacher
    bare, real = bare_model(teacher, 0), load_model(teacher, 0)[0]
    shapes = [[(n, p.shape) for n, p in model.students[0].named_parameters()] for model in (bare, real)]
    assert shapes[0] == shapes[1] and all(p.is_meta for p in bare.students[0].parameters())
    assert all(p.device.type == device().type for p in real.students[0].parameters())


def gone(*parts: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for part in parts:
            path = folder / part
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def no_safetensors(part: str) -> Callable[[Path], None]:
    def swap(folder: Path) -> None:
        for weights in (folder / part).glob("*.safetensors"):
            torch.save(load_file(weights), weights.with_suffix(".bin"))
            weights.unlink()

    return swap


def emptied(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text("[]") and None


MISSING = [  # a pipeline, what is done to its folder, what the line says
    ("wan21_t2v", gone("model_index.json"), "model_index.json"),
    ("wan21_t2v", gone("tokenizer"), "holds no tokenizer"),
    ("qwen_image", gone("tokenizer"), "holds no tokenizer"),
    ("wan21_t2v", gone("tokenizer/tokenizer.json"), "tokenizer cannot be loaded"),
    ("wan21_t2v", gone("text_encoder"), "holds no text_encoder"),
    ("wan22_t2v", gone("transformer_2"), "holds no transformer_2"),
    ("wan21_t2v", gone("vae/config.json"), "config.json cannot be read"),
    ("wan21_t2v", no_safetensors("transformer"), "transformer holds no weights in safetensors"),
    ("wan22_t2v", no_safetensors("transformer_2"), "transformer_2 holds no weights in safetensors"),
    ("wan21_t2v", no_safetensors("text_encoder"), "text_encoder holds no weights in safetensors"),
    ("qwen_image", no_safetensors("text_encoder"), "text_encoder holds no weights in safetensors"),
    ("qwen_image", no_safetensors("vae"), "vae holds no weights in safetensors"),
    ("wan21_i2v", no_safetensors("image_encoder"), "image_encoder holds no weights in safetensors"),
    ("wan21_t2v", emptied("model_index.json"), "holds no JSON object"),
    ("wan21_t2v", emptied("transformer/config.json"), "holds no JSON object"),
]


@pytest.mark.parametrize(("name", "damage", "message"), MISSING)
def test_what_a_folder_lacks_is_said(
    name: str, damage: Callable[[Path], None], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(folders[name], tmp_path / "copy"))
    damage(path)
    with pytest.raises(UserError, match=message) as error:
        dry_run(tiny(name, path))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        load_model(pipelines.teacher(name, path), 0)


@pytest.mark.parametrize(("field", "value"), [("num_layers", "three"), ("num_attention_heads", -1), ("patch_size", 7)])
def test_a_configuration_that_makes_no_network_is_one_line(
    field: str, value: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(folders["wan21_t2v"], tmp_path / "copy"))
    file = path / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(UserError, match="^teacher"):
        dry_run(tiny("wan21_t2v", path))


def test_a_configuration_may_leave_out_what_its_class_knows(folders: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(folders["wan21_t2v"], tmp_path / "copy"))
    file = path / "vae" / "config.json"
    kept = {
        key: value
        for key, value in json.loads(file.read_text()).items()
        if key not in ("z_dim", "scale_factor_spatial")
    }
    file.write_text(json.dumps(kept))
    dry_run(tiny("wan21_t2v", path))


def test_long_prompts_are_counted_where_the_tokenizer_is_at_hand(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("fox " * 300 + "\na fox\n")
    config = tiny("wan21_t2v", folders["wan21_t2v"], str(tmp_path / "p.txt"))
    with pytest.warns(UserWarning, match="prompts: 1 of 2 are longer"):
        dry_run(config)
    with pytest.raises(UserError, match="prompts: 1 of 2 are longer"):
        dry_run(config, strict=True)


def test_first_frames_are_checked_against_the_sizes_of_a_base_that_is_not_here(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "square.png")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a fox", "image": "square.png"}))
    with pytest.raises(UserError, match="a picture of 64x64 fits none of the sizes"):
        dry_run(resolve("wan22-i2v", {"prompts": str(tmp_path / "p.jsonl")}))


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("wan22-t2v", {"teacher.path": "nobody/none"}, "is no folder and no shipped architecture"),
        ("wan22-t2v", {"teacher.path": "Qwen/Qwen-Image"}, "is a QwenImagePipeline, not a WanPipeline"),
        ("wan22-t2v", {"teacher.guidance": [4.0, 3.0, 2.0]}, "teacher.guidance: 3 values for 2 network"),
        ("wan22-t2v", {"teacher.lora_targets": ["to_z"]}, "to_z ends the name of no module"),
        ("wan22-t2v", {"teacher.lora_targets": ["norm_q"]}, "norm_q is a .*, which takes no adapter"),
        ("wan22-t2v", {"teacher.sizes": [{"num_frames": 81, "height": 481, "width": 832}]}, "nearest is 81x480x832"),
        ("qwen-image", {"teacher.max_tokens": 2000}, "teacher.max_tokens: 2000 is more than Qwen-Image's 1024"),
        ("toy-1d", {"teacher.prediction": "eps"}, "eps prediction cannot start at t = 1"),
        (
            "nano-t2i",
            {"teacher.sizes": [{"height": 272, "width": 32}]},
            "teacher.sizes.0: 1x272x32 is beyond the network's table of positions, which ends at 125x256x256",
        ),
        (
            "wan22-t2v",
            {"teacher.sizes": [{"num_frames": 81, "height": 480, "width": 16400}]},
            "table of positions, which ends at 4093x16384x16384",
        ),
        ("nano-t2i", {"init_experts": "nowhere"}, "init_experts: nowhere: is not there"),
    ],
)
def test_what_a_run_would_refuse_is_refused(recipe: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dry_run(resolve(recipe, overrides))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("as they are", ""),
        ("rank", ""),
        ("a name", "expert of phase 1: surplus is no half, or has no other half, of a layer's adapter"),
        ("another model's layer", r"it changes elsewhere.weight \[4, 4\], which does not exist in this run's network"),
        ("full", "its experts are full weights, from which no adapter can start"),
        ("full, not whole", "expert of phase 1: it lacks "),
    ],
)
def test_initial_experts_must_fit_the_runs_own(change: str, message: str, tmp_path: Path) -> None:
    overrides = {"plan.steps": 2, "plan.phases": 1, "generator.lora.rank": 2, "plan.gradient": "last"}
    full = change.startswith("full")
    other = resolve("nano-t2i", overrides | {"generator.weights": "full" if full else "lora"})
    teacher = load_model(other.teacher, 0)[0]
    tensors = {}
    for name, module in teacher.networks[0].named_modules():
        if any(name.endswith(f".{target}") for target in teacher.lora_targets):
            tensors[f"0.{name}.lora_A.weight"] = torch.zeros(2, module.in_features)
            tensors[f"0.{name}.lora_B.weight"] = torch.zeros(module.out_features, 2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(other.model_dump_json())
    if change == "a name":
        tensors["0.surplus"] = torch.zeros(1)
    if change == "another model's layer":
        tensors |= {
            f"0.elsewhere.lora_{half}.weight": torch.zeros(*shape) for half, shape in (("A", (2, 4)), ("B", (4, 2)))
        }
    if full:
        tensors = {f"0.{name}": p for name, p in teacher.networks[0].named_parameters()}
    if change == "full, not whole":
        tensors.popitem()
    header = {"phase": 1, "weights": "full" if full else "lora", "rank": 2, "alpha": 2.0}
    save_tensors(tmp_path / "run" / "experts" / "phase-1.safetensors", tensors, header)
    more = {"generator.lora.rank": 3} if change == "rank" else {}
    config = resolve("nano-t2i", overrides | more | {"init_experts": str(tmp_path / "run")})
    if not message:
        dry_run(config)
        return
    with pytest.raises(UserError, match=rf"^init_experts: .*{message}"):
        dry_run(config)


def test_a_model_of_ones_own_is_checked_as_it_is(tmp_path: Path) -> None:
    """Told the run's prompts, of which there are two here; what passed is said."""
    (tmp_path / "p.txt").write_text("a seven\na one, moving\n")
    config = Config(recipe="mine", teacher=OwnTeacher(), prompts=str(tmp_path / "p.txt"))
    with pytest.raises(UserError, match="teacher.kind: own is a model of yours: name it by --own module:function"):
        dry_run(config)
    said = dry_run(config, own=(TinyWan(), TinyCodec()))
    assert said is not None and "3 prompts, each encoded as alone" in said  # the empty one is told without guidance
    with pytest.raises(UserError, match=r"^teacher.weights: 1 for the model's 2 sample_shapes$"):
        model = TinyWan()
        model.sample_shapes = ((16, 1, 4, 4), (16, 1, 4, 8))
        dry_run(config, own=(model, TinyCodec()))
    spoilt = TinyWan()
    spoilt.networks[0].train()
    with pytest.raises(UserError, match=r"^--own: networks\[0\]: in train mode; call eval"):
        dry_run(config, own=(spoilt, TinyCodec()))


def test_a_plan_needs_no_weights_where_a_dry_run_does(folders: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(folders["wan21_t2v"], tmp_path / "copy"))
    no_safetensors("transformer")(path)
    teacher = pipelines.teacher("wan21_t2v", path)
    assert bare_model(teacher, 0, BareSource(teacher)).networks
    with pytest.raises(UserError, match="holds no weights in safetensors"):
        bare_model(teacher, 0, BareSource(teacher, look=True))


def test_weights_are_looked_for_and_not_looked_into(folders: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(folders["wan21_t2v"], tmp_path / "copy"))
    for weights in path.rglob("*.safetensors"):
        save_file({"nothing": torch.zeros(1)}, weights)
    dry_run(tiny("wan21_t2v", path))
