"""The options that make a run cheaper: what they share, what they leave alone, and that no law changes."""

import math
import re
import signal
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from faults import small_disk
from gaussians import MEAN, exact_prediction, hermite
from tiny import TinyCodec, TinyWan
from torch import Tensor

from phased_dmd import draws as drawing
from phased_dmd import train, updates
from phased_dmd.checkpoint import RunFolder, load_tensors
from phased_dmd.config import Config
from phased_dmd.draws import Draws
from phased_dmd.engine import world
from phased_dmd.engine.signals import Signals
from phased_dmd.errors import Stopped, UserError
from phased_dmd.maths.losses import score_matching_loss
from phased_dmd.maths.rollout import Rollout, rollout
from phased_dmd.maths.schedules import FlowSchedule
from phased_dmd.networks import system
from phased_dmd.networks.roles import FAKE, TEACHER, Roles, expert_role
from phased_dmd.paths import Paths
from phased_dmd.plan.work import phase_work
from phased_dmd.recipes import resolve
from phased_dmd.sampling.sampler import Sampler
from phased_dmd.train import distill

QUICK = {
    "teacher.fit_steps": 20, "teacher.fit_batch": 64, "teacher.hidden": 16, "teacher.layers": 2, "fake.updates": 2,
    "batch_size": 8, "iterations": 4, "log_every": 1, "checkpoint_every": 1000, "sample_every": 1000,
}  # fmt: skip
POOLED = {"rollouts__pool": 3, "rollouts__pool_refresh": 0.5}


def toy(**overrides: Any) -> Config:
    """toy-1d in four steps and two phases, made quick; `plan__steps=2` overrides plan.steps."""
    renamed = {key.replace("__", "."): value for key, value in overrides.items()}
    return resolve("toy-1d", {**QUICK, "plan.steps": 4, **renamed})


def files(run: Path) -> dict[str, bytes]:
    found = {f"phase-{phase}": RunFolder(run).expert_path(phase).read_bytes() for phase in (1, 2)}
    return found | {"metrics": (run / "metrics.jsonl").read_bytes()}


class Drawn(NamedTuple):
    """What an update's loss was given; x: x_s, or the end of the generator's own path."""

    draws: Draws
    x: Tensor
    eps: Tensor
    t: Tensor


class Watch:
    """Of a run in whole batches: what each update drew, by phase, and the samples that each role was called on in it.

    `after` is called with the arguments of each update once it is done.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.fake: dict[int, list[Drawn]] = defaultdict(list)
        self.generator: dict[int, list[Drawn]] = defaultdict(list)
        self.calls: dict[int, list[Counter[str]]] = defaultdict(list)
        self.after: Callable[..., None] = lambda *_: None
        self._losses: list[tuple[Tensor, ...]] = []
        predict = Roles.predict

        def counted(roles: Roles, role: str, network: int, x: Tensor, *rest: Any) -> Tensor:
            for calls in list(self.calls.values())[-1][-1:]:
                calls[role] += len(x)
            return predict(roles, role, network, x, *rest)

        patch.setattr(Roles, "predict", counted)
        patch.setattr(Sampler, "preview", lambda *_: None)
        patch.setattr(train, "save_preview", lambda *_: None)
        for name, kept in (("score_matching", self.fake), ("distribution_matching", self.generator)):
            self._watch(patch, name, kept)

    def _watch(self, patch: pytest.MonkeyPatch, name: str, kept: dict[int, list[Drawn]]) -> None:
        update, loss = getattr(train, name), getattr(updates, f"{name}_loss")

        def lossy(*given: Any, **more: Any) -> Tensor:
            x, eps, _, t = given[1:5] if callable(given[0]) else given[:4]
            self._losses.append((x.detach().clone(), eps, t))
            return loss(*given, **more)

        def watched(draws: Draws, condition: Any, paths: Paths) -> Tensor:
            self._losses.clear()
            self.calls[draws.phase].append(Counter())
            done = update(draws, condition, paths)
            for given in self._losses[-1:]:
                kept[draws.phase].append(Drawn(draws, *given))
            self.after(draws, condition, paths)
            return done

        patch.setattr(updates, f"{name}_loss", lossy)
        patch.setattr(train, name, watched)

    def total(self, phase: int) -> Counter[str]:
        return sum(self.calls[phase], Counter())


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "save_preview", lambda *_: None)


def gaussian(config: Config) -> Any:
    """A system whose experts are the exact prediction of N(MEAN, .8^2)."""

    def predict(_: int, x: Tensor, t: Tensor) -> Tensor:
        return exact_prediction("flow", "flow", t[0].item())(x)

    def roll(hops: Any, x: Tensor, condition: Any, gradient_steps: Any = (), renoise: Any = None) -> Rollout:
        return rollout(predict, x, hops, FlowSchedule(), "flow", gradient_steps, config.plan.solver, renoise)

    model = SimpleNamespace(
        sample_shapes=[(1,)], batch=lambda rows: {"text": torch.tensor([row.get("text", 0) for row in rows])}
    )
    return SimpleNamespace(
        config=config, plan=config.phase_plan(), model=model, start=lambda noise: noise, roll=roll
    )  # fmt: skip


def drawn(config: Config, update: int, samples: int, phase: int = 1, iteration: int = 0) -> Draws:
    return Draws(gaussian(config), phase, iteration, update, [range(samples)], [1.0])


# One path for a whole cycle


@pytest.mark.parametrize("gradient", ["last", "all"])
def test_reuse_gives_every_update_of_a_cycle_the_same_path(gradient: str, tmp_path: Path, watch: Watch) -> None:
    """x_s bit for bit, the generator's own end with gradient included; t and eps anew; the next cycle has another."""
    config = toy(plan__gradient=gradient, plan__fake_rollout="same", rollouts__reuse=True, fake__updates=3)
    distill(config, tmp_path / "run", quiet=True)
    for phase in (1, 2):
        ends = []
        for i, end in enumerate(watch.generator[phase]):
            cycle = watch.fake[phase][3 * i : 3 * i + 3]
            assert len(cycle) == 3 and all(torch.equal(update.x, end.x) for update in cycle)
            for name in ("eps", "t"):
                assert len(torch.cat([getattr(update, name).flatten() for update in (*cycle, end)]).unique()) == 4 * 8
            ends.append(end.x)
        assert len(ends) == 4 and len(torch.cat(ends).unique()) == 4 * 8


@pytest.mark.parametrize(
    "levers",
    [
        {"rollouts__reuse": True}, {"rollouts__reuse": True, "plan__fake_rollout": "same"}, POOLED,
        POOLED | {"rollouts__reuse": True, "rollouts__pool_on_disk": True}, POOLED | {"rollouts__antithetic": "noise"},
    ],
)  # fmt: skip
def test_a_state_that_is_kept_is_the_one_computed_afresh(levers: Any, tmp_path: Path, watch: Watch) -> None:
    """In every update at a phase's begin, before the exit and at the end, in phases of three steps."""
    compared = Counter()

    def after(draws: Draws, condition: Any, paths: Paths) -> None:
        for state in (Paths.begin, Paths.before_exit, Paths.end):
            assert torch.equal(state(paths, draws, condition), state(Paths(), draws, condition))
            compared[draws.phase] += 1

    watch.after = after
    distill(toy(plan__steps=6, plan__gradient="last", iterations=6, **levers), tmp_path / "run", quiet=True)
    assert compared == {1: 6 * 3 * 3, 2: 6 * 3 * 3}


LEVERS: dict[str, dict[str, Any]] = {
    "none": {},
    "all": {"plan__gradient": "all"},
    "same": {"plan__fake_rollout": "same"},
    "reuse, same": {"rollouts__reuse": True, "plan__fake_rollout": "same"},
    "reuse, all": {"rollouts__reuse": True, "plan__gradient": "all"},
    "reuse, full": {"rollouts__reuse": True, "plan__steps": 6, "iterations": 3},
    "noise": {"rollouts__antithetic": "noise"},
    "start": {"rollouts__antithetic": "start"},
    "reuse, noise": {"rollouts__reuse": True, "rollouts__antithetic": "noise"},
    "fisher": {"objective__divergence": "fisher"},
    "fisher-stop-gradient": {"objective__divergence": "fisher-stop-gradient"},
    "sorted": {"renoise__sort": True, "engine__micro_batch": 4},
    "pulled": {"fake__pull": 0.5},
    "together": {
        "rollouts__reuse": True, "rollouts__antithetic": "noise", "objective__divergence": "fisher", "fake__pull": 0.5,
        "renoise__sort": True, "engine__micro_batch": 4, "engine__batched_guidance": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("levers", LEVERS.values(), ids=LEVERS)
def test_the_plan_foresees_the_calls(levers: dict[str, Any], tmp_path: Path, watch: Watch) -> None:
    """By role, a sample. Shuffled exits come each as often as the other, so that averages over them are exact."""
    config = toy(**{"plan__gradient": "last", "plan__exits": "shuffled", **levers})
    distill(config, tmp_path / "run", quiet=True)
    for phase in (1, 2):
        work = phase_work(config, config.phase_plan(), phase, guided=False)
        found = {role: count / (config.iterations * 8) for role, count in watch.total(phase).items()}
        assert (found.pop(TEACHER), found.pop(FAKE)) == (1, 2 + 1)
        assert sum(found.values()) == pytest.approx(work.calls - (1 + 2 + 1), abs=1e-12)


# States that are kept at a phase's begin


def renewals(place: int, iteration: int) -> int:
    """How often a place was made anew by then: half a batch an iteration, one place of three after the other."""
    return sum(batch % 3 == place for batch in range(math.floor(iteration * 0.5)))


@pytest.mark.parametrize("on_disk", [False, True])
def test_frozen_experts_are_called_for_new_and_renewed_places_only(on_disk: bool, tmp_path: Path, watch: Watch) -> None:
    """Of three places, half a one an iteration. A state stays what it was when its place is renewed."""
    config, versions, expected, states = toy(iterations=14, rollouts__pool_on_disk=on_disk, **POOLED), {}, [], []

    def after(draws: Draws, condition: Any, paths: Paths) -> None:
        if draws.phase == 1:
            assert draws.place is None
            return
        assert draws.place is not None
        version = renewals(draws.place, draws.iteration)
        expected.append(2 * 8 if versions.get(draws.place) != version else 0)
        versions[draws.place] = version
        states.append((draws.place, version, paths.begin(draws, condition)))

    watch.after = after
    distill(config, tmp_path / "run", quiet=True)
    assert [calls["phase_1"] for calls in watch.calls[2]] == expected
    assert set(versions) == {0, 1, 2} and expected.count(16) > 5
    kept = {(place, version): state for place, version, state in states}
    assert len(kept) == expected.count(16)
    assert all(torch.equal(kept[place, version], state) for place, version, state in states)
    assert len(torch.cat(list(kept.values())).unique()) == 8 * len(kept)


def test_without_refreshing_a_pool_is_filled_once(tmp_path: Path, watch: Watch) -> None:
    distill(toy(iterations=14, rollouts__pool=3, rollouts__pool_refresh=0), tmp_path / "run", quiet=True)
    assert watch.total(2)["phase_1"] == 3 * 2 * 8
    assert not any(calls["phase_1"] for calls in watch.calls[2][21:])  # by then every place has been drawn


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("antithetic", [None, "noise"])
def test_the_plan_foresees_a_pools_calls(reuse: bool, antithetic: str | None, tmp_path: Path, watch: Watch) -> None:
    """At most: a place that is renewed before it is drawn again costs nothing, which the plan does not know."""
    levers = {"rollouts__reuse": reuse, "rollouts__antithetic": antithetic, "plan__gradient": "all"}
    config = toy(iterations=30, batch_size=4, rollouts__pool=2, rollouts__pool_refresh=0.25, **levers)
    distill(config, tmp_path / "run", quiet=True)
    calls = {role: count / (30 * 4) for role, count in watch.total(2).items()}
    frozen = calls.pop("phase_1")
    foreseen = phase_work(config, config.phase_plan(), 2, guided=False).calls - sum(calls.values())
    assert 0.8 * foreseen < frozen < foreseen + 1e-9


def test_a_place_is_made_anew_once_an_iteration_at_most(tmp_path: Path, watch: Watch) -> None:
    config = toy(iterations=30, batch_size=4, rollouts__pool=2, rollouts__pool_refresh=6, fake__updates=5)
    distill(config, tmp_path / "run", quiet=True)
    assert watch.total(2)["phase_1"] <= 2 * 2 * 4 * 30  # places, steps, samples and iterations
    plain, pooled = (phase_work(c, c.phase_plan(), 2, guided=False).calls for c in (toy(fake__updates=5), config))
    assert plain - pooled == pytest.approx(2 * (6 - (2 + 2 / 30)))  # steps; draws, of which these are new


def test_a_pool_leaves_the_first_phase_alone_and_is_the_same_on_disk(tmp_path: Path) -> None:
    runs = {
        name: files(distill(toy(rollouts__reuse=True, **levers), tmp_path / name, quiet=True))
        for name, levers in (
            ("none", {}), ("memory", POOLED), ("disk", POOLED | {"rollouts__pool_on_disk": True}),
        )
    }  # fmt: skip
    assert runs["memory"] == runs["disk"]
    assert runs["none"]["phase-1"] == runs["memory"]["phase-1"] and runs["none"]["phase-2"] != runs["memory"]["phase-2"]
    assert not list((tmp_path / "disk").glob(".pool*"))


def stopped_after(checks: int, config: Config, run: Path) -> str:
    """Has a run stopped the given time it asks whether it should; what it said."""
    asked = Counter()

    def ask(_: Signals) -> int:
        asked["all"] += 1
        return signal.SIGTERM if asked["all"] == checks else 0

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as stop:
        patch.setattr(Signals, "asked", ask)
        distill(config, run, quiet=True)
    return str(stop.value)


def test_what_a_kill_left_of_a_pool_is_removed_and_a_link_is_refused(tmp_path: Path) -> None:
    config, run = toy(rollouts__pool_on_disk=True, **POOLED), tmp_path / "run"
    whole = files(distill(config, tmp_path / "whole", quiet=True))
    assert "phase 2" in stopped_after(4 * 3 + 5, config, run)
    assert not list(run.glob(".pool*"))  # an orderly end leaves none
    (run / ".pool-0").mkdir()
    (run / ".pool-3").mkdir()  # of more processes
    (run / ".pool-3" / "0.safetensors").write_text("rubbish")
    for rubbish in ("0.safetensors", "1.safetensors", "other"):
        (run / ".pool-0" / rubbish).write_text("rubbish")
    (tmp_path / "precious").mkdir()
    (run / ".pool-0" / "link").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"link: a symlink, which a run folder may not hold$"):
        distill(config, run, quiet=True)
    assert (run / ".pool-0" / "other").exists()
    (run / ".pool-0" / "link").unlink()
    distill(config, run, quiet=True)
    assert files(run) == whole and not list(run.glob(".pool*")) and (tmp_path / "precious").is_dir()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    big = {"rollouts__pool": 100, "rollouts__pool_on_disk": True, "batch_size": 2048, "iterations": 20}
    with small_disk(tmp_path / "disk", 256):
        run = tmp_path / "disk" / "run"
        with pytest.raises(UserError) as error:
            distill(toy(**big, teacher__fit_steps=1), run, quiet=True)
        reason = r"pool-0/\d+\.safetensors: cannot be written: No space left on device"
        assert re.search(rf"{reason}; the same command goes on from the last checkpoint$", str(error.value))
        assert not list(run.glob(".pool*"))


# Antithetic pairs


@pytest.mark.parametrize("reuse", [False, True])
def test_pairs_of_both_signs_share_path_and_time(reuse: bool, tmp_path: Path, watch: Watch) -> None:
    """With reuse each member of a pair has its turn; else half of the paths are run. The generator's are no pairs."""
    distill(toy(rollouts__antithetic="noise", rollouts__reuse=reuse), tmp_path / "run", quiet=True)
    for phase in (1, 2):
        for i, (_, x, eps, t) in enumerate(watch.fake[phase]):
            assert torch.equal(eps[::2], -eps[1::2]) and torch.equal(t[::2], t[1::2]) and len(t.unique()) == 4
            assert torch.equal(x[::2], x[1::2]) and len(x.unique()) == 4
            if reuse:
                end = watch.generator[phase][i // 2].x
                assert torch.equal(x[::2], end[1::2] if i % 2 == 0 else end[::2])
        for _, x, eps, t in watch.generator[phase]:
            assert min(len(values.abs().unique()) for values in (x, eps, t)) == 8
        rolled = [calls[expert_role(phase)] for calls in watch.calls[phase]]
        assert rolled == ([16, 0, 16] if reuse else [8, 8, 16]) * 4


def test_pairs_of_opposite_first_noises_share_prompt_time_and_noise() -> None:
    table: Any = SimpleNamespace(eligible=lambda bucket: range(1000), row=lambda index, bucket: {"text": index})
    draws = drawn(toy(rollouts__antithetic="start"), update=1, samples=40)
    start, eps, (_, t), text = draws.start(), draws.eps(), draws.times(), draws.condition(table)["text"]
    assert torch.equal(start[::2], -start[1::2]) and len(start.abs().unique()) == 20
    for shared in (eps, t, text):
        assert torch.equal(shared[::2], shared[1::2]) and len(shared.unique()) > 15
    own = drawn(toy(rollouts__antithetic="start"), update=0, samples=40)
    assert len(own.eps().abs().unique()) == len(own.times()[1].unique()) == 40  # re-noised for the generator: no pairs


def kolmogorov(x: Tensor) -> float:
    """The distance of a sample from the standard normal law, times the root of its size; 1.95 is p = .001."""
    x = x.flatten().double().sort().values
    law, grid = torch.special.ndtr(x), torch.arange(len(x), dtype=torch.float64) / len(x)
    return (torch.maximum((law - grid).abs(), (grid + 1 / len(x) - law).abs()).max() * math.sqrt(len(x))).item()


@pytest.mark.parametrize("antithetic", ["noise", "start"])
def test_each_noise_of_a_pair_is_standard_normal(antithetic: str) -> None:
    """Either member of the pairs; an eps that does not change its sign alternately is shared."""
    for reuse in (False, True):
        draws = drawn(toy(rollouts__antithetic=antithetic, rollouts__reuse=reuse), update=1, samples=4000)
        for noise in (draws.eps(), draws.start()):
            for member in (noise[::2], noise[1::2]):
                assert kolmogorov(member) < 1.95
                assert abs(member.var().item() - 1) < 4 * math.sqrt(2 / len(member))
        assert abs(torch.corrcoef(torch.stack([draws.eps()[: len(draws.rolled)], draws.start()]).squeeze())[0, 1]) < 0.1


def test_samples_that_cannot_be_paired_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the config alone where they are odd, and where processes would have an odd number each."""
    for levers in ({"batch_size": 5}, {"engine__micro_batch": 3}):
        with pytest.raises(
            UserError, match=r"^rollouts\.antithetic: needs an even batch_size, and engine\.micro_batch"
        ):
            toy(rollouts__antithetic="noise", **levers)
    monkeypatch.setattr(world, "world_size", lambda: 2)
    with pytest.raises(UserError, match=r"^rollouts\.antithetic: 3 samples in calls of 3 cannot be paired$"):
        world.shares(6, toy().engine, pairs=True)


FEATURES = torch.tensor([0.3, 1.1, 0.2], dtype=torch.float64)  # of the fake: of 1, x and tanh x


def features(x: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(x), x, torch.tanh(x)], 1)


def gradients(config: Config, samples: int) -> Tensor:
    """Of each sample's loss in the fake's three weights [b, 3], from one update's draws."""
    draws = drawn(config, update=1, samples=samples)
    x_s, (s, t) = Paths().end(draws, {}).double(), draws.times()
    x_s = x_s if draws.shared is None else x_s[draws.shared]
    theta = FEATURES.repeat(samples, 1).requires_grad_()
    loss = score_matching_loss(
        lambda x, _: (theta * features(x)).sum(1, keepdim=True), x_s, draws.eps().double(), s, t, FlowSchedule(), "flow"
    )
    return torch.autograd.grad(loss.sum(), theta)[0]


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize(("antithetic", "t", "most"), [("noise", 5 / 6 + 0.004, 0.5), ("start", 1.0, 0.1)])
def test_pairs_keep_the_expected_gradient_and_lower_its_variance(
    antithetic: str, t: float, most: float, reuse: bool
) -> None:
    """One exact step from t = 1 gives x_s = (1 - s) MEAN + s eps_0, so the fake's optimum is known, and the mean of
    the gradient by quadrature: within four standard errors. A pair's variance against that of two single draws.
    """
    plain = {"plan__steps": 2, "plan__shift": 5.0, "renoise__fixed": t}
    config, samples = toy(**plain), 6000
    paired = toy(**plain, rollouts__antithetic=antithetic, rollouts__reuse=reuse)
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
    assert (pair.var(0) / single.var(0)).max() < most


# Exits


@pytest.mark.parametrize("reuse", [False, True])
def test_shuffled_exits_come_once_each_before_any_comes_again(reuse: bool) -> None:
    """Of the generator's turns, and of the fake's own where it has any; in another order for another seed."""

    def exits(seed: int, phase: int, generator: bool) -> list[int]:
        shuffled = {"plan__steps": 8, "plan__gradient": "last", "plan__exits": "shuffled", "fake__updates": 3}
        shuffled |= {"plan__fake_rollout": "same"}
        config = toy(**shuffled, rollouts__reuse=reuse, seed=seed)
        turns = [(i, u) for i in range(16) for u in ([0] if generator else [1, 2, 3])]
        return [drawn(config, u, 1, phase, i).path[-1].step for i, u in turns]

    orders = []
    for seed in (0, 1):
        for phase, own in ((1, [0, 1, 2, 3]), (2, [4, 5, 6, 7])):
            generator, fake = exits(seed, phase, True), exits(seed, phase, False)
            if reuse:
                assert fake == [step for step in generator for _ in range(3)]
            for turns in [generator] if reuse else [generator, fake]:
                orders.append(tuple(step - own[0] for step in turns))
                runs = [turns[i : i + 4] for i in range(0, len(turns), 4)]
                assert all(sorted(run) == own for run in runs) and len({tuple(run) for run in runs}) > 1
    assert len({order[:16] for order in orders}) == len(orders)


# Sorted re-noise times


@pytest.mark.parametrize("antithetic", [None, "noise"])
def test_sorted_times_are_those_of_the_batch_in_order_however_it_is_shared(
    antithetic: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def times(processes: int, sort: bool) -> list[list[float]]:
        """Of each micro-batch, over all processes."""
        levers = {"batch_size": 24, "engine__micro_batch": 24 // processes // 3, "rollouts__antithetic": antithetic}
        config, found = toy(renoise__sort=sort, **levers), []
        monkeypatch.setattr(world, "world_size", lambda: processes)
        for everyone in world.shares(24, config.engine, pairs=antithetic is not None):
            found.append([])
            for rank in range(processes):
                monkeypatch.setattr(drawing, "rank", lambda rank=rank: rank)
                found[-1] += Draws(gaussian(config), 1, 4, 1, everyone, [1.0]).times()[1].tolist()
        return found

    alone, pair, unsorted = times(1, True), times(2, True), times(1, False)
    assert alone == pair and [len(part) for part in alone] == [8, 8, 8]
    flat = [t for part in alone for t in part]
    assert flat == sorted(flat, reverse=True) == sorted((t for part in unsorted for t in part), reverse=True)
    assert len(set(flat)) == (24 if antithetic is None else 12)
    if antithetic == "noise":
        assert flat[::2] == flat[1::2]


@pytest.fixture
def wan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """A run of nano-t2i in four steps and two phases, whose teacher is two tiny random Wans with guidance 2."""
    (tmp_path / "prompts.txt").write_text("a seven\na handwritten digit\nseven\n")

    def make(**overrides: Any) -> Config:
        model = TinyWan(2, (0.9,), guidance=2.0)
        monkeypatch.setattr(system, "load_model", lambda *_: (model, TinyCodec()))
        base = {
            "prompts": str(tmp_path / "prompts.txt"), "fake.updates": 2, "generator.lora.rank": 3, "plan.phases": 2,
            "generator.lora.alpha": 6, "batch_size": 8, "iterations": 2, "log_every": 1, "plan.gradient": "last",
        }  # fmt: skip
        return resolve("nano-t2i", base | {key.replace("__", "."): value for key, value in overrides.items()})

    return make


def test_sorted_times_call_fewer_networks(wan: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two networks nearly every micro-batch of four has times of both; sorted, one of two at most has."""
    calls, predict = Counter(), Roles.predict

    def counted(roles: Roles, role: str, *rest: Any) -> Tensor:
        calls[role] += role == FAKE
        return predict(roles, role, *rest)

    monkeypatch.setattr(Sampler, "preview", lambda *_: None)
    monkeypatch.setattr(Roles, "predict", counted)
    found = []
    for sort in (False, True):
        calls.clear()
        distill(wan(renoise__sort=sort, engine__micro_batch=4, iterations=1), tmp_path / str(sort), quiet=True)
        found.append(calls[FAKE])
    least = 2 * 3 * 2  # phases, updates and micro-batches
    assert least <= found[1] <= least + 2 * 3 < found[0] <= 2 * least


def test_levers_that_do_not_go_together_are_refused() -> None:
    for levers, message in (
        ({"renoise__sort": True, "rollouts__pool": 2}, r"renoise\.sort: with a rollouts\.pool"),
        ({"objective__divergence": "fisher", "engine__sequence_parallel": 2}, r"objective\.divergence: only 'kl'"),
    ):
        with pytest.raises(ValueError, match=message):
            toy(**levers)


@pytest.mark.parametrize("batched", [False, True])
def test_the_plan_foresees_guidance(batched: bool, wan: Callable, tmp_path: Path, watch: Watch) -> None:
    """Two samples a call or two calls: the work is the same. All four steps, so that there is no exit to draw."""
    config = wan(engine__batched_guidance=batched, plan__gradient="all", rollouts__reuse=True)
    distill(config, tmp_path / "run", quiet=True)
    for phase in (1, 2):
        work = phase_work(config, config.phase_plan((0.9,)), phase, guided=True)
        assert sum(watch.total(phase).values()) == 2 * 8 * work.calls
        assert watch.total(phase)[TEACHER] == 2 * 2 * 8


# All together, and none


@pytest.mark.parametrize("divergence", ["fisher", "fisher-stop-gradient"])
def test_a_run_with_every_lever_is_byte_identical_when_it_is_stopped_between_updates(
    divergence: str, wan: Callable, tmp_path: Path
) -> None:
    levers = {
        "rollouts__reuse": True, "rollouts__antithetic": "noise", "rollouts__pool": 2, "rollouts__pool_refresh": 0.5,
        "rollouts__pool_on_disk": True, "plan__exits": "shuffled", "plan__solver": "renoise",
        "objective__divergence": divergence, "fake__pull": 0.5, "engine__micro_batch": 2,
        "engine__batched_guidance": True, "batch_size": 4, "iterations": 3,
    }  # fmt: skip
    whole = files(distill(wan(**levers), tmp_path / "whole", quiet=True))
    said = stopped_after(3 * 3 + 3 + 1, wan(**levers), tmp_path / "run")
    assert said.count("stopped and saved at phase 2, iteration 1, update 1;") == 1
    distill(wan(**levers), tmp_path / "run", quiet=True)
    assert files(tmp_path / "run") == whole
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
    asked = gaussian(toy(plan__steps=6, plan__gradient="last", plan__fake_rollout="same", plan__solver="renoise"))
    asked.model.sample_shapes = [(1,), (1,)]
    draws = Draws(asked, 2, 3, update, [range(2)], [1.0, 2.0])
    table: Any = SimpleNamespace(eligible=lambda bucket: range(1000), row=lambda index, bucket: {"text": index})
    assert (draws.bucket, draws.path[-1].step, draws.shared) == (1, exit_step, None)
    assert draws.condition(table)["text"].tolist() == list(prompts)
    found = draws.start(), draws.eps(), draws.times()[1], Paths().end(draws, {})
    for tensor, numbers in zip(found, (start, eps, t, x_s), strict=True):
        assert tensor.flatten().tolist() == pytest.approx(numbers, abs=1e-6)
