"""Whole runs through the command line, stopped and spoilt in every way: each goes on by the same command, and ends as
if nothing had been. `make chaos` does the same at length, with processes of their own.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import KILLED, command, die_at, end, forked, launch, obey_permissions, slow_disk, small_disk, start
from torch import Tensor

from phased_dmd import train
from phased_dmd.checkpoint import RunFolder
from phased_dmd.networks.roles import FAKE, TEACHER, Roles, expert_role

ITERATIONS = 6
FIELDS = (
    "teacher.fit_steps=20", "batch_size=16",
    "generator.ema=0.8", "fake.updates=3", "log_every=2", "sample_every=3", "checkpoint_every=2",
)  # fmt: skip
SAVED = re.compile(r"phased-dmd: \S+: stopped and saved at (.*); the same command goes on from there\n")

Position = tuple[int, int, int]  # phase, iterations done, update; 0 is the generator's


def arguments(run: Path, *more: str, iterations: int = ITERATIONS) -> list[str]:
    fields = [part for field in (*FIELDS, *more) for part in ("--set", field)]
    return ["distill", "toy-1d", "--iterations", str(iterations), "--output", str(run), *fields]


def started(run: Path, *more: str, before: Callable[[], Any] = lambda: None, iterations: int = ITERATIONS) -> int:
    """Starts the command in a forked process, after something else there; its number."""

    def action() -> None:
        train.save_preview = lambda path, samples: path.write_bytes(bytes(2000))  # matplotlib is slow
        before()
        command(said_by(run), *arguments(run, *more, iterations=iterations))

    return start(action)


def said_by(run: Path) -> Path:
    return run.with_name(f"{run.name}.stderr")


def status(run: Path, *more: str, **how: Any) -> tuple[int, str]:
    """The exit status of the command, and what it said on stderr."""
    return end(started(run, *more, **how)), said_by(run).read_text()


def results(run: Path) -> dict[str, bytes]:
    paths = [run / "metrics.jsonl", *(RunFolder(run).expert_path(phase) for phase in (1, 2))]
    return {path.name: path.read_bytes() for path in paths}


def assert_goes_on(run: Path, expected: dict[str, bytes], *more: str, before: Callable[[], Any] = lambda: None) -> None:
    """The same command ends, without a word, with the files of an uninterrupted run."""
    assert status(run, *more, before=before) == (0, "")
    assert results(run) == expected


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert status(run) == (0, "")
    found = results(run)
    rows = [json.loads(line) for line in found["metrics.jsonl"].splitlines()]
    assert [(row["phase"], row["iteration"]) for row in rows] == [(p, i) for p in (1, 2) for i in (2, 4, 6)]
    return found


# ---------------------------------------------------------------- what happens in the middle of a run


def just_before(position: Position, action: Callable[[train.Job], Any]) -> Callable[[], None]:
    """Something to do in the process, once it gets to an update."""

    def patch() -> None:
        step = train.train_step

        def hooked(job: train.Job, at: train.Position, update: int, *more: Any) -> Any:
            if (at.phase, at.iteration, update) == position:
                action(job)
            return step(job, at, update, *more)

        train.train_step = hooked

    return patch


def signalled(position: Position, number: int) -> Callable[[], None]:
    return just_before(position, lambda job: os.kill(os.getpid(), number))


def spoilt(role: str, positions: set[Position], gradient: bool = False) -> Callable[[], None]:
    """What a role's network computes in these updates is not a number, or only its gradient is not."""

    def patch() -> None:
        step, predict, now = train.train_step, Roles.predict, {}

        def noted(job: train.Job, at: train.Position, update: int, *more: Any) -> Any:
            now["at"] = at.phase, at.iteration, update
            return step(job, at, update, *more)

        def bad(self: Roles, of: str, *more: Any) -> Tensor:
            x = predict(self, of, *more)
            if of != role or now.get("at") not in positions:
                return x
            if not gradient:
                return x * float("nan")
            if x.requires_grad:
                x.register_hook(lambda grad: grad * float("nan"))
            return x

        train.train_step, Roles.predict = noted, bad

    return patch


def both(*patches: Callable[[], None]) -> Callable[[], None]:
    def patch() -> None:
        for one in patches:
            one()

    return patch


def damaged(role: str, position: Position) -> Callable[[], None]:
    """From this update on one weight of a role is not a number."""

    @torch.no_grad()
    def spoil(job: train.Job) -> None:
        module = job.system.roles.module(role, 0)
        [*module.parameters(), *module.buffers()][0].view(-1)[0] = float("nan")

    return just_before(position, spoil)


# ---------------------------------------------------------------- kills and stops


def wait(child: int, condition: Callable[[], bool], seconds: float = 60) -> None:
    """Until the condition holds, the process ends, or the time is over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if condition():
            return
        time.sleep(0.001)


def holds(run: Path, child: int) -> bool:
    lock = run / ".lock"
    return lock.exists() and lock.read_text().strip() == str(child)


def writing(run: Path, since: int) -> bool:
    """Whether a checkpoint is being written since then."""
    for path in (run / "checkpoints").glob(".*.partial"):
        try:
            if path.stat().st_mtime_ns > since:
                return True
        except FileNotFoundError:
            continue
    return False


def stopped(run: Path, number: int, in_a_write: bool, after: float) -> bool:
    """Sends the signal at a random moment; whether it came before the end."""
    since = time.time_ns()
    child = started(run, before=slow_disk if in_a_write else lambda: None)
    wait(child, lambda: holds(run, child))
    wait(child, lambda: False, after * 0.4)
    if in_a_write:
        wait(child, lambda: writing(run, since))
        time.sleep(after * 0.08)
    os.kill(child, number)
    code, said = end(child), said_by(run).read_text()
    if code == 0 or (number != signal.SIGKILL and RunFolder(run).expert_path(2).exists()):
        return False  # after the last phase nothing catches the signal
    if number == signal.SIGKILL:
        assert (code, said) == (-number, "")
    else:
        assert code == 128 + number and SAVED.fullmatch(said), (code, said)
    return True


def test_runs_stopped_at_random_moments_end_byte_identical(uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    """10 kills, every other one inside a checkpoint's writing, 4 SIGTERM and a SIGINT, over as many runs as needed."""
    rng = random.Random(0)
    stops = [(signal.SIGKILL, i % 2 == 0) for i in range(10)] + [(signal.SIGTERM, i == 0) for i in range(4)]
    stops += [(signal.SIGINT, False)]
    rng.shuffle(stops)
    count = 0
    while stops:
        run, count = tmp_path / str(count), count + 1
        while stops and stopped(run, *stops[-1], rng.random()):
            stops.pop()
        assert_goes_on(run, uninterrupted)


@pytest.mark.parametrize(
    ("position", "number", "where"),
    [
        ((1, 0, 1), signal.SIGTERM, "phase 1, iteration 0, update 1"),
        ((1, 3, 2), signal.SIGINT, "phase 1, iteration 3, update 2"),
        ((2, 2, 0), signal.SIGTERM, "phase 2, iteration 3"),
        ((2, 5, 3), signal.SIGTERM, "phase 2, iteration 5, update 3"),
        ((2, 5, 0), signal.SIGINT, "phase 2, iteration 6"),
    ],
)
def test_a_signal_ends_the_update_saves_and_says_how_to_go_on(
    position: Position, number: int, where: str, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, said = status(run, before=signalled(position, number))
    assert code == 128 + number
    assert said == f"phased-dmd: {run}: stopped and saved at {where}; the same command goes on from there\n"
    assert_goes_on(run, uninterrupted)


@pytest.mark.parametrize(("checkpoint_every", "steps"), [(2, 90), (1000, 40)])
def test_a_machine_that_fails_loses_nothing_of_what_is_resumed_from(
    checkpoint_every: int, steps: int, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    """At random steps on the disk; of what was not synced half is lost. Without checkpoints, whole phases are kept."""
    run, rng, deaths, fields = tmp_path / "run", random.Random(1), 0, f"checkpoint_every={checkpoint_every}"
    for _ in range(8):
        step = rng.randrange(15, steps)
        code, said = status(run, fields, before=lambda step=step: die_at(step, run, torn=True))
        assert code in (0, KILLED) and said == ""
        deaths += code == KILLED
    assert deaths >= 3
    assert_goes_on(run, uninterrupted, fields)


# ---------------------------------------------------------------- disks and folders


@pytest.mark.parametrize("room", [0, 8, 120, 600, 1500, 2500])
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(
    room: int, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    """room: KiB that the run finds free."""
    with small_disk(tmp_path / "disk", 16384):
        run, ballast = tmp_path / "disk" / "run", tmp_path / "disk" / "ballast"
        said_by(run).symlink_to(tmp_path / "stderr")
        ballast.write_bytes(bytes((16380 - room) * 1024))
        code, said = status(run)
        assert code == 2
        assert re.fullmatch(r"phased-dmd: .*cannot be written: No space left on device.*\n", said), said
        ballast.unlink()
        assert_goes_on(run, uninterrupted)


def test_a_limit_to_the_size_of_files_is_one_line(uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    import resource

    run = tmp_path / "run"
    code, said = status(run, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)))
    assert code == 2
    line = f"cannot be written: File too large; {run} goes on from the start of phase 1 by the same command\n"
    assert said == f"phased-dmd: checkpoints: {line}"
    assert_goes_on(run, uninterrupted)


def test_a_run_folder_that_turns_read_only_is_one_line(uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    run = tmp_path / "run"

    def lock_up(job: train.Job) -> None:
        obey_permissions()
        for path in (run, *run.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)

    code, said = status(run, before=just_before((1, 3, 1), lock_up))
    assert code == 2
    line = f"cannot be written: Permission denied; {run} goes on from phase 1, iteration 2 by the same command\n"
    assert said == f"phased-dmd: metrics.jsonl: {line}"
    code, said = status(run, before=obey_permissions)
    assert code == 2 and said == f"phased-dmd: --output: {run} cannot be written: Permission denied\n"
    for path in (run, *run.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    assert_goes_on(run, uninterrupted)


@pytest.mark.parametrize(
    ("position", "what"), [((1, 2, 0), "samples/phase-1-iteration-000003.png"), ((2, 1, 3), "metrics.jsonl")]
)
def test_a_run_folder_that_is_removed_is_one_line_and_is_not_half_made_again(
    position: Position, what: str, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, said = status(run, before=just_before(position, lambda job: shutil.rmtree(run)))
    assert code == 2 and not run.exists()
    line = f"cannot be written: No such file or directory; {run} goes on from the start of phase 1 by the same command"
    assert said == f"phased-dmd: {what}: {line}\n"
    assert_goes_on(run, uninterrupted)


# ---------------------------------------------------------------- what is not finite

FAULTS: dict[str, tuple[Callable[[], None], Position, str, bool]] = {
    # the fault, the last point before it, what is said of it, and whether it is in the state that is kept
    "teacher's output": (spoilt(TEACHER, {(1, 3, 0)}), (1, 3, 3), "phase_1: the loss is nan", False),
    "teacher's weights": (damaged(TEACHER, (2, 1, 0)), (2, 1, 3), "phase_2: the loss is nan", False),
    "fake's output": (spoilt(FAKE, {(2, 1, 2)}), (2, 1, 1), "fake: the loss is nan", False),
    "fake's weights": (damaged(FAKE, (1, 4, 0)), (1, 4, 3), "phase_1: the loss is nan", True),
    "fake's gradient": (spoilt(FAKE, {(1, 0, 1)}, gradient=True), (1, 0, 0),
                        r"fake: the gradient of 0\.net\.\d\.weight is not finite", False),
    "expert's output": (spoilt(expert_role(2), {(2, 5, 1)}), (2, 5, 0), "fake: the loss is nan", False),
    "expert's weights": (damaged(expert_role(1), (1, 2, 3)), (1, 2, 2), "fake: the loss is nan", True),
    "expert's gradient": (spoilt(expert_role(2), {(2, 0, 0)}, gradient=True), (2, 0, 3),
                          r"phase_2: the gradient of 0\.net\.\d\.weight is not finite", False),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_finite_ends_the_run_and_can_be_reproduced(
    fault: str, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    run, (spoil, (phase, iteration, update), what, in_state) = tmp_path / "run", FAULTS[fault]
    name = f"phase-{phase}-iteration-{iteration:06d}-update-{update}"
    code, said = status(run, before=spoil)
    rates = r"generator\.lr is [\d.e-]+ and fake\.lr [\d.e-]+, of which one may be too high"
    line = f"phased-dmd: phase {phase}, iteration {iteration}, {what}; {rates}; "
    line += f"the state before it is in {run}/failures/{name}"
    assert code == 1 and re.fullmatch(f"{line}\n", said), said
    again = tmp_path / "again"
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("failures"))
    shutil.copytree(run / "failures" / name, again / "checkpoints" / name)
    assert status(again, before=(lambda: None) if in_state else spoil) == (1, said.replace(str(run), str(again)))
    if not in_state:  # without the fault, the kept state goes on as if it had never been
        shutil.copytree(run / "failures" / name, run / "checkpoints" / name)
    assert_goes_on(run, uninterrupted)


def test_a_gradient_that_is_not_finite_may_be_left_out_and_counts_across_kills(tmp_path: Path) -> None:
    spoil, runs = spoilt(FAKE, {(1, 2, 2)}, gradient=True), tmp_path
    warned = r"phased-dmd: phase 1, iteration 2, fake: the gradient of 0\.net\.\d\.weight is not finite; "
    warned += r"left out, 1 of at most 1 in this phase\n"
    code, said = status(runs / "whole", "skips=1", before=spoil)
    assert code == 0 and re.fullmatch(warned, said), said
    expected = results(runs / "whole")
    rows = [json.loads(line) for line in expected["metrics.jsonl"].splitlines()]
    assert [row["skipped"] for row in rows] == [0, 1, 1, 0, 0, 0]

    kill, term = signal.SIGKILL, signal.SIGTERM
    stops = (((1, 2, 2), kill), ((1, 2, 3), kill), ((1, 4, 1), kill), ((1, 2, 2), term))
    for i, (position, number) in enumerate(stops):
        run = runs / str(i)
        assert status(run, "skips=1", before=both(spoil, signalled(position, number)))[0] in (-number, 128 + number)
        assert status(run, "skips=1", before=spoil)[0] == 0
        assert results(run) == expected, (position, number)


@pytest.mark.parametrize("stop", [None, (1, 3, 1)])
def test_a_second_one_ends_the_run(stop: Position | None, tmp_path: Path) -> None:
    """Also in another process than the first."""
    run, spoil = tmp_path / "run", spoilt(FAKE, {(1, 2, 2), (1, 4, 1)}, gradient=True)
    if stop:
        code, _ = status(run, "skips=1", before=both(spoil, signalled(stop, signal.SIGTERM)))
        assert code == 128 + signal.SIGTERM
    code, said = status(run, "skips=1", before=spoil)
    *_, last = said.splitlines()
    assert code == 1 and len(said.splitlines()) == (1 if stop else 2)
    assert re.fullmatch(
        r"phased-dmd: phase 1, iteration 4, fake: the gradient of .* is not finite; .* may be too high; the state .*",
        last,
    )
    assert (run / "failures" / "phase-1-iteration-000004-update-0" / "manifest.json").exists()


# ---------------------------------------------------------------- groups of processes

GROUP_ITERATIONS = 30


def wait_for_metrics(run: Path, ended: Callable[[], object]) -> None:
    """Until the group is in the middle of the run."""
    until = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists():
        assert not ended() and time.monotonic() < until
        time.sleep(0.02)


def assert_one_process_goes_on(run: Path) -> None:
    assert status(run, iterations=GROUP_ITERATIONS) == (0, "")
    rows = RunFolder(run).metrics()
    assert [(r["phase"], r["iteration"]) for r in rows] == [(p, i) for p in (1, 2) for i in range(2, 31, 2)]
    assert forked(lambda: command(said_by(run), *arguments(run, iterations=GROUP_ITERATIONS))) == 0


def test_when_a_process_of_a_group_dies_the_others_end_and_one_process_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def member() -> None:
        command(tmp_path / f"{os.environ['RANK']}.stderr", *arguments(run, iterations=GROUP_ITERATIONS))

    first, second = launch(2, member, seconds=180)
    wait_for_metrics(run, lambda: os.waitid(os.P_PID, second, os.WEXITED | os.WNOHANG | os.WNOWAIT))
    killed = time.monotonic()
    assert int((run / ".lock").read_text()) == first
    os.kill(first, signal.SIGKILL)
    assert end(second) == 1 and end(first) == -signal.SIGKILL and time.monotonic() - killed < 60
    lost = "phased-dmd: another process of the group ended; the same command goes on from the last checkpoint\n"
    assert (tmp_path / "1.stderr").read_text() == lost
    assert_one_process_goes_on(run)


def test_a_group_that_is_asked_to_stop_saves_once_and_one_process_goes_on(tmp_path: Path) -> None:
    """By torchrun itself, which passes the signal on to all."""
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*torchrun, "-m", "phased_dmd", *arguments(run, iterations=GROUP_ITERATIONS)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_metrics(run, lambda: process.poll() is not None and process.communicate()[1])
    process.terminate()
    _, said = process.communicate(timeout=60)
    places = {found[1] for line in said.splitlines(keepends=True) if (found := SAVED.fullmatch(line))}
    assert process.returncode != 0 and len(places) == 1, said
    numbers = [int(number) for number in re.findall(r"\d+", places.pop())]
    phase, iteration, update = (*numbers, 0)[:3]
    newest = max(path.name for path in (run / "checkpoints").iterdir())
    assert newest == f"phase-{phase}-iteration-{iteration:06d}-update-{update}"
    assert_one_process_goes_on(run)
