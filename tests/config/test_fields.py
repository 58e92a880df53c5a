"""The list of all fields: what each says, the page of the docs, and the flags of the command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from commands import run

from phased_dmd.config import Config
from phased_dmd.config.fields import as_markdown, as_text, groups
from phased_dmd.config.teacher import Teacher
from phased_dmd.recipes import RECIPES, read_recipe

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
FIELDS = [field for group in groups() for field in group.fields]


def test_the_page_of_the_docs_is_the_commands_list() -> None:
    """`phased-dmd config --markdown > docs/configuration.md` makes it anew."""
    assert PAGE.read_text() == as_markdown()


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_field_has_a_sentence_that_stands_alone(field: Any) -> None:
    """A capital letter, an end, and more than a word or two: no tail of a sentence whose head is the name."""
    meaning = field.meaning
    assert meaning[:1].isupper() and meaning.endswith(".") and len(meaning.split()) >= 3, meaning
    assert meaning.split()[0] not in ("Of", "As", "In", "By", "For", "From")


def test_every_section_says_what_it_is_about() -> None:
    assert all(group.meaning.endswith(".") for group in groups())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipes_list_holds_every_value_it_has(recipe: str) -> None:
    data = read_recipe(recipe)
    said = as_text(data)
    assert f"  {'iterations':<38}  whole number  = {data['iterations']}" in said
    assert f"  {'teacher.kind':<38}  {data['teacher']['kind']}  = {data['teacher']['kind']}" in said
    for kind in get_args(Teacher):
        name = kind.model_fields["kind"].default
        assert (f"teacher, kind {name}: " in said) == (name == data["teacher"]["kind"])
    leaves = {path for path in _leaves(data) if not path.startswith("teacher.sizes.")}
    assert all(f"  {path} " in said for path in leaves)


def _leaves(data: Any, at: str = "") -> list[str]:
    inner = {f"{at}.{key}" if at else key: value for key, value in data.items()}
    return [
        leaf for path, value in inner.items() for leaf in (_leaves(value, path) if isinstance(value, dict) else [path])
    ]


def test_the_list_of_a_recipe_says_where_it_leaves_the_default() -> None:
    said = as_text(read_recipe("nano-t2i"))
    assert f"  {'plan.phases':<38}  whole number  = 4  [2]\n" in said
    assert f"  {'plan.steps':<38}  whole number  = 4\n" in said


def test_the_command_prints_the_list_through_a_pipe_without_torch() -> None:
    code = "import sys; sys.argv = ['phased-dmd', 'config', 'wan22-i2v']\nfrom phased_dmd.cli import main; main()\n"
    code += "print([name for name in ('torch', 'diffusers', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == as_text(read_recipe("wan22-i2v")) + "[]\n"


def test_the_command_refuses_what_it_cannot_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("config", "toy-3d", monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err == "phased-dmd: recipe: unknown recipe 'toy-3d'; did you mean toy-2d?\n"
    assert run("config", "toy-1d", "--markdown", monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.startswith("phased-dmd: --markdown: ")


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (["--plan.shift", "3.0"], "plan.shift=3.0"),
        (["--plan.shift=3.0"], "plan.shift=3.0"),
        (["--batch-size", "8"], "batch_size=8"),
        (["--generator.lora.rank=8", "--engine.activation-checkpointing", "true"],
         "{generator: {lora: {rank: 8}}, engine: {activation_checkpointing: true}}"),
        (["--teacher.sizes", "[{num_frames: 5}]"], "teacher.sizes=[{num_frames: 5}]"),
    ],
)  # fmt: skip
def test_every_field_is_a_flag(
    arguments: list[str], setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    asked = []
    for given in (arguments, _as_settings(setting)):
        assert run("distill", "nano-t2i", "--dry-run", *given, monkeypatch=monkeypatch) == 0
        asked.append(json.loads(capsys.readouterr().out))
    assert asked[0] == asked[1] != json.loads(RECIPES["nano-t2i"]().model_dump_json())


def _as_settings(setting: str) -> list[str]:
    import yaml

    if not setting.startswith("{"):
        return ["--set", setting]
    return [word for key, value in yaml.safe_load(setting).items() for word in ("--set", f"{key}={json.dumps(value)}")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--plan.shfit", "3"], "plan.shfit: unknown field; did you mean shift?"),
        (["--plan.shift"], "--plan.shift: a value is missing"),
        (["--batchsize", "3"], "No such option: --batchsize"),
        (["--batch-size", "many"], 'batch_size: must be a whole number, and this is "many"'),
    ],
)
def test_a_wrong_flag_is_one_line(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("distill", "nano-t2i", "--dry-run", *arguments, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_the_help_of_distill_shows_recipes_and_descriptions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("distill", "--help", monkeypatch=monkeypatch) == 0
    said = "".join(capsys.readouterr().out.split())  # lines are broken within names, too
    for expected in (f"{', '.join(RECIPES)}, or a YAML or JSON file.", Config.model_fields["iterations"].description):
        assert "".join((expected or "?").split()) in said


def test_the_configuration_has_at_most_69_fields() -> None:
    """Leaves with sections expanded, by dotted name: what several kinds of teacher share is one; `kind` says which
    section there is, and is none; what the entries of a list have is none.
    """
    leaves = {field.name for group in groups() if "entry" not in group.title for field in group.fields}
    assert len(leaves - {"teacher.kind"}) <= 69
