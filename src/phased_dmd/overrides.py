"""A Config from plain data: files, dotted overrides, a method's name; what is wrong is named in one line."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from phased_dmd.config import Config, Method, Plan
from phased_dmd.errors import UserError
from phased_dmd.teachers import Section, Teacher, WanTeacher, nearest

LARGEST = 2**20  # bytes of a file: a Config is far shorter, and YAML is slow to read
KINDS: dict[Any, type[Section]] = {kind.model_fields["kind"].default: kind for kind in get_args(Teacher)}
S = TypeVar("S", bound=Section)


def with_method(method: Method, data: Mapping[str, Any]) -> dict[str, Any]:
    """data with the plan's phases and gradient that `method` names; what the plan itself gets wrong is a UserError."""
    plan = _validated(Plan, data["plan"], ("plan",)).model_dump()
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
    shares = data["phase_shares"]
    fit = isinstance(shares, Sequence) and len(shares) == plan["phases"]
    return {**data, "plan": plan, "phase_shares": shares if fit else None}


def build(data: Mapping[str, Any]) -> Config:
    """A validated Config; the first thing wrong becomes a UserError that names the field."""
    return _validated(Config, data)


def _validated(section: type[S], data: Any, at: Sequence[str] = ()) -> S:
    """One section of a config; at: where it stands."""
    try:
        return section.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = [str(part) for part in (*at, *first["loc"])]
        if path[:1] == ["teacher"] and len(first["loc"]) > 1:
            del path[1]  # the kind, by which pydantic tells the teachers apart
        where = ".".join(path) + ": " if path else ""
        if first["type"] == "extra_forbidden":
            raise UserError(f"{where}unknown field{nearest(path[-1], _field_names(data, path))}") from None
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}{message}") from None


def apply_overrides(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """data with dotted keys replaced, `{"plan.shift": 3.0}`; an unknown one is a UserError with the nearest name.

    Of a section, a mapping replaces the fields it names, `{"plan": {"shift": 3.0}}`; all of a teacher of another kind.
    """
    result = copy.deepcopy(dict(data))
    for key, value in overrides.items():
        *parents, name = key.split(".")
        node = result
        for depth, parent in enumerate(parents):
            if parent not in node:
                raise UserError(f"{key}: unknown field{nearest(parent, _field_names(data, parents[: depth + 1]))}")
            if not isinstance(node[parent], dict):
                raise UserError(f"{key}: {'.'.join(parents[: depth + 1])} has no fields; set it as a whole")
            node = node[parent]
        if name not in node:
            raise UserError(f"{key}: unknown field{nearest(name, list(node))}")
        old = node[name]
        if isinstance(value, Mapping) and isinstance(old, dict) and value.get("kind") in (None, old.get("kind")):
            result = apply_overrides(result, {f"{key}.{field}": each for field, each in value.items()})
        else:
            node[name] = value
    return result


def read_file(path: Path) -> dict[str, Any]:
    """A YAML or JSON file of a whole Config."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("no regular file")
        if path.stat().st_size > LARGEST:
            raise ValueError(f"longer than {LARGEST} bytes")
        text = path.read_text("utf-8-sig")
        data = json.loads(text) if path.suffix == ".json" else read_yaml(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as YAML or JSON: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds no mapping of fields")
    return data


def read_yaml(text: str) -> Any:
    """What YAML says in plain numbers, texts, lists and mappings; a ValueError if it cannot be read."""
    try:
        return yaml.safe_load(text)
    except Exception as error:  # beside its own: !!bool x is a KeyError, !!int "" an IndexError, depth a RecursionError
        raise ValueError(str(error) or type(error).__name__) from error


def _field_names(data: Any, path: Sequence[str]) -> list[str]:
    """The fields there are where the last name of a path stands."""
    model: Any = Config
    for part in path[:-1]:
        if part == "teacher":
            teacher = data.get("teacher")
            kind = teacher.get("kind") if isinstance(teacher, Mapping) else None
            model = KINDS.get(kind if isinstance(kind, str) else None, WanTeacher)
        elif part in model.model_fields:
            annotation = model.model_fields[part].annotation
            inner = (annotation, *get_args(annotation))
            model = next((each for each in inner if isinstance(each, type) and issubclass(each, Section)), model)
    return list(model.model_fields)
