"""Files are written whole or not at all, and whatever is wrong with one that is read is an `ArtifactError`."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from torchquant.errors import ArtifactError, TorchquantError, TorchquantWarning
from torchquant.files.owned import OwnFolder

__all__ = ["digest", "reading", "warn_ignored", "write_folder", "write_whole"]

_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,20}")  # by which torch tells what it is to write


def digest(*parts: bytes | memoryview) -> str:
    """BLAKE2b digest (32 bytes, in hex) of the parts, to detect damage; it does not prevent forgery."""
    hasher = hashlib.blake2b(digest_size=32)
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


@contextmanager
def reading(path: str | os.PathLike[str], what: str, advice: str = "save it again") -> Iterator[None]:
    """Read a file inside the block: any failure is an `ArtifactError` that names the file.

    A parser of damaged content may raise anything, so that no list of errors would be complete.

    Args:
        what: what the file should be, e.g. `a .npz file`.
        advice: what to do about it.
    """
    try:
        yield
    except TorchquantError:
        raise
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is not a file") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise ArtifactError(f"{path} is truncated, damaged or not {what} ({_short(error)}); {advice}") from error


@cache
def warn_ignored(path: str | os.PathLike[str], why: str) -> None:
    """Say once that what a file of measurements holds is not used."""
    text = f"{path} is damaged ({why}): what is wrong in it is not used; delete the file to have it measured again"
    warnings.warn(text, TorchquantWarning, stacklevel=3)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _refuse_odd_place(target: Path) -> None:
    """Raise ArtifactError where a file cannot come: over a folder, a device or a pipe, or under no name for torch."""
    try:
        is_text = b"\0" not in os.fspath(target).encode("utf-8")
    except UnicodeEncodeError:  # at which torch would end the process
        is_text = False
    if not is_text:
        raise ArtifactError(f"cannot write {str(target)!r}: its name is no UTF-8 text. Choose another name.")
    try:
        kind = os.stat(target).st_mode
    except OSError:  # there is nothing yet
        return
    if stat.S_ISDIR(kind):
        raise ArtifactError(f"cannot write {target}: it is a folder")
    if not stat.S_ISREG(kind):  # moving a file into its place would delete a device for all
        raise ArtifactError(f"cannot write {target}: it is a device or a pipe. Choose a file.")


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then move it into place.

    The temporary file has a short name of its own, with the suffix of `path`: where the name of `path` is as long as
    the system allows, a longer one could not be made of it.

    Raises:
        ArtifactError: the folder does not exist or cannot be written, or is full, or there is something else than a
            file in the place. Nothing is left behind; what a process left that was killed meanwhile goes at the next
            write into the same folder.
    """
    target = Path(path)
    _refuse_odd_place(target)
    with _own_folder(target) as folder:
        part = folder / f"part{target.suffix if _SUFFIX.fullmatch(target.suffix) else ''}"
        write(part)
        os.replace(part, target)
    return target


def write_folder(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Let `write` fill a new folder beside `path`, then move it into place.

    Raises:
        ArtifactError: as `write_whole`, or there is a file in the place, or a folder with something in it, which might
            be anybody's.
    """
    target = Path(path)
    if not target.is_dir():
        _refuse_odd_place(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ArtifactError(f"cannot write {target}: there is something in the place already. Choose another name.")
    with _own_folder(target) as folder:
        part = folder / "part"
        part.mkdir()
        write(part)
        os.replace(part, target)
    return target


@contextmanager
def _own_folder(target: Path) -> Iterator[Path]:
    """A folder beside a target for what is not ready yet; failures to write become errors that name the target."""
    try:
        with OwnFolder(f".{target.name}.", target.parent) as folder:
            yield folder
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}. Choose another folder.") from error
    except RuntimeError as error:  # what torch raises where a disk is full
        text = str(error).split("\n")[0][:300]
        raise ArtifactError(f"cannot write {target}: {text}. If the disk is full, choose another folder.") from error
