"""What a run says to somebody new: of a rate that spoils it, of settings that do nothing, of nothing that is no use."""

import io
import os
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from commands import run as command
from rich.console import Console

from phased_dmd.config import Config
from phased_dmd.networks.optim import NonFiniteError
from phased_dmd.recipes import resolve
from phased_dmd.train import distill

SMALL = {"iterations": 2, "batch_size": 8, "teacher.fit_steps": 3, "fake.updates": 1, "sample_every": None}


def small(**changes: Any) -> Config:
    return resolve("toy-1d", SMALL | {name.replace("__", "."): value for name, value in changes.items()})


def test_a_learning_rate_that_spoils_a_run_is_named_with_the_other_one(tmp_path: Path) -> None:
    """A rate of 1e30 makes weights whose products are beyond float32."""
    with pytest.raises(NonFiniteError) as found:
        distill(small(generator__lr=1e30, iterations=20), tmp_path / "run", quiet=True)
    rates = "generator.lr is 1e+30 and fake.lr 0.001, of which one may be too high"
    assert f"; {rates}; the state before it is in " in str(found.value)


def test_offload_without_a_gpu_says_that_it_changes_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"^engine\.offload: there is no GPU to spare, so it changes nothing$"):
        distill(small(engine__offload=True), tmp_path / "run", quiet=True)


def test_initial_experts_of_other_times_are_said_to_be_the_nearest(tmp_path: Path) -> None:
    """Of four steps at shift 1, 1, .75, .5 and .25: phases that begin at 1 and .5 find theirs, at 1 and .667 not."""
    first = distill(small(plan__steps=4, plan__phases=4, plan__gradient="all"), tmp_path / "first", quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitting = small(plan__steps=2, plan__phases=2, init_experts=str(first))
        distill(fitting, tmp_path / "fitting", quiet=True)
    three = small(plan__steps=3, plan__phases=3, init_experts=str(first))
    times = r"phases begin at 1, 0\.6667, 0\.3333, and its steps at 1, 0\.75, 0\.5, 0\.25"
    with pytest.warns(UserWarning, match=rf"^init_experts: {times}; each starts from the expert of the nearest$"):
        distill(three, tmp_path / "three", quiet=True)


def test_every_extra_is_explained_and_how_trackers_are_turned_on() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "using.md").read_text()
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"eval", "trackers"} <= extras.keys()
    assert all(f"| `{extra}` |" in page for extra in extras.keys() - {"dev"})
    assert "--set 'trackers=[tensorboard]'" in page


def test_a_page_is_not_written_to_a_folder_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was made, under whatever name it was mistyped."""
    missing = tmp_path / "reprots"
    assert command("report", str(tmp_path), "--output", str(missing / "page.html"), monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err == f"phased-dmd: --output: {missing} is no folder\n"
    assert not missing.exists()


def test_memory_that_runs_out_is_one_line_with_what_the_plan_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU of 20 kB, whose memory is gone at the first network call; the plan computes on the host."""
    linear = torch.nn.functional.linear

    def full(*_: Any) -> None:
        monkeypatch.setattr(torch.nn.functional, "linear", linear)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (0, 20_000))
    monkeypatch.setattr(torch.nn.functional, "linear", full)
    tiny = ("--set", "teacher.fit_steps=1", "--set", "sample_every=null", "--set", "batch_size=8")
    status = command("distill", "toy-1d", "--output", str(tmp_path / "run"), *tiny, monkeypatch=monkeypatch)
    error = capsys.readouterr().err
    assert status == 1 and error.count("\n") == 1
    assert "CUDA out of memory; `phased-dmd plan` says: it does not fit: " in error


def test_loading_from_python_says_nothing_of_torchvision() -> None:
    """In a notebook, transformers recommended it for CLIPImageProcessor, which nothing here needs."""
    code = (
        "from phased_dmd.recipes import resolve; from phased_dmd.models.loader import load_model; "
        "load_model(resolve('nano-i2v', {}).teacher, 0)"
    )
    free = {
        name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"
    }  # as the command has it
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=free)
    assert "torchvision" not in done.stderr


def test_losses_beside_the_bar_have_three_digits_that_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """478.57 and 0.0001 were both shown with four decimals."""
    screen = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=screen, width=200))  # what `rich.get_console()` returns
    distill(small(), tmp_path / "run")
    losses = re.findall(r"fake (\S+) generator (\S+)", screen.getvalue())
    assert losses and all(figure == f"{float(figure):.3g}" for line in losses for figure in line)
