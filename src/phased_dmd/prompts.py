"""Prompts, with a first frame each for image-to-video, from a file or a shipped set.

A repeated prompt is drawn as often as it stands there.
"""

import csv
import json
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from phased_dmd.config import UserError, nearest

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

    txt: one a line; blank lines and lines that begin with # are left out. jsonl, csv, parquet: the column `prompt`, and
    where there is one `image`, a picture's path, relative to the file.
    """
    shipped = [SHIPPED / f"{source}{suffix}" for suffix in SUFFIXES] if "/" not in source else []
    path = next((file for file in shipped if file.exists()), Path(source))
    try:
        rows = list(_rows(path))
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(file.stem for file in SHIPPED.iterdir() if file.suffix in SUFFIXES))
        raise UserError(f"prompts: {source} is neither a readable prompt file nor a shipped set ({known})") from error
    prompts = [_prompt(row, path) for row in rows]
    if not prompts:
        raise UserError(f"prompts: {source} holds no prompt")
    return prompts


def _rows(path: Path) -> Iterable[Mapping[str, Any]]:
    match path.suffix:
        case ".jsonl":
            return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        case ".csv":
            with path.open(newline="") as file:
                return list(csv.DictReader(file))
        case ".parquet":
            if not find_spec("pyarrow"):
                raise UserError(f"prompts: {path} needs pyarrow; pip install pyarrow")
            from pyarrow import parquet  # type: ignore[import-not-found] optional

            return parquet.read_table(path).to_pylist()
        case _:
            lines = [line.strip() for line in path.read_text().splitlines()]
            return [{"prompt": line} for line in lines if line and not line.startswith("#")]


def _prompt(row: Any, path: Path) -> Prompt:
    if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str):
        columns = list(row) if isinstance(row, Mapping) else []
        raise UserError(f"prompts: {path} has no column prompt{nearest('prompt', columns) if columns else ''}")
    return Prompt(row["prompt"], path.parent / row["image"] if row.get("image") else None)
