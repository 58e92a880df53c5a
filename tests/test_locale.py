"""Files are UTF-8 and end their lines with a line feed, and a run is the same, whatever the locale says."""

import ast
import codecs
import io
import json
import locale
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import TinyCodec, TinyWan, killed_after

from phased_dmd.checkpoint import RunFolder
from phased_dmd.cli import main
from phased_dmd.config import Config, Fake, Generator, Lora, Plan
from phased_dmd.config.teacher import OwnTeacher
from phased_dmd.recipes import resolve
from phased_dmd.sampling.writing import file_stem
from phased_dmd.train import distill

ROOT = Path(__file__).parents[1]
TEXT_MODES = {"".join(mode) for kind in "rwxa" for mode in (kind, f"{kind}t", f"{kind}+", f"{kind}t+", f"{kind}+t")}


def named(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def in_the_locales_encoding(source: str) -> Iterator[int]:
    """Lines that open a text file, or a process's text, without saying how it is encoded."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or any(keyword.arg == "encoding" for keyword in call.keywords):
            continue
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        modes = [*call.args, *([keywords["mode"]] if "mode" in keywords else [])]
        texts = [mode for mode in modes if isinstance(mode, ast.Constant) and mode.value in TEXT_MODES]
        method = isinstance(call.func, ast.Attribute)
        match named(call):
            case "read_text":
                found = not call.args
            case "write_text":
                found = len(call.args) < 2
            case "open" | "fdopen" | "NamedTemporaryFile" | "TemporaryFile" | "SpooledTemporaryFile":
                default = not modes if method else len(call.args) < 2 and "mode" not in keywords
                found = bool(texts) or (default and named(call) == "open")
            case "run" | "Popen" | "check_output" | "check_call" | "call" | "getoutput":
                found = bool({"text", "universal_newlines"} & keywords.keys())
            case _:
                found = False
        if found:
            yield call.lineno


BAD = """
path.read_text()
path.write_text("a")
path.open()
path.open("a")
path.open(mode="w")
open(path)
open(path, "r+")
gzip.open(path, "rt")
os.fdopen(3, "w")
subprocess.run(["ls"], text=True)
"""
GOOD = """
path.read_text("utf-8")
path.write_text("a", "utf-8")
path.open("rb")
open(path, "xb")
open(path, "a", encoding="utf-8")
gzip.open(path, "rt", encoding="utf-8")
Image.open(path)
os.open(path, os.O_RDONLY)
subprocess.run(["ls"])
"""


@pytest.mark.parametrize("folder", ["src", "scripts", "benchmarks", "examples"])
def test_no_text_file_is_opened_in_the_locales_encoding(folder: str) -> None:
    assert len(list(in_the_locales_encoding(BAD))) == BAD.count("\n") - 1 and not list(in_the_locales_encoding(GOOD))
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    found = [f"{file}:{line}" for file in files for line in in_the_locales_encoding(file.read_text("utf-8"))]
    assert not found


# ---------------------------------------------------------------- a run

NEGATIVE = "\u8272\u8c03\u8273\u4e3d, \u00e9t\u00e9"
LOCALES = {
    "C": "ascii",
    "en_US.ISO-8859-1": "iso8859-1",
    "zh_CN.GBK": "gbk",
}  # and Python's name; GB18030 takes 10 s to make


@pytest.fixture
def speak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets the locale that Python opens files in; one that cannot be made here is passed over."""
    if sys.flags.utf8_mode:
        pytest.skip("Python is told to use UTF-8 whatever the locale")
    before = locale.setlocale(locale.LC_CTYPE)
    monkeypatch.setenv("LOCPATH", str(tmp_path / "locales"))
    (tmp_path / "locales").mkdir()

    def speak(name: str) -> None:
        language, _, charset = name.partition(".")
        if charset:
            command = ["localedef", "-i", language, "-f", charset, str(tmp_path / "locales" / name)]
            try:
                subprocess.run(command, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                return
        locale.setlocale(locale.LC_CTYPE, name)
        with open(os.devnull) as file:
            assert codecs.lookup(file.encoding).name == LOCALES[name]

    yield speak
    locale.setlocale(locale.LC_CTYPE, before)


def test_a_run_begun_in_one_locale_goes_on_in_another_and_ends_byte_for_byte_the_same(
    speak: Any, tmp_path: Path
) -> None:
    """Killed after its first and its second iteration. The codec tells texts apart by their length."""
    prompt = json.dumps({"prompt": "\u72d0\u72f8 \u00e9\u2028"}, ensure_ascii=False)
    (tmp_path / "p.jsonl").write_text(f"{prompt}\n", "utf-8")
    config = Config(
        recipe="tiny", teacher=OwnTeacher(negative_prompt=NEGATIVE), prompts=str(tmp_path / "p.jsonl"),
        plan=Plan(steps=2, phases=1), iterations=3, checkpoint_every=1, log_every=1, batch_size=2,
        generator=Generator(lora=Lora(rank=2), lr=1e-2), fake=Fake(updates=1),
    )  # fmt: skip

    def run(name: str) -> Path:
        return distill(config, tmp_path / name, quiet=True, own=(TinyWan(guidance=2.0), TinyCodec()))

    whole, (first, second, third) = run("whole"), LOCALES
    for iteration, name in enumerate((first, second), 1):
        speak(name)
        with killed_after(1, iteration):
            run("moved")
        assert RunFolder(tmp_path / "moved").config() == config
    speak(third)
    moved = run("moved")
    for file in ("config.json", "prompts.jsonl", "metrics.jsonl", "experts/phase-1.safetensors"):
        assert (moved / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gb18030", "utf-8"])
def test_what_stdout_cannot_show_is_escaped_and_a_configuration_is_read_again(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    negative = f"teacher.negative_prompt={json.dumps(NEGATIVE)}"
    monkeypatch.setattr(sys, "argv", ["phased-dmd", "distill", "nano-t2i", "--dry-run", "--set", negative])
    main()
    (tmp_path / "run.json").write_bytes(written.getvalue())
    assert resolve(str(tmp_path / "run.json"), {}) == resolve("nano-t2i", {"teacher.negative_prompt": NEGATIVE})
    print("\U0001f98a")  # a fox
    assert written.getvalue().endswith("\U0001f98a\n".encode(encoding, "backslashreplace"))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_sample_is_named_by_what_the_locale_can_write(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    stems = {"ascii": "caf-", "latin-1": "café-", "utf-8": "café-色调"}
    assert file_stem("Café 色调") == stems[encoding]
    assert len(file_stem("色" * 100).encode()) <= 180
