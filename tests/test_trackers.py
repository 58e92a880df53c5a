"""Each tracker is handed the logged rows, as one run; its package is replaced by a recorder."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny import killed_after

from phased_dmd.checkpoint import RunFolder
from phased_dmd.errors import UserError
from phased_dmd.recipes import resolve
from phased_dmd.trackers import Trackers
from phased_dmd.train import distill

FAST = {
    "iterations": 2, "batch_size": 4, "log_every": 1, "sample_every": None, "teacher.fit_steps": 2, "teacher.hidden": 8
}  # fmt: skip
ALL = ("tensorboard", "wandb", "trackio")
SEEN: list[tuple[str, Any, Any]] = []  # what was logged: tracker and key, step, value
STARTED: list[tuple[str, dict[str, Any]]] = []
CLOSED: list[str] = []


def recorder(name: str, fails: str = "") -> ModuleType:
    """A tracker's package, whose functions are strict where the real ones are. fails: in start, log or close."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, loader=None)  # by which the package counts as installed

    def does(what: str) -> None:
        if what == fails:
            raise RuntimeError(f"cannot {what}\nat all")

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            init(folder=folder, purge_step=purge_step)

        def add_scalar(self, key: str, value: float, step: int) -> None:
            if value is None:  # as the real one says
                raise NotImplementedError("Got <class 'NoneType'>, but expected numpy array or torch tensor.")
            log({key: value}, step)

        def close(self) -> None:
            finish()

    def log(row: dict[str, float], step: int) -> None:
        does("log")
        for key, value in row.items():
            SEEN.append((f"{name} {key}", step, value))

    def init(**how: Any) -> SimpleNamespace:
        does("start")
        STARTED.append((name, how))
        return SimpleNamespace(log=log, finish=finish)

    def finish() -> None:
        does("close")
        CLOSED.append(name)

    module.__dict__.update(SummaryWriter=SummaryWriter, init=init, log=log, finish=finish)
    return module


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """All trackers' packages are recorders; called, they fail somewhere."""

    def install(fails: str = "") -> None:
        for name in ALL:
            monkeypatch.setitem(sys.modules, name, recorder(name, fails))
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", recorder("tensorboard", fails))

    for found in (SEEN, STARTED, CLOSED):
        found.clear()
    install()
    return install


def test_every_tracker_sees_every_logged_row(tmp_path: Path) -> None:
    config = resolve("toy-1d", {**FAST, "trackers": ALL})
    rows = RunFolder(distill(config, tmp_path / "run", quiet=True)).metrics()
    for name in ALL:
        losses = [(step, value) for key, step, value in SEEN if key == f"{name} fake_loss"]
        assert losses == [(2 * (row["phase"] - 1) + row["iteration"], row["fake_loss"]) for row in rows]


def test_what_an_update_that_was_left_out_has_no_value_of_is_left_out_of_its_row(tmp_path: Path) -> None:
    """The first update of the generator was left out."""
    with Trackers(ALL, tmp_path, resolve("toy-1d", FAST)) as trackers:
        trackers.begin(0)
        for step, loss in ((1, None), (2, 0.5)):
            trackers.track(step, {"fake_loss": 0.25, "generator_loss": loss})
    for name in ALL:
        steps = {
            key: [step for of, step, _ in SEEN if of == f"{name} {key}"] for key in ("fake_loss", "generator_loss")
        }
        assert steps == {"fake_loss": [1, 2], "generator_loss": [2]}


def test_a_run_folder_is_one_run_of_each_tracker_through_phases_restarts_and_moves(tmp_path: Path) -> None:
    """Killed after the first of two iterations of phase 2, the third in all, and moved before it goes on."""
    config = resolve("toy-1d", {**FAST, "trackers": ALL, "checkpoint_every": 1})
    with killed_after(2, 1):
        distill(config, tmp_path / "a", quiet=True)
    (tmp_path / "a").rename(tmp_path / "b")
    distill(config, tmp_path / "b", quiet=True)
    distill(config, tmp_path / "other", quiet=True)
    for name in ALL:
        starts = [how for of, how in STARTED if of == name]
        assert len(starts) == CLOSED.count(name) == 3  # a process each
        match name:
            case "tensorboard":
                assert [how["purge_step"] for how in starts] == [1, 4, 1]
            case "wandb":
                first, second, other = (how["id"] for how in starts)
                assert first == second != other and {how["resume"] for how in starts} == {"allow"}
            case "trackio":
                first, second, other = (how["name"].rpartition("-")[2] for how in starts)
                assert first == second != other and {how["resume"] for how in starts} == {"allow"}
        assert [step for key, step, _ in SEEN if key == f"{name} fake_loss"] == [1, 2, 3, 4, 1, 2, 3, 4]


@pytest.mark.parametrize("what", ["start", "log", "close"])
def test_a_tracker_that_fails_is_one_warning_and_does_not_end_the_run(
    what: str, packages: Callable[..., None], tmp_path: Path
) -> None:
    packages(fails=what)
    config = resolve("toy-1d", {**FAST, "trackers": ["wandb"]})
    with pytest.warns(UserWarning) as warned:
        run = distill(config, tmp_path / "run", quiet=True)
    assert [str(one.message) for one in warned] == [f"trackers: wandb: cannot {what} at all; the run goes on"]
    assert RunFolder(run).finished(config) and len(RunFolder(run).metrics()) == 4


@pytest.mark.parametrize("name", ALL)
def test_a_missing_package_is_named_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type] as Python marks what cannot be imported
    with pytest.raises(UserError, match=f"trackers: {name} is not installed"):
        distill(resolve("toy-1d", {**FAST, "trackers": [name]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
