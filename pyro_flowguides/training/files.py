"""Files that are whole or not there, and the lock of a file that one process at a time may write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock.
    fcntl = None  # type: ignore[assignment]


def part_of(path: Path) -> Path:
    """The file beside a file in which its next content is written."""
    return path.with_name(f".{path.name}.part")


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes a file in one step: whatever happens meanwhile, there is the old file or the new one.

    Raises:
        OSError: if it cannot be written, with the message of the system; the old file is there then.
    """
    part = part_of(path)
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def check_writable(path: Path) -> None:
    """Tries to write beside a file, and removes what a process that was killed has left there.

    Raises:
        OSError: if nothing can be written there, or the path is a directory.
    """
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a directory")
    part = part_of(path)
    try:
        part.write_bytes(b"x")
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time: the lock file ``.name.lock`` beside a file, with the id of the process that holds it.

    The system releases the lock when the process ends, however it ends, so that a lock file that was left behind locks nothing.
    There is no lock where the system has none for this file (Windows, some network drives).

    Arguments:
        path: The file.

    Raises:
        BlockingIOError: if another process, or another part of this one, holds the lock.
        OSError: if the lock file cannot be written.
    """
    lock = path.with_name(f".{path.name}.lock")
    handle = _acquire(lock)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _acquire(lock: Path) -> int:
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle, lock)
            # Whoever held it may have removed the file since it was opened.
            if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, lock: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = lock.read_text(encoding="ascii", errors="replace") or "unknown"
        raise BlockingIOError(f"process {holder} is using it") from None
    except OSError:
        # A drive without locks.
        return
