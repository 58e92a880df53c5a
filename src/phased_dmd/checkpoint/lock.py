"""One writer at a time, or one after the other: locks that the kernel frees however their holder dies."""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from phased_dmd.engine.world import warn
from phased_dmd.errors import UserError

UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what file systems without locks answer
POLL = 0.1  # seconds


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive `flock` on the file, which names the holder; held by another process: UserError.

    A folder that was made for the lock, and holds nothing else in the end, is removed again.
    """
    folder = path.parent
    made = not folder.exists()
    try:
        descriptor = _take(path)
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            if os.listdir(folder) == [path.name]:
                path.unlink()
                if made:
                    folder.rmdir()
        os.close(descriptor)


@contextmanager
def awaited(path: Path, meanwhile: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Holds an exclusive `flock` on the file, which stays, once no other process does; OSError if it cannot be made.

    meanwhile: called again and again while another process holds it; what it raises ends the waiting.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        while not _free(descriptor):
            meanwhile()
            time.sleep(POLL)
        yield
    finally:
        os.close(descriptor)


def _free(descriptor: int) -> bool:
    """Whether no other process had the lock; it is this one's now. Where there are no locks, nobody has one."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    return True


def _take(path: Path) -> int:
    """The descriptor of the locked file."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise UserError(f"--output: {path.parent} is being written by process {holder}".rstrip()) from error
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(descriptor)
                raise
            warn(f"{path.parent} cannot be locked: run no second process on it")
        with suppress(FileNotFoundError):  # the former holder may have removed the file between our two calls
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                return descriptor
        os.close(descriptor)
