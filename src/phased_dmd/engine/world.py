"""The device, and the processes that torchrun started: alone, one process is its own world."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from phased_dmd.config import Engine
from phased_dmd.errors import LostPeer, Stopped, UserError

T = TypeVar("T")
GONE = ("gloo/transport", "Connection closed", "Connection reset", "Broken pipe", "Timed out")  # said of peers
PATIENCE = timedelta(minutes=30)  # for a word from another process; for work of unknown length see `patience`


def device() -> torch.device:
    """The accelerator, if there is one that knows float64, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None and accelerator.type != "mps" else torch.device("cpu")


@contextmanager
def processes(alone: bool = False) -> Iterator[None]:
    """Inside, this process is one of those that torchrun started, if it did. alone: a group of one without it, too.

    Raises LostPeer where another process is gone.
    """
    started = "TORCHELASTIC_RUN_ID" in os.environ
    if dist.is_initialized() or not (started or alone):
        yield
        return
    kind = device().type
    backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    if started:
        if kind != "cpu":
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # never written to
            yield
    except RuntimeError as error:
        gone = isinstance(error, dist.DistError) or any(words in str(error) for words in GONE)
        if gone and world_size() > 1:
            message = "another process of the group ended; the same command goes on from the last checkpoint"
            raise LostPeer(message) from error
        raise
    finally:
        mesh.cache_clear()
        sequence_mesh.cache_clear()
        dist.destroy_process_group()


def sharded() -> bool:
    """Whether networks are spread over a group of processes."""
    return dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@cache
def mesh(replicas: int) -> DeviceMesh:
    """All processes in a line, or in `replicas` lines that each hold all of the weights (HSDP)."""
    if replicas == 1:
        return init_device_mesh(device().type, (world_size(),))
    return init_device_mesh(device().type, (replicas, world_size() // replicas), mesh_dim_names=("replicate", "shard"))


@cache
def sequence_mesh(ways: int) -> DeviceMesh:
    """Groups of `ways` neighbouring processes, as diffusers names their dimensions."""
    shape = (world_size() // ways, 1, ways)
    return init_device_mesh(device().type, shape, mesh_dim_names=("batch", "ring", "ulysses"))


def check(engine: Engine) -> None:
    """A UserError where the processes cannot form the groups that are asked for."""
    for name, size in (("replicas", engine.replicas), ("sequence_parallel", engine.sequence_parallel)):
        if world_size() % size:
            raise UserError(f"engine.{name}: {world_size()} processes cannot be grouped by {size}")


def warn(message: str) -> None:
    """A warning where the caller was called from; of several processes, the first one speaks for all."""
    if rank() == 0 if sharded() else os.environ.get("RANK", "0") == "0":
        warnings.warn(message, stacklevel=3)


def mean(value: Tensor) -> float:
    """The mean over the processes of a number of each."""
    if not sharded():
        return value.item()
    total = value.detach().to("cpu", torch.float64)
    dist.all_reduce(total)
    return total.item() / world_size()


def most(number: int) -> int:
    """The greatest of the processes' numbers."""
    if not sharded():
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def shares(batch: int, engine: Engine, pairs: bool = False) -> list[list[range]]:
    """A global batch in micro-batches: for each the samples of every process; a UserError where it cannot be shared.

    A micro-batch's samples are neighbours, and so are a process's; those that share sequences have the same.
    pairs: no pair of neighbours may be parted.
    """
    groups = world_size() // engine.sequence_parallel
    own, rest = divmod(batch, groups)
    if rest or not own:
        raise UserError(f"batch_size: {batch} samples cannot be shared by {groups} processes or groups of them")
    size = min(engine.micro_batch or own, own)
    if pairs and (own % 2 or size % 2):
        raise UserError(f"rollouts.antithetic: {own} samples in calls of {size} cannot be paired")
    owners = [process // engine.sequence_parallel for process in range(world_size())]
    micro_batches = []
    for start in range(0, own, size):
        each = min(size, own - start)
        begins = [start * groups + group * each for group in owners]
        micro_batches.append([range(begin, begin + each) for begin in begins])
    return micro_batches


def together(action: Callable[[], T]) -> list[T]:
    """What `action` gave on every rank, in their order. If it failed on any, every rank raises: its own error or the
    first other's, an OSError, UserError or Stopped as what it was, anything else as a RuntimeError.
    """
    if not sharded():
        return [action()]
    mine, error = None, None
    try:
        mine = action()
    except Exception as caught:
        error = caught
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, (mine, error and _portable(error)))
    if error is not None:
        raise error
    for _, other in found:
        if other is not None:
            raise other
    return [value for value, _ in found]


def on_first_rank(action: Callable[[], T]) -> T:
    """What `action` gave on the first rank, the only one to run it; if it failed, every rank raises."""
    return cast(T, together(lambda: action() if rank() == 0 else None)[0])


def _portable(error: Exception) -> Exception:
    """The same error, as one that every process can unpickle."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror)
    if isinstance(error, Stopped):
        return error
    return type(error)(str(error)) if isinstance(error, UserError) else RuntimeError(f"rank {rank()}: {error!r}")
