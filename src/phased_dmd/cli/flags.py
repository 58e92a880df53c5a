"""Defines the flags that several commands share, and makes every field of the configuration one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from phased_dmd.config import Config, Method
from phased_dmd.config.fields import describe
from phased_dmd.config.overrides import read_yaml
from phased_dmd.errors import UserError
from phased_dmd.prompts import read_prompts
from phased_dmd.recipes import RECIPES, resolve

CHECKPOINT = "@phase-"  # in the name of one, see `checkpoint.Reference`

Recipe = Annotated[
    str,
    typer.Argument(help=f"The recipe to start from: {', '.join(RECIPES)}, or a YAML or JSON file.", show_default=False),
]
ChosenMethod = Annotated[
    Method | None,
    typer.Option(
        "--method",
        help="Sets phases and gradient as the method of this name does; keeps the generator updates in all, given by "
        "--iterations or not.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Sets any field, as in --set generator.lora.rank=16, which --generator.lora.rank 16 does too; "
        "`phased-dmd config` lists all. May be given several times.",
    ),
]
Loras = Annotated[
    list[Path] | None,
    typer.Option(
        "--lora",
        help="LoRA file of others, to sample on the base of a recipe; for two networks given twice, the noisier first.",
        exists=True,
    ),
]
Sigmas = Annotated[
    str | None,
    typer.Option(help="Times of the steps of --lora, as 1,.9375,.8333,.625 (default: the recipe's grid).",
                 show_default=False),
]  # fmt: skip


def check_there(subject: Path) -> Path:
    """Returns a run's folder, if it is there; a checkpoint is looked for where it is read. Anything else is refused."""
    if not subject.exists() and CHECKPOINT not in str(subject):
        raise UserError(f"{subject}: there is no such folder")
    return subject


Run = Annotated[
    Path,
    typer.Argument(
        help="The run's folder, or a checkpoint (RUN@phase-2/300).", show_default=False, callback=check_there
    ),
]


def flag(field: str) -> Any:
    """Returns an option with the description of a field, given by its dotted name, as help."""
    return typer.Option(help=describe(field))


Prompts = Annotated[str | None, flag("prompts")]


class FieldsCommand(TyperCommand):
    """Makes a command take every field of the configuration as a flag: `--plan.shift 3` for `--set plan.shift=3`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        declared = {option for parameter in self.params for option in parameter.opts}
        words, rest = [], iter(args)
        for word in rest:
            option, equals, value = word.partition("=")
            field = option.removeprefix("--").replace("-", "_")
            if option in declared or not option.startswith("--") or not ("." in field or field in Config.model_fields):
                words.append(word)
                continue
            if not equals and (value := next(rest, None)) is None:
                raise UserError(f"{option}: a value is missing")
            words += ["--set", f"{field}={value}"]
        return super().parse_args(ctx, words)


def resolved(
    recipe: str, flags: Mapping[str, Any], settings: Sequence[str] | None, method: Method | None = None
) -> Config:
    """Returns the Config of a command's arguments; prompts that cannot be read are a UserError.

    flags: values by dotted name, None where the flag was not given. settings: those of --set, which win over flags.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    config = resolve(recipe, given | dict(map(assignment, settings or [])), method)
    check_prompts(config.prompts)
    return config


def check_subject(subject: Path, loras: Sequence[Path] | None, sigmas: str | None, own: str | None = None) -> None:
    """Refuses what is not there, where it is no recipe's name, and a grid or a model that nothing takes."""
    if loras and own:
        raise UserError("--own: LoRA files are sampled on the base of a recipe")
    if not (loras or subject.exists() or CHECKPOINT in str(subject)):
        raise UserError(f"{subject}: there is no such folder; with --lora FILE a recipe's name stands here")
    if sigmas and not loras:
        raise UserError("--sigmas: the grid of --lora; a run or an export has its own")


def check_prompts(prompts: str | None) -> None:
    """Refuses prompts that cannot be read, before the imports that take seconds."""
    if prompts is not None:
        read_prompts(prompts)


def assignment(text: str) -> tuple[str, Any]:
    """Returns the field and the value of a `--set FIELD=VALUE`, the value read as YAML."""
    key, separator, value = text.partition("=")
    if not separator:
        raise UserError(f"--set: {text!r} is not of the form field=value")
    try:
        return key, read_yaml(value)
    except ValueError as error:
        raise UserError(f"--set: {text!r} is not read: {error}; quote what is text: --set '{key}=\"...\"'") from None
