"""Holds locks that the kernel frees however their holder dies.

`filelock` is not used: it says nothing of who holds a lock, and its versions differ in what they do on a file system
without locks.
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from phased_dmd.engine.world import warn
from phased_dmd.errors import UserError

UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what file systems without locks answer
POLL = 0.1  # seconds


class Busy(UserError):
    """Means that another process holds a lock."""


@contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[None]:
    """Holds an exclusive `flock` on the file and writes the holder's number to it; Busy if another holds it.

    shared: hold it together with others who share it. A folder that was made for an exclusive lock, and holds nothing
    else in the end, is removed again.
    """
    folder, made = path.parent, not path.parent.exists()
    with ExitStack() as stack:
        try:
            while not _take(path, stack.enter_context(_opened(path)), shared):
                pass
        except OSError as error:
            raise UserError(f"--output: {folder} cannot be written: {error.strerror}") from error
        try:
            yield
        finally:
            with suppress(OSError):
                if not shared and os.listdir(folder) == [path.name]:
                    path.unlink()
                    if made:
                        folder.rmdir()


def is_held(path: Path) -> bool | None:
    """Says whether another process holds a lock on the file; None where this one cannot tell.

    It takes the lock for an instant if it is free: see `_take`, which asks twice.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        taken = _try_lock(descriptor)
    finally:
        os.close(descriptor)
    return None if taken is None else not taken


@contextmanager
def wait_for_lock(path: Path, meanwhile: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Waits until no other process holds an exclusive `flock` on the file, and holds it; OSError if it cannot be made.

    meanwhile: called again and again while another process holds it; what it raises ends the waiting.
    """
    with _opened(path) as descriptor:
        while _try_lock(descriptor) is False:
            meanwhile()
            time.sleep(POLL)
        yield


@contextmanager
def claimed(paths: Sequence[Path], most: int, is_there: Callable[[Path], bool]) -> Iterator[list[Path]]:
    """Claims files that are to be made, the first `most` that are not there and that no other process has claimed.

    Each claim is an exclusive `flock` on a file beside the path, which is removed in the end.
    """
    with ExitStack() as stack:
        found: list[Path] = []
        for path in paths:
            lock = path.with_name(f".{path.name}.lock")
            if len(found) == most:
                break
            descriptor = stack.enter_context(_opened(lock))
            if _try_lock(descriptor) is not False and _is_same(lock, descriptor):
                stack.callback(lock.unlink, missing_ok=True)
                if not is_there(path):
                    found.append(path)
        yield found


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Opens the file, made with its folder if need be and never through a symlink; yields its descriptor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, shared: bool = False) -> bool | None:
    """Takes the lock if it is free. Returns False if another process holds it, None where the disk has no locks."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return None
    return True


def _is_same(path: Path, descriptor: int) -> bool:
    """Says whether the path still leads to the file that was opened: its former holder may have removed it since."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _take(path: Path, descriptor: int, shared: bool) -> bool:
    """Locks the file for this process; returns False if its former holder removed it after it was opened here."""
    taken = _try_lock(descriptor, shared)
    if taken is False:  # by who looks whether it is held, perhaps
        time.sleep(POLL)
        taken = _try_lock(descriptor, shared)
    match taken:
        case False:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            who = f"process {holder}" if holder else "processes that share it"
            raise Busy(f"--output: {path.parent} is being written by {who}")
        case None:
            warn(f"{path.parent} cannot be locked: run no second process on it")
    if not _is_same(path, descriptor):
        return False
    os.ftruncate(descriptor, 0)
    if not shared:
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return True
