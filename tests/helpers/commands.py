"""The command as a user types it, in this process."""

import sys

import pytest

from phased_dmd.cli import main


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs `phased-dmd` with these arguments; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["phased-dmd", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
