"""Folders for work in progress: each belongs to a process while that lives, and goes with it.

A process that is killed cannot clean up. So a folder carries the lock of its owner, which the system gives up when the
owner ends, however it does, and whoever makes a folder beside it later deletes those that nobody owns any more. A lock
tells more than a process id in the name would: ids are used again, and mean nothing in another container.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # Windows: leftovers stay, as nothing tells who owns them
    fcntl = None  # type: ignore[assignment]

__all__ = ["SUFFIX", "OwnFolder", "claimed", "sweep"]

SUFFIX = ".torchquant-own"
_LONGEST = 100  # of a prefix, which is ASCII: names have 255 bytes


class OwnFolder:
    """A new folder of this process: deleted by `cleanup`, at the end of a `with`, or with this object.

    A process that was forked deletes nothing of its parent's.

    Args:
        prefix: of its name. parent: where; None: the system's folder for temporary files.

    Raises:
        OSError: the parent does not exist or cannot be written.
    """

    def __init__(self, prefix: str, parent: str | os.PathLike[str] | None = None) -> None:
        place = Path(tempfile.gettempdir() if parent is None else parent)
        sweep(place)
        self.path, lock = _made(prefix.encode("ascii", "ignore").decode()[:_LONGEST], place)
        self._finalizer = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def cleanup(self) -> None:
        """Delete it now."""
        self._finalizer()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cleanup()


def sweep(parent: Path) -> None:
    """Delete the folders in `parent` whose owners have ended; what cannot be read or deleted stays."""
    if fcntl is None:
        return
    with suppress(OSError):
        folders = [Path(entry.path) for entry in os.scandir(parent) if entry.name.endswith(SUFFIX)]
        for folder in folders:
            with suppress(OSError):
                lock = _locked(folder)
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock inside the block, which its holder's death gives up; False if somebody else holds it.

    True also where the file system knows no locks on folders.
    """
    try:
        lock = None if fcntl is None else _locked(folder)
    except BlockingIOError:
        yield False
        return
    except OSError:
        lock = None
    try:
        yield True
    finally:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a process that was forked meanwhile has it open, too
            os.close(lock)


def _made(prefix: str, parent: Path) -> tuple[Path, int | None]:
    """A new folder and its lock, None where the file system knows no locks on folders."""
    while True:
        folder = Path(tempfile.mkdtemp(SUFFIX, prefix, parent))
        if fcntl is None:
            return folder, None
        try:
            return folder, _locked(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process took it for a leftover before it was locked, and deletes it
        except OSError:
            return folder, None


def _locked(folder: Path) -> int:
    """A lock on a folder of this user, as an open file.

    Raises:
        BlockingIOError: another process holds it. FileNotFoundError: the folder is gone. OSError: it has no lock.
    """
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        opened, named = os.fstat(file), os.stat(folder)
        if (opened.st_ino, opened.st_dev) != (named.st_ino, named.st_dev):
            raise FileNotFoundError(folder)
        if opened.st_uid != os.geteuid():
            raise PermissionError(folder)
    except OSError:
        os.close(file)
        raise
    return file


def _remove(folder: Path, lock: int | None, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)
