"""The checkpoints of a run, or of one phase of it: which is read, and which are kept."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from phased_dmd.checkpoint.folders import (
    Damaged,
    Point,
    check_folder,
    points_in,
    read_folder,
    remove,
    verify,
    write_folder,
)
from phased_dmd.engine.collectives import run_on_first_rank
from phased_dmd.engine.world import warn
from phased_dmd.errors import UserError


class Checkpoints:
    """Keeps checkpoints in one folder. All ranks call `save` and `load` together; the rest is for one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._damaged: set[Point] = set()  # those that were passed over
        self._newest: Point | None = None  # the one that this process has saved last

    def points(self, phase: int | None = None) -> list[Point]:
        """Lists the points of all phases, or of one, whole or not, oldest first."""
        return [point for point in points_in(self.folder) if phase in (None, point.phase)]

    def place(self, point: Point) -> Path:
        return self.folder / point.name

    def save(self, at: Mapping[str, Any], state: Mapping[str, Tensor], keep_last: int, keep_every: int | None) -> None:
        """Commits a checkpoint, unless it is there, then removes what need not be kept; see `RunFolder`."""
        point = Point.of(at)
        if point == self._newest:
            return
        write_folder(self.place(point), at, state)
        self._damaged.discard(point)
        run_on_first_rank(lambda: self._retire(point, keep_last, keep_every))
        self._newest = point

    def load(self, phase: int, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Copies the newest whole checkpoint of the phase into the tensors; see `RunFolder`."""
        self._newest = None
        points = run_on_first_rank(lambda: self.points(phase))
        for point in reversed(points):
            try:
                at = verify(self.place(point))
            except Damaged as error:
                self._damaged.add(point)
                warn(f"{error}; {point} is passed over")
                continue
            read_folder(self.place(point), state)
            return at
        if points:
            warn(f"{self.folder}: none of phase {phase} is whole; the phase starts again")
        return None

    def newest(self, phase: int) -> Point | None:
        """Returns the newest point of the phase that is whole as far as names, sizes and manifests tell."""
        for point in reversed(self.points(phase)):
            if point not in self._damaged:
                with suppress(UserError):
                    check_folder(self.place(point), summed=slice(0))
                    return point
        return None

    def _retire(self, newest: Point, keep_last: int, keep_every: int | None) -> None:
        """Removes what need not be kept, now that `newest` is whole; what lies beyond it was passed over, and stays
        until the run gets there.
        """
        until = [point for point in self.points() if point <= newest]
        whole = [point for point in until if point not in self._damaged]
        for point in {*until} - {*whole} | {point for point in whole[:-keep_last] if not is_kept(point, keep_every)}:
            remove(self.place(point))


def is_kept(point: Point, keep_every: int | None) -> bool:
    """Says whether a checkpoint is one of those that `keep_every` keeps for good."""
    return bool(keep_every and point.iteration and not point.update and point.iteration % keep_every == 0)
