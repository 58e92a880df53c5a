"""What comes from outside, a teacher's folder, a run, an export, a configuration, becomes neither code nor a path."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from safetensors.torch import load_file, save_file

from phased_dmd import load
from phased_dmd.checkpoint import load_tensors, save_tensors
from phased_dmd.conditions import Conditions
from phased_dmd.config import Config
from phased_dmd.config.overrides import build, read_file
from phased_dmd.dry_run import dry_run
from phased_dmd.errors import UserError
from phased_dmd.export import export
from phased_dmd.models import trust
from phased_dmd.models.loader import load_model
from phased_dmd.prompts import read_prompts
from phased_dmd.recipes import resolve
from phased_dmd.sampling.loading import read_export, read_run
from phased_dmd.sampling.writing import write_samples
from phased_dmd.train import distill

SOURCE = Path(trust.__file__).parents[1]
TINY = {
    "iterations": 1, "batch_size": 2, "plan.steps": 2, "plan.phases": 2, "fake.updates": 1, "generator.lora.rank": 2,
    "generator.lora.alpha": 2.0, "fake.weights": "lora", "fake.lora.rank": 2, "generator.ema": None,
}  # fmt: skip


class Payload:
    """Makes a file as soon as it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.marker),)


@pytest.fixture
def plant(tmp_path: Path) -> Callable[[Path], None]:
    """Writes a payload to a path, as plain pickle; fails the test if it ever ran."""
    marker = tmp_path / "executed"
    check = tmp_path / "it-would"
    pickle.loads(pickle.dumps(Payload(check)))
    assert check.exists(), "the payload itself works"

    def write(path: Path) -> None:
        path.write_bytes(pickle.dumps(Payload(marker)))

    yield write  # type: ignore[misc]
    assert not marker.exists(), "a pickle was executed"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: pipelines.build(name, tmp_path_factory.mktemp(name)) for name in ("wan21_t2v", "qwen_image")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of nano, two phases of one update."""
    base = tmp_path_factory.mktemp("run")
    (base / "prompts.txt").write_text("a seven\n")
    return distill(resolve("nano-t2i", TINY | {"prompts": str(base / "prompts.txt")}), base / "run", quiet=True)


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    export(run, run.parent / "export")
    return run.parent / "export"


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def teacher_of(name: str, folder: Path) -> Any:
    return pipelines.teacher(name, folder)


def config_of(name: str, folder: Path) -> Config:
    return Config(recipe="tiny", teacher=teacher_of(name, folder), prompts="nano-t2i", batch_size=2)


# ---------------------------------------------------------------- the source itself


def sources() -> list[tuple[Path, str]]:
    return [(path, path.read_text()) for path in SOURCE.rglob("*.py")]


def test_yaml_and_torch_are_read_safely_and_nothing_else_unpickles() -> None:
    pattern = r"yaml\.\w*load\w*|torch\.load\([^\n]*|import pickle|\bpickle\.\w+|trust_remote_code=True|\bmarshal\b"
    calls = [(path.name, call) for path, text in sources() for call in re.findall(pattern, text)]
    assert ("overrides.py", "yaml.safe_load") in calls and any(call.startswith("torch.load(") for _, call in calls)
    odd = [each for each in calls if each[1] != "yaml.safe_load" and "weights_only=True" not in each[1]]
    assert odd == [("verify.py", "trust_remote_code=True")], "of the file that an export has just written"


def test_weights_are_asked_for_in_safetensors_wherever_a_library_could_choose() -> None:
    """Every `from_pretrained` of weights and every LoRA reader; tokenizers and schedulers have none."""
    for path, text in sources():
        for call in re.findall(
            r"(?:lora_state_dict|AutoModel\.from_pretrained|CLIPModel\.from_pretrained)\((?:[^()]|\([^()]*\))*", text
        ):
            assert "use_safetensors=True" in call, (path, call)
    assert '"use_safetensors": True' in (SOURCE / "export" / "few_steps.py").read_text()


# ---------------------------------------------------------------- a teacher's folder


PARTS = {"wan21_t2v": ("transformer", "text_encoder", "vae"), "qwen_image": ("transformer", "text_encoder", "vae")}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_a_pickle_in_the_place_of_weights_is_never_opened(
    name: str, part: str, folders: dict[str, Path], tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    folder = copy(folders[name], tmp_path)
    (weights,) = (folder / part).glob("*.safetensors")
    weights.unlink()
    for pickled in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt", "model.ckpt", "model.pth"):
        plant(folder / part / pickled)
    for check in (lambda: load_model(teacher_of(name, folder), 0), lambda: dry_run(config_of(name, folder))):
        with pytest.raises(UserError, match=f"{part} holds no weights in safetensors"):
            check()


@pytest.mark.parametrize("name", PARTS)
def test_a_pickle_beside_the_weights_is_ignored(
    name: str, folders: dict[str, Path], tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    folder = copy(folders[name], tmp_path)
    for part in (*PARTS[name], "tokenizer"):
        for pickled in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt", "tokenizer.pkl", "vocab.pkl"):
            plant(folder / part / pickled)
    load_model(teacher_of(name, folder), 0)[1].encode_text(["a fox"])


@pytest.mark.parametrize("name", PARTS)
def test_a_pickle_named_safetensors_is_refused(
    name: str, folders: dict[str, Path], tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    folder = copy(folders[name], tmp_path)
    plant(next((folder / "transformer").glob("*.safetensors")))
    with pytest.raises(UserError, match="transformer cannot be loaded"):
        load_model(teacher_of(name, folder), 0)


@pytest.mark.parametrize("target", ["../evil.safetensors", "/evil.safetensors", "evil.bin", "sub/evil.safetensors", 3])
def test_an_index_of_shards_names_files_beside_it_alone(
    target: Any, folders: dict[str, Path], tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    folder = copy(folders["wan21_t2v"], tmp_path)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    names = list(load_file(weights))
    shutil.copy(weights, folder / "evil.safetensors")
    weights.rename(folder / "transformer" / "other.safetensors")
    plant(folder / "transformer" / "evil.bin")
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, target)}))
    for check in (
        lambda: load_model(teacher_of("wan21_t2v", folder), 0), lambda: dry_run(config_of("wan21_t2v", folder)),
    ):  # fmt: skip
        with pytest.raises(UserError, match="no safetensors file beside it"):
            check()


CODE = [  # a file of the folder, what it says more, what the line says
    ("model_index.json", {"_class_name": ["pipeline", "Evil"]}, "code of its own"),
    ("model_index.json", {"_class_name": "EvilPipeline"}, "is a EvilPipeline"),
    ("model_index.json", {"vae": ["os", "system"]}, "no class of diffusers or transformers"),
    ("model_index.json", {"extra": ["evil", "Evil"]}, "no class of diffusers or transformers"),
    ("transformer/config.json", {"_class_name": "EvilTransformer"}, "is a EvilTransformer, not a Wan"),
    ("transformer/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "names code"),
    ("vae/config.json", {"_class_name": "subprocess.Popen"}, "is a subprocess.Popen"),
    ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "names code"),
    ("text_encoder/config.json", {"_attn_implementation_internal": "evil/kernel"}, "names code"),
    ("text_encoder/config.json", {"text_config": {"attn_implementation": "evil/kernel:run"}}, "names code"),
    ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, "names code"),
]  # fmt: skip
EVIL = "import os\nopen(os.environ['EVIL_MARKER'], 'w')\nclass Evil: pass\n"


@pytest.mark.parametrize(("file", "changes", "message"), CODE)
def test_a_configuration_that_names_code_is_refused(
    file: str, changes: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("EVIL_MARKER", str(tmp_path / "executed"))
    folder = copy(folders["wan21_t2v"], tmp_path)
    edit(folder / file, **changes)
    for place in (folder, (folder / file).parent):
        (place / "evil.py").write_text(EVIL)
        (place / "pipeline.py").write_text(EVIL)
    message = f"{message}|is code, which is never loaded"
    with pytest.raises(UserError, match=message):
        codec = load_model(teacher_of("wan21_t2v", folder), 0)[1]
        codec.encode_text(["a fox"])
    for script in folder.rglob("*.py"):
        script.unlink()
    with pytest.raises(UserError, match=message):
        load_model(teacher_of("wan21_t2v", folder), 0)[1].encode_text(["a fox"])
    assert not (tmp_path / "executed").exists()


def test_an_adapter_that_names_another_base_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(folders["wan21_t2v"], tmp_path)
    (folder / "text_encoder" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    with pytest.raises(UserError, match="names a base elsewhere"):
        load_model(teacher_of("wan21_t2v", folder), 0)[1].encode_text(["a fox"])


def test_an_attention_by_a_name_of_the_library_is_no_code(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(folders["wan21_t2v"], tmp_path)
    edit(folder / "text_encoder" / "config.json", _attn_implementation_autoset=True, attn_implementation="eager")
    assert load_model(teacher_of("wan21_t2v", folder), 0)[1].encode_text(["a fox"])


# ---------------------------------------------------------------- configurations


TAGS = [
    "!!python/object/apply:os.mknod ['MARKER']",
    "!!python/object/new:os.mknod ['MARKER']",
    "!!python/name:os.mknod",
]


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_makes_no_objects(tag: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"recipe: {tag.replace('MARKER', str(tmp_path / 'executed'))}\n")
    with pytest.raises(UserError, match="cannot be read as YAML"):
        read_file(tmp_path / "run.yaml")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("where", ["", "teacher", "generator", "generator.lora", "engine"])
@pytest.mark.parametrize("field", ["api_key", "token", "WANDB_API_KEY", "class_path", "_target_"])
def test_no_section_has_a_field_for_secrets_or_classes(where: str, field: str) -> None:
    data = json.loads(resolve("nano-t2i", {}).model_dump_json())
    section = data
    for part in filter(None, where.split(".")):
        section = section[part]
    section[field] = "secret"
    with pytest.raises(UserError, match=f"{field}: unknown field"):
        build(data)


def test_no_file_of_a_run_or_export_holds_a_key_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "TRACKIO_KEY"):
        monkeypatch.setenv(name, "s3cr3t-never-written")
    (tmp_path / "prompts.txt").write_text("a seven\n")
    folder = distill(
        resolve("nano-t2i", TINY | {"prompts": str(tmp_path / "prompts.txt")}), tmp_path / "run", quiet=True
    )
    export(folder, tmp_path / "export")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if b"s3cr3t-never-written" in path.read_bytes()]


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", ".x", "a\0b", "", "..", "a\nb", "x" * 101])
def test_a_recipes_name_is_no_path(name: str) -> None:
    data = json.loads(resolve("toy-1d", {}).model_dump_json())
    with pytest.raises(UserError, match="^recipe: "):
        build(data | {"recipe": name})


# ---------------------------------------------------------------- runs, exports, samples


def test_a_runs_expert_that_is_a_pickle_is_refused(run: Path, tmp_path: Path, plant: Callable[[Path], None]) -> None:
    folder = copy(run, tmp_path)
    plant(folder / "experts" / "phase-1.safetensors")
    with pytest.raises(UserError, match="phase-1.safetensors: not a file of this program"):
        load(folder)
    config = resolve("nano-t2i", TINY | {"init_experts": str(folder)})
    with pytest.raises(UserError, match="phase-1.safetensors: not a file of this program"):
        dry_run(config)


@pytest.mark.parametrize("take", ["load", "resume"])
def test_a_runs_expert_that_lacks_a_tensor_is_named(take: str, run: Path, tmp_path: Path) -> None:
    folder = copy(run, tmp_path)
    tensors, header = load_tensors(folder / "experts" / "phase-1.safetensors")
    save_tensors(folder / "experts" / "phase-1.safetensors", dict(list(tensors.items())[1:]), header)
    if take == "resume":
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / "experts" / "phase-2.safetensors").unlink()
    with pytest.raises(UserError, match=f"phase_1: 1 tensors missing or surplus, the first {min(tensors)}"):
        load(folder) if take == "load" else distill(config_in(folder), folder, quiet=True)


@pytest.mark.parametrize("take", ["load", "export", "resume", "init_experts"])
def test_a_runs_experts_that_were_swapped_by_name_are_named(take: str, run: Path, tmp_path: Path) -> None:
    folder = copy(run, tmp_path)
    first, second = (folder / "experts" / f"phase-{phase}.safetensors" for phase in (1, 2))
    first.rename(tmp_path / "aside")
    second.rename(first)
    if take == "resume":
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    else:
        (tmp_path / "aside").rename(second)
    config = config_in(folder)
    ways: dict[str, Callable[[], Any]] = {
        "load": lambda: load(folder),
        "export": lambda: export(folder, tmp_path / "out"),
        "resume": lambda: distill(config, folder, quiet=True),
        "init_experts": lambda: dry_run(config.model_copy(update={"init_experts": (str(folder),)})),
    }
    with pytest.raises(UserError, match=r"phase-1\.safetensors: its header says phase 2, not 1"):
        ways[take]()


def test_a_runs_checkpoint_and_conditions_that_are_pickles_are_not_read(
    run: Path, tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    folder = copy(run, tmp_path)
    expert = (folder / "experts" / "phase-2.safetensors").read_bytes()
    (folder / "experts" / "phase-2.safetensors").unlink()
    for file in (folder / "conditions").iterdir():
        plant(file)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    point = folder / "checkpoints" / "phase-2-iteration-000001-update-0"
    point.mkdir(parents=True)
    for name in (".metadata", "manifest.json", "__0_0.distcp", "shard-00001-model-00001-of-00001.safetensors"):
        plant(point / name)
    with pytest.warns(UserWarning, match="passed over|none of phase 2 is whole"):
        distill(config_in(folder), folder, quiet=True)
    assert (folder / "experts" / "phase-2.safetensors").read_bytes() == expert


def config_in(folder: Path) -> Config:
    return build(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("part", ["config.json", "experts", "experts/phase-1.safetensors"])
def test_a_link_that_leads_out_of_a_run_is_refused(part: str, run: Path, tmp_path: Path) -> None:
    folder = copy(run, tmp_path)
    target = (folder / part).rename(tmp_path / "outside")
    (folder / part).symlink_to(target)
    with pytest.raises(UserError, match="leads out of"):
        read_run(folder)[1](1)
    linked = tmp_path / "link"
    linked.symlink_to(run)
    assert read_run(linked)[1](1), "the run itself may be reached by one"


@pytest.mark.parametrize("linked", ["export.json", "file"])
def test_a_link_that_leads_out_of_an_export_is_refused(linked: str, exported: Path, tmp_path: Path) -> None:
    folder = copy(exported, tmp_path)
    name = linked if linked != "file" else json.loads((folder / "export.json").read_text())["experts"][0]["file"]
    target = (folder / name).rename(tmp_path / "outside.safetensors")
    (folder / name).symlink_to(target)
    with pytest.raises(UserError, match="leads out of"):
        read_export(folder, None)[1](1)


FILES = [
    "../evil.safetensors",
    "/evil.safetensors",
    "sub/evil.safetensors",
    "..",
    ".",
    "",
    ".hidden.safetensors",
    "a\0b",
    3,
]


@pytest.mark.parametrize("file", FILES)
def test_an_export_names_plain_files_in_its_folder(file: Any, exported: Path, tmp_path: Path) -> None:
    folder = copy(exported, tmp_path)
    about = json.loads((folder / "export.json").read_text())
    shutil.copy(folder / about["experts"][0]["file"], tmp_path / "evil.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(tmp_path / "evil.safetensors", folder / "sub")
    about["experts"][0]["file"] = file
    (folder / "export.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="export.json cannot be read .experts.0.file"):
        read_export(folder, None)


@pytest.mark.parametrize("name", ["evil.bin", "evil.pt", "evil.ckpt", "evil.safetensors", "folder"])
def test_an_exports_pickle_is_never_opened(
    name: str, exported: Path, tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    folder = copy(exported, tmp_path)
    if name == "folder":
        (folder / name).mkdir()
        plant(folder / name / "diffusion_pytorch_model.bin")
        plant(folder / name / "model.safetensors")
    else:
        plant(folder / name)
    about = json.loads((folder / "export.json").read_text())
    about["experts"][0]["file"] = name
    (folder / "export.json").write_text(json.dumps(about))
    said = r" \(only safetensors is read" if name in ("evil.bin", "evil.pt", "evil.ckpt") else ""
    with pytest.raises(UserError, match=f"not a file of an export, or damaged{said}"):
        read_export(folder, None)[1](1)


@pytest.mark.parametrize("base", ["/etc", "../nano", "a/../b", "a/b/c", "~/x", "", 3])
def test_an_exports_base_is_a_name_and_no_path(base: Any, exported: Path, tmp_path: Path) -> None:
    folder = copy(exported, tmp_path)
    edit(folder / "export.json", base=base)
    with pytest.raises(UserError, match="export.json cannot be read .base"):
        read_export(folder, None)


def test_an_untouched_export_is_read(exported: Path) -> None:
    config, experts, _ = read_export(exported, None)
    assert config.recipe == "nano-t2i" and experts(1) and experts(2)


def test_prompts_and_teachers_names_make_no_paths_and_no_code(run: Path, tmp_path: Path) -> None:
    """A prompt becomes a plain file name; a teacher's folder a plain word in the exported files."""
    prompts = ["../../x", "/etc/passwd", "a\\b", "..", "日" * 60, "𠀀" * 60, "a\nb"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    out = tmp_path / "deep" / "deeper" / "out"
    paths = write_samples(load(run), read_prompts(str(tmp_path / "p.jsonl")), 1, out)
    assert all(path.parent == out and path.is_file() for path in paths)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "p.jsonl"]

    evil = tmp_path / 'x"""\nimport os; os.mknod("executed")\n"""'
    shutil.copytree(SOURCE / "assets" / "nano", evil)
    folder = copy(run, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["teacher"]["path"] = str(evil)
    (folder / "config.json").write_text(json.dumps(config))
    export(folder, tmp_path / "out")
    assert "mknod(" not in (tmp_path / "out" / "pipeline.py").read_text()
    files = [entry["file"] for entry in json.loads((tmp_path / "out" / "export.json").read_text())["experts"]]
    assert all(re.fullmatch(r"[a-z0-9._]+", file) for file in files)


def test_a_users_prompt_file_may_name_any_picture_but_it_is_read_as_one_only(tmp_path: Path) -> None:
    from PIL import Image

    from phased_dmd.models.loader import load_model

    (tmp_path / "inner").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "outside.png")
    (tmp_path / "postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\nshowpage\n")
    names = [str(tmp_path / "outside.png"), "../outside.png", "../postscript.png", "/etc/passwd", "/dev/zero", "."]
    rows = [json.dumps({"prompt": "a", "image": name}) for name in names]
    (tmp_path / "inner" / "p.jsonl").write_text("\n".join(rows))
    prompts = read_prompts(str(tmp_path / "inner" / "p.jsonl"))
    codec = load_model(resolve("nano-i2v", {}).teacher, 0)[1]
    for prompt in prompts[:2]:
        assert codec.fits(prompt.image) == [0]  # type: ignore[arg-type]
    for prompt in prompts[2:]:
        with pytest.raises(UserError, match="cannot be read as a picture"):
            codec.fits(prompt.image)  # type: ignore[arg-type]


def test_conditions_of_another_hand_are_written_anew(tmp_path: Path, plant: Callable[[Path], None]) -> None:
    codec = load_model(resolve("nano-t2i", {}).teacher, 0)[1]
    prompts = read_prompts("nano-t2i")[:2]
    first = Conditions(codec, prompts, "", tmp_path / "cache").row(0, 0)["text"].clone()
    for file in (tmp_path / "cache").iterdir():
        plant(file)
    assert torch.equal(Conditions(codec, prompts, "", tmp_path / "cache").row(0, 0)["text"], first)


def test_weights_of_another_architecture_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(folders["wan21_t2v"], tmp_path)
    (weights,) = (folder / "vae").glob("*.safetensors")
    save_file({name: torch.zeros(1) for name in load_file(weights)}, weights)
    with pytest.raises(UserError, match=r"vae: decoder\.conv_in\.bias is \[1\], where its AutoencoderKLWan has"):
        load_model(teacher_of("wan21_t2v", folder), 0)
