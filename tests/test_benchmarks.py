"""What the benchmarks say of curves, without running any."""

import math

import pytest
from contests import CONTESTS
from cost import forwards, reach, smoothed

from phased_dmd.recipes import resolve


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
