"""The claims as data, their runs and verdicts at a size for tests, the count of saved bytes, and the paper's Fig. 2."""

import json
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from phased_dmd import cli, train
from phased_dmd.config import AnalyticTeacher, Config, Fake, Generator, Optimiser, Plan
from phased_dmd.diffusion import FlowSchedule
from phased_dmd.evaluate import HEADINGS
from phased_dmd.models.analytic import ExactMixture
from phased_dmd.objectives import biased_target, subinterval_target
from phased_dmd.recipes import RECIPES, nano_t2i
from phased_dmd.reproduce import study
from phased_dmd.reproduce.claims import CLAIMS, FULL, MODES, QUICK, STUDIES, Budget, Claim
from phased_dmd.reproduce.decide import decide
from phased_dmd.reproduce.fig2 import fig2, fit_subinterval, trajectories
from phased_dmd.reproduce.intervals import interval, judge, ratio
from phased_dmd.reproduce.memory import SavedBytes, judge_memory, memory
from phased_dmd.reproduce.study import prepared, table

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def tiny() -> Config:
    """Four phases of two updates on three points."""
    return Config(
        recipe="toy-2d",
        teacher=AnalyticTeacher(means=((-1.0, 0.0), (0.0, 1.0), (1.0, 0.0)), hidden=8, layers=1, fit_steps=5),
        plan=Plan(steps=4, phases=4, shift=2.0, gradient="all"),
        generator=Generator(weights="full", optimiser=Optimiser(lr=3e-2)),
        fake=Fake(optimiser=Optimiser(lr=1e-3), updates=1),
        iterations=2, batch_size=8,
    )  # fmt: skip


@pytest.fixture
def claim(monkeypatch: pytest.MonkeyPatch) -> Claim:
    """fig8 on the tiny recipe alone."""
    monkeypatch.setitem(RECIPES, "toy-2d", tiny)
    return replace(CLAIMS["fig8"], recipes={"toy-2d": MODES})


@pytest.fixture
def distilled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The run folders that are distilled, by name, as it happens."""
    names, real = [], study.distill

    def spy(config: Config, output: Path) -> Path:
        names.append(output.name)
        return real(config, output, quiet=True)

    monkeypatch.setattr(study, "distill", spy)
    monkeypatch.setattr(train, "save_preview", lambda *_: None)  # half of the time
    return names


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claims_variants_have_one_teacher_and_equally_many_updates(name: str) -> None:
    found = CLAIMS[name]
    for recipe, (_, measure) in found.recipes.items():
        configs = {
            label: prepared(recipe, variant, 3, FULL[recipe], Path())[0] for label, variant in found.variants.items()
        }
        assert measure in HEADINGS
        assert {config.seed for config in configs.values()} == {3}
        assert len({config.teacher.model_dump_json() for config in configs.values()}) == 1
        assert len({config.iterations * config.plan.phases for config in configs.values()}) == 1
        assert all(configs[better] != configs[worse] for better, worse in found.pairs)
        folders = {prepared(recipe, variant, 3, FULL[recipe], Path())[1] for variant in found.variants.values()}
        assert len(folders) == len(configs)


@pytest.mark.parametrize("recipe", STUDIES)
def test_a_studys_labels_are_its_methods_and_its_folders_those_of_earlier_runs(recipe: str) -> None:
    for label, variant in STUDIES[recipe].items():
        config, folder = prepared(recipe, variant, 2, FULL[recipe], Path())
        assert (config.method, folder) == (label, Path(f"{recipe}-{label}-2"))


def test_a_quick_run_makes_a_share_of_the_updates_in_a_folder_of_its_own() -> None:
    whole, folder = prepared("nano-t2i", CLAIMS["fig8"].variants["nested"], 0, FULL["nano-t2i"], Path())
    part, other = prepared("nano-t2i", CLAIMS["fig8"].variants["nested"], 0, QUICK["nano-t2i"], Path())
    assert part.iterations == QUICK["nano-t2i"].updates * whole.iterations == 24
    assert folder != other


def test_a_claims_files_agree_and_a_second_call_makes_only_what_is_missing(
    claim: Claim, distilled: list[str], tmp_path: Path
) -> None:
    """The ratio recomputed from the file of each run; one file and its run folder lost, only that run is made again."""

    def run() -> tuple[str, dict]:
        path = decide("fig8", claim, {"toy-2d": Budget(2, 64)}, tmp_path / "runs", tmp_path / "results", "COMMAND")
        return path.read_text(), json.loads(path.with_suffix(".json").read_text())

    text, body = run()
    assert len(distilled) == 4
    folder, labels = tmp_path / "results" / "fig8", ("nested", "disjoint")
    files = [[folder / f"toy-2d-{label}-{seed}.json" for seed in (0, 1)] for label in labels]
    kl = [[json.loads(file.read_text())["rows"]["phased, 4 steps"][MODES[1]] for file in row] for row in files]
    expected = math.sqrt(kl[1][0] * kl[1][1] / kl[0][0] / kl[0][1])
    (comparison,) = body["comparisons"]
    assert comparison["ratio"] == pytest.approx(expected, rel=1e-12)
    assert body["verdict"] == ("holds" if comparison["low"] > 1 else "does not hold")
    assert f"Verdict: **{body['verdict']}**" in text and "`COMMAND`" in text
    assert f"| disjoint / nested | {expected:.3g} |" in text

    assert run() == (text, body) and len(distilled) == 4
    files[1][0].unlink()
    (tmp_path / "runs" / "toy-2d-phased-renoise.interval=disjoint-0").rename(tmp_path / "lost")
    again = run()[1]["comparisons"]
    assert distilled[4:] == ["toy-2d-phased-renoise.interval=disjoint-0"]
    assert again == body["comparisons"], "the same run gives the same numbers"


def test_more_samples_are_evaluated_again_on_the_same_runs(claim: Claim, distilled: list[str], tmp_path: Path) -> None:
    numbers = []
    for samples in (64, 128):
        path = decide("fig8", claim, {"toy-2d": Budget(1, samples)}, tmp_path / "runs", tmp_path, "COMMAND")
        body = json.loads(path.with_suffix(".json").read_text())
        assert [run["samples"] for run in body["recipes"]["toy-2d"]["runs"]] == [samples] * 2
        assert body["verdict"] is None and "No verdict" in path.read_text()
        numbers.append(body["comparisons"][0]["ratio"])
    assert numbers[0] != numbers[1]
    assert len({*distilled}) == 2


def test_the_files_of_another_recipe_are_not_taken_for_this_one(
    claim: Claim, distilled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, iterations in enumerate((1, 2)):
        monkeypatch.setitem(RECIPES, "toy-2d", lambda count=iterations: tiny().model_copy(update={"iterations": count}))
        decide("fig8", claim, {"toy-2d": Budget(1, 64)}, tmp_path / f"runs-{number}", tmp_path, "COMMAND")
    assert len(distilled) == 4
    body = json.loads((tmp_path / "fig8.json").read_text())
    assert {run["config"]["iterations"] for run in body["recipes"]["toy-2d"]["runs"]} == {2}


def test_a_share_of_the_updates_gets_no_verdict(claim: Claim, distilled: list[str], tmp_path: Path) -> None:
    path = decide("fig8", claim, {"toy-2d": Budget(2, 64, 0.5)}, tmp_path / "runs", tmp_path, "COMMAND")
    body = json.loads(path.with_suffix(".json").read_text())
    assert body["comparisons"][0]["low"] is not None and body["verdict"] is None
    assert "0.5 of the recipe's generator updates" in path.read_text()
    assert {run["config"]["iterations"] for run in body["recipes"]["toy-2d"]["runs"]} == {1}


def test_the_command_writes_a_quick_study_beside_its_runs(
    claim: Claim, distilled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["phased-dmd", "reproduce", "toy-2d", "--budget", "quick", "--samples", "64"]
    monkeypatch.setattr(sys, "argv", [*command, "--runs", str(tmp_path)])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which the command replaces
    cli.main()
    text = (tmp_path / "quick" / "toy-2d.md").read_text()
    assert f"`{' '.join(command)}`: 1 seeds, 64 samples a cell" in text
    assert [line.split(",")[0] for line in text.splitlines() if "4 steps" in line] == [
        "| base", "| dmd-sgts", "| phased-sgts", "| phased"
    ]  # fmt: skip
    assert distilled == [f"toy-2d-{method}-0" for method in ("dmd-sgts", "phased-sgts", "phased")]


def test_an_unknown_claim_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["phased-dmd", "reproduce", "fig88"])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "phased-dmd: claim: unknown claim 'fig88'; did you mean fig8?\n"


@pytest.mark.parametrize("recipe", ["toy-2d", "nano-t2i"])
def test_the_committed_tables_are_those_of_their_numbers(recipe: str) -> None:
    summary = json.loads((RESULTS / f"{recipe}.json").read_text())["summary"]
    text = (RESULTS / f"{recipe}.md").read_text()
    for kind, rows in summary.items():
        assert table(kind, rows) in text
        for measures in rows.values():
            for stored in measures.values():
                again = interval(stored["values"])
                assert again["mean"] == pytest.approx(stored["mean"])
                assert again["half_width"] == pytest.approx(stored["half_width"])


def test_the_interval_is_students() -> None:
    """Three values: the quantile of two degrees of freedom is 4.3027."""
    result = interval([1.0, 2.0, 3.0])
    assert result["mean"] == 2
    assert result["half_width"] == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert interval([1.0])["half_width"] is None


def test_the_ratio_is_of_logarithms_seed_by_seed() -> None:
    """Ratios 2, 4, 8: mean 4, and the interval is Student's of 1, 2, 3 as powers of two, whatever the seeds' scale."""
    result = ratio([2.0, 40.0, 0.8], [1.0, 10.0, 0.1])
    half = 4.302653 / math.sqrt(3)
    assert result["values"] == pytest.approx([2, 4, 8])
    assert (result["ratio"], result["low"], result["high"]) == pytest.approx((4, 2 ** (2 - half), 2 ** (2 + half)))
    one = ratio([3.0], [2.0])
    assert one["ratio"] == pytest.approx(1.5) and one["low"] is None and one["high"] is None


@pytest.mark.parametrize(
    ("lows", "verdict"),
    [
        ([1.2, 3.0], "holds"),
        ([1.2, 0.9], "holds partly"),
        ([1.0, 0.3], "does not hold"),
        ([1.2, None], None),
        ([], None),
    ],
)
def test_the_verdict_counts_intervals_above_one(lows: list[float | None], verdict: str | None) -> None:
    assert judge([{"low": low} for low in lows]) == verdict


def test_saved_bytes_are_storages_without_weights() -> None:
    """x [7, 5]: the linear layer keeps its input, exp its output [7, 3], in float32; a view of x adds nothing."""
    layer, x = nn.Linear(5, 3), torch.randn(7, 5, requires_grad=True)
    saved = SavedBytes(list(layer.parameters()))
    with saved:
        y = layer(x).exp()
        z = layer(x.view(7, 5)).sum()
    assert saved.total == 4 * (7 * 5 + 7 * 3)
    assert y.requires_grad and z.requires_grad
    with saved, torch.no_grad():
        layer(torch.randn(100, 5)).exp()
    assert saved.total == 4 * (7 * 5 + 7 * 3)


def test_plain_dmd_saves_four_steps_and_a_phase_saves_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(RECIPES, "nano-t2i", lambda: nano_t2i().model_copy(update={"batch_size": 2}))
    path = memory(tmp_path, (1, 4))
    body = json.loads(path.with_suffix(".json").read_text())
    one = body["plain"]["1"]
    assert body["plain"]["4"] == pytest.approx(4 * one, rel=0.1)
    assert len(body["phased"]["4"]) == 4
    assert body["phased"]["4"] == pytest.approx([one] * 4, rel=0.1)
    assert "Verdict: **holds**" in path.read_text()


@pytest.mark.parametrize(
    ("plain", "phased", "verdict"),
    [
        ({1: 100, 4: 400}, {4: [100, 105, 100, 110]}, "holds"),
        ({1: 100, 4: 400}, {4: [100, 200, 300, 400]}, "holds partly"),
        ({1: 100, 4: 120}, {4: [100, 100, 100, 100]}, "holds partly"),
        ({1: 100, 4: 120}, {4: [100, 120, 120, 120]}, "does not hold"),
    ],
)
def test_the_verdict_on_memory(plain: dict[int, int], phased: dict[int, list[int]], verdict: str) -> None:
    assert judge_memory(plain, phased) == verdict


def test_only_the_unbiased_objective_keeps_the_trajectories() -> None:
    """Four points, models of (.5, 1) from x_.5 alone: < .02 from the exact flow, the biased one 5 times that."""
    schedule = FlowSchedule()
    exact = ExactMixture(torch.tensor([[-1.0], [0.0], [1.0], [2.0]]), 0.0, torch.ones(4), schedule, "flow")
    noise = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    truth = trajectories(exact, noise, schedule)
    unbiased, biased = (
        float((trajectories(fit_subinterval(exact, 0.5, target, 0, 600, 64), noise, schedule) - truth).abs().mean())
        for target in (subinterval_target, biased_target)
    )
    assert unbiased < 0.02
    assert biased > 5 * unbiased


def test_fig2_writes_its_table_and_picture(tmp_path: Path) -> None:
    text = fig2([0], tmp_path, steps=5, hidden=8).read_text()
    assert "subinterval, biased" in text and "phased-dmd reproduce fig2" in text
    assert (tmp_path / "fig2.png").stat().st_size > 10_000
