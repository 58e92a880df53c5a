"""Knows the device and the processes that torchrun started, and splits a batch among them."""

import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from phased_dmd.config import Engine
from phased_dmd.errors import LostPeer, OutOfMemory, UserError

GONE = ("gloo/transport", "Connection closed", "Connection reset", "Broken pipe", "Timed out")  # said of peers
GROUPS = itertools.count()  # numbers the groups that a process joins, one after the other
BATCH, BATCH_NUMBERS = 64, 2**18  # samples a network call without gradient, and the most numbers that they hold
PATIENCE = timedelta(minutes=30)  # for a word from another process; see `collectives` for work of unknown length


def device() -> torch.device:
    """Returns the accelerator if there is one that knows float64, else the CPU; of several that of this process of
    torchrun, with its index.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":
        return torch.device("cpu")
    if "LOCAL_RANK" in os.environ:
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


@contextmanager
def processes(alone: bool = False) -> Iterator[None]:
    """Joins the group of processes that torchrun started, and leaves it afterwards; without torchrun there is none.

    alone: make a group of one process without torchrun, too. Raises LostPeer where another process is gone.
    """
    started = "TORCHELASTIC_RUN_ID" in os.environ
    if dist.is_initialized() or not (started or alone):
        yield
        return
    kind = device().type
    backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    if started:
        store, own_rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
        # Keys of their own: a process that comes late must not find the addresses of the group before.
        own_store = dist.PrefixStore(f"phased-dmd-{next(GROUPS)}", store)
        dist.init_process_group(backend, timeout=PATIENCE, store=own_store, rank=own_rank, world_size=size)
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
    """Says whether there is a group of processes, over which networks are sharded."""
    return dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@cache
def mesh(replicas: int) -> DeviceMesh:
    """Arranges all processes in one line, or in `replicas` lines that each hold all of the weights (HSDP)."""
    if replicas == 1:
        return init_device_mesh(device().type, (world_size(),))
    return init_device_mesh(device().type, (replicas, world_size() // replicas), mesh_dim_names=("replicate", "shard"))


@cache
def sequence_mesh(ways: int) -> DeviceMesh:
    """Groups every `ways` neighbouring processes; the dimensions have the names that diffusers asks for."""
    shape = (world_size() // ways, 1, ways)
    return init_device_mesh(device().type, shape, mesh_dim_names=("batch", "ring", "ulysses"))


def check_groups(engine: Engine) -> None:
    """Raises a UserError where the processes cannot form the groups that are asked for."""
    for name, size in (("replicas", engine.replicas), ("sequence_parallel", engine.sequence_parallel)):
        if world_size() % size:
            raise UserError(f"engine.{name}: {world_size()} processes cannot be grouped by {size}")


def warn(message: str) -> None:
    """Warns where the caller was called from; of several processes, the first one speaks for all."""
    if rank() == 0 if sharded() else os.environ.get("RANK", "0") == "0":
        warnings.warn(message, stacklevel=3)


@contextmanager
def out_of_memory(part: Callable[[], str]) -> Iterator[None]:
    """Raises OutOfMemory where the device's memory does not hold what is done inside. part: says what that is."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"{part()}: {str(error).partition('. ')[0]}") from error


def split_batch(batch: int, engine: Engine, pairs: bool = False) -> list[list[range]]:
    """Splits a global batch into micro-batches, and each of them into the samples of every process.

    A micro-batch's samples are neighbours, and so are a process's; those that share sequences have the same. Raises a
    UserError where the batch cannot be split. pairs: no pair of neighbours may be parted.
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


def batch_size(shape: Sequence[int]) -> int:
    """Returns how many samples of a shape go through a network at once where nothing trains: one of a large model, many
    of nano.
    """
    return max(1, min(BATCH, BATCH_NUMBERS // math.prod(shape)))
