"""Writes single files atomically, safetensors with a header among them, and refuses symlinks."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from phased_dmd.errors import UserError

HEADER = "phased_dmd"  # one key, so that the header's bytes do not depend on a hash's order
OPEN = 64  # files that are kept open to be read


def partial_of(path: Path) -> Path:
    """Returns the place where a file or folder is written before it takes its name; a kill may leave it behind."""
    return path.with_name(f".{path.name}.partial")


def sync(path: Path) -> None:
    """Forces to the disk what a file holds, or the names that a folder holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes beside the path, syncs, and renames over it; an OSError leaves nothing new behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes tensors and a JSON header atomically; the same content gives the same bytes."""
    ordered = {name: tensors[name].contiguous() for name in sorted(tensors)}
    write_atomically(path, save(ordered, {HEADER: json.dumps(header, sort_keys=True)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors and the header of a file that `save_tensors` wrote; anything else is a UserError."""
    header = load_header(path)
    try:
        return load_file(path), header
    except Exception as error:  # safetensors raises its own, OSError: all mean a bad file
        raise UserError(f"{path}: not a file of this program, or damaged ({error})") from error


def load_header(path: Path) -> dict[str, Any]:
    """Reads the header alone of a file that `save_tensors` wrote; anything else is a UserError."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})[HEADER])
    except Exception as error:  # safetensors raises its own, OSError, KeyError, ValueError: all mean a bad file
        raise UserError(f"{path}: not a file of this program, or damaged ({error})") from error


# ---------------------------------------------------------------- tensors that are checked when they are read


def save_hashed(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors, and a hash of each, atomically."""
    save_tensors(path, tensors, {"hashes": {name: _hash(tensor) for name, tensor in tensors.items()}})


def is_whole(path: Path) -> bool:
    """Says whether such a file is there, as long as its header says, with a hash of every tensor."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()[HEADER])["hashes"].keys() == set(file.keys())
    except Exception:  # safetensors raises its own, OSError, KeyError, ValueError: all mean that it is written anew
        return False


class HashedFiles:
    """Reads single tensors of files of `save_hashed`, each checked by its hash."""

    def __init__(self) -> None:
        self._open: dict[Path, tuple[safe_open, dict[str, str]]] = {}

    def names(self, path: Path) -> Collection[str]:
        """Returns the names of a file's tensors."""
        return self._opened(path)[1]

    def read(self, path: Path, name: str) -> Tensor:
        """Reads one tensor; one that is damaged is a UserError."""
        file, hashes = self._opened(path)
        tensor = file.get_tensor(name)
        if _hash(tensor) != hashes[name]:
            raise UserError(f"{path}: {name} is damaged; remove the file")
        return tensor

    def _opened(self, path: Path) -> tuple[safe_open, dict[str, str]]:
        if path not in self._open:
            if len(self._open) == OPEN:
                self._open.clear()
            file = safe_open(path, "pt")
            self._open[path] = file, json.loads(file.metadata()[HEADER])["hashes"]
        return self._open[path]


def _hash(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


# ---------------------------------------------------------------- symlinks


def refuse_link(path: Path) -> None:
    """Raises a UserError for a symlink, which could lead out of the run."""
    if path.is_symlink():
        raise UserError(f"{path}: a symlink, which a run folder may not hold")


def refuse_links(folder: Path) -> None:
    """Raises a UserError if the folder, which need not be there, or anything in it is a symlink."""
    refuse_link(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        refuse_link(path)


def resolve_inside(folder: Path, path: Path) -> Path:
    """Returns the path itself; a UserError if a symlink leads it out of the folder."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path}: leads out of {folder}")
    return path
