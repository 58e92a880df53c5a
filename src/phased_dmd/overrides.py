"""A Config from plain data: files, dotted overrides, a method's name; what is wrong is named in one line."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from phased_dmd.config import (
    Config,
    Method,
    Section,
    Teacher,
    UserError,
    WanTeacher,
    nearest,
)

KINDS: dict[Any, type[Section]] = {kind.model_fields["kind"].default: kind for kind in get_args(Teacher)}


def with_method(method: Method, data: Mapping[str, Any]) -> dict[str, Any]:
    """data with the plan's phases and gradient that `method` names."""
    plan = dict(data["plan"])
    if method in ("dmd", "dmd-sgts"):
        plan["phases"] = 1
    elif method == "phased":
        plan["phases"] = plan["steps"]
    elif not 1 < plan["phases"] < plan["steps"]:
        fewer = [count for count in range(2, plan["steps"]) if plan["steps"] % count == 0]
        if not fewer:
            raise UserError(f"method: {method} needs fewer phases than steps, and {plan['steps']} steps allow none")
        plan["phases"] = fewer[0]
    plan["gradient"] = "all" if method in ("dmd", "phased") else "last"
    return {**data, "plan": plan}


def build(data: Mapping[str, Any]) -> Config:
    """A validated Config; the first thing wrong becomes a UserError that names the field."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"] if part not in KINDS]
        where = ".".join(path) + ": " if path else ""
        if first["type"] == "extra_forbidden":
            known = _field_names(data, path)
            raise UserError(f"{where}unknown field{nearest(path[-1], known)}") from None
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}{message}") from None


def apply_overrides(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """data with dotted keys replaced, `{"plan.shift": 3.0}`; an unknown one is a UserError with the nearest name."""
    result = copy.deepcopy(dict(data))
    for key, value in overrides.items():
        *parents, name = key.split(".")
        node = result
        for depth, parent in enumerate(parents):
            if not isinstance(node.get(parent), dict):
                raise UserError(f"{key}: unknown field{nearest(parent, _field_names(data, parents[: depth + 1]))}")
            node = node[parent]
        if name not in node:
            raise UserError(f"{key}: unknown field{nearest(name, list(node))}")
        node[name] = value
    return result


def read_file(path: Path) -> dict[str, Any]:
    """A YAML or JSON file of a whole Config."""
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as YAML or JSON: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds no mapping of fields")
    return data


def _field_names(data: Mapping[str, Any], path: Sequence[str]) -> list[str]:
    model: Any = Config
    for part in path[:-1]:
        if part == "teacher":
            teacher = data.get("teacher")
            model = KINDS.get(teacher.get("kind") if isinstance(teacher, Mapping) else None, WanTeacher)
        elif part in model.model_fields:
            model = model.model_fields[part].annotation
    return list(model.model_fields)
