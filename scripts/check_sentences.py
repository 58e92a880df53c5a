"""Refuses what cannot be understood with its name hidden: a docstring without a verb, a field without a description.

The first sentence of every docstring in src must hold a verb of VERBS, or begin with one of OPENERS, words that are
nouns as well. A new verb is added to the list that it belongs to.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from phased_dmd.config import fields

SOURCES = Path(__file__).parents[1] / "src" / "phased_dmd"
VERBS = set("""
    is are was were be has have had does do can cannot could must may might will would should holds hold
""".split())
OPENERS: set[str] = set()


def first_sentence(docstring: str) -> list[str]:
    """Returns the words of a docstring's first sentence, in lower case, what stands in backticks left out."""
    plain = re.sub(r"`[^`]*`", "it", " ".join(docstring.split()))
    sentence = re.split(r"(?<=[a-z0-9)\]])\.(?:\s|$)|:\s*$", plain, maxsplit=1)[0]
    return re.findall(r"[a-z']+", sentence.lower())


def has_verb(docstring: str) -> bool:
    """Says whether the first sentence has a verb."""
    words = first_sentence(docstring)
    return bool(words) and (words[0] in OPENERS or any(word in VERBS for word in words))


def docstrings(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yields line, name and docstring of a module and of all in it that have one."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), getattr(node, "name", path.stem), text


if __name__ == "__main__":
    for path in sorted(SOURCES.rglob("*.py")):
        for line, name, text in docstrings(path):
            if not has_verb(text):
                print(f"{path.relative_to(SOURCES)}:{line}: {name}: {' '.join(text.split())[:110]}")
