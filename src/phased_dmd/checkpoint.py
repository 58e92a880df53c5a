"""The run folder: its config, metrics, experts and checkpoints. A file is there whole or not at all."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from phased_dmd.config import Config, UserError
from phased_dmd.overrides import build

HEADER = "phased_dmd"  # one key, so that the header's bytes do not depend on a hash's order
KEEP = 2  # checkpoints


def partial_of(path: Path) -> Path:
    """Where a file is written before it takes its name; a kill may leave it behind."""
    return path.with_name(f".{path.name}.partial")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes beside the path, syncs, and renames over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    ordered = {name: tensors[name].contiguous() for name in sorted(tensors)}
    write_atomically(path, save(ordered, {HEADER: json.dumps(header, sort_keys=True)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file that `save_tensors` wrote; anything else is a UserError."""
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
        return load_file(path), header
    except Exception as error:  # safetensors raises its own, OSError, KeyError, ValueError: all mean a bad file
        raise UserError(f"{path}: not a file of this program, or damaged ({error})") from error


def first_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The dotted name of the first field in which two nested mappings differ."""
    key = next(key for key in {**a, **b} if a.get(key) != b.get(key))
    if isinstance(a.get(key), Mapping) and isinstance(b.get(key), Mapping):
        return f"{key}.{first_difference(a[key], b[key])}"
    return key


class RunFolder:
    """One run on disk."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    def _beginnings(self) -> set[Path]:
        """What a kill may leave before the config is written."""
        return {self.path / "prompts.jsonl", partial_of(self.path / "prompts.jsonl"), partial_of(self.config_path)}

    def config(self) -> Config:
        try:
            return build(json.loads(self.config_path.read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: not a run folder: config.json cannot be read ({error})") from error

    def check(self, config: Config) -> None:
        """A UserError where the folder cannot take this run."""
        if self.config_path.exists():
            if (other := self.config()) != config:
                key = first_difference(other.model_dump(), config.model_dump())
                raise UserError(f"--output: {self.path} holds another run of {other.recipe}, which differs in {key}")
        elif self.path.exists() and (not self.path.is_dir() or set(self.path.iterdir()) - self._beginnings()):
            raise UserError(f"--output: {self.path} exists and is not a run folder")

    def open(self, config: Config, prompts: Sequence[str]) -> None:
        """Makes the folder with its config and prompts, lines of jsonl, or finds it holding the same run."""
        self.check(config)
        lines, path = "".join(f"{prompt}\n" for prompt in prompts).encode(), self.path / "prompts.jsonl"
        try:
            if path.exists() and path.read_bytes() != lines:
                raise UserError(f"prompts: {config.prompts} is not what it was when {self.path} was begun")
            write_atomically(path, lines)
            if not self.config_path.exists():
                write_atomically(self.config_path, (config.model_dump_json(indent=2) + "\n").encode())
        except OSError as error:
            raise UserError(f"--output: {self.path} cannot be written: {error.strerror}") from error

    def expert_path(self, phase: int) -> Path:
        return self.path / "experts" / f"phase-{phase}.safetensors"

    def finished(self, config: Config) -> bool:
        return all(self.expert_path(phase).exists() for phase in range(1, config.plan.phases + 1))

    def save_checkpoint(self, phase: int, iteration: int, tensors: Mapping[str, Tensor]) -> None:
        path = self.path / "checkpoints" / f"phase-{phase}-iteration-{iteration:06d}.safetensors"
        save_tensors(path, tensors, {"phase": phase, "iteration": iteration})
        for old in self._checkpoints()[:-KEEP]:
            old.unlink()

    def load_checkpoint(self, phase: int) -> tuple[int, dict[str, Tensor]] | None:
        """The newest checkpoint of a phase as (iterations done, tensors)."""
        mine = [path for path in self._checkpoints() if path.name.startswith(f"phase-{phase}-")]
        if not mine:
            return None
        tensors, header = load_tensors(mine[-1])
        return header["iteration"], tensors

    def _checkpoints(self) -> list[Path]:
        """All of them, oldest first."""
        paths = (self.path / "checkpoints").glob("phase-*-iteration-*.safetensors")
        return sorted(paths, key=lambda path: tuple(int(number) for number in re.findall(r"\d+", path.stem)))

    def rewind_metrics(self, phase: int, iteration: int) -> None:
        """Drops the metrics that lie beyond (phase, iteration), and a line cut short."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        rows = [(json.loads(line), line) for line in kept]
        upto = [line for row, line in rows if (row["phase"], row["iteration"]) <= (phase, iteration)]
        write_atomically(path, "".join(upto).encode())

    def log(self, name: str, row: Mapping[str, Any]) -> None:
        """Appends one JSON object to `metrics.jsonl` or `timing.jsonl`."""
        with (self.path / name).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
