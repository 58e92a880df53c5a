"""The pages: every command on them is one that there is, and is run here or says what it needs; links lead on."""

import ast
import importlib.util
import json
import pkgutil
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import typer
from commands import run as command

import phased_dmd
from phased_dmd.cli import app
from phased_dmd.cli.flags import resolved
from phased_dmd.config.fields import groups
from phased_dmd.lab.reproduce.claims import NAMES
from phased_dmd.maths.phases import step_times
from phased_dmd.recipes import RECIPES, resolve

ROOT = Path(__file__).parents[1]
DOCS, NOTEBOOK = ROOT / "docs", ROOT / "examples" / "quickstart.ipynb"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined] of a group
FIELDS = {"steps": "plan.steps", "phases": "plan.phases"} | {
    name: name for name in ("iterations", "seed", "prompts", "log_every", "checkpoint_every", "init_experts")
}  # of the flags of their own
OTHERS = ("torchrun", "bash", "RECIPE=", "make", "python", "python3", "pip", "hf", "source")
PROMPTS = {
    ".txt": "a boat\n",
    ".csv": "prompt,image\na boat,a.png\n",
    ".jsonl": '{"prompt": "a boat", "image": "a.png"}\n',
}
BRIEF = ("--iterations", "1", "--batch-size", "4", "--fake.updates", "1", "--teacher.base_steps", "2")
FEW = {"iterations": 1, "batch_size": 4, "fake.updates": 1, "teacher.base_steps": 2, "plan.phases": 2, "plan.steps": 2}
CHEAP = {"--samples": "64", "--seeds": "2", "--base": "2"}


class Block(NamedTuple):
    """Commands that a page shows together, as words. needs: whether the line above says what they need."""

    page: Path
    needs: bool
    commands: list[list[str]]


def fences(page: Path) -> Iterator[tuple[str, str, str]]:
    """The text before each block of a page, the block's language and what stands in it."""
    parts = re.split(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    yield from zip(parts[::3], parts[1::3], parts[2::3], strict=False)


def blocks(page: Path) -> list[Block]:
    """Those of a page that begin with a command; files, and what programs print, stand in blocks too."""
    found = []
    for before, language, text in fences(page):
        if not language and text.lstrip().startswith(("phased-dmd", *OTHERS)):
            lines = re.sub(r" && |&$", "\n", text.replace("\\\n", " "), flags=re.MULTILINE).splitlines()
            commands = [words for line in lines if (words := shlex.split(line, comments=True))]
            above = before.rstrip().rsplit("\n\n", 1)[-1]
            found.append(Block(page, re.fullmatch(r"\*Needs: .+\*", above, re.DOTALL) is not None, commands))
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]
AT_ONCE = sorted({block.page for block in BLOCKS if not block.needs})


def arguments(words: list[str]) -> list[str] | None:
    """The arguments that `phased-dmd` gets by a line; None of other programs', which are looked at here."""
    match words:
        case ["phased-dmd", *rest]:
            return rest
        case ["torchrun", *_]:
            return words[words.index("phased_dmd") + 1 :]
        case ["bash", script, *rest]:
            assert (ROOT / script).is_file()
            return ["distill", "wan22-t2v", *rest]
        case [first, *rest] if first.startswith("RECIPE="):
            script = next(i for i, word in enumerate(rest) if word.endswith(".sbatch"))
            assert (ROOT / rest[script]).is_file()
            return ["distill", first.removeprefix("RECIPE="), *rest[script + 1 :]]
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case _:
            assert words[0] in OTHERS
    return None


def lay_out(words: list[str]) -> None:
    """Makes what a line names and a user brings, files and folders, in the working folder."""
    for word in words:
        path = Path(word)
        if word.startswith("-") or word in RECIPES or path.is_absolute() or " " in word or "," in word:
            continue
        if path.suffix in {".yaml", ".json", *PROMPTS, ".safetensors", ".png"}:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(PROMPTS.get(path.suffix, '{"recipe": "nano-t2i"}\n'))
        else:
            path.mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS}), ids=lambda page: page.name)
def test_every_command_on_a_page_is_one_that_there_is(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its flags are known, its values of their kinds, its recipe and fields make a configuration."""
    monkeypatch.chdir(tmp_path)
    for words in (words for block in blocks(page) for words in block.commands):
        told = arguments(words)
        if told is None:
            continue
        lay_out(told[1:])
        given = COMMANDS[told[0]].make_context(told[0], told[1:]).params
        if told[0] in ("distill", "plan"):
            flags = {FIELDS[name]: value or None for name, value in given.items() if name in FIELDS}
            resolved(given["recipe"], flags, given["set_"], given["method"])
        assert given.get("claim", "all") in (*NAMES, "all")


@pytest.mark.filterwarnings("ignore:teacher.path:UserWarning")  # no weights are here
@pytest.mark.parametrize("page", AT_ONCE, ids=lambda page: page.name)
def test_what_needs_nothing_runs_as_it_stands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the page's order, with fewer updates and samples; plans for a number of GPUs are in test_examples.py."""
    monkeypatch.chdir(tmp_path)
    for words in (words for block in blocks(page) if not block.needs for words in block.commands):
        told = arguments(words)
        assert told is not None, f"{words}: say what it needs"
        if "--gpus" in told:
            continue
        for flag in CHEAP.keys() & set(told):
            told[told.index(flag) + 1] = CHEAP[flag]
        brief = BRIEF if told[0] == "distill" and "--dry-run" not in told else ()
        assert command(*told, *brief, monkeypatch=monkeypatch) == 0, words
    if page.name == "quick-start.md":
        (code,) = (text for _, language, text in fences(page) if language == "python")
        names: dict[str, Any] = {}
        exec(compile(code, page.name, "exec"), names)
        assert names["pictures"][0].shape == (1, 32, 32, 3)


def test_the_quick_start_runs_at_once() -> None:
    assert DOCS / "quick-start.md" in AT_ONCE


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells as they stand, in one session, with fewer updates, steps and samples; committed without results."""
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    for given, brief in {'{"seed": 0}': repr(FEW), "samples=200": "samples=64"}.items():
        assert code.count(given) == 1
        code = code.replace(given, brief)
    names: dict[str, Any] = {}
    exec(compile(code, NOTEBOOK.name, "exec"), names)
    assert names["sheet"].size == (8 * 32, 3 * 32) and len(names["sheet"].getcolors(2**16)) > 100
    assert (tmp_path / "runs" / "notebook-exported" / "export.json").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_a_page_imports_what_there_is(page: Path) -> None:
    for code in (text for _, language, text in fences(page) if language == "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("phased_dmd"):
                assert all(hasattr(import_module(node.module), alias.name) for alias in node.names)


# ---------------------------------------------------------------- the site


def builder() -> ModuleType:
    """`scripts/build_site.py` as a module."""
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "scripts" / "build_site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_index_lists_every_page_once_in_the_form_of_llms_txt() -> None:
    """Headings, and below each of them lines of a link and a question; before them a title and what it is about."""
    index = (DOCS / "README.md").read_text()
    head, *sections = index.split("\n## ")
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+(\n> [^\n]+)*\n", head)
    entries = [line for section in sections for line in section.splitlines()[1:] if line]
    listed = [builder().ENTRY.fullmatch(line) for line in entries]
    pages = [entry["page"] for entry in listed if entry]
    assert all(listed) and len(set(pages)) == len(pages)
    assert {path.name for path in DOCS.glob("*.md")} - {"README.md"} == {page for page in pages if "/" not in page}


@pytest.mark.parametrize("page", [*PAGES, *sorted((DOCS / "results").glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    assert all(target.exists() for target in builder().links(page))


def test_a_link_that_leads_nowhere_ends_the_building(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("[a](page.md), [b](gone.md)\n")
    site = builder()
    site.ROOT = tmp_path
    with pytest.raises(SystemExit, match=r"^page\.md: a link to gone\.md, where there is no page$"):
        list(site.links(tmp_path / "page.md"))


def test_links_are_moved_to_where_pages_stand() -> None:
    site = builder()
    text = site.moved(DOCS / "quick-start.md")
    assert "(repository/examples/quickstart.ipynb.md)" in text and "(images/nano-before-after.png)" in text
    assert "(../../LOG.md)" in site.moved(DOCS / "results" / "earlier" / "README.md")
    assert "(../quick-start.md)" in site.moved(ROOT / "README.md")


def test_every_public_name_has_its_place_on_the_page_of_names() -> None:
    site = builder()
    text = site.with_docstrings((DOCS / "api.md").read_text())
    homes = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    found = {pkgutil.resolve_name(home) for home in homes}
    assert {getattr(phased_dmd, name) for name in phased_dmd._HOMES} <= found


def test_the_picture_of_the_plan_is_what_its_script_draws() -> None:
    spec = importlib.util.spec_from_file_location("plan_picture", ROOT / "scripts" / "plan_picture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "images" / "plan.svg").read_text() == module.picture() + "\n"


# ---------------------------------------------------------------- other trainers


def test_shifted_times_for_those_who_come_from_elsewhere() -> None:
    text = (DOCS / "migration.md").read_text()
    head, *rows = re.findall(r"^\| (raw time|\.\d+) \| (.+) \|$", text, re.MULTILINE)
    shifts = [float(cell.removeprefix("shift ")) for cell in head[1].split(" | ")]
    assert [raw for raw, _ in rows] == [".75", ".5", ".25"] and shifts == [3, 5, 7, 9]
    for i, (raw, cells) in enumerate(rows, 1):
        assert [float(cell) for cell in cells.split(" | ")] == [
            pytest.approx(step_times(4, shift, 1.0)[i], abs=5e-5) for shift in shifts
        ], raw


def test_the_fields_that_others_are_translated_to_are_there() -> None:
    known = {field.name for group in groups() for field in group.fields}
    table = (DOCS / "migration.md").read_text().split("## Field by field")[1].split("\n\n")[1]
    first = [row.split(" | ")[0] for row in table.splitlines()[2:]]
    names = [name for cell in first for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)`", cell)]
    assert len(names) > 12 and set(names) <= known


@pytest.mark.parametrize(
    "trainer", ["Self-Forcing, bidirectional", "LightX2V, DMD", "LightX2V, phased", "FastGen, DMD2"]
)
def test_the_nearest_runs_can_be_configured(trainer: str) -> None:
    table = (DOCS / "migration.md").read_text().split("## The nearest run here")[1]
    (flags,) = re.findall(rf"^\| {trainer}[^|]*\| `([^`]+)`", table, re.MULTILINE)
    given = COMMANDS["distill"].make_context("distill", ["wan21-t2v-1.3b", *shlex.split(flags)]).params
    config = resolved(given["recipe"], {}, given["set_"], given["method"])
    assert config != resolve("wan21-t2v-1.3b")


def test_a_lora_is_merged_as_the_page_says(tmp_path: Path) -> None:
    """Weights of the merged folder are base + alpha / rank B A, alpha 2 and rank 4."""
    from diffusers import DiffusionPipeline
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    from phased_dmd.models.source import ASSETS

    (code,) = (text for _, language, text in fences(DOCS / "fine-tune.md") if language == "python")
    base, key = str(ASSETS / "nano"), "blocks.0.attn1.to_q"
    before = DiffusionPipeline.from_pretrained(base).transformer.get_submodule(key).weight.detach().clone()
    torch.manual_seed(0)
    down, up = torch.randn(4, before.shape[1]), torch.randn(before.shape[0], 4)
    layers = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    WanPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=layers, weight_name="my-lora.safetensors",
        transformer_lora_adapter_metadata={"r": 4, "lora_alpha": 2, "target_modules": [key]},
    )  # fmt: skip
    exec(code, {"base": base, "folder": str(tmp_path), "merged": str(tmp_path / "merged")})
    after = DiffusionPipeline.from_pretrained(tmp_path / "merged").transformer.get_submodule(key).weight
    torch.testing.assert_close(after, before + 0.5 * up @ down)
