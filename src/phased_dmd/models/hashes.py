"""Hashes of files of weights: of all bytes, read once and remembered, or of a little of every tensor."""

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from phased_dmd.checkpoint import write_atomically

REMEMBERED = 1 << 24  # bytes; smaller files are read again each time
SETTLED = 2.0  # seconds: what was changed since then may change again within one tick of a coarse clock
SAMPLE = 1 << 12  # bytes of a tensor
SAVER = re.compile("_.*|.*dtype|transformers_version|architectures")  # what a saved configuration says of its saving


def file_hash(path: Path) -> str:
    """Hashes all bytes of a file. A large file's hash is kept in the user's cache for as long as the file is not
    touched: the same inode, size, and times of its change and of its status's, of which the last cannot be set back.
    """
    about, note = _identity(path), _note(path)
    with suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(note.read_bytes())
        if kept["file"] == about:
            return kept["blake2b"]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    settled = time.time() - max(about[-2:]) / 1e9 > SETTLED
    if about[2] >= REMEMBERED and settled and _identity(path) == about:
        with suppress(OSError):  # it is read again another time
            write_atomically(note, json.dumps({"file": about, "blake2b": found}).encode())
    return found


def tensors_hash(folder: Path) -> str:
    """Hashes the configuration of a part of a pipeline, and name, shape, type and beginning of each of its tensors; the
    hash is the same for a copy that was cut into other files.
    """
    digest = hashlib.blake2b(digest_size=16)
    with suppress(FileNotFoundError):
        config = json.loads((folder / "config.json").read_bytes())
        digest.update(json.dumps({k: v for k, v in config.items() if not SAVER.fullmatch(k)}, sort_keys=True).encode())
    for tensor in sorted(tensor for file in weight_files(folder) for tensor in _tensors(file)):
        digest.update(repr(tensor).encode())
    return digest.hexdigest()


def _identity(path: Path) -> list[Any]:
    """Returns what tells that a file was touched."""
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _note(path: Path) -> Path:
    """Returns the file in which a file's hash is kept, whatever path it was reached by."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    name = hashlib.blake2b(os.fsencode(os.path.realpath(path)), digest_size=16).hexdigest()
    return root / "phased-dmd" / "hashes" / f"{name}.json"


def weight_files(folder: Path) -> Sequence[Path]:
    """Lists the safetensors that are loaded: those of the index, or else the only one; never a variant of it."""
    for name in ("diffusion_pytorch_model", "model"):
        index, whole = folder / f"{name}.safetensors.index.json", folder / f"{name}.safetensors"
        if whole.exists():
            return [whole]
        if index.exists():
            return [folder / file for file in set(json.loads(index.read_bytes())["weight_map"].values())]
    return sorted(folder.glob("*.safetensors"))


def _tensors(path: Path) -> list[tuple[str, str, list[int], str]]:
    """Reads name, type, shape and a hash of the beginning of each tensor of a file of safetensors."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start, found = file.tell(), []
        header.pop("__metadata__", None)
        for name, about in header.items():
            begin, end = about["data_offsets"]
            file.seek(start + begin)
            sample = hashlib.blake2b(file.read(min(SAMPLE, end - begin)), digest_size=8).hexdigest()
            found.append((name, about["dtype"], about["shape"], sample))
    return found
