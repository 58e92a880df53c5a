"""Builds the site from docs/ into build/site, and refuses a link that leads nowhere.

    python scripts/build_site.py

The pages are those of docs/ as they stand. docs/README.md is the index, the order of the pages and, in the form of
llmstxt.org, llms.txt. What a page links to outside of docs/ becomes a page too: Markdown as it is, and code in a block.
In docs/api.md each heading that is a name gets its signature and its docstring. Beside each page lies its Markdown.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS, BUILD = ROOT / "docs", ROOT / "build"
PAGES, SITE, CONFIG = BUILD / "site-pages", BUILD / "site", BUILD / "mkdocs.yml"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
ENTRY = re.compile(r"^- \[(?P<title>[^\]]+)\]\((?P<page>[^)]+)\): (?P<question>.+)$", re.MULTILINE)
NAME = re.compile(r"^### `(phased_dmd[\w.]+)`$", re.MULTILINE)
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", ".yml": "yaml"}
PICTURES = {".png", ".svg", ".webp"}
ELSEWHERE = "repository"  # the folder of the site for what lies outside of docs/


def place(path: Path) -> Path:
    """Returns where a file of the repository stands among the pages; a folder is its README.md."""
    if path.is_dir():
        return place(path / "README.md")
    where = path.relative_to(DOCS) if path.is_relative_to(DOCS) else ELSEWHERE / path.relative_to(ROOT)
    return where if path.suffix in {".md", *PICTURES} else where.with_name(f"{where.name}.md")


def links(page: Path) -> Iterator[Path]:
    """Yields the files that a Markdown page links to, of a folder its README.md; what is not there is an error."""
    for part in FENCE.split(page.read_text("utf-8"))[::2]:
        for found in LINK.finditer(part):
            target = (page.parent / found[1]).resolve()
            if not target.exists() or (target.is_dir() and not (target / "README.md").exists()):
                sys.exit(f"{page.relative_to(ROOT)}: a link to {found[1]}, where there is no page")
            yield target / "README.md" if target.is_dir() else target


def moved(page: Path) -> str:
    """Returns a page whose links lead to where files stand among the pages."""

    def link(found: re.Match[str]) -> str:
        return f"{os.path.relpath(place((page.parent / found[1]).resolve()), place(page).parent)}{found[2] or ''}"

    parts = FENCE.split(page.read_text("utf-8"))
    parts[::2] = [LINK.sub(link, part) for part in parts[::2]]
    return "".join(parts)


def with_docstrings(text: str) -> str:
    """Returns the page of names with an instruction to the docstrings' plugin in the place of each."""
    sys.path.insert(0, str(ROOT / "src"))
    from phased_dmd import _HOMES

    def described(found: re.Match[str]) -> str:
        name = found[1].removeprefix("phased_dmd.")
        home = f"phased_dmd.{_HOMES[name]}.{name}" if name in _HOMES else found[1]
        return f"::: {home}"

    return NAME.sub(described, text)


def as_markdown(path: Path) -> str:
    """Returns a file of code, or the cells of a notebook, as Markdown."""
    text = path.read_text("utf-8")
    if path.suffix != ".ipynb":
        return f"````{LANGUAGES.get(path.suffix, '')}\n{text}````"
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(
        f"```python\n{body}\n```" if kind == "code" else body.replace("# ", "## ", 1) for kind, body in cells
    )


def stage() -> None:
    """Writes all pages, and what they show, for the site's builder."""
    shutil.rmtree(PAGES, ignore_errors=True)
    left, seen = sorted(DOCS.rglob("*.md")), set()
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        target = PAGES / place(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in PICTURES:
            shutil.copy(path, target)
        elif path.suffix == ".md":
            left += links(path)
            text = moved(path)
            target.write_text(with_docstrings(text) if path == DOCS / "api.md" else text, "utf-8")
        else:
            target.write_text(f"# {path.relative_to(ROOT)}\n\n{as_markdown(path)}\n", "utf-8")


def navigation(index: str) -> str:
    """Returns the order of the pages in the builder's form: a section for each heading of the index."""
    lines = ["nav:", "  - Overview: README.md"]
    for section in index.split("\n## ")[1:]:
        lines.append(f"  - {section.splitlines()[0]}:")
        lines += [f'      - "{entry["title"]}": {entry["page"]}' for entry in ENTRY.finditer(section)]
    return "\n".join(lines)


def main() -> None:
    """Builds the site, or ends with what is wrong with it."""
    stage()
    index = (DOCS / "README.md").read_text("utf-8")
    config = (ROOT / "mkdocs.yml").read_text("utf-8").replace("paths: [src]", f"paths: [{ROOT / 'src'}]")
    CONFIG.write_text(f"{config}\ndocs_dir: {PAGES.name}\nsite_dir: {SITE.name}\n{navigation(index)}\n", "utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", CONFIG.name]
    done = subprocess.run(command, cwd=BUILD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    if done.returncode:
        sys.exit(done.stdout)
    for page in PAGES.rglob("*.md"):
        shutil.copy(page, SITE / page.relative_to(PAGES))
    shutil.copy(DOCS / "README.md", SITE / "llms.txt")
    print(f"{SITE.relative_to(ROOT)}/index.html: {len(list(SITE.rglob('*.html')))} pages")


if __name__ == "__main__":
    main()
