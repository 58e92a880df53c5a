"""Work that processes do apart for long: nobody who lives is given up, and nobody waits for one who does not."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from phased_dmd.engine import world
from phased_dmd.engine.world import rank, together, world_size

T = TypeVar("T")
R = TypeVar("R")
BEAT = 0.2  # seconds between two signs of life


class Company:
    """What the processes know of each other while they work: threads of theirs agree, beat by beat, on who still does.

    A process that ends, or gives no sign for as long as `PATIENCE`, is lost, and the work has failed.
    """

    def __init__(self) -> None:
        self.over = threading.Event()  # nobody works any more
        self.failed = False  # anybody's work
        self.lost: Exception | None = None
        self._works, self._failed = True, False
        if world_size() == 1:
            self.over.set()
            return
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=world.PATIENCE))
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            works = True
            while works:
                found = torch.tensor([self._works, self._failed], dtype=torch.int32)
                dist.all_reduce(found, dist.ReduceOp.MAX, self._group)
                works, self.failed = map(bool, found.tolist())
                time.sleep(BEAT * works)
            dist.destroy_process_group(self._group)
        except Exception as error:  # whatever it is, this process hears no more of the others
            self.lost, self.failed = error, True
        self.over.set()

    def leave(self, failed: bool) -> None:
        """This process works no more."""
        self._works, self._failed = False, failed

    def wait(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Returns once nobody works any more."""
        while not self.over.wait(BEAT):
            meanwhile()


def patiently(action: Callable[[Company], T]) -> T:
    """What `action` gave on this rank, once it has ended on all, however long that took; if it failed on any, every
    rank raises, see `together`.
    """
    company, result, error = Company(), None, None
    try:
        result = action(company)
    except Exception as caught:
        error = caught
    except BaseException:  # it ends, and waits for nobody
        company.leave(failed=True)
        raise
    company.leave(failed=error is not None)
    company.wait()
    if company.lost:
        raise company.lost

    def outcome() -> None:
        if error is not None:
            raise error

    together(outcome)
    return cast(T, result)


def share_out(
    items: Sequence[T], work: Callable[[T], R], between: Callable[[], object] = lambda: None
) -> list[R]:  # fmt: skip
    """What `work` gives for each item, each done by one of the processes; all of them call this together.

    between: called before each item, and while the others are waited for. What it or `work` raises on one rank ends the
    work of all after the items at hand, and is raised on all.
    """
    done: list[R] = []

    def own_share(company: Company) -> None:
        for item in items[rank() :: world_size()]:
            between()
            if company.failed:
                return
            done.append(work(item))
        company.leave(failed=False)
        company.wait(between)

    patiently(own_share)
    shares = together(lambda: done)
    return [shares[i % world_size()][i // world_size()] for i in range(len(items))]
