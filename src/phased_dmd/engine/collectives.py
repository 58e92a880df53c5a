"""Has processes act together: they reduce numbers, share errors that end all of them, and divide long work."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from phased_dmd.engine import world
from phased_dmd.engine.world import rank, sharded, world_size
from phased_dmd.errors import Stopped, UserError

T = TypeVar("T")
R = TypeVar("R")
BEAT = 0.2  # seconds between two signs of life


def all_reduce_means(values: Tensor) -> list[float]:
    """Returns the mean over the processes of each of several numbers [n], with one wait for the device."""
    if not dist.is_initialized():
        return values.tolist()
    total = values.detach().to("cpu", torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def all_reduce_max(number: int) -> int:
    """Returns the greatest of the processes' numbers."""
    if not sharded():
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def run_on_all_ranks(action: Callable[[], T]) -> list[T]:
    """Runs the action on every rank and gathers what it gave, in the order of the ranks. If it failed on any, every
    rank raises: its own error or the first other's, an OSError, UserError or Stopped as what it was, anything else as a
    RuntimeError.
    """
    if not sharded():
        return [action()]
    mine, error = None, None
    try:
        mine = action()
    except Exception as caught:
        error = caught
    found: list = [None] * world_size()
    dist.all_gather_object(found, (mine, error and _portable(error)))
    if error is not None:
        raise error
    for _, other in found:
        if other is not None:
            raise other
    return [value for value, _ in found]


def run_on_first_rank(action: Callable[[], T]) -> T:
    """Runs the action on the first rank alone; returns what it gave, or raises what it raised, on every rank."""
    return cast(T, run_on_all_ranks(lambda: action() if rank() == 0 else None)[0])


def _portable(error: Exception) -> Exception:
    """Makes the same error as one that every process can unpickle."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror)
    if isinstance(error, Stopped):
        return error
    return type(error)(str(error)) if isinstance(error, UserError) else RuntimeError(f"rank {rank()}: {error!r}")


# ---------------------------------------------------------------- work of unknown length


class Heartbeat:
    """Tells each process of a group, by threads that agree beat by beat, whether any of them still works or has failed.

    While they work apart, nobody who lives is given up, however long it takes. A process that ends, or gives no sign
    for as long as `world.PATIENCE`, is lost, and the work has failed.
    """

    def __init__(self) -> None:
        self.over = threading.Event()  # nobody works any more
        self.failed = False  # anybody's work
        self.lost: Exception | None = None
        self._own_state = True, False  # whether this process works, and whether its work failed
        if world_size() == 1:
            self.over.set()
            return
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=world.PATIENCE))
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        try:
            anyone_works = True
            while anyone_works:
                found = torch.tensor(self._own_state, dtype=torch.int32)
                dist.all_reduce(found, dist.ReduceOp.MAX, self._group)
                anyone_works, self.failed = map(bool, found.tolist())
                time.sleep(BEAT * anyone_works)
            dist.destroy_process_group(self._group)
        except Exception as error:  # whatever it is, this process hears no more of the others
            self.lost, self.failed = error, True
        self.over.set()

    def end_own_work(self, failed: bool = False) -> None:
        """Tells the others that this process works no more."""
        self._own_state = False, failed

    def wait(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Returns once nobody works any more."""
        while not self.over.wait(BEAT):
            meanwhile()


def run_with_heartbeat(action: Callable[[Heartbeat], T]) -> T:
    """Runs the action on every rank, for however long it takes; returns what it gave on this rank once it has ended on
    all. If it failed on any, every rank raises, as `run_on_all_ranks` does.
    """
    heartbeat, result, error = Heartbeat(), None, None
    try:
        result = action(heartbeat)
    except Exception as caught:
        error = caught
    except BaseException:  # it ends, and waits for nobody
        heartbeat.end_own_work(failed=True)
        raise
    heartbeat.end_own_work(failed=error is not None)
    heartbeat.wait()
    if heartbeat.lost:
        raise heartbeat.lost

    def outcome() -> None:
        if error is not None:
            raise error

    run_on_all_ranks(outcome)
    return cast(T, result)


def map_over_ranks(
    items: Sequence[T], work: Callable[[T], R], between: Callable[[], object] = lambda: None
) -> list[R]:  # fmt: skip
    """Divides the items among the processes, which call this together, and returns what `work` gives for each item.

    between: called before each item, and while the others are waited for. What it or `work` raises on one rank ends the
    work of all after the items at hand, and is raised on all.
    """
    done: list[R] = []

    def own_part(heartbeat: Heartbeat) -> None:
        for item in items[rank() :: world_size()]:
            between()
            if heartbeat.failed:
                return
            done.append(work(item))
        heartbeat.end_own_work()
        heartbeat.wait(between)

    run_with_heartbeat(own_part)
    parts = run_on_all_ranks(lambda: done)
    return [parts[i % world_size()][i // world_size()] for i in range(len(items))]
