"""Makes a Config from plain data: files, dotted overrides, a method's name; names what is wrong in one line."""

import copy
import json
import re
import reprlib
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from phased_dmd.config import Anchor, Config, Method, Plan
from phased_dmd.config.teacher import Section, Teacher, WanTeacher
from phased_dmd.errors import UserError, did_you_mean

SHOWN = 80  # characters of a wrong value, in a message
LARGEST = 2**20  # bytes of a file: a Config is far shorter, and YAML is slow to read
KINDS: dict[Any, type[Section]] = {kind.model_fields["kind"].default: kind for kind in get_args(Teacher)}
S = TypeVar("S", bound=Section)
WANTED = {  # by pydantic's name of what is wrong, where its own words name Python's types
    "string_type": "text", "string_unicode": "text that the locale can hold", "tuple_type": "a list",
    "int_type": "a whole number", "int_parsing": "a whole number", "int_parsing_size": "a whole number",
    "int_from_float": "a whole number", "float_type": "a number", "float_parsing": "a number",
    "bool_type": "true or false", "bool_parsing": "true or false", "model_type": "a mapping of fields",
    "model_attributes_type": "a mapping of fields",
}  # fmt: skip
OTHER_BASES = re.compile(r"[-+]?(0[0_]*[1-7][0-7_]+|\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?)")  # of YAML's numbers: 8 and 60


def with_method(method: Method, data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns data with the phases and gradient that the method names; what the plan gets wrong is a UserError."""
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
    anchor = _validated(Anchor, data["anchor"], ("anchor",)).model_dump(mode="json")
    if len(anchor["updates"]) not in (1, plan["phases"]):
        anchor = Anchor().model_dump(mode="json")
    return {**data, "plan": plan, "phase_shares": shares if fit else None, "anchor": anchor}


def build(data: Mapping[str, Any]) -> Config:
    """Returns a validated Config; the first thing wrong becomes a UserError that names the field."""
    return _validated(Config, data)


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """Returns a validated copy of a Config with other values, given by dotted names or nested as `apply_overrides`."""
    return build(apply_overrides(config.model_dump(mode="json"), changes))


def _validated(section: type[S], data: Any, at: Sequence[str] = ()) -> S:
    """Returns a validated section of a config. at: the names of the sections that it stands in."""
    try:
        return section.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = [str(part) for part in (*at, *first["loc"])]
        if path[:1] == ["teacher"] and len(first["loc"]) > 1:
            del path[1]  # the kind, by which pydantic tells the teachers apart
        where = ".".join(part for part in path if "[" not in part)  # as pydantic calls one of a field's several types
        if first["type"] == "extra_forbidden":
            raise UserError(f"{where}: unknown field{did_you_mean(path[-1], _field_names(data, path))}") from None
        raise UserError(_complaint(where, first)) from None


def _complaint(where: str, error: Mapping[str, Any]) -> str:
    """Says what is wrong with a field, what was given, and how to write it, from one of pydantic's errors."""
    given = shown(error["input"])
    match error["type"]:
        case "value_error":
            message = error["msg"].removeprefix("Value error, ")
            return f"{where}: {message}" if where else message
        case "missing":
            return f"{where}: is missing"
        case "union_tag_not_found":
            return f"{where}.kind: is missing; one of {', '.join(KINDS)}"
        case "union_tag_invalid":
            return f"{where}.kind: {error['ctx']['tag']!r} is unknown{did_you_mean(error['ctx']['tag'], list(KINDS))}"
        case "string_type":
            return f"{where}: must be text, and YAML reads this as {given}; quote it: --set '{where}=\"...\"'"
        case "tuple_type" if not isinstance(error["input"], Mapping | None):
            cure = f"; in brackets it is one: --set '{where}=[{given}]'"
        case _:
            cure = ""
    needed = re.sub(r"^\w+ should (.*?)( after validation.*)?$", r"must \1", error["msg"])
    if error["type"] in WANTED:
        needed = f"must be {WANTED[error['type']]}"
    return f"{where}: {needed}, and this is {given}{cure}"


def shown(value: Any) -> str:
    """Returns a value as JSON writes it, or the beginning of one that is long."""
    try:
        holds = isinstance(value, Mapping | Set | list | tuple)
        text = reprlib.repr(value) if holds else json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:  # more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def apply_overrides(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns data with fields replaced by dotted name, `{"plan.shift": 3.0}`; an unknown one is a UserError.

    A mapping replaces the fields of a section that it names, `{"plan": {"shift": 3.0}}`, but a teacher of another kind
    as a whole.
    """
    result = copy.deepcopy(dict(data))
    for key, value in overrides.items():
        *parents, name = key.split(".")
        node = result
        for depth, parent in enumerate(parents):
            if parent not in node:
                raise UserError(f"{key}: unknown field{did_you_mean(parent, _field_names(data, parents[: depth + 1]))}")
            if not isinstance(node[parent], dict):
                raise UserError(f"{key}: {'.'.join(parents[: depth + 1])} has no fields; set it as a whole")
            node = node[parent]
        if name not in node:
            raise UserError(f"{key}: unknown field{did_you_mean(name, list(node))}")
        old = node[name]
        if isinstance(value, Mapping) and isinstance(old, dict) and value.get("kind") in (None, old.get("kind")):
            result = apply_overrides(result, {f"{key}.{field}": each for field, each in value.items()})
        else:
            node[name] = value
    return result


def read_file(path: Path) -> dict[str, Any]:
    """Reads a YAML or JSON file of a whole Config."""
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
    """Reads YAML as plain numbers, texts, lists and mappings; what cannot be read is a ValueError.

    Numbers of another base than they look like, 010 for 8 and 1:30 for 90, are not read.
    """
    try:
        for token in yaml.scan(text, yaml.SafeLoader) if OTHER_BASES.search(text) else ():
            if isinstance(token, yaml.ScalarToken) and token.plain and OTHER_BASES.fullmatch(token.value):
                raise ValueError(f"{token.value} is {yaml.safe_load(token.value)} to YAML; write that")
        return yaml.safe_load(text)
    except Exception as error:  # beside its own: !!bool x is a KeyError, !!int "" an IndexError, depth a RecursionError
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _field_names(data: Any, path: Sequence[str]) -> list[str]:
    """Returns the names of the fields of the section that a path's last name stands in."""
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
