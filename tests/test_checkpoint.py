"""What is on disk is there whole or not at all, reads back bit for bit, and has bytes that depend on nothing else."""

import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from phased_dmd.checkpoint import RunFolder, load_tensors, save_tensors, write_atomically
from phased_dmd.config import UserError
from phased_dmd.recipes import resolve

HEADER = {
    "phase": 2,
    "grid": [1.0, 0.1 + 0.2, 1 / 3, 0.0],
    "rank": None,
    "solver": "ddim",
    "nested": {"b": 1, "a": [True]},
}


def tensors() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 4, generator=rng, dtype=torch.float64)
    return {
        "z/float64": wide,
        "a/float32": torch.tensor([1e-45, -0.0, float("inf"), float("nan"), 1 / 3]),
        "m/bfloat16": torch.randn(3, 5, generator=rng).bfloat16(),
        "float16": torch.randn(2, generator=rng).half(),
        "int64": torch.tensor([2**62 + 1, -1]),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "transposed": wide.T,
        "slice": torch.arange(24.0).reshape(4, 6)[1:3, ::2],
    }


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------- tensors


def test_tensors_and_header_come_back_bit_for_bit(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", tensors(), HEADER)
    loaded, header = load_tensors(tmp_path / "x.safetensors")
    assert header == HEADER and loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert bits(loaded[name]) == bits(tensor), name


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    """Whatever order names and header keys were put in, wherever the file lies, whenever it is written."""
    save_tensors(tmp_path / "a.safetensors", tensors(), HEADER)
    backwards = dict(reversed(tensors().items()))
    (tmp_path / "deep").mkdir()
    for i in range(5):
        save_tensors(tmp_path / "deep" / f"{i}.safetensors", backwards, dict(reversed(HEADER.items())))
        assert (tmp_path / "deep" / f"{i}.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    save_tensors(tmp_path / "b.safetensors", tensors(), {**HEADER, "phase": 3})
    assert (tmp_path / "b.safetensors").read_bytes() != (tmp_path / "a.safetensors").read_bytes()


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_a_user_error(keep: float, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"w": torch.zeros(1000)}, HEADER)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(UserError, match=f"^{path}: not a file of this program, or damaged"):
        load_tensors(path)


def test_a_foreign_file_is_a_user_error(tmp_path: Path) -> None:
    plain, other, text = (tmp_path / name for name in ("plain", "other", "text"))
    save_file({"w": torch.zeros(3)}, plain)
    save_file({"w": torch.zeros(3)}, other, metadata={"format": "pt", "phased_dmd": "{not json"})
    text.write_text("a long text " * 100)
    for path in (plain, other, text, tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=f"^{path}: not a file of this program"):
            load_tensors(path)


# ---------------------------------------------------------------- atomicity


@pytest.mark.parametrize("failing", ["fsync", "replace", "write"])
def test_a_write_cut_short_leaves_the_former_file(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, present = tmp_path / "fresh.safetensors", tmp_path / "present.safetensors"
    save_tensors(present, {"w": torch.ones(3)}, {})
    before = present.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    class HalfWritten(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(data[: len(data) // 2])
            raise KeyboardInterrupt

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif failing == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        monkeypatch.setattr(Path, "open", lambda path, mode: HalfWritten(path, mode))
    for path in (fresh, present):
        with pytest.raises(KeyboardInterrupt):
            save_tensors(path, {"w": torch.zeros(3)}, {})
    monkeypatch.undo()
    assert not fresh.exists() and present.read_bytes() == before


def test_a_partial_file_is_never_taken_for_a_checkpoint_or_an_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = RunFolder(tmp_path / "run"), resolve("toy-1d", {})
    run.open(config, [""])
    run.save_checkpoint(1, 5, {"w": torch.tensor([5.0])})

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(1, 10, {"w": torch.tensor([10.0])})
    for phase in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            save_tensors(run.expert_path(phase), {"w": torch.zeros(1)}, {})
    monkeypatch.undo()
    assert len(list(run.path.rglob("*.partial"))) == 3
    assert run.load_checkpoint(1) == (5, {"w": torch.tensor([5.0])})
    assert not run.finished(config)
    run.check(config)


def test_writing_again_clears_the_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    monkeypatch.setattr(Path, "replace", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, b"a longer first version")
    monkeypatch.undo()
    write_atomically(path, b"second")
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"] and path.read_bytes() == b"second"


# ---------------------------------------------------------------- checkpoints


def test_checkpoints_keep_the_last_two_and_load_the_newest(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for phase, iteration in ((1, 5), (1, 10), (1, 100), (2, 5), (2, 10), (2, 15)):
        run.save_checkpoint(phase, iteration, {"w": torch.tensor([float(phase), float(iteration)])})
        iterations, loaded = run.load_checkpoint(phase) or (0, {})
        assert iterations == iteration and loaded["w"].tolist() == [phase, iteration]
    names = sorted(file.name for file in (tmp_path / "checkpoints").iterdir())
    assert names == ["phase-2-iteration-000010.safetensors", "phase-2-iteration-000015.safetensors"]
    assert run.load_checkpoint(1) is None and run.load_checkpoint(3) is None


def test_a_later_phase_leaves_an_earlier_ones_checkpoint_until_it_has_two(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for phase, iteration in ((1, 5), (1, 10), (2, 5)):
        run.save_checkpoint(phase, iteration, {"w": torch.tensor([float(iteration)])})
    assert run.load_checkpoint(1) == (10, {"w": torch.tensor([10.0])})
    assert run.load_checkpoint(2) == (5, {"w": torch.tensor([5.0])})


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    """As text, phase-10 stands before phase-8, and a million before 999999."""
    run = RunFolder(tmp_path)
    for phase, iteration in ((8, 5), (9, 5), (10, 999_999), (10, 1_000_000)):
        run.save_checkpoint(phase, iteration, {"w": torch.tensor([float(iteration)])})
        assert run.load_checkpoint(phase) == (iteration, {"w": torch.tensor([float(iteration)])})


def test_a_damaged_checkpoint_is_a_user_error(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.save_checkpoint(1, 5, {"w": torch.zeros(100)})
    file = next((tmp_path / "checkpoints").iterdir())
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match="damaged"):
        run.load_checkpoint(1)


# ---------------------------------------------------------------- metrics


def test_metrics_are_rewound_to_the_checkpoint_and_lose_a_torn_line(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    rows = [{"phase": phase, "iteration": i, "loss": 1 / i} for phase in (1, 2) for i in (2, 4, 6)]
    for row in rows:
        run.log("metrics.jsonl", row)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"phase": 2, "iteration": 8, "lo')
    run.rewind_metrics(2, 100)
    assert path.read_bytes() == whole
    run.rewind_metrics(2, 4)
    assert run.metrics() == rows[:5]
    run.rewind_metrics(2, 0)
    assert run.metrics() == rows[:3]
    run.rewind_metrics(1, 3)
    assert run.metrics() == rows[:1]
    run.rewind_metrics(1, 0)
    assert run.metrics() == [] and path.read_bytes() == b""


def test_metrics_that_are_not_there_are_none(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.rewind_metrics(1, 0)
    assert run.metrics() == [] and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the folder


def test_a_folder_takes_only_its_own_run(tmp_path: Path) -> None:
    config = resolve("toy-1d", {"seed": 3})
    run = RunFolder(tmp_path / "new" / "run")
    run.check(config)
    assert not run.path.exists()  # a check writes nothing
    run.open(config, [""])
    assert run.config() == config
    before = run.config_path.read_bytes()
    run.open(config, [""])
    assert run.config_path.read_bytes() == before
    for overrides, key in (
        ({"seed": 4}, "seed"),
        ({"seed": 3, "plan.shift": 2.0}, "plan.shift"),
        ({"seed": 3, "fake.updates": 1}, "fake.updates"),
    ):
        with pytest.raises(UserError, match=rf"holds another run of toy-1d, which differs in {re.escape(key)}$"):
            run.open(resolve("toy-1d", overrides), [""])
    assert run.config_path.read_bytes() == before


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    config = resolve("toy-1d", {})
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="^--output: .* exists and is not a run folder$"):
        RunFolder(tmp_path).open(config, [""])
    with pytest.raises(UserError, match="^--output: .* exists and is not a run folder$"):
        RunFolder(tmp_path / "thesis.tex").open(config, [""])
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "empty").open(config, [""])
    assert RunFolder(tmp_path / "empty").config() == config


@pytest.mark.parametrize("content", ["{", '{"recipe": "toy-1d"}', '{"recipe": "x", "teacher": {"kind": "?"}}', "[]"])
def test_a_damaged_config_is_a_user_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError):
        RunFolder(tmp_path).check(resolve("toy-1d", {}))
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder(tmp_path / "nowhere").config()


def test_a_binary_config_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError):
        RunFolder(tmp_path).config()


def test_a_run_killed_while_its_config_was_written_can_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = resolve("toy-1d", {}), RunFolder(tmp_path / "run")
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)  # killed with the partial file on disk
    with pytest.raises(ZeroDivisionError):
        run.open(config, [""])
    monkeypatch.undo()
    assert not run.config_path.exists()
    run.open(config, [""])
    assert run.config() == config


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(UserError, match="^--output: .* cannot be written: Permission denied$"):
        RunFolder(tmp_path / "run").open(resolve("toy-1d", {}), [""])


def test_a_parent_that_is_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="^--output: "):
        RunFolder(tmp_path / "file" / "run").open(resolve("toy-1d", {}), [""])


def test_a_run_is_finished_when_every_expert_is_there(tmp_path: Path) -> None:
    config, run = resolve("toy-1d", {}), RunFolder(tmp_path)
    assert not run.finished(config)
    save_tensors(run.expert_path(2), {}, {})
    assert not run.finished(config)
    save_tensors(run.expert_path(1), {}, {})
    assert run.finished(config)
