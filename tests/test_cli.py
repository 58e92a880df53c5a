"""The command as a user meets it: fast help, one clear line for a mistake, nothing half-written."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phased_dmd.cli import main

FAST = ["--set", "teacher.fit_steps=3", "--iterations", "2", "--set", "batch_size=8", "--set", "teacher.hidden=8"]


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["phased-dmd", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_help_is_fast() -> None:
    """Under a second, the best of three on a shared machine; it must not import torch."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        shown = subprocess.run(
            [sys.executable, "-m", "phased_dmd", "--help"], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - started)
    assert "distill" in shown.stdout
    assert min(seconds) < 1.0


def test_the_package_imports_without_torchvision_and_extras() -> None:
    """With every optional package made unimportable, the whole package still imports."""
    blocked = ["torchvision", "cv2", "tensorboard", "wandb", "trackio", "hypothesis", "beartype"]
    modules = ["train", "evaluate", "report", "reproduce", "teach.nano", "cli"]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    code += "\n".join(f"import phased_dmd.{module}" for module in modules)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert importlib.util.find_spec("torchvision") is None, "torchvision breaks diffusers beside a CPU build of torch"


def test_the_public_names_are_callable_whatever_was_imported_before() -> None:
    code = (
        "import phased_dmd, phased_dmd.train\nfrom phased_dmd import *\n"
        "for name in ('rollout', 'distill', 'load', 'subinterval_target', 'score_matching_loss',"
        " 'distribution_matching_loss', 'PhasePlan', 'FlowSchedule', 'VPSchedule'):\n"
        "    assert callable(getattr(phased_dmd, name)), name\n"
        "phased_dmd.FlowSchedule(), phased_dmd.VPSchedule()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["toy-3d"], "did you mean toy-2d?"),
        (
            ["toy-1d", "--set", "generator.optimizer.lr=1"],
            "generator.optimizer.lr: unknown field; did you mean optimiser?",
        ),
        (["toy-1d", "--set", "plan.shfit=1"], "plan.shfit: unknown field; did you mean shift?"),
        (["toy-1d", "--stepz", "3"], "No such option: --stepz"),
        (["toy-1d", "--steps", "4", "--phases", "3"], "plan.phases: 4 steps cannot be split into 3 equal phases"),
        (["toy-1d", "--set", "batch_size=0"], "batch_size: "),
        (["toy-1d", "--set", "seed"], "--set: 'seed' is not of the form field=value"),
        (["nano-t2i", "--prompts", "missing.txt"], "prompts: missing.txt is neither a readable prompt file nor"),
        (["missing.yaml"], "missing.yaml: cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("distill", *arguments, "--output", "out", monkeypatch=monkeypatch) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_distil_evaluate_report_sample_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole path on a toy; every command a second time says what is already done, and changes no expert."""
    folder = tmp_path / "run"
    assert run("distill", "toy-1d", "--output", str(folder), *FAST, monkeypatch=monkeypatch) == 0
    experts = {path.name: path.read_bytes() for path in (folder / "experts").iterdir()}
    assert sorted(experts) == ["phase-1.safetensors", "phase-2.safetensors"]
    assert run("distill", "toy-1d", "--output", str(folder), *FAST, monkeypatch=monkeypatch) == 0
    assert "already distilled" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (folder / "experts").iterdir()} == experts

    assert run("report", str(folder), monkeypatch=monkeypatch) == 2
    assert "not evaluated yet" in capsys.readouterr().err
    assert run("evaluate", str(folder), "--samples", "64", monkeypatch=monkeypatch) == 0
    assert "energy distance" in capsys.readouterr().out
    written = (folder / "evaluation.json").stat().st_mtime_ns
    assert run("evaluate", str(folder), "--samples", "64", monkeypatch=monkeypatch) == 0
    assert (folder / "evaluation.json").stat().st_mtime_ns == written
    assert "already evaluated" in capsys.readouterr().out
    assert run("report", str(folder), monkeypatch=monkeypatch) == 0
    page = (folder / "report.html").read_text()
    assert ";base64," in page
    assert 'src="http' not in page and 'href="http' not in page, "the page must be self-contained"

    assert run("sample", str(folder), "--output", str(tmp_path / "s"), "--seeds", "5", monkeypatch=monkeypatch) == 0
    assert (tmp_path / "s" / "samples.png").stat().st_size > 1000


def test_another_run_in_the_folder_and_an_unwritable_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run("distill", "toy-1d", "--output", str(folder), *FAST, monkeypatch=monkeypatch) == 0
    assert run("distill", "toy-1d", "--seed", "5", "--output", str(folder), *FAST, monkeypatch=monkeypatch) == 2
    assert "holds another run of toy-1d, which differs in seed" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        assert run("distill", "toy-1d", "--output", str(place), *FAST, monkeypatch=monkeypatch) == 2
        error = capsys.readouterr().err
        assert error.startswith("phased-dmd: --output: ") and error.count("\n") == 1


def test_dry_run_prints_the_config_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run("distill", "toy-1d", "--dry-run", "--output", str(folder), *FAST, monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr().out
    (tmp_path / "again.json").write_text(shown)
    assert not folder.exists()
    assert (
        run("distill", str(tmp_path / "again.json"), "--dry-run", "--output", str(folder), monkeypatch=monkeypatch) == 0
    )
    assert capsys.readouterr().out == shown
