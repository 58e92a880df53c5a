"""The claims as data, their runs and verdicts at a size for tests, the count of saved bytes, and the paper's Fig. 2."""

import json
import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scipy.stats import ttest_1samp
from torch import nn

from phased_dmd import cli, train
from phased_dmd.checkpoint import RunFolder, load_tensors
from phased_dmd.config import Config, Fake, Generator, Plan
from phased_dmd.config.teacher import AnalyticTeacher
from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate import HEADINGS
from phased_dmd.lab.metrics.formats import number
from phased_dmd.lab.metrics.intervals import interval
from phased_dmd.lab.reproduce import fig5, workers
from phased_dmd.lab.reproduce.claim import (
    DMD,
    DMD_SGTS,
    DMD_SGTS_WIDE,
    FULL,
    MODES,
    ONE_STEP,
    PHASED,
    PHASED_SGTS,
    QUICK,
    Budget,
    Claim,
    Measure,
    Trial,
    Variant,
)  # fmt: skip
from phased_dmd.lab.reproduce.claim_page import beside_paper, comparison_table, decisive, verdict_line, write_index
from phased_dmd.lab.reproduce.claims import CLAIMS, NAMES, SHORT, STUDIES, collapse_trial
from phased_dmd.lab.reproduce.comparisons import compare, difference, judge, ratio, shown
from phased_dmd.lab.reproduce.decide import compared, decide
from phased_dmd.lab.reproduce.fig2 import (
    BIASED,
    SEEDS,
    UNBIASED,
    fig2,
    fit_subinterval,
    judge_trajectories,
    trajectories,
)
from phased_dmd.lab.reproduce.fig2 import FULL as FULL_INTERVAL
from phased_dmd.lab.reproduce.fig5 import change, changes
from phased_dmd.lab.reproduce.memory_study import SavedBytes, judge_memory, memory
from phased_dmd.lab.reproduce.run import reproduce
from phased_dmd.lab.reproduce.study import Study, planned, plus_minus, prepared, summarise, table
from phased_dmd.lab.reproduce.workers import Run, Workers, inherit
from phased_dmd.maths.losses import biased_target, subinterval_target
from phased_dmd.maths.schedules import FlowSchedule
from phased_dmd.models.analytic import ExactMixture
from phased_dmd.networks.build import add_expert, build_system, load_teacher
from phased_dmd.networks.roles import expert_role
from phased_dmd.recipes import RECIPES, nano_t2i

RESULTS = Path(__file__).parents[2] / "docs" / "results"
ABOUT = {"command": "COMMAND", "date": "2026-01-01", "budget": "full"}
T2, T4 = 4.302653, 12.706205  # Student's t at 97.5 %, of two degrees of freedom and of one
TRIALS = [(name, recipe) for name, claim in CLAIMS.items() for recipe in claim.trials]


def tiny(iterations: int = 2) -> Config:
    """Four phases of two updates on three points."""
    return Config(
        recipe="toy-2d",
        teacher=AnalyticTeacher(means=((-1.0, 0.0), (0.0, 1.0), (1.0, 0.0)), fit_steps=5),
        plan=Plan(steps=4, phases=4, shift=2.0, gradient="all"),
        generator=Generator(weights="full", lr=1e-3),
        fake=Fake(lr=1e-3, updates=1),
        iterations=iterations, batch_size=8,
    )  # fmt: skip


@pytest.fixture
def claim(monkeypatch: pytest.MonkeyPatch) -> Claim:
    """fig8 on the tiny recipe alone."""
    monkeypatch.setitem(RECIPES, "toy-2d", tiny)
    return replace(CLAIMS["fig8"], trials={"toy-2d": CLAIMS["fig8"].trials["toy-2d"]})


@pytest.fixture
def distilled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The run folders that are distilled, by name, as it happens."""
    names, real = [], workers.distill

    def spy(config: Config, output: Path, quiet: bool) -> Path:
        names.append(output.name)
        return real(config, output, quiet=True)

    monkeypatch.setattr(workers, "distill", spy)
    monkeypatch.setattr(train, "save_preview", lambda *_: None)  # half of the time
    return names


def settle(
    claim: Claim, budget: Budget, runs: Path, results: Path, about: Mapping[str, Any] = ABOUT
) -> tuple[str, dict[str, Any]]:
    """A claim's runs on the tiny recipe and its results: the page and the JSON."""
    with Workers(1, lambda _: None) as alone:
        asked = list(planned("toy-2d", claim.trials["toy-2d"].variants, budget, runs).values())
        alone.distil(asked)
        alone.evaluate(asked)
    path = decide("claim", claim, {"toy-2d": budget}, runs, results, about)
    return path.read_text(), json.loads(path.with_suffix(".json").read_text())


def updates(recipe: str, variant: Variant, budget: Budget) -> float:
    """Generator updates of all phases together."""
    config, _ = prepared(recipe, variant, 0, budget, Path())
    whole, _ = prepared(recipe, replace(variant, last=1.0), 0, budget, Path())
    return config.iterations + whole.iterations * (config.plan.phases - 1)


@pytest.mark.parametrize("budgets", [FULL, QUICK], ids=["full", "quick"])
@pytest.mark.parametrize(("name", "recipe"), TRIALS)
def test_a_claims_variants_have_one_teacher_and_equally_many_updates(
    name: str, recipe: str, budgets: Mapping[str, Budget]
) -> None:
    """Where a claim is about the updates, exactly the factor that its label tells."""
    trial, budget = CLAIMS[name].trials[recipe], budgets[recipe]
    runs = {label: prepared(recipe, variant, 3, budget, Path()) for label, variant in trial.variants.items()}
    configs = {label: config for label, (config, _) in runs.items()}
    whole = RECIPES[recipe]()
    total = budget.updates * whole.iterations * whole.plan.phases
    for label, variant in trial.variants.items():
        if variant.last == 1:
            assert updates(recipe, variant, budget) == pytest.approx(total * variant.updates, abs=1e-9), label
    assert {config.seed for config in configs.values()} == {3}
    assert len({config.teacher.model_dump_json() for config in configs.values()}) == 1
    assert all(configs[better] != configs[worse] for better, worse in trial.pairs)
    assert len({folder for _, folder in runs.values()}) == len(runs)
    assert all(measure.name in HEADINGS or measure.table == "change" for measure in trial.measures)


def test_only_collapse_and_fig5_are_about_the_updates() -> None:
    variants = [(name, v) for name, recipe in TRIALS for v in CLAIMS[name].trials[recipe].variants.values()]
    odd = {name for name, variant in variants if (variant.updates, variant.last) != (1, 1)}
    assert odd == {"collapse", "fig5"}
    mine = CLAIMS["fig5"].trials["nano-t2i"].variants
    for method in ("Phased+SGTS", "DMD+SGTS"):
        assert updates("nano-t2i", mine[method], FULL["nano-t2i"]) == 240
        short = updates("nano-t2i", mine[f"{method}, short"], FULL["nano-t2i"])
        assert short == {"Phased+SGTS": 120 + 120 * SHORT, "DMD+SGTS": 240 * SHORT}[method]


def test_the_control_of_doubled_rank_and_the_two_networks_have_equally_many_parameters() -> None:
    """One adapter of rank 64 is as large as two of rank 32; on nano-moe every method trains one on each network."""

    def parameters(recipe: str, variant: Variant) -> int:
        config, _ = prepared(recipe, variant, 0, FULL[recipe], Path())
        model, codec = load_teacher(config)
        system = build_system(config, model, codec.encode_text([""])[0])
        for phase in range(1, system.plan.num_phases + 1):
            add_expert(system, phase, trainable=True)
        experts = [system.roles.parameters(expert_role(phase)) for phase in range(1, system.plan.num_phases + 1)]
        return sum(p.numel() for expert in experts for p in expert.values())

    narrow = parameters("nano-t2i", DMD_SGTS)
    assert parameters("nano-t2i", DMD_SGTS_WIDE) == parameters("nano-t2i", PHASED_SGTS) == 2 * narrow
    assert parameters("nano-moe", DMD_SGTS) == parameters("nano-moe", PHASED_SGTS)


@pytest.mark.parametrize(
    ("recipe", "variant", "folder"),
    [
        ("nano-t2i", DMD, "nano-t2i-dmd-iterations=240-0"),
        ("nano-t2i", ONE_STEP, "nano-t2i-dmd-plan.steps=1-iterations=240-0"),
        (
            "nano-t2i",
            DMD_SGTS_WIDE,
            "nano-t2i-dmd-sgts-generator.lora.rank=64-generator.lora.alpha=64-iterations=240-0",
        ),
        ("nano-t2i", PHASED, "nano-t2i-phased-iterations=60-0"),
        ("nano-t2i", replace(DMD_SGTS, updates=2), "nano-t2i-dmd-sgts-0"),
        ("nano-t2i", replace(PHASED_SGTS, last=SHORT), "nano-t2i-phased-sgts-iterations=120-last=30-0"),
        ("toy-2d", ONE_STEP, "toy-2d-dmd-plan.steps=1-0"),
    ],
)
def test_a_run_folder_is_named_by_all_that_sets_it_apart(recipe: str, variant: Variant, folder: str) -> None:
    assert prepared(recipe, variant, 0, FULL[recipe], Path())[1] == Path(folder)


@pytest.mark.parametrize("recipe", STUDIES)
def test_a_studys_labels_are_its_methods_and_its_folders_those_of_whole_runs(recipe: str) -> None:
    for label, variant in STUDIES[recipe].items():
        config, folder = prepared(recipe, variant, 2, replace(FULL[recipe], updates=1.0), Path())
        assert (config.method, folder) == (label, Path(f"{recipe}-{label}-2"))
        assert config.iterations * config.plan.phases == RECIPES[recipe]().iterations * RECIPES[recipe]().plan.phases


def test_a_claims_files_agree_and_a_second_call_makes_only_what_is_missing(
    claim: Claim, distilled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ratio recomputed from the file of each run; a run folder lost, only that run is made again, the same."""
    monkeypatch.setitem(FULL, "toy-2d", Budget(2, 64))

    def run() -> tuple[str, dict[str, Any]]:
        return settle(claim, Budget(2, 64), tmp_path / "runs", tmp_path / "results")

    text, body = run()
    assert len(distilled) == 4
    folder, labels = tmp_path / "results" / "claim", ("nested", "disjoint")
    files = [[json.loads((folder / f"toy-2d-{label}-{seed}.json").read_text()) for seed in (0, 1)] for label in labels]
    kl = [[one["sets"]["mixture"]["rows"]["phased, 4 steps"][MODES.name]["value"] for one in row] for row in files]
    expected = math.sqrt(kl[1][0] * kl[1][1] / kl[0][0] / kl[0][1])
    (comparison,) = body["comparisons"]
    assert comparison["value"] == pytest.approx(expected, rel=1e-12)
    assert body["verdict"] == ("holds" if comparison["low"] > 1 else "does not hold")
    assert f"Verdict: **{body['verdict']}** at this size (an exact mixture): " in text
    assert "`COMMAND`, 2026-01-01, full budget" in text
    assert f"| disjoint / nested | {number(expected)} |" in text
    half = T4 * abs(kl[0][0] - kl[0][1]) / 2  # of two values
    assert f"| {plus_minus({'mean': kl[0][0] / 2 + kl[0][1] / 2, 'half_width': half})} |" in text
    assert [one["subject"] for one in files[1]] == [
        f"toy-2d-phased-ablation.renoise=disjoint-{seed}" for seed in (0, 1)
    ]
    tensors = RunFolder(tmp_path / "runs" / "toy-2d-phased-0")
    assert files[0][0]["trainable_parameters"] == sum(
        tensor.numel() for phase in range(1, 5) for tensor in load_tensors(tensors.expert_path(phase))[0].values()
    )
    with Image.open(tmp_path / "results" / "claim.png") as picture:
        assert picture.width >= 900

    assert run() == (text, body) and len(distilled) == 4
    (tmp_path / "runs" / "toy-2d-phased-ablation.renoise=disjoint-0").rename(tmp_path / "lost")
    again = run()[1]["comparisons"]
    assert distilled[4:] == ["toy-2d-phased-ablation.renoise=disjoint-0"]
    assert again == body["comparisons"], "the same run gives the same numbers"


def test_a_folder_of_another_config_is_no_finished_run(claim: Claim, distilled: list[str], tmp_path: Path) -> None:
    """A recipe that has changed since: the folder's name does not tell."""
    (first, *_) = planned("toy-2d", claim.trials["toy-2d"].variants, Budget(1, 64), tmp_path).values()
    with Workers(1, lambda _: None) as alone:
        alone.distil([first])
        alone.distil([first])
        changed = replace(first, config=first.config.model_copy(update={"batch_size": 2 * first.config.batch_size}))
        with pytest.raises(UserError, match="batch_size is 8 there, 16 here"):
            alone.distil([changed])
    assert len(distilled) == 1


def test_more_samples_are_evaluated_again_on_the_same_runs(claim: Claim, distilled: list[str], tmp_path: Path) -> None:
    numbers = []
    for samples in (64, 128):
        text, body = settle(claim, Budget(1, samples), tmp_path / "runs", tmp_path)
        assert f"1 seed, {samples} samples a cell, 8 generator updates in all" in text
        assert body["verdict"] is None and "No verdict" in text and "none of one seed" in text
        numbers.append(body["comparisons"][0]["value"])
    assert numbers[0] != numbers[1]
    assert len(distilled) == 2


def test_other_seeds_samples_or_updates_than_the_full_budgets_get_no_verdict(
    claim: Claim, distilled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their intervals are shown all the same."""
    monkeypatch.setattr("phased_dmd.lab.reproduce.decide.draw", lambda *_: None)  # most of the time
    mine = Budget(2, 64, 0.5)
    for full in (replace(mine, seeds=3), replace(mine, samples=65), replace(mine, updates=1.0)):
        monkeypatch.setitem(FULL, "toy-2d", full)
        text, body = settle(claim, mine, tmp_path / "runs", tmp_path)
        assert body["comparisons"][0]["low"] is not None and body["verdict"] is None
        assert "4 generator updates in all (0.5 of the recipe's)" in text and "No verdict" in text
    monkeypatch.setitem(FULL, "toy-2d", mine)
    assert settle(claim, mine, tmp_path / "runs", tmp_path)[1]["verdict"] is not None


def test_curves_over_the_updates_and_their_variants(
    claim: Claim, distilled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim about the updates: each run makes the share that its label tells, and the figure is drawn."""
    monkeypatch.setitem(RECIPES, "toy-2d", lambda: tiny(4))
    about = replace(claim, trials={"toy-2d": collapse_trial((MODES,), (0.25, 1))}, curves=True)
    text, body = settle(about, Budget(1, 64), tmp_path / "runs", tmp_path)
    found = {label: facts["updates"] for label, facts in body["recipes"]["toy-2d"]["variants"].items()}
    assert found == {"DMD+SGTS, x 0.25": 4, "DMD+SGTS, x 1": 16, "Phased, x 0.25": 4, "Phased, x 1": 16}
    assert [c["what"] for c in body["comparisons"]] == [
        "DMD+SGTS, x 1 / DMD+SGTS, x 0.25", "DMD+SGTS, x 1 / Phased, x 1"
    ]  # fmt: skip
    assert (tmp_path / "claim.png").stat().st_size > 10_000


def test_two_workers_make_the_very_runs_that_one_makes(claim: Claim, tmp_path: Path) -> None:
    """Experts bit for bit, and every figure but the seconds; and one's failure is told as it is."""
    bodies = []
    for jobs in (1, 2):
        told: list[str] = []
        asked = list(planned("toy-2d", claim.trials["toy-2d"].variants, Budget(2, 64), tmp_path / str(jobs)).values())
        with Workers(jobs, told.append) as many:
            many.distil(asked)
            many.evaluate(asked)
            if jobs == 2:
                (tmp_path / "taken").write_text("not a run")
                with pytest.raises(UserError, match="taken exists and is not a run folder"):
                    many.distil([replace(asked[0], folder=tmp_path / "taken")])
        assert sum("distilled" in line for line in told) == 4
        experts = [path.read_bytes() for run in asked for path in sorted((run.folder / "experts").iterdir())]
        rows = [json.loads((run.folder / "evaluation.json").read_text())["sets"]["mixture"]["rows"] for run in asked]
        for row in (row for rows_of_run in rows for row in rows_of_run.values()):
            row.pop("seconds_a_sample")
        bodies.append((experts, rows))
    assert len(bodies[0][0]) == 16
    assert bodies[0] == bodies[1]


def test_the_short_run_of_fig5_shares_the_first_expert_bit_for_bit(
    claim: Claim, distilled: list[str], tmp_path: Path
) -> None:
    """It trains the last phase alone, with fewer iterations, whatever the order in which the runs are asked for."""
    variants = {"short": replace(PHASED_SGTS, last=0.5), "long": PHASED_SGTS}
    asked = list(planned("toy-2d", variants, Budget(1, 64), tmp_path).values())
    with Workers(1, lambda _: None) as alone:
        alone.distil(asked)
    short, long = (RunFolder(run.folder) for run in asked)
    assert short.expert_path(1).read_bytes() == long.expert_path(1).read_bytes()
    assert short.expert_path(2).read_bytes() != long.expert_path(2).read_bytes()
    assert [(row["phase"], row["iteration"]) for row in short.metrics()] == [(2, 2)]
    assert [(row["phase"], row["iteration"]) for row in long.metrics()] == [(1, 4), (2, 4)]
    assert distilled == [long.path.name, short.path.name]


def test_an_heirs_folder_that_was_begun_goes_on(claim: Claim, distilled: list[str], tmp_path: Path) -> None:
    """A kill between the inheritance and the end: the same command finishes the run."""
    variants = {"long": PHASED_SGTS, "short": replace(PHASED_SGTS, last=0.5)}
    asked = planned("toy-2d", variants, Budget(1, 64), tmp_path)
    with Workers(1, lambda _: None) as alone:
        alone.distil([asked["long", 0]])
        inherit(asked["short", 0])
        before = RunFolder(asked["short", 0].folder).expert_path(1).read_bytes()
        alone.distil(list(asked.values()))
    assert RunFolder(asked["short", 0].folder).finished(asked["short", 0].config)
    assert RunFolder(asked["short", 0].folder).expert_path(1).read_bytes() == before


def test_the_change_of_structure_and_detail_is_that_of_their_waves() -> None:
    """Waves of 2 and 12 cycles in 32 pixels, and a mean: halved, off by a tenth, and moved."""
    ramp = torch.arange(32, dtype=torch.float64) / 32

    def waves(low: float, high: float, mean: float) -> torch.Tensor:
        grey = mean + low * (2 * math.pi * 2 * ramp).cos() + high * (2 * math.pi * 12 * ramp).cos()
        return grey.expand(3, 1, 32, 32)[..., None].expand(3, 1, 32, 32, 3).float()

    found = change(waves(0.1, 0.11, 0.6), waves(0.2, 0.1, 0.5))
    assert found["structure"] == pytest.approx(0.25, rel=1e-4)
    assert found["detail"] == pytest.approx(0.01, rel=1e-3)
    assert found["detail_over_structure"] == pytest.approx(0.04, rel=1e-3)
    assert change(waves(0.2, 0.1, 0.5), waves(0.2, 0.1, 0.5)) == {
        "structure": 0, "detail": 0, "detail_over_structure": 0, "agreement": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("moved", "verdict"),
    [
        ({"Phased+SGTS": (0.05, 0.2), "DMD+SGTS": (0.2, 0.2)}, "holds"),
        ({"Phased+SGTS": (0.05, 0.2), "DMD+SGTS": (0.05, 0.2)}, "does not hold"),  # detail / structure is 4 in both
        ({"Phased+SGTS": (0.2, 0.2), "DMD+SGTS": (0.05, 0.2)}, "does not hold"),
    ],
)
def test_fig5_compares_with_training_without_a_frozen_expert(
    moved: dict[str, tuple[float, float]], verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Detail that moves more than structure in both methods alike says nothing of the frozen expert."""
    trial = CLAIMS["fig5"].trials["nano-t2i"]
    asked = planned("nano-t2i", trial.variants, Budget(3, 64), Path())
    at = {run.folder: (label, seed) for (label, seed), run in asked.items()}
    ramp = torch.arange(32, dtype=torch.float64) / 32

    def pictures(folder: Path, _: int) -> torch.Tensor:
        label, seed = at[folder]
        method, _, short = label.partition(", ")
        low, high = ((1 + 0.01 * seed) * share if short else 0 for share in moved[method])
        grey = 0.5 + 0.2 * (1 + low) * (4 * math.pi * ramp).cos() + 0.1 * (1 + high) * (24 * math.pi * ramp).cos()
        return grey.expand(3, 1, 32, 32)[..., None].expand(3, 1, 32, 32, 3)

    monkeypatch.setattr(fig5, "pictures", pictures)
    monkeypatch.setattr(fig5, "load_classifier", lambda: (None, None))
    monkeypatch.setattr(fig5, "read", lambda _, pixels: (None, torch.zeros(len(pixels), 10)))
    study = Study("nano-t2i", Budget(3, 64), asked, {}, {}, {})
    changes(study, tmp_path)
    for method, (low, high) in moved.items():
        row = study.summary["change"][method]
        assert row["structure"]["values"] == pytest.approx([(low * (1 + 0.01 * seed)) ** 2 for seed in range(3)])
        assert row["detail_over_structure"]["values"] == pytest.approx([(high / low) ** 2] * 3)
        one = json.loads((tmp_path / f"change-{method.replace('+', '-')}-2.json").read_text())
        assert one["detail"] == row["detail"]["values"][2]
    structure, relative = found = compared("nano-t2i", trial, study.summary)
    ours, control = (low for low, _ in moved.values())
    assert structure["value"] == pytest.approx((control / ours) ** 2) == pytest.approx(relative["value"])
    assert judge(found) == verdict


def test_the_command_writes_a_quick_study_beside_its_runs(
    claim: Claim, distilled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "toy-2d", lambda: tiny(5))
    command = ["phased-dmd", "reproduce", "toy-2d", "--budget", "quick", "--samples", "64"]
    monkeypatch.setattr(sys, "argv", [*command, "--runs", str(tmp_path), "--jobs", "1"])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which the command replaces
    cli.main()
    text = (tmp_path / "quick" / "toy-2d.md").read_text()
    assert f"`{' '.join(command)}`" in text and "1 seed, 64 samples a cell, 4 generator updates" in text
    rows = [line.split(" |")[0] for line in text.splitlines() if line.startswith("|")]
    assert rows == ["| mixture", "|---|---|---|---|---|---|", "| base, 40 steps", "| base, 4 steps", "| dmd-sgts",
                    "| phased-sgts", "| phased"]  # fmt: skip
    assert distilled == [
        "toy-2d-dmd-sgts-iterations=4-0", "toy-2d-phased-sgts-iterations=2-0", "toy-2d-phased-iterations=1-0"
    ]  # fmt: skip
    assert "[toy-2d](toy-2d.md)" in (tmp_path / "quick" / "README.md").read_text()


def test_all_at_a_quick_budget_is_every_claim_and_no_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each run once, though claims share them."""
    asked: list[Run] = []
    monkeypatch.setattr(Workers, "distil", lambda _, runs: asked.extend(workers.unique(runs)))
    monkeypatch.setattr(Workers, "evaluate", lambda _, runs: None)
    for module in ("memory", "fig2", "decide"):
        monkeypatch.setattr(f"phased_dmd.lab.reproduce.run.{module}", lambda *_, module=module: Path(module))
    paths = reproduce("all", "quick", None, None, 1, tmp_path, tmp_path / "results", lambda _: None)
    assert paths == [Path("fig2"), Path("memory"), *[Path("decide")] * len(CLAIMS)]
    assert set(NAMES) == {"fig2", "memory", *CLAIMS, *STUDIES}
    counts = {recipe: sum(run.config.recipe == recipe for run in asked) for recipe in QUICK}
    assert counts == {"toy-2d": 18, "nano-t2i": 23, "nano-moe": 4, "nano-t2v": 5, "nano-i2v": 5}


def test_an_unknown_claim_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["phased-dmd", "reproduce", "fig88"])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "phased-dmd: claim: unknown claim 'fig88'; did you mean fig8?\n"


@pytest.mark.parametrize(
    "recipe", [name for name in STUDIES if "summary" in json.loads((RESULTS / f"{name}.json").read_text())]
)
def test_the_committed_tables_are_those_of_their_numbers(recipe: str) -> None:
    body = json.loads((RESULTS / f"{recipe}.json").read_text())
    text = (RESULTS / f"{recipe}.md").read_text()
    for kind, rows in body["summary"].items():
        assert table(kind, rows, nets=body.get("nets")) in text
        for stored in (cell for measures in rows.values() for cell in measures.values() if len(cell["values"]) > 1):
            again = interval(stored["values"])
            assert again["mean"] == pytest.approx(stored["mean"])
            assert again["half_width"] == pytest.approx(stored["half_width"])


@pytest.mark.parametrize("name", [name for name in CLAIMS if (RESULTS / f"{name}.json").exists()])
def test_a_committed_verdict_is_that_of_the_files_of_its_runs(name: str) -> None:
    """Every comparison again, from results/NAME/RECIPE-VARIANT-SEED.json."""
    body = json.loads((RESULTS / f"{name}.json").read_text())
    again = []
    for recipe, trial in CLAIMS[name].trials.items():
        files = [json.loads(path.read_text()) for path in sorted((RESULTS / name).glob(f"{recipe}-*.json"))]
        summary = summarise({(file["variant"], file["seed"]): file for file in files})
        measured = replace(trial, measures=tuple(m for m in trial.measures if m.table != "change"))
        again += compared(recipe, measured, summary)
    stored = [comparison for comparison in body["comparisons"] if comparison["table"] != "change"]
    assert [c["value"] for c in again] == pytest.approx([c["value"] for c in stored])
    assert judge(body["comparisons"]) == body["verdict"]


def figure(value: float, gap: float) -> dict[str, float | None]:
    return {"value": value, "half_width": 0.5, "gap": gap, "gap_half_width": 0.6}


def evaluation(seed: int, value: float) -> dict[str, Any]:
    """By the schema of `evaluation.json`: a base of 2, and a generator."""
    rows = {
        "base, 40 steps": {"optical_flow": figure(2.0, 0.0)},
        f"base, {1 + 3 * seed} steps": {"optical_flow": figure(1.0, -1.0)},
        "dmd, 4 steps": {"optical_flow": figure(value, value - 2)},
    }
    return {"seed": seed, "nets": {"flow": "DIS"}, "sets": {"specific": {"base": "base, 40 steps", "rows": rows}}}


def test_a_summary_has_the_bases_once_and_a_cell_a_label_over_the_seeds() -> None:
    values = {"slow": (1.0, 1.5), "fast": (2.5, 2.25)}
    summary = summarise({(label, s): evaluation(s, v) for label, both in values.items() for s, v in enumerate(both)})
    rows = summary["specific"]
    assert [*rows] == ["base, 40 steps", "base, 4 steps", "base, 1 steps", "slow", "fast"]
    assert rows["base, 40 steps"]["optical_flow"] == {"mean": 2, "half_width": 0.5, "values": [2], "gaps": [0]}
    slow = rows["slow"]["optical_flow"]
    assert (slow["mean"], slow["gaps"]) == (1.25, [-1, -0.5])
    assert slow["half_width"] == pytest.approx(T4 * math.sqrt(0.125) / math.sqrt(2), rel=1e-6)
    trial = Trial((Measure("specific", "optical_flow", "higher"), Measure("specific", "optical_flow", "closer")), {},
                  (("fast", "slow"),))  # fmt: skip
    higher, closer = compared("nano-t2v", trial, summary)
    assert higher["values"] == pytest.approx([2.5, 1.5]) and higher["what"] == "fast / slow"
    assert closer["values"] == pytest.approx([0.5, 0.25]) and closer["what"] == "gap of slow - gap of fast"


def test_ours_stand_beside_the_papers_by_label() -> None:
    values = {("DMD+SGTS", 0): evaluation(0, 1.0), ("Phased", 0): evaluation(0, 3.0)}
    trial = Trial((Measure("specific", "optical_flow", "higher"),), {"DMD+SGTS": DMD_SGTS, "Phased": PHASED}, ())
    made = Claim("", "", "", {"nano-t2v": trial}, paper={"": ("flow",), "base": ("10.26",), "DMD+SGTS": ("3.23",)})
    found = {"nano-t2v": Study("nano-t2v", Budget(1, 64), {}, values, summarise(values), {})}
    assert beside_paper(made, found).splitlines() == [
        "| | nano-t2v: optical flow, specific ↑ | paper, flow |",
        "|---|---|---|",
        "| base | 2.00 ± 0.50 | 10.26 |",
        "| DMD+SGTS | 1 | 3.23 |",
        "| Phased | 3 | - |",
    ]


def test_the_index_has_a_line_a_claim_that_is_there(tmp_path: Path) -> None:
    body = {"says": "Better.", "verdict": "holds", "decides": "ratio 2 (1.5 to 3)"}
    (tmp_path / "b.json").write_text(json.dumps(body))
    (tmp_path / "a.json").write_text(json.dumps({**body, "verdict": None}))
    (tmp_path / "s.json").write_text("{}")
    lines = write_index(tmp_path, ("b", "missing", "a"), ("s", "t")).read_text().splitlines()
    assert lines[4:] == [
        "| claim | what is claimed | verdict | what decides |",
        "|---|---|---|---|",
        "| [b](b.md) | Better. | holds | ratio 2 (1.5 to 3) |",
        "| [a](a.md) | Better. | none | ratio 2 (1.5 to 3) |",
        "",
        "Methods side by side, with all updates of their recipes, no verdict: [s](s.md).",
    ]


def test_the_interval_is_students() -> None:
    """Three values: the quantile of two degrees of freedom is 4.3027."""
    result = interval([1.0, 2.0, 3.0])
    assert result["mean"] == 2
    assert result["half_width"] == pytest.approx(T2 / math.sqrt(3), rel=1e-6)
    assert interval([1.0])["half_width"] is None


def test_the_ratio_is_of_logarithms_seed_by_seed() -> None:
    """Ratios 2, 4, 8: mean 4, and the interval is Student's of 1, 2, 3 as powers of two, whatever the seeds' scale."""
    result = ratio([2.0, 40.0, 0.8], [1.0, 10.0, 0.1])
    half = T2 / math.sqrt(3)
    assert result["values"] == pytest.approx([2, 4, 8])
    assert (result["value"], result["low"], result["high"]) == pytest.approx((4, 2 ** (2 - half), 2 ** (2 + half)))
    one = ratio([3.0], [2.0])
    assert one["value"] == pytest.approx(1.5) and one["low"] is None and one["high"] is None


def test_the_difference_is_seed_by_seed_and_takes_zeros() -> None:
    result = difference([0.5, 0.7, 0.9], [0.4, 0.5, 0.6])
    half = T2 * 0.1 / math.sqrt(3)
    assert (result["value"], result["low"], result["high"]) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert difference([0.0, 0.0], [0.0, 0.0])["low"] == 0
    assert ratio([0.0, 1.0], [1.0, 0.0])["value"] == pytest.approx(1), "a zero is no error"


@pytest.mark.parametrize(
    ("measure", "scale", "values"),
    [
        (Measure("", "frechet_features"), "ratio", [4, 1 / 2]),
        (Measure("", "optical_flow", "higher"), "ratio", [1 / 4, 2]),
        (Measure("", "optical_flow", "closer"), "difference", [2, -2]),
        (Measure("", "pairwise_cosine"), "difference", [3, -1]),
        (Measure("", "class_entropy", "higher"), "difference", [-3, 1]),
        (Measure("", "pairwise_cosine", "closer"), "difference", [2, -2]),
    ],
)
def test_what_is_compared_follows_the_measures_direction(measure: Measure, scale: str, values: list[float]) -> None:
    """Above the neutral value where the first cell is better. Of the base's 2, the gaps are 1 and 3, 3 and 1."""
    better = {"values": [1.0, 2.0], "gaps": [-1.0, 3.0]}
    worse = {"values": [4.0, 1.0], "gaps": [3.0, -1.0]}
    found = compare(measure, better, worse)
    assert (found["scale"], found["values"]) == (scale, pytest.approx(values))


def test_a_gap_through_zero_does_not_decide_which_is_closer() -> None:
    """Gaps of .5 against gaps of about 1, one of which happens to be 0: the seeds' mean difference, no explosion."""
    better, worse = {"values": [], "gaps": [0.5, -0.5, 0.5]}, {"values": [], "gaps": [1.0, -1.25, 0.0]}
    found = compare(Measure("", "optical_flow", "closer"), better, worse)
    assert found["values"] == [0.5, 0.75, -0.5] and found["value"] == pytest.approx(0.25)
    assert shown(found) == "nothing"


def comparison(low: float | None, high: float | None = 9.0, scale: str = "ratio") -> dict[str, Any]:
    """One of a claim's, sure of what it shows."""
    p = None if low is None else 0.001 if low > (scale == "ratio") else 0.5
    return {"recipe": "nano-t2i", "low": low, "high": high, "scale": scale, "p": p}


CLAIMED, REVERSED, UNDECIDED = comparison(1.2), comparison(0.1, 0.9), comparison(0.9, 1.1)


@pytest.mark.parametrize(
    ("comparisons", "verdict"),
    [
        ([comparison(1.2), comparison(3.0)], "holds"),
        ([comparison(1.2), comparison(0.1, scale="difference")], "holds"),
        ([CLAIMED], "holds"),
        ([CLAIMED, UNDECIDED], "holds partly"),  # p .001 < .025 / 2
        ([{**CLAIMED, "p": 0.0126}, UNDECIDED], "does not hold"),
        ([{**CLAIMED, "p": 0.0124}, UNDECIDED], "holds partly"),
        ([CLAIMED] * 2 + [comparison(-0.1, scale="difference")], "holds partly"),
        ([CLAIMED] + [UNDECIDED] * 23, "holds partly"),  # .025 / 24 = .00104
        ([CLAIMED] + [UNDECIDED] * 24, "does not hold"),
        ([CLAIMED] * 3 + [REVERSED] * 2, "holds partly"),
        ([CLAIMED] * 3 + [REVERSED] * 3, "does not hold"),
        ([REVERSED] * 2, "does not hold"),
        ([UNDECIDED] * 2, "does not hold"),
        ([CLAIMED, comparison(None, None)], None),
        ([], None),
    ],
)
def test_a_claim_holds_partly_where_more_is_as_claimed_than_reversed_and_one_is_sure(
    comparisons: list[dict], verdict: str | None
) -> None:
    """By Bonferroni's correction of one-sided p of .025."""
    assert judge(comparisons) == verdict


@pytest.mark.parametrize(
    ("comparisons", "counts"),
    [
        ([CLAIMED] * 5 + [REVERSED] + [UNDECIDED] * 3, "5 as claimed, 1 reversed, 3 undecided"),
        ([CLAIMED] * 2, "2 as claimed, 0 reversed, 0 undecided"),
        ([REVERSED, UNDECIDED], "0 as claimed, 1 reversed, 1 undecided"),
        ([UNDECIDED] * 2, "0 as claimed, 0 reversed, 2 undecided; the seeds are too few to tell"),
    ],
)
def test_the_verdict_and_the_index_tell_a_reversed_result_from_an_open_one(
    comparisons: list[dict[str, Any]], counts: str
) -> None:
    text = verdict_line(judge(comparisons), comparisons, ABOUT)
    assert text.startswith(f"Verdict: **{judge(comparisons)}** at this size (digits): {counts}. ")
    first = {**comparisons[0], "measure": "contrast", "what": "a / b", "value": 1.0}
    assert decisive([first, *comparisons[1:]]).endswith(f"; {counts}")
    both = verdict_line("holds", [CLAIMED, {**CLAIMED, "recipe": "toy-2d"}], ABOUT)
    assert "at this size (digits and an exact mixture)" in both


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (205.3, 30.2, "205 ± 30"), (205.3, 3.02, "205.3 ± 3.0"), (20.3, 1.04, "20.3 ± 1.0"), (2.0, 0.5, "2.00 ± 0.50"),
        (0.953, 0.00123, "0.9530 ± 0.0012"), (0.00151, 2.1e-5, "0.001510 ± 0.000021"), (-0.5, 0.25, "−0.50 ± 0.25"),
        (0.012, 1234.5, "0 ± 1,234"), (4.0, 0.0, "4"), (0.0312, None, "0.0312"), (1234.5, None, "1,234"),
        (2e-9, 3e-10, "2.00e-09 ± 3.0e-10"),
    ],
)  # fmt: skip
def test_a_mean_and_its_half_width_have_equal_decimals(mean: float, half: float | None, text: str) -> None:
    assert plus_minus({"mean": mean, "half_width": half}) == text


def test_the_table_of_comparisons_is_without_exponents() -> None:
    """A difference and its ends with equal decimals; of ratios, each end to three digits, for it may be far off."""
    about = {"recipe": "toy-2d", "table": "mixture", "measure": "contrast", "direction": "lower", "what": "x"}
    rows = (
        {"scale": "difference", "value": 0.0123, "low": -0.001, "high": 0.0256},
        {"scale": "ratio", "value": 15.21, "low": 0.0312, "high": 7412.3},
    )
    lines = comparison_table([about | row for row in rows]).splitlines()[2:]
    assert [line.split(" | x | ")[1] for line in lines] == [
        "0.0123 | −0.0010 to 0.0256 | nothing |",
        "15.2 | 0.0312 to 7,412 | nothing |",
    ]


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (comparison(1.1, 1.2), "as claimed"),
        (comparison(0.5, 0.9), "the reverse"),
        (comparison(0.5, 1.9), "nothing"),
        (comparison(-0.5, -0.1, "difference"), "the reverse"),
        (comparison(None, None), None),
    ],
)
def test_an_interval_shows_the_claim_its_reverse_or_nothing(found: dict[str, Any], text: str | None) -> None:
    assert shown(found) == text


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
    path = memory(tmp_path, ABOUT, (1, 4))
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


def test_the_verdict_on_fig2_asks_for_the_biased_to_differ_and_the_unbiased_not_to() -> None:
    alike = {FULL_INTERVAL: [1.0, 1.1], UNBIASED: [1.1, 1.2], BIASED: [20.0, 22.0]}
    assert judge(judge_trajectories(alike)) == "holds"
    assert judge(judge_trajectories({**alike, UNBIASED: [3.0, 3.3]})) != "holds"
    assert judge(judge_trajectories({**alike, BIASED: [1.0, 1.1]})) != "holds"


def test_a_comparisons_p_is_that_of_its_interval() -> None:
    """At p = .025 the interval's end lies at the neutral value; equal values are sure, or show nothing."""
    values = [0.1, 0.4, 0.7]
    found = difference(values, [0.0] * 3)
    assert found["p"] == pytest.approx(ttest_1samp(values, 0, alternative="greater").pvalue)
    moved = difference([v - found["low"] for v in values], [0.0] * 3)
    assert moved["low"] == pytest.approx(0, abs=1e-12) and moved["p"] == pytest.approx(0.025)
    assert ratio([2.0, 4.0], [1.0, 2.0])["p"] == 0 and difference([0.0] * 2, [1.0] * 2)["p"] == 1
    assert difference([1.0], [0.0])["p"] is None


def test_fig2_with_other_seeds_or_steps_gets_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phased_dmd.lab.reproduce.fig2._plot_trajectories", lambda *_: None)  # most of the time
    monkeypatch.setattr("phased_dmd.lab.reproduce.fig2.STEPS", 5)
    monkeypatch.setitem(SEEDS, "full", 2)
    quick = {**ABOUT, "budget": "quick"}
    for seeds, steps, about in ((3, 5, ABOUT), (2, 4, ABOUT), (2, 5, quick)):
        text = fig2(range(seeds), tmp_path, about, steps=steps, hidden=8).read_text()
        assert "No verdict" in text and json.loads((tmp_path / "fig2.json").read_text())["verdict"] is None
    text = fig2(range(2), tmp_path, ABOUT, steps=5, hidden=8).read_text()
    assert f"Verdict: **{json.loads((tmp_path / 'fig2.json').read_text())['verdict']}** at this size" in text


def test_fig2_writes_its_table_and_picture(tmp_path: Path) -> None:
    text = fig2([0], tmp_path, ABOUT, steps=5, hidden=8).read_text()
    assert "subinterval, biased" in text and "`COMMAND`" in text and "No verdict" in text
    assert (tmp_path / "fig2.png").stat().st_size > 10_000
    body, one = (json.loads((tmp_path / name).read_text()) for name in ("fig2.json", "fig2/subinterval-biased-0.json"))
    assert body["summary"][BIASED]["values"] == [one["deviation"]]
