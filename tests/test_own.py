"""A model of one's own from the command line: `--own MODULE:FUNCTION`, in every command, and in none without it."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import run
from tiny import TinyCodec, TinyWan

from phased_dmd.checkpoint import RunFolder
from phased_dmd.cli.own import call_own
from phased_dmd.config.overrides import build
from phased_dmd.errors import UserError
from phased_dmd.recipes import resolve

MINE = """from tiny import TinyCodec, TinyWan


class Large(TinyCodec):
    def decode(self, latents):  # to 32 x 32, which the digits' features are of
        return super().decode(latents).repeat_interleave(8, 2).repeat_interleave(8, 3)


def make():
    return TinyWan(), Large()
"""
SWAPPED = MINE.replace("TinyWan(), Large()", "Large(), TinyWan()")
BRIEF = [
    "--iterations", "1", "--steps", "2", "--phases", "2", "--prompts", "p.txt", "--set", "batch_size=2",
    "--set", "generator.lora={rank: 2, alpha: 2}", "--set", "sample_every=null", "--set", "fake.updates=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with prompts and `mine.py`; what is imported in it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "p.txt").write_text("a seven\na one, moving\n")
    (tmp_path / "mine.py").write_text(MINE)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and Path(str(sys.modules[name].__file__)).is_relative_to(
            tmp_path
        ):
            del sys.modules[name]


def test_a_model_of_ones_own_goes_from_its_check_to_the_evaluation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """dry run, distill, the same command again, sample, evaluate; by the module's name and by the file's."""
    distill = ["distill", "own", "--output", "run", *BRIEF, "--own"]
    assert run(*distill, "mine:make", "--dry-run", monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr()
    assert build(json.loads(shown.out)).teacher.kind == "own" and not Path("run").exists()
    assert "check_model: passed\n" in shown.err and "2 prompts" not in shown.err
    assert run(*distill, "mine.py:make", monkeypatch=monkeypatch) == 0
    assert "`phased-dmd evaluate run --own mine.py:make`" in capsys.readouterr().out
    assert RunFolder(Path("run")).finished(RunFolder(Path("run")).config())
    Path("mine.py").write_text("raise RuntimeError\n")  # a finished run needs no model
    assert run(*distill, "mine.py:make", monkeypatch=monkeypatch) == 0
    assert "run: already distilled" in capsys.readouterr().out
    Path("mine.py").write_text(MINE)
    sample = ["sample", "run", "--prompt", "a seven", "--seeds", "2", "--output", "pictures"]
    assert run(*sample, "--own", "mine.py:make", monkeypatch=monkeypatch) == 0
    assert len(list(Path("pictures").glob("0000-a-seven-seed*.png"))) == 2
    evaluate = ["evaluate", "run", "--prompts", "p.txt", "--seeds", "0-3", "--features", "digits"]
    assert run(*evaluate, "--own", "mine:make", monkeypatch=monkeypatch) == 0
    rows = json.loads(Path("run/evaluation.json").read_text())["sets"]["prompts"]["rows"]
    assert list(rows) == ["base, 40 steps", "base, 2 steps", "phased, 2 steps"]


@pytest.mark.parametrize("command", ["distill", "sample", "evaluate"])
def test_a_file_or_a_run_of_an_own_teacher_runs_no_code_by_itself(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Whatever lies beside it: the function must be named on the command line."""
    Path("mine.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    config = resolve("own", {"prompts": "p.txt"})
    Path("run/experts").mkdir(parents=True)
    Path("run/config.json").write_text(config.model_dump_json())
    for phase in range(1, config.plan.phases + 1):
        RunFolder(Path("run")).expert_path(phase).touch()
    Path("own.json").write_text(config.model_dump_json())
    arguments = {
        "distill": ["own.json", "--output", "new"], "evaluate": ["run"],
        "sample": ["run", "--prompt", "a", "--output", "new"],
    }  # fmt: skip
    assert run(command, *arguments[command], monkeypatch=monkeypatch) == 2
    assert "teacher.kind: own is a model of yours: name it by --own module:function" in capsys.readouterr().err
    assert not Path("ran").exists() and not Path("new").exists()
    with pytest.raises(UserError, match="own: unknown field"):
        build(json.loads(config.model_dump_json()) | {"own": "mine:make"})


def test_a_recipe_with_a_model_takes_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    Path("mine.py").write_text("raise RuntimeError\n")
    assert run("distill", "nano-t2i", "--own", "mine:make", monkeypatch=monkeypatch) == 2
    assert "teacher.kind: wan, which has a model already; one of your own is for" in capsys.readouterr().err
    assert run("sample", "own", "--lora", "p.txt", "--own", "mine:make", "--output", "o", monkeypatch=monkeypatch) == 2
    assert "--own: LoRA files are sampled on the base of a recipe" in capsys.readouterr().err


def test_a_model_that_check_model_refuses_is_said_before_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Here of dropout that is on."""
    Path("mine.py").write_text(
        MINE.replace("return TinyWan(),", "model = TinyWan()\n    model.networks[0].train()\n    return model,")
    )
    arguments = ["distill", "own", "--own", "mine.py:make", "--prompts", "p.txt", "--dry-run"]
    assert run(*arguments, monkeypatch=monkeypatch) == 2
    shown = capsys.readouterr()
    assert "phased-dmd: --own: networks[0]: in train mode" in shown.err and not shown.out


def test_a_package_and_a_file_find_what_stands_beside_them(folder: Path) -> None:
    (folder / "models" / "deep").mkdir(parents=True)
    (folder / "models" / "deep" / "net.py").write_text(MINE)
    (folder / "models" / "helper.py").write_text("from tiny import TinyCodec as Beside\n")
    (folder / "models" / "mine.py").write_text(MINE.replace("\n\n\n", "\nfrom helper import Beside\n\n\n", 1))
    for named in ("models.deep.net:make", "models/mine.py:make", f"{folder}/models/mine.py:make"):
        model, codec = call_own(named)
        assert isinstance(model, TinyWan) and isinstance(codec, TinyCodec)


@pytest.mark.parametrize(
    ("named", "text", "says"),
    [
        ("mine", MINE, "'mine' is not of the form module:function or file.py:function"),
        ("mine:", MINE, "'mine:' is not of the form"),
        ("mine.py:make()", MINE, "'mine.py:make()' is not of the form"),
        ("a b:make", MINE, "'a b:make' is not of the form"),
        ("other:make", MINE, "there is no module other here, or among those installed"),
        ("mine.deeper:make", MINE, "there is no module mine.deeper here"),
        ("other.py:make", MINE, "other.py: there is no such file"),
        ("mine:mkae", MINE, "mine has no function mkae; did you mean make?"),
        ("mine:make", "make = 3\n", "mine has no function make"),
        (
            "mine:make", "import nowhere_at_all\n",
            r"mine:make raised ModuleNotFoundError: No module named 'nowhere_at_all' \(mine.py, line 1\)",
        ),
        ("mine:make", "x = 1\ndef make(:\n", r"mine:make raised SyntaxError: .* \(mine.py, line 2\)"),
        (
            "mine.py:make", "def make():\n    import torch\n    torch.zeros(2) @ torch.zeros(3)\n",
            r"mine.py:make raised RuntimeError: .* \(mine.py, line 3\)",
        ),
        ("mine:make", "def make(size):\n    pass\n", r"mine:make raised TypeError: make\(\) missing 1 required"),
        ("mine:make", "import sys\nsys.exit(3)\n", r"mine:make raised SystemExit: 3 \(mine.py, line 2\)"),
        ("mine:make", "def make():\n    pass\n", r"mine:make returned a NoneType, where \(model, codec\) is needed"),
        ("mine:make", "def make():\n    return 1, 2, 3\n", "mine:make returned a tuple of 3, where"),
        ("mine:make", SWAPPED, "returned a Large as its model, which lacks networks, students"),
        ("mine:make", MINE.replace(", Large()", ", object()"), "a object as its codec, which lacks fingerprint"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_function_is_one_line(
    named: str, text: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    Path("mine.py").write_text(text)
    assert run("distill", "own", "--own", named, "--prompts", "p.txt", "--output", "new", monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not Path("new").exists()
    assert says in error or re.search(says, error), error
