"""`report`: one self-contained page that compares runs: samples of the same noise, numbers, loss curves, configs."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, Template

from phased_dmd.checkpoint import write_atomically
from phased_dmd.config import Config, phase_plan
from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate import HEADINGS
from phased_dmd.lab.metrics.formats import number
from phased_dmd.lab.report.curves import colours, make_curves
from phased_dmd.lab.report.numbers import make_tables
from phased_dmd.lab.report.runs import group, read_runs, varying, written
from phased_dmd.lab.report.sheets import make_sheets

ASSETS = Path(__file__).parents[2] / "assets"


def write_report(runs: Sequence[Path | str], output: Path) -> Path:
    """Writes a page of finished and evaluated runs, in this order; raises UserError where they cannot be compared."""
    if output.is_dir():
        raise UserError(f"--output: {output} is a folder; name a file in it")
    read = read_runs(runs)
    groups, tables = group(read), make_tables(group(read))
    measured = {measure for table in tables for measure in table["measures"]}
    html = _page().render(
        groups=groups, tables=tables, sheets=make_sheets(groups), curves=make_curves(groups), colours=colours(groups),
        headings={measure: HEADINGS[measure] for measure in HEADINGS if measure in measured},
        differing=varying([g.runs[0].fields for g in groups]), phases=_phases, teacher=read[0].config.teacher,
        recipes=list(dict.fromkeys(run.config.recipe for run in read)),
        training_seeds=sorted({run.config.seed for run in read}),
    )  # fmt: skip
    write_atomically(output, html.encode())
    return output


def _page() -> Template:
    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "written": written}
    return environment.get_template("report.html.j2")


def _phases(config: Config) -> list[tuple[int, str, str]]:
    """Returns for each phase its number, the times at which its steps start, and where it ends."""
    plan = phase_plan(config)
    return [
        (phase, ", ".join(f"{plan.times[i]:.4g}" for i in plan.steps(phase)), f"{plan.end(phase):.4g}")
        for phase in range(1, plan.num_phases + 1)
    ]
