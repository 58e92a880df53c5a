"""The house: how far one update reaches, which modules there are, and how long functions and files may be."""

import ast
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import phased_dmd
from phased_dmd import train
from phased_dmd.recipes import resolve

SOURCES = Path(phased_dmd.__file__).parent
COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}  # frames of their own, but no functions
LOOP = "train_phase"


class Trace:
    """Records, of one call, which functions of the package are entered in it, and how deep they call each other.

    is_it: whether a frame that is entered is that call's.
    """

    def __init__(self, is_it: Callable[[FrameType], bool]) -> None:
        self.functions: set[tuple[str, str]] = set()
        self.calls, self.deepest, self._stack, self._is_it = 0, 0, 0, is_it

    def __enter__(self) -> "Trace":
        sys.setprofile(self._seen)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _seen(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(str(SOURCES)):
            return
        if code.co_name in COMPREHENSIONS:
            return
        begins = not self._stack and event == "call" and self._is_it(frame)
        if begins or self._stack:
            self.calls += begins
            self._stack += 1 if event == "call" else -1
            self.deepest = max(self.deepest, self._stack)
            self.functions.add((code.co_filename, code.co_qualname))


def test_an_update_of_the_fake_enters_few_files_and_functions(tmp_path: Path) -> None:
    """In phase 2 of toy-1d, with every lever off: draw, forward, backward, clip and optimiser step."""

    def is_it(frame: FrameType) -> bool:
        given = frame.f_locals
        return frame.f_code.co_name == "train_step" and (given["at"].phase, given["update"]) == (2, 1)

    quick = {"iterations": 1, "batch_size": 4, "sample_every": None, "fake.updates": 1, "teacher.fit_steps": 2}
    with Trace(is_it) as trace:
        train.distill(resolve("toy-1d", quick), tmp_path / "run", quiet=True)
    assert trace.calls == 1
    assert len({file for file, _ in trace.functions}) <= 11
    assert 30 < len(trace.functions) <= 60
    assert 5 < trace.deepest <= 10


def test_no_two_modules_have_one_name() -> None:
    names = Counter(path.name for path in SOURCES.rglob("*.py") if path.name != "__init__.py")
    assert names.most_common(1)[0][1] == 1, names.most_common(3)


def test_no_function_is_longer_than_40_lines_but_the_loop() -> None:
    """Its docstring is not counted."""
    long = []
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name != LOOP and node.end_lineno is not None:
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                if node.end_lineno - first.lineno + 1 > 40:
                    long.append(f"{path.name}: {node.name}")
    assert not long
