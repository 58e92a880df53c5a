"""Long work of several processes: shared out, waited for, and given up on all once it fails, stops or dies on one."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from faults import KILLED, end, group, launch
from torch.distributed import TCPStore

from phased_dmd.engine import world
from phased_dmd.engine.collectives import map_over_ranks, run_with_heartbeat
from phased_dmd.engine.signals import Signals
from phased_dmd.engine.world import GONE, processes, warn
from phased_dmd.errors import Stopped, UserError


@pytest.fixture
def impatient() -> Iterator[None]:
    """No process is given up while it lives, however short the patience is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "PATIENCE", timedelta(seconds=1.5))  # half an hour that no run may set
        yield


def test_each_process_does_a_share_and_all_have_all_results_in_order(tmp_path: Path) -> None:
    def action(rank: int) -> None:
        done: list[int] = []
        assert map_over_ranks(range(7), lambda i: done.append(i) or i * i) == [i * i for i in range(7)]
        assert done == list(range(rank, 7, 3))
        assert map_over_ranks([], str) == []

    assert group(3, action) == [0, 0, 0]
    assert map_over_ranks(range(3), str) == ["0", "1", "2"]  # without a group


def test_one_that_works_longer_than_the_patience_is_waited_for(impatient: None) -> None:
    def action(rank: int) -> None:
        started = time.monotonic()
        map_over_ranks(range(2), lambda i: time.sleep(2.5 * i))
        assert time.monotonic() - started > 2.5
        assert run_with_heartbeat(lambda _: rank) == rank

    assert group(2, action) == [0, 0]


def slow(rank: int, on_first_item: Callable[[], object]) -> Callable[[int], None]:
    """Work of three seconds in all, of small items, unless it is ended before; the second process begins otherwise."""

    def work(item: int) -> None:
        time.sleep(0.05)
        if item == 1:
            on_first_item()

    return work


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "error", [UserError("one line"), OSError(28, "No space left on device"), ZeroDivisionError("x")]
)
def test_what_fails_on_one_process_ends_the_work_of_all(error: Exception) -> None:
    kind = (ZeroDivisionError, RuntimeError) if isinstance(error, ZeroDivisionError) else type(error)

    def action(rank: int) -> None:
        started = time.monotonic()
        with pytest.raises(kind, match=str(error.args[-1])):
            map_over_ranks(range(1000), slow(rank, lambda: fail(error)))
        assert time.monotonic() - started < 15, "50 seconds of work were left"
        assert map_over_ranks(range(2), int) == [0, 1]  # they are together again

    assert group(2, action) == [0, 0]


@pytest.mark.parametrize("items", [1000, 1])
def test_a_signal_for_one_process_stops_all_at_work_or_waiting(items: int) -> None:
    """items: of the first process's share; the second has got as many, or none and waits."""

    def action(rank: int) -> None:
        started = time.monotonic()

        def between() -> None:
            if rank == 1 and time.monotonic() - started > 0.5 and not signals.noted:
                os.kill(os.getpid(), signal.SIGTERM)
            if signals.noted:
                raise Stopped(signals.noted, "stopped here")

        with Signals() as signals, pytest.raises(Stopped, match="stopped here") as stopped:
            map_over_ranks(range(items), lambda i: time.sleep(0.05 if items > 1 else 2), between)
        assert stopped.value.number == signal.SIGTERM and time.monotonic() - started < 15

    assert group(2, action) == [0, 0]


def test_a_process_that_dies_at_work_is_noticed_at_once() -> None:
    def action(rank: int) -> None:
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="|".join(GONE)):
            map_over_ranks(range(1000), slow(rank, lambda: os._exit(KILLED)))
        assert time.monotonic() - started < 15
        os._exit(0)  # there is no group to leave

    assert group(2, action) == [0, KILLED]


def test_a_process_that_gives_no_sign_of_life_is_given_up_after_a_while(impatient: None, tmp_path: Path) -> None:
    """As if its machine had lost its power: no connection is closed."""

    def stop() -> None:
        (tmp_path / "process").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    def action(rank: int) -> None:
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="|".join(GONE)):
            map_over_ranks(range(1000), slow(rank, stop))
        assert 1 < time.monotonic() - started < 15
        os.kill(int((tmp_path / "process").read_text()), signal.SIGKILL)
        os._exit(0)

    assert group(2, action) == [0, -signal.SIGKILL]


def test_a_process_that_is_interrupted_leaves_at_once_and_the_others_follow() -> None:
    """By what is no error, such as a second Ctrl-C: it waits for nobody."""

    def action(rank: int) -> None:
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt if rank == 1 else RuntimeError):
            map_over_ranks(range(1000), slow(rank, lambda: fail(KeyboardInterrupt())))
        assert time.monotonic() - started < (2 if rank == 1 else 15)
        if rank == 0:
            os._exit(0)

    assert group(2, action) == [0, 0]


def test_of_a_group_one_process_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    def action(rank: int) -> None:
        with pytest.warns(UserWarning) as warned:
            warn("one line")
            world.warnings.warn("another", stacklevel=1)
        assert [str(one.message) for one in warned] == (["one line"] if rank == 0 else []) + ["another"]

    assert group(2, action) == [0, 0]
    monkeypatch.setenv("RANK", "1")  # of those that torchrun started, before they are a group
    with pytest.warns(UserWarning) as warned:
        warn("one line")
        world.warnings.warn("another", stacklevel=1)
    assert len(warned) == 1


def test_a_group_can_follow_another_in_one_start_however_late_a_process_comes() -> None:
    """As where a script of torchrun's calls `distill` twice: its store still has the addresses of the first group."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def action() -> None:
        os.environ |= {
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        for number in range(2):
            time.sleep(3 * number * (os.environ["RANK"] == "1"))
            with processes():
                assert map_over_ranks(range(4), str) == ["0", "1", "2", "3"]

    assert [end(process) for process in launch(2, action, seconds=30)] == [0, 0]
