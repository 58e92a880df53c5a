"""One update: what it draws, what the options that make it cheaper share, and that they change no distribution."""

import math
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults import group
from gaussians import MEAN, exact_prediction, hermite
from recorded import Call, Recorded, distill_own, distill_recorded, updates
from tiny import TinyCodec, TinyWan
from torch import Tensor
from torch.nn.functional import cosine_similarity

from phased_dmd.checkpoint import RunFolder, load_tensors
from phased_dmd.config import Config, phase_plan, renoise_interval
from phased_dmd.engine.world import split_batch
from phased_dmd.errors import Stopped, UserError
from phased_dmd.maths.losses import score_matching_loss, subinterval_target
from phased_dmd.maths.rollout import Rollout, rollout
from phased_dmd.maths.schedules import FlowSchedule
from phased_dmd.models.loader import load_model
from phased_dmd.networks.build import add_expert, add_fake, build_system, remove_fake
from phased_dmd.networks.roles import FAKE, TEACHER, expert_role
from phased_dmd.plan.work import phase_work
from phased_dmd.recipes import resolve
from phased_dmd.step import EXPERT_UPDATE, Batch, States, draw, expert_loss, fake_loss, last_x0, roll_out, thirds
from phased_dmd.train import distill

QUICK = {
    "teacher.fit_steps": 20, "fake.updates": 2,
    "batch_size": 8, "iterations": 4, "log_every": 1, "checkpoint_every": 1000, "sample_every": None,
}  # fmt: skip


def toy(**overrides: Any) -> Config:
    """toy-1d in four steps and two phases, made quick; `plan__steps=2` overrides plan.steps."""
    renamed = {key.replace("__", "."): value for key, value in overrides.items()}
    return resolve("toy-1d", {**QUICK, "plan.steps": 4, **renamed})


def files(run: Path) -> dict[str, bytes]:
    found = {f"phase-{phase}": RunFolder(run).expert_path(phase).read_bytes() for phase in (1, 2)}
    return found | {"metrics": (run / "metrics.jsonl").read_bytes()}


def gaussian(config: Config) -> Any:
    """A system whose experts are the exact prediction of N(MEAN, .8^2)."""

    def predict(_: int, x: Tensor, t: Tensor) -> Tensor:
        return exact_prediction("flow", "flow", t[0].item())(x)

    def roll(hops: Any, x: Tensor, condition: Any, gradient_steps: Any = (), noise: Any = None) -> Rollout:
        return rollout(predict, x, hops, FlowSchedule(), "flow", gradient_steps, config.ablation.solver, noise)

    model = SimpleNamespace(
        sample_shapes=[(1,)], batch=lambda rows: {"text": torch.tensor([row.get("text", 0) for row in rows])}
    )
    plan = phase_plan(config)
    intervals = [renoise_interval(config, plan, phase) for phase in (1, 2)]
    return SimpleNamespace(
        config=config, plan=plan, model=model, start=lambda noise: noise, roll=roll, intervals=intervals,
        device=torch.device("cpu"),
    )  # fmt: skip


def drawn(config: Config, update: int, samples: int, phase: int = 1, iteration: int = 0, prompts: Any = None) -> Batch:
    return draw(gaussian(config), phase, iteration, update, range(samples), [1.0], prompts)


# One path for a whole cycle


@pytest.mark.parametrize("gradient", ["last", "all"])
def test_reuse_gives_every_update_of_a_cycle_the_same_path(gradient: str, tmp_path: Path) -> None:
    """x_s bit for bit, the generator's own end with gradient included; t and eps anew; the next cycle has another.

    `updates` finds x_s, by what was computed in the cycle, in what the networks were given.
    """
    config = toy(plan__gradient=gradient, ablation__fake_rollout="same", rollouts__reuse=True, fake__updates=3)
    made = list(updates(config, distill_recorded(config, tmp_path / "run")))
    for phase in (1, 2):
        mine, ends = [update for update in made if update.batch.phase == phase], []
        for i in range(4):
            cycle = mine[4 * i : 4 * i + 4]
            assert [[call.role for call in update.scores] for update in cycle] == [[FAKE]] * 3 + [[TEACHER, FAKE]]
            assert all(torch.equal(update.x_s, cycle[-1].x_s) for update in cycle)
            for name in ("eps", "t"):
                assert len(torch.cat([getattr(update.batch, name).flatten() for update in cycle]).unique()) == 4 * 8
            ends.append(cycle[-1].x_s)
        assert len(mine) == 4 * 4 and len(torch.cat(ends).unique()) == 4 * 8


@pytest.mark.parametrize("fake_rollout", ["full", "same"])
def test_a_state_that_is_kept_is_the_one_computed_afresh(fake_rollout: str) -> None:
    """In every update at a phase's begin, before the exit and at the end, in phases of three steps."""
    config = toy(
        plan__steps=6, plan__gradient="last", iterations=6, rollouts__reuse=True, ablation__fake_rollout=fake_rollout
    )
    system, compared = build_system(config, load_model(config.teacher, 0)[0], {}), Counter()
    for phase in (1, 2):
        add_expert(system, phase, trainable=True)
        add_fake(system, phase, None)
        for iteration in range(config.iterations):
            states: States = {}
            for update in (1, 2, EXPERT_UPDATE):
                role, loss = (FAKE, fake_loss) if update else (expert_role(phase), expert_loss)
                batch = draw(system, phase, iteration, update, range(8), [1.0], None)
                with system.roles.active(role):
                    loss(batch, states)[0].backward()
                for hops in (system.plan.steps(phase).start, len(batch.path) - 1, len(batch.path)):
                    kept = len(states)
                    assert torch.equal(roll_out(batch, hops, dict(states)), roll_out(batch, hops, {}))
                    assert len(states) == kept
                    compared[phase] += 1
                for p in system.roles.parameters(role).values():
                    assert p.grad is not None
                    p.data -= 0.01 * p.grad
                    p.grad = None
        remove_fake(system)
    assert compared == {1: 6 * 3 * 3, 2: 6 * 3 * 3}


@pytest.mark.parametrize("gradient", ["all", "last"])
def test_the_x0_of_a_rollout_is_read_off_its_last_step(gradient: str) -> None:
    """In phases of two steps, on the rollout of the fake's update; TDM's target asks for it, and no network."""
    config = toy(plan__steps=4, plan__gradient=gradient)
    system = build_system(config, load_model(config.teacher, 0)[0], {})
    for phase in (1, 2):
        add_expert(system, phase, trainable=True)
        batch, states = draw(system, phase, 0, 1, range(8), [1.0], None), {}
        x_s = roll_out(batch, len(batch.path), states)
        kept = len(states)
        found = last_x0(batch, x_s, states)
        assert len(states) == kept
        expected = system.roll(batch.path, system.start(batch.first_noise()), batch.condition).x0
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


LEVERS: dict[str, dict[str, Any]] = {
    "none": {},
    "all": {"plan__gradient": "all"},
    "same": {"ablation__fake_rollout": "same"},
    "its x0": {"ablation__target": "rollout"},
    "reuse, same": {"rollouts__reuse": True, "ablation__fake_rollout": "same"},
    "reuse, all": {"rollouts__reuse": True, "plan__gradient": "all"},
    "reuse, full": {"rollouts__reuse": True, "plan__steps": 6, "iterations": 3},
    "start": {"rollouts__antithetic": "start"},
    "reuse, start": {"rollouts__reuse": True, "rollouts__antithetic": "start"},
    "fisher": {"objective": "fisher"},
    "fisher-stop-gradient": {"objective": "fisher-stop-gradient"},
    "one network an update": {"renoise__network": "update", "engine__micro_batch": 4},
    "pulled": {"fake__pull": 0.5},
    "together": {
        "rollouts__reuse": True, "rollouts__antithetic": "start", "objective": "fisher", "fake__pull": 0.5,
        "renoise__network": "update", "engine__micro_batch": 4,
    },
}  # fmt: skip


def even_exits(levers: dict[str, Any]) -> Config:
    """With the first seed whose run draws every exit equally often, in each phase: the plan's figures are means."""
    for seed in range(1000):
        config = toy(**levers, seed=seed)
        numbers = (0, 1, 2) if config.ablation.fake_rollout == "same" else (EXPERT_UPDATE,)
        exits = [
            Counter(
                drawn(config, update, 2, phase, iteration).path[-1].step
                for iteration in range(config.iterations)
                for update in numbers
            )
            for phase in (1, 2)
        ]
        steps = config.plan.steps // 2 if config.plan.gradient == "last" else 1
        if all(len(count) == steps and len(set(count.values())) == 1 for count in exits):
            return config
    raise AssertionError("no such seed")


@pytest.mark.parametrize("levers", LEVERS.values(), ids=LEVERS)
def test_the_plan_foresees_the_calls(levers: dict[str, Any], tmp_path: Path) -> None:
    """By role, a sample."""
    config = even_exits({"plan__gradient": "last", **levers})
    model = distill_recorded(config, tmp_path / "run")
    for phase in (1, 2):
        work = phase_work(config, phase_plan(config), phase, guided=False)
        found = {role: count / (config.iterations * 8) for role, count in samples_called(model, phase).items()}
        assert (found.pop(TEACHER), found.pop(FAKE)) == (1, 2 + 1)
        assert sum(found.values()) == pytest.approx(work.calls - (1 + 2 + 1), abs=1e-12)


def test_projected_logs_its_figures_and_asks_no_network_more(tmp_path: Path) -> None:
    """The means over the batch of |r| / |d| and of cos^2 between r and d, from what the networks said in each update of
    an expert; micro-batches add up to the same. No other objective has figures.
    """
    small = {**QUICK, "iterations": 2, "objective": "projected"}
    config, parts = resolve("toy-2d", small), resolve("toy-2d", {**small, "engine.micro_batch": 2})
    model = distill_recorded(config, tmp_path / "run")
    rows, expected = RunFolder(tmp_path / "run").metrics(), []
    for update in updates(config, model):
        if len(update.scores) == 2:
            teacher, fake = (call.out for call in sorted(update.scores, key=lambda call: call.role, reverse=True))
            given = update.x_s, update.batch.eps, update.batch.s, update.batch.t
            d, r = fake - teacher, fake - subinterval_target(*given, FlowSchedule(), "flow")
            cosine = cosine_similarity(d, r)
            expected.append(((r.norm(dim=1) / d.norm(dim=1)).mean().item(), cosine.square().mean().item()))
    found = [(row["residual_ratio"], row["removed_share"]) for row in rows]
    assert [pytest.approx(pair, rel=1e-4) for pair in expected] == found and len(found) == 2 * 4
    distill(parts, tmp_path / "parts", quiet=True)
    first = RunFolder(tmp_path / "parts").metrics()[0]
    assert (first["residual_ratio"], first["removed_share"]) == pytest.approx(found[0], rel=1e-4)
    plain = resolve("toy-2d", {**small, "objective": "normalised"})
    assert len(distill_recorded(plain, tmp_path / "plain").calls) == len(model.calls)
    assert set(RunFolder(tmp_path / "plain").metrics()[0]) == set(rows[0]) - {"residual_ratio", "removed_share"}


def samples_called(model: Recorded, phase: int) -> Counter[str]:
    """The samples that each role was called on in a phase."""
    count: Counter[str] = Counter()
    for call in model.calls:
        if call.phase == phase:
            count[call.role] += len(call.x)
    return count


# Antithetic pairs


def test_pairs_of_opposite_first_noises_share_prompt_time_and_noise() -> None:
    table: Any = SimpleNamespace(eligible=lambda bucket: range(1000), row=lambda index, bucket: {"text": index})
    batch = drawn(toy(rollouts__antithetic="start"), update=1, samples=40, prompts=table)
    start, eps, t, text = batch.first_noise(), batch.eps, batch.t, batch.condition["text"]
    assert torch.equal(start[::2], -start[1::2]) and len(start.abs().unique()) == 20
    for shared in (eps, t, text):
        assert torch.equal(shared[::2], shared[1::2]) and len(shared.unique()) > 15
    own = drawn(toy(rollouts__antithetic="start"), update=0, samples=40)
    assert len(own.eps.abs().unique()) == len(own.t.unique()) == 40  # re-noised for the generator: no pairs


def kolmogorov(x: Tensor) -> float:
    """The distance of a sample from the standard normal law, times the root of its size; 1.95 is p = .001."""
    x = x.flatten().double().sort().values
    law, grid = torch.special.ndtr(x), torch.arange(len(x), dtype=torch.float64) / len(x)
    return (torch.maximum((law - grid).abs(), (grid + 1 / len(x) - law).abs()).max() * math.sqrt(len(x))).item()


def test_each_noise_of_a_pair_is_standard_normal() -> None:
    """Either member of the pairs; an eps that does not change its sign alternately is shared."""
    for reuse in (False, True):
        batch = drawn(toy(rollouts__antithetic="start", rollouts__reuse=reuse), update=1, samples=4000)
        for noise in (batch.eps, batch.first_noise()):
            for member in (noise[::2], noise[1::2]):
                assert kolmogorov(member) < 1.95
                assert abs(member.var().item() - 1) < 4 * math.sqrt(2 / len(member))
        assert abs(torch.corrcoef(torch.stack([batch.eps, batch.first_noise()]).squeeze())[0, 1]) < 0.1


def test_samples_that_cannot_be_paired_are_refused() -> None:
    """By the config alone where they are odd, and where processes would have an odd number each."""
    for levers in ({"batch_size": 5}, {"engine__micro_batch": 3}):
        with pytest.raises(
            UserError, match=r"^rollouts\.antithetic: needs an even batch_size, and engine\.micro_batch"
        ):
            toy(rollouts__antithetic="start", **levers)

    def action(_: int) -> None:
        with pytest.raises(UserError, match=r"^rollouts\.antithetic: 3 samples in calls of 3 cannot be paired$"):
            split_batch(6, toy().engine, pairs=True)

    assert group(2, action) == [0, 0]


FEATURES = torch.tensor([0.3, 1.1, 0.2], dtype=torch.float64)  # of the fake: of 1, x and tanh x


def features(x: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(x), x, torch.tanh(x)], 1)


def gradients(config: Config, samples: int) -> Tensor:
    """Of each sample's loss in the fake's three weights [b, 3], from one update's draws."""
    batch = drawn(config, update=1, samples=samples)
    x_s, eps = roll_out(batch, len(batch.path), {}).double(), batch.eps.double()
    theta = FEATURES.repeat(samples, 1).requires_grad_()
    loss = score_matching_loss(
        lambda x, _: (theta * features(x)).sum(1, keepdim=True), x_s, eps, batch.s, batch.t, FlowSchedule(), "flow"
    )
    return torch.autograd.grad(loss.sum(), theta)[0]


@pytest.mark.parametrize("reuse", [False, True])
def test_pairs_keep_the_expected_gradient_and_lower_its_variance(reuse: bool) -> None:
    """One exact step from t = 1 gives x_s = (1 - s) MEAN + s eps_0, so the fake's optimum is known, and the mean of
    the gradient by quadrature: within four standard errors. A pair's variance against that of two single draws.
    """
    t = 1.0
    plain = {"plan__steps": 2, "plan__shift": 5.0, "ablation__renoise": t}
    config, samples = toy(**plain), 6000
    paired = toy(**plain, rollouts__antithetic="start", rollouts__reuse=reuse)
    single = gradients(config, samples).unflatten(0, (-1, 2)).mean(1)
    pair = gradients(paired, samples).unflatten(0, (-1, 2)).mean(1)
    (z,), weight = hermite(80, 1)
    x = ((1 - t) * MEAN + t * z)[:, None]
    error = features(x) @ FEATURES[:, None] - exact_prediction("flow", "flow", t, std=0.0)(x)
    variance_ts = t**2 - ((1 - t) / (1 - 5 / 6) * 5 / 6) ** 2
    expected = weight @ (2 * min(1, 10 * variance_ts) * error * features(x))
    for found in (single, pair):
        standard_error = found.std(0) / math.sqrt(len(found))
        assert ((found.mean(0) - expected).abs() < 4 * standard_error).all()
    assert (pair.var(0) / single.var(0)).max() < 0.1


# One network for all samples of an update


@pytest.mark.parametrize("antithetic", [None, "start"])
def test_the_times_of_an_update_are_one_networks_and_each_is_uniform(antithetic: str | None) -> None:
    """Of 400 iterations, on two processes. Each update's first time is one of 400 independent ones: uniform in raw time
    by Kolmogorov and Smirnov's test at a level of 1e-3.
    """
    config = toy(renoise__network="update", rollouts__antithetic=antithetic, batch_size=8, plan__shift=3.0)
    system = gaussian(config)
    phase, system.plan = system.plan.num_phases, phase_plan(config, (0.9, 0.4))
    both, served = [range(4), range(4, 8)], torch.zeros(3)
    raw: dict[int, list[float]] = {EXPERT_UPDATE: [], 1: [], 2: []}
    for iteration in range(400):
        networks = []
        for update in raw:
            halves = [draw(system, phase, iteration, update, half, [1.0], None, both) for half in both]
            times = torch.cat([half.t for half in halves]).tolist()
            (network,) = {system.plan.network(t) for t in times}
            assert [half.networks for half in halves] == [[network], [network]]
            assert len(set(times)) == (4 if antithetic and update != EXPERT_UPDATE else 8)
            raw[update].append(times[0] / (3 - 2 * times[0]))
            networks.append(network)
        assert networks[config.fake.updates] == networks[EXPERT_UPDATE]  # it has just learnt where the expert asks
        served += torch.tensor(networks[1:]).bincount(minlength=3)
    low = 0.02 / (3 - 2 * 0.02)
    for found in raw.values():
        u = (torch.tensor(found, dtype=torch.float64).sort().values - low) / (1 - low)
        assert (u - torch.arange(0.5, 400) / 400).abs().max() + 0.5 / 400 < 1.95 / 400**0.5
    shares = [1 - 0.75, 0.75 - 0.4 / 2.2, 0.4 / 2.2 - low]  # of raw times: .9 is .75, .4 is .1818
    assert (served / 800).tolist() == pytest.approx([share / (1 - low) for share in shares], abs=0.06)


Wan = Callable[..., tuple[Config, TinyWan]]


@pytest.fixture
def wan(tmp_path: Path) -> Wan:
    """A run of nano-t2i in four steps and two phases, and its teacher: two tiny random Wans with guidance 2."""
    (tmp_path / "prompts.txt").write_text("a seven\na handwritten digit\nseven\n")

    def make(**overrides: Any) -> tuple[Config, TinyWan]:
        base = {
            "prompts": str(tmp_path / "prompts.txt"), "fake.updates": 2, "generator.lora.rank": 3, "plan.phases": 2,
            "generator.lora.alpha": 6, "batch_size": 8, "iterations": 2, "log_every": 1, "sample_every": None,
            "plan.gradient": "last",
        }  # fmt: skip
        config = resolve("nano-t2i", base | {key.replace("__", "."): value for key, value in overrides.items()})
        return config, TinyWan(2, (0.9,), guidance=2.0)

    return make


def distill_wan(made: tuple[Config, TinyWan], run: Path, then: Callable[..., object] = lambda *_: None) -> Recorded:
    model = Recorded(made[1], run)
    model.then = then
    distill_own(made[0], run, model, TinyCodec())
    return model


def test_an_update_of_one_network_calls_one(wan: Wan, tmp_path: Path) -> None:
    """Of two networks nearly every micro-batch of four has times of both, unless an update draws one."""
    found = []
    for network in ("sample", "update"):
        model = distill_wan(wan(renoise__network=network, engine__micro_batch=4, iterations=1), tmp_path / network)
        found.append(len(model.of(FAKE)))
    phases_updates_micro_batches = 2 * 3 * 2
    assert found[1] == phases_updates_micro_batches < found[0] <= 2 * found[1]


def test_levers_that_do_not_go_together_are_refused() -> None:
    for levers, message in (
        ({"objective": "fisher", "engine__sequence_parallel": 2}, "objective: a Fisher divergence does not go with"),
        ({"ablation__target": "rollout", "ablation__solver": "renoise"}, "ablation.target: rollout goes with"),
        ({"objective": "projected"}, "objective: projected leaves nothing of a gradient in one dimension"),
    ):
        with pytest.raises(ValueError, match=message):
            toy(**levers)


def test_the_plan_foresees_guidance(wan: Wan, tmp_path: Path) -> None:
    """All four steps, so that there is no exit to draw."""
    made = wan(plan__gradient="all", rollouts__reuse=True)
    model = distill_wan(made, tmp_path / "run")
    for phase in (1, 2):
        work = phase_work(made[0], phase_plan(made[0], (0.9,)), phase, guided=True)
        count = samples_called(model, phase)
        assert sum(count.values()) == 2 * 8 * work.calls
        assert count[TEACHER] == 2 * 2 * 8


# All together, and none


@pytest.mark.parametrize("divergence", ["fisher", "fisher-stop-gradient"])
def test_a_run_with_every_lever_is_byte_identical_when_it_is_stopped_between_updates(
    divergence: str, wan: Wan, tmp_path: Path
) -> None:
    levers = {
        "rollouts__reuse": True, "rollouts__antithetic": "start", "ablation__solver": "renoise",
        "objective": divergence, "fake__pull": 0.5, "engine__micro_batch": 2,
        "batch_size": 4, "iterations": 3,
    }  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    distill_wan(wan(**levers), whole)
    sent: list[Call] = []

    def stop(call: Call, *_: Any) -> None:
        """Between the micro-batches of the second update after the first iteration of phase 2, each of two samples."""
        done = [(row["phase"], row["iteration"]) for row in RunFolder(run).metrics()]
        if call.role == FAKE and done[-1:] == [(2, 1)]:
            sent.append(call)
            if sum(len(each.x) for each in sent) == 4 + 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped) as said:
        distill_wan(wan(**levers), run, stop)
    assert str(said.value).count("stopped and saved at phase 2, iteration 1, update 1;") == 1
    distill_wan(wan(**levers), run)
    assert files(run) == files(whole)
    _, header = load_tensors(RunFolder(tmp_path / "run").expert_path(2))
    assert header["weighting"] == divergence, "it has none of KL's"


@pytest.mark.parametrize(
    ("update", "exit_step", "start", "eps", "t", "prompts", "x_s"),
    [
        (0, 5, (-1.15382874, -0.13316837), (1.47459006, 0.32695791), (0.79477338, 0.77456761), (693, 731),
         (1.58744287, 0.73068893)),
        (1, 4, (0.65468746, -0.55043709), (0.60157323, 2.18918943), (0.10891670, 0.33364396), (236, 408),
         (0.11692649, 0.68199682)),
    ],
)  # fmt: skip
def test_with_every_lever_off_the_draws_are_what_they_always_were(
    update: int, exit_step: int, start: Any, eps: Any, t: Any, prompts: Any, x_s: Any
) -> None:
    """Written down when there was none of them: six steps, seed 0, phase 2, iteration 3."""
    asked = gaussian(
        toy(plan__steps=6, plan__gradient="last", ablation__fake_rollout="same", ablation__solver="renoise")
    )
    asked.model.sample_shapes = [(1,), (1, 1)]
    table: Any = SimpleNamespace(eligible=lambda bucket: range(1000), row=lambda index, bucket: {"text": index})
    batch = draw(asked, 2, 3, update, range(2), [1.0, 2.0], table)
    assert (batch.shape, batch.path[-1].step) == ((1, 1), exit_step), "the second bucket"
    assert batch.condition["text"].tolist() == list(prompts)
    found = batch.first_noise(), batch.eps, batch.t, roll_out(batch, len(batch.path), {})
    for tensor, numbers in zip(found, (start, eps, t, x_s), strict=True):
        assert tensor.flatten().tolist() == pytest.approx(numbers, abs=1e-6)


def test_a_figure_is_split_by_the_thirds_of_the_phases_times() -> None:
    """Of (.4, 1): .5 and .59 in the first, .61 in the second, .81 and the end in the third."""
    t = torch.tensor([0.5, 0.59, 0.61, 0.81, 1.0], dtype=torch.float64)
    interval = SimpleNamespace(low=0.4, high=1.0)
    batch: Any = SimpleNamespace(system=SimpleNamespace(intervals=[interval]), phase=1, t=t)
    found = thirds(batch, torch.arange(1.0, 6.0))
    assert {name: of_each.tolist() for name, of_each in found.items()} == {
        "fake_error_1": [1, 2, 0, 0, 0], "share_1": [1, 1, 0, 0, 0], "fake_error_2": [0, 0, 3, 0, 0],
        "share_2": [0, 0, 1, 0, 0], "fake_error_3": [0, 0, 0, 4, 5], "share_3": [0, 0, 0, 1, 1],
    }  # fmt: skip
    interval.high = interval.low  # one time for all
    assert thirds(batch, torch.ones(5))["share_1"].sum() + thirds(batch, torch.ones(5))["share_3"].sum() == 5
