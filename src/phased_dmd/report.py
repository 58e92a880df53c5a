"""`report`: one self-contained page of a run: what was run, samples side by side, loss curves, the table."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from phased_dmd.checkpoint import RunFolder, write_atomically
from phased_dmd.config import Config, UserError
from phased_dmd.evaluate import HEADINGS, tables

ASSETS = Path(__file__).parent / "assets"


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _curves(metrics: list[dict[str, Any]], config: Config) -> str:
    """Losses of fake and generator by phase, as an inline picture."""
    names = {"fake_loss": "fake, score matching (Eq. 13)", "generator_loss": "generator, surrogate (Eq. 11)"}
    figure = Figure((8, 2.8), layout="constrained")
    for panel, (key, title) in zip(figure.subplots(1, 2), names.items(), strict=True):
        for phase in range(1, config.plan.phases + 1):
            mine = [row for row in metrics if row["phase"] == phase]
            panel.plot([row["iteration"] for row in mine], [row[key] for row in mine], label=f"phase {phase}")
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("generator updates", fontsize=8)
        panel.set_yscale("log")
        panel.tick_params(labelsize=7)
        panel.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return _data_url(buffer.getvalue(), "png")


def _pictures(folder: Path, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The sample pictures that `evaluate` left, a group a prompt set, a row a generator."""
    if evaluation["kind"] == "mixture":
        picture = _data_url((folder / "samples" / "comparison.png").read_bytes(), "png")
        return [{"title": "Samples", "rows": [{"name": "base and distilled", "picture": picture, "clip": None}]}]
    groups = []
    for kind, rows in evaluation["sets"].items():
        group = []
        for name in rows:
            stem = folder / "samples" / f"{kind}-{name.replace(', ', '-').replace(' ', '-')}"
            clip = stem.with_suffix(".webp")
            group.append({
                "name": name,
                "picture": _data_url(stem.with_suffix(".png").read_bytes(), "png"),
                "clip": _data_url(clip.read_bytes(), "webp") if clip.exists() else None,
            })  # fmt: skip
        groups.append({"title": f"{kind.capitalize()} prompts, same seeds in every row", "rows": group})
    return groups


def write_report(run: Path | str, output: Path) -> Path:
    """Writes the page of a finished and evaluated run; raises UserError where something is missing."""
    folder = RunFolder(run)
    config = folder.config()
    if not folder.finished(config):
        raise UserError(f"{run}: the run is not finished")
    if not (folder.path / "evaluation.json").exists():
        raise UserError(f"{run}: not evaluated yet; run `phased-dmd evaluate {run}` first")
    evaluation = json.loads((folder.path / "evaluation.json").read_text())
    plan = config.phase_plan()
    phases = [
        {"phase": phase, "steps": [f"{plan.times[i]:.4g}" for i in plan.steps(phase)], "end": f"{plan.end(phase):.4g}"}
        for phase in range(1, plan.num_phases + 1)
    ]
    page = Environment(loader=FileSystemLoader(ASSETS), autoescape=True).get_template("report.html.j2")
    html = page.render(
        config=config, config_json=config.model_dump_json(indent=2), phases=phases, evaluation=evaluation,
        tables=tables(evaluation), headings=HEADINGS, curves=_curves(folder.metrics(), config),
        pictures=_pictures(folder.path, evaluation),
    )  # fmt: skip
    write_atomically(output, html.encode())
    return output
