"""Prompt files in every format, what is wrong with them in one line, and the sets that the package ships."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from phased_dmd import prompts
from phased_dmd.errors import UserError
from phased_dmd.prompts import SHIPPED, Prompt, read_prompts

TEXTS = ["a red fox, asleep", 'a sign that says "OPEN"', "été, 冬", "a red fox, asleep"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as jsonl or csv, by the standard library's own writers, or their prompts as txt."""
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        case ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case _:
            path.write_text("".join(f"{row['prompt']}\n" for row in rows), "utf-8")
    return path


def refused(path: Path | str) -> str:
    with pytest.raises(UserError) as error:
        read_prompts(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "P.JSONL", "P.CSV", "P.TXT", "p"])
def test_every_format_gives_the_prompts_that_were_written(name: str, tmp_path: Path) -> None:
    rows = [{"prompt": text} for text in TEXTS]
    path = write(tmp_path / name.lower(), rows).rename(tmp_path / name)
    assert read_prompts(str(path)) == [Prompt(text) for text in TEXTS]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_windows_line_ends_and_a_byte_order_mark_are_no_text(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"p{suffix}", [{"prompt": text} for text in TEXTS])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert read_prompts(str(path)) == [Prompt(text) for text in TEXTS]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_other_columns_are_left_out_and_blank_lines_too(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"p{suffix}", [{"id": 7, "prompt": "a fox", "seed": 3}, {"id": 8, "prompt": "", "seed": 4}])
    path.write_text(path.read_text() + "\n\n")
    assert read_prompts(str(path)) == [Prompt("a fox"), Prompt("")]


@pytest.mark.parametrize(
    "text", ["first line\nsecond line", "carriage\r\nreturn", "\N{LINE SEPARATOR}\x0b\x0c\x1c\x85", " kept "]
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_prompt_of_several_lines_survives(suffix: str, text: str, tmp_path: Path) -> None:
    """Those characters end a line for str.splitlines, and stand unescaped in JSON."""
    path = write(tmp_path / f"p{suffix}", [{"prompt": text}, {"prompt": "another"}])
    assert read_prompts(str(path)) == [Prompt(text), Prompt("another")]


def test_what_a_run_keeps_of_its_prompts_can_be_read_again(tmp_path: Path) -> None:
    given = [Prompt('a "b"\\\n\N{LINE SEPARATOR}é'), Prompt("a fox", tmp_path / "fox.png"), Prompt("")]
    lines = [prompt.line() for prompt in given]
    assert all("\n" not in line for line in lines)
    (tmp_path / "prompts.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    assert read_prompts(str(tmp_path / "prompts.jsonl")) == given


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_picture_stands_relative_to_its_file(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    rows = [
        {"prompt": "a", "image": "frames/a.png"},
        {"prompt": "b", "image": "/else/b.png"},
        {"prompt": "c", "image": ""},
    ]
    write(tmp_path / "data" / f"p{suffix}", rows)
    monkeypatch.chdir(tmp_path)
    assert read_prompts(f"data/p{suffix}") == [
        Prompt("a", Path("data/frames/a.png")), Prompt("b", Path("/else/b.png")), Prompt("c"),
    ]  # fmt: skip


def test_parquet_asks_for_pyarrow_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "find_spec", lambda name: None)
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    assert refused(tmp_path / "p.parquet") == f"prompts: {tmp_path}/p.parquet needs pyarrow; pip install pyarrow"


def test_parquet_gives_the_prompts_that_were_written(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"prompt": TEXTS, "image": ["a.png", None, "", "b.png"]})
    parquet.write_table(table, tmp_path / "p.parquet")
    pictures = [tmp_path / "a.png", None, None, tmp_path / "b.png"]
    assert read_prompts(str(tmp_path / "p.parquet")) == [Prompt(*row) for row in zip(TEXTS, pictures, strict=True)]


# ---------------------------------------------------------------- what is wrong, in one line

WRONG = [  # name, content, the message after the file's name
    ("p.jsonl", '{"promt": "a fox"}', ", line 1 has no column prompt; did you mean promt?"),
    ("p.csv", "id,Prompts\n1,a fox", ", line 2 has no column prompt; did you mean Prompts?"),
    ("p.csv", "id,text\n1,a fox", ", line 2 has no column prompt; one of id, text"),
    ("p.csv", "id,text\n1,a fox,surplus", ", line 2 has no column prompt; one of id, text"),
    ("p.jsonl", "{}", ", line 1 has no column prompt"),
    ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"', ", line 3 is not JSON (Expecting ',' delimiter: line 1 column 15"),
    ("p.jsonl", "a fox", ", line 1 is not JSON (Expecting value: line 1 column 1"),
    ("p.jsonl", '"a fox"', ", line 1 is not an object with a prompt"),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": 7}', ", line 2: prompt is not text"),
    ("p.jsonl", '{"prompt": null}', ", line 1: prompt is not text"),
    ("p.jsonl", '{"prompt": "a", "image": ["a.png"]}', ", line 1: image is not text"),
    ("p.csv", "image,prompt\na.png", ", line 2: prompt is not text"),
    ("p.txt", "\n# only this\n\n", " holds no prompt"),
    ("p.jsonl", "\n", " holds no prompt"),
    ("p.csv", "prompt\n", " holds no prompt"),
    ("p.csv", "", " holds no prompt"),
    ("p.json", '[{"prompt": "a fox"}]', " is no txt, jsonl, csv, parquet file"),
    ("p.tsv", "prompt\na fox", " is no txt, jsonl, csv, parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_what_is_wrong_with_a_file_is_one_line(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert refused(tmp_path / name).startswith(f"prompts: {tmp_path / name}{message}")


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
@pytest.mark.parametrize("content", [b"\xff\xfeprompt", None, "folder"])
def test_a_file_that_cannot_be_read_is_one_line(name: str, content: bytes | str | None, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content:
        (tmp_path / name).mkdir()
    assert refused(tmp_path / name).startswith(f"prompts: {tmp_path / name} is neither a readable prompt file nor")


def test_a_csv_that_python_cannot_parse_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('prompt\n"' + "a" * (csv.field_size_limit() + 1) + '"\n')
    assert "is neither a readable prompt file" in refused(tmp_path / "p.csv")


def test_an_unknown_set_lists_those_that_are_shipped() -> None:
    message = refused("default-t2x")
    assert message.startswith("prompts: default-t2x is neither a readable prompt file nor a shipped set (")
    listed = message[message.index("(") + 1 : -1].split(", ")
    assert {"default-t2i", "default-t2v", "nano-t2i", "nano-t2v"} <= set(listed)
    assert all(read_prompts(name) for name in listed)


# ---------------------------------------------------------------- the default sets


@pytest.mark.parametrize(("name", "least"), [("default-t2i", 400), ("default-t2v", 300)])
def test_the_default_sets_are_large_and_say_nothing_twice(name: str, least: int) -> None:
    texts = [prompt.text for prompt in read_prompts(name)]
    assert len(texts) >= least
    plain = [" ".join(re.findall(r"\w+", text.lower())) for text in texts]
    assert len(set(plain)) == len(texts)
    counts = sorted(len(text.split()) for text in plain)
    assert counts[0] >= 2 and counts[len(counts) // 2] < 25 and counts[-1] > 50  # short ones and long ones
    openings = [" ".join(text.split()[:3]) for text in plain]
    most = max(openings.count(opening) for opening in openings)
    assert most <= len(texts) // 40, "no pattern is filled in again and again"


def test_the_sets_readme_states_their_sizes_and_licence() -> None:
    readme = (SHIPPED / "README.md").read_text()
    for name in ("default-t2i", "default-t2v"):
        row = re.search(rf"^\| `{name}` \| (\d+) \|.* (\d+) to (\d+) words \|$", readme, re.M)
        assert row, name
        texts = [prompt.text for prompt in read_prompts(name)]
        counts = [len(text.split()) for text in texts]
        assert [int(number) for number in row.groups()] == [len(texts), min(counts), max(counts)]
        assert "CC0-1.0" in (SHIPPED / f"{name}.txt").read_text("utf-8").splitlines()[0]
    assert "CC0 1.0" in readme
