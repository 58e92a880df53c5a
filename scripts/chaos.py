"""Stops runs at random moments, by SIGKILL, SIGTERM and SIGINT, and shows that nothing is lost.

Each run is a process of its own, `python -m phased_dmd distill ...`, resumed by the same command after each stop. What
it ends with, experts and metrics, must equal an uninterrupted run's byte for byte, and nothing may be said on stderr
but the one line of an orderly stop. One process runs at a time. The moments come from the seed, but where in a run they
fall depends on the machine.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, Signals
from typing import NamedTuple

COMMON = ("--log-every", "2", "--set", "sample_every=1000")
TOY = "teacher.fit_steps=20 generator.ema=0.9 fake.updates=5"
NANO = "generator.lora.rank=2 batch_size=2 fake.updates=3"
RUNS = {
    "toy-1d": ("--iterations", "12", *(part for field in TOY.split() for part in ("--set", field)), *COMMON),
    "nano-t2i": ("--iterations", "2", "--steps", "2", "--phases", "2",
                 *(part for field in NANO.split() for part in ("--set", field)), *COMMON),
}  # fmt: skip
STOPS_A_RUN = 12  # after them it is left to end
SHARE = 1 / 6  # of a run, the longest wait for a stop: some of them fit in
SLOW_DISK = """
import os, time
def slow(descriptor, sync=os.fsync):
    time.sleep(0.02)
    sync(descriptor)
os.fsync = slow
"""  # a sitecustomize.py of the child's: half of its time then goes into writing
SAVED = re.compile(r"phased-dmd: \S+: stopped and saved at (.*); the same command goes on from there\n")


class Stop(NamedTuple):
    signal: Signals
    moment: str  # starting, anywhere, writing, between


class Failed(Exception):
    """Something was lost, or said that should not be."""


@dataclass
class Reference:
    """An uninterrupted run: what it ends with, and how long it takes to start and to run, in seconds."""

    files: dict[str, bytes]
    starting: float
    running: float


def planned(kills: int, terms: int, interrupts: int, rng: random.Random) -> list[Stop]:
    """The stops in random order; five of nine kills wait for a checkpoint that is being written."""
    moments = ("writing", "anywhere", "writing", "between", "writing", "anywhere", "writing", "starting", "writing")
    orderly = ("anywhere", "anywhere", "writing")
    stops = [Stop(SIGKILL, moments[i % len(moments)]) for i in range(kills)]
    stops += [Stop(SIGTERM, orderly[i % len(orderly)]) for i in range(terms)]
    stops += [Stop(SIGINT, orderly[i % len(orderly)]) for i in range(interrupts)]
    rng.shuffle(stops)
    return stops


# ---------------------------------------------------------------- one process


def launch(recipe: str, folder: Path, checkpoint_every: int, slow: bool = False) -> subprocess.Popen[str]:
    """The command, always the same for a folder; slow: on a disk that takes its time."""
    path = [str(folder.parent / "slow")] * slow + os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "phased_dmd", "distill", recipe, "--output", str(folder), *RUNS[recipe]]
    command += ["--checkpoint-every", str(checkpoint_every)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8"
    )


def wait(child: subprocess.Popen[str], condition: Callable[[], bool], seconds: float, pause: float) -> bool:
    """Until the condition holds, which is the answer, or the process ends, or the time is over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and child.poll() is None:
        if condition():
            return True
        time.sleep(pause)
    return False


def finish(child: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status and what was said on stderr."""
    try:
        _, said = child.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        child.kill()
        raise Failed(f"hung, and was killed: {child.args}") from None
    return child.returncode, said


def require(right: bool, what: str, status: int, said: str) -> None:
    if not right:
        raise Failed(f"{what}: exit status {status}, and on stderr: {said!r}")


def alone(child: subprocess.Popen[str]) -> None:
    """Lets a process end."""
    status, said = finish(child)
    require(status == 0 and not said, "a run that was left alone", status, said)


def started(folder: Path, child: subprocess.Popen[str]) -> bool:
    """Whether the process holds the run: from then on it obeys signals."""
    lock = folder / ".lock"
    return lock.exists() and lock.read_text("utf-8").strip() == str(child.pid)


def writing(folder: Path, since: int) -> bool:
    """Whether a file or a checkpoint in the folder is being written, or was when the process died.

    since: when the process began, in nanoseconds; what others left behind is older.
    """
    for path in folder.glob(".*.partial"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime_ns > since:
                return True
    return False


# ---------------------------------------------------------------- one stop


def stop(child: subprocess.Popen[str], folder: Path, since: int, due: Stop, times: Reference, after: float) -> None:
    """Sends the signal at the moment, if the process has not ended before. after: in [0, 1), how long to wait."""
    if due.moment == "starting":
        wait(child, lambda: False, after * times.starting, 0.01)
    elif wait(child, lambda: started(folder, child), 600, 0.005):
        if due.moment == "between":
            wait(child, lambda: any((folder / "experts").glob("*phase-1*")), 600, 0.001)
            time.sleep(after * 0.1)
        else:
            wait(child, lambda: False, after * times.running * SHARE, 0.005)
        if due.moment == "writing":
            wait(child, lambda: writing(folder / "checkpoints", since), 600, 0.001)
            time.sleep(after * 0.08)
    if child.poll() is None:
        child.send_signal(due.signal)


def place(folder: Path, child: subprocess.Popen[str], since: int) -> str:
    """Where a dead process was, as its folder tells."""
    if not started(folder, child):
        return "starting up"
    phase = 1 + len(list((folder / "experts").glob("phase-*")))
    if writing(folder / "checkpoints", since):
        return f"phase {phase}, writing a checkpoint"
    if any(writing(part, since) for part in (folder, folder / "conditions", folder / "experts")):
        return "writing another file"
    metrics = folder / "metrics.jsonl"
    rows = metrics.read_text("utf-8") if metrics.exists() else ""
    if phase == 2 and '"phase": 2' not in rows and not any((folder / "checkpoints").glob("phase-2-*")):
        return "between the phases"
    return f"phase {phase}, training" if phase < 3 else "after the last phase"


# ---------------------------------------------------------------- runs


class Chaos:
    """All runs, and where their stops fell."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng, self.runs = folder, rng, Counter[str]()
        self.fell: dict[Signals, Counter[str]] = {number: Counter() for number in (SIGKILL, SIGTERM, SIGINT)}
        self.inside = Counter[bool]()  # orderly stops: whether between two updates of a cycle
        (folder / "slow").mkdir()
        (folder / "slow" / "sitecustomize.py").write_text(SLOW_DISK, "utf-8")

    def reference(self, recipe: str) -> Reference:
        run, begun = self.folder / f"{recipe}-uninterrupted", time.monotonic()
        child = launch(recipe, run, 3)
        wait(child, lambda: started(run, child), 600, 0.01)
        starting = time.monotonic() - begun
        alone(child)
        return Reference(results(run), starting, time.monotonic() - begun - starting)

    def run(self, recipe: str, stops: list[Stop], uninterrupted: Reference) -> None:
        """A run from its beginning to its end, through stops that it takes off the list."""
        self.runs[recipe] += 1
        run, every = self.folder / f"{recipe}-{self.runs[recipe]}", 1 + self.runs[recipe] % 3
        for _ in range(STOPS_A_RUN):
            later = any((run / "experts").glob("phase-1*"))
            due = next((stop for stop in stops if not (later and stop.moment == "between")), None)
            if due is None or not self.stopped(recipe, run, every, due, uninterrupted):
                break
            stops.remove(due)
        alone(launch(recipe, run, every))
        for name, data in results(run).items():
            if data != uninterrupted.files[name]:
                raise Failed(f"{run / name}: differs from that of an uninterrupted run")
        shutil.rmtree(run)

    def stopped(self, recipe: str, run: Path, every: int, due: Stop, times: Reference) -> bool:
        """Whether the stop came before the run's end; notes where."""
        since = time.time_ns()
        child = launch(recipe, run, every, slow=due.moment == "writing")
        stop(child, run, since, due, times, self.rng.random())
        status, said = finish(child)
        if status == 0 or (due.signal != SIGKILL and (run / "experts" / "phase-2.safetensors").exists()):
            return False  # a signal after the last phase is Python's
        if due.signal == SIGKILL:
            require(status == -SIGKILL and not said, "a run that was killed", status, said)
            where = place(run, child, since)
        else:
            line = SAVED.fullmatch(said)
            require(status == 128 + due.signal and line is not None, due.signal.name, status, said)
            assert line
            self.inside["update" in line[1]] += 1
            where = f"{line[1].split(',')[0]}, training"
        self.fell[due.signal][where] += 1
        print(f"{recipe}: {due.signal.name}, {where}", flush=True)
        return True

    def table(self) -> str:
        places = sorted({place for fell in self.fell.values() for place in fell})
        width = max(map(len, [*places, "in all"]))
        lines = [" " * width + "".join(f"{number.name:>9}" for number in self.fell)]
        for place in places:
            lines.append(f"{place:{width}}" + "".join(f"{fell[place]:9}" for fell in self.fell.values()))
        return "\n".join([*lines, f"{'in all':{width}}" + "".join(f"{f.total():9}" for f in self.fell.values())])


def results(run: Path) -> dict[str, bytes]:
    paths = [run / "metrics.jsonl", *(run / "experts" / f"phase-{phase}.safetensors" for phase in (1, 2))]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("kills", 50), ("terms", 15), ("interrupts", 5), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    asked, begun = parser.parse_args(arguments), time.monotonic()
    rng = random.Random(asked.seed)
    stops = planned(asked.kills, asked.terms, asked.interrupts, rng)
    chaos = Chaos(Path(tempfile.mkdtemp(prefix="chaos-")), rng)
    try:
        for recipe, share in (("nano-t2i", stops[::5]), ("toy-1d", [s for i, s in enumerate(stops) if i % 5])):
            uninterrupted = chaos.reference(recipe)
            while share:
                chaos.run(recipe, share, uninterrupted)
    except Failed as failure:
        sys.exit(f"{failure}\nthe runs are in {chaos.folder}")
    shutil.rmtree(chaos.folder)
    print(f"\n{chaos.table()}\n")
    print(f"{chaos.inside[True]} of the {chaos.inside.total()} orderly stops between two updates of a cycle")
    runs = " and ".join(f"{count} of {recipe}" for recipe, count in chaos.runs.items())
    kills = chaos.fell[SIGKILL].total()
    print(f"{kills} kills survived: {runs} ended byte-identical to an uninterrupted run of each")
    print(f"{(time.monotonic() - begun) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
