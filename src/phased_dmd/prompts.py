"""Prompts, for image-to-video with a first frame each, are read from a file, a hub data set or a shipped set.

A repeated prompt is drawn as often as it stands there.
"""

import codecs
import csv
import io
import json
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from phased_dmd.errors import UserError

SHIPPED = Path(__file__).parent / "assets" / "prompts"
HUB = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::(.+))?")  # a data set's id, and a file in it
KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", bytes: "bytes"}
QUOTES = "a text with a comma or a quote stands in double quotes, and a quote in it is written twice"
TEXTS = ("string", "large_string", "string_view", "null")  # types of parquet
SHOWN = 5  # names in a message
Rows = Iterator[tuple[str, Any]]  # the words that say where a row stands, and the row


class Prompt(NamedTuple):
    text: str
    image: Path | None = None

    def line(self) -> str:
        """Returns the prompt as a line of jsonl."""
        image = {"image": str(self.image)} if self.image else {}
        return json.dumps({"prompt": self.text} | image, ensure_ascii=False)


def read_prompts(source: str) -> list[Prompt]:
    """Returns the prompts of a shipped set, a file, or a file of a data set on the hub, `owner/name[:FILE]`.

    txt (or a file without a suffix): one a line; blank lines and lines that begin with # are left out. jsonl, csv,
    parquet: the column `prompt`, and where there is one `image`, a picture's path, relative to the file; rows without
    a prompt are left out, and counted in a warning.
    """
    shipped = [SHIPPED / f"{source}{suffix}" for suffix in SUFFIXES] if "/" not in source else []
    try:
        path = next((file for file in shipped if file.exists()), Path(source))
        if not path.exists() and (dataset := HUB.fullmatch(source)) and Path(dataset[1]).suffix.lower() not in SUFFIXES:
            path = _from_hub(*dataset.groups())
        if path.exists() and not path.is_file():
            raise ValueError("no regular file")
        reader = READERS.get(path.suffix.lower() or ".txt")
        if reader is None:
            raise UserError(f"prompts: {path} is no {_list(SUFFIXES)} file")
        rows = [(where, _prompt(row, where, path)) for where, row in reader(path)]
    except UserError:
        raise
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(file.stem for file in SHIPPED.iterdir() if file.suffix in SUFFIXES))
        raise UserError(f"prompts: {source} is neither a readable prompt file nor a shipped set ({known})") from error
    prompts = [prompt for _, prompt in rows if prompt.text.strip()]
    if not prompts:
        raise UserError(f"prompts: {source} holds no prompt")
    if empty := [where for where, prompt in rows if not prompt.text.strip()]:
        warnings.warn(f"prompts: rows without a text, left out: {len(empty)}; the first is {empty[0]}", stacklevel=2)
    if nan := [where for where, prompt in rows if prompt.text == "nan"]:
        said = f"prompts: rows that say 'nan', as of a missing text: {len(nan)}; the first is {nan[0]}"
        warnings.warn(said, stacklevel=2)
    return prompts


def _from_hub(repo: str, name: str | None) -> Path:
    """Returns a data set's file, downloaded or from the hub's cache; without a name the only one that holds prompts."""
    from huggingface_hub import hf_hub_download, list_repo_files

    names = []
    try:
        if name is None:
            files = list_repo_files(repo, repo_type="dataset")
            names = [file for file in files if Path(file).suffix.lower() in SUFFIXES]
        if name or len(names) == 1:
            return Path(hf_hub_download(repo, name or names[0], repo_type="dataset"))
    except Exception as error:  # the hub's own, its client's, OSError, ValueError: all mean that it is not there
        reason = textwrap.shorten(str(error) or type(error).__name__, 200)
        raise UserError(
            f"prompts: {repo} is no file, and no data set that can be had from the hub: {reason}"
        ) from error
    if not names:
        raise UserError(f"prompts: the data set {repo} holds no {_list(SUFFIXES)} file")
    raise UserError(f"prompts: the data set {repo} holds several prompt files, {_list(names)}; name one, {repo}:FILE")


def _text_rows(path: Path) -> Rows:
    """Yields the lines of a text file that are neither blank nor begin with #."""
    for where, line in _lines(path):
        if line.strip() and not line.strip().startswith("#"):
            yield where, {"prompt": line.strip()}


def _json_rows(path: Path) -> Rows:
    """Yields the value of each line that is not blank."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := _twice([name for name, _ in pairs]):
            raise ValueError(f"{twice} stands there twice")
        return dict(pairs)

    for where, line in _lines(path):
        if line.strip():
            try:
                yield where, json.loads(line, object_pairs_hook=once)
            except (ValueError, RecursionError) as error:
                raise UserError(f"prompts: {where} is not JSON ({error})") from error


def _csv_rows(path: Path) -> Rows:
    """Yields the rows below the header; raises UserError where a comma or a quote makes other fields of one."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    header: list[str] = []
    try:
        for fields in reader:
            where = f"{path}, line {reader.line_num}"
            if not header:
                header = fields
                _check_columns(header, where)
            elif fields and len(fields) != len(header):
                raise UserError(f"prompts: {where} has {len(fields)} fields, and the header {len(header)}; {QUOTES}")
            elif fields == header:
                raise UserError(f"prompts: {where} is the header again")
            elif fields:
                yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise UserError(f"prompts: {path}, line {reader.line_num} is not csv ({error}); {QUOTES}") from error


def _parquet_rows(path: Path) -> Rows:
    """Yields the columns that are used; of an image that is no text, as in the hub's data sets, its path alone."""
    if not find_spec("pyarrow"):
        raise UserError(f"prompts: {path} needs pyarrow; pip install pyarrow")
    from pyarrow import ArrowException, parquet, types  # type: ignore[import-not-found] optional

    path.open("rb").close()  # an OSError of its own
    columns, inside = ["prompt"], {}
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, str(path))
            if "image" in file.schema_arrow.names:
                image = file.schema_arrow.field("image").type
                if str(image) in TEXTS or types.is_dictionary(image):
                    columns.append("image")
                elif types.is_struct(image) and image.get_field_index("path") >= 0:
                    columns.append("image.path")
                else:
                    inside = {"image": {}}
            rows = file.read(columns=columns).to_pylist()
    except (OSError, ArrowException) as error:
        reason = textwrap.shorten(str(error), 200)
        raise UserError(f"prompts: {path} is no parquet file, or a damaged one ({reason})") from error
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", inside | row


READERS = {".txt": _text_rows, ".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
SUFFIXES = tuple(READERS)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    r"""Yields where each line stands, and the line; only \n, \r\n and \r end one, Unicode's other ends are text."""
    for number, line in enumerate(re.split("\r\n|\r|\n", _text(path)), 1):
        yield f"{path}, line {number}", line


def _text(path: Path) -> str:
    """Returns a file's text without the byte order mark that spreadsheets write; raises UserError if not UTF-8."""
    data = path.read_bytes()
    wide = b"\0" in data or data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        if not wide:
            return data.decode("utf-8-sig")
        line = 1
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
    encoding = "it looks like UTF-16" if wide else "ENCODING is what it was saved in, such as LATIN1 or GBK"
    command = f"iconv -f {'UTF-16' if wide else 'ENCODING'} -t UTF-8 {path.name} > new{path.suffix}"
    raise UserError(f"prompts: {path}, line {line} is not UTF-8 text; convert it by `{command}` ({encoding})")


def _check_columns(names: Sequence[str], where: str) -> None:
    """Raises UserError where the column prompt is missing, or a column that is read stands there twice."""
    if "prompt" not in names:
        commas = "; commas part columns" if len(names) == 1 and re.search("[;\t|]", names[0]) else ""
        raise UserError(f"prompts: {where} has no column prompt{', but ' if names else ''}{_list(names)}{commas}")
    if twice := _twice(names):
        raise UserError(f"prompts: {where} has the column {twice} twice")


def _twice(names: Sequence[str]) -> str | None:
    return next((name for name in ("prompt", "image") if names.count(name) > 1), None)


def _list(names: Sequence[str]) -> str:
    """Joins names for a message; of many the first few."""
    return ", ".join([name.removeprefix(".") for name in names[:SHOWN]] + ["..."] * (len(names) > SHOWN))


def _prompt(row: Any, where: str, path: Path) -> Prompt:
    """Returns a row as a prompt; raises UserError where its prompt or image is not text."""
    if not isinstance(row, dict):
        raise UserError(f"prompts: {where} is not an object with a prompt")
    _check_columns(list(row), where)
    text, image = ("" if row.get(name) is None else row[name] for name in ("prompt", "image"))
    if isinstance(image, dict):  # as the hub's data sets have it: bytes, and a path that need not be there
        named = Path(str(image.get("path") or where.rpartition(", ")[2]))
        image = str(named if (path.parent / named).is_file() else Path(path.name) / named.name)
    for name, value in (("prompt", text), ("image", image)):
        if not isinstance(value, str):
            raise UserError(f"prompts: {where}: {name} is not text but {KINDS.get(type(value), type(value).__name__)}")
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"prompts: {where}: {name} holds characters that no text has")
    return Prompt(text, path.parent / image if image else None)
