"""Lists all fields of the configuration with type, default and meaning, for `phased-dmd config` and the docs."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from phased_dmd.config import Config
from phased_dmd.config.overrides import shown
from phased_dmd.config.teacher import AnyPipeline, Section, Size, Teacher

WORDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true | false", "null": "null"}
REQUIRED = "required"
INTRODUCTION = """\
# Configuration

Every field of a run, made by `phased-dmd config --markdown`. Set one by its dotted name, `--plan.shift 3.0` or
`--set plan.shift=3.0`, or in a YAML or JSON file of a whole run, which `phased-dmd distill RECIPE --dry-run > run.json`
writes. `phased-dmd config RECIPE` shows a recipe's values. Values are written as in YAML.
"""


class Field(NamedTuple):
    """A field is one leaf of the configuration. default: as it is printed, or `required`."""

    name: str
    type: str
    default: str
    meaning: str


class Group(NamedTuple):
    """A group holds the fields of one section. kinds: the teachers that it is for, separated by spaces, or None."""

    title: str
    meaning: str
    fields: list[Field]
    kinds: str | None = None


def describe(name: str) -> str:
    """Returns the description of a field outside of the teacher, given by its dotted name."""
    *sections, leaf = name.split(".")
    model: Any = Config
    for section in sections:
        model = model.model_fields[section].annotation
    return model.model_fields[leaf].description or ""


def groups() -> list[Group]:
    """Returns every section in the order of the file, each kind of teacher as one of its own."""
    return [Group("run", _doc(Config), _leaves(Config, "")), *_sections(Config, "")]


def _sections(model: type[Section], prefix: str) -> Iterator[Group]:
    """Yields the sections below a model, depth first; one that differs by its place has that place's defaults."""
    for name, field in model.model_fields.items():
        if name == "teacher":
            for kind in get_args(Teacher):
                value = kind.model_fields["kind"].default
                yield Group(f"teacher, kind {value}", _doc(kind), _leaves(kind, "teacher."), value)
            sized = " ".join(kind.model_fields["kind"].default for kind in get_args(AnyPipeline))
            yield Group("an entry of teacher.sizes", _doc(Size), _leaves(Size, ""), sized)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            inner = f"{prefix}{name}"
            yield Group(inner, _doc(field.annotation), _leaves(field.annotation, f"{inner}.", field.default))
            yield from _sections(field.annotation, f"{inner}.")


def _leaves(model: type[Section], prefix: str, default: Section | None = None) -> list[Field]:
    """Returns the fields of a model that are no sections; default: an instance, where its place gives other values."""
    schema = model.model_json_schema()
    found = []
    for name, field in model.model_fields.items():
        if name == "teacher" or (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            continue
        value = REQUIRED if field.is_required() and default is None else _plain(getattr(default, name, field.default))
        found.append(
            Field(f"{prefix}{name}", _type(schema["properties"][name], schema), value, field.description or "")
        )
    return found


def _doc(model: type[Section]) -> str:
    return " ".join((model.__doc__ or "").split())


def _type(schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """Returns the type of a field in words, from its JSON schema."""
    match schema:
        case {"$ref": reference}:
            names = root["$defs"][reference.rpartition("/")[2]]["properties"]
            return f"{{{', '.join(names)}}}"
        case {"anyOf": parts}:
            return " | ".join(_type(part, root) for part in parts)
        case {"enum": choices}:
            return " | ".join(choices)
        case {"const": value}:
            return value or '""'
        case {"prefixItems": items}:
            return f"[{', '.join(_type(item, root) for item in items)}]"
        case {"items": item}:
            return f"[{_type(item, root)}, ...]"
    return WORDS[schema["type"]]


def _plain(value: Any) -> str:
    """Returns a value as YAML would take it, its beginning if it is long."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = [each.model_dump() if isinstance(each, Section) else each for each in value]
    return value if isinstance(value, str) and value.isprintable() and value.strip() else shown(value)


def as_text(data: Mapping[str, Any] | None = None) -> str:
    """Returns all fields, two lines or more each; data: a whole configuration, whose values are shown too."""
    lines = []
    for group in groups():
        if data is not None and group.kinds and data["teacher"]["kind"] not in group.kinds.split():
            continue
        lines += [f"{group.title}: {group.meaning}", ""]
        for field in group.fields:
            value = None if data is None or "." not in field.name and group.kinds else _value(data, field.name)
            said = f"[{field.default}]" if value is None else f"= {value}"
            said += f"  [{field.default}]" if value not in (None, field.default) else ""
            lines += [f"  {field.name:<38}  {field.type}  {said}"]
            lines += textwrap.wrap(field.meaning, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines += [""]
    return "\n".join(lines)


def _value(data: Mapping[str, Any], name: str) -> str:
    node: Any = data
    for part in name.split("."):
        node = node[part]
    return _plain(node)


def as_markdown() -> str:
    """Returns docs/configuration.md: a table a section."""
    lines = [INTRODUCTION]
    for group in groups():
        lines += [f"## {group.title}", "", group.meaning, "", "| field | type | default | |", "|---|---|---|---|"]
        for field in group.fields:
            cells = (f"`{field.name}`", *(f"`{cell}`" for cell in (field.type, field.default)), field.meaning)
            lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"]
        lines += [""]
    return "\n".join(lines)
