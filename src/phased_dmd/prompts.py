"""Prompts, with a first frame each for image-to-video, from a file or a shipped set.

A repeated prompt is drawn as often as it stands there.
"""

import csv
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from phased_dmd.errors import UserError
from phased_dmd.teachers import nearest

SHIPPED = Path(__file__).parent / "assets" / "prompts"
SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")


class Prompt(NamedTuple):
    text: str
    image: Path | None = None

    def line(self) -> str:
        """As a line of jsonl."""
        image = {"image": str(self.image)} if self.image else {}
        return json.dumps({"prompt": self.text} | image, ensure_ascii=False)


def read_prompts(source: str) -> list[Prompt]:
    """The prompts of a shipped set's name or of a file.

    txt (or a file without a suffix): one a line; blank lines and lines that begin with # are left out. jsonl, csv,
    parquet: the column `prompt`, and where there is one `image`, a picture's path, relative to the file.
    """
    try:
        shipped = [SHIPPED / f"{source}{suffix}" for suffix in SUFFIXES] if "/" not in source else []
        path = next((file for file in shipped if file.exists()), Path(source))
        if path.exists() and not path.is_file():
            raise ValueError("no regular file")
        prompts = [_prompt(row, where, path.parent) for where, row in _rows(path)]
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        known = ", ".join(sorted(file.stem for file in SHIPPED.iterdir() if file.suffix in SUFFIXES))
        raise UserError(f"prompts: {source} is neither a readable prompt file nor a shipped set ({known})") from error
    if not prompts:
        raise UserError(f"prompts: {source} holds no prompt")
    return prompts


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row, and the words that say where it stands. A byte order mark, as spreadsheets write one, is no text."""
    match path.suffix.lower():
        case ".jsonl":
            for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
                if line.strip():
                    yield f"{path}, line {number}", _json(line, f"{path}, line {number}")
        case ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                for row in (reader := csv.DictReader(file)):
                    yield f"{path}, line {reader.line_num}", row
        case ".parquet":
            if not find_spec("pyarrow"):
                raise UserError(f"prompts: {path} needs pyarrow; pip install pyarrow")
            from pyarrow import parquet  # type: ignore[import-not-found] optional

            for number, row in enumerate(parquet.read_table(path).to_pylist(), 1):
                yield f"{path}, row {number}", row
        case ".txt" | "":
            for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
                if line.strip() and not line.strip().startswith("#"):
                    yield f"{path}, line {number}", {"prompt": line.strip()}
        case _:
            raise UserError(f"prompts: {path} is no {', '.join(suffix[1:] for suffix in SUFFIXES)} file")


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"prompts: {where} is not JSON ({error})") from error


def _prompt(row: Any, where: str, folder: Path) -> Prompt:
    if not isinstance(row, dict):
        raise UserError(f"prompts: {where} is not an object with a prompt")
    if "prompt" not in row:
        columns = [name for name in row if isinstance(name, str)]
        raise UserError(f"prompts: {where} has no column prompt{nearest('prompt', columns) if columns else ''}")
    text, image = row["prompt"], row.get("image") or ""
    for name, value in (("prompt", text), ("image", image)):
        if not isinstance(value, str):
            raise UserError(f"prompts: {where}: {name} is not text")
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"prompts: {where}: {name} holds characters that no text has")
    return Prompt(text, folder / image if image else None)
