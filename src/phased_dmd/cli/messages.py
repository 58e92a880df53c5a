"""What the command says on the terminal, and the exit status that it ends with."""

import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn, TextIO


def tell(message: str, file: TextIO | None = None) -> None:
    """Prints a message once: of the processes that torchrun starts, the first one speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=file)


def end(status: int, message: str) -> NoReturn:
    """Ends the process with an exit status and one line on stderr."""
    tell(f"phased-dmd: {' '.join(message.split())}", sys.stderr)
    sys.exit(status)


def count(number: int, thing: str) -> str:
    """Returns a number and what it counts, in the plural where needed: `1 step`, `4 steps`."""
    return f"{number} {thing}{'s' * (number != 1)}"


def unusable(error: OSError, arguments: Sequence[str]) -> str:
    """Returns what is wrong with a file, with the flag that led to it if one did."""
    if not isinstance(error.filename, str) or not error.strerror:
        return str(error)
    words = [word for argument in arguments for word in argument.split("=", 1)]
    flags = [flag for flag, value in pairwise(words) if flag.startswith("--") and _leads(value, error.filename)]
    return f"{flags[0] + ': ' if flags else ''}{error.filename}: {error.strerror}"


def _leads(value: str, file: str) -> bool:
    """Says whether a flag's value is the file, or a folder that holds it."""
    return bool(value) and not value.startswith("--") and Path(file).is_relative_to(value)
