"""The bar that a run shows in a terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from phased_dmd.config import Config


@contextmanager
def progress_bar(config: Config, phase: int, done: int, quiet: bool, only: bool = False) -> Iterator:
    """Shows a bar of a phase, with the time left of the run, rate and losses; yields what moves it on.

    only: no later phase follows.
    """
    total, later = config.phase_iterations(phase), range(phase + 1, phase if only else config.plan.phases + 1)
    after = sum(map(config.phase_iterations, later))
    columns = (
        TextColumn(f"phase {phase}/{config.plan.phases}"), BarColumn(20), MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=False)),  # the one that gives way
    )  # fmt: skip
    with Progress(*columns, disable=quiet) as bar:
        task = bar.add_task("", total=total, completed=done, left="", figures="")
        started = time.monotonic()

        def show(count: int, losses: str) -> None:
            seconds = max(time.monotonic() - started, 1e-9) / (count - done)
            left = timedelta(seconds=round(seconds * (total - count + after)))
            bar.update(task, completed=count, left=f"run {left} left", figures=f"{1 / seconds:.3g} it/s {losses}")

        yield show
