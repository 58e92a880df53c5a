"""Files are UTF-8 and end their lines with a line feed, and a run is the same, whatever the locale says."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

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
