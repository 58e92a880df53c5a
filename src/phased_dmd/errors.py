"""What ends a run in one line."""

import difflib
from collections.abc import Sequence
from pathlib import Path


class UserError(ValueError):
    """Something the user can mend: shown as one line, exit status 2."""


class Stopped(Exception):
    """A run was asked to stop by a signal of this number; it is saved, and goes on by the same command."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(number, message)  # both, so that it can be pickled
        self.number = number

    def __str__(self) -> str:
        return self.args[1]


class OutOfMemory(RuntimeError):
    """The device's memory did not hold a part of a run, which the message names."""


class LostPeer(RuntimeError):
    """Another process of the group ended before its time."""


def refuse_full(output: Path) -> None:
    """A UserError where a command that makes a folder would find something in its place."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {output} exists and is not an empty folder")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the known name that is spelt most like it, or all known names."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; one of {', '.join(known)}"
