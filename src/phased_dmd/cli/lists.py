"""Defines the commands that list what there is: recipes, fields, and what is in a set of prompts."""

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phased_dmd.cli.messages import count
from phased_dmd.config import Config
from phased_dmd.config.fields import as_markdown, as_text
from phased_dmd.config.overrides import build
from phased_dmd.config.teacher import OwnTeacher, PipelineTeacher
from phased_dmd.errors import UserError
from phased_dmd.prompts import read_prompts
from phased_dmd.recipes import FIRST_FRAMES, RECIPES, read_recipe

if TYPE_CHECKING:
    from phased_dmd.corpus import Corpus

SHOWN, WIDTH = 3, 40  # pairs of duplicates that are shown, and the characters of each


def recipes() -> None:
    """List the recipes: what each distils, and into how many steps."""
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "teacher", "prompts", "makes", "steps, phases", box=None)
    for name, recipe in RECIPES.items():
        table.add_row(name, *_row(recipe()))
    console = Console()
    console.width = console.width if console.is_terminal else 100
    console.print(table)


def _row(config: Config) -> tuple[str, str, str, str]:
    """Returns a recipe's teacher, its prompts, what it makes, and in how many steps and phases."""
    teacher, plan = config.teacher, config.plan
    hops = f"{plan.steps}, {plan.phases}"
    if isinstance(teacher, OwnTeacher):
        return "yours, by --own", "yours", "samples", hops
    if not isinstance(teacher, PipelineTeacher):
        clips = teacher.means == "clips"
        return f"a mixture of {'clips' if clips else 'Gaussians'}", "", "clips" if clips else "points", hops
    made = "clips" if teacher.sizes[0].num_frames > 1 else "pictures"
    told = "yours, with pictures" if config.prompts == FIRST_FRAMES else str(config.prompts)
    return teacher.path, told, made, hops


def config(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe, or a YAML or JSON file, whose values to show.", show_default=False)
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/configuration.md.")] = False,
) -> None:
    """List every field of the configuration, with its meaning.

    Each has its dotted name, type, value and default; without a recipe the defaults are shown.
    """
    if markdown and recipe is not None:
        raise UserError("--markdown: the page is of the defaults; leave out the recipe")
    print(as_markdown() if markdown else as_text(None if recipe is None else read_recipe(recipe)), end="")


def prompts(
    source: Annotated[
        str,
        typer.Argument(help="A shipped set's name, a file, or a data set of the hub, OWNER/NAME.", show_default=False),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe, or file, of the run: its encoder's tokens, and the share it sees.",
                     show_default=False),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the encoder reads (default: the recipe's).",
                                 show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="File to write, txt or jsonl, without what repeats a prompt before it, nearly or not.",
                     show_default=False),
    ] = None,
) -> None:  # fmt: skip
    """Say what a set of prompts is like: repetitions, lengths, scripts, and how much of it a run sees.

    A token count needs the recipe's base on this machine; without it lengths are in words.
    """
    of_run = None if recipe is None else build(read_recipe(recipe))
    if of_run and of_run.teacher.kind == "analytic":
        raise UserError(f"--recipe: {recipe} takes no prompts")
    asked = read_prompts(source)

    from phased_dmd.corpus import examine, share_seen, token_counter, write_prompts

    counter = token_counter(of_run) if of_run else None
    limit, found = max_tokens, examine(asked, counter)
    if limit is None and of_run and isinstance(of_run.teacher, PipelineTeacher):
        limit = of_run.teacher.max_tokens
    for line in _about(found, limit):
        print(line)
    if of_run:
        print(_share(of_run, len(asked), share_seen(of_run, len(asked))))
    if output:
        write_prompts(found.kept, output)
        print(f"{output}: {count(len(found.kept), 'prompt')} written")


def _about(found: "Corpus", limit: int | None) -> list[str]:
    """Returns lines on what was found of a set of prompts."""
    import numpy as np

    total, kept = len(found.prompts), len(found.kept)
    lines = [f"{count(total, 'prompt')}, {kept} of them unlike any before"]
    times = Counter(found.repeated.values()).most_common(SHOWN)
    shown = [f"  {more + 1} times: {_short(found.prompts[i].text)}" for i, more in times]
    lines += _of_kind("repeated, and so drawn more often", len(found.repeated), total, shown)
    for words, pairs in (("alike but for case and marks", found.alike), ("nearly alike", found.near)):
        shown = [_where_apart(found.prompts[i].text, found.prompts[j].text) for i, j in list(pairs.items())[:SHOWN]]
        lines += _of_kind(words, len(pairs), total, shown)
    low, middle, high, most = np.percentile(found.lengths, (5, 50, 95, 100)).round().astype(int).tolist()
    lines.append(f"length in {found.unit}: {middle} in the middle, 90 % from {low} to {high}, at most {most}")
    if limit is not None:
        cut = sum(length > limit for length in found.lengths)
        least = "" if found.unit == "tokens" else "at least "  # a word is a token or several
        lines.append(f"longer than {limit} tokens, and cut off: {least}{cut}, {_percent(cut / total)}")
    shares = ", ".join(f"{script} {number}" for script, number in found.scripts.most_common())
    lines.append(f"script of most letters: {shares}")
    return lines


def _of_kind(words: str, number: int, total: int, shown: list[str]) -> list[str]:
    """Returns lines on the prompts of a kind, if there are any."""
    return [f"{words}: {number}, {_percent(number / total)}", *shown] if number else []


def _share(config: Config, total: int, share: float) -> str:
    """Returns a line on how much of a set a run sees."""
    from phased_dmd.corpus import draws

    number = sum(draws(config))
    return f"a run of {config.recipe} draws {number:,} prompts, and sees {_percent(share)} of {total:,} at least once"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _short(text: str, start: int = 0) -> str:
    """Returns a piece of a text that fits half a line."""
    piece = text[start : start + WIDTH]
    return f"{'...' if start else ''}{piece}{'...' if start + WIDTH < len(text) else ''}"


def _where_apart(text: str, other: str) -> str:
    """Returns a line with the pieces of two texts in which they begin to differ."""
    one, two = (" ".join(each.split()) for each in (text, other))
    start = max(0, len(os.path.commonprefix([one, two])) - WIDTH // 2)
    return f"  {_short(one, start)} | {_short(two, start)}"
