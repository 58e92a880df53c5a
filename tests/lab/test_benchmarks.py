"""What the benchmarks say of curves, without running any."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cost_page
import health
import health_share
import performance
import pytest
from contests import CONTESTS, FAST, PAPER, key
from cost import UNITS, comparisons, cpu_seconds, forwards, likely, no_worse, pairs, race, reach, smoothed

from phased_dmd import step
from phased_dmd.lab.reproduce.claim import Budget, Criterion
from phased_dmd.lab.reproduce.study import Study, plan_runs
from phased_dmd.recipes import resolve

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "performance"


def test_a_rise_is_averaged_with_what_it_rises_from() -> None:
    assert smoothed([8, 4, 2, 3, 1]) == [8, 4, 2.5, 2.5, 1]
    assert smoothed([1, 2, 3]) == [2, 2, 2]


def test_a_target_is_reached_on_the_line_between_two_budgets() -> None:
    assert reach([100, 400], [3, 1], 2) == pytest.approx(200)  # half way in the logarithm
    assert reach([100, 200, 400], [4, 2, 1], 2) == 200
    assert reach([100, 200, 400], [4, 1, 3], 2) == 200, "the mean of a fall and a rise back is what is kept"
    assert reach([100, 200, 400], [4, 1, 3.5], 2) is None, "passed by chance, and not kept"
    assert reach([100, 200], [2, 1], 3) == 100, "at the least budget already"


def test_a_schedules_own_best_costs_the_least_budget_from_which_it_is_kept() -> None:
    costs, values = [1, 2, 4, 8], [5, 2, 1.5, 2.5]
    assert reach(costs, values, smoothed(values)[-1]) == 2


def curve(measure: Criterion, calls: list[float], values: list[list[float]]) -> list[dict[str, Any]]:
    """Points of a side, the values by seed."""
    cells = [{key(measure): {"values": by_seed}} for by_seed in values]
    return [{"calls": c, "cpu_seconds": 2 * c, "values": v} for c, v in zip(calls, cells, strict=True)]


def test_a_race_is_decided_by_the_seeds_and_measures_it_names() -> None:
    """Both reach the paper's best of seed 0 at once, fast that of seed 1 never."""
    measure, other = Criterion("a", "b"), Criterion("a", "c")
    curves = {
        PAPER: curve(measure, [100, 200], [[2, 2], [1, 1]]), FAST: curve(measure, [10, 20], [[1, 9], [1, 5]]),
    }  # fmt: skip
    first = race(curves, [measure], [0])
    assert first["targets"] == {"a/b": 1} and first["reached"][FAST] == {"calls": 10, "cpu_seconds": 20}
    assert first["ratios"] == {"calls": 20, "cpu_seconds": 20}
    assert race(curves, [measure], [1])["ratios"] == race(curves, [measure], [0, 1])["ratios"] == dict.fromkeys(UNITS)
    for side, values in ((PAPER, [[4, 4], [3, 3]]), (FAST, [[5, 5], [3, 3]])):
        for point, more in zip(curves[side], curve(other, [0, 0], values), strict=True):
            point["values"] |= more["values"]
    both = race(curves, [measure, other], [0])
    assert both["targets"] == {"a/b": 1, "a/c": 3} and both["reached"][FAST]["calls"] == 20, "the slower of the two"


def test_a_race_over_draws_of_its_seeds_shows_what_a_seed_decides() -> None:
    """Three times fewer calls by seed 0, more than the ladder has by seed 1: half of the draws of one are of each."""
    measure = Criterion("a", "b")
    curves = {
        PAPER: curve(measure, [100, 300], [[2, 2], [1, 1]]), FAST: curve(measure, [10, 100], [[3, 9], [1, 5]]),
    }  # fmt: skip
    for seed, middle in ((0, [3, 3]), (1, None)):
        assert likely(curves, [measure], [seed]) == {
            "reached_in": dict.fromkeys(UNITS, middle is not None), "middle": dict.fromkeys(UNITS, middle),
            "twice": dict.fromkeys(UNITS, middle is not None),
        }  # fmt: skip
    found = likely(curves, [measure], [0, 1])
    assert found["middle"]["calls"] == [3, 3]
    assert found["reached_in"]["calls"] == found["twice"]["calls"]
    assert found["twice"]["calls"] == pytest.approx(1 / 4, abs=0.05), "where both draws are of seed 0"
    races = [race(curves, [measure], which) | likely(curves, [measure], which) for which in ([0], [1])]
    lines = cost_page.verdict({"tuned": {"a": 2}, "seeds": [3, 4], "races": races, "curves": curves})
    cell = "**3 (3 to 3)**"
    assert lines[-2:] == [
        f"| **a/b** | **1** | **300** | **100** | **100.0%** | {cell} | {cell} | **100%** |",
        "| a/b | 1 | 300 | more than 100 | 0.0% | - | - | 0% |",
    ]


def test_each_of_the_papers_budgets_is_paired_with_the_largest_of_half_its_calls() -> None:
    measure = Criterion("a", "b")
    curves = {
        PAPER: curve(measure, [100, 200, 300], [[1]] * 3), FAST: curve(measure, [60, 90, 100, 130], [[1]] * 4),
    }  # fmt: skip
    assert [(fast["calls"], paper["calls"]) for fast, paper in pairs(curves)] == [(100, 200), (130, 300)]


def test_a_loss_is_told_over_all_pairs_that_no_single_one_shows() -> None:
    """In each of three pairs another seed has twice the divergence."""
    b, c = "distance_to_nearest_mode", "pairwise_cosine"
    contest = replace(CONTESTS[0], measures=(Criterion("a", b),), diversity=(Criterion("a", c, "closer"),))
    count = range(3)
    paper = {f"paper {i}": {b: {"values": [1.0] * 3}, c: {"values": [], "gaps": [0.3, 0.31, 0.29]}} for i in count}
    fast = {
        f"fast {j}": {b: {"values": [2.0 if i == j else 1.1 + 0.01 * i for i in count]},
                      c: {"values": [], "gaps": [-0.2] * 3}}
        for j in count
    }  # fmt: skip
    studies = {side: Study("", Budget(3, 1), {}, {}, {"a": rows}) for side, rows in ((PAPER, paper), (FAST, fast))}
    worse, closer = comparisons(contest, studies, [({"label": f"fast {i}"}, {"label": f"paper {i}"}) for i in count])
    assert worse["shows"] == "the reverse" and {c["shows"] for c in worse["each"].values()} == {"nothing"}
    assert worse["value"] == pytest.approx((2 * 1.11 * 1.11) ** (-1 / 3), abs=1e-3) and not worse["no_worse"]
    assert closer["value"] == pytest.approx(0.1) and closer["shows"] == "as claimed" and closer["no_worse"]


def test_no_worse_means_that_the_whole_interval_is_better_than_the_margin() -> None:
    for scale, low, margin, expected in (
        ("ratio", 0.81, 1.25, True), ("ratio", 0.79, 1.25, False), ("difference", -0.009, 0.01, True),
        ("difference", -0.011, 0.01, False), ("ratio", None, 1.25, False),
    ):  # fmt: skip
        assert no_worse({"scale": scale, "low": low}, margin) is expected


def test_health_is_a_share_of_the_iterations(tmp_path: Path) -> None:
    """Of all figures slowed to a tenth of a second of work each, nearly the whole."""
    quick = {"iterations": 4, "batch_size": 4, "log_every": 2, "sample_every": None, "teacher.fit_steps": 2}
    config = resolve("toy-1d", quick)
    assert 0 < health_share.health_share(config, tmp_path / "run") < 0.5

    def slow(of_each: Any) -> Any:
        began = time.process_time()
        while time.process_time() - began < 0.1:
            pass
        return of_each

    with pytest.MonkeyPatch.context() as patch:
        thirds = step.thirds
        patch.setattr(step, "thirds", lambda batch, of_each: thirds(batch, slow(of_each)))
        assert health_share.health_share(config, tmp_path / "slow") > 0.5


def test_the_committed_page_is_what_its_figures_say() -> None:
    figures = json.loads(RESULTS.with_suffix(".json").read_text())
    assert performance.page(figures) == RESULTS.with_suffix(".md").read_text()
    assert performance.keys(figures["parts"]).items() <= figures.items()


def test_a_killed_runs_seconds_count_each_iteration_once(tmp_path: Path) -> None:
    rows = [(1, 5, 1.0), (1, 10, 2.0), (1, 10, 2.5), (2, 5, 4.0)]
    lines = [json.dumps({"phase": p, "iteration": i, "cpu_seconds": s}) for p, i, s in rows]
    (tmp_path / "timing.jsonl").write_text("\n".join(lines) + "\n")
    assert cpu_seconds(tmp_path) == 1 + 2.5 + 4


@pytest.mark.parametrize("contest", CONTESTS, ids=lambda contest: contest.recipe)
def test_fast_makes_at_most_half_of_the_calls_an_iteration(contest) -> None:
    paper, fast = (resolve(name, {"iterations": 100}) for name in (contest.recipe, f"{contest.recipe}-fast"))
    assert forwards(paper) / forwards(fast) > 2
    assert fast.plan == paper.plan and fast.teacher == paper.teacher and fast.batch_size == paper.batch_size


@pytest.mark.parametrize("contest", CONTESTS, ids=lambda contest: contest.recipe)
def test_every_lever_makes_a_config_of_its_own(contest) -> None:
    variants, recipe = contest.lever_variants().values(), contest.name(contest.levers_of)
    made = [resolve(recipe, variant.overrides) for variant in variants]
    assert len({config.model_dump_json() for config in made}) == len(made)
    assert math.isfinite(sum(map(forwards, made)))


@pytest.mark.parametrize("contest", CONTESTS, ids=lambda contest: contest.recipe)
def test_what_decides_are_the_seeds_of_the_contest(contest, tmp_path: Path) -> None:
    budget = Budget(len(contest.seeds), contest.samples, first=contest.seeds.start)
    asked = plan_runs(contest.recipe, contest.variants(PAPER), budget, tmp_path)
    assert {run.config.seed for run in asked.values()} == set(contest.seeds)


def test_a_spoilt_run_is_named_rightly_by_a_right_cause_first_and_before_half_of_it() -> None:
    def right(kind: str, **named: float) -> bool:
        causes = {name.replace("_", " "): share for name, share in named.items()}
        return health.is_right({"kind": kind, "named": causes})

    assert right("as it is") and not right("as it is", shift=0.1)
    assert right("fake.lr x 10", fake_rate=0.4, generator_rate=0.5) and not right("fake.lr x 10")
    assert not right("fake.lr x 10", fake_rate=0.6) and not right("fake.lr x 10", fake_rate=0.4, target=0.1)
    assert right("both rates x 10", generator_rate=0.1) and right(health.BIASED, target=0.2)


def test_what_a_run_is_spoilt_with_is_a_multiple_of_its_recipes_own() -> None:
    for recipe in health.RECIPES:
        own = health.config_of(recipe, "as it is", 7)
        assert health.config_of(recipe, "guidance x 3", 7).teacher.guidance == tuple(  # type: ignore[union-attr]
            3 * g
            for g in own.teacher.guidance  # type: ignore[union-attr]
        )
        assert health.config_of(recipe, "both rates x 10", 7).fake.lr == pytest.approx(10 * own.fake.lr)
        assert health.config_of(recipe, health.BIASED, 7).ablation.target == "biased" and own.seed == 7


def test_the_verdicts_page_counts_runs_by_kind_and_cause() -> None:
    rows = [
        {"kind": "as it is", "named": {}}, {"kind": "as it is", "named": {"shift": 0.1}},
        {"kind": "fake.lr x 10", "named": {"fake rate": 0.1}}, {"kind": "fake.lr x 10", "named": {}},
    ]  # fmt: skip
    text = health.page(rows, [7])
    assert "Spoilt: 1 of 2 named rightly" in text and "Good: 1 of 2 left alone" in text
    assert "| as it is | 2 | 1 |  |  |  |  |  |  |  | 1 |" in text
    assert "| fake.lr x 10 | 2 | 1 |  |  |  | **1** |  |  |  |  |" in text
