"""The card says what an export is, how it is run, by code that the tests run, and what goes wrong."""

import itertools
import json
import shutil
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from phased_dmd.contact_sheet import read_sheet
from phased_dmd.export.comfyui import base_files, obstacle
from phased_dmd.export.exported_run import ExportedRun, format_times
from phased_dmd.export.fused import stock_times
from phased_dmd.sampling.loading import experts_made_by

TEMPLATES = Path(__file__).parents[1] / "assets" / "export"
WRONG_CALLS = "wrong-calls.png"


def write_card(run: ExportedRun, folder: Path, repo: str | None = None, checked: str | None = None) -> None:
    """Writes README.md and its pictures: the run's preview of these experts, and what wrong calls look like.

    repo: the hub id of the export. checked: what its verification found.
    """
    preview, (stock, gap) = last_preview(run), stock_times(run)
    if preview:
        shutil.copy(preview, folder / "samples.png")
    shutil.copy(TEMPLATES / WRONG_CALLS, folder)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters["python"] = json.dumps
    environment.filters["times"] = format_times
    text = environment.get_template("README.md.j2").render(
        run=run, config=run.config, plan=run.plan, teacher=run.teacher,
        sizes=[run.lengths(size) for size in run.teacher.sizes],
        steps=sorted((step, expert) for expert in run.experts for step in expert.steps), image=run.takes_images,
        moves=run.teacher.sizes[0].num_frames > 1, stock=stock, gap=gap, obstacle=obstacle(run), here=repo or ".",
        bases=base_files(run), preview=preview, checked=checked,
        prompts=preview_prompts(preview) if preview else [],
    )  # fmt: skip
    (folder / "README.md").write_text(text, "utf-8")


def last_preview(run: ExportedRun) -> Path | None:
    """Finds the picture that training made of the last phase's samples at the iteration that is exported."""
    made = experts_made_by(run.folder)[-1] or 0
    path = run.home / "samples" / f"phase-{run.plan.num_phases}-iteration-{made:06d}.png"
    return path if path.exists() else None


def preview_prompts(preview: Path) -> list[tuple[str, str]]:
    """Returns the prompts of a preview, each with its seeds; none where it has none, or seeds say nothing."""
    sheet = read_sheet(preview)
    alike = itertools.groupby(sheet[0].captions if sheet else (), lambda caption: caption.prompt)
    groups = [([caption.seed for caption in same], prompt) for prompt, same in alike if prompt]
    return [
        (f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0]), prompt)
        for seeds, prompt in groups
        if seeds[0] is not None
    ]
