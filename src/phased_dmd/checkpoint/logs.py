"""The logs of a run: one JSON object a line, of which a kill may have cut the last one short."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from phased_dmd.checkpoint.files import write_atomically
from phased_dmd.errors import UserError

LOGS = METRICS, TIMING, PREVIEWS = "metrics.jsonl", "timing.jsonl", "previews.jsonl"


class Row(NamedTuple):
    """Holds a line of a log, and what it says."""

    content: dict[str, Any]
    line: str

    @property
    def place(self) -> tuple[int, int]:
        """Returns the phase and the iterations done in it."""
        return self.content["phase"], self.content["iteration"]


def read_log(path: Path) -> list[Row]:
    """Reads the rows of a log, but for one that was cut short; one that is not there has none."""
    try:
        complete = (path.read_text("utf-8") if path.exists() else "").split("\n")[:-1]
        return [Row(json.loads(line), f"{line}\n") for line in complete]
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error})") from error


def encode_log(rows: Iterable[Row]) -> bytes:
    """Writes rows as the file that they were read from."""
    return "".join(row.line for row in rows).encode()


def rewrite_log(path: Path, keeps: Callable[[Row], bool]) -> None:
    """Drops the rows of a log, if it is there, that are not to be kept, and a line that was cut short."""
    if path.exists():
        write_atomically(path, encode_log(row for row in read_log(path) if keeps(row)))
