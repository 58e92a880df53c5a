"""Random mutations of configurations, prompt files and flags for `distill --dry-run`, and what must hold of each."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

import phased_dmd.dry_run  # noqa: F401  what takes seconds to import is in no example's time
from phased_dmd.cli import main
from phased_dmd.models import qwen_image, wan  # noqa: F401
from phased_dmd.recipes import RECIPES

LARGE = [name for name in RECIPES if name.startswith(("wan", "qwen"))]
SMALL = [name for name in RECIPES if name not in LARGE]
SECONDS = 5.0  # of CPU, that one example may take
HANG = 60  # seconds of wall time, on a machine that is busy with others


@dataclass
class Case:
    """Files to write into an empty folder, and the arguments of a command that runs there."""

    files: dict[str, bytes]
    arguments: list[str]
    notes: list[str] = field(default_factory=list)


class Hang(BaseException):
    """Of no kind that a program would catch."""


# ---------------------------------------------------------------- values

NUMBERS = st.sampled_from(
    [
        0, -1, 1, 2, 3, 7, 0.5, 1e-320, 1e-9, 1e308, -1e308, float("inf"), float("-inf"), float("nan"), 10**9, 10**18,
        2**63, 2**64, -(2**63), 10**400, -(10**400), 1.0000000000000002, 0.9999999999999999, 1e3, 1000, 1001, 65536,
    ]
)  # fmt: skip
COUNTS = st.one_of(st.integers(1, 8), st.integers(1, 8), NUMBERS)
STRINGS = st.one_of(
    st.sampled_from(
        [
            "", " ", ".", "..", "/", "../../etc/passwd", "/etc/passwd", "/dev/zero", "/proc/self/mem", "~", "nano",
            "nano-moe", "nano-i2v", "wan", "analytic", "own", "qwen-image", "Qwen/Qwen-Image", "no/such-model", "a/b/c",
            "a\0b", "a\nb", "\r\n", "\t", "\ufeff", "\u202e", "é日本😀", "null", "true", "1e-4", "0x10", "1_000", "-0",
            "2024-01-01", "x" * 300, "x" * 5000, "{{ 7 * 7 }}", "${HOME}", "$(id)", "!!python/object:os.system", "*a",
            "first-frames.jsonl", "prompts.txt", "toy-1d", "int8", "to_q", "blocks", "norm_out", "proj_out", "\\",
        ]
    ),
    st.text(max_size=12),
)  # fmt: skip
SCALARS = st.one_of(NUMBERS, STRINGS, st.none(), st.booleans())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(STRINGS, st.integers(), st.none()), inner, max_size=3)
    ),
    max_leaves=6,
)
RAW = st.sampled_from(  # YAML that is not a plain value
    [
        "!!python/object/apply:os.system ['touch planted']", "!!python/object/new:os.system ['touch planted']",
        "!!python/name:os.system", "!!python/tuple [1, 2]", "!!binary aGVsbG8=", "!!binary '%%'", "!!set {a, b}",
        "!!timestamp x", "!!bool x", "!!int ''", "!!int x", "!!float x", "!!omap [a: 1]", "!!pairs [a: 1]", "!!null x",
        "2024-99-99", "2024-01-01 10:00:00", "1:60:60", "0b", "0o8", "0x", "0x" + "f" * 5000, "9" * 5000, ".inf",
        "-.inf", ".nan", "*unknown", "&a [*a]", "&a {b: *a}", "<<: *x", "{<<: 1}", "? [a]\n: b", "{[1, 2]: 3}",
        "[" * 3000, "{" * 3000, "[[[[", "'", '"', "%", "@", "`", "|\n  x", "- 1\n- 2", "--- a\n--- b", "\t- x", "\x00",
        "\x07", "~", "no", "on", "=", "<<",
    ]
)  # fmt: skip


# ---------------------------------------------------------------- mutations of a configuration


def _paths(data: Any, at: tuple = ()) -> list[tuple]:
    """Of every value in nested mappings and lists."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path for key, value in items for path in ((*at, key), *_paths(value, (*at, key)))]


KINDS = ["near"] * 4 + ["value"] * 3 + ["rename", "delete", "add", "nest", "list", "swap"]


def _mutate(draw: Callable[[Any], Any], data: dict[str, Any]) -> str:
    """One change of the data in place; returns what it was."""
    path = draw(st.sampled_from(_paths(data) or [()]))
    if not path:
        return "nothing left"
    parent: Any = data
    for key in path[:-1]:
        parent = parent[key]
    key, kind = path[-1], draw(st.sampled_from(KINDS))
    match kind:
        case "near" if isinstance(parent[key], int | float):
            parent[key] = draw(st.one_of(COUNTS, st.floats(0, 4))) if parent[key] else draw(st.booleans())
        case "value" | "near":
            parent[key] = draw(VALUES)
        case "delete":
            del parent[key]
        case "nest":
            parent[key] = {str(key): parent[key]}
        case "list":
            parent[key] = [parent[key]] * draw(st.integers(0, 3))
        case "swap":
            other = draw(st.sampled_from(_paths(data)))
            value: Any = data
            for part in other:
                value = value[part]
            parent[key] = json.loads(json.dumps(value, default=str))
        case _ if isinstance(parent, dict):
            name = draw(st.one_of(STRINGS, st.just(f"{key}s"), st.integers(), st.none(), st.just("api_key")))
            parent[name] = parent.pop(key) if kind == "rename" else draw(VALUES)
    return f"{kind} {path}"


def _text(draw: Callable[[Any], Any], data: dict[str, Any]) -> tuple[str, bytes]:
    """A file's name and content; now and then not what a writer of YAML or JSON would write."""
    suffix = draw(st.sampled_from([".yaml", ".yml", ".json"]))
    try:
        if suffix == ".json":
            text = json.dumps(data, ensure_ascii=draw(st.booleans()))
        else:
            text = yaml.safe_dump(data, allow_unicode=draw(st.booleans()))
    except (TypeError, ValueError, yaml.YAMLError):
        text = repr(data)
    kind = draw(st.sampled_from(["as it is"] * 6 + ["value", "line", "cut", "twice", "bytes", "empty"]))
    lines = text.splitlines() or [""]
    place = draw(st.integers(0, len(lines) - 1))
    match kind:
        case "value":
            lines[place] = f"{lines[place].partition(':')[0]}: {draw(RAW)}"
        case "line":
            lines.insert(place, draw(st.one_of(RAW, STRINGS)))
        case "cut":
            lines = "\n".join(lines)[: draw(st.integers(0, 400))].splitlines()
        case "twice":
            lines.insert(place, lines[place])
        case "empty":
            lines = []
    raw = "\n".join(lines).encode("utf-8", "surrogatepass")
    if kind == "bytes":
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(max_size=6)) + raw[at:]
    return f"run{suffix}", raw


# ---------------------------------------------------------------- prompt files and flags

PROMPTS = st.sampled_from(
    [
        b"", b"\n\n", b"# only\n", b"a seven\n", b"\xff\xfea\x00", b"\x80\x81", b"\xef\xbb\xbfa seven\n", b"a\x00b\n",
        b"x" * 100_000, b"seven " * 50_000, b'{"prompt": 1}\n', b'{"prompt": null}\n', b'{"prompt": ["a"]}\n', b"[]\n",
        b'"a"\n', b"{}\n", b'{"prompt": "a"\n', b'{"prompt": "\\ud800"}\n', b'{"prompt": "a\\u0000b"}\n',
        b'{"prompt": "a", "image": "../../etc/passwd"}\n', b'{"prompt": "a", "image": 3}\n', b"[" * 100_000 + b"\n",
        b'{"prompt": "a", "image": "a\\u0000b"}\n', b'{"prompt": "a", "image": "picture.png"}\n', b"9" * 5000 + b"\n",
        b'{"prompt": "a", "image": "/dev/zero"}\n', b'{"prompt": "a", "image": "."}\n', b"prompt\na seven\n",
        b"a,b\n1,2\n",
        b"prompt,prompt\na,b\n", b'prompt\n"a\n', b"prompt\n" + b"x" * 200_000 + b"\n", b"prompt,image\na,b,c,d\n",
        b"prompt,image\na\n", b"\x00\x00\n", b"PAR1", b"PAR1" + b"\x00" * 60 + b"PAR1", b"\xf0\x9f\x98\x80\n",
    ]
)  # fmt: skip
PICTURES = st.sampled_from(
    [b"", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n" + b"\x00" * 80, b"BM" + b"\x00" * 60, b"GIF89a"]
)
FLAGS = {
    "--iterations": COUNTS, "--steps": COUNTS, "--phases": COUNTS, "--seed": COUNTS, "--log-every": COUNTS,
    "--checkpoint-every": COUNTS, "--prompts": STRINGS, "--init-experts": STRINGS, "--output": STRINGS,
    "--cache": STRINGS, "--method": st.sampled_from(["dmd", "dmd-sgts", "phased", "phased-sgts", "DMD", ""]),
}  # fmt: skip


def _flags(draw: Callable[[Any], Any], data: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        kind = draw(st.sampled_from(["flag"] * 4 + ["set"] * 4 + ["switch", "junk"]))
        if kind == "flag":
            name = draw(st.sampled_from(sorted(FLAGS)))
            found += [name, str(draw(FLAGS[name]))]
        elif kind == "set":
            key = ".".join(map(str, draw(st.sampled_from(_paths(data) or [("seed",)]))))
            key = draw(st.sampled_from([key, key, key, f"{key}.x", f"{key}x", "", ".", "plan", "teacher.api_key"]))
            value = draw(
                st.one_of(
                    RAW, STRINGS, NUMBERS.map(str), VALUES.map(lambda v: json.dumps(v, default=str, skipkeys=True))
                )
            )
            found += ["--set", draw(st.sampled_from([f"{key}={value}", f"{key}={value}", key, f"={value}"]))]
        elif kind == "switch":
            found.append(draw(st.sampled_from(["--strict", "--strict", "--no-such", "-x", "--", "-h", "--seed"])))
        else:
            found.append(draw(STRINGS))
    # what no shell can hand over
    return [text.replace("\0", "").encode("utf-8", "replace").decode() for text in found]


@st.composite
def cases(draw: Callable[[Any], Any]) -> Case:
    """A recipe's configuration with up to three changes, as a file, with a prompt file and flags."""
    name = draw(st.sampled_from(4 * SMALL + LARGE))
    data = json.loads(RECIPES[name]().model_dump_json())
    files: dict[str, bytes] = {"picture.png": draw(PICTURES)}
    arguments, notes = [], [name]
    if draw(st.sampled_from([False, False, False, True])):
        prompts = f"prompts{draw(st.sampled_from(['.txt', '.jsonl', '.csv', '.parquet', '', '.TXT', '.doc']))}"
        files[prompts] = draw(PROMPTS)
        arguments += ["--prompts", prompts]
    notes += [_mutate(draw, data) for _ in range(draw(st.integers(0, 3)))]
    arguments += _flags(draw, data)
    if draw(st.sampled_from([True] * 14 + [False])):
        first, files[first] = _text(draw, data)
    else:
        first = draw(st.one_of(st.just(name), STRINGS)).replace("\0", "").encode("utf-8", "replace").decode()
    return Case(files, [first, "--dry-run", *arguments], notes)


# ---------------------------------------------------------------- what must hold


def broken(case: Case, folder: Path, subprocesses: bool = False) -> tuple[int, str]:
    """Runs a case in an empty folder; the exit status, and what is wrong with it, which is "" if all is well."""
    folder.mkdir()
    for name, content in case.files.items():
        (folder / name).write_bytes(content)
    before = sorted(folder.rglob("*"))
    status, shown, seconds = (_outside if subprocesses else _inside)(["distill", *case.arguments], folder)
    lines = shown.splitlines()
    wrong = ""
    if status not in (0, 2):
        wrong = f"exit {status}"
    elif status == 2 and (len(lines) != 1 or not lines[0].startswith("phased-dmd: ") or shown[-1:] != "\n"):
        wrong = f"{len(lines)} lines on stderr"
    elif "Traceback" in shown:
        wrong = "a traceback"
    elif sorted(folder.rglob("*")) != before:
        wrong = "something was written"
    elif seconds > SECONDS:
        wrong = f"{seconds:.1f} seconds of CPU"
    return status, wrong and f"{wrong}\n{case}\n{shown[-3000:]}"


def _inside(arguments: list[str], folder: Path) -> tuple[int, str, float]:
    """In this process: status, stderr, CPU seconds."""
    shown, before = io.StringIO(), sys.argv

    def hang(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(HANG)
    sys.argv, started, status = ["phased-dmd", *arguments], time.process_time(), 0
    try:
        with chdir(folder), redirect_stderr(shown), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda *told, **_: shown.write(warnings.formatwarning(*told[:4]))
            main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException as error:
        import traceback

        status, _ = 1, shown.write("".join(traceback.format_exception(error)))
        if isinstance(error, KeyboardInterrupt):
            raise
    finally:
        signal.alarm(0)
        sys.argv = before
    return status, shown.getvalue(), time.process_time() - started


def _outside(arguments: list[str], folder: Path) -> tuple[int, str, float]:
    """In a process of its own; its start is not counted."""
    command = [sys.executable, "-m", "phased_dmd", *arguments]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, timeout=10 * HANG, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    return done.returncode, done.stderr.decode(errors="replace"), 0.0
