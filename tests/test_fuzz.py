"""Whatever a configuration, a prompt file or a flag says, `distill --dry-run` prints it or refuses it in one line."""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from mutations import Case, broken, cases

from phased_dmd.recipes import RECIPES

EXAMPLES = 150  # of the 1,000 that `scripts/fuzz.py` runs
NUMBER = itertools.count()


@settings(
    max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(case=cases())
def test_any_mutation_is_accepted_or_refused_in_one_line(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = Path(tmp_path_factory.getbasetemp()) / f"fuzz-{next(NUMBER)}"
    _, wrong = broken(case, folder)
    assert not wrong, wrong


# Each of these once ended in a traceback, in exit status 1, in a hang, or was accepted.

SETTINGS = [
    ("toy-1d", "seed=2024-99-99"),
    ("toy-1d", "seed=!!bool x"),
    ("toy-1d", "seed=!!timestamp x"),
    ("toy-1d", f"seed={'9' * 5000}"),
    ("toy-1d", f"seed=0x{'f' * 5000}"),
    ("toy-1d", f"seed={'[' * 3000}"),
    ("toy-1d", "plan.shift=1e308"),
    ("toy-1d", "plan.shift=1.0e-320"),
    ("toy-1d", "plan.steps=1000000000"),
    ("toy-1d", "teacher.fit_steps=1000000000000"),
    ("nano-t2i", "teacher.sizes=[{heihgt: 32}]"),
    ("nano-t2i", "teacher.sizes.0.x=1"),
    ("nano-t2i", f"teacher.sizes=[{{height: 1{'0' * 400}}}]"),
    ("nano-t2i", "generator.lora.rank=9000000000000000000"),
    ("nano-t2i", "teacher.lora_targets=[]"),
    ("nano-t2i", "teacher.lora_targets=['']"),
    ("nano-t2i", "teacher.lora_targets=[attn1]"),
    ("nano-t2i", 'teacher.path="a\\0b"'),
    ("nano-t2i", 'prompts="a\\0b"'),
    ("nano-t2i", "prompts=/dev/zero"),
    ("nano-t2i", "recipe=../../elsewhere"),
    ("nano-t2i", "teacher.revision=../../elsewhere"),
]


@pytest.mark.parametrize(("recipe", "setting"), SETTINGS)
def test_a_setting_that_no_run_can_have_is_refused(recipe: str, setting: str, tmp_path: Path) -> None:
    status, wrong = broken(Case({}, [recipe, "--dry-run", "--set", setting]), tmp_path / "here")
    assert (status, wrong) == (2, "")


@pytest.mark.parametrize(
    "changes", [{"wan": 1}, {"teacher": {"kind": ["wan"]}}, {"plan": {"steps": 10**12}}, {"plan": {}}, {1: 2}]
)
def test_odd_keys_and_kinds_are_refused(changes: dict[Any, Any], tmp_path: Path) -> None:
    data = json.loads(RECIPES["nano-t2i"]().model_dump_json()) | changes
    case = Case({"run.json": json.dumps(data).encode()}, ["run.json", "--dry-run", "--method", "phased-sgts"])
    status, wrong = broken(case, tmp_path / "here")
    assert (status, wrong) == (0 if changes == {"plan": {}} else 2, "")


PROMPTS = [
    ("p.jsonl", b"[" * 100_000),
    ("p.jsonl", b'{"prompt": "\\ud800"}'),
    ("p.jsonl", b'{"prompt": "a\\u0000b"}'),
    ("p.csv", b"prompt\n" + b"x" * 200_000),
]


@pytest.mark.parametrize(("name", "content"), PROMPTS)
def test_a_prompt_file_that_holds_no_text_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    status, wrong = broken(Case({name: content}, ["nano-t2i", "--dry-run", "--prompts", name]), tmp_path / "here")
    assert (status, wrong) == (2, "")


def test_a_text_of_many_bytes_a_letter_is_json_like_any_other(tmp_path: Path) -> None:
    """Escaped as pairs, which YAML takes for two letters."""
    data = json.loads(RECIPES["nano-t2i"]().model_dump_json())
    data["teacher"]["negative_prompt"] = "😀"
    case = Case({"run.json": json.dumps(data).encode()}, ["run.json", "--dry-run"])
    assert broken(case, tmp_path / "here") == (0, "")


class Harmful:
    """Stands for a tracker's package, which a dry run looks for; to be found, it does this."""

    def __init__(self, harm: Callable[[], object]) -> None:
        self.harm = harm

    @property
    def __spec__(self) -> object:
        return self.harm() or self


def test_what_must_not_happen_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case({}, ["toy-1d", "--dry-run", "--set", "trackers=[trackio]"])
    for i, (wrong, harm) in enumerate(
        [("exit 1", lambda: 1 / 0), ("lines on stderr", _two_lines), ("something was written", _write)]
    ):
        monkeypatch.setitem(sys.modules, "trackio", Harmful(harm))
        assert wrong in broken(case, tmp_path / str(i))[1]
    monkeypatch.setitem(sys.modules, "trackio", Harmful(lambda: None))
    assert broken(case, tmp_path / "harmless") == (0, "")


def _two_lines() -> None:
    import warnings

    from phased_dmd.errors import UserError

    warnings.warn("one", stacklevel=1)
    raise UserError("two")


def _write() -> None:
    Path("planted").write_text("")
