"""Prompt files in every format, what is wrong with them in one line, and the sets that the package ships."""

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from phased_dmd.errors import UserError
from phased_dmd.media import read_picture
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
    path = write(
        tmp_path / f"p{suffix}", [{"id": 7, "prompt": "a fox", "seed": 3}, {"id": 8, "prompt": "a cat", "seed": 4}]
    )
    path.write_text(path.read_text() + "\n\n")
    assert read_prompts(str(path)) == [Prompt("a fox"), Prompt("a cat")]


@pytest.mark.parametrize(
    "text", ["first line\nsecond line", "carriage\r\nreturn", "a\N{LINE SEPARATOR}\x0b\x0c\x1c\x85b", " kept "]
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_prompt_of_several_lines_survives(suffix: str, text: str, tmp_path: Path) -> None:
    """Those characters end a line for str.splitlines, and stand unescaped in JSON."""
    path = write(tmp_path / f"p{suffix}", [{"prompt": text}, {"prompt": "another"}])
    assert read_prompts(str(path)) == [Prompt(text), Prompt("another")]


def test_what_a_run_keeps_of_its_prompts_can_be_read_again(tmp_path: Path) -> None:
    given = [Prompt('a "b"\\\n\N{LINE SEPARATOR}é'), Prompt("a fox", tmp_path / "fox.png")]
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
    monkeypatch.setitem(sys.modules, "pyarrow", None)
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
    ("p.jsonl", '{"promt": "a fox"}', ", line 1 has no column prompt, but promt"),
    ("p.csv", "id,Prompts\n1,a fox", ", line 1 has no column prompt, but id, Prompts"),
    ("p.csv", "id,text\n1,a fox", ", line 1 has no column prompt, but id, text"),
    ("p.csv", "a,b,c,d,e,f\n", ", line 1 has no column prompt, but a, b, c, d, e, ..."),
    ("p.csv", "prompt;image\na fox;a.png", ", line 1 has no column prompt, but prompt;image; commas part columns"),
    ("p.jsonl", "{}", ", line 1 has no column prompt"),
    ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"', ", line 3 is not JSON (Expecting ',' delimiter: line 1 column 15"),
    ("p.jsonl", "a fox", ", line 1 is not JSON (Expecting value: line 1 column 1"),
    ("p.jsonl", '"a fox"', ", line 1 is not an object with a prompt"),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": 7}', ", line 2: prompt is not text but a number"),
    ("p.jsonl", '{"prompt": false}', ", line 1: prompt is not text but true or false"),
    ("p.jsonl", '{"prompt": []}', ", line 1: prompt is not text but a list"),
    ("p.jsonl", '{"prompt": {"en": "a"}}', ", line 1: prompt is not text but an object"),
    ("p.jsonl", '{"prompt": "a", "image": ["a.png"]}', ", line 1: image is not text but a list"),
    ("p.jsonl", '{"prompt": null}', " holds no prompt"),
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
@pytest.mark.parametrize("folder", [True, False])
def test_a_file_that_cannot_be_read_is_one_line(name: str, folder: bool, tmp_path: Path) -> None:
    if folder:
        (tmp_path / name).mkdir()
    assert refused(tmp_path / name).startswith(f"prompts: {tmp_path / name} is neither a readable prompt file nor")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("prompt\na fox\na red fox, asleep in the snow, at night\n", "line 3 has 3 fields, and the header 1; "),
        ("prompt,image\na cat, sitting,a.png\n", "line 2 has 3 fields, and the header 2; "),
        ("prompt,image\na cat\n", "line 2 has 1 fields, and the header 2; "),
        ('prompt\n"a fox" asleep\n', "line 2 is not csv ("),
        ('prompt\n"a fox\na cat\n', "line 3 is not csv (unexpected end of data); "),
        ('prompt\n"' + "a" * (csv.field_size_limit() + 1) + '"\n', "line 2 is not csv ("),
        ("prompt,id,prompt\na,1,b\n", "line 1 has the column prompt twice"),
        ("prompt,image,image\na,1,b\n", "line 1 has the column image twice"),
        ("prompt,id\na fox,1\nprompt,id\na cat,2\n", "line 3 is the header again"),
    ],
)
def test_a_csv_whose_commas_or_quotes_would_change_a_prompt_is_refused_with_the_line(
    rows: str, says: str, tmp_path: Path
) -> None:
    """RFC 4180: as many fields a row as in the header, and quotes around a field with a comma or a quote."""
    (tmp_path / "p.csv").write_text(rows)
    message = refused(tmp_path / "p.csv")
    assert message.startswith(f"prompts: {tmp_path}/p.csv, {says}")
    assert ("in double quotes" in message) == ("fields" in says or "not csv" in says)


def test_a_field_of_json_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": 1, "id": 2, "prompt": "a"}\n{"prompt": "a", "prompt": "b"}\n')
    assert "line 2 is not JSON (prompt stands there twice)" in refused(tmp_path / "p.jsonl")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
@pytest.mark.parametrize("encoding", ["latin-1", "gb18030", "utf-16", "utf-16-le"])
def test_a_file_that_is_not_utf8_is_named_with_the_line_and_a_converter(
    encoding: str, suffix: str, tmp_path: Path
) -> None:
    text = "caf\u00e9" if encoding == "latin-1" else "\u8272\u8c03"
    path = write(tmp_path / f"p{suffix}", [{"prompt": "a fox"}, {"prompt": text}])
    path.write_bytes(path.read_bytes().decode().replace("\r\n", "\n").encode(encoding))
    wide = encoding.startswith("utf-16")
    line = 1 if wide else 3 if suffix == ".csv" else 2
    assert refused(path).startswith(
        f"prompts: {path}, line {line} is not UTF-8 text; "
        f"convert it by `iconv -f {'UTF-16' if wide else 'ENCODING'} -t UTF-8 p{suffix} > new{suffix}` ("
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_without_a_prompt_are_left_out_and_counted(suffix: str, tmp_path: Path) -> None:
    """As a text file's blank lines are: an empty cell is a missing text, and no wish for the empty prompt."""
    rows = [{"prompt": text, "id": i} for i, text in enumerate(["a fox", "", "  ", "a cat"])]
    path = tmp_path / f"p{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([*rows, {"prompt": None}]), path)
    else:
        write(path, rows)
    left_out, first = (3, "row 2") if suffix == ".parquet" else (2, f"line {3 if suffix == '.csv' else 2}")
    with pytest.warns(UserWarning, match=f"^prompts: rows without a text, left out: {left_out}; .*, {first}$"):
        assert read_prompts(str(path)) == [Prompt("a fox"), Prompt("a cat")]


def test_the_word_that_pandas_writes_for_a_missing_text_is_a_prompt_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt\na fox\nnan\nnan bread\n")
    with pytest.warns(UserWarning, match=f"^prompts: rows that say 'nan'.*: 1; the first is {tmp_path}/p.csv, line 3$"):
        assert read_prompts(str(tmp_path / "p.csv")) == [Prompt("a fox"), Prompt("nan"), Prompt("nan bread")]


def test_an_unknown_set_lists_those_that_are_shipped() -> None:
    message = refused("default-t2x")
    assert message.startswith("prompts: default-t2x is neither a readable prompt file nor a shipped set (")
    listed = message[message.index("(") + 1 : -1].split(", ")
    assert {"default-t2i", "default-t2v", "nano-t2i", "nano-t2v"} <= set(listed)
    assert all(read_prompts(name) for name in listed)


# ---------------------------------------------------------------- parquet, and data sets of the hub


def test_a_damaged_parquet_is_named_as_one(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and so on")
    assert refused(tmp_path / "p.parquet").startswith(
        f"prompts: {tmp_path}/p.parquet is no parquet file, or a damaged one (Parquet magic bytes not found"
    )


def test_only_the_columns_used_are_read_of_a_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the hub's own kind of image the path alone: neither its bytes nor a column of videos."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    frames = [{"bytes": b"x" * 1000, "path": "a.png"}, None]
    table = {"video": [b"v" * 1000] * 2, "image": frames, "prompt": ["a", "b"], "prompted": ["c", "d"]}
    parquet.write_table(pyarrow.table(table), tmp_path / "p.parquet")
    tables, read = [], parquet.ParquetFile.read

    def noted(file: Any, columns: list[str]) -> Any:
        tables.append(read(file, columns=columns))
        return tables[-1]

    monkeypatch.setattr(parquet.ParquetFile, "read", noted)
    assert [prompt.text for prompt in read_prompts(str(tmp_path / "p.parquet"))] == ["a", "b"]
    (found,) = tables
    assert found.to_pylist() == [{"prompt": "a", "image": {"path": "a.png"}}, {"prompt": "b", "image": None}]


@pytest.mark.parametrize(
    ("column", "inside"),
    [
        ([{"bytes": b"x", "path": "there.png"}, {"bytes": b"x", "path": "in/absent.png"}], [None, "absent.png"]),
        ([{"bytes": b"x", "path": None}, {"bytes": None, "path": "there.png"}], ["row 1", None]),
        ([{"bytes": b"x"}, {"bytes": b"y"}], ["row 1", "row 2"]),
        ([b"x", b"y"], ["row 1", "row 2"]),
        ([["there.png"], ["there.png"]], ["row 1", "row 2"]),
    ],
)
def test_a_picture_inside_a_table_is_no_matter_for_text_and_named_where_a_first_frame_is_read(
    column: list[Any], inside: list[str | None], tmp_path: Path
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    Image.new("RGB", (4, 4)).save(tmp_path / "there.png")
    file = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"image": column, "prompt": ["a", "b"]}), file)
    expected = [tmp_path / "there.png" if name is None else file / name for name in inside]
    assert read_prompts(str(file)) == [Prompt("a", expected[0]), Prompt("b", expected[1])]
    for path in expected:
        if path.parent == tmp_path:
            assert read_picture(path).size == (4, 4)
        else:
            with pytest.raises(UserError, match=f"it is inside {file}; save it as a file of its own"):
                read_picture(path)


def test_an_image_of_bytes_and_path_in_json_is_read_as_in_parquet(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "there.png")
    rows = [{"prompt": "a", "image": {"bytes": None, "path": "there.png"}}, {"prompt": "b", "image": {"bytes": "eA=="}}]
    path = write(tmp_path / "p.jsonl", rows)
    assert read_prompts(str(path)) == [Prompt("a", tmp_path / "there.png"), Prompt("b", path / "line 2")]


class Hub:
    """A data set in place of the hub's."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.files, self.asked = folder, ["README.md", "data/train.csv"], []
        monkeypatch.setattr("huggingface_hub.list_repo_files", self.names)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.download)

    def names(self, repo: str, *, repo_type: str) -> list[str]:
        assert (repo, repo_type) == ("owner/name", "dataset")
        return self.files

    def download(self, repo: str, name: str, *, repo_type: str) -> str:
        assert (repo, repo_type) == ("owner/name", "dataset")
        if name not in self.files:
            raise OSError(f"404 Client Error.\n\nEntry Not Found for {name}")
        self.asked.append(name)
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(f"prompt,image\na fox of {name},a.png\n")
        return str(self.folder / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    (tmp_path / "hub").mkdir()
    return Hub(tmp_path / "hub", monkeypatch)


@pytest.mark.parametrize("source", ["owner/name", "owner/name:data/train.csv"])
def test_a_data_set_of_the_hub_is_its_prompt_file(source: str, hub: Hub) -> None:
    assert read_prompts(source) == [Prompt("a fox of data/train.csv", hub.folder / "data" / "a.png")]
    assert hub.asked == ["data/train.csv"]


def test_a_file_here_goes_before_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("a cat\n")
    assert read_prompts("owner/name") == [Prompt("a cat")]
    for source in ("owner/name.txt", "./owner/other", "/owner/other", "owner/other/name"):  # a path, and never an id
        assert "is neither a readable prompt file nor a shipped set" in refused(source)
    assert hub.asked == []


def test_a_data_set_that_names_no_one_prompt_file_is_one_line(hub: Hub) -> None:
    assert "no data set that can be had from the hub: 404 Client Error. Entry Not" in refused("owner/name:absent.csv")
    hub.files = ["README.md", "train.mp4"]
    assert refused("owner/name") == "prompts: the data set owner/name holds no txt, jsonl, csv, parquet file"
    hub.files = [f"{i}.csv" for i in range(7)]
    assert refused("owner/name") == (
        "prompts: the data set owner/name holds several prompt files, 0.csv, 1.csv, 2.csv, 3.csv, 4.csv, ...; "
        "name one, owner/name:FILE"
    )
    assert read_prompts("owner/name:3.csv")[0].text == "a fox of 3.csv" and hub.asked == ["3.csv"]


def test_a_data_set_without_a_network_is_one_line() -> None:
    """These tests have none: HF_HUB_OFFLINE is set."""
    for source in ("owner/name", "owner/name:data/train.csv"):
        assert refused(source).startswith(
            "prompts: owner/name is no file, and no data set that can be had from the hub"
        )


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
