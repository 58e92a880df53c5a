"""What is on disk is there whole or not at all, reads back bit for bit, and survives kills and faults of the disk."""

import errno
import fcntl
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import KILLED, die_at, end, forked, group, small_disk, start
from safetensors.torch import save_file
from torch import Tensor

from phased_dmd.checkpoint import RunFolder, load_tensors, save_tensors, write_atomically
from phased_dmd.checkpoint.folders import Manifest, Sum, read_part, verify, write_folder
from phased_dmd.engine.collectives import run_on_all_ranks, run_on_first_rank
from phased_dmd.errors import UserError
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


def test_writing_again_clears_the_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    monkeypatch.setattr(Path, "replace", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, b"a longer first version")
    monkeypatch.undo()
    write_atomically(path, b"second")
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"] and path.read_bytes() == b"second"


# ---------------------------------------------------------------- checkpoints


def point(iteration: int, update: int = 0, phase: int = 1, **more: Any) -> dict[str, Any]:
    return {"phase": phase, "iteration": iteration, "update": update, **more}


def state(value: float = 0.0) -> dict[str, Tensor]:
    return {"fake/w": torch.full((4, 3), float(value)), "expert/0.b": torch.full((5,), float(value)).bfloat16()}


def keep(run: RunFolder, at: dict[str, Any], value: float, keep_last: int = 2) -> None:
    run.save_checkpoint(at, state(value), keep_last)


def found(run: Path | RunFolder, phase: int = 1) -> tuple[int, int, float] | None:
    """Iteration, update and value of the checkpoint that a new process would load."""
    tensors = state(-1.0)
    at = RunFolder(run.path if isinstance(run, RunFolder) else run).load_checkpoint(phase, tensors)
    values = {float(value) for tensor in tensors.values() for value in tensor.flatten()}
    assert len(values) == 1  # of one checkpoint, every tensor of it
    if at is None:
        assert values == {-1.0}
        return None
    assert at["phase"] == phase
    return at["iteration"], at["update"], values.pop()


def names(run: RunFolder) -> list[str]:
    return sorted(path.name for path in (run.path / "checkpoints").iterdir())


def folder(run: RunFolder, at: dict[str, Any]) -> Path:
    return run.path / "checkpoints" / f"phase-{at['phase']}-iteration-{at['iteration']:06d}-update-{at['update']}"


def flip(path: Path) -> None:
    """Flips one bit of the file's last byte."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def shard(run: RunFolder, at: dict[str, Any]) -> Path:
    return next(folder(run, at).glob("*.safetensors"))


def test_a_checkpoint_comes_back_bit_for_bit_into_the_same_tensors(tmp_path: Path) -> None:
    at = point(
        5, 3, phase=2, losses=[0.1 + 0.2, 1e-310, 1 / 3, -0.0], seeds={"b": [None], "10": True, "9": "x"}, n=2**70
    )
    RunFolder(tmp_path).save_checkpoint(at, tensors(), 2)
    loaded = {name: torch.empty_like(tensor).fill_(9) for name, tensor in tensors().items()}
    loaded["m/bfloat16"] = torch.nn.Parameter(loaded["m/bfloat16"])
    same = dict(loaded)
    read = RunFolder(tmp_path).load_checkpoint(2, loaded)
    assert read == at and json.dumps(read["losses"]) == json.dumps(at["losses"])
    for name, tensor in tensors().items():
        assert bits(same[name].detach()) == bits(tensor), name


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    keep(run, point(5), 1.0)
    assert sorted(path.suffix for path in folder(run, point(5)).iterdir()) == [".json", ".safetensors"]


def test_checkpoints_keep_the_last_ones_of_all_phases_together(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for phase, iteration, update in ((1, 5, 0), (1, 100, 0), (2, 5, 0), (2, 5, 3), (2, 10, 0)):
        keep(run, point(iteration, update, phase), phase + iteration + update)
        assert found(run, phase) == (iteration, update, phase + iteration + update)
    assert names(run) == ["phase-2-iteration-000005-update-3", "phase-2-iteration-000010-update-0"]
    assert found(run, 1) is None and found(run, 3) is None


def test_checkpoints_that_are_kept_for_good_are_those_of_every_so_many_iterations(tmp_path: Path) -> None:
    """Not those that a signal or the clock asked for between two updates, and none of iteration 0."""
    run = RunFolder(tmp_path)
    for phase, iteration, update in ((1, 0, 0), (1, 5, 0), (1, 10, 0), (1, 10, 2), (1, 15, 0), (2, 10, 0), (2, 15, 0)):
        run.save_checkpoint(point(iteration, update, phase), state(iteration), keep_last=1, keep_every=10)
    kept = [folder(run, point(iteration, phase=phase)).name for phase, iteration in ((1, 10), (2, 10), (2, 15))]
    assert names(run) == kept


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    """As text, phase-10 stands before phase-8, a million before 999999, and update 10 before 9."""
    run = RunFolder(tmp_path)
    for at in (point(5, phase=8), point(999_999, phase=10), point(1_000_000, 9, 10), point(1_000_000, 10, 10)):
        keep(run, at, at["update"])
        assert found(run, at["phase"]) == (at["iteration"], at["update"], at["update"])


def test_a_whole_checkpoint_of_the_same_point_is_left_as_it_is(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    keep(run, point(5), 1.0)
    before = {path: path.stat().st_mtime_ns for path in folder(run, point(5)).iterdir()}
    keep(run, point(5), 2.0)
    assert {path: path.stat().st_mtime_ns for path in folder(run, point(5)).iterdir()} == before
    assert found(run) == (5, 0, 1.0) and names(run) == [folder(run, point(5)).name]


def test_a_failure_is_kept_for_good_and_never_resumed_from(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    keep(run, point(5), 1.0)
    path = run.save_failure(point(7, 2, tensor="fake/w"), state(2.0))
    assert path == tmp_path / "failures" / "phase-1-iteration-000007-update-2"
    assert run.save_failure(point(7, 2, tensor="fake/w"), state(3.0)) == path
    for iteration in (10, 15, 20):
        keep(run, point(iteration), float(iteration))
    assert found(run) == (20, 0, 20.0)
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name]
    shutil.copytree(path, tmp_path / "other" / "checkpoints" / path.name)
    assert found(tmp_path / "other") == (7, 2, 2.0)


# ---------------------------------------------------------------- kills


def runs_killed_at_every_step(tmp_path: Path, save: Callable[[RunFolder], None], torn: bool) -> Iterator[RunFolder]:
    """Copies of the run at `tmp_path`/begun, each of whose writer died one step later; the last one's did not."""
    for step in range(200):
        run = RunFolder(tmp_path / str(step))
        shutil.copytree(tmp_path / "begun", run.path)
        status = forked(lambda run=run, step=step: (die_at(step, run.path, torn), save(run)))
        assert status in (0, KILLED)
        yield run
        if status == 0:
            return


@pytest.mark.parametrize("torn", [False, True])
def test_a_kill_at_any_step_of_saving_leaves_a_whole_checkpoint(torn: bool, tmp_path: Path) -> None:
    """With an old one to remove and a partial one to clear. torn: the machine dies, and what was not synced is cut."""
    begun, row, outcomes = RunFolder(tmp_path / "begun"), {"phase": 1, "iteration": 15}, []
    begun.path.mkdir()
    for iteration in (5, 10):
        keep(begun, point(iteration), iteration)
    shutil.copytree(folder(begun, point(5)), begun.path / "checkpoints" / ".phase-1-iteration-000012-update-0.partial")

    def save(run: RunFolder) -> None:
        run.log("metrics.jsonl", row)
        keep(run, point(15), 15, keep_last=1)

    for run in runs_killed_at_every_step(tmp_path, save, torn):
        outcomes.append(found(run))
        if outcomes[-1] == (15, 0, 15.0):
            assert run.metrics() == [row]
        keep(run, point(20), 20, keep_last=1)  # the run goes on, and leaves no litter
        assert found(run) == (20, 0, 20.0) and names(run) == [folder(run, point(20)).name]
    before, after = outcomes.count((10, 0, 10.0)), outcomes.count((15, 0, 15.0))
    assert outcomes == [(10, 0, 10.0)] * before + [(15, 0, 15.0)] * after and before > 15 and after > 5


def test_a_kill_at_any_step_of_replacing_a_damaged_checkpoint_leaves_the_one_before(tmp_path: Path) -> None:
    begun, outcomes = RunFolder(tmp_path / "begun"), []
    begun.path.mkdir()
    for iteration in (5, 10):
        keep(begun, point(iteration), iteration)
    flip(shard(begun, point(10)))
    for run in runs_killed_at_every_step(tmp_path, lambda run: keep(run, point(10), 11), torn=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes.append(found(run))
    assert set(outcomes) == {(5, 0, 5.0), (10, 0, 11.0)} and outcomes[-1] == (10, 0, 11.0)


def test_a_partial_folder_or_file_is_never_taken_for_data(tmp_path: Path) -> None:
    run, config = RunFolder(tmp_path / "run"), resolve("toy-1d", {})
    run.open(config, [""])
    keep(run, point(5), 5.0)
    keep(run, point(10), 10.0)
    partial = folder(run, point(10)).with_name(f".{folder(run, point(10)).name}.partial")
    folder(run, point(10)).rename(partial)

    def save_expert(phase: int) -> None:
        die_at(4, run.path)  # before the rename
        run.save_expert(phase, {"w": torch.zeros(1)}, {})

    for phase in (1, 2):
        assert forked(lambda phase=phase: save_expert(phase)) == KILLED
    assert len(list(run.path.rglob("*.partial"))) == 3
    assert found(run) == (5, 0, 5.0) and not run.finished(config)
    run.check(config)
    keep(run, point(6), 6.0)
    assert not partial.exists()


# ---------------------------------------------------------------- damage


def test_any_flipped_bit_and_any_cut_is_found_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    """200 of them, over all files, the manifest too."""
    run, rng = RunFolder(tmp_path), random.Random(0)
    for iteration in (5, 10):
        keep(run, point(iteration, losses=[0.125]), float(iteration))
    files = sorted(folder(run, point(10)).iterdir())
    assert len(files) == 2
    for i in range(200):
        path = files[i % 2]
        whole = path.read_bytes()
        place = rng.randrange(len(whole))
        flipped = whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]
        path.write_bytes(whole[:place] if i % 4 < 2 else flipped)
        with pytest.warns(UserWarning, match=f"^{path}: damaged.*; phase 1, iteration 10 is passed over$") as seen:
            assert found(run) == (5, 0, 5.0), (path.name, place)
        assert len(seen) == 1
        path.write_bytes(whole)
    assert found(run) == (10, 0, 10.0)


def rewritten(run: RunFolder, at: dict[str, Any], /, **fields: Any) -> None:
    """Gives the checkpoint a manifest with other fields, and a sum that is right."""
    path = folder(run, at) / "manifest.json"
    old = Manifest.read(path)
    path.write_bytes(old.model_copy(update=fields).encode())


DAMAGES: dict[str, tuple[Callable[[RunFolder, Path], Any], str]] = {
    "no manifest": (lambda run, path: (path / "manifest.json").unlink(), "manifest.json: cannot be read: No such file"),
    "no shard": (lambda run, path: shard(run, point(10)).unlink(), "safetensors: missing"),
    "one file more": (lambda run, path: (path / "more.safetensors").write_bytes(b""), "more.*: not of this checkpoint"),
    "a longer file": (lambda run, path: shard(run, point(10)).open("ab").write(b" "), "damaged: [0-9]+ bytes of"),
    "a folder for a file": (lambda run, path: ((path / "manifest.json").unlink(), (path / "manifest.json").mkdir()),
                            "manifest.json: cannot be read: Is a directory"),
    "a file for a folder": (lambda run, path: (shutil.rmtree(path), path.write_text("x")), "cannot be read: Not a dir"),
    "a copy of another": (lambda run, path: (shutil.rmtree(path), shutil.copytree(folder(run, point(5)), path)),
                          "manifest.json: of another checkpoint, phase-1-iteration-000005-update-0"),
    "no point": (lambda run, path: rewritten(run, point(10), at={"phase": 1}), "manifest.json: damaged"),
    "a point of text": (lambda run, path: rewritten(run, point(10), at=point("10")), "manifest.json: damaged"),
    "a path": (lambda run, path: rewritten(run, point(10), files={"../../secret": Sum.of(run.path / "secret")}),
               "manifest.json: damaged"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_differs_from_its_manifest_is_passed_over(damage: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    (tmp_path / "secret").write_text("of another program")
    keep(run, point(5), 5.0)
    keep(run, point(10), 10.0)
    spoil, message = DAMAGES[damage]
    spoil(run, folder(run, point(10)))
    with pytest.warns(
        UserWarning, match=f"^{folder(run, point(10))}.*{message}.*; phase 1, iteration 10 is passed over$"
    ):
        assert found(run) == (5, 0, 5.0)


def test_without_a_whole_checkpoint_the_phase_starts_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    keep(run, point(5, phase=2), 5.0)
    flip(shard(run, point(5, phase=2)))
    with pytest.warns(UserWarning) as seen:
        assert found(run, 2) is None
    assert len(seen) == 2
    assert str(seen[1].message) == f"{tmp_path / 'checkpoints'}: none of phase 2 is whole; the phase starts again"
    assert found(run, 1) is None


def test_a_damaged_checkpoint_counts_for_none_of_those_kept(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    keep(run, point(5), 5.0)
    keep(run, point(10, 2), 10.0)
    flip(shard(run, point(10, 2)))
    with pytest.warns(UserWarning, match="iteration 10, update 2 is passed over$"):
        assert run.load_checkpoint(1, state()) == point(5)
    keep(run, point(6), 6.0, keep_last=1)  # what was passed over is newer by name: it replaces nothing
    assert names(run) == [folder(run, point(6)).name, folder(run, point(10, 2)).name]
    with pytest.warns(UserWarning, match="passed over"):
        assert found(run) == (6, 0, 6.0)
    keep(run, point(15), 15.0, keep_last=2)
    assert names(run) == [folder(run, point(6)).name, folder(run, point(15)).name]


def test_a_damaged_checkpoint_is_replaced_when_the_run_gets_there_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for iteration in (5, 10):
        keep(run, point(iteration), 1.0)
    flip(shard(run, point(10)))
    run = RunFolder(tmp_path)  # in another process
    keep(run, point(10), 10.0)
    assert found(run) == (10, 0, 10.0) and len(names(run)) == 2


@pytest.mark.parametrize(
    "other, message",
    [
        ({"fake/w": torch.zeros(4, 3)}, r"expert/0.b is torch.bfloat16 \[5\], where this run has none"),
        ({**state(), "fake/x": torch.zeros(1)}, r"fake/x is missing, where this run has torch.float32 \[1\]"),
        (
            {**state(), "fake/w": torch.zeros(3, 4)},
            r"fake/w is torch.float32 \[4, 3\], where .* torch.float32 \[3, 4\]",
        ),
        ({**state(), "fake/w": torch.zeros(4, 3).double()}, r"fake/w is torch.float32 .*, where .* torch.float64"),
    ],
)
def test_a_foreign_checkpoint_is_a_user_error_and_touches_nothing(
    other: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path)
    keep(run, point(5), 5.0)
    with pytest.raises(UserError, match=f"^{folder(run, point(5))}: a checkpoint of something else: {message}"):
        run.load_checkpoint(1, other)
    assert not any(tensor.any() for tensor in other.values())


@pytest.mark.parametrize(
    "linked", ["", "phase-1-iteration-000005-update-0", "phase-1-iteration-000005-update-0/manifest.json"]
)
def test_symlinks_are_refused(linked: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.open(resolve("toy-1d", {}), [""])
    keep(run, point(5), 5.0)
    path = run.path / "checkpoints" / linked
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"^{path}: a symlink"):
        run.load_checkpoint(1, state())
    if not linked.endswith("json"):
        for refused in (lambda: keep(run, point(6), 6.0), lambda: run.check(resolve("toy-1d", {}))):
            with pytest.raises(UserError, match=f"^{path}: a symlink"):
                refused()
    assert (tmp_path / "elsewhere").exists() and path.is_symlink()


@pytest.mark.parametrize("linked", ["experts", "experts/phase-1.safetensors", "metrics.jsonl"])
def test_a_run_folder_with_symlinks_is_refused(linked: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.open(resolve("toy-1d", {}), [""])
    save_tensors(run.expert_path(1), {}, {})
    run.log("metrics.jsonl", {})
    RunFolder(tmp_path / "link").path.symlink_to(run.path)
    RunFolder(tmp_path / "link").check(resolve("toy-1d", {}))  # the folder itself may be one
    path = run.path / linked
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"^{path}: a symlink"):
        run.check(resolve("toy-1d", {}))


# ---------------------------------------------------------------- disks


def large(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((5000,), value)}


def test_a_file_size_limit_is_one_line_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    keep(run, point(5), 5.0)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        line = "cannot be written: File too large; .* goes on from phase 1, iteration 5 by the same command$"
        for what, write in (
            ("checkpoints", lambda: run.save_checkpoint(point(10), large(1.0), 1)),
            ("failures", lambda: run.save_failure(point(10), large(1.0))),
            ("experts/phase-1.safetensors", lambda: run.save_expert(1, large(1.0), {})),
            ("metrics.jsonl", lambda: run.log("metrics.jsonl", {"losses": [0.5] * 5000})),
        ):
            with pytest.raises(UserError, match=f"^{what}: {line}"):
                write()

    assert forked(limited) == 0
    assert found(run) == (5, 0, 5.0) and not list(tmp_path.rglob("*.partial")) and not run.expert_path(1).exists()


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64):
        run = RunFolder(tmp_path / "disk")
        run.save_checkpoint(point(5), large(5.0), 2)
        run.save_checkpoint(point(10, 2), large(10.0), 2)
        with pytest.raises(UserError) as error:
            run.save_checkpoint(point(15), large(15.0), 2)
        assert str(error.value) == (
            "checkpoints: cannot be written: No space left on device: 2e-05 GB are needed, 1.64e-05 GB are free; "
            f"{run.path} goes on from phase 1, iteration 10, update 2 by the same command"
        )
        assert len(names(run)) == 2
        shutil.rmtree(folder(run, point(5)))
        run.save_checkpoint(point(15), large(15.0), 1)
        loaded = large(0.0)
        assert run.load_checkpoint(1, loaded) == point(15) and loaded["w"].eq(15.0).all()


def test_a_read_only_disk_is_one_line(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 400) as make_read_only:
        run, config = RunFolder(tmp_path / "disk" / "run"), resolve("toy-1d", {})
        run.open(config, [""])
        save_tensors(run.expert_path(1), {}, {})
        make_read_only()
        line = "cannot be written: Read-only file system"
        ends = f"; {run.path} goes on from the start of phase 2 by the same command$"
        for message, write in (
            (f"checkpoints: {line}{ends}", lambda: keep(run, point(5, phase=2), 5.0)),
            (f"experts/phase-2.safetensors: {line}{ends}", lambda: run.save_expert(2, {}, {})),
            (f"timing.jsonl: {line}{ends}", lambda: run.log("timing.jsonl", {})),
            (f"--output: {run.path} {line}$", lambda: run.open(config, [""])),
            (f"--output: {run.path} {line}$", lambda: run.locked().__enter__()),
        ):
            with pytest.raises(UserError, match=f"^{message}"):
                write()


def test_a_run_folder_that_vanished_is_one_line_and_is_not_begun_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.open(resolve("toy-1d", {}), [""])
    keep(run, point(5), 5.0)
    shutil.rmtree(run.path)
    for write in (
        lambda: keep(run, point(10), 10.0),
        lambda: run.save_expert(1, {}, {}),
        lambda: run.log("metrics.jsonl", {}),
    ):
        with pytest.raises(UserError, match="cannot be written: No such file or directory; .* the start of phase 1 by"):
            write()
    assert not run.path.exists()


def test_the_line_names_what_is_really_resumed_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    for iteration in (5, 10):
        keep(run, point(iteration), 1.0)
    (folder(run, point(10)) / "manifest.json").unlink()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(UserError, match="goes on from phase 1, iteration 5 by the same command$"):
        keep(run, point(15), 1.0)
    assert not list(tmp_path.rglob("*.partial"))


# ---------------------------------------------------------------- the lock


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")

    def hold() -> None:
        with run.locked():
            run.open(resolve("toy-1d", {}), [""])
            (tmp_path / "ready").touch()
            time.sleep(60)

    holder = start(hold)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    try:
        with (
            pytest.raises(UserError, match=f"^--output: {run.path} is being written by process {holder}$"),
            run.locked(),
        ):
            pass
    finally:
        os.kill(holder, signal.SIGKILL)
        assert end(holder) == -signal.SIGKILL
    with run.locked():
        run.check(resolve("toy-1d", {}))
        with pytest.raises(UserError, match=f"is being written by process {os.getpid()}$"), run.locked():
            pass
    with run.locked():
        pass


def test_the_lock_of_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        with pytest.raises(KeyError), RunFolder(tmp_path / name).locked():
            raise KeyError
    assert list(tmp_path.iterdir()) == [tmp_path / "there"] and not list((tmp_path / "there").iterdir())
    with RunFolder(tmp_path / "new").locked():
        RunFolder(tmp_path / "new").open(resolve("toy-1d", {}), [""])
    assert RunFolder(tmp_path / "new").config() == resolve("toy-1d", {})


def test_a_lock_that_is_a_symlink_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("data")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="^--output: "), RunFolder(tmp_path / "run").locked():
        pass
    assert (tmp_path / "mine").read_text() == "data"


def test_a_lock_file_that_was_removed_while_it_was_taken_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its former holder removes it between our opening and locking: that lock would hold nobody off."""
    flock = fcntl.flock
    calls = iter([(tmp_path / ".lock").unlink])
    monkeypatch.setattr(fcntl, "flock", lambda *args: (next(calls, int)(), flock(*args)))
    with RunFolder(tmp_path).locked(), pytest.raises(UserError, match="is being written"), RunFolder(tmp_path).locked():
        pass


def test_a_disk_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="cannot be locked: run no second process on it"), RunFolder(tmp_path).locked():
        pass


# ---------------------------------------------------------------- groups of processes


def sharded(value: int) -> dict[str, Tensor]:
    """A state whose matrices are spread over the group, if there is one; some of them unevenly, or to one rank only."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    rng = torch.Generator().manual_seed(value)
    whole = {
        "even": torch.randn(4, 3, generator=rng),
        "uneven": torch.randn(5, 3, generator=rng, dtype=torch.float64),
        "one": torch.randn(1, 4, generator=rng).bfloat16(),
        "int": torch.randint(2**40, (7,), generator=rng),
        "scalar": torch.randn((), generator=rng),
    }
    if not dist.is_initialized():
        return whole
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(x, mesh, [Shard(0)]) if x.ndim else x for name, x in whole.items()}


def local_bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    from torch.distributed.tensor import DTensor

    return {name: bits(x.to_local() if isinstance(x, DTensor) else x) for name, x in tensors.items()}


def assert_loads(run: Path, iteration: int) -> None:
    loaded = sharded(0)
    assert local_bits(loaded) != local_bits(sharded(iteration))
    assert RunFolder(run).load_checkpoint(1, loaded) == point(iteration)
    assert local_bits(loaded) == local_bits(sharded(iteration))


def test_two_processes_save_and_one_loads_and_the_other_way_round(tmp_path: Path) -> None:
    def both(rank: int) -> None:
        assert_loads(tmp_path, 5)
        RunFolder(tmp_path).save_checkpoint(point(10), sharded(10), 1)
        assert_loads(tmp_path, 10)

    RunFolder(tmp_path).save_checkpoint(point(5), sharded(5), 2)
    assert group(2, both) == [0, 0]
    run = RunFolder(tmp_path)
    assert names(run) == [folder(run, point(10)).name] and len(list(folder(run, point(10)).iterdir())) == 3
    assert_loads(tmp_path, 10)


def test_one_process_reads_a_part_of_what_several_have_saved(tmp_path: Path) -> None:
    saved = folder(RunFolder(tmp_path), point(10))
    assert group(2, lambda _: write_folder(saved, point(10), sharded(10), file_bytes=32)) == [0, 0]
    part = {name.removeprefix("un"): x for name, x in sharded(10).items() if name.startswith("un")}
    assert local_bits(read_part(saved, "un")) == local_bits(part) and [*part] == ["even"]
    assert read_part(saved, "nothing") == {}


def test_a_checkpoint_of_many_files_is_read_by_another_number_of_processes(tmp_path: Path) -> None:
    """Its five tensors are of 48, 120, 8, 56 and 4 bytes, its files of 64: of two processes each writes 32."""
    saved = folder(RunFolder(tmp_path), point(10))
    assert group(2, lambda _: write_folder(saved, point(10), sharded(10), file_bytes=32)) == [0, 0]
    assert verify(saved) == point(10)
    numbers = {path.name.partition("model-")[2][:14] for path in saved.glob("*.safetensors")}
    assert numbers == {f"0000{i}-of-00004" for i in (1, 2, 3, 4)}
    assert_loads(tmp_path, 10)


# ---------------------------------------------------------------- the host's memory


def own_bytes(field: str) -> int:
    """What the system says of this process: VmRSS, what it has in memory; VmHWM, the most of that; RssAnon, its own."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


def test_a_checkpoint_takes_the_hosts_memory_for_a_file_of_it_alone(tmp_path: Path) -> None:
    """Of 256 MB in files of 8: each is one piece of bytes before it is written. The libraries that it runs take 40."""
    state = {str(i): torch.ones(2**20) for i in range(64)}
    saved = folder(RunFolder(tmp_path), point(5))

    def write() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # which begins VmHWM anew
        before = own_bytes("VmRSS")
        write_folder(saved, point(5), state, file_bytes=2**23)
        assert own_bytes("VmHWM") - before < 100e6

    assert forked(write) == 0
    assert len(list(saved.glob("*.safetensors"))) == 32


def test_what_is_not_used_of_an_expert_that_is_read_takes_no_memory(tmp_path: Path) -> None:
    """So every process may read a full expert, of which only the first one uses the values."""
    save_tensors(tmp_path / "expert", {str(i): torch.ones(2**20) for i in range(16)}, {})

    def read() -> None:
        before = own_bytes("RssAnon")
        loaded, _ = load_tensors(tmp_path / "expert")
        assert own_bytes("RssAnon") - before < sum(tensor.nbytes for tensor in loaded.values()) / 10

    assert forked(read) == 0


def test_a_fault_of_one_process_is_one_of_all(tmp_path: Path) -> None:
    """Nothing hangs: each process ends with its own line, and the last checkpoint is whole."""
    RunFolder(tmp_path).save_checkpoint(point(5), sharded(5), 2)
    RunFolder(tmp_path).save_checkpoint(point(10), sharded(10), 2)

    def action(rank: int) -> None:
        fsync = os.fsync

        def full_after(calls: int) -> Callable[[int], None]:
            left = iter(range(calls))

            def sync(descriptor: int) -> None:
                if next(left, None) is None:
                    raise OSError(28, "No space left on device")
                fsync(descriptor)

            return sync

        for calls in range(2):  # in the middle of torch's writing, and when all is synced again
            os.fsync = full_after(calls) if rank == 1 else fsync
            with pytest.raises(
                UserError, match="^checkpoints: cannot be written: No space .* iteration 10 by the same"
            ):
                RunFolder(tmp_path).save_checkpoint(point(15), sharded(15), 1)
        os.fsync = fsync
        for error in (UserError("one line"), ZeroDivisionError()):
            with pytest.raises(UserError if isinstance(error, UserError) else (ZeroDivisionError, RuntimeError)):
                run_on_all_ranks(lambda error=error: fail(error) if rank == 1 else None)
            with pytest.raises(UserError if isinstance(error, UserError) else (ZeroDivisionError, RuntimeError)):
                run_on_first_rank(lambda error=error: fail(error))
        assert run_on_first_rank(lambda: rank + 7) == 7 and run_on_all_ranks(lambda: rank) == [0, 1]
        loaded = {name: x for name, x in sharded(0).items() if rank == 0 or name != "one"}
        with pytest.raises(UserError, match="a checkpoint of something else: one is"):
            RunFolder(tmp_path).load_checkpoint(1, loaded)
        assert_loads(tmp_path, 10)
        with RunFolder(tmp_path).locked():
            run_on_all_ranks(lambda: None)
            with pytest.raises(UserError, match="is being written by process [0-9]+$"), RunFolder(tmp_path).locked():
                pass
            run_on_all_ranks(lambda: None)

    assert group(2, action) == [0, 0]
    assert not list(tmp_path.rglob("*.partial"))
    assert_loads(tmp_path, 10)


def fail(error: Exception) -> None:
    raise error


def test_damage_that_only_one_process_sees_is_passed_over_by_all(tmp_path: Path) -> None:
    def save(rank: int) -> None:
        for iteration in (5, 10):
            RunFolder(tmp_path).save_checkpoint(point(iteration), sharded(iteration), 2)

    def load(rank: int) -> None:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert_loads(tmp_path, 5)
        assert sum("is passed over" in str(warning.message) for warning in seen) == (rank == 0)

    assert group(2, save) == [0, 0]
    run = RunFolder(tmp_path)
    flip(max(folder(run, point(10)).glob("*.safetensors")))
    assert group(2, load) == [0, 0]


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
    assert run.metrics() == rows
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


def test_damaged_metrics_are_a_user_error(tmp_path: Path) -> None:
    for content in (b'{"phase": 1, "iter\n', b"\xff\xfe\n"):
        (tmp_path / "metrics.jsonl").write_bytes(content)
        for read in (RunFolder(tmp_path).metrics, lambda: RunFolder(tmp_path).rewind_metrics(1, 5)):
            with pytest.raises(UserError, match=f"^{tmp_path / 'metrics.jsonl'}: damaged"):
                read()
        assert (tmp_path / "metrics.jsonl").read_bytes() == content


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
        ({"seed": 4}, "seed is 3 there, 4 here"),
        ({"seed": 3, "plan.shift": 2.0}, "plan.shift is 1.0 there, 2.0 here"),
        ({"seed": 3, "fake.updates": 1}, "fake.updates is 5 there, 1 here"),
    ):
        whole = rf"holds another run of toy-1d: {re.escape(key)}; take another --output$"  # no experts to go on from
        with pytest.raises(UserError, match=whole):
            run.open(resolve("toy-1d", overrides), [""])
    assert run.config_path.read_bytes() == before


def test_a_run_may_go_on_with_another_engine(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.open(resolve("toy-1d", {}), [""])
    before = run.config_path.read_bytes()
    run.open(resolve("toy-1d", {"engine.micro_batch": 8}), [""])
    assert run.config_path.read_bytes() == before


@pytest.mark.parametrize("field", ["log_every", "sample_every", "checkpoint_every", "keep_last", "skips"])
def test_a_run_may_go_on_with_another_cadence(field: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.open(resolve("toy-1d", {}), [""])
    run.open(resolve("toy-1d", {field: 7}), [""])


def test_a_run_goes_on_wherever_the_same_contents_lie_and_knows_the_new_places(tmp_path: Path) -> None:
    """By hashes; its other fields stay as they were when it was begun."""
    run, begun = RunFolder(tmp_path / "run"), resolve("nano-t2i", {"prompts": "a.txt", "init_experts": "runs/a"})
    run.open(begun, ['{"prompt": "x"}'], {"prompts": ("prompts: a.txt", "1"), "init_experts": ("...", "2")})
    places = {
        "prompts": "/data/b.txt",
        "init_experts": "/data/a",
        "teacher.path": "/data/nano",
        "teacher.revision": "v2",
    }
    moved = resolve("nano-t2i", {**places, "log_every": begun.log_every + 1})
    run.check(moved)
    assert run.moved(moved) and run.config() == begun
    run.open(moved, ['{"prompt": "x"}'], {"prompts": ("prompts: /data/b.txt", "1"), "init_experts": ("...", "2")})
    assert run.config() == moved.model_copy(update={"log_every": begun.log_every}) and not run.moved(moved)
    with pytest.raises(UserError, match=rf"^prompts: c.txt is not what it was when {run.path} was begun; bring that"):
        run.open(begun, [""], {"prompts": ("prompts: c.txt", "3"), "init_experts": ("...", "2")})
    assert run.config().prompts == "/data/b.txt" and (run.path / "prompts.jsonl").read_text() == '{"prompt": "x"}\n'
    (run.path / "contents.json").write_text('{"pro')
    with pytest.raises(UserError, match=r"contents.json: damaged"):
        run.open(moved, [""], {"prompts": ("prompts: /data/b.txt", "1")})


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
    run.open(config, [""])
    assert not run.finished(config)
    save_tensors(run.expert_path(2), {}, {})
    assert not run.finished(config)
    save_tensors(run.expert_path(1), {}, {})
    assert run.finished(config)
    assert not run.finished(resolve("toy-1d", {"iterations": config.iterations + 1}))
