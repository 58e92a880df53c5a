"""docs/equations.md, the page from equations to code and tests, names what exists."""

import re
from functools import reduce
from importlib import import_module
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "equations.md").read_text()


def test_every_function_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(schedules|losses|rollout|phases)\.([\w.]+)`", PAGE))
    assert len(named) > 15
    for module, name in named:
        reduce(getattr, name.split("."), import_module(f"phased_dmd.maths.{module}"))


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE))
    assert len(named) > 25
    for file, name in named:
        (path,) = TESTS.rglob(file)
        assert f"def {name}(" in path.read_text(), (file, name)
