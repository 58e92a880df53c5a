"""The command as a user meets it: fast help, one clear line for a mistake, nothing half-written."""

import errno
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from inspect import unwrap
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from commands import run

from phased_dmd import __main__ as entry
from phased_dmd.cli import app
from phased_dmd.lab.reproduce.begin import begin_worker
from phased_dmd.recipes import RECIPES, resolve

FAST = ["--set", "teacher.fit_steps=3", "--iterations", "2", "--set", "batch_size=8"]


def test_help_is_fast() -> None:
    """Under a second of CPU time, since others may share the machine; it must not import torch."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run(
            [sys.executable, "-m", "phased_dmd", "--help"], capture_output=True, text=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "distill" in shown.stdout
    assert min(seconds) < 1.0


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, ["expandable_segments:True", None]),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, ["backend:native", None]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, [None, "max_split_size_mb:64"]),
    ],
)  # fmt: skip
def test_the_gpus_allocator_grows_its_segments_unless_the_user_says_otherwise(
    given: dict[str, str], found: list[str | None]
) -> None:
    """It is told before torch, which looks once, is imported. Of both names torch obeys the first."""
    code = f"import os, sys, phased_dmd.cli; print([os.environ.get(n) for n in {ALLOCATOR}], 'torch' in sys.modules)"
    clean = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    done = subprocess.run([sys.executable, "-c", code], env=clean | given, capture_output=True, text=True, check=True)
    assert done.stdout == f"{found} False\n"


COMMANDS = {  # the least that each one takes
    "distill": ["toy-1d"], "sample": [".", "--output", "out"], "export": [".", "--output", "out"], "evaluate": ["."],
    "report": ["."], "plan": ["toy-1d", "--gpus", "1", "--memory-gb", "80"], "reproduce": ["all"],
    "teach": ["nano", "--output", "out"], "config": [], "recipes": [], "watch": ["."], "prompts": ["nano-t2i"],
    "promote": ["run@phase-1/2"], "branch": ["run@phase-1/2", "--output", "out"], "prune": ["."],
}  # fmt: skip


@contextmanager
def beginning(command: str, action: Callable[[], Any]) -> Iterator[None]:
    """Does this, which raises an error, where a command's own work would begin."""
    (info,) = [info for info in app.registered_commands if info.callback and info.callback.__name__ == command]
    code = unwrap(info.callback).__code__  # type: ignore[arg-type] it has one

    def seen(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is code:
            action()

    sys.setprofile(seen)
    try:
        yield
    finally:
        sys.setprofile(None)


@pytest.fixture
def signals() -> Iterator[None]:
    """Ctrl-C as in a terminal, also where the tests were begun in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_every_command_is_interrupted_below() -> None:
    assert set(COMMANDS) == {info.callback.__name__ for info in app.registered_commands if info.callback}


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_is_130_and_one_line_in_every_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], signals: None
) -> None:
    monkeypatch.setattr(sys, "argv", ["phased-dmd", command, *COMMANDS[command]])
    with beginning(command, lambda: signal.raise_signal(signal.SIGINT)), pytest.raises(SystemExit) as stop:
        entry.main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "phased-dmd: interrupted; an unfinished run goes on by the same command\n"


def test_ctrl_c_twice_while_modules_are_imported_is_130_and_one_line(tmp_path: Path, signals: None) -> None:
    """While torch is: C++ ends the process, with its own trace, on an exception that it cannot pass on."""
    command = [sys.executable, "-m", "phased_dmd", "distill", "nano-t2i", "--output", "out"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch" not in maps.read_text():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].count("\n") == 1
    assert process.returncode == 130 and not list(tmp_path.iterdir())


def test_the_script_is_the_entry_that_is_there_before_all_imports() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"phased-dmd": "phased_dmd.__main__:main"} and callable(entry.main)


def test_ctrl_c_ends_a_worker_of_reproduce_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    with ProcessPoolExecutor(1, get_context("spawn"), begin_worker) as pool, pytest.raises(BrokenProcessPool):
        pool.submit(signal.raise_signal, signal.SIGINT).result(timeout=60)
    assert capfd.readouterr().err == ""


def test_the_version_is_the_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert run("--version", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == f"phased-dmd {project['version']}\n"


EARLY = [
    ["distill", "nano-t2i", "--prompts", "missing.txt"], ["distill", "toy-1d", "--set", "plan.shfit=1"],
    ["plan", "wan21-t2i", "--gpus", "8", "--memory-gb", "80", "--prompts", "missing.txt"],
    ["sample", "missing", "--output", "out"], ["sample", ".", "--prompts", "missing.txt", "--output", "out"],
    ["export", "missing", "--output", "out"], ["report", "missing"], ["evaluate", "missing"],
    ["evaluate", ".", "--prompts", "missing.txt"], ["reproduce", "table-2"],
]  # fmt: skip


def test_what_the_arguments_get_wrong_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    code = f"""
import sys
from phased_dmd.cli import main
for arguments in {EARLY}:
    sys.argv = ["phased-dmd", *arguments]
    try:
        main()
    except SystemExit as stop:
        print(stop.code, [name for name in ("torch", "peft", "diffusers", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["2 []"] * len(EARLY)
    said = done.stderr.splitlines()
    assert len(said) == len(EARLY)
    wrong = ["missing", "shfit", *["missing"] * (len(EARLY) - 3), "table-2"]
    assert all(each in line for each, line in zip(wrong, said, strict=True))


@pytest.mark.parametrize(
    ("error", "arguments", "says"),
    [
        ((errno.EEXIST, "File exists", "here/x"), ["--output", "here"], "--output: here/x: File exists"),
        ((errno.EEXIST, "File exists", "here"), ["--output=here"], "--output: here: File exists"),
        ((errno.ENOSPC, "No space left on device", "/tmp/x"), ["--output", "here"], "/tmp/x: No space left on device"),
        (("models/x is not a local folder\nand no model of the hub",), ["--output", "here"],
         "models/x is not a local folder and no model of the hub"),
    ],
)  # fmt: skip
def test_an_error_of_the_system_names_the_file_and_the_flag(
    error: tuple[Any, ...], arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail() -> None:
        raise OSError(*error)

    with beginning("export", fail):
        assert run("export", ".", *arguments, monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err == f"phased-dmd: {says}\n"


def test_a_folder_that_is_no_run_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("report", str(tmp_path), monkeypatch=monkeypatch) == 2
    said = "not a run folder: config.json cannot be read (No such file or directory)"
    assert capsys.readouterr().err == f"phased-dmd: {tmp_path}: {said}\n"


@pytest.mark.parametrize(
    ("arguments", "says", "iterations"),
    [
        ([], "phased on toy-2d, 4 steps in 4 phases, 2000 updates in all", 500),
        (["--iterations", "25"], "phased on toy-2d, 4 steps in 4 phases, 100 updates in all", 25),
        (["--method", "dmd-sgts"], "dmd-sgts on toy-2d, 4 steps in 1 phase, 2000 updates in all", 2000),
        (["--method", "dmd-sgts", "--iterations", "25"],
         "dmd-sgts on toy-2d, 4 steps in 1 phase, 100 updates in all", 100),
        (["--method", "phased-sgts", "--set", "iterations=25"],
         "phased-sgts on toy-2d, 4 steps in 2 phases, 100 updates in all", 50),
    ],
)  # fmt: skip
def test_a_methods_run_says_how_many_updates_it_has_in_all(
    arguments: list[str], says: str, iterations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run("distill", "toy-2d", "--dry-run", *arguments, monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr()
    assert f"runs/toy-2d: {says}\n" in shown.err and json.loads(shown.out)["iterations"] == iterations


def test_a_section_given_to_set_changes_only_what_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("distill", "nano-t2i", "--dry-run", "--set", "generator={lora: {rank: 8}}", monkeypatch=monkeypatch) == 0
    expected = resolve("nano-t2i", {"generator.lora.rank": 8})
    assert json.loads(capsys.readouterr().out) == json.loads(expected.model_dump_json())
    assert expected.generator.lr == 1e-3 and expected.generator.ema == 0.97


def test_the_package_imports_without_extras_and_its_public_names_are_callable_whatever_was_imported_before() -> None:
    """With every optional package made unimportable, the whole package still imports."""
    blocked = ["torchvision", "cv2", "tensorboard", "wandb", "trackio", "hypothesis", "beartype"]
    modules = ["lab.evaluate", "lab.report", "lab.reproduce.run", "lab.teach.nano", "cli"]
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "import phased_dmd, phased_dmd.train\nfrom phased_dmd import *\n"
        "for name in ('rollout', 'distill', 'load', 'subinterval_target', 'score_matching_loss',"
        " 'distribution_matching_loss', 'PhasePlan', 'FlowSchedule', 'VPSchedule'):\n"
        "    assert callable(getattr(phased_dmd, name)), name\n"
        "phased_dmd.FlowSchedule(), phased_dmd.VPSchedule()\n"
    )
    code += "\n".join(f"import phased_dmd.{module}" for module in modules)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert importlib.util.find_spec("torchvision") is None, "torchvision breaks diffusers beside a CPU build of torch"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["toy-3d"], "did you mean toy-2d?"),
        (
            ["toy-1d", "--set", "optimizer.clip=1"],
            "optimizer.clip: unknown field; did you mean optimiser?",
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
    told = capsys.readouterr().out
    assert f"{folder}: phased on toy-1d, 2 steps in 2 phases, 4 updates in all\n" in told
    assert f"next: `phased-dmd sample {folder} --output FOLDER`, `phased-dmd evaluate {folder}`\n" in told
    assert run("distill", "toy-1d", "--output", str(folder), *FAST, monkeypatch=monkeypatch) == 0
    assert "already distilled" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (folder / "experts").iterdir()} == experts

    assert run("report", str(folder), monkeypatch=monkeypatch) == 0
    assert f"Not evaluated yet: run `phased-dmd evaluate {folder}`." in (folder / "report.html").read_text()
    assert run("evaluate", str(folder), "--samples", "64", monkeypatch=monkeypatch) == 0
    assert "energy distance" in capsys.readouterr().out
    written = (folder / "evaluation.json").stat().st_mtime_ns
    assert run("evaluate", str(folder), "--samples", "64", monkeypatch=monkeypatch) == 0
    assert (folder / "evaluation.json").stat().st_mtime_ns == written
    said = capsys.readouterr().out
    assert "already evaluated" in said and f"all measures: --wide, or {folder / 'evaluation.json'}" in said
    assert run("evaluate", str(folder), "--samples", "64", "--wide", monkeypatch=monkeypatch) == 0
    assert "| mixture: 64 samples | " in capsys.readouterr().out
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
    assert "holds another run of toy-1d: seed is 0 there, 5 here; take another --output" in capsys.readouterr().err
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


def test_recipes_says_what_each_distils(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", monkeypatch=monkeypatch) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["recipe", "teacher", "prompts", "makes", "steps,", "phases"]
    assert [line.split()[0] for line in lines] == list(RECIPES) and max(map(len, lines)) <= 100
    told = {line.split()[0]: re.split(r"\s{2,}", line.strip())[1:] for line in lines}
    assert told["toy-2d"] == ["a mixture of Gaussians", "points", "4, 4"]
    assert told["exact-clips"] == ["a mixture of clips", "clips", "4, 4"]
    assert told["wan22-i2v"] == ["Wan-AI/Wan2.2-I2V-A14B-Diffusers", "yours, with pictures", "clips", "4, 2"]
    assert told["nano-t2i"] == ["nano", "nano-t2i", "pictures", "4, 4"]
