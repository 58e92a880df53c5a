"""Says when a checkpoint is due by the clock, for all processes alike."""

import time

from phased_dmd.engine.collectives import all_reduce_max


class SaveTimer:
    """A timer that is asked after every update, and told of every checkpoint.

    minutes: the most of them that a kill may cost, unless one update takes longer; None: the timer never asks for a
    checkpoint.
    """

    def __init__(self, minutes: float | None) -> None:
        self._seconds = None if minutes is None else 60 * minutes
        self._saved = self._asked = time.monotonic()

    def due(self) -> bool:
        """Says whether another update like the last one would end too late; all processes call this together."""
        if self._seconds is None:
            return False
        now = time.monotonic()
        late = 2 * now - self._asked - self._saved > self._seconds
        self._asked = now
        return bool(all_reduce_max(int(late)))

    def saved(self) -> None:
        """Starts from anew, behind a checkpoint, whose own time is no update's."""
        self._saved = self._asked = time.monotonic()
