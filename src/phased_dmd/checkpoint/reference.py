"""A checkpoint is named RUN@phase-2/300: that of a run, after 300 iterations of phase 2."""

import re
from pathlib import Path
from typing import NamedTuple, Self

from phased_dmd.checkpoint.files import resolve_inside
from phased_dmd.checkpoint.folders import check_folder
from phased_dmd.checkpoint.runfolder import RunFolder
from phased_dmd.errors import UserError

REFERENCE = re.compile(r"(.+)@phase-(\d{1,4})/(\d{1,9})", re.ASCII | re.DOTALL)


class Reference(NamedTuple):
    """Names a checkpoint, which need not be there."""

    run: Path
    phase: int
    iteration: int

    @classmethod
    def of(cls, subject: Path | str) -> Self | None:
        """Returns the checkpoint that a subject names, or None for one that names a folder."""
        found = REFERENCE.fullmatch(str(subject))
        return None if found is None or Path(subject).exists() else cls(Path(found[1]), int(found[2]), int(found[3]))

    @classmethod
    def needed(cls, subject: Path | str) -> Self:
        """Returns the checkpoint that a subject must name; a UserError if it does not."""
        if (found := cls.of(subject)) is None:
            raise UserError(f"{subject}: names no checkpoint; RUN@phase-2/300 does, after 300 iterations of phase 2")
        return found

    def __str__(self) -> str:
        return f"{self.run}@phase-{self.phase}/{self.iteration}"

    @property
    def folder(self) -> RunFolder:
        """Returns the folder of the phase, which is the run's unless phases are trained apart."""
        alone = RunFolder(self.run, self.phase)
        return alone if alone.own.exists() else RunFolder(self.run)

    @property
    def results(self) -> Path:
        """Returns the folder of what is measured of the checkpoint; it outlives the checkpoint."""
        return self.run / "evaluations" / f"phase-{self.phase}" / f"{self.iteration}"

    def find(self) -> Path:
        """Returns the checkpoint's own folder, verified; a UserError that says which ones there are if it is not."""
        run = RunFolder(self.run)
        resolve_inside(self.run, run.config_path)
        run.config()  # a UserError if there is none
        checkpoints = self.folder.checkpoints
        for point in checkpoints.points(self.phase):
            if point.iteration == self.iteration:
                folder = resolve_inside(self.run, checkpoints.place(point))
                check_folder(folder, slice(None))
                return folder
        there = ", ".join(f"phase-{p.phase}/{p.iteration}" for p in checkpoints.points()) or "none"
        raise UserError(f"{self}: there is no such checkpoint; the run has {there} (keep_last=all keeps more)")
