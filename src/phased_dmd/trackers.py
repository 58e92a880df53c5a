"""Shows a run in experiment trackers, of the extra `trackers`; keys come from the environment, never from a config."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from phased_dmd.checkpoint import write_atomically
from phased_dmd.config import Config
from phased_dmd.engine.world import warn
from phased_dmd.errors import UserError

Row = Mapping[str, float]


class Tracker(NamedTuple):
    """Is one tracker: `track` takes a row of metrics at a step, and `close` ends it."""

    track: Callable[[int, Row], object]
    close: Callable[[], object]


class Trackers:
    """Holds a run's trackers. Each shows one run for a run folder, through all phases and however often it goes on.

    What fails in one of them is a warning, once, and never ends the run.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Config) -> None:
        self._names, self._folder, self._config = names, folder, config
        self._begun = False
        self._open: dict[str, Tracker] = {}
        self._warned: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name, tracker in self._open.items():
            self._try(name, tracker.close)

    def begin(self, done: int) -> None:
        """Opens the trackers, once, where the run goes on: behind `done` updates of the generator, over all phases."""

        def start(name: str) -> None:
            self._open[name] = open_tracker(name, self._folder, self._config, done)

        for name in () if self._begun else self._names:
            self._try(name, partial(start, name))
        self._begun = True

    def track(self, step: int, row: Mapping[str, float | None]) -> None:
        """Tracks a row of metrics, but for what has no value because its update was left out."""
        there = {key: value for key, value in row.items() if value is not None}
        for name, tracker in self._open.items():
            self._try(name, partial(tracker.track, step, there))

    def _try(self, name: str, action: Callable[[], object]) -> None:
        """Warns of the first failure of a tracker, instead of raising it."""
        try:
            action()
        except Exception as error:
            if name not in self._warned:
                self._warned.add(name)
                warn(f"trackers: {name}: {' '.join(str(error).split()) or repr(error)}; the run goes on")


def check_trackers(names: Sequence[str]) -> None:
    """Raises a UserError where a tracker's package is missing."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed; pip install 'phased-dmd[trackers]'")


def open_tracker(name: str, folder: Path, config: Config, done: int) -> Tracker:
    """Opens a tracker that goes on behind the step `done`."""
    match name:
        case "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
            return Tracker(
                lambda step, row: [writer.add_scalar(key, value, step) for key, value in row.items()], writer.close
            )
        case "wandb":
            import wandb  # type: ignore[import-not-found]

            run = wandb.init(
                project="phased-dmd", name=folder.name, id=tracker_id(folder), resume="allow", dir=str(folder),
                config=config.model_dump(),
            )  # fmt: skip
            return Tracker(lambda step, row: run.log(dict(row), step=step), run.finish)
        case "trackio":
            import trackio  # type: ignore[import-not-found]

            own = f"{folder.name}-{tracker_id(folder)}"  # it knows runs by their names
            trackio.init(project="phased-dmd", name=own, resume="allow", config=config.model_dump())
            return Tracker(lambda step, row: trackio.log(dict(row), step=step), trackio.finish)
    raise UserError(f"trackers: {name!r} is none of tensorboard, wandb, trackio")


def tracker_id(folder: Path) -> str:
    """Returns what trackers know the run by; it is kept in the run's folder, which may be moved."""
    path = folder / "tracker-id"
    with suppress(FileNotFoundError):
        return path.read_text("utf-8").strip()
    write_atomically(path, f"{secrets.token_hex(4)}\n".encode())
    return tracker_id(folder)
