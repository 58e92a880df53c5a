"""The phase plan: the published grids, who runs which step, and the path of a rollout."""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phased_dmd.maths.phases import NEAR, Expert, Hop, PhasePlan, RenoiseInterval, shift_time, step_times, unshift_time
from phased_dmd.maths.schedules import renoise_times

WAN = (1.0, 15 / 16, 5 / 6, 5 / 8)  # raw 1, 3/4, 1/2, 1/4 through t = 5u / (1 + 4u)


@given(u=st.floats(0, 1), shift=st.floats(0.1, 20))
@settings(max_examples=100, deadline=None)
def test_shift_and_unshift_are_inverse(u, shift):
    t = shift_time(u, shift)
    assert 0 <= t <= 1 + 1e-15
    assert unshift_time(t, shift) == pytest.approx(u, abs=1e-13)


@pytest.mark.parametrize(
    ("shift", "published"),
    [
        pytest.param(5.0, (1000, 938, 833, 625), id="Wan"),
        pytest.param(3.0, (1000, 900, 750, 500), id="Qwen-Image"),
        pytest.param(1.0, (1000, 750, 500, 250), id="unshifted"),
    ],
)
def test_published_grids(shift, published):
    """The grids of the paper's final version, in thousandths, rounded half up."""
    times = step_times(4, shift)
    assert tuple(math.floor(1000 * t + 0.5) for t in times[:-1]) == published
    assert times[0] == 1.0 and times[-1] == 0.0


@pytest.mark.parametrize(("shift", "boundary"), [(5.0, 0.8333), (3.0, 0.75)])
def test_published_boundary_of_two_phases(shift, boundary):
    """The end of the first of two phases: .8333 for Wan, .75 for Qwen-Image."""
    plan = PhasePlan.even(steps=4, phases=2, shift=shift)
    assert plan.end(1) == pytest.approx(boundary, abs=5e-5)
    assert plan.begin(2) == plan.end(1)


def test_a_plan_made_without_arguments_is_the_papers_for_wan():
    """Four steps at shift 5 from pure noise in two phases, for one network."""
    plan = PhasePlan.even()
    assert plan == PhasePlan((*step_times(4, 5.0)[:4], 0.0), (0, 2), ())
    assert plan.times == pytest.approx((*WAN, 0.0)) and plan.times[0] == 1


@pytest.mark.parametrize("start", [1.0, 0.98, 0.5])
def test_grid_is_even_in_raw_time_from_the_start(start):
    times = step_times(5, 5.0, start)
    raw = [t / (5 - 4 * t) for t in times]
    assert times[0] == start
    assert raw == pytest.approx([raw[0] * (1 - i / 5) for i in range(6)], abs=1e-15)


@pytest.mark.parametrize(
    ("phases", "switches", "experts", "fakes"),
    [
        pytest.param(1, (), [(1, 0)] * 4, [(0,)], id="one network, one phase"),
        pytest.param(4, (), [(1, 0), (2, 0), (3, 0), (4, 0)], [(0,)] * 4, id="one network, a phase a step"),
        pytest.param(1, (0.875,), [(1, 0), (1, 0), (1, 1), (1, 1)], [(0, 1)], id="Wan2.2, one phase, two experts"),
        pytest.param(2, (0.875,), [(1, 0), (1, 0), (2, 1), (2, 1)], [(0, 1), (0, 1)], id="Wan2.2 T2V, two phases"),
        pytest.param(2, (0.9,), [(1, 0), (1, 0), (2, 1), (2, 1)], [(0, 1), (0, 1)], id="Wan2.2 I2V, two phases"),
        pytest.param(
            4, (0.875,), [(1, 0), (2, 0), (3, 1), (4, 1)], [(0,), (0, 1), (0, 1), (0, 1)], id="Wan2.2, four phases"
        ),
        pytest.param(
            4,
            (0.95, 0.7),
            [(1, 0), (2, 1), (3, 1), (4, 2)],
            [(0, 1), (0, 1), (0, 1, 2), (0, 1, 2)],
            id="three networks",
        ),
    ],
)
def test_step_to_expert_to_network(phases, switches, experts, fakes):
    """Shift 5, t = 1, .9375, .8333, .625. A fake for each network whose range meets (s_k, 1)."""
    plan = PhasePlan.even(steps=4, phases=phases, shift=5.0, switches=switches)
    assert plan.times[:-1] == pytest.approx(WAN)
    assert [plan.expert(step) for step in range(4)] == [Expert(*expert) for expert in experts]
    assert [plan.fakes(phase) for phase in range(1, phases + 1)] == fakes
    trained = [expert for phase in range(1, phases + 1) for expert in plan.experts(phase)]
    assert trained == sorted({Expert(*expert) for expert in experts})


def test_network_at_the_switch_is_the_noisier_one():
    plan = PhasePlan.even(steps=4, phases=2, switches=(0.875, 0.5))
    times = (1.0, 0.875, 0.875 - NEAR, 0.87499, 0.5, 0.49999, 0.0)
    assert [plan.network(t) for t in times] == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("steps", [20, 40, 50])
def test_a_grid_point_that_rounding_moved_below_the_switch_is_still_the_noisier_ones(steps):
    """Shift 3 has the point .7 -> .875, as .8749999999999999; a stock pipeline's UniPC is told whole timesteps, 875."""
    from diffusers import UniPCMultistepScheduler

    plan = PhasePlan.even(steps=steps, phases=steps, shift=3.0, switches=(0.875,))
    at = min(range(steps), key=lambda step: abs(plan.times[step] - 0.875))
    assert 0 < 0.875 - plan.times[at] < 1e-15
    stock = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    stock.set_timesteps(steps)
    assert [plan.expert(step).network for step in range(steps)] == [int(t < 875) for t in stock.timesteps]
    assert plan.expert(at) == Expert(at + 1, 0) and plan.floor(at + 1) == 0.875
    assert plan.fakes(at) == (0,)  # that phase ends at the switch, so that its times are the noisier network's


def test_a_phase_that_ends_at_the_switch_needs_no_fake_beyond_it():
    """Switch .75 = boundary of Qwen's grid: t is drawn from (.75, 1], which the noisier network serves alone."""
    plan = PhasePlan.even(steps=4, phases=2, shift=3.0, switches=(0.75,))
    assert plan.end(1) == 0.75
    assert plan.fakes(1) == (0,)
    assert plan.fakes(2) == (0, 1)
    assert plan.experts(1) == (Expert(1, 0),)
    assert plan.experts(2) == (Expert(2, 0), Expert(2, 1))
    rounded = PhasePlan(plan.times, plan.starts, switches=(math.nextafter(0.75, 1),))
    assert rounded.fakes(1) == (0,)  # nor where boundary and switch differ by rounding


def test_a_plan_that_starts_below_the_switch_uses_the_second_network_only():
    plan = PhasePlan.even(steps=2, phases=2, shift=1.0, start=0.8, switches=(0.875,))
    assert plan.fakes(1) == plan.fakes(2) == (1,)
    assert plan.expert(0) == Expert(1, 1)


def test_fakes_follow_the_renoise_times_that_are_given():
    """Phase 1 of shift 5 ends at .8333, under the switch at .875: bounded by the switch, it needs one fake."""
    plan = PhasePlan.even(steps=4, phases=2, shift=5.0, switches=(0.875, 0.5))
    assert plan.fakes(1) == (0, 1)
    assert plan.fakes(1, (0.875, 1.0)) == (0,)
    assert plan.fakes(1, (math.nextafter(0.875, 0), 1.0)) == (0,)
    assert plan.fakes(1, (0.87499, 1.0)) == (0, 1)
    assert plan.fakes(2, (0.02, 0.8333)) == (1, 2)  # disjoint
    for t, network in ((0.9, 0), (0.875, 0), (0.87499, 1), (0.5, 1), (0.1, 2)):
        assert plan.fakes(2, (t, t)) == (network,)  # one t for all


@pytest.mark.parametrize(
    ("phases", "shift", "floors"),
    [
        pytest.param(1, 5.0, [0], id="one phase runs both networks"),
        pytest.param(2, 5.0, [0.875, 0], id="the paper's two phases"),
        pytest.param(4, 5.0, [0.875, 0.875, 0, 0], id="four phases, two on each network"),
        pytest.param(4, 7.0, [0.875, 0.875, 0.875, 0], id="a step that starts at the switch is above it"),
        pytest.param(4, 1.0, [0.875, 0, 0, 0], id="only the first step is above the switch"),
    ],
)
def test_the_floor_is_the_switch_below_a_phases_last_step(phases, shift, floors):
    plan = PhasePlan.even(steps=4, phases=phases, shift=shift, switches=(0.875,))
    assert [plan.floor(phase) for phase in range(1, phases + 1)] == floors
    without = PhasePlan.even(steps=4, phases=phases, shift=shift)
    assert {without.floor(phase) for phase in range(1, phases + 1)} == {0}


def test_the_floor_among_three_networks():
    """Shift 5: 1 | .9375 | .8333 | .625, switches .95 and .7: the networks 0, 1, 1, 2."""
    plan = PhasePlan.even(steps=4, phases=4, shift=5.0, switches=(0.95, 0.7))
    assert [plan.floor(phase) for phase in (1, 2, 3, 4)] == [0.95, 0.7, 0.7, 0]


def test_switch_and_boundary_are_two_things():
    """Moving the teacher's switch moves no boundary, and the other way round."""
    without, switched = PhasePlan.even(4, 2), PhasePlan.even(4, 2, switches=(0.875,))
    assert [without.end(k) for k in (1, 2)] == [switched.end(k) for k in (1, 2)] == [WAN[2], 0.0]
    assert [PhasePlan.even(4, k, switches=(0.875,)).network(0.9) for k in (1, 2, 4)] == [0, 0, 0]


@given(steps=st.integers(1, 8), phases=st.integers(1, 8), shift=st.floats(0.5, 10), start=st.floats(0.5, 1))
@settings(max_examples=60, deadline=None)
def test_phases_partition_the_steps_and_paths_chain(steps, phases, shift, start):
    if steps % phases:
        with pytest.raises(ValueError, match="equal phases"):
            PhasePlan.even(steps, phases, shift, start)
        return
    plan = PhasePlan.even(steps, phases, shift, start)
    owned = [step for phase in range(1, phases + 1) for step in plan.steps(phase)]
    assert owned == list(range(steps))
    assert {len(plan.steps(phase)) for phase in range(1, phases + 1)} == {steps // phases}
    for phase in range(1, phases + 1):
        assert all(plan.expert(step).phase == phase for step in plan.steps(phase))
        for exit_step in (None, *plan.steps(phase)):
            path = plan.path(phase, exit_step)
            assert path[0].t == start and path[-1].r == plan.end(phase)
            assert all(a.r == b.t for a, b in zip(path, path[1:], strict=False))
            assert [hop.step for hop in path] == list(range(len(path)))


def test_path_stops_at_the_phase_end_or_jumps_there():
    """SGTS: the exit step goes straight to the boundary; without one every step of the phase is run."""
    plan = PhasePlan.even(steps=4, phases=2, shift=3.0)
    assert plan.path(1) == (Hop(0, 1.0, 0.9), Hop(1, 0.9, 0.75))
    assert plan.path(1, exit_step=0) == (Hop(0, 1.0, 0.75),)
    assert plan.path(1, exit_step=1) == plan.path(1)
    assert plan.path(2, exit_step=2) == (*plan.path(1), Hop(2, 0.75, 0.0))
    assert plan.path(2) == plan.path(2, exit_step=3) == (*plan.path(1), Hop(2, 0.75, 0.5), Hop(3, 0.5, 0.0))


@pytest.mark.parametrize(("phase", "exit_step"), [(1, 2), (2, 1), (2, 4)])
def test_exit_step_must_be_of_the_phase(phase, exit_step):
    plan = PhasePlan.even(steps=4, phases=2)
    message = re.escape(f"step {exit_step} is not one of phase {phase}: {plan.steps(phase)}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        plan.path(phase, exit_step)


def test_uneven_phases():
    plan = PhasePlan((1.0, 0.9, 0.5, 0.0), starts=(0, 1))
    assert [plan.num_steps, plan.num_phases] == [3, 2]
    assert [list(plan.steps(1)), list(plan.steps(2))] == [[0], [1, 2]]
    assert [(plan.begin(k), plan.end(k)) for k in (1, 2)] == [(1.0, 0.9), (0.9, 0.0)]


@pytest.mark.parametrize(
    ("times", "starts", "switches", "message"),
    [
        ((0.0,), (0,), (), "the times must decrease strictly, got (0.0,)"),
        ((1.0, 0.5, 0.5, 0.0), (0,), (), "the times must decrease strictly, got (1.0, 0.5, 0.5, 0.0)"),
        ((1.0, 0.5, 0.6, 0.0), (0,), (), "the times must decrease strictly, got (1.0, 0.5, 0.6, 0.0)"),
        ((1.1, 0.5, 0.0), (0,), (), "the times must lie in [0, 1] and end at 0, got (1.1, 0.5, 0.0)"),
        ((1.0, 0.5), (0,), (), "the times must lie in [0, 1] and end at 0, got (1.0, 0.5)"),
        ((1.0, 0.5, 0.0), (), (), "phases must start at 0, rise, and hold a step each; got () of 2 steps"),
        ((1.0, 0.5, 0.0), (1,), (), "phases must start at 0, rise, and hold a step each; got (1,) of 2 steps"),
        ((1.0, 0.5, 0.0), (0, 0), (), "phases must start at 0, rise, and hold a step each; got (0, 0) of 2 steps"),
        ((1.0, 0.5, 0.0), (0, 2), (), "phases must start at 0, rise, and hold a step each; got (0, 2) of 2 steps"),
        ((1.0, 0.5, 0.0), (0,), (1.0,), "switches must decrease inside (0, 1), got (1.0,)"),
        ((1.0, 0.5, 0.0), (0,), (0.0,), "switches must decrease inside (0, 1), got (0.0,)"),
        ((1.0, 0.5, 0.0), (0,), (0.5, 0.7), "switches must decrease inside (0, 1), got (0.5, 0.7)"),
        ((1.0, 0.5, 0.0), (0,), (0.5, 0.5), "switches must decrease inside (0, 1), got (0.5, 0.5)"),
    ],
)
def test_impossible_plans_are_refused(times, starts, switches, message):
    with pytest.raises(ValueError, match=f"^plan: {re.escape(message)}$"):
        PhasePlan(times, starts, switches)


@pytest.mark.parametrize(("steps", "phases"), [(4, 3), (0, 1), (4, 0), (2, 4)])
def test_steps_must_divide_into_phases(steps, phases):
    message = f"plan.phases: {steps} steps cannot be split into {phases} equal phases"
    with pytest.raises(ValueError, match=f"^{message}$"):
        PhasePlan.even(steps, phases)


# ---------------------------------------------------------------- where re-noise times lie

GRID = PhasePlan.even(4, 4, 5.0, switches=(0.875,))  # times 1, 15/16, 5/6, 5/8, 0; the switch lies within phase 2


@pytest.mark.parametrize(
    ("phase", "where", "above_switch", "expected"),
    [
        (1, "nested", None, (15 / 16, 1.0, 0.0)),
        (2, "nested", None, (5 / 6, 1.0, 0.0)),
        (4, "nested", None, (0.02, 1.0, 0.0)),
        (2, "disjoint", None, (5 / 6, 15 / 16, 0.0)),
        (4, "disjoint", None, (0.02, 5 / 8, 0.0)),
        (2, "nested", "clamp", (5 / 6, 1.0, 0.875)),
        (2, "nested", "truncate", (0.875, 1.0, 0.0)),
        (2, "disjoint", "truncate", (0.875, 15 / 16, 0.0)),
        (1, "nested", "truncate", (15 / 16, 1.0, 0.0)),
        (3, "nested", "clamp", (5 / 8, 1.0, 0.0)),  # its step runs on the last network, which ends at 0
        (4, "nested", "truncate", (0.02, 1.0, 0.0)),
        (2, 0.9, None, (0.9, 0.9, 0.0)),
        (2, 0.85, "clamp", (0.85, 0.85, 0.0)),  # one time is bounded by no switch
        (1, 1.0, None, (1.0, 1.0, 0.0)),  # t_0 itself is inside
        (4, 1e-3, None, (1e-3, 1e-3, 0.0)),
    ],
)
def test_where_the_re_noise_times_of_a_phase_lie(phase: int, where: Any, above_switch: Any, expected: Any) -> None:
    found = RenoiseInterval.of(GRID, phase, where, above_switch)
    assert (found.low, found.high, found.floor) == pytest.approx(expected, abs=1e-12)
    assert found.support == pytest.approx((max(expected[0], expected[2]), expected[1]), abs=1e-12)


def test_without_a_switch_a_bound_by_it_does_nothing() -> None:
    plain = PhasePlan.even(4, 2, 5.0)
    for phase in (1, 2):
        free = RenoiseInterval.of(plain, phase, "nested", None)
        assert RenoiseInterval.of(plain, phase, "nested", "clamp") == free
        assert RenoiseInterval.of(plain, phase, "nested", "truncate") == free


@pytest.mark.parametrize("where", [5 / 6, 0.5, 1.01])
def test_one_time_outside_of_a_phase_is_refused(where: float) -> None:
    """The phase's end is outside, t_0 is not."""
    with pytest.raises(
        ValueError, match=rf"^ablation\.renoise: {re.escape(f'{where:g}')} is outside \(0\.833333, 1\] of phase 2$"
    ):
        RenoiseInterval.of(GRID, 2, where, None)


def test_an_interval_that_the_switch_leaves_nothing_of_is_refused() -> None:
    """The phase begins at the very time of the switch, which bounds it from below."""
    plan = PhasePlan((1.0, 0.9, 0.0), (0, 1), (0.9,))
    with pytest.raises(
        ValueError, match=r"^renoise: no time of phase 2 is left below 0\.9 at or above the switch 0\.9$"
    ):
        RenoiseInterval.of(plan, 2, "disjoint", "truncate")
    assert RenoiseInterval.of(plan, 2, "disjoint", "clamp") == RenoiseInterval(0.02, 0.9, 0.9)


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize(
    ("interval", "cuts"),
    [
        (RenoiseInterval(0.02, 1.0), [0.9, 0.4]),
        (RenoiseInterval(0.5, 1.0), [0.9]),
        (RenoiseInterval(0.9, 1.0), []),
        (RenoiseInterval(0.02, 0.9), [0.4]),
        (RenoiseInterval(0.3, 0.95, 0.4), [0.9]),  # what is below .4 is moved up to it, to the range above
        (RenoiseInterval(0.3, 0.95, 0.6), [0.9]),
    ],
)
def test_parts_of_r_lead_to_the_range_of_one_network_each(
    interval: RenoiseInterval, cuts: list[float], shift: float
) -> None:
    parts = interval.parts((0.9, 0.4), shift)
    assert parts[0] == 0 and parts[-1] == 1 and len(parts) == len(cuts) + 2
    r = torch.tensor(parts[1:-1], dtype=torch.float64)
    times = renoise_times(r, interval.low, interval.high, shift, interval.floor)
    assert times.tolist() == pytest.approx(cuts, abs=1e-12)


def test_a_last_phase_below_the_least_time_is_refused_without_a_word_of_switches() -> None:
    """It ends at 0, where times begin at .02 only, and begins at .01."""
    plan = PhasePlan((1.0, 0.01, 0.0), (0, 1))
    with pytest.raises(ValueError, match=r"^renoise: no time of phase 2 is left below 0\.01$"):
        RenoiseInterval.of(plan, 2, "disjoint", None)
