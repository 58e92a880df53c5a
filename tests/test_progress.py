"""Words while it works: where there is no terminal a line now and then, however long a piece takes, and a last one."""

import io
import multiprocessing
import re
import time
from pathlib import Path
from typing import Any

import pytest
from commands import run as command
from rich.console import Console
from runs import TINY, finished_run

from phased_dmd.conditions import Conditions
from phased_dmd.progress import Work, progress
from phased_dmd.prompts import Prompt
from phased_dmd.recipes import resolve


def log() -> Console:
    """No terminal: lines go to a file."""
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_without_a_terminal_there_is_a_line_now_and_then_while_a_piece_takes_long() -> None:
    console = log()
    with progress("samples", 8, unit="samples", console=console, every=0.02) as show:
        time.sleep(0.3)
        show(8)
    *between, last = said(console)
    assert len(between) >= 3 and set(between) == {"samples: 0/8 after 0:00:00"}
    assert re.fullmatch(r"samples: 8/8 in 0:00:00, [\d.]+ samples/s", last)


def test_in_a_terminal_there_is_a_bar() -> None:
    screen = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, legacy_windows=False)
    with progress("a {name} of [any] kind", 8, console=screen) as show:
        show(3)
    assert any("a {name} of [any] kind" in line and "3/8" in line for line in said(screen))


def test_the_time_left_is_that_of_what_is_not_there_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 pieces 40 were there, 10 more took 30 seconds: 50 are left, or 150 with what follows in the run."""
    for later, left in ((None, "0:02:30 left"), (100, "run 0:07:30 left")):
        clock = iter((0, 30))
        monkeypatch.setattr(time, "monotonic", lambda clock=clock: next(clock))
        work = Work("work", 100, 40, "it", later)
        assert work.left == ""
        work(50)
        assert (work.left, work.figures) == (left, "0.333 it/s")


def test_what_ends_in_an_error_does_not_say_that_it_is_done() -> None:
    console = log()
    with pytest.raises(KeyError), progress("work", 2, console=console) as show:
        show(2)
        raise KeyError
    assert said(console) == []


def test_quiet_work_says_nothing() -> None:
    console = log()
    with progress("work", 1, quiet=True, console=console, every=0.01) as show:
        time.sleep(0.05)
        show(1)
    assert said(console) == []


def test_of_several_processes_the_first_speaks(tmp_path: Path) -> None:
    """Those of a pool would write over each other."""

    def work() -> None:
        with open(tmp_path / "said", "w") as file, progress("work", 1, console=Console(file=file)) as show:
            show(1)

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    worker.join()
    assert (tmp_path / "said").read_text() == ""
    work()
    assert (tmp_path / "said").read_text().startswith("work: 1/1 in ")


def test_encoding_says_how_many_prompts_are_encoded_once(tmp_path: Path, tiny_codec: Any, capsys: Any) -> None:
    prompts = [Prompt(f"prompt {i}") for i in range(65)]
    for expected in (["prompts encoded: 66/66"], []):  # with the negative one; then all are there
        Conditions(tiny_codec, prompts, "", tmp_path, quiet=False)
        assert [line.split(" in ")[0] for line in capsys.readouterr().out.splitlines()] == expected


def test_sample_speaks_on_stderr_and_lists_its_files_on_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = finished_run(tmp_path / "run", resolve("nano-t2i", TINY)), tmp_path / "out"
    arguments = ("--prompt", "a handwritten one", "--seeds", "3", "--output", str(out))
    assert command("sample", str(run), *arguments, monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr()
    assert [Path(line).parent for line in shown.out.splitlines()] == [out] * 5
    loaded, sampled = shown.err.splitlines()
    assert loaded.startswith(f"{run}: prompts encoded, networks loaded: 1/1 in ")
    assert sampled.startswith("samples: 3/3 in ")
