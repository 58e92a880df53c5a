"""Phases that processes of their own train side by side, each in a folder of its own, become one run in the end."""

import shutil
from pathlib import Path

from phased_dmd.checkpoint.files import partial_of, sync, write_atomically
from phased_dmd.checkpoint.logs import LOGS, Row, encode_log, read_log


def part_of(run: Path, phase: int) -> Path:
    """Returns the folder of a phase that is trained by itself."""
    return run / "phases" / f"phase-{phase}"


def joined_log(run: Path, phases: int, name: str) -> list[Row]:
    """Returns the rows of a log of all phases, in their order, each from where its phase is trained."""
    rows = []
    for phase in range(1, phases + 1):
        own = part_of(run, phase)
        rows += [row for row in read_log((own if own.exists() else run) / name) if row.place[0] == phase]
    return rows


def join_phases(run: Path, phases: int) -> None:
    """Joins the logs of phases that are done, and moves the rest of them to where a single process has it.

    The caller holds the run. A kill in between costs nothing: it is done again.
    """
    parts = run / "phases"
    gone = partial_of(parts)
    shutil.rmtree(gone, ignore_errors=True)
    if not parts.exists():
        return
    for name in LOGS:
        if lines := encode_log(joined_log(run, phases, name)):  # of pictures there need be none
            write_atomically(run / name, lines)
    for phase in range(1, phases + 1):
        own = part_of(run, phase)
        kept = {path: path.relative_to(own) for kind in ("checkpoints", "failures") for path in own.glob(f"{kind}/p*")}
        kept |= {path: Path("tensorboard", own.name) for path in own.glob("tensorboard")}
        for path, place in kept.items():
            if not (run / place).exists():
                (run / place).parent.mkdir(exist_ok=True)
                path.rename(run / place)
    parts.rename(gone)
    sync(run)
    shutil.rmtree(gone)
