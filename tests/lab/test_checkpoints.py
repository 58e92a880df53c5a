"""Checkpoints are evaluated where a run keeps what is measured of them, and compared on a page."""

import json
from pathlib import Path

import pytest

from phased_dmd.checkpoint import Reference
from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate import Protocol, evaluate
from phased_dmd.lab.report import write_report
from phased_dmd.onward import promote
from phased_dmd.recipes import resolve
from phased_dmd.train import distill

PROTOCOL = Protocol(samples=64)
OWN = "phased, 2 steps"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = {
        "iterations": 4, "teacher.fit_steps": 20, "batch_size": 16, "fake.updates": 2, "log_every": 2,
        "checkpoint_every": 2, "keep_last": "all", "sample_every": None, "generator.lr": 1e-2,
    }  # fmt: skip
    return distill(resolve("toy-1d", fields), tmp_path_factory.mktemp("made") / "run", quiet=True)


def rows(evaluation: dict) -> dict:
    return evaluation["sets"]["mixture"]["rows"]


def test_checkpoints_are_evaluated_into_the_run_and_compared_on_a_page(run: Path, tmp_path: Path) -> None:
    last, middle, first = f"{run}@phase-2/4", f"{run}@phase-2/2", f"{run}@phase-1/4"
    with pytest.warns(UserWarning, match="samples are predictions of x_0 at the end of phase 1 of 2"):
        found = evaluate([run, last, middle, first], PROTOCOL)
    for subject, place in ((middle, "phase-2/2"), (first, "phase-1/4")):
        assert json.loads((run / "evaluations" / place / "evaluation.json").read_text()) == found[subject]
    of = {subject: rows(found[str(subject)]) for subject in (run, last, middle)}
    for name in ("energy_distance", "mode_distance"):
        measured = {subject: row[OWN].get(name) for subject, row in of.items()}
        assert measured[run] == measured[last] and (measured[last] is None or measured[last] != measured[middle])
    assert {*of[middle]} == {*of[run]} and found[first]["row"] == "phased to the end of phase 1, 1 step"
    assert rows(found[first])[found[first]["row"]]["network_calls"]["value"] == 1
    page = write_report([run, middle, first], tmp_path / "page.html").read_text("utf-8")
    for label in ("checkpoint=the end", "checkpoint=phase 2, iteration 2", "phased to the end of phase 1, 1 step"):
        assert label in page
    with pytest.raises(UserError, match="not evaluated yet; run `phased-dmd evaluate .*@phase-1/2` first"):
        write_report([run, f"{run}@phase-1/2"], tmp_path / "other.html")


def test_what_was_measured_of_another_expert_is_measured_again(run: Path, tmp_path: Path) -> None:
    """By `evaluate`, wherever it wrote; `report` says so."""
    elsewhere, before = tmp_path / "elsewhere", rows(evaluate([run], PROTOCOL)[str(run)])
    evaluate([run], PROTOCOL, output=elsewhere)
    stamps = [(place / "evaluation.json").stat().st_mtime_ns for place in (run, elsewhere)]
    assert rows(evaluate([run], PROTOCOL)[str(run)]) == before and evaluate([run], PROTOCOL, output=elsewhere)
    assert stamps == [(place / "evaluation.json").stat().st_mtime_ns for place in (run, elsewhere)]
    try:
        promote(Reference(run, 2, 2))
        with pytest.raises(
            UserError, match=f"{run}: evaluated before its experts became what they are; run `phased-dmd"
        ):
            write_report([run], tmp_path / "page.html")
        middle = rows(evaluate([f"{run}@phase-2/2"], PROTOCOL)[f"{run}@phase-2/2"])
        for output in (None, elsewhere):
            again = rows(evaluate([run], PROTOCOL, output=output)[str(run)])
            assert again[OWN]["energy_distance"] == middle[OWN]["energy_distance"] != before[OWN]["energy_distance"]
        write_report([run], tmp_path / "page.html")
    finally:
        promote(Reference(run, 2, 4))
