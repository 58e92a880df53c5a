"""Notes SIGTERM and SIGINT at once, to be obeyed where a run can be left and taken up again."""

import signal
import threading
from types import FrameType
from typing import Any, Self

from phased_dmd.engine.collectives import all_reduce_max


class Signals:
    """A context in which the signals are noted; a second one of the same kind acts as if there were no context."""

    def __init__(self) -> None:
        self.noted = 0  # the number of a signal that this process has got
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.noted = number
        signal.signal(number, self._before[number])

    def asked(self) -> int:
        """Returns the number of a signal that any process has got, or 0; all processes call this together."""
        return all_reduce_max(self.noted)
