"""Slow updates, as of a large model: what a signal, a launcher that kills, a full disk and a full GPU leave."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import end, small_disk, start
from torch import Tensor, nn

from phased_dmd.checkpoint import RunFolder
from phased_dmd.config import Config, Engine, Fake, Generator, Plan
from phased_dmd.config.teacher import AnalyticTeacher, OwnTeacher
from phased_dmd.engine.timer import SaveTimer
from phased_dmd.errors import OutOfMemory, Stopped, UserError
from phased_dmd.models.analytic import AnalyticModel, PlainCodec
from phased_dmd.train import distill


class SlowModel(AnalyticModel):
    """A mixture of two points whose network calls take a time each, and append theirs to a file."""

    def __init__(self, seconds: float = 0.0, calls: Path | None = None) -> None:
        super().__init__(AnalyticTeacher(means=((-1.0,), (1.0,)), fit_steps=1), seed=0, fit=False)
        self.seconds, self.calls = seconds, calls

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        time.sleep(self.seconds)
        if self.calls is not None:
            with self.calls.open("a") as file:
                file.write(".")
        return super().predict(network, x, t, condition)


def config(**fields: Any) -> Config:
    """A phase of a step: of each update a sample takes a call of the generator and one of the fake."""
    base = {
        "recipe": "slow", "teacher": OwnTeacher(), "plan": Plan(steps=1, phases=1, gradient="all"), "batch_size": 4,
        "generator": Generator(weights="full", lr=1e-3), "fake": Fake(lr=1e-3, updates=3), "iterations": 3,
        "log_every": 1, "sample_every": None, "checkpoint_every": 1000,
    }  # fmt: skip
    return Config(**base | fields)


def run(output: Path, model: AnalyticModel, **fields: Any) -> dict[str, bytes]:
    """What a run ends with."""
    distill(config(**fields), output, quiet=True, own=(model, PlainCodec()))
    folder = RunFolder(output)
    return {path.name: path.read_bytes() for path in (folder.expert_path(1), output / "metrics.jsonl")}


def started(output: Path, model: SlowModel, status: Path, **fields: Any) -> int:
    """A forked process that makes the run, and writes a signal's message to a file."""

    def action() -> None:
        try:
            run(output, model, **fields)
        except Stopped as stop:
            status.write_text(str(stop))
            sys.exit(128 + stop.number)

    return start(action)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_a_signal_is_obeyed_between_two_micro_batches_and_the_update_is_made_again(tmp_path: Path) -> None:
    """An update takes 4 x 2 calls of .2 seconds, 1.6 in all; the launcher's grace is 1."""
    whole = run(tmp_path / "whole", SlowModel(), engine=Engine(micro_batch=1))
    calls, said = tmp_path / "calls", tmp_path / "said"
    process = started(tmp_path / "run", SlowModel(0.2, calls), said, engine=Engine(micro_batch=1))
    wait_for(lambda: size(calls) >= 8 + 2)  # in the second update
    os.kill(process, signal.SIGTERM)
    asked = time.monotonic()
    assert end(process) == 128 + signal.SIGTERM and time.monotonic() - asked < 1
    assert size(calls) < 2 * 8
    assert said.read_text() == (
        f"{tmp_path / 'run'}: stopped and saved at phase 1, iteration 0, update 1; the same command goes on from there"
    )
    assert run(tmp_path / "run", SlowModel(), engine=Engine(micro_batch=1)) == whole


@pytest.mark.parametrize("minutes", [0.05, 1 / 600])
def test_a_launcher_that_kills_in_the_middle_of_an_update_costs_no_more_than_the_minutes(
    minutes: float, tmp_path: Path
) -> None:
    """Updates take 1 second and more, the grace is .2; a checkpoint is due every 3 seconds, or after each update."""
    whole = run(tmp_path / "whole", SlowModel(), iterations=30)
    calls, said = tmp_path / "calls", tmp_path / "said"
    process = started(tmp_path / "run", SlowModel(0.5, calls), said, iterations=30, checkpoint_minutes=minutes)
    wait_for(lambda: size(calls) >= 9 + 2 + 1)  # an iteration, an update, and half of another
    os.kill(process, signal.SIGTERM)
    time.sleep(0.2)
    killed = time.time()
    os.kill(process, signal.SIGKILL)
    assert end(process) == -signal.SIGKILL and not said.exists()
    newest = max(path.stat().st_mtime for path in (tmp_path / "run" / "checkpoints").glob("phase-1-*/manifest.json"))
    assert killed - newest < max(60 * minutes, 1.1) + 0.5  # its writing, which is a part of a second here
    again = tmp_path / "again"
    ended = run(tmp_path / "run", SlowModel(0.0, again), iterations=30)
    assert ended == whole
    assert size(again) < size_of_all(30)  # it did not start anew


def size_of_all(iterations: int) -> int:
    """The network calls of a run: of the fake's three updates two each, of the expert's three."""
    return iterations * (3 * 2 + 3)


def test_without_minutes_only_iterations_count(tmp_path: Path) -> None:
    run(tmp_path / "run", SlowModel(0.01), checkpoint_minutes=None, checkpoint_every=2)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["phase-1-iteration-000002-update-0"]


def test_a_timer_asks_before_another_update_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a minute, updates of 25 seconds: after two of them, as a third would end at 75."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    timer, asked = SaveTimer(1.0), []
    for _ in range(6):
        clock[0] += 25
        asked.append(timer.due())
        if asked[-1]:
            clock[0] += 40  # to write it
            timer.saved()
    assert asked == [False, True] * 3
    assert not SaveTimer(None).due()


def test_a_signal_right_behind_a_checkpoint_does_not_write_or_read_it_again(tmp_path: Path) -> None:
    """Of a large model that alone could take longer than a launcher waits."""
    folder, state = RunFolder(tmp_path), {"weights": torch.arange(3.0)}
    at = {"phase": 1, "iteration": 4, "update": 0}
    folder.save_checkpoint(at, state, keep_last=2)
    (file,) = (tmp_path / "checkpoints").glob("phase-1-*/*.safetensors")
    shutil.rmtree(file.parent)  # whoever verified it would find it gone, and write it
    folder.save_checkpoint(at, state, keep_last=2)
    assert not file.exists()
    folder.save_checkpoint(at | {"update": 1}, state, keep_last=2)
    folder.save_checkpoint(at, state, keep_last=2)
    assert file.exists()


# ---------------------------------------------------------------- no room


def test_a_checkpoint_without_room_is_not_begun(tmp_path: Path) -> None:
    """The line names what is needed and what is free, and nothing is left of it."""
    message = r"^checkpoints: cannot be written: No space left on device: 0\.008 GB are needed, 0\.001\d* GB are free; "
    with small_disk(tmp_path / "disk", 1024):
        with pytest.raises(UserError, match=message):
            RunFolder(tmp_path / "disk").save_checkpoint(
                {"phase": 1, "iteration": 1, "update": 0}, {"weights": torch.zeros(2_000_000)}, keep_last=2
            )
        assert list((tmp_path / "disk").iterdir()) == []


class FullModel(AnalyticModel):
    """A model whose n-th network call does not fit into the device's memory."""

    def __init__(self, fails: int) -> None:
        super().__init__(AnalyticTeacher(means=((-1.0,), (1.0,)), fit_steps=1), seed=0, fit=False)
        self.left = fails

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")
        return super().predict(network, x, t, condition)


@pytest.mark.parametrize(
    ("fails", "part"),
    [(1, "iteration 0, fake"), (7, "iteration 0, phase_1"), (10, "iteration 1, the preview")],
)
def test_memory_that_runs_out_names_the_part_that_it_ran_out_in(fails: int, part: str, tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match=f"^phase 1, {part}: CUDA out of memory$"):
        run(tmp_path / "run", FullModel(fails), sample_every=1)


def test_a_preview_that_does_not_fit_comes_after_its_iterations_checkpoint(tmp_path: Path) -> None:
    """So the run goes on behind it, with `sample_every=null`."""
    with pytest.raises(OutOfMemory, match="the preview"):
        run(tmp_path / "run", FullModel(10), sample_every=1, checkpoint_every=1)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["phase-1-iteration-000001-update-0"]
