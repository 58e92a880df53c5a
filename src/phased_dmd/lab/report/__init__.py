"""`report` and `watch`: a self-contained page of runs, finished or not: where they stand, what they make, how good."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from phased_dmd.checkpoint import write_atomically
from phased_dmd.config import Config, phase_plan
from phased_dmd.errors import UserError
from phased_dmd.health import verdict
from phased_dmd.lab.evaluate import BETTER, HEADINGS
from phased_dmd.lab.metrics.formats import number
from phased_dmd.lab.report.curves import colours, make_curves
from phased_dmd.lab.report.finding import closed, find, tone
from phased_dmd.lab.report.gallery import make_gallery
from phased_dmd.lab.report.numbers import make_tables
from phased_dmd.lab.report.runs import ReportedRun, evaluated, evaluating, group, read_runs, varying, written
from phased_dmd.lab.report.sheets import make_sheets

ASSETS = Path(__file__).parents[2] / "assets" / "report"
SECTIONS = ("top", "previews", "samples", "numbers", "training", "runs")  # of a page, each a template of its name


def write_report(runs: Sequence[Path | str], output: Path) -> Path:
    """Writes a page of runs, in this order; raises UserError where they cannot stand on one page."""
    if output.is_dir():
        raise UserError(f"--output: {output} is a folder; name a file in it")
    write_atomically(output, render_page(render_sections(runs)).encode())
    return output


def render_page(sections: Mapping[str, str], versions: Mapping[str, str] | None = None) -> str:
    """Returns a page of sections by their names. versions: of each, for a page that asks for newer ones."""
    return _environment().get_template("page.html.j2").render(sections=sections, versions=versions)


def render_sections(runs: Sequence[Path | str]) -> dict[str, str]:
    """Returns the HTML of each of SECTIONS, "" for what there is nothing of; raises UserError, see `write_report`."""
    read = read_runs(runs, time.time())
    groups = group(read)
    measured = evaluated(groups)
    tones = {(each.label, name): tone(closed(each, name)) for each in measured for name in each.runs[0].sets}
    tables = make_tables(measured, tones)
    found = {measure for table in tables for measure in table["measures"]}
    shared = {
        "runs": read, "groups": groups, "findings": find(measured), "tables": tables, "sheets": make_sheets(measured),
        "gallery": make_gallery(read[0].path / "samples") if len(read) == 1 else None, "better": BETTER,
        "curves": make_curves(groups), "colours": colours(groups), "teacher": read[0].config.teacher,
        "headings": {measure: HEADINGS[measure] for measure in HEADINGS if measure in found},
        "differing": varying([each.runs[0].fields for each in groups]), "phases": _phases,
        "recipes": list(dict.fromkeys(run.config.recipe for run in read)), "health": health,
        "training_seeds": sorted({run.config.seed for each in measured for run in each.runs}), "next": _next,
    }  # fmt: skip
    environment = _environment()
    return {name: environment.get_template(f"{name}.html.j2").render(shared).strip() for name in SECTIONS}


def health(run: ReportedRun) -> list[str]:
    """Returns what its figures say of a run, in words."""
    return [f"{finding}." for finding in verdict(run.metrics, run.config, run.previews)]


def _next(run: ReportedRun) -> str:
    """Says what can be done with a run now; "" where nothing need be."""
    if run.standing.state == "finished" and not run.evaluation:
        return f"Not evaluated yet: {evaluating(run.path, run.config)}."
    return ""


def _environment() -> Environment:
    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "written": written}
    return environment


def _phases(config: Config) -> list[tuple[int, str, str]]:
    """Returns for each phase its number, the times at which its steps start, and where it ends."""
    plan = phase_plan(config)
    return [
        (phase, ", ".join(f"{plan.times[i]:.4g}" for i in plan.steps(phase)), f"{plan.end(phase):.4g}")
        for phase in range(1, plan.num_phases + 1)
    ]
