"""Checks a pipeline's folder from outside: nothing in it may name code, or a file outside of the folder."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from phased_dmd.errors import UserError

LIBRARIES = ("diffusers", "transformers")  # whose classes a pipeline may be made of
CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
KERNELS = re.compile(r"_?(attn|experts)_implementation(_internal)?")  # keys that may name a hub repository of code


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; anything else is a UserError."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"teacher.path: {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"teacher.path: {path} holds no JSON object")
    return data


def check_index(index: Mapping[str, Any], folder: Path) -> None:
    """Raises a UserError where `model_index.json` names a class that is none of diffusers or transformers."""
    if not isinstance(index.get("_class_name"), str):
        raise UserError(f"teacher.path: {folder} names a pipeline that is code of its own")
    for name, value in index.items():
        if not isinstance(value, list) or value == [None, None] or all(isinstance(x, int | float) for x in value):
            continue
        if not (len(value) == 2 and value[0] in LIBRARIES and isinstance(value[1], str)):
            raise UserError(f"teacher.path: {folder}: {name} is {value}, no class of {' or '.join(LIBRARIES)}")


def check_part(folder: Path, kind: type) -> None:
    """Raises a UserError where a part's configurations name code, another part, or weights outside of its folder."""
    if (folder / "adapter_config.json").exists():
        raise UserError(f"teacher.path: {folder} holds an adapter, which names a base elsewhere")
    if script := next(folder.glob("*.py"), None):
        raise UserError(f"teacher.path: {script} is code, which is never loaded")
    for path in filter(Path.exists, (folder / name for name in CONFIGS)):
        data = read_json(path)
        for key, value in _entries(data):
            if key == "auto_map" or (KERNELS.fullmatch(key) and isinstance(value, str) and re.search("[/:]", value)):
                raise UserError(f"teacher.path: {path} names code ({key}), which is never loaded")
        named = data.get("_class_name", kind.__name__)
        if issubclass(kind, nn.Module) and named != kind.__name__:
            raise UserError(f"teacher.path: {folder} is a {named}, not a {kind.__name__}")
    for path in folder.glob("*.index.json"):
        for file in (read_json(path).get("weight_map") or {}).values():
            if not (isinstance(file, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", file)):
                raise UserError(f"teacher.path: {path} names {file!r}, no safetensors file beside it")


def _entries(data: Any) -> Iterator[tuple[str, Any]]:
    """Yields all keys with their values, at any depth."""
    if isinstance(data, dict):
        yield from data.items()
    for value in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from _entries(value)
