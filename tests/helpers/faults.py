"""Faults to test with: commands that are killed, processes that die at the n-th step on the disk, groups of processes,
folders that may not be written, and disks that are full.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

KILLED = 77  # exit status of a process that a test killed
STEPS = {"open": 0, "os.mkdir": 2, "os.rename": 2, "os.remove": 1, "os.rmdir": 1}  # audit events; where dir_fd stands


def start(action: Callable[[], Any], seconds: int = 60) -> int:
    """Forks a process that runs the action and ends with status 0, that of a SystemExit, or 1 after another exception;
    its number.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            signal.alarm(seconds)
            action()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return process


def end(process: int) -> int:
    """Waits for a process; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def forked(action: Callable[[], Any], seconds: int = 60) -> int:
    """The exit status of a forked process that runs the action."""
    return end(start(action, seconds))


def command(said: Path, *arguments: str) -> None:
    """In a forked process: the command line `phased-dmd ...` as in a process of its own; its stderr goes to a file."""
    from phased_dmd.cli import main

    for descriptor, path in ((1, os.devnull), (2, said)):
        with open(path, "w") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    warnings.resetwarnings()  # pytest's, and where it keeps them
    warnings.showwarning = lambda *about: sys.stderr.write(warnings.formatwarning(*about[:4])) and None
    sys.argv = ["phased-dmd", *arguments]
    main()


def slow_disk(seconds: float = 0.02) -> None:
    """In a forked process: syncing takes its time, so that a kill at a random moment falls into it."""
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(seconds)
        fsync(descriptor)

    os.fsync = slow


def obey_permissions() -> None:
    """In a forked process: it may not write what its permissions forbid, even if root runs it."""
    if os.geteuid() == 0:
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None)
        assert libc.capget(header, sets) == 0
        sets[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of those in effect
        assert libc.capset(header, sets) == 0


def path_of(event: str, args: tuple) -> str:
    """The path that an audit event is about to open, make, rename or remove; "" for any other event."""
    if event not in STEPS or isinstance(args[0], int):
        return ""
    parent = args[STEPS[event]] if STEPS[event] else -1
    return os.path.join(f"/proc/self/fd/{parent}" if parent >= 0 else ".", os.fsdecode(args[0]))


DUE: list[Callable[[Path], bool]] = []  # of the interruptions that wait; the one hook, which can never be removed


@cache
def _listen() -> None:
    def hook(event: str, args: tuple) -> None:
        if not DUE or threading.current_thread() is not threading.main_thread():
            return
        if (path := path_of(event, args)) and any(due(Path(path)) for due in tuple(DUE)):
            DUE.clear()
            raise KeyboardInterrupt

    sys.addaudithook(hook)


@contextmanager
def interrupted(due: Callable[[Path], bool]) -> Iterator[None]:
    """Around work that must be ended by a KeyboardInterrupt: just before it opens, makes, renames or removes a path
    of which `due` holds, for the first time.
    """
    _listen()
    DUE.append(due)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        DUE.clear()


def die_at(step: int, folder: Path, torn: bool = False) -> None:
    """In a forked process: it dies just before its `step`-th (from 0) opening, making, renaming, removing or syncing
    of anything under the folder. torn: the machine with it, and files keep half of the bytes not synced since.
    """
    count, root, fsync = 0, Path(os.path.realpath(folder)), os.fsync

    synced = {path.stat().st_ino: path.stat().st_size for path in root.rglob("*")}

    def reached(path: str) -> None:
        nonlocal count
        if not Path(os.path.realpath(path)).is_relative_to(root):
            return
        count += 1
        if count <= step:
            return
        for file in [file for file in root.rglob("*") if torn and file.is_file()]:
            size = file.stat().st_size
            os.truncate(file, (min(size, synced.get(file.stat().st_ino, 0)) + size) // 2)
        os._exit(KILLED)

    def hook(event: str, args: tuple) -> None:
        if count <= step and (path := path_of(event, args)):
            reached(path)

    def counted(descriptor: int) -> None:
        reached(f"/proc/self/fd/{descriptor}")
        synced[os.stat(descriptor).st_ino] = os.stat(descriptor).st_size
        fsync(descriptor)

    os.fsync = counted
    sys.addaudithook(hook)


def group(count: int, action: Callable[[int], Any]) -> list[int]:
    """The exit statuses of `count` forked processes of one gloo group that each run the action with their rank."""
    with tempfile.TemporaryDirectory() as folder:

        def member(rank: int) -> None:
            import torch.distributed as dist

            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
            dist.barrier()  # one that is done may not leave while another still connects
            action(rank)
            dist.destroy_process_group()

        processes = [start(lambda rank=rank: member(rank)) for rank in range(count)]
        return [end(process) for process in processes]


def launch(count: int, action: Callable[[], Any], seconds: int = 60) -> list[int]:
    """Forks processes in the environment that torchrun gives its own, to run the action; their numbers.

    They start at once, where torchrun's would import everything anew.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def member(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "forked",
        }  # fmt: skip
        action()

    return [start(partial(member, rank), seconds) for rank in range(count)]


@contextmanager
def small_disk(path: Path, kibibytes: int) -> Iterator[Callable[[], None]]:
    """Mounts a disk of that size at the path; yields what makes it read-only. Skips the test where nobody may mount."""
    path.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True) and None
    finally:
        subprocess.run(["umount", str(path)], check=True)
