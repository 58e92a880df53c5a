"""Phases that processes of their own train side by side, stopped and killed: the run ends as one process makes it."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import KILLED, command, die_at, end, forked, slow_disk, start

from phased_dmd import train
from phased_dmd.checkpoint import RunFolder
from phased_dmd.cli.flags import assignment
from phased_dmd.recipes import resolve

FIELDS = (
    "teacher.fit_steps=20", "batch_size=16", "plan.steps=4", "plan.phases=4", "generator.ema=0.8", "fake.updates=2",
    "rollouts.start=teacher", "rollouts.pool=256", "anchor.updates=[6,0,2,0]",
    "log_every=2", "sample_every=3", "checkpoint_every=2",
)  # fmt: skip
PHASES = (1, 2, 3, 4)
CONFIG = resolve("toy-1d", {"iterations": 6} | dict(map(assignment, FIELDS)))


def arguments(run: Path, phase: int | None) -> list[str]:
    fields = [part for field in FIELDS for part in ("--set", field)]
    alone = [] if phase is None else ["--only-phase", str(phase)]
    return ["distill", "toy-1d", "--iterations", "6", "--output", str(run), *fields, *alone]


def said_by(run: Path, phase: int | None) -> Path:
    return run.with_name(f"{run.name}-{phase}.stderr")


def started(run: Path, phase: int | None, before: Callable[[], Any] = lambda: None) -> int:
    """Starts the command in a forked process, after something else there; its number."""

    def action() -> None:
        train.save_preview = lambda path, samples: path.write_bytes(samples.numpy().tobytes())  # matplotlib is slow
        before()
        command(said_by(run, phase), *arguments(run, phase))

    return start(action)


def status(run: Path, phase: int | None, before: Callable[[], Any] = lambda: None) -> tuple[int, str]:
    """The exit status of the command, and what it said on stderr."""
    return end(started(run, phase, before)), said_by(run, phase).read_text()


def results(run: Path) -> dict[str, bytes]:
    """All files but locks, times, and the checkpoints' insides, by their paths."""
    files = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in files if path.name.startswith(".") and path != run / ".lock"]
    skipped = ("timing.jsonl", ".lock")
    found = {str(path.relative_to(run)): path.read_bytes() for path in files if path.name not in skipped}
    return {name: b"" if name.startswith("checkpoints") else data for name, data in found.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of all phases."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert status(run, None) == (0, "")
    found = results(run)
    rows = [json.loads(line) for line in found["metrics.jsonl"].splitlines()]
    assert [(row["phase"], row["iteration"]) for row in rows] == [(p, i) for p in PHASES for i in (2, 4, 6)]
    assert {name for name in found if name.startswith("experts")} == {f"experts/phase-{p}.safetensors" for p in PHASES}
    return found


# ---------------------------------------------------------------- jobs that end


def test_jobs_in_any_order_make_the_run_of_one_process(alone: dict[str, bytes], tmp_path: Path) -> None:
    """Every file: experts, metrics, pool, previews, and as many checkpoints; times beside."""
    run = tmp_path / "run"
    for phase in (3, 1, 4, 2):
        assert not RunFolder(run).finished(CONFIG)
        assert status(run, phase) == (0, "")
    assert results(run) == alone and RunFolder(run).finished(CONFIG)
    rows = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == sorted(row["phase"] for row in rows)
    assert [row["phase"] for row in rows if "pool_calls" in row] == [3]  # the first to come made all of it
    assert status(run, 2) == status(run, None) == (0, "")
    assert results(run) == alone


def test_jobs_side_by_side_make_the_run_of_one_process(alone: dict[str, bytes], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert [end(job) for job in [started(run, phase) for phase in PHASES]] == [0] * 4
    assert [said_by(run, phase).read_text() for phase in PHASES] == [""] * 4
    assert results(run) == alone


def test_one_process_goes_on_with_what_jobs_began_and_jobs_with_what_it_began(
    alone: dict[str, bytes], tmp_path: Path
) -> None:
    jobs, process = tmp_path / "jobs", tmp_path / "process"
    assert status(jobs, 3) == (0, "")
    assert status(jobs, 2, just_before(2, 3, lambda: os.kill(os.getpid(), signal.SIGTERM)))[0] == 128 + signal.SIGTERM
    assert status(jobs, None) == (0, "")
    assert results(jobs) == alone
    assert status(process, None, just_before(3, 3, lambda: os._exit(KILLED)))[0] == KILLED
    for phase in (4, 3):
        assert status(process, phase) == (0, "")
    assert results(process) == alone


# ---------------------------------------------------------------- jobs that are stopped


def just_before(phase: int, iteration: int, action: Callable[[], Any]) -> Callable[[], None]:
    """Something to do in the process, once it gets to the expert's update of an iteration."""

    def patch() -> None:
        step = train.train_step

        def hooked(job: train.Job, at: train.Position, update: int, *more: Any) -> Any:
            if (at.phase, at.iteration, update) == (phase, iteration, 0):
                action()
            return step(job, at, update, *more)

        train.train_step = hooked

    return patch


def test_jobs_killed_at_random_end_byte_identical(alone: dict[str, bytes], tmp_path: Path) -> None:
    """All four at a time, on a slow disk; each is killed or stopped three times wherever it is, and begun again.

    A preview may be missing: it comes after its iteration's checkpoint, from which the run goes on. A checkpoint of the
    run's last may be one that SIGTERM asked for.
    """
    rng, run = random.Random(0), tmp_path / "run"
    left = dict.fromkeys(PHASES, 3)
    jobs = {phase: started(run, phase, slow_disk) for phase in PHASES}
    while jobs:
        time.sleep(rng.random() * 0.4)
        phase = rng.choice(sorted(jobs))
        number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        if left[phase]:
            os.kill(jobs[phase], number)
        code = end(jobs.pop(phase))
        if code:
            assert code in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM), said_by(run, phase).read_text()
            left[phase] -= 1
            jobs[phase] = started(run, phase, slow_disk)
    assert all(status(run, phase) == (0, "") for phase in PHASES)
    found = {name: data for name, data in results(run).items() if not name.startswith("checkpoints/")}
    expected = {name: data for name, data in alone.items() if not name.startswith("checkpoints/")}
    assert expected | found == expected
    assert all(name.startswith("samples/") for name in {*expected} - {*found})
    assert max(path.name for path in (run / "checkpoints").iterdir()).startswith("phase-4-iteration-000006")


def test_a_death_while_phases_become_a_run_costs_nothing(alone: dict[str, bytes], tmp_path: Path) -> None:
    """At every step on the disk, with the machine."""
    ready = tmp_path / "ready"
    for phase in PHASES:
        assert status(ready, phase, lambda: setattr(RunFolder, "close", lambda *_: None)) == (0, "")
    step, code = 0, KILLED
    while code == KILLED:
        run = tmp_path / str(step)
        shutil.copytree(ready, run)

        def close(run: Path = run, step: int = step) -> None:
            die_at(step, run, torn=True)
            train.finish(RunFolder(run), CONFIG)

        code = forked(close)
        train.finish(RunFolder(run), CONFIG)
        assert results(run) == alone
        shutil.rmtree(run)
        step += 1
    assert code == 0 and step > 10


# ---------------------------------------------------------------- what is refused


def test_what_cannot_be_trained_apart_is_one_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, said = status(run, 5)
    assert (code, said) == (2, "phased-dmd: --only-phase: 5 is none of the phases 1 to 4\n")
    experts = RunFolder(run, 2)
    config = CONFIG.model_copy(update={"rollouts": CONFIG.rollouts.model_copy(update={"start": "experts"})})
    line = "^--only-phase: phase 2 begins with the samples of the experts before it; rollouts.start=teacher begins it "
    with pytest.raises(ValueError, match=line):
        experts.check(config)
    RunFolder(run, 1).check(config)


def test_a_phase_has_one_process_and_a_run_one_kind_of_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunFolder(run, 2).locked(), RunFolder(run, 3).locked():
        pid = os.getpid()
        assert status(run, 2) == (2, f"phased-dmd: --output: {run}/phases/phase-2 is being written by process {pid}\n")
        assert status(run, None) == (2, f"phased-dmd: --output: {run} is being written by processes that share it\n")
    with RunFolder(run).locked():
        assert status(run, 2) == (2, f"phased-dmd: --output: {run} is being written by process {os.getpid()}\n")
