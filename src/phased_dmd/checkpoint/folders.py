"""A checkpoint is a folder of sharded safetensors that a manifest of sizes and sums makes whole.

All ranks call these functions together. Everything is staged in a partial folder and synced; the manifest is written
last; the rename of the folder is the commit. A folder that differs from its manifest in any byte is no checkpoint.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import torch
import torch.distributed.checkpoint as dcp
from pydantic import Field
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from phased_dmd.checkpoint.files import partial_of, refuse_links, sync
from phased_dmd.config.teacher import Section
from phased_dmd.engine.collectives import run_on_all_ranks, run_on_first_rank
from phased_dmd.engine.world import rank, sharded, world_size
from phased_dmd.errors import UserError

MANIFEST = "manifest.json"
FILE_BYTES = 2**28  # torch copies a file's tensors to the host, and has them there as one piece of bytes, too
POINT = re.compile(r"phase-(\d+)-iteration-(\d+)-update-(\d+)", re.ASCII)


class Damaged(UserError):
    """Means that a folder is no whole checkpoint; names the file at fault."""


class Point(NamedTuple):
    """Says where in a run a checkpoint stands: iterations done in the phase, and updates in the next. Sorts by time."""

    phase: int
    iteration: int
    update: int

    @classmethod
    def of(cls, at: Mapping[str, Any]) -> Self:
        return cls(at["phase"], at["iteration"], at["update"])

    @property
    def name(self) -> str:
        return f"phase-{self.phase}-iteration-{self.iteration:06d}-update-{self.update}"

    def __str__(self) -> str:
        return f"phase {self.phase}, iteration {self.iteration}" + (f", update {self.update}" if self.update else "")


def points_in(folder: Path) -> list[Point]:
    """Lists the points of all folders that have a checkpoint's name, whole or not, oldest first."""
    refuse_links(folder)
    names = os.listdir(folder) if folder.exists() else ()
    found = {name: Point(*map(int, numbers.groups())) for name in names if (numbers := POINT.fullmatch(name))}
    return sorted(point for name, point in found.items() if point.name == name)


class Sum(Section):
    """Holds the size of a file and a hash of its bytes."""

    size: int = Field(ge=0)
    blake2b: str = Field(pattern="^[0-9a-f]{64}$")

    @classmethod
    def of(cls, path: Path) -> Self:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32))
            return cls(size=file.tell(), blake2b=digest.hexdigest())


class Manifest(Section):
    """Lists what a checkpoint holds: `at`, plain JSON that says where it stands, and the sum of every file."""

    at: dict[str, Any]
    files: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], Sum]

    def encode(self) -> bytes:
        """Writes the manifest as JSON, with a sum of its own."""
        content = self.model_dump()
        digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=32).hexdigest()
        return json.dumps({**content, "blake2b": digest}, indent=1, sort_keys=True).encode()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads the manifest of a checkpoint's folder; Damaged if a byte of it is wrong, or it is another folder's."""
        data = path.read_bytes()
        try:
            content = json.loads(data.decode())
            manifest = cls(at=content["at"], files=content["files"])
            name = Point.of(manifest.at).name
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Damaged(f"{path}: damaged") from error
        if manifest.encode() != data:
            raise Damaged(f"{path}: damaged")
        if name != path.parent.name:
            raise Damaged(f"{path}: of another checkpoint, {name}")
        return manifest


# ---------------------------------------------------------------- writing


def write_folder(
    folder: Path, at: Mapping[str, Any], state: Mapping[str, Tensor], file_bytes: int = FILE_BYTES
) -> None:  # fmt: skip
    """Commits a checkpoint to `folder`, whose parent's parent must exist; raises OSError on every rank alike.

    A whole checkpoint that is there already stands for the same point of the same run, and is left as it is.
    file_bytes: the most that each process writes to a file, but for a larger tensor; it holds that much a few times.
    """
    if run_on_first_rank(lambda: os.path.lexists(folder)):
        try:
            verify(folder)
            return
        except Damaged:
            pass
    fields, partial = json.loads(json.dumps(at)), partial_of(folder)
    run_on_first_rank(lambda: _need_space(folder.parent.parent, sum(tensor.nbytes for tensor in state.values())))

    def synced(path: Path) -> Sum:
        sync(path)
        return Sum.of(path)

    try:
        run_on_first_rank(lambda: _stage(partial))
        with _plain_errors():
            contiguous = {name: tensor.detach().contiguous() for name, tensor in state.items()}
            numbers = _file_numbers(contiguous, file_bytes * world_size())
            writer = HuggingFaceStorageWriter(str(partial), numbers, save_distributed=True)
            dcp.save(contiguous, storage_writer=writer, no_dist=not sharded())
        names = sorted({name for found in run_on_all_ranks(lambda: os.listdir(partial)) for name in found})
        own = names[rank() :: world_size()]
        sums = run_on_all_ranks(lambda: {name: synced(partial / name) for name in own})
        files = {name: entry for found in sums for name, entry in found.items()}
        run_on_first_rank(lambda: _commit(folder, Manifest(at=fields, files=files)))
    except BaseException:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _file_numbers(state: Mapping[str, Tensor], most: int) -> dict[str, int]:
    """Returns the number, from 1 on, of the file of each tensor: a file holds `most` bytes at most, or one tensor.

    most: over all processes, each of which writes a file of its shards.
    """
    numbers, number, size = {}, 1, 0
    for name, tensor in state.items():
        if size and size + tensor.nbytes > most:
            number, size = number + 1, 0
        numbers[name], size = number, size + tensor.nbytes
    return numbers


def remove(folder: Path) -> None:
    """Removes a checkpoint, its name first: a folder that is half deleted is no checkpoint."""
    partial = partial_of(folder)
    os.rename(folder, partial)
    shutil.rmtree(partial)


def _need_space(where: Path, size: int) -> None:
    """Raises an OSError where less is free than so many bytes, before anything is written."""
    if (free := shutil.disk_usage(where).free) < size:
        sizes = f"{size / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {sizes}")


def _stage(partial: Path) -> None:
    """Makes an empty folder to write to, and removes what a kill left behind."""
    parent = partial.parent
    refuse_links(parent)
    if not parent.exists():
        parent.mkdir()
        sync(parent.parent)
    for path in parent.glob(".*.partial"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    partial.mkdir()


def _commit(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest and renames the partial folder into its place."""
    partial = partial_of(folder)
    with (partial / MANIFEST).open("xb") as file:
        file.write(manifest.encode())
        file.flush()
        os.fsync(file.fileno())
    sync(partial)
    damaged = partial.with_name(f".{folder.name}.damaged.partial")
    if folder.exists():
        os.rename(folder, damaged)
    os.rename(partial, folder)
    sync(folder.parent)
    shutil.rmtree(damaged, ignore_errors=True)


# ---------------------------------------------------------------- reading


def check_folder(folder: Path, summed: slice) -> dict[str, Any]:
    """Returns the `at` of a folder that holds exactly what its manifest says; Damaged otherwise. For one rank.

    summed: which of the files, in the order of their names, are read and compared with their sums.
    """
    refuse_links(folder)
    try:
        manifest = Manifest.read(folder / MANIFEST)
        names = {path.name for path in folder.iterdir()}
        for name in sorted(names ^ {MANIFEST, *manifest.files}):
            raise Damaged(f"{folder / name}: {'not of this checkpoint' if name in names else 'missing'}")
        for name, entry in manifest.files.items():
            if (size := (folder / name).stat().st_size) != entry.size:
                raise Damaged(f"{folder / name}: damaged: {size} bytes of {entry.size}")
        for name in sorted(manifest.files)[summed]:
            if Sum.of(folder / name) != manifest.files[name]:
                raise Damaged(f"{folder / name}: damaged")
    except PermissionError as error:  # its owner can still read it: nothing to pass over
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
    except OSError as error:
        raise Damaged(f"{error.filename or folder}: cannot be read: {error.strerror}") from error
    return manifest.at


def verify(folder: Path) -> dict[str, Any]:
    """Returns the `at` of a whole checkpoint, of which each rank reads its part; Damaged on every rank otherwise."""
    return run_on_all_ranks(lambda: check_folder(folder, slice(rank(), None, world_size())))[0]


def read_folder(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Copies a verified checkpoint into the tensors; a UserError, and they are as before, if it holds others."""
    reader = HuggingFaceStorageReader(str(folder))
    run_on_all_ranks(lambda: _compare(folder, reader, state))
    with _plain_errors():
        dcp.load(dict(state), storage_reader=reader, no_dist=not sharded())


def read_part(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Returns the tensors of a verified checkpoint whose names begin so, whole and by the rest of their names.

    For one process, however many have written it; {} if there are none.
    """
    reader = HuggingFaceStorageReader(str(folder))
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix)
    }
    with _plain_errors():
        dcp.load(dict(state), storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _compare(folder: Path, reader: HuggingFaceStorageReader, state: Mapping[str, Tensor]) -> None:
    """Raises a UserError that names the first tensor whose name, type or shape differs from the state's."""
    stored = {
        name: f"{entry.properties.dtype} {list(entry.size)}"
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    wanted = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in state.items()}
    for name in sorted(stored.keys() | wanted.keys()):
        has, needs = stored.get(name, "missing"), wanted.get(name, "none")
        if has != needs:
            raise UserError(f"{folder}: a checkpoint of something else: {name} is {has}, where this run has {needs}")


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Unwraps what `torch.distributed.checkpoint` raises: the error itself, on every rank, an OSError first."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is enough
            yield
    except CheckpointException as wrapped:
        errors = [error for error, _ in wrapped.failures.values()]
        raise next((error for error in errors if isinstance(error, OSError)), errors[0]) from wrapped
