"""Each tracker is handed the logged rows; its package is replaced by a recorder."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from phased_dmd.checkpoint import RunFolder
from phased_dmd.errors import UserError
from phased_dmd.recipes import resolve
from phased_dmd.train import distill

FAST = {"iterations": 2, "batch_size": 4, "log_every": 1, "teacher.fit_steps": 2, "teacher.hidden": 8}
SEEN: list[tuple[str, Any, Any]] = []


def recorder(name: str) -> ModuleType:
    module = ModuleType(name)

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            self.folder = folder

        def add_scalar(self, key: str, value: float, step: int) -> None:
            SEEN.append((f"tensorboard {key}", step, value))

    def log(row: dict[str, float], step: int) -> None:
        for key, value in row.items():
            SEEN.append((f"{name} {key}", step, value))

    def init(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(log=log)

    module.__dict__.update(SummaryWriter=SummaryWriter, init=init, log=log)
    return module


def test_every_tracker_sees_every_logged_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch.utils.tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, recorder(name))
    monkeypatch.setattr("phased_dmd.trackers.find_spec", sys.modules.get)
    monkeypatch.setitem(sys.modules, "tensorboard", recorder("tensorboard"))
    SEEN.clear()
    config = resolve("toy-1d", {**FAST, "trackers": ["tensorboard", "wandb", "trackio"]})
    rows = RunFolder(distill(config, tmp_path / "run", quiet=True)).metrics()
    for name in ("tensorboard", "wandb", "trackio"):
        losses = [(step, value) for key, step, value in SEEN if key == f"{name} fake_loss"]
        assert losses == [(2 * (row["phase"] - 1) + row["iteration"], row["fake_loss"]) for row in rows]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phased_dmd.trackers.find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"trackers: {name} is not installed"):
        distill(resolve("toy-1d", {**FAST, "trackers": [name]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
