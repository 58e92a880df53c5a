"""LoRA files of others are sampled as the run is that they were exported from, and on whatever grid is asked for."""

import json
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from commands import run as command
from runs import finished_run
from safetensors.torch import load_file, save_file
from test_lora_files import original
from torch import Tensor

from phased_dmd.checkpoint import RunFolder
from phased_dmd.config import Config
from phased_dmd.config.overrides import changed
from phased_dmd.engine.randomness import normal
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import step_times
from phased_dmd.networks.roles import expert_role
from phased_dmd.prompts import Prompt
from phased_dmd.recipes import resolve
from phased_dmd.sampling.loading import load, read_expert
from phased_dmd.sampling.others import load_loras, parse_sigmas

PROMPTS = ["a red fox in the snow", "two grey cats asleep"]
OWN: dict[str, Any] = {"generator.lora": {"rank": 4, "alpha": 6.0}, "plan.phases": 2, "prompts": "default-t2v"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two phases, each on one of two networks: what a phase trained is all that its network has."""
    folder = tmp_path_factory.mktemp("others")
    base = pipelines.teacher("wan22_t2v", pipelines.build("wan22_t2v", folder / "base"))
    return finished_run(folder / "run", changed(resolve("nano-t2i"), OWN | {"teacher": base.model_dump(mode="json")}))


def files_of(run: Path, folder: Path, more: dict[str, Tensor] | None = None) -> list[Path]:
    """Its experts as others would publish them, alpha beside each layer; more: for the first file."""
    files = []
    for network, phase in enumerate((1, 2)):
        tensors = dict(more or {}) if phase == 1 else {}
        for name, tensor in read_expert(RunFolder(run), phase)[0].items():
            layer, half = name.removeprefix(f"{network}.").split(".lora_")
            key = f"diffusion_model.{original(layer)}"
            tensors[f"{key}.lora_{'down' if half[0] == 'A' else 'up'}.weight"] = tensor
            tensors[f"{key}.alpha"] = torch.tensor(6.0)
        files.append(folder / ("high_noise.safetensors" if phase == 1 else "low_noise.safetensors"))
        save_file(tensors, files[-1])
    return files


def recipe(run: Path) -> Config:
    """The run's base, with another plan and other adapters."""
    changes = {"plan.phases": 4, "plan.gradient": "all", "generator.lora": {"rank": 2, "alpha": 1.0}}
    return changed(RunFolder(run).config(), changes)


def test_files_on_the_runs_grid_make_the_runs_samples(run: Path, tmp_path: Path) -> None:
    expected = load(run)(PROMPTS, [0, 1])
    sampler = load_loras(recipe(run), files_of(run, tmp_path))
    torch.testing.assert_close(sampler(PROMPTS, [0, 1]), expected, rtol=0, atol=2e-6)
    assert (load_loras(recipe(run), files_of(run, tmp_path)[::-1])(PROMPTS, [0, 1]) - expected).abs().max() > 1e-2
    assert (sampler(PROMPTS, [0, 1], teacher_steps=4) - expected).abs().max() > 1e-2


def test_any_grid_that_falls_is_taken_as_it_is(run: Path, tmp_path: Path) -> None:
    """Steps are Euler's, on the network whose range holds their time: three here, at no shift's times."""
    sampler = load_loras(recipe(run), files_of(run, tmp_path), parse_sigmas("0.95, .9,.3, 0"))
    system, times = sampler.system, (0.95, 0.9, 0.3, 0.0)
    assert system.plan.times == times and system.config.plan.steps == 3
    prompt = Prompt(PROMPTS[0])
    conditions = system.model.batch([sampler.encode([prompt])[prompt]])
    x = (normal(sampler.shape, [0], "sample") * 0.95).to(device())
    with torch.no_grad():
        for i, network in enumerate((0, 0, 1)):
            t = torch.tensor([times[i]], dtype=torch.float64, device=device())
            x = x + (times[i + 1] - times[i]) * system.roles.predict(expert_role(1), network, x, t, conditions)
    torch.testing.assert_close(sampler(PROMPTS[:1], [0]), x.cpu(), rtol=0, atol=1e-5)


def test_differences_of_biases_and_norms_are_sampled_too(run: Path, tmp_path: Path) -> None:
    """The experts are then copies, and the teacher stays what it is."""
    p = "diffusion_model."
    more = {f"{p}blocks.0.norm3.diff_b": torch.ones(24), f"{p}head.diff_m": torch.ones(1, 2, 24)}
    sampler, plain = (load_loras(recipe(run), files_of(run, tmp_path, each)) for each in (more, None))
    assert sampler.system.config.generator.weights == "full"
    expert = dict(sampler.system.roles.parameters(expert_role(1)))
    base = dict(sampler.system.model.networks[0].named_parameters())
    torch.testing.assert_close(expert["0.blocks.0.norm2.bias"], base["blocks.0.norm2.bias"] + 1)
    torch.testing.assert_close(expert["0.scale_shift_table"], base["scale_shift_table"] + 1)
    assert (sampler(PROMPTS, [0, 1]) - plain(PROMPTS, [0, 1])).abs().max() > 1e-2
    same_base = [each(PROMPTS, [0, 1], teacher_steps=2) for each in (sampler, plain)]
    torch.testing.assert_close(same_base[0], same_base[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,.5,.5", "do not fall from 1 at most to above 0"), ("1000,750,500,250", "do not fall"),
        ("1,x", "is not of the form"), ("1,0,0", "do not fall"), ("nan", "do not fall"), ("", "is not of the form"),
    ],
)  # fmt: skip
def test_a_grid_that_does_not_fall_is_one_line(text: str, message: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^--sigmas: .*{message}"):
        load_loras(recipe(run), files_of(run, tmp_path), parse_sigmas(text))


def test_a_recipe_without_such_networks_takes_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^--lora: toy-1d has no networks of a pipeline"):
        load_loras(resolve("toy-1d"), [tmp_path / "lora.safetensors"])


# ---------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one phase of nano, whose expert is all that its network has."""
    settings = {"plan.phases": 1, "plan.gradient": "last", "generator.lora": {"rank": 4, "alpha": 6.0}}
    config = resolve("nano-t2i", settings)
    return finished_run(tmp_path_factory.mktemp("nano") / "run", config)


def test_sample_writes_the_same_pictures_of_a_run_and_of_its_file(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = one_file(nano, tmp_path)
    grid = ",".join(str(t) for t in step_times(4, 5.0)[:-1])
    prompt = ("--prompt", "a handwritten seven", "--seeds", "2")
    for out, arguments in {
        "run": [str(nano)], "file": ["nano-t2i", "--lora", str(file)],
        "grid": ["nano-t2i", "--lora", str(file), "--sigmas", grid],
        "other": ["nano-t2i", "--lora", str(file), "--sigmas", "1,.5"],
    }.items():  # fmt: skip
        assert command("sample", *arguments, *prompt, "--output", str(tmp_path / out), monkeypatch=monkeypatch) == 0
    name = "0000-a-handwritten-seven-seed1.png"
    pictures = {out: (tmp_path / out / name).read_bytes() for out in ("run", "file", "grid", "other")}
    assert pictures["run"] == pictures["file"] == pictures["grid"] != pictures["other"]
    capsys.readouterr()
    assert command("sample", "nano-t2i", *prompt, "--output", str(tmp_path / "no"), monkeypatch=monkeypatch) == 2
    assert "nano-t2i: there is no such folder; with --lora FILE a recipe's name stands here" in capsys.readouterr().err
    alone = ["sample", str(nano), *prompt, "--sigmas", "1,.5", "--output", str(tmp_path / "no")]
    assert command(*alone, monkeypatch=monkeypatch) == 2
    assert "--sigmas: the grid of --lora; a run or an export has its own" in capsys.readouterr().err


def one_file(nano: Path, folder: Path) -> Path:
    tensors = {name.removeprefix("0."): tensor for name, tensor in read_expert(RunFolder(nano), 1)[0].items()}
    for name in [name for name in tensors if ".lora_A" in name]:
        tensors[name.replace("lora_A.weight", "alpha")] = torch.tensor(6.0)
    save_file(tensors, folder / "nano-lightning.safetensors")
    return folder / "nano-lightning.safetensors"


def test_evaluate_measures_a_file_under_its_own_name_as_it_measures_the_run(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = one_file(nano, tmp_path), tmp_path / "results" / "file"
    (tmp_path / "prompts.txt").write_text("a handwritten two\na handwritten seven\n")
    few = ("--prompts", str(tmp_path / "prompts.txt"), "--seeds", "0-3", "--cache", str(tmp_path / "base"))
    assert command("evaluate", str(nano), *few, "--output", str(tmp_path / "run"), monkeypatch=monkeypatch) == 0
    ask = ["evaluate", "nano-t2i", "--lora", str(file), *few, "--output", str(out)]
    assert command(*ask, monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "nano-lightning, 4 steps" in shown
    found, of_run = (json.loads((each / "evaluation.json").read_text()) for each in (out, tmp_path / "run"))
    assert found["subject"] == str(file) and found["method"] == "nano-lightning"
    for name, measured in found["sets"].items():
        rows, others = measured["rows"], of_run["sets"][name]["rows"]
        assert list(rows) == ["base, 40 steps", "base, 4 steps", "nano-lightning, 4 steps"]
        one, other = rows["nano-lightning, 4 steps"], others[f"{of_run['method']}, 4 steps"]
        for measure in ("frechet_features_paired", "contrast", "pairwise_cosine"):
            assert one[measure]["value"] == pytest.approx(other[measure]["value"], rel=1e-3)
    written = (out / "evaluation.json").stat().st_mtime_ns
    assert command(*ask, monkeypatch=monkeypatch) == 0
    assert (out / "evaluation.json").stat().st_mtime_ns == written
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file)
    assert command(*ask, monkeypatch=monkeypatch) == 0
    assert (out / "evaluation.json").stat().st_mtime_ns != written, "another file of that name is measured"
    assert command(*ask[:-2], monkeypatch=monkeypatch) == 2
    assert "--lora: is evaluated on one recipe, into the folder that --output names" in capsys.readouterr().err
