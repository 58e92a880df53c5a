"""The device, and the processes that torchrun started: alone, one process is its own world."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from phased_dmd.config import UserError

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # for another process: the first one may be encoding prompts


def device() -> torch.device:
    """The accelerator, if there is one that knows float64, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None and accelerator.type != "mps" else torch.device("cpu")


@contextmanager
def processes(alone: bool = False) -> Iterator[None]:
    """Inside, this process is one of those that torchrun started, if it did. alone: a group of one without it, too."""
    started = "TORCHELASTIC_RUN_ID" in os.environ
    if dist.is_initialized() or not (started or alone):
        yield
        return
    kind = device().type
    backend = "cpu:gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    if started:
        if kind != "cpu":
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        mesh.cache_clear()
        dist.destroy_process_group()


def sharded() -> bool:
    """Whether networks are spread over a group of processes."""
    return dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if sharded() else 0


def world_size() -> int:
    return dist.get_world_size() if sharded() else 1


@cache
def mesh(replicas: int) -> DeviceMesh:
    """All processes in a line, or in `replicas` lines that each hold all of the weights (HSDP)."""
    if replicas == 1:
        return init_device_mesh(device().type, (world_size(),))
    return init_device_mesh(device().type, (replicas, world_size() // replicas), mesh_dim_names=("replicate", "shard"))


def check_replicas(replicas: int) -> None:
    """A ValueError where the processes cannot form that many equal groups."""
    if world_size() % replicas:
        raise ValueError(f"engine.replicas: {world_size()} processes do not make {replicas} equal groups")


@contextmanager
def first_then_rest() -> Iterator[None]:
    """The first process goes through the body, then the others do, and find done what it did."""
    if rank() > 0:
        dist.barrier()
    yield
    if sharded() and rank() == 0:
        dist.barrier()


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


def shares(batch: int, most: int | None) -> list[list[range]]:
    """A global batch in micro-batches of at most `most` samples a process: for each the samples of every process.

    The batch must be a multiple of the number of processes; a process's samples are neighbours.
    """
    own, (count, rest) = batch // world_size(), divmod(batch, world_size())
    if rest or not count:
        raise ValueError(f"batch_size: {batch} samples cannot be shared by {world_size()} processes")
    size = min(most or own, own)
    return [
        [range(r * own + start, r * own + min(start + size, own)) for r in range(world_size())]
        for start in range(0, own, size)
    ]


def together(action: Callable[[], T]) -> list[T]:
    """What `action` gave on every rank, in their order. If it failed on any, every rank raises: its own error or the
    first other's, an OSError or UserError as what it was, anything else as a RuntimeError.
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
    return type(error)(str(error)) if isinstance(error, UserError) else RuntimeError(f"rank {rank()}: {error!r}")
