"""The claims as data, their runs and verdicts at a size for tests, the count of saved bytes, and the paper's Fig. 2."""

import json
import math
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from scipy.stats import t as student_t
from scipy.stats import ttest_1samp
from torch import nn

from phased_dmd import cli
from phased_dmd.checkpoint import RunFolder, load_tensors
from phased_dmd.config import Config, Fake, Generator, Plan
from phased_dmd.config.teacher import AnalyticTeacher
from phased_dmd.engine.randomness import generator
from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate import HEADINGS
from phased_dmd.lab.metrics.formats import number
from phased_dmd.lab.metrics.intervals import difference, interval, ratio
from phased_dmd.lab.reproduce.arms import ARMS, BUDGETS, REFERENCE, WORLDS
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
    Criterion,
    Trial,
    Variant,
)
from phased_dmd.lab.reproduce.claim_page import beside_paper, claim_page, comparison_table, decisive, verdict_part
from phased_dmd.lab.reproduce.claims import ALONE, CLAIMS, NAMES, SHORT, STUDIES, TABLES, collapse_trial
from phased_dmd.lab.reproduce.fig2 import (
    BIASED,
    UNBIASED,
    compare_deviations,
    fig2,
    fig2_page,
    fit_subinterval,
    trajectories,
)
from phased_dmd.lab.reproduce.fig2 import FULL as FULL_INTERVAL
from phased_dmd.lab.reproduce.fig5 import change, changes
from phased_dmd.lab.reproduce.known_rows import standing_rows, still_to_run
from phased_dmd.lab.reproduce.memory_study import SavedBytes, judge_memory, memory_page, update_bytes, write_memory
from phased_dmd.lab.reproduce.method_table import at_equal_cost, bias_table, end_table, row_verdicts
from phased_dmd.lab.reproduce.results import plus_minus, read_rows, write_index
from phased_dmd.lab.reproduce.run import (
    budgets_of,
    chosen,
    claim_of,
    decide,
    full_recipes,
    parts_of,
    runs_of,
    study_page,
    weigh,
)
from phased_dmd.lab.reproduce.study import Study, plan_run, plan_runs, study_of, summarise
from phased_dmd.lab.reproduce.tdm_study import FINE, INTERVALS, descend, stages, tdm_study
from phased_dmd.lab.reproduce.verdict import compare, compare_pairs, in_a_line, judge, judge_each, mirrored, outcome
from phased_dmd.lab.reproduce.workers import PlannedRun, Workers, inherit, unique_runs
from phased_dmd.maths.losses import biased_target, subinterval_target
from phased_dmd.maths.schedules import FlowSchedule
from phased_dmd.models.analytic import ExactMixture
from phased_dmd.networks.build import add_expert, build_system, load_teacher
from phased_dmd.networks.roles import expert_role
from phased_dmd.plan.work import pool_forwards, trained_forwards
from phased_dmd.recipes import RECIPES, resolve

RESULTS = Path(__file__).parents[2] / "docs" / "results"
ABOUT = {"command": "COMMAND", "date": "2026-01-01", "budget": "full"}
T2, T4 = 4.302653, 12.706205  # Student's t at 97.5 %, of two degrees of freedom and of one
TRIALS = [(name, recipe) for name, claim in CLAIMS.items() for recipe in claim.trials]


def tiny(iterations: int = 2) -> Config:
    """Four phases of two updates on three points."""
    return Config(
        recipe="toy-2d",
        teacher=AnalyticTeacher(means=((-1.0, 0.0), (0.0, 1.0), (1.0, 0.0)), fit_steps=100),
        plan=Plan(steps=4, phases=4, shift=2.0, gradient="all"),
        generator=Generator(weights="full", lr=1e-3),
        fake=Fake(lr=1e-3, updates=1),
        iterations=iterations, batch_size=8, sample_every=None,
    )  # fmt: skip


@pytest.fixture
def claim(monkeypatch: pytest.MonkeyPatch) -> Claim:
    """fig8 on the tiny recipe alone."""
    monkeypatch.setitem(RECIPES, "toy-2d", tiny)
    return replace(CLAIMS["fig8"], trials={"toy-2d": CLAIMS["fig8"].trials["toy-2d"]})


def distil(runs: Iterable[PlannedRun]) -> list[str]:
    """Distils what is missing in this process; returns the names of the folders in that order."""
    lines: list[str] = []
    with Workers(1, lines.append) as alone:
        alone.distill(list(runs))
    return [line.removeprefix("distilled: ") for line in lines]


def settle(
    claim: Claim, budget: Budget, runs: Path, results: Path, full: bool
) -> tuple[str, dict[str, Any], list[str]]:
    """Makes a claim's runs on the tiny recipe and its results: the page, the JSON, and what had to be distilled."""
    asked = plan_runs("toy-2d", claim.trials["toy-2d"].variants, budget, runs).values()
    distilled = distil(asked)
    path = decide("claim", claim, {"toy-2d": budget}, ["toy-2d"] if full else [], runs, results, ABOUT)
    return path.read_text(), json.loads(path.with_suffix(".json").read_text()), distilled


def updates(recipe: str, variant: Variant, budget: Budget) -> float:
    """Generator updates of all phases together."""
    config, _ = plan_run(recipe, variant, 0, budget, Path())
    whole, _ = plan_run(recipe, replace(variant, last=1.0), 0, budget, Path())
    return config.iterations + whole.iterations * (config.plan.phases - 1)


@pytest.mark.parametrize("budgets", [FULL, QUICK], ids=["full", "quick"])
@pytest.mark.parametrize(("name", "recipe"), TRIALS)
def test_a_claims_variants_have_one_teacher_and_equally_many_updates(
    name: str, recipe: str, budgets: Mapping[str, Budget]
) -> None:
    """Where a claim is about the updates, exactly the factor that its label tells."""
    trial, budget = CLAIMS[name].trials[recipe], budgets[recipe]
    runs = {label: plan_run(recipe, variant, 3, budget, Path()) for label, variant in trial.variants.items()}
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
    assert all(criterion.name in HEADINGS for criterion in trial.criteria)


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
        config, _ = plan_run(recipe, variant, 0, FULL[recipe], Path())
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
    assert plan_run(recipe, variant, 0, FULL[recipe], Path())[1] == Path(folder)


@pytest.mark.parametrize("recipe", STUDIES)
def test_a_studys_labels_are_its_methods_and_its_folders_those_of_whole_runs(recipe: str) -> None:
    for label, variant in STUDIES[recipe].items():
        config, folder = plan_run(recipe, variant, 2, replace(FULL[recipe], updates=1.0), Path())
        assert (config.method, folder) == (label, Path(f"{recipe}-{label}-2"))
        assert config.iterations * config.plan.phases == RECIPES[recipe]().iterations * RECIPES[recipe]().plan.phases


def test_a_claims_files_agree_and_a_second_call_makes_only_what_is_missing(claim: Claim, tmp_path: Path) -> None:
    """The ratio recomputed from the row of each run; a run folder lost, only that run is made again, the same."""

    def run() -> tuple[str, dict[str, Any], list[str]]:
        return settle(claim, Budget(2, 64), tmp_path / "runs", tmp_path / "results", full=True)

    text, body, distilled = run()
    assert len(distilled) == 4
    rows = {row["name"]: row for row in read_rows(tmp_path / "results" / "claim.jsonl")}
    assert list(rows) == ["toy-2d-nested-0", "toy-2d-nested-1", "toy-2d-disjoint-0", "toy-2d-disjoint-1"]
    found = [row["sets"]["mixture"]["rows"]["phased, 4 steps"][MODES.name]["value"] for row in rows.values()]
    kl = [found[:2], found[2:]]
    expected = math.sqrt(kl[1][0] * kl[1][1] / kl[0][0] / kl[0][1])
    (comparison,) = body["comparisons"]
    assert comparison["value"] == pytest.approx(expected, rel=1e-12)
    verdict = "holds" if comparison["low"] > 1 else "does not hold"
    assert (body["verdicts"], body["verdict"]) == ({"toy-2d": verdict}, f"toy-2d: {verdict}")
    assert f"| toy-2d, an exact mixture | **{verdict}** | " in text
    assert "`COMMAND`, 2026-01-01, full budget" in text
    assert "2 seeds, 64 samples a cell, 8 generator updates in all" in text
    assert f"| disjoint / nested | {number(expected)} |" in text
    half = T4 * abs(kl[0][0] - kl[0][1]) / 2  # of two values
    assert f"| {plus_minus({'mean': kl[0][0] / 2 + kl[0][1] / 2, 'half_width': half})} |" in text
    folders = [f"toy-2d-phased{tag}-{seed}" for tag in ("", "-ablation.renoise=disjoint") for seed in (0, 1)]
    assert [row["subject"] for row in rows.values()] == distilled == folders
    folder = RunFolder(tmp_path / "runs" / folders[0])
    assert rows["toy-2d-nested-0"]["trainable_parameters"] == sum(
        tensor.numel() for phase in range(1, 5) for tensor in load_tensors(folder.expert_path(phase))[0].values()
    )
    with Image.open(tmp_path / "results" / "claim.png") as picture:
        assert picture.width >= 900

    assert run() == (text, body, [])
    (tmp_path / "runs" / folders[2]).rename(tmp_path / "lost")
    _, again, distilled = run()
    assert distilled == [folders[2]]
    assert again["comparisons"] == body["comparisons"], "the same run gives the same numbers"


def test_rows_of_results_stand_for_runs_that_are_gone(claim: Claim, tmp_path: Path) -> None:
    """One seed on one day, two on another machine: the same numbers, and only what no row stands for is missing."""
    variants, results = claim.trials["toy-2d"].variants, tmp_path / "results"
    whole, once, later = (tmp_path / name for name in ("whole", "once", "later"))
    _, together, _ = settle(claim, Budget(2, 64), whole, tmp_path, full=True)
    settle(claim, Budget(1, 64), once, results, full=False)
    once.rename(tmp_path / "gone")
    asked = list(plan_runs("toy-2d", variants, Budget(2, 64), later).values())
    missing = still_to_run(asked, standing_rows(results, "claim"))
    assert [run.config.seed for run in missing] == [1, 1]
    distil(missing)
    page = decide("claim", claim, {"toy-2d": Budget(2, 64)}, ["toy-2d"], later, results, ABOUT)
    assert json.loads(page.with_suffix(".json").read_text())["comparisons"] == together["comparisons"]
    names = [row["name"] for row in read_rows(results / "claim.jsonl")]
    assert names == ["toy-2d-nested-0", "toy-2d-nested-1", "toy-2d-disjoint-0", "toy-2d-disjoint-1"]
    assert not still_to_run(asked, standing_rows(results, "another claim"))
    others = [replace(asked[0], samples=65), replace(asked[0], config=asked[0].config.model_copy(update={"seed": 9}))]
    assert still_to_run(others, standing_rows(results, "claim")) == others
    assert still_to_run(asked, standing_rows(results, "fig5")) == asked, "its pictures are not in the rows"


def test_a_claim_is_run_on_one_recipe_and_keeps_what_has_all_its_rows(claim: Claim, tmp_path: Path) -> None:
    """fig8 on three recipes: rows of one are there, one is asked for, and the third waits."""
    budgets = budgets_of("fig8", "full") | {"toy-2d": Budget(1, 64)}
    settle(claim, budgets["toy-2d"], tmp_path / "runs", tmp_path, full=False)
    assert {"toy-2d", "nano-t2i", "scenes-t2i"} == {*CLAIMS["fig8"].trials}
    assert [*claim_of("fig8", budgets, "nano-t2i", tmp_path, tmp_path).trials] == ["toy-2d", "nano-t2i"]
    assert [*claim_of("fig8", budgets, "scenes-t2i", tmp_path, tmp_path / "none").trials] == ["scenes-t2i"]
    assert [*claim_of("fig8", budgets, None, tmp_path, tmp_path).trials] == [*CLAIMS["fig8"].trials]
    assert not claim_of("memory", budgets, None, tmp_path, tmp_path).trials
    with pytest.raises(UserError, match="--recipe: fig8 is run on toy-2d, nano-t2i, scenes-t2i"):
        claim_of("fig8", budgets, "nano-moe", tmp_path, tmp_path)
    parts = parts_of("fig8", claim_of("fig8", budgets, "nano-t2i", tmp_path, tmp_path))
    assert parts == [" --recipe toy-2d", " --recipe nano-t2i"], "the page names the commands that made it"
    assert parts_of("fig8", CLAIMS["fig8"]) == parts_of("memory", claim_of("memory", budgets, None, tmp_path, tmp_path))
    assert [*chosen("all", "full", "scenes-moe")] == ["table3"] and "fig9" not in chosen("all", "full", "scenes-t2i")


def test_a_folder_of_another_config_is_no_finished_run(claim: Claim, tmp_path: Path) -> None:
    """A recipe that has changed since: the folder's name does not tell."""
    (first, *_) = plan_runs("toy-2d", claim.trials["toy-2d"].variants, Budget(1, 64), tmp_path).values()
    assert len(distil([first])) == 1 and not distil([first])
    changed = replace(first, config=first.config.model_copy(update={"batch_size": 2 * first.config.batch_size}))
    with pytest.raises(UserError, match="batch_size is 8 there, 16 here"):
        distil([changed])


def test_more_samples_are_evaluated_again_on_the_same_runs(claim: Claim, tmp_path: Path) -> None:
    """One seed has neither an interval nor a verdict."""
    numbers, made = [], []
    for samples in (64, 128):
        text, body, distilled = settle(claim, Budget(1, samples, 0.5), tmp_path / "runs", tmp_path, full=False)
        assert f"1 seed, {samples} samples a cell, 4 generator updates in all (0.5 of the recipe's)" in text
        assert body["verdict"] is None and "No verdict" in text and "| none | - | - |" in text
        numbers.append(body["comparisons"][0]["value"])
        made.append(len(distilled))
    assert numbers[0] != numbers[1] and made == [2, 0]


def test_other_seeds_samples_or_updates_than_the_full_budgets_get_no_verdict() -> None:
    for name, claim in CLAIMS.items():
        assert full_recipes(budgets_of(name, "full")) == [*FULL] and {*claim.trials} <= {*FULL}
        fives = [recipe for recipe, budget in FULL.items() if budget.seeds == 5]
        assert full_recipes(budgets_of(name, "full", seeds=5)) == fives
        for other in ((2, None, None), (None, 65, None), (None, None, 0.5)):
            assert not full_recipes(budgets_of(name, "full", *other))
        assert not full_recipes(budgets_of(name, "quick"))


def test_curves_over_the_updates_and_their_variants(claim: Claim, tmp_path: Path) -> None:
    """A claim about the updates: each run makes the share that its label tells, and the figure is drawn."""
    about = replace(claim, trials={"toy-2d": collapse_trial((MODES,), (0.5, 1))}, curves=True)
    _, body, _ = settle(about, Budget(1, 64), tmp_path / "runs", tmp_path, full=True)
    found = {label: sizes["updates"] for label, sizes in body["recipes"]["toy-2d"]["variants"].items()}
    assert found == {"DMD+SGTS, x 0.5": 4, "DMD+SGTS, x 1": 8, "Phased, x 0.5": 4, "Phased, x 1": 8}
    assert [c["what"] for c in body["comparisons"]] == [
        "DMD+SGTS, x 1 / DMD+SGTS, x 0.5", "DMD+SGTS, x 1 / Phased, x 1"
    ]  # fmt: skip
    assert (tmp_path / "claim.png").stat().st_size > 10_000


def test_two_workers_make_the_very_runs_that_one_makes(claim: Claim, tmp_path: Path) -> None:
    """Experts bit for bit, and every figure but the seconds; and one's failure is told as it is."""
    bodies = []
    for jobs in (1, 2):
        told: list[str] = []
        asked = list(plan_runs("toy-2d", claim.trials["toy-2d"].variants, Budget(1, 64), tmp_path / str(jobs)).values())
        with Workers(jobs, told.append) as many:
            many.distill(asked)
            many.evaluate(asked)
            if jobs == 2:
                (tmp_path / "taken").write_text("not a run")
                with pytest.raises(UserError, match="taken exists and is not a run folder"):
                    many.distill([replace(asked[0], folder=tmp_path / "taken")])
        assert sum("distilled" in line for line in told) == 2
        experts = [path.read_bytes() for run in asked for path in sorted((run.folder / "experts").iterdir())]
        rows = [json.loads((run.folder / "evaluation.json").read_text())["sets"]["mixture"]["rows"] for run in asked]
        for row in (row for rows_of_run in rows for row in rows_of_run.values()):
            row.pop("seconds_a_sample")
        bodies.append((experts, rows))
    assert len(bodies[0][0]) == 8
    assert bodies[0] == bodies[1]


def test_the_short_run_of_fig5_shares_the_first_expert_bit_for_bit(claim: Claim, tmp_path: Path) -> None:
    """It trains the last phase alone, with fewer iterations, whatever the order in which the runs are asked for."""
    variants = {"short": replace(PHASED_SGTS, last=0.5), "long": PHASED_SGTS}
    asked = plan_runs("toy-2d", variants, Budget(1, 64), tmp_path).values()
    short, long = (RunFolder(run.folder) for run in asked)
    assert distil(asked) == [long.path.name, short.path.name]
    assert short.expert_path(1).read_bytes() == long.expert_path(1).read_bytes()
    assert short.expert_path(2).read_bytes() != long.expert_path(2).read_bytes()
    assert [(row["phase"], row["iteration"]) for row in short.metrics()] == [(2, 2)]
    assert [(row["phase"], row["iteration"]) for row in long.metrics()] == [(1, 4), (2, 4)]


def test_a_run_whose_folder_was_begun_with_the_experts_of_another_goes_on(claim: Claim, tmp_path: Path) -> None:
    """A kill between the copy of the experts and the end: the same command finishes the run."""
    variants = {"long": PHASED_SGTS, "short": replace(PHASED_SGTS, last=0.5)}
    asked = plan_runs("toy-2d", variants, Budget(1, 64), tmp_path)
    distil([asked["long", 0]])
    inherit(asked["short", 0])
    before = RunFolder(asked["short", 0].folder).expert_path(1).read_bytes()
    distil(asked.values())
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
        "structure": 0, "detail": 0, "detail_over_structure": 0
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
    moved: dict[str, tuple[float, float]], verdict: str
) -> None:
    """Detail that moves more than structure in both methods alike says nothing of the frozen expert."""
    trial = CLAIMS["fig5"].trials["nano-t2i"]
    asked = plan_runs("nano-t2i", trial.variants, Budget(3, 64), Path())
    at = {run.folder: (label, seed) for (label, seed), run in asked.items()}
    ramp = torch.arange(32, dtype=torch.float64) / 32

    def pictures(folder: Path) -> torch.Tensor:
        label, seed = at[folder]
        method, _, short = label.partition(", ")
        low, high = ((1 + 0.01 * seed) * share if short else 0 for share in moved[method])
        grey = 0.5 + 0.2 * (1 + low) * (4 * math.pi * ramp).cos() + 0.1 * (1 + high) * (24 * math.pi * ramp).cos()
        return grey.expand(3, 1, 32, 32)[..., None].expand(3, 1, 32, 32, 3).float()

    rows = changes("nano-t2i", asked, pictures)
    assert [(row["name"], row["samples"]) for row in rows[2:4]] == [
        ("nano-t2i-change-Phased-SGTS-2", 3),
        ("nano-t2i-change-DMD-SGTS-0", 3),
    ]
    study = study_of("nano-t2i", Budget(3, 64), rows)
    for method, (low, high) in moved.items():
        row = study.summary["change"][method]
        assert row["structure"]["values"] == pytest.approx(
            [(low * (1 + 0.01 * seed)) ** 2 for seed in range(3)], rel=1e-4
        )
        assert row["detail_over_structure"]["values"] == pytest.approx([(high / low) ** 2] * 3, rel=1e-4)
    structure, relative = found = compare_pairs("nano-t2i", trial, study.summary)
    ours, control = (low for low, _ in moved.values())
    assert structure["value"] == pytest.approx((control / ours) ** 2, rel=1e-4)
    assert relative["value"] == pytest.approx((control / ours) ** 2, rel=1e-4)
    assert judge(found) == verdict


def test_the_command_writes_a_quick_study_beside_its_runs(
    claim: Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
    labels = ("dmd-sgts", "phased-sgts", "phased")
    folders = [f"toy-2d-{label}-iterations={count}-0" for label, count in zip(labels, (4, 2, 1), strict=True)]
    printed = capsys.readouterr().out
    assert re.findall(r"distilled: (\S+)", printed) == folders
    assert printed.splitlines()[-1] == f"{tmp_path}/quick/toy-2d.md"
    assert [row["name"] for row in read_rows(tmp_path / "quick" / "toy-2d.jsonl")] == [f"toy-2d-{n}-0" for n in labels]
    assert "[toy-2d](toy-2d.md)" in (tmp_path / "quick" / "README.md").read_text()


def test_all_at_a_quick_budget_is_every_claim_and_no_study() -> None:
    """Each run once, though claims share them."""
    assert chosen("all", "full") == [*NAMES] == [*ALONE, *CLAIMS, *TABLES, *STUDIES]
    names = chosen("all", "quick")
    assert names == ["fig2", "memory", *CLAIMS, "methods"]
    quick = {name: budgets_of(name, "quick") for name in names}
    claims = {name: claim_of(name, quick[name], None, Path(), Path()) for name in names}
    asked = unique_runs([run for name in names for run in runs_of(name, claims[name], quick[name], Path())])
    counts = {recipe: sum(run.config.recipe == recipe for run in asked) for recipe in QUICK}
    digits = {"toy-2d": 29, "exact-clips": 7, "nano-t2i": 34, "nano-moe": 18, "nano-t2v": 5, "nano-i2v": 5}
    assert counts == digits | {"scenes-t2i": 13, "scenes-t2v": 5, "scenes-moe": 3}


# The table of methods


@pytest.mark.parametrize("recipe", WORLDS)
def test_the_rows_of_the_table_take_equally_many_forwards(recipe: str) -> None:
    """To the iteration that cannot be split, of each phase."""
    budget, trial = BUDGETS[recipe], at_equal_cost(TABLES["methods"], BUDGETS).trials[recipe]
    whole = trained_forwards(resolve(recipe, {}, "phased")) * budget.updates
    counts = {}
    for label, variant in trial.variants.items():
        config, _ = plan_run(recipe, variant, 0, budget, Path())
        of_one = trained_forwards(config) / config.iterations
        assert abs(trained_forwards(config) + pool_forwards(config) - whole) <= of_one / 2 + 1e-9, label
        counts[label] = config.updates
    assert counts["one fake update"] > 2 * counts["Phased"] and counts["PDMD"] == counts["Phased"] > counts["Fisher"]


def test_a_mirrored_comparison_is_that_of_the_sides_exchanged() -> None:
    one, other = [1.0, 2.0, 4.5], [1.5, 1.9, 7.0]
    for compare_by in (ratio, difference):
        found, expected = mirrored(compare_by(one, other)), compare_by(other, one)
        for key in ("value", "low", "high", "p"):
            assert found[key] == pytest.approx(expected[key], rel=1e-9), key
    alone = mirrored(ratio(one[:1], other[:1]))
    assert alone["value"] == pytest.approx(1.5) and alone["low"] is alone["high"] is alone["p"] is None


def test_a_row_is_better_or_worse_by_the_rule_of_claims() -> None:
    def row(name: str, *spans: tuple[float, float]) -> list[dict[str, Any]]:
        """Of ratios above 1 where the row is better, with intervals of five seeds."""
        logs = [(math.log(low), math.log(high)) for low, high in spans]
        values = [[(a + b) / 2 + (b - a) / 2 * z for z in (-0.81, 0.81, -0.81, 0.81, 0.0)] for a, b in logs]
        return [{"better": name, **ratio([math.exp(v) for v in of_span], [1.0] * 5)} for of_span in values]

    rows = [
        *row("best", (1.1, 1.2), (2.0, 2.1)), *row("some", (2.0, 2.01), (0.9, 1.1)), *row("open", (0.9, 1.1)),
        *row("mixed", (2.0, 2.01), (0.4, 0.41)), *row("worst", (0.5, 0.51)), *row("bad", (0.5, 0.501), (0.9, 1.1)),
    ]  # fmt: skip
    assert row_verdicts(rows) == {
        "best": "better", "some": "better in part", "open": "not told apart", "mixed": "mixed",
        "worst": "worse", "bad": "worse in part",
    }  # fmt: skip
    assert row_verdicts([{"better": "one", **ratio([1.0], [2.0])}]) == {"one": None}


def test_the_table_of_methods_has_a_line_a_row_and_its_files_agree(claim: Claim, tmp_path: Path) -> None:
    """Two of its rows on the tiny recipe, two seeds; what is said of TDM comes from a small study of it."""
    rows, budget = (REFERENCE, "one fake update"), Budget(2, 64)
    trial = TABLES["methods"].trials["toy-2d"]
    variants = {label: trial.variants[label] for label in rows}
    small = replace(claim, trials={"toy-2d": replace(trial, variants=variants, pairs=((rows[1], rows[0]),))})
    distil(plan_runs("toy-2d", variants, budget, tmp_path).values())
    tdm = tdm_study(samples=64, particles=32, iterations=2)
    path = weigh("methods", small, {"toy-2d": budget}, True, tmp_path, tmp_path, ABOUT, tdm)
    body, text = json.loads(path.with_suffix(".json").read_text()), path.read_text()
    assert body["verdicts"] == row_verdicts(body["comparisons"]) and [*body["verdicts"]] == ["one fake update"]
    assert f"| one fake update | {ARMS['one fake update'].says} | {body['verdicts']['one fake update']} |" in text
    assert bias_table(body["tdm"]) in text and end_table(body["tdm"]) in text
    assert (tmp_path / "methods.png").exists() and len(read_rows(tmp_path / "methods.jsonl")) == 4


# What TDM's targets teach, on the exact mixture


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).square().sum(1).mean().sqrt().item()


@pytest.mark.parametrize("interval", INTERVALS)
def test_a_fake_that_learns_without_error_has_the_teachers_mean_on_its_law(interval: str) -> None:
    """By the unbiased target in every phase; by the others, which are the same at s = 0, nowhere else."""
    for stage in stages(interval):
        rng = generator(0, interval, f"{stage.s:g}")
        law = stage.start(6000, rng)
        x_s = stage.flow(law, FINE)
        asked = stage.flow(stage.start(500, rng), FINE)
        x_t, t = stage.noised(asked, rng)
        right = stage.fake("unbiased", law, x_s, x_t, t)
        assert apart(right, stage.teacher(x_t, t)) < 0.05 * apart(asked, stage.teacher(x_t, t))
        for target in ("biased", "rollout"):
            off = apart(stage.fake(target, law, x_s, x_t, t), right)
            assert off > 5e-3 if stage.s > 0 else off < 1e-9, (stage.s, target)


def test_particles_that_descend_by_the_unbiased_target_reach_the_teachers_law() -> None:
    found = descend("unbiased", "nested", particles=400, iterations=100)
    assert found["stretch"] == pytest.approx([1.0] * 4, abs=0.01) and max(found["kl"], found["flowed"]["kl"]) < 0.01


def test_the_last_phase_undoes_what_a_biased_target_did_before_it() -> None:
    """The law that it begins from is off, which shows where the teacher's flow goes on from it, and in no sample of the
    last expert's.
    """
    found = descend("biased", "nested", particles=400, iterations=100)
    assert found["stretch"][0] < 0.7 and found["stretch"][2] > 1.1
    assert found["kl"] < 0.01 and found["flowed"]["kl"] > 5 * found["kl"]


def test_an_unknown_claim_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["phased-dmd", "reproduce", "fig88"])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "phased-dmd: claim: unknown claim 'fig88'; did you mean fig8?\n"


def committed(name: str) -> tuple[dict[str, Any], str]:
    """A page's JSON and its text."""
    return json.loads((RESULTS / f"{name}.json").read_text()), (RESULTS / f"{name}.md").read_text()


@pytest.mark.parametrize("recipe", [name for name in STUDIES if (RESULTS / f"{name}.json").exists()])
def test_a_committed_study_is_what_its_rows_say(recipe: str) -> None:
    body, text = committed(recipe)
    study = study_of(recipe, budgets_of(recipe, "full")[recipe], read_rows(RESULTS / f"{recipe}.jsonl"))
    about = {key: body.pop(key) for key in ("command", "date", "budget")}
    assert text == "\n\n".join(study_page(study, about)) + "\n"
    assert same(study.as_json(), body)


@pytest.mark.parametrize("name", [name for name in CLAIMS if (RESULTS / f"{name}.json").exists()])
def test_a_committed_claim_is_what_its_rows_say(name: str) -> None:
    """Comparisons, verdict and page again, from the row of each run."""
    body, text = committed(name)
    rows, budgets = read_rows(RESULTS / f"{name}.jsonl"), budgets_of(name, "full")
    studies = {recipe: study_of(recipe, budgets[recipe], rows) for recipe in body["recipes"]}
    again = [c for r in studies for c in compare_pairs(r, CLAIMS[name].trials[r], studies[r].summary)]
    assert same(again, body["comparisons"])
    assert same({recipe: study.as_json() for recipe, study in studies.items()}, body["recipes"])
    verdicts = judge_each(again, [r for r, v in body["verdicts"].items() if v])
    assert verdicts == body["verdicts"] and in_a_line(verdicts) == body["verdict"]
    assert decisive(again) == body["decides"]
    told = {recipe: CLAIMS[name].trials[recipe] for recipe in body["recipes"]}
    page = claim_page(name, replace(CLAIMS[name], trials=told), studies, again, verdicts, body)
    assert text == "\n\n".join(page) + "\n"
    assert [r for r in told if f"Why not on {r}." in text] == [
        r for r in told if verdicts[r] != "holds" and r in CLAIMS[name].why_not
    ]


def test_the_committed_pages_of_fig2_and_memory_are_what_their_figures_say() -> None:
    for name, page in (("fig2", fig2_page), ("memory", memory_page)):
        body, text = committed(name)
        assert text == "\n\n".join(page(body)) + "\n"
    body, rows = committed("fig2")[0], read_rows(RESULTS / "fig2.jsonl")
    deviations = {label: [row["deviation"] for row in rows if row["variant"] == label] for label in body["summary"]}
    assert same(compare_deviations(deviations), body["comparisons"])


def same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal, up to the rounding of their numbers."""
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == (pytest.approx(b, rel=1e-9, abs=1e-12) if isinstance(b, float) else b)


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
    base = rows["base, 40 steps"]["optical_flow"]
    assert base == {"mean": 2, "half_width": 0, "values": [2, 2], "gaps": [0, 0]}, "once a seed, whatever the labels"
    slow = rows["slow"]["optical_flow"]
    assert (slow["mean"], slow["gaps"]) == (1.25, [-1, -0.5])
    assert slow["half_width"] == pytest.approx(T4 * math.sqrt(0.125) / math.sqrt(2), rel=1e-6)
    criteria = tuple(Criterion("specific", "optical_flow", direction) for direction in ("higher", "closer"))
    trial = Trial(criteria, {}, (("fast", "slow"),))
    higher, closer = compare_pairs("nano-t2v", trial, summary)
    assert higher["values"] == pytest.approx([2.5, 1.5]) and higher["what"] == "fast / slow"
    assert closer["values"] == pytest.approx([0.5, 0.25]) and closer["what"] == "gap of slow - gap of fast"


def test_ours_stand_beside_the_papers_by_label() -> None:
    values = {("DMD+SGTS", 0): evaluation(0, 1.0), ("Phased", 0): evaluation(0, 3.0)}
    trial = Trial((Criterion("specific", "optical_flow", "higher"),), {"DMD+SGTS": DMD_SGTS, "Phased": PHASED}, ())
    made = Claim("", "", "", {"nano-t2v": trial}, paper={"": ("flow",), "base": ("10.26",), "DMD+SGTS": ("3.23",)})
    found = {"nano-t2v": Study("nano-t2v", Budget(1, 64), values, {}, summarise(values))}
    assert beside_paper(made, found).splitlines() == [
        "| | nano-t2v: optical flow, specific ↑ | paper, flow |",
        "|---|---|---|",
        "| base | 2 | 10.26 |",
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
    alike = difference([0.4, 0.7], [0.4, 0.7])
    assert alike["value"] == 0 and alike["low"] is alike["p"] is None and outcome(alike) == "nothing", "no spread, no t"
    assert ratio([0.0, 1.0], [1.0, 0.0])["value"] == pytest.approx(1), "a zero is no error"


@pytest.mark.parametrize(
    ("measure", "scale", "values"),
    [
        (Criterion("", "frechet_features"), "ratio", [4, 1 / 2]),
        (Criterion("", "optical_flow", "higher"), "ratio", [1 / 4, 2]),
        (Criterion("", "optical_flow", "closer"), "difference", [2, -2]),
        (Criterion("", "pairwise_cosine"), "difference", [3, -1]),
        (Criterion("", "class_entropy", "higher"), "difference", [-3, 1]),
        (Criterion("", "pairwise_cosine", "closer"), "difference", [2, -2]),
    ],
)
def test_what_is_compared_follows_the_measures_direction(measure: Criterion, scale: str, values: list[float]) -> None:
    """Above the neutral value where the first cell is better. Of the base's 2, the gaps are 1 and 3, 3 and 1."""
    better = {measure.name: {"values": [1.0, 2.0], "gaps": [-1.0, 3.0]}}
    worse = {measure.name: {"values": [4.0, 1.0], "gaps": [3.0, -1.0]}}
    found = compare(measure, {"a": better, "b": worse}, "a", "b")
    assert (found["scale"], found["values"]) == (scale, pytest.approx(values))


def test_a_gap_through_zero_does_not_decide_which_is_closer() -> None:
    """Gaps of .5 against gaps of about 1, one of which happens to be 0: the seeds' mean difference, no explosion."""
    gaps = {"a": [0.5, -0.5, 0.5], "b": [1.0, -1.25, 0.0]}
    rows = {label: {"optical_flow": {"values": [], "gaps": of_label}} for label, of_label in gaps.items()}
    found = compare(Criterion("", "optical_flow", "closer"), rows, "a", "b")
    assert found["values"] == [0.5, 0.75, -0.5] and found["value"] == pytest.approx(0.25)
    assert outcome(found) == "nothing"


def test_a_distance_below_the_bases_own_to_itself_counts_as_that() -> None:
    """Debiased, the base reads as .1 and -.2 from itself: a distance of .001 is none that differs from .05."""
    values = {"base, 40 steps": [0.1, -0.2], "a": [0.001, 0.4], "b": [0.05, 0.8]}
    rows = {
        label: {name: {"values": of_label, "gaps": []} for name in ("frechet_features", "distance_to_nearest_mode")}
        for label, of_label in values.items()
    }
    assert compare(Criterion("", "frechet_features"), rows, "a", "b")["values"] == pytest.approx([1, 2])
    plain = compare(Criterion("", "distance_to_nearest_mode"), rows, "a", "b")["values"]
    assert plain == pytest.approx([50, 2]), "which the base's own law does not have as 0"


def test_as_many_seeds_tell_the_effect_that_they_are_said_to_in_four_of_five_cases() -> None:
    """5,000 draws of five seeds that truly differ by what is stated of a spread of 1."""
    rng = torch.Generator().manual_seed(0)
    five = math.sqrt(5)
    effect = (student_t.ppf(0.975, 4) + student_t.ppf(0.8, 4)) / five
    found = [difference((effect + torch.randn(5, generator=rng)).tolist(), [0.0] * 5) for _ in range(5000)]
    assert sum(c["low"] > 0 for c in found) / 5000 == pytest.approx(0.8, abs=0.03)
    spread = difference([1.0, 2.0, 3.0], [0.0] * 3)
    assert spread["detectable"] == pytest.approx((T2 + student_t.ppf(0.8, 2)) / math.sqrt(3), rel=1e-6)


def comparison(low: float | None, high: float | None = 9.0, scale: str = "ratio") -> dict[str, Any]:
    """One of a claim's, sure of what it shows."""
    p = None if low is None else 0.001 if low > (scale == "ratio") else 0.5
    return {"recipe": "nano-t2i", "low": low, "high": high, "scale": scale, "p": p, "values": [0]}


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
        ([CLAIMED, {**UNDECIDED, "low": None, "high": None, "p": None, "values": [0, 0]}], "holds partly"),
        ([CLAIMED] + [UNDECIDED] * 23, "holds partly"),  # .025 / 24 = .00104
        ([CLAIMED] + [UNDECIDED] * 24, "does not hold"),
        ([CLAIMED] * 3 + [REVERSED] * 2, "mixed"),
        ([CLAIMED] + [REVERSED] * 3, "mixed"),
        ([{**CLAIMED, "p": 0.0126}, REVERSED], "does not hold"),
        ([REVERSED] * 2, "does not hold"),
        ([UNDECIDED] * 2, "does not hold"),
        ([CLAIMED, comparison(None, None)], None),
        ([], None),
    ],
)
def test_a_claim_holds_partly_where_one_is_sure_and_is_mixed_where_others_are_reversed(
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
    text = verdict_part({"nano-t2i": judge(comparisons)}, comparisons, ABOUT)
    assert f"| nano-t2i, single digits | **{judge(comparisons)}** | {counts} |" in text
    first = {**comparisons[0], "measure": "contrast", "what": "a / b", "value": 1.0}
    assert decisive([first, *comparisons[1:]]).endswith(f"; {counts}")


def test_each_recipe_has_a_verdict_of_its_own() -> None:
    comparisons = [CLAIMED, {**REVERSED, "recipe": "toy-2d"}, {**CLAIMED, "recipe": "scenes-t2i"}]
    verdicts = judge_each(comparisons, ["nano-t2i", "toy-2d"])
    assert verdicts == {"nano-t2i": "holds", "toy-2d": "does not hold", "scenes-t2i": None}
    assert in_a_line(verdicts) == "nano-t2i: holds; toy-2d: does not hold" and in_a_line({"toy-2d": None}) is None
    text = verdict_part(verdicts, comparisons, ABOUT)
    assert "| toy-2d, an exact mixture | **does not hold** | 0 as claimed, 1 reversed, 0 undecided |" in text
    assert "| scenes-t2i, scenes of several coloured digits | none | 1 as claimed, 0 reversed, 0 undecided |" in text


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
        {"scale": "difference", "value": 0.0123, "low": -0.001, "high": 0.0256, "detectable": 0.0143},
        {"scale": "ratio", "value": 15.21, "low": 0.0312, "high": 7412.3, "detectable": 512.3},
    )
    lines = comparison_table([about | row for row in rows]).splitlines()[2:]
    assert [line.split(" | x | ")[1] for line in lines] == [
        "0.0123 | −0.0010 to 0.0256 | 0.0143 | nothing |",
        "15.2 | 0.0312 to 7,412 | 512 | nothing |",
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
    assert outcome(found) == text


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


def test_plain_dmd_saves_four_steps_and_a_phase_saves_one(tmp_path: Path) -> None:
    def saved(steps: int, method: Literal["dmd", "phased"]) -> list[int]:
        return update_bytes(resolve("nano-t2i", {"plan.steps": steps, "batch_size": 2}, method))

    plain, phased = {steps: saved(steps, "dmd")[0] for steps in (1, 4)}, {4: saved(4, "phased")}
    assert plain[4] == pytest.approx(4 * plain[1], rel=0.1)
    assert len(phased[4]) == 4 and phased[4] == pytest.approx([plain[1]] * 4, rel=0.1)
    text = write_memory(tmp_path, ABOUT, plain, phased).read_text()
    assert "Verdict: **holds**" in text and f"| 1 | {plain[1] / 2**20:.1f} MiB (1.00) | the same |" in text


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
        float((trajectories(fit_subinterval(exact, 0.5, target, 0, 250, 64), noise, schedule) - truth).abs().mean())
        for target in (subinterval_target, biased_target)
    )
    assert unbiased < 0.02
    assert biased > 5 * unbiased


def test_the_verdict_on_fig2_asks_for_the_biased_to_differ_and_the_unbiased_not_to() -> None:
    alike = {FULL_INTERVAL: [1.0, 1.1], UNBIASED: [1.1, 1.2], BIASED: [20.0, 22.0]}
    assert judge(compare_deviations(alike)) == "holds"
    assert judge(compare_deviations({**alike, UNBIASED: [3.0, 3.3]})) != "holds"
    assert judge(compare_deviations({**alike, BIASED: [1.0, 1.1]})) != "holds"


def test_a_comparisons_p_is_that_of_its_interval() -> None:
    """At p = .025 the interval's end lies at the neutral value; seeds that do not differ tell nothing."""
    values = [0.1, 0.4, 0.7]
    found = difference(values, [0.0] * 3)
    assert found["p"] == pytest.approx(ttest_1samp(values, 0, alternative="greater").pvalue)
    moved = difference([v - found["low"] for v in values], [0.0] * 3)
    assert moved["low"] == pytest.approx(0, abs=1e-12) and moved["p"] == pytest.approx(0.025)
    assert ratio([2.0, 4.0], [1.0, 2.0])["p"] is difference([0.0] * 2, [1.0] * 2)["p"] is None
    assert difference([1.0], [0.0])["p"] is None


def test_fig2_writes_its_rows_table_and_picture(tmp_path: Path) -> None:
    """One seed has neither an interval nor a verdict, two have both."""
    text = fig2([0], tmp_path, ABOUT, full=False, steps=5, hidden=8).read_text()
    assert "subinterval, biased" in text and "`COMMAND`" in text and "No verdict" in text
    assert (tmp_path / "fig2.png").stat().st_size > 10_000
    body, rows = json.loads((tmp_path / "fig2.json").read_text()), read_rows(tmp_path / "fig2.jsonl")
    assert [row["name"] for row in rows] == ["full-interval-Eq-4-0", "subinterval-unbiased-0", "subinterval-biased-0"]
    assert body["verdict"] is None and body["summary"][BIASED]["values"] == [rows[2]["deviation"]]
    text = fig2([0, 1], tmp_path, ABOUT, full=True, steps=5, hidden=8).read_text()
    verdict = json.loads((tmp_path / "fig2.json").read_text())["verdicts"]["four points"]
    assert f"| four points, an exact mixture | **{verdict}** |" in text
