"""`distill` end to end on tiny teachers: what may not change, bit-exact resume, refusals, the loop's draws."""

import copy
import gc
import io
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import rich
import torch
from faults import interrupted
from recorded import (
    Call,
    Recorded,
    adapters,
    as_own,
    distill_own,
    distill_recorded,
    recorded,
    updates,
    watched_steps,
    weights,
)
from rich.console import Console
from tiny import CountingCodec, TinyCodec, TinyWan, draw, killed_after, newest_checkpoint
from torch import Tensor, nn

from phased_dmd import step
from phased_dmd.checkpoint import RunFolder, load_tensors
from phased_dmd.config import Ablation, Config, Optimiser, phase_plan
from phased_dmd.config.overrides import build
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import unshift_time
from phased_dmd.models.analytic import PlainCodec
from phased_dmd.models.loader import load_model
from phased_dmd.networks.build import add_expert, add_fake, build_system
from phased_dmd.networks.optim import NonFiniteError
from phased_dmd.networks.roles import FAKE, TEACHER, System, expert_role
from phased_dmd.progress import progress_bar
from phased_dmd.recipes import resolve
from phased_dmd.sampling import loading
from phased_dmd.sampling.sampler import Sampler
from phased_dmd.train import Learner, distill, end

QUICK = {
    "teacher.fit_steps": 20, "fake.updates": 2,
    "batch_size": 16, "iterations": 3, "log_every": 2, "checkpoint_every": 1000, "sample_every": None,
    "objective": "normalised",
}  # fmt: skip


def toy(method: Any = None, **overrides: Any) -> Config:
    """toy-1d (two steps, two phases, boundary .5), made quick; `plan__steps=4` overrides plan.steps."""
    return resolve("toy-1d", {**QUICK, **{key.replace("__", "."): value for key, value in overrides.items()}}, method)


def files(run: Path, *, experts: bool = True) -> dict[str, bytes]:
    """The bytes of all that must not depend on how often a run was cut off."""
    found = {f"phase-{i}": RunFolder(run).expert_path(i).read_bytes() for i in (1, 2) if experts}
    return {**found, "metrics": (run / "metrics.jsonl").read_bytes()}


def metrics(run: Path) -> list[dict[str, Any]]:
    return RunFolder(run).metrics()


def expert(run: Path, phase: int) -> dict[str, Tensor]:
    return load_tensors(RunFolder(run).expert_path(phase))[0]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def initial_student(config: Config) -> dict[str, Tensor]:
    model, _ = load_model(config.teacher, config.seed)
    return {f"0.{name}": p.detach().cpu() for name, p in model.students[0].named_parameters()}


# ---------------------------------------------------------------- what may not change


def test_earlier_experts_and_the_teacher_never_change(tmp_path: Path) -> None:
    config, run = toy(generator__ema=0.5), tmp_path / "run"
    model, first = recorded(config, run), RunFolder(run).expert_path(1)
    networks: dict[str, nn.Module] = {}
    written: list[bytes] = []

    def then(call: Call, network: nn.Module, _: Tensor) -> None:
        networks[call.role] = network
        if call.phase == 2:
            written.append(first.read_bytes())

    model.then = then
    distill_own(config, run, model)
    assert {first.read_bytes(), *written} == {written[0]}
    assert same(weights(networks["phase_1"]), expert(run, 1))
    assert not any(p.requires_grad for p in networks["phase_1"].parameters())
    start = initial_student(config)
    for phase in (1, 2):  # both were trained, each from the student
        assert all(not torch.equal(tensor, start[name]) for name, tensor in expert(run, phase).items())
    assert not same(expert(run, 1), expert(run, 2))
    assert same(weights(model.students[0]), start)
    fresh, _ = load_model(config.teacher, config.seed)
    assert same(dict(model.networks[0].named_buffers()), dict(fresh.networks[0].named_buffers()))
    assert list(model.networks[0].parameters()) == []


def test_the_end_of_a_phase_frees_its_fake(tmp_path: Path) -> None:
    """The last one's as well."""
    config = toy()
    system = build_system(config, load_model(config.teacher, 0)[0], {})
    add_expert(system, 2, trainable=True)
    add_fake(system, 2, None)
    fake = ref(system.roles.module(FAKE, 0))
    job: Any = SimpleNamespace(run=RunFolder(tmp_path), system=system)
    end(job, 2, Learner("phase_2", system.roles.parameters("phase_2"), config.optimiser, 0.1))
    gc.collect()
    assert fake() is None and system.roles.parameters(FAKE) == {}


def test_a_phase_starts_from_the_student_and_with_new_optimisers(tmp_path: Path) -> None:
    """In every phase, expert and fake begin as the student; the optimisers count their steps from the phase's onset."""
    config, run = toy(checkpoint_every=2), tmp_path / "run"
    model, begun = recorded(config, run), {}
    model.then = lambda call, network, _: begun.setdefault((call.phase, call.role), weights(network))
    distill_own(config, run, model)
    for phase, role in ((1, "phase_1"), (1, FAKE), (2, "phase_2"), (2, FAKE)):
        assert same(begun[phase, role], initial_student(config))
    _, tensors = newest_checkpoint(run, 2)
    steps = {name.split("/")[0]: int(t) for name, t in tensors.items() if "/step/" in name}
    assert steps == {"phase_2": 2, FAKE: 4}


# ---------------------------------------------------------------- resume

LONG = {
    "plan.steps": 4, "plan.gradient": "last", "ablation.solver": "renoise", "plan.shift": 2.0, "generator.ema": 0.8,
    "optimiser.clip": 0.2, "iterations": 10,
}  # fmt: skip
SEVENTH = "phase-2-iteration-000007"  # what begins so is greater
KILLS = ("in a step", "after a log", "in a log", "before a checkpoint", "after a checkpoint")


def long(**overrides: Any) -> Config:
    """Four steps in two phases with every state there is: exits, fresh noise, EMA, decay, counts of clipped steps."""
    return toy(**{**LONG, **overrides})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    run = distill(long(), tmp_path_factory.mktemp("reference") / "run", quiet=True)
    rows = metrics(run)
    assert [(row["phase"], row["iteration"]) for row in rows] == [(p, i) for p in (1, 2) for i in (2, 4, 6, 8, 10)]
    clipped = {row["iteration"]: row["clipped"] for row in rows if row["phase"] == 2}
    assert clipped[6] == 1 and min(clipped.values()) < 1, "iteration 5 must be clipped: its checkpoint needs it"
    return files(run)


@contextmanager
def killed(at: str, run: Path) -> Iterator[None]:
    """Around a run that a KeyboardInterrupt ends at a point of phase 2 after its iteration 7."""
    taken = Counter()

    def step_in(role: str, _: Any) -> None:
        taken[role] += 1
        if taken["phase_2"] == 8:
            raise KeyboardInterrupt

    def due(path: Path) -> bool:
        match at:
            case "after a log" | "in a log":
                return path == run / "timing.jsonl" and [logged(row) for row in metrics(run)][-1:] == [(2, 8)]
            case "before a checkpoint":
                return path.parent == run / "checkpoints" and path.name[1:] > SEVENTH
        return path.is_relative_to(run) and any(p.name > SEVENTH for p in run.glob("checkpoints/phase-2-*"))

    if at == "in a step":
        with watched_steps(after=step_in), pytest.raises(KeyboardInterrupt):
            yield
        return
    with interrupted(due):
        yield
    if at == "in a log":  # of its last line some has been written
        *lines, last = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(lines) + last[:40])


def logged(row: dict[str, Any]) -> tuple[int, int]:
    return row["phase"], row["iteration"]


def steps_taken(config: Config, run: Path) -> int:
    """Goes on with a run, and counts the steps of its optimisers."""
    count: list[str] = []
    with watched_steps(after=lambda role, _: count.append(role)):
        distill(config, run, quiet=True)
    return len(count)


@pytest.mark.parametrize("at", KILLS)
@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_resumed_run_is_byte_identical(every: int, at: str, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    config, run = long(checkpoint_every=every), tmp_path / "run"
    with killed(at, run):
        distill(config, run, quiet=True)
    assert RunFolder(run).expert_path(1).exists() and not RunFolder(run).expert_path(2).exists()
    done = newest_checkpoint(run, 2)[0].get("iteration", 0)
    assert 5 <= done <= 10
    assert steps_taken(config, run) == (2 + 1) * (10 - done)  # it went on, and did not start again
    assert files(run) == uninterrupted


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("every", [2, 1000])
def test_a_run_cut_off_between_phases_is_byte_identical(
    every: int, when: str, phase: int, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    """Around the writing of an expert's file, with a checkpoint of the last iteration and with none at all."""
    config, run = long(checkpoint_every=every), tmp_path / "run"
    file = RunFolder(run).expert_path(phase)

    def due(path: Path) -> bool:
        if when == "before":
            return path.parent == file.parent and file.name in path.name
        return path.is_relative_to(run) and file.exists()

    with interrupted(due):
        distill(config, run, quiet=True)
    assert file.exists() == (when == "after")
    assert RunFolder(run).finished(config) == (phase == 2 and when == "after")
    distill(config, run, quiet=True)
    assert files(run) == uninterrupted


def test_a_run_that_goes_on_with_other_cadences_trains_the_same_and_counts_what_is_clipped_right(
    tmp_path: Path,
) -> None:
    """Killed after iteration 7 of phase 2, between two lines of metrics; every gradient is clipped."""
    config, run = long(checkpoint_every=7, optimiser__clip=1e-6), tmp_path / "run"
    whole = distill(config, tmp_path / "whole", quiet=True)
    with killed("after a checkpoint", run):
        distill(config, run, quiet=True)
    other = config.model_copy(update={"log_every": 4, "sample_every": 3, "checkpoint_every": 2})
    distill(other, run, quiet=True)
    rows = [row for row in metrics(run) if row["phase"] == 2]
    assert [(row["iteration"], row["clipped"]) for row in rows] == [(2, 1), (4, 1), (6, 1), (8, 1), (10, 1)]
    for phase in (1, 2):
        assert RunFolder(run).expert_path(phase).read_bytes() == RunFolder(whole).expert_path(phase).read_bytes()


def test_a_run_killed_after_every_iteration_is_byte_identical(tmp_path: Path) -> None:
    config = toy(iterations=3, checkpoint_every=1, generator__ema=0.5)
    whole = files(distill(config, tmp_path / "whole", quiet=True))
    for phase, iteration in itertools.product((1, 2), (1, 2, 3)):
        with killed_after(phase, iteration):
            distill(config, tmp_path / "run", quiet=True)
    distill(config, tmp_path / "run", quiet=True)  # nothing is left to do but write the expert
    assert files(tmp_path / "run") == whole


class Unwanted:
    """A model or codec of which nothing may be asked."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} is asked of the teacher of a finished run")


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    config, run = toy(checkpoint_every=1), tmp_path / "run"
    distill_recorded(config, run)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}
    unwanted: Any = Unwanted()
    assert distill_own(config, run, unwanted, unwanted) == run
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()} == before


def test_another_config_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run = distill(toy(), tmp_path / "run", quiet=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for overrides, difference in (
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"plan__shift": 2.0}, "plan.shift is 1.0 there, 2.0 here"),
        ({"generator__lr": 2e-2, "iterations": 4}, "generator.lr is 0.0005 there, 0.02 here"),
        ({"generator__ema": 0.5}, "generator.ema is null there, 0.5 here"),
        ({"teacher__means": [[0.0]] * 40}, "teacher.means is [["),  # cut
    ):
        with pytest.raises(UserError) as error:
            distill(toy(**overrides), run, quiet=True)
        said = str(error.value)
        assert said.startswith(f"--output: {run} holds another run of toy-1d: {difference}")
        assert len(said) < 250 + 2 * len(str(run))
        assert said.endswith(f"; take another --output, with --init-experts {run} to go on from its experts")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_model_of_ones_own_is_given_from_python_with_a_weight_for_each_of_its_shapes(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a seven\n")
    mine = (TinyWan(), TinyCodec())

    def config(*weights: float) -> Config:
        teacher = {"kind": "own", "weights": weights}
        return build({"recipe": "mine", "teacher": teacher, "prompts": str(tmp_path / "prompts.txt")})

    for asked, own, message in (
        (config(1.0, 2.0), mine, "teacher.weights: 2 for the model's 1 sample_shapes"),
        (config(1.0), None, "teacher.kind: own is a model of yours: name it by --own module:function, from Python by "
         r"own=\(model, codec\); see docs/extending.md"),
        (toy(), mine, "teacher.kind: analytic, which has a model already; one of your own is for the recipe own"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^{message}$"):
            distill(asked, tmp_path / "run", quiet=True, own=own)
    assert not (tmp_path / "run").exists()


def test_a_model_of_ones_own_on_another_device_is_refused(tmp_path: Path) -> None:
    """Under torchrun it would be the first process's GPU that all others' models are on."""
    (tmp_path / "prompts.txt").write_text("a seven\n")
    config = build({"recipe": "mine", "teacher": {"kind": "own"}, "prompts": str(tmp_path / "prompts.txt")})
    model = TinyWan()
    model.networks[0].to("meta")
    with pytest.raises(UserError, match=r"^networks\[0\] is on meta, and this process computes on (cpu|cuda:0): "):
        distill(config, tmp_path / "run", quiet=True, own=(model, TinyCodec()))


def test_a_folder_with_foreign_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_text("not ours")
    with pytest.raises(UserError, match="exists and is not a run folder"):
        distill(toy(), tmp_path, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_teacher_that_cannot_be_loaded_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a seven\n")
    config = resolve("nano-t2i", {"teacher.path": str(tmp_path / "absent"), "prompts": str(tmp_path / "prompts.txt")})
    with pytest.raises(UserError, match=r"^teacher\.path: "):
        distill(config, tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match="^prompts: "):
        distill(config.model_copy(update={"prompts": "absent.txt"}), tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match=r"^plan\.start: eps prediction cannot start at t = 1, where alpha is "):
        distill(toy(teacher__prediction="eps", teacher__fit_steps=1), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- nothing non-finite passes


@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", [FAKE, "phase_2"])
def test_a_non_finite_number_stops_before_the_step(role: str, bad: float, fault: str, tmp_path: Path) -> None:
    """In phase 2, iteration 1: the fake's second update, or the generator's; all weights stay as they were."""
    config, run = toy(), tmp_path / "run"
    model, calls, before = recorded(config, run), Counter(), {}
    networks: dict[str, nn.Module] = {}

    def spoil(call: Call, network: nn.Module, out: Tensor) -> None:
        networks[call.role] = network
        calls[call.phase, call.role] += call.differentiated
        if not call.differentiated or calls[2, role] != (2 + 2 if role == FAKE else 2) or call.role != role:
            return
        before.update({r: weights(networks[r]) for r in ("phase_1", "phase_2", FAKE)})
        if fault == "loss":
            out.data.mul_(bad)
        else:
            out.register_hook(lambda gradient: gradient * bad)

    model.then = spoil
    which = r"the loss is (nan|inf)" if fault == "loss" else r"the gradient of 0\.net\.\d+\.(weight|bias) is not finite"
    kept = r"generator\.lr is \S+ and fake\.lr \S+, of which one may be too high; the state before it is in \S+"
    with pytest.raises(NonFiniteError, match=rf"^phase 2, iteration 1, {role}: {which}; {kept}$"):
        distill_own(config, run, model)
    assert all(same(weights(networks[r]), state) for r, state in before.items()) and len(before) == 3
    assert not RunFolder(run).expert_path(2).exists()
    assert all(math.isfinite(value) for row in metrics(run) for value in row.values())


def spoilt_trainer(gradients: dict[str, list[float]]) -> tuple[Learner, dict[str, Tensor]]:
    """A trainer of zero weights whose backward has just left these gradients; and those weights."""
    parameters = {}
    for name, gradient in gradients.items():
        parameters[name] = torch.nn.Parameter(torch.zeros(len(gradient)))
        parameters[name].grad = torch.tensor(gradient)
    return Learner(FAKE, parameters, Optimiser(), 0.1), parameters


def stepped(trainer: Learner) -> float:
    """The norm before clipping, after a step as training takes it."""
    norm = trainer.checked_norm(1.0, "phase 1, iteration 0")
    trainer.clip(norm)
    trainer.step(0)
    return norm.item()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_the_guard_names_the_tensor_at_fault(bad: float) -> None:
    trainer, parameters = spoilt_trainer({"first": [1.0, 2.0], "second": [3.0, bad], "third": [1.0]})
    with pytest.raises(NonFiniteError, match="^phase 1, iteration 0, fake: the gradient of second is not finite$"):
        stepped(trainer)
    assert not any(p.any() for p in parameters.values())


def test_a_norm_that_overflows_stops_as_well() -> None:
    """1e30 is finite and its square is not, in float32: the norm is infinite."""
    trainer, parameters = spoilt_trainer({"first": [1e30, 1.0], "second": [2.0]})
    with pytest.raises(NonFiniteError, match="^phase 1, iteration 0, fake: the norm of all gradients overflows$"):
        stepped(trainer)
    assert not any(p.any() for p in parameters.values())


def test_a_step_returns_the_norm_before_clipping_and_takes_the_clipped_gradient() -> None:
    """All tensors together: |(3, 4, 12)| = 13, clipped to 1; below the clip nothing changes."""
    applied = []
    with watched_steps(before=lambda _, group: applied.append([p.grad.tolist() for p in group["params"]])):
        trainer, _ = spoilt_trainer({"first": [3.0, 4.0], "second": [12.0]})
        assert stepped(trainer) == pytest.approx(13, rel=1e-6)
        trainer, _ = spoilt_trainer({"first": [0.3, 0.4], "second": [0.5]})
        assert stepped(trainer) == pytest.approx(0.5**0.5, rel=1e-6)
    assert applied[0][0] == pytest.approx([3 / 13, 4 / 13], rel=1e-5) and applied[0][1] == pytest.approx([12 / 13])
    assert applied[1] == [torch.tensor([0.3, 0.4]).tolist(), [0.5]]


# ---------------------------------------------------------------- all methods

METHODS, SOLVERS = ("dmd", "dmd-sgts", "phased", "phased-sgts"), ("ddim", "renoise")
WEIGHTINGS = ("normalised", "paper", "public")
COMBINATIONS = list(itertools.product(METHODS, SOLVERS, WEIGHTINGS))
PHASES = {"dmd": 1, "dmd-sgts": 1, "phased": 4, "phased-sgts": 2}  # of four steps


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Path]:
    """Every method x solver x weighting: four generator updates on four steps."""
    folder, runs = tmp_path_factory.mktemp("everything"), {}
    for method, solver, weighting in COMBINATIONS:
        plan = {"plan__steps": 4, "plan__phases": PHASES[method], "ablation__solver": solver}
        config = toy(method, **plan, objective=weighting, iterations=4 // PHASES[method])
        name = f"{method}-{solver}-{weighting}"
        runs[method, solver, weighting] = distill(config, folder / name, quiet=True)
    return runs


@pytest.mark.parametrize(("method", "solver", "weighting"), COMBINATIONS)
def test_every_method_solver_and_weighting_trains(
    method: str, solver: str, weighting: str, everything: dict[tuple[str, str, str], Path]
) -> None:
    run = everything[method, solver, weighting]
    config = RunFolder(run).config()
    start = initial_student(config)
    assert config.method == method and config.plan.phases == PHASES[method]
    assert config.iterations * config.plan.phases == 4
    for phase in range(1, config.plan.phases + 1):
        tensors, header = load_tensors(RunFolder(run).expert_path(phase))
        assert (header["method"], header["solver"], header["phase"]) == (method, solver, phase)
        for name, tensor in tensors.items():
            assert tensor.isfinite().all() and not torch.equal(tensor, start[name])
    values = [value for row in metrics(run) for value in row.values()]
    assert all(math.isfinite(value) for value in values)
    assert sum(row["iteration"] == config.iterations for row in metrics(run)) == config.plan.phases


def test_every_method_solver_and_weighting_is_another(everything: dict[tuple[str, str, str], Path]) -> None:
    """No two runs give the same first expert, but for public = normalised where the one phase ends at s = 0."""
    weights = {key: torch.cat([t.flatten() for t in expert(run, 1).values()]) for key, run in everything.items()}
    for a, b in itertools.combinations(weights, 2):
        close = torch.allclose(weights[a], weights[b], rtol=0, atol=1e-6)
        one_phase = a[0] == b[0] and a[1] == b[1] and a[0].startswith("dmd")
        assert close == (one_phase and {a[2], b[2]} == {"normalised", "public"}), (a, b)


def test_sgts_is_all_where_each_phase_has_one_step(tmp_path: Path) -> None:
    """The only exit is the phase's only step. With two steps a phase the two differ."""
    for steps, equal in ((2, True), (4, False)):
        runs = [
            distill(toy(plan__steps=steps, plan__gradient=gradient), tmp_path / f"{steps}-{gradient}", quiet=True)
            for gradient in ("all", "last")
        ]
        assert (expert_bytes(runs[0]) == expert_bytes(runs[1])) == equal
        assert (metrics(runs[0]) == metrics(runs[1])) == equal


def expert_bytes(run: Path) -> list[bytes]:
    return [tensor.numpy().tobytes() for phase in (1, 2) for tensor in expert(run, phase).values()]


def test_the_seed_decides_the_run(tmp_path: Path) -> None:
    runs = [distill(toy(seed=seed), tmp_path / str(i), quiet=True) for i, seed in enumerate((5, 5, 6))]
    assert files(runs[0]) == files(runs[1])
    assert not same(expert(runs[0], 1), expert(runs[2], 1))


# ---------------------------------------------------------------- the update


def test_the_expert_file_holds_the_ema(tmp_path: Path) -> None:
    """e <- .7 e + .3 w after each of the expert's steps, from the student; later phases run on it too."""
    config, run = toy(generator__ema=0.7, iterations=4), tmp_path / "run"
    averages = {role: {k: v.double() for k, v in initial_student(config).items()} for role in ("phase_1", "phase_2")}
    model, networks, last = recorded(config, run), {}, {}
    model.then = lambda call, network, _: networks.update({call.role: network})

    def step(role: str, group: dict[str, Any]) -> None:
        if role != FAKE:
            average = averages[role]
            last[role] = {
                name: p.detach().to("cpu", copy=True) for name, p in zip(average, group["params"], strict=True)
            }
            averages[role] = {k: 0.7 * v + 0.3 * last[role][k].double() for k, v in average.items()}

    with watched_steps(after=step):
        distill_own(config, run, model)
    for phase, role in ((1, "phase_1"), (2, "phase_2")):
        held = expert(run, phase)
        for name, tensor in held.items():
            torch.testing.assert_close(tensor.double(), averages[role][name], rtol=0, atol=1e-6)
        assert any((tensor - last[role][name]).abs().max() > 1e-5 for name, tensor in held.items())
        assert same(weights(networks[role]), held)


def rates_of(config: Config, run: Path) -> list[float]:
    """The learning rates of a run's steps."""
    rates: list[float] = []
    with watched_steps(after=lambda _, group: rates.append(group["lr"])):
        distill(config, run, quiet=True)
    return rates


def test_linear_decay_reaches_both_optimisers(tmp_path: Path) -> None:
    rate = {"fake__lr": 8e-3, "generator__lr": 4e-3}
    one_phase = [rate for k in (1, 0.75, 0.5, 0.25) for rate in (8e-3 * k, 8e-3 * k, 4e-3 * k)]  # fake, fake, expert
    assert rates_of(toy(iterations=4, **rate), tmp_path / "a") == pytest.approx(one_phase * 2, rel=1e-12)
    constant = {"optimiser__decay": "constant"}
    assert rates_of(toy(iterations=4, **rate, **constant), tmp_path / "b") == [8e-3, 8e-3, 4e-3] * 8
    rates = rates_of(toy(iterations=4, phase_shares=[0.5, 1.0], **rate), tmp_path / "c")
    assert rates == pytest.approx([8e-3, 8e-3, 4e-3, 4e-3, 4e-3, 2e-3] + one_phase, rel=1e-12)
    assert [logged(row) for row in metrics(tmp_path / "c")] == [(1, 2), (2, 2), (2, 4)]


def test_gradients_are_clipped_and_the_clipped_counted(tmp_path: Path) -> None:
    """Windows of log_every 2 and a last one of 1; the norm that is logged is the one before clipping."""
    config, run = toy(iterations=5, optimiser__clip=0.2), tmp_path / "run"
    model, gradients, mine, applied = recorded(config, run), {}, [], []

    def then(call: Call, network: nn.Module, _: Tensor) -> None:
        if (call.phase, call.role) == (1, "phase_1") and not gradients:
            for p in network.parameters():
                gradients[p] = torch.zeros(())
                p.register_post_accumulate_grad_hook(lambda p: gradients.update({p: p.grad.clone()}))

    def step(role: str, group: dict[str, Any]) -> None:
        if role == "phase_1":
            for norms, found in ((mine, gradients.values()), (applied, [p.grad for p in group["params"]])):
                norms.append(math.sqrt(sum(float(gradient.double().square().sum()) for gradient in found)))

    model.then = then
    with watched_steps(before=step):
        distill_own(config, run, model)
    rows = [row for row in metrics(run) if row["phase"] == 1]
    over = [norm > 0.2 for norm in mine]
    assert len(mine) == 5
    assert sum(over[:4]) in (1, 2, 3) and over[4], "some are clipped and some not, and the last, for the test to bite"
    assert [row["iteration"] for row in rows] == [2, 4, 5]
    assert [row["clipped"] for row in rows] == [sum(over[:2]) / 2, sum(over[2:4]) / 2, float(over[4])]
    assert [row["generator_gradient_norm"] for row in rows] == pytest.approx([mine[1], mine[3], mine[4]], rel=1e-5)
    assert applied == pytest.approx([min(norm, 0.2) for norm in mine], rel=1e-3)


# ---------------------------------------------------------------- rollouts and re-noise times


def test_fakes_train_first_then_the_generator_on_all_steps(tmp_path: Path) -> None:
    """2 fake updates without gradient, then one of the generator with gradient in its phase's steps only."""
    config = toy(plan__steps=4, plan__phases=2)
    made, plan = list(updates(config, distill_recorded(config, tmp_path / "run"))), phase_plan(config)
    for phase, own in ((1, (0, 1)), (2, (2, 3))):
        found = [update for update in made if update.batch.phase == phase]
        times = [hop.t for hop in plan.path(phase)]
        assert [([call.t[0].item() for call in update.experts], update.differentiated()) for update in found] == (
            [(times, ())] * 2 + [(times, own)]
        ) * 3
        assert [[call.role for call in update.scores] for update in found] == ([[FAKE]] * 2 + [[TEACHER, FAKE]]) * 3
        assert {update.batch.s.unique().item() for update in found} == {[0.5, 0.0][phase - 1]}


@pytest.mark.parametrize("fake_rollout", ["same", Ablation().fake_rollout])
def test_sgts_draws_one_exit_a_batch(fake_rollout: str, tmp_path: Path) -> None:
    """Exits uniform over the phase's steps; each path ends at the phase's end; gradient in the exit step alone."""
    plan_of_six = {"plan__steps": 6, "plan__gradient": "last", "ablation__fake_rollout": fake_rollout}
    config = toy(**plan_of_six, iterations=40, batch_size=2)
    made, plan = list(updates(config, distill_recorded(config, tmp_path / "run"))), phase_plan(config)
    for phase, own in ((1, (0, 1, 2)), (2, (3, 4, 5))):
        generator = [update for update in made if update.batch.phase == phase and update.differentiated()]
        fake = [update for update in made if update.batch.phase == phase and not update.differentiated()]
        assert len(generator) == 40 and len(fake) == 80
        exits: dict[bool, list[int]] = {True: [], False: []}
        for update in (*generator, *fake):
            times = [call.t[0].item() for call in update.experts]
            assert times == list(plan.times[: len(times)]) and update.batch.s[0] == plan.end(phase)
            assert update.differentiated() in ((), (len(times) - 1,))
            exits[bool(update.differentiated())].append(len(times) - 1)
        for found in exits.values() if fake_rollout == "same" else (exits[True],):
            drawn, expected = Counter(found), len(found) / 3
            assert set(drawn) == set(own)
            assert sum((count - expected) ** 2 / expected for count in drawn.values()) < 13.8  # chi-squared, p = .001
        if fake_rollout != "same":
            assert set(exits[False]) == {own[-1]}


INTERVALS = [  # overrides, (low, high] of phase 1 and of phase 2; the grid of shift 3 at two steps is 1, .75, 0
    ({}, (0.75, 1.0), (0.02, 1.0)),
    ({"ablation__renoise": "disjoint"}, (0.75, 1.0), (0.02, 0.75)),
    ({"plan__start": 0.9}, None, None),
]


@pytest.mark.parametrize(("overrides", "first", "second"), INTERVALS)
def test_renoise_times_are_uniform_in_raw_time(
    overrides: dict[str, Any], first: Any, second: Any, tmp_path: Path
) -> None:
    """Of fake and generator, within the interval; uniform before the shift by Kolmogorov-Smirnov (1.95: p = .001)."""
    config = toy(plan__shift=3.0, iterations=20, **overrides)
    plan = phase_plan(config)
    if first is None:  # nested below a start of .9
        first, second = (plan.times[1], 0.9), (0.02, 0.9)
    model = distill_recorded(config, tmp_path / "run")
    for phase, (low, high) in ((1, first), (2, second)):
        for role, count in ((TEACHER, 20), (FAKE, 60)):  # the fake's own 40 batches and the generator's 20
            t = torch.cat([call.t for call in model.of(role, phase)]).cpu()
            assert t.dtype == torch.float64 and len(t) == 16 * count and t.min() > low and t.max() <= high
            u_low, u_high = unshift_time(low, 3.0), unshift_time(high, 3.0)
            u = ((unshift_time(t, 3.0) - u_low) / (u_high - u_low)).sort().values
            grid = torch.arange(len(u), dtype=torch.float64) / len(u)
            distance = torch.maximum((u - grid).abs(), (grid + 1 / len(u) - u).abs()).max()
            assert distance * math.sqrt(len(u)) < 1.95


def test_a_fixed_time_is_the_only_one(tmp_path: Path) -> None:
    model = distill_recorded(toy(ablation__renoise=0.7), tmp_path / "run")
    for role, phase in itertools.product((TEACHER, FAKE), (1, 2)):
        assert {t for call in model.of(role, phase) for t in call.t.tolist()} == {0.7}


def test_no_two_updates_share_their_noise(tmp_path: Path) -> None:
    """`updates` has compared what the networks were given with what each update draws."""
    config, drawn = toy(ablation__solver="renoise", plan__steps=4, plan__phases=2), []
    for batch, *_ in updates(config, distill_recorded(config, tmp_path / "run")):
        drawn += [batch.first_noise(), batch.eps, *(batch.step_noise(hop.step) for hop in batch.path if hop.r > 0)]
    assert len(drawn) == 9 * (2 + 2) + 9 * (2 + 3)  # start and eps, and one renoise a step that ends above 0
    numbers = torch.cat(drawn).flatten()
    assert len(numbers.unique()) > 0.999 * len(numbers)  # float32 normals repeat now and then by themselves


def test_prompts_are_drawn_uniformly_by_sample() -> None:
    """Pearson's chi-squared over 8 prompts: 24.3 is exceeded once in a thousand (7 degrees). Splits agree."""
    batch = {"batch": lambda rows: {"text": torch.tensor([row["text"] for row in rows])}}
    model = SimpleNamespace(sample_shapes=[(1,)], **batch)
    system: Any = System(toy(), model, None, phase_plan(toy()), {})  # type: ignore[arg-type] draws from it alone
    table: Any = SimpleNamespace(eligible=lambda bucket: range(8), row=lambda index, bucket: {"text": index})

    def drawn(update: int, samples: range) -> Tensor:
        return step.draw(system, 1, 2, update, samples, [1.0], table).condition["text"]

    whole = drawn(3, range(4000))
    assert ((torch.bincount(whole, minlength=8) - 500.0) ** 2 / 500).sum() < 24.3
    assert torch.equal(drawn(3, range(100, 200)), whole[100:200])
    assert not torch.equal(drawn(2, range(4000)), whole)


def test_buckets_are_drawn_by_weight_one_a_batch() -> None:
    """Weights 1, 0, 3: shares 1/4, 0, 3/4 of 4000 batches, within four standard deviations, whatever the samples."""
    model = SimpleNamespace(sample_shapes=[(1,), (2,), (3,)], batch=lambda rows: {})
    system: Any = System(toy(), model, None, phase_plan(toy()), {})  # type: ignore[arg-type] draws from it alone

    def drawn(samples: range) -> list[int]:
        return [step.draw(system, 1, i, 2, samples, [1.0, 0.0, 3.0], None).shape[0] - 1 for i in range(4000)]

    buckets = drawn(range(2))
    shares = torch.tensor(buckets).bincount(minlength=3) / 4000
    assert shares[1] == 0 and abs(shares[0].item() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert buckets == drawn(range(9, 11))


# ---------------------------------------------------------------- LoRA experts on Wan


Wan = Callable[..., tuple[Config, TinyWan]]


@pytest.fixture
def wan(tmp_path: Path) -> Wan:
    """A run of nano-t2i whose teacher is a tiny random Wan with guidance 2, and that teacher."""
    (tmp_path / "prompts.txt").write_text("a seven\na handwritten digit\nseven\n")

    def make(
        networks: int = 1, switches: tuple[float, ...] = (), checkpointing: bool = False, method: Any = "phased",
        **overrides: Any,
    ) -> tuple[Config, TinyWan]:  # fmt: skip
        model = TinyWan(networks, switches, guidance=2.0)
        if checkpointing:
            for network in model.networks:
                network.enable_gradient_checkpointing()
        base = {
            "prompts": str(tmp_path / "prompts.txt"), "fake.updates": 1, "generator.lora.rank": 3,
            "generator.lora.alpha": 3, "fake.lora.rank": 3, "batch_size": 3, "iterations": 2, "log_every": 1,
            "checkpoint_every": 1,
        }  # fmt: skip
        if method == "phased":  # others keep the recipe's four steps, in as many phases as the method makes
            base |= {"plan.steps": 2, "plan.phases": 2}
        renamed = {key.replace("__", "."): value for key, value in overrides.items()}
        return resolve("nano-t2i", {**base, **renamed}, method), model

    return make


def distill_wan(made: tuple[Config, TinyWan], run: Path) -> Path:
    return distill_own(made[0], run, made[1], TinyCodec())


def trained(state: dict[str, Tensor]) -> bool:
    """Every adapter's B, zero when new, has moved."""
    found = [tensor.abs().max().item() for name, tensor in state.items() if "lora_B" in name]
    return bool(found) and min(found) > 0


@pytest.mark.parametrize("fake", ["full", "lora"])
def test_lora_phases_leave_teacher_and_earlier_expert_alone(fake: str, wan: Wan, tmp_path: Path) -> None:
    config, bare = wan(fake__weights=fake)
    run, untouched, base = tmp_path / "run", copy.deepcopy(bare.networks[0]), weights(bare.networks[0])
    model, written, fakes = Recorded(bare, run), [], {}

    def then(call: Call, network: nn.Module, _: Tensor) -> None:
        if call.role == FAKE:
            fakes.setdefault(call.phase, weights(network, adapter=None if fake == "full" else FAKE))
        if call.phase == 2:
            written.append(RunFolder(run).expert_path(1).read_bytes())

    model.then = then
    distill_own(config, run, model, TinyCodec())
    (network,) = bare.networks

    assert {RunFolder(run).expert_path(1).read_bytes(), *written} == {written[0]}
    for phase in (1, 2):
        role = expert_role(phase)
        assert same(weights(network, adapter=role), expert(run, phase)) and trained(expert(run, phase))
        assert not any(p.requires_grad for name, p in network.named_parameters() if f".{role}." in name)
    assert not same(expert(run, 1), expert(run, 2))

    assert len(fakes) == 2  # at both onsets the teacher, whatever phase 1 did to it
    if fake == "full":
        assert all(same(state, base) for state in fakes.values())
    else:
        assert all(not t.any() for state in fakes.values() for name, t in state.items() if "lora_B" in name)
        assert not same(*fakes.values())

    x, text = (draw(2, *shape, seed=seed).to(device()) for seed, shape in ((1, model.sample_shapes[0]), (2, (5, 32))))
    t = torch.tensor([0.3, 0.9], device=device())
    assert torch.equal(bare.predict(network, x, t, {"text": text}), untouched(x, t * 1000, text, return_dict=False)[0])
    kept = [p for name, p in network.named_parameters() if "lora_" not in name]
    assert all(torch.equal(a, b) for a, b in zip(kept, untouched.parameters(), strict=True))


@pytest.mark.parametrize("fake", ["full", "lora"])
def test_activation_checkpointing_changes_nothing(fake: str, wan: Wan, tmp_path: Path) -> None:
    """Experts and metrics of a whole run, with the activations kept and computed again."""
    kept, again = (
        distill_wan(wan(checkpointing=on, fake__weights=fake, method="phased-sgts"), tmp_path / str(on))
        for on in (False, True)
    )
    assert files(kept) == files(again)


@pytest.mark.parametrize("fake", ["full", "lora"])
def test_a_lora_run_resumes_byte_identically(fake: str, wan: Wan, tmp_path: Path) -> None:
    whole = files(distill_wan(wan(fake__weights=fake), tmp_path / "whole"))
    with killed_after(2, 1):
        distill_wan(wan(fake__weights=fake), tmp_path / "run")
    distill_wan(wan(fake__weights=fake), tmp_path / "run")  # a new process builds a new teacher
    assert files(tmp_path / "run") == whole


@pytest.mark.parametrize(("method", "owners"), [("phased-sgts", [{"0"}, {"1"}]), ("dmd", [{"0", "1"}])])
def test_two_networks_share_the_steps(method: str, owners: list[set[str]], wan: Wan, tmp_path: Path) -> None:
    """Switch .9, grid 1, .9375 | .8333, .625: an expert on each network that serves its phase's steps, all trained;
    fakes on both networks in both phases, since (.8333, 1) holds the switch."""
    config, model = wan(2, (0.9,), method=method, plan__steps=4, plan__shift=5.0, fake__weights="lora")
    before, run = [copy.deepcopy(network) for network in model.networks], tmp_path / "run"
    made = Recorded(model, run)
    distill_own(config, run, made, TinyCodec())
    for phase, networks in enumerate(owners, start=1):
        assert {name.split(".")[0] for name in expert(run, phase)} == networks and trained(expert(run, phase))
        assert {call.network for call in made.of(FAKE, phase)} == {0, 1}
    assert all(FAKE in adapters(network) for network in model.networks)
    for network, old in zip(model.networks, before, strict=True):
        kept = [p for name, p in network.named_parameters() if "lora_" not in name]
        assert all(torch.equal(a, b) for a, b in zip(kept, old.parameters(), strict=True))


def test_the_teacher_is_guided_and_routed_sample_by_sample(wan: Wan) -> None:
    """uncond + 2 (cond - uncond), on the network whose range holds the sample's t, against single calls."""
    config, model = wan(2, (0.9,))
    codec = TinyCodec()
    system = build_system(config, model, codec.encode_text([""])[0])
    x, t = draw(4, *model.sample_shapes[0], seed=1), torch.tensor([0.95, 0.2, 0.9, 0.899], dtype=torch.float64)
    x, t = x.to(device()), t.to(device())
    condition, empty = (model.batch(codec.encode_text(texts)) for texts in (["one", "seven", "digit", "a one"], [""]))
    found = system.teacher(x, t, condition)
    for i, network in enumerate([0, 1, 0, 1]):
        one = slice(i, i + 1)
        cond, uncond = (
            model.networks[network](x[one], t[one] * 1000, text, return_dict=False)[0]
            for text in (condition["text"][one], empty["text"])
        )
        torch.testing.assert_close(found[one], 2 * cond - uncond, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- what comes of a run


@pytest.mark.parametrize("solver", ["ddim", "renoise"])
def test_a_loaded_run_samples_what_training_left_in_memory(solver: str, tmp_path: Path) -> None:
    """Bit for bit, and each sample by its own seed: the order and the batch do not matter."""
    config, run = toy(plan__steps=4, ablation__solver=solver, generator__ema=0.5), tmp_path / "run"
    model, networks = recorded(config, run), {}
    model.then = lambda call, network, _: networks.update({call.role: network})
    own = model, PlainCodec()
    distill_own(config, run, *own)
    left = build_system(as_own(config), model, {})
    for phase in (1, 2):
        add_expert(left, phase, trainable=False)
        left.roles.load(expert_role(phase), weights(networks[expert_role(phase)]))
    sampler = loading.load(run, own=own)
    samples = sampler([""] * 70, range(70))  # two batches
    in_memory = Sampler(left, sampler.codec)([""] * 70, range(70))
    assert torch.equal(samples, in_memory) and len(samples.unique()) == 70
    torch.testing.assert_close(sampler([""] * 2, [66, 3]), samples[[66, 3]], rtol=0, atol=1e-6)
    assert not torch.equal(sampler([""] * 70, range(70), teacher_steps=4), samples)


def test_sampling_draws_fresh_noise_at_every_step(tmp_path: Path) -> None:
    """renoise on four steps: one start and three noises, no two of them related (5 standard errors).

    What a step begins with is (1 - t) x_0 + t eps, of the x_0 that the step before it predicts.
    """
    config, run = toy(plan__steps=4, ablation__solver="renoise"), tmp_path / "run"
    model = distill_recorded(config, run)
    model.calls.clear()
    loading.load(run, own=(model, PlainCodec()))([""] * 1000, range(1000))
    times = phase_plan(config).times[:4]
    x, v = (
        [torch.cat([getattr(call, name) for call in model.calls if call.t[0] == t]).squeeze().cpu() for t in times]
        for name in ("x", "out")
    )
    noises = [x[0]]
    for i in (1, 2, 3):
        x_0 = x[i - 1] - times[i - 1] * v[i - 1]
        noises.append((x[i] - (1 - times[i]) * x_0) / times[i])
    correlations = torch.corrcoef(torch.stack(noises))
    assert correlations.shape == (4, 4) and len(noises[0]) == 1000
    assert (correlations - torch.eye(4)).abs().max() < 5 / math.sqrt(1000)
    assert all(abs(noise.std() - 1) < 5 / math.sqrt(2000) for noise in noises)


def test_an_unfinished_run_cannot_be_loaded(tmp_path: Path) -> None:
    config = toy()
    run = distill(config, tmp_path / "run", quiet=True)
    RunFolder(run).expert_path(2).unlink()
    with pytest.raises(UserError, match="the run is not finished"):
        loading.load(run)
    with pytest.raises(UserError, match="not a run folder"):
        loading.load(tmp_path / "absent")


def test_the_header_says_how_to_run_the_expert(wan: Wan, tmp_path: Path) -> None:
    """Grid of shift 5 at two steps: 1, 5/6, 0. Nothing in it depends on the machine, the folder or the day."""
    run = distill_wan(wan(plan__shift=5.0), tmp_path / "run")
    for phase, boundary in ((1, 5 / 6), (2, 0.0)):
        _, header = load_tensors(RunFolder(run).expert_path(phase))
        assert header.pop("grid") == pytest.approx([1, 5 / 6, 0]) and header.pop("boundary") == pytest.approx(boundary)
        assert header == {
            "phase": phase, "steps": [phase - 1], "shift": 5.0, "solver": "ddim", "weights": "lora", "rank": 3,
            "alpha": 3.0, "method": "phased", "weighting": "normalised", "iteration": 2,
        }  # fmt: skip


# ---------------------------------------------------------------- the bar


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_keeps_count_and_the_runs_time_left_whole(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four phases of 120 are behind it, 30 of the third are done: 210 updates are left, at one in 10 seconds."""
    screen, clock = io.StringIO(), iter(range(0, 1000, 10))
    terminal = Console(file=screen, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    monkeypatch.setattr(rich, "_console", terminal)  # what `rich.get_console()` returns
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress_bar(resolve("nano-t2i"), 3, 29, quiet=False) as show:
        show(30, "fake 479 generator 0.000123")
    shown = screen.getvalue()
    assert "phase 3/4" in shown and " 30/120 run 0:35:00 left 0.1 it/s" in shown
    assert all(word in shown for word in ("479", "generator", "0.000123"))


# ---------------------------------------------------------------- previews


def test_a_run_calls_no_network_with_more_than_a_micro_batch(wan: Wan, tmp_path: Path) -> None:
    """Previews among them, whose pictures are decoded as few at a time."""
    config, bare = wan(engine__micro_batch=2)
    model, codec = Recorded(bare, tmp_path / "run"), CountingCodec()
    distill_own(config, tmp_path / "run", model, codec)
    assert {len(call.x) for call in model.calls} == {1, 2}
    assert codec.calls == [2] * 8 * 2, "16 pictures at the end of each phase"


@pytest.mark.parametrize(("every", "made"), [(2, ["1-000002", "1-000003", "2-000002", "2-000003"]), (None, [])])
def test_previews_are_made_now_and_then_and_at_the_end_or_never(
    every: int | None, made: list[str], tmp_path: Path
) -> None:
    """Of 512 points, where an update has 16."""
    model = distill_recorded(toy(sample_every=every), tmp_path / "run")
    found = {path.stem for path in sorted((tmp_path / "run" / "samples").glob("*"))}
    assert found == {f"phase-{name}".replace("-0", "-iteration-0", 1) for name in made}
    for phase in (1, 2):
        points = sum(len(call.x) for call in model.of(expert_role(phase), phase) if len(call.x) > 16)
        assert points == 512 * len(made) / 2


@pytest.mark.parametrize("given", ["nano-t2i", {"recipe": "nano-t2i"}, None])
def test_what_is_no_config_is_not_distilled(given: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"config: a {type(given).__name__}, where a Config is needed; recipes.resolve"):
        distill(given, tmp_path / "run")
    assert not (tmp_path / "run").exists()
