"""Refuses a docstring that has no verb, and a field of the configuration that has no description.

A docstring is to be understood with its name hidden: the first sentence of a function's begins with a verb
("Returns ...") or holds one of AUXILIARIES. Those of modules and classes may also be titles.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from phased_dmd.config.fields import groups

SOURCES = Path(__file__).parents[1] / "src" / "phased_dmd"
AUXILIARIES = frozenset(
    ("is", "are", "was", "were", "be", "has", "have", "had", "does", "do", "can", "cannot", "could", "must", "may")
    + ("might", "will", "would", "should")
)
NO_VERBS = frozenset(  # words in s that are nouns, or can be
    ("as", "bytes", "classes", "fields", "frames", "hours", "its", "lengths", "models", "names", "numbers", "pictures")
    + ("pixels", "points", "prompts", "samples", "seconds", "shapes", "steps", "this", "times", "weights", "whats")
)
ARTICLES = frozenset(("the", "a", "an", "eq", "from"))
IMPERATIVES = frozenset(
    ("distil", "write", "say", "show", "print", "train", "measure", "sample", "export", "list", "decide")
)


def first_sentence(docstring: str) -> list[str]:
    """Returns the words of a docstring's first sentence in lower case; what stands in backticks counts as a noun."""
    plain = re.sub(r"`[^`]*`", "it", " ".join(docstring.split()))
    return re.findall(r"[a-z]+", re.split(r"\.(?:\s|$)|;", plain, maxsplit=1)[0].lower())


def is_sentence(docstring: str) -> bool:
    """Says whether the first sentence of a docstring has a verb that a reader cannot take for a noun."""
    words = first_sentence(docstring)
    if not words:
        return False
    noun = words[0] in NO_VERBS and not ARTICLES.intersection(words[1:2])  # "Names the" has a verb, "Names of" has none
    opens = words[0] in IMPERATIVES or (words[0].endswith("s") and not noun)
    return opens or not AUXILIARIES.isdisjoint(words)


def fragments(path: Path) -> Iterator[str]:
    """Yields place, name and text of each docstring of a function in a file that is no sentence."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)) and not is_sentence(text):
            yield f"{path}:{node.lineno}: {node.name}: {' '.join(text.split())[:100]}"


if __name__ == "__main__":
    found = [line for path in sorted(SOURCES.rglob("*.py")) for line in fragments(path)]
    found += [f"{field.name}: has no description" for group in groups() for field in group.fields if not field.meaning]
    print("\n".join(found))
    sys.exit(bool(found))
