"""`phased-dmd`, or `python -m phased_dmd`, from its first moment on: Ctrl-C while modules are imported too."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Runs the command; where no run is being trained, Ctrl-C is one line on stderr and exit status 130."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else ignored, as by nohup
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from phased_dmd.cli import main as command

        command()
    except KeyboardInterrupt:
        _say()
        sys.exit(130)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ends the command by an exception; modules under way, and at a second Ctrl-C, the process where it stands."""
    signal.signal(number, lambda *_: os._exit(130))
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):  # C++ that runs there cannot pass an exception on
            _say()
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _say() -> None:
    """Prints, in the first of the processes that torchrun starts, which speaks for all."""
    sys.stdout.flush()
    if os.environ.get("RANK", "0") == "0":
        print("phased-dmd: interrupted; an unfinished run goes on by the same command", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
