"""Words while it works: a bar in a terminal, elsewhere a line a minute and one at the end."""

import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import rich
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from phased_dmd.config import Config
from phased_dmd.engine.world import rank

EVERY = 60.0  # seconds between two lines where there is no terminal


class Work:
    """Counts the pieces of some work that are done, and tells how long the others will take.

    Called with the number done, and with words that are to be seen beside it.
    """

    def __init__(self, what: str, total: int, done: int, unit: str, later: int | None) -> None:
        self.what, self.total, self.count, self.words = what, total, done, ""
        self._first, self._unit, self._later = done, unit, later
        self._started, self._seconds, self.show = time.monotonic(), None, lambda: None

    def __call__(self, count: int, words: str = "") -> None:
        self.count, self.words = count, words
        if count > self._first:
            self._seconds = max(time.monotonic() - self._started, 1e-9) / (count - self._first)
        self.show()

    @property
    def left(self) -> str:
        """Returns the time that is left, of the run where more follows; nothing before a piece is done."""
        if self._seconds is None:
            return ""
        seconds = round(self._seconds * (self.total - self.count + (self._later or 0)))
        return f"{'' if self._later is None else 'run '}{timedelta(seconds=seconds)} left"

    @property
    def figures(self) -> str:
        """Returns the pieces a second, and the words beside them."""
        rate = f"{1 / self._seconds:.3g} {self._unit}/s" if self._seconds is not None and self._unit else ""
        return f"{rate} {self.words}".strip()

    def line(self) -> str:
        """Returns all of it in a line, with the time that it has taken."""
        gone = timedelta(seconds=round(time.monotonic() - self._started))
        state = f"in {gone}" if self.count == self.total else f"after {gone}"
        left = "" if self.count == self.total and not self._later else self.left
        return ", ".join(filter(None, (f"{self.what}: {self.count}/{self.total} {state}", left, self.figures)))


@contextmanager
def progress(
    what: str, total: int, done: int = 0, *, unit: str = "", later: int | None = None, quiet: bool = False,
    console: Console | None = None, every: float = EVERY,
) -> Iterator[Work]:  # fmt: skip
    """Shows how far some work is, and how long it will yet take; yields what is told the number of pieces done.

    In a terminal that is a bar. Elsewhere it is a line every so many seconds, from a thread, since a piece may take
    longer, and one at the end. Of several processes the one that was started speaks. done: pieces of the total that
    were there before. unit: of a piece, for the rate. later: pieces that follow, if the time left is to be the run's.
    console: stderr if there is none, since results may be read from stdout.
    """
    work, console = Work(what, total, done, unit, later), console or Console(stderr=True)
    if quiet or rank() > 0 or multiprocessing.parent_process() is not None:
        yield work
    else:
        with (_bar if console.is_terminal else _lines)(work, console, every):
            yield work


@contextmanager
def progress_bar(config: Config, phase: int, done: int, quiet: bool, only: bool = False) -> Iterator[Work]:
    """Shows how far a phase is, with the time left of the run, rate and losses; yields what moves it on.

    only: no later phase follows.
    """
    later = range(phase + 1, phase if only else config.plan.phases + 1)
    of_run = {"later": sum(map(config.phase_iterations, later)), "console": rich.get_console()}
    name, total = f"phase {phase}/{config.plan.phases}", config.phase_iterations(phase)
    with progress(name, total, done, unit="it", quiet=quiet, **of_run) as show:
        yield show


@contextmanager
def _bar(work: Work, console: Console, _: float) -> Iterator[None]:
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(20), MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=False)),  # this one gives way
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(work.what, total=work.total, completed=work.count, left="", figures="")
        work.show = lambda: bar.update(task, completed=work.count, left=work.left, figures=work.figures)
        yield


@contextmanager
def _lines(work: Work, console: Console, every: float) -> Iterator[None]:
    over, say = threading.Event(), lambda: console.print(work.line(), markup=False, highlight=False, soft_wrap=True)

    def speak() -> None:
        while not over.wait(every):
            say()

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        over.set()
        speaker.join()
    say()
