"""The card says what an export is, how it is run, by code that the tests run, and what goes wrong."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from phased_dmd.export.comfyui import base_files
from phased_dmd.export.exported_run import ExportedRun, format_times
from phased_dmd.models.loader import bare_model
from phased_dmd.sampling.sampler import preview_size

TEMPLATES = Path(__file__).parents[1] / "assets" / "export"
WRONG_CALLS = "wrong-calls.png"


def write_card(
    run: ExportedRun, folder: Path, stock: Sequence[float], gap: float, obstacle: str | None, repo: str | None
) -> None:
    """Writes README.md and its pictures: the run's last preview, and what wrong calls look like.

    stock: the times that a fused export's stock pipeline runs at, off the trained ones by at most gap. obstacle: why
    there is no workflow. repo: the hub id of the export.
    """
    preview = last_preview(run)
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
        steps=sorted((step, expert) for expert in run.experts for step in expert.steps), image=run.task == "i2v",
        moves=run.teacher.sizes[0].num_frames > 1, stock=stock, gap=gap, obstacle=obstacle, here=repo or ".",
        bases=base_files(run), preview=preview, prompts=preview_prompts(run) if preview else [],
    )  # fmt: skip
    (folder / "README.md").write_text(text, "utf-8")


def last_preview(run: ExportedRun) -> Path | None:
    """Finds the last picture that training made of its last phase's samples."""
    return max((run.folder / "samples").glob(f"phase-{run.plan.num_phases}-*.png"), default=None)


def preview_prompts(run: ExportedRun) -> list[str]:
    """Returns the prompts that `preview_samples` spreads over all; none where they have first frames."""
    path = run.folder / "prompts.jsonl"
    if run.task == "i2v" or not path.exists():
        return []
    prompts = [json.loads(line)["prompt"] for line in path.read_text("utf-8").splitlines()]
    count = preview_size(bare_model(run.teacher, run.config.seed).sample_shapes[0])
    return [prompts[i * len(prompts) // count] for i in range(count)]
