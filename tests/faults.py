"""Faults to test with: processes that die at the n-th step on the disk, groups of processes, disks that are full."""

import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

KILLED = 77  # exit status of a process that a test killed
STEPS = {"open": 0, "os.mkdir": 2, "os.rename": 2, "os.remove": 1, "os.rmdir": 1}  # audit events; where dir_fd stands


def start(action: Callable[[], Any], seconds: int = 60) -> int:
    """Forks a process that runs the action and ends with status 0, or 1 after an exception; its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            signal.alarm(seconds)
            action()
            status = 0
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


def die_at(step: int, folder: Path, torn: bool = False) -> None:
    """In a forked process: it dies just before its `step`-th (from 0) opening, making, renaming, removing or syncing
    of anything under the folder. torn: the machine with it, and files not synced since keep half of their bytes.
    """
    count, root, fsync = 0, Path(os.path.realpath(folder)), os.fsync

    def state(path: Path | int) -> tuple[int, int]:
        found = os.stat(path)
        return found.st_ino, found.st_size

    synced = {state(path) for path in root.rglob("*")}

    def reached(path: str) -> None:
        nonlocal count
        if not Path(os.path.realpath(path)).is_relative_to(root):
            return
        count += 1
        if count <= step:
            return
        for file in [file for file in root.rglob("*") if torn and file.is_file() and state(file) not in synced]:
            os.truncate(file, file.stat().st_size // 2)
        os._exit(KILLED)

    def hook(event: str, args: tuple) -> None:
        if event in STEPS and not isinstance(args[0], int) and count <= step:
            parent = args[STEPS[event]] if STEPS[event] else -1
            reached(os.path.join(f"/proc/self/fd/{parent}" if parent >= 0 else ".", os.fsdecode(args[0])))

    def counted(descriptor: int) -> None:
        reached(f"/proc/self/fd/{descriptor}")
        synced.add(state(descriptor))
        fsync(descriptor)

    os.fsync = counted
    sys.addaudithook(hook)


def group(count: int, action: Callable[[int], Any]) -> list[int]:
    """The exit statuses of `count` forked processes of one gloo group that each run the action with their rank."""
    with tempfile.TemporaryDirectory() as folder:

        def member(rank: int) -> None:
            import torch.distributed as dist

            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
            action(rank)
            dist.destroy_process_group()

        processes = [start(lambda rank=rank: member(rank)) for rank in range(count)]
        return [end(process) for process in processes]


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
