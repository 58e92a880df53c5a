"""The pool of the teacher's trajectories: what its states are, who makes them, and what phases do with them."""

import math
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import end, group, start
from recorded import as_own, distill_recorded
from tiny import TinyCodec, TinyWan

from phased_dmd.checkpoint import RunFolder
from phased_dmd.conditions import Conditions
from phased_dmd.config import Config, phase_plan
from phased_dmd.engine.randomness import normal
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import step_times
from phased_dmd.models.loader import load_model
from phased_dmd.networks.build import add_expert, add_fake, build_system, load_expert
from phased_dmd.networks.roles import FAKE, TEACHER, System, expert_role
from phased_dmd.plan.work import phase_work
from phased_dmd.pool import Pool, pool_calls
from phased_dmd.prompts import Prompt
from phased_dmd.recipes import resolve
from phased_dmd.sampling.loading import read_expert
from phased_dmd.step import EXPERT_UPDATE, draw, expert_loss, regression_loss
from phased_dmd.train import distill

PROMPTS = [Prompt("one"), Prompt("three"), Prompt("a hundred")]
QUICK = {
    "teacher.fit_steps": 20, "fake.updates": 2, "rollouts.pool": 16, "teacher.base_steps": 8,
    "batch_size": 8, "iterations": 4, "log_every": 1, "checkpoint_every": 1000, "sample_every": None,
}  # fmt: skip


def wan(**overrides: Any) -> Config:
    """A config of an own teacher in four steps and two phases; `rollouts__start="teacher"` overrides a field."""
    fields = {
        "teacher": {"kind": "own", "base_steps": 8, "negative_prompt": "no"}, "plan.steps": 4, "plan.phases": 2,
        "generator.lora.rank": 2, "rollouts.pool": 6, "rollouts.start": "teacher", "batch_size": 4,
    }  # fmt: skip
    renamed = {key.replace("__", "."): value for key, value in overrides.items()}
    return resolve("nano-t2i", fields | renamed)


def toy(**overrides: Any) -> Config:
    renamed = {key.replace("__", "."): value for key, value in overrides.items()}
    return resolve("toy-1d", {**QUICK, "plan.steps": 4, **renamed})


def pool_of(config: Config, folder: Path, model: Any = None) -> tuple[Pool, System, Conditions | None]:
    if model is None:
        return (
            Pool(system := build_system(config, load_model(config.teacher, 0)[0], {}), None, [1.0], folder),
            system,
            None,
        )
    conditions = Conditions(TinyCodec(), PROMPTS, "no", folder / "conditions")
    system = build_system(config, model, conditions.negative)
    return Pool(system, conditions, [1.0], folder), system, conditions


def nothing() -> None:
    pass


# ---------------------------------------------------------------- what the states are


def test_states_are_those_of_the_guided_teachers_own_sampler(tmp_path: Path) -> None:
    """Of two networks and a switch inside the first phase; entry by entry, prompts and noise given here."""
    model = TinyWan(networks=2, switches=(0.95,), guidance=3.0)
    config = wan(anchor__updates=1)
    pool, system, conditions = pool_of(config, tmp_path, model)
    assert conditions is not None
    calls = pool.make([1, 2], nothing)
    assert calls == 6 * 8 * 2  # trajectories, steps of the base, guidance
    rows = [conditions.row(prompt, 0) for prompt in (0, 0, 1, 1, 2, 2)]
    noise = normal(model.sample_shapes[0], range(6), config.seed, "pool", 0, "start").to(device())
    x_0 = system.sample_teacher(noise, model.batch(rows), 8)
    torch.testing.assert_close(pool.end(2, 0, range(6)), x_0, rtol=0, atol=1e-6)
    half = system.roll_teacher(step_times(8, 5.0)[:5], noise, model.batch(rows))
    torch.testing.assert_close(pool.end(1, 0, range(6)), half, rtol=0, atol=1e-6)
    assert torch.equal(pool.begin(2, 0, [5, 0]), pool.end(1, 0, [5, 0]))
    assert torch.equal(pool.begin(1, 0, [3]), noise[3:4])


def test_a_grid_that_misses_the_boundaries_is_bent_to_them() -> None:
    plan, base = phase_plan(toy()), (1.0, 0.8, 0.6, 0.55, 0.3, 0.0)
    assert plan.within(1, base) == (1.0, 0.8, 0.6, 0.55, 0.5)
    assert plan.within(2, base) == (0.5, 0.3, 0.0)
    assert plan.within(2, (1.0, 0.5 + 1e-9, 0.25, 0.0)) == (0.5, 0.25, 0.0)


def test_an_entry_is_the_same_however_many_there_are_and_whoever_makes_it(tmp_path: Path) -> None:
    """In another folder with a file removed in between, and by two processes that are one group."""
    config, model = toy(anchor__updates=1, rollouts__pool=200), None
    whole, _, _ = pool_of(config, tmp_path / "whole", model)
    assert whole.make([1], nothing) == 200 * 4
    again, _, _ = pool_of(config, tmp_path / "again", model)
    again.make([1], nothing)
    gone, damaged, *_ = sorted((tmp_path / "again" / "phase-1").iterdir())
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert again.make([1], nothing) == 2 * 64 * 4

    def member(rank: int) -> None:
        pool, _, _ = pool_of(config, tmp_path / "group", model)
        assert pool.make([1], nothing) == 200 * 4

    assert group(2, member) == [0, 0]
    for path in sorted((tmp_path / "whole" / "phase-1").iterdir()):
        for other in ("again", "group"):
            assert (tmp_path / other / "phase-1" / path.name).read_bytes() == path.read_bytes(), other
    names = {path.name for path in (tmp_path / "group" / "phase-1").iterdir()}
    assert names == {f"0-{i:05d}.safetensors" for i in range(4)}


def test_jobs_share_the_work(tmp_path: Path) -> None:
    """Each of three processes makes what no other has: in all as much as one would, and each some of it."""
    config = toy(anchor__updates=1, rollouts__start="teacher", rollouts__pool=1024)

    def job(number: int) -> None:
        pool, _, _ = pool_of(config, tmp_path)
        (tmp_path / f"calls-{number}").write_text(str(pool.make([1, 2], lambda: time.sleep(0.01))))

    assert [end(process) for process in [start(partial(job, i)) for i in range(3)]] == [0, 0, 0]
    calls = [int((tmp_path / f"calls-{i}").read_text()) for i in range(3)]
    assert sum(calls) == 1024 * 8 and min(calls) > 0
    assert not list(tmp_path.rglob("*.lock"))


def test_what_is_asked_in_between_ends_the_work_and_it_goes_on(tmp_path: Path) -> None:
    pool, _, _ = pool_of(toy(anchor__updates=1, rollouts__pool=200), tmp_path)
    turns = iter([None, None])
    with pytest.raises(StopIteration):
        pool.make([1], lambda: next(turns))
    assert len(list((tmp_path / "phase-1").iterdir())) == 2
    assert pool.make([1], nothing) == (200 - 2 * 64) * 4


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    pool, _, _ = pool_of(toy(anchor__updates=1), tmp_path)
    pool.make([1], nothing)
    path = next((tmp_path / "phase-1").iterdir())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"0-00000\.safetensors: 9\.end is damaged; remove the file"):
        pool.end(1, 0, range(16))


# ---------------------------------------------------------------- exact marginals


@pytest.mark.parametrize("antithetic", [None, "start"])
def test_an_exact_teachers_states_are_its_marginal(antithetic: str | None, tmp_path: Path) -> None:
    """Of unequal modes and wide ones: the modes' shares, means and variances at s = .5, within five standard errors."""
    teacher = {"means": [[-4.0], [0.0], [4.0]], "weights": [1, 2, 5], "std": 0.3}
    config = toy(rollouts__start="teacher", rollouts__antithetic=antithetic, teacher=teacher)
    pool, _, _ = pool_of(config, tmp_path)
    count = 40_000
    x = pool.begin(2, 0, range(count)).squeeze(1).double()
    assert not list(tmp_path.iterdir())  # nothing is kept
    # x_s = .5 x_0 + .5 eps: means -2, 0, 2; variance .25 (.09 + 1) = .2725. Cut at -1 and 1, 1.92 deviations away.
    modes = {-2: 1 / 8, 0: 2 / 8, 2: 5 / 8}
    for cut in (-1, 1):
        below = sum(share * 0.5 * math.erfc((mode - cut) / math.sqrt(2 * 0.2725)) for mode, share in modes.items())
        assert abs((x < cut).double().mean().item() - below) < 5 * math.sqrt(below * (1 - below) / count)
    mean, square = 1.0, 0.2725 + (4 * 1 + 4 * 5) / 8
    assert abs(x.mean().item() - mean) < 5 * math.sqrt((square - 1) / count)
    assert abs(x.square().mean().item() - square) < 5 * 3.5 / math.sqrt(count)


def test_a_pair_of_an_exact_teacher_is_opposite(tmp_path: Path) -> None:
    """Of a mixture that is its own mirror image: the second sample of a pair is the negative of the first."""
    teacher = {"means": [[-2.0], [-1.0], [1.0], [2.0]]}
    pool, _, _ = pool_of(toy(rollouts__start="teacher", rollouts__antithetic="start", teacher=teacher), tmp_path)
    x = pool.begin(2, 0, range(1000))
    assert torch.equal(x[1::2], -x[::2]) and len(x[::2].unique()) == 500


# ---------------------------------------------------------------- what phases do with them


def test_a_phase_begins_with_the_teachers_states_and_their_prompts(tmp_path: Path) -> None:
    config = wan(rollouts__antithetic="start")
    pool, system, conditions = pool_of(config, tmp_path, TinyWan(guidance=2.0))
    assert pool.make([1], nothing) == 0 and pool.make([2], nothing) == 6 * 4 * 2
    states, seen = pool.end(1, 0, range(6)), Counter[int]()
    for iteration in range(40):
        batch = draw(system, 2, iteration, EXPERT_UPDATE, range(4), [1.0], conditions, pool=pool)
        assert batch.taken is not None and [hop.step for hop in batch.path] == [2, 3]
        entries = batch.taken.entries
        assert torch.equal(batch.start(), states[list(entries)])
        assert [i % 2 for i in entries] == [0, 1, 0, 1] and entries[0] + 1 == entries[1]
        rows = [conditions.row(entry // 2, 0)["text"] for entry in entries]  # a pair's prompt is one of three
        assert torch.equal(batch.condition["text"].cpu(), torch.stack(rows))
        seen.update(entries)
    assert set(seen) == set(range(6))
    first = draw(system, 1, 0, EXPERT_UPDATE, range(4), [1.0], conditions, pool=pool)
    plain = draw(system, 1, 0, EXPERT_UPDATE, range(4), [1.0], conditions)
    assert first.taken is None and torch.equal(first.start(), plain.start())


@pytest.mark.parametrize("gradient", ["all", "last"])
def test_an_anchored_update_regresses_the_teachers_mean_velocity(gradient: str, tmp_path: Path) -> None:
    """From the same state, by the expert's own calls; in phase 2 that state is what the frozen expert makes of it."""
    config = wan(rollouts__start="experts", anchor__updates=[2, 2], plan__gradient=gradient)
    pool, system, conditions = pool_of(config, tmp_path, TinyWan(guidance=2.0))
    add_expert(system, 1, trainable=True)
    with torch.no_grad():
        for p in system.roles.parameters(expert_role(1)).values():
            p += 0.1  # an expert that is not the teacher
    pool.make([1], nothing)
    add_expert(system, 2, trainable=True)
    assert pool.make([2], nothing) == 6 * (2 + 4 * 2)  # two calls of the expert to get there
    for phase, begin, stop in ((1, 1.0, system.plan.end(1)), (2, system.plan.end(1), 0.0)):
        batch = draw(system, phase, 1, EXPERT_UPDATE, range(4), [1.0], conditions, pool=pool)
        assert batch.taken is not None
        noise = pool.begin(1, 0, batch.taken.entries)
        x = noise if phase == 1 else system.roll(system.plan.path(1), noise, batch.condition).x
        torch.testing.assert_close(batch.start(), x, rtol=0, atol=1e-5)
        times = [t for t in step_times(8, 5.0) if stop <= t <= begin]
        wanted = (system.roll_teacher(times, x, batch.condition) - x) / (stop - begin)
        moved = (system.roll(batch.path, x, batch.condition).x - x) / (stop - begin)
        loss = (moved - wanted).square().mean()
        torch.testing.assert_close(regression_loss(batch, {})[0], loss, rtol=1e-4, atol=0)
        plain = draw(system, phase, 2, EXPERT_UPDATE, range(4), [1.0], conditions, pool=pool)
        assert plain.taken is None  # the third update matches


@pytest.mark.parametrize("updates", [4, [4, 0], [2, 3]])
def test_no_fake_is_updated_in_anchored_iterations_nor_made_where_all_are(updates: Any, tmp_path: Path) -> None:
    config = toy(anchor__updates=updates, rollouts__reuse=True)
    model = distill_recorded(config, tmp_path / "run")
    for phase, anchored in zip((1, 2), updates if isinstance(updates, list) else (4, 4), strict=True):
        fakes = [call for call in model.of(FAKE, phase)]
        assert len(fakes) == (4 - anchored) * (2 + 1)  # two updates, and a score
        rows = [row for row in RunFolder(tmp_path / "run").metrics() if row["phase"] == phase]
        assert [row["fake_loss"] is None for row in rows] == [i < anchored for i in range(4)]
        assert [row["fake_gradient_norm"] is None for row in rows][:1] == [anchored > 0]
        assert all(row["generator_loss"] > 0 for row in rows)
        scores = [call for call in model.of(TEACHER, phase) if len(call.x) == 8]  # the pool's are of 16
        assert len(scores) == 4 - anchored


def test_an_anchored_phase_ends_where_the_teachers_own_sampler_does(tmp_path: Path) -> None:
    """Of one Gaussian, whose sampler is linear: the expert, a full copy, learns to jump there at once."""
    teacher = {"means": [[1.5]], "std": 0.5, "fit_steps": 1500}
    changes = {"plan.steps": 2, "iterations": 300, "anchor.updates": 300, "rollouts.pool": 512, "batch_size": 128}
    config = toy(**changes, generator__lr=2e-3, teacher=teacher)
    pool, system, _ = pool_of(config, tmp_path)
    pool.make([1], nothing)
    run = distill(config, tmp_path / "run", quiet=True)
    add_expert(system, 1, trainable=False)
    before = system.roll(system.plan.path(1), pool.begin(1, 0, range(512)), {}).x
    load_expert(system, 1, read_expert(RunFolder(run), 1)[0], "")
    after = system.roll(system.plan.path(1), pool.begin(1, 0, range(512)), {}).x
    error = [(x - pool.end(1, 0, range(512))).square().mean().sqrt().item() for x in (before, after)]
    assert error[1] < 0.2 * error[0] and error[1] < 0.02


@pytest.mark.parametrize("phases", [2, 4])
def test_what_later_phases_match_never_reaches_an_anchored_expert(phases: int, tmp_path: Path) -> None:
    """The stopped gradient that keeps what the first steps have learnt: with all experts told to learn, a matching
    update of a later phase leaves those before it without any gradient.
    """
    config = wan(plan__phases=phases, rollouts__start="experts", anchor__updates=[1] + [0] * (phases - 1))
    pool, system, conditions = pool_of(config, tmp_path, TinyWan(guidance=2.0))
    for phase in range(1, phases + 1):
        add_expert(system, phase, trainable=True)
    add_fake(system, phases, None)
    batch = draw(system, phases, 0, EXPERT_UPDATE, range(4), [1.0], conditions, pool=pool)
    with system.roles.active(expert_role(phases)):
        expert_loss(batch, {})[0].backward()
    for phase in range(1, phases + 1):
        gradients = [p.grad for p in system.roles.parameters(expert_role(phase)).values()]
        assert all((gradient is None) == (phase < phases) for gradient in gradients)


def test_a_run_of_many_processes_or_one_takes_the_same_states() -> None:
    """By the indices of the samples: those of two halves are those of the whole."""
    config = toy(rollouts__start="teacher", rollouts__antithetic="start")
    pool, system, _ = pool_of(config, Path("nowhere"))
    whole = draw(system, 2, 3, 1, range(8), [1.0], None, pool=pool).start()
    halves = [draw(system, 2, 3, 1, part, [1.0], None, pool=pool).start() for part in (range(4), range(4, 8))]
    assert torch.equal(whole, torch.cat(halves))


@pytest.mark.parametrize("gradient", ["all", "last"])
def test_the_plan_foresees_the_calls(gradient: str, tmp_path: Path) -> None:
    """Of the pool, of anchored iterations and of those that begin with the teacher's states; samples of all roles."""
    config = toy(rollouts__start="teacher", anchor__updates=[4, 0, 1, 2], plan__gradient=gradient, plan__phases=4)
    model, plan = distill_recorded(config, tmp_path / "run"), phase_plan(config)
    expected = pool_calls(as_own(config), plan, (1.0,))
    assert expected == 16 * 40  # each state is one of a trajectory of 40 steps
    for phase in (1, 2, 3, 4):
        anchored = config.anchored(phase)
        for count, of_anchored in ((anchored, True), (4 - anchored, False)):
            expected += 8 * count * phase_work(config, plan, phase, False, anchored=of_anchored).calls
    assert sum(len(call.x) for call in model.calls) == expected


def test_a_second_run_polishes_phases_that_began_with_the_teacher(tmp_path: Path) -> None:
    """It starts from their experts, which at a rate of about nothing they stay, and begins with what these make."""
    first = distill(toy(rollouts__start="teacher"), tmp_path / "first", quiet=True)
    config = toy(init_experts=str(first), iterations=1, generator__lr=1e-12)
    again = distill(config, tmp_path / "again", quiet=True)
    for phase in (1, 2):
        was, now = (read_expert(RunFolder(run), phase)[0] for run in (first, again))
        for name, tensor in was.items():
            torch.testing.assert_close(now[name], tensor, rtol=0, atol=1e-8)
    assert not (again / "pool").exists()
