"""Libraries of C++ compiled at their first use: by which compiler, and where they are kept, whole or absent."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path

from filelock import FileLock

from torchquant.errors import LoweringError
from torchquant.files.owned import OwnFolder
from torchquant.files.whole import write_whole

__all__ = ["built", "cache_folder", "compiler", "is_whole", "own_folder", "run_compiler"]


def compiler() -> str:
    """The compiler that Inductor uses; imported when one is needed, for that takes a second."""
    try:
        return str(import_module("torch._inductor.cpp_builder").get_cpp_compiler())
    except Exception as error:
        raise LoweringError(
            "there is no C++ compiler, which lowering for x86 needs: install g++ (Debian and Ubuntu: apt-get install "
            f"g++; Fedora: dnf install gcc-c++), or set CXX ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def cache_folder() -> Path:
    """Where builds are kept: `$TORCHQUANT_CACHE`, or `torchquant` in the user's cache folder.

    Where that cannot be written, or the user has no home, a folder of this process, deleted at its end.
    """
    named, base = os.environ.get("TORCHQUANT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(named) if named else (Path(base) if base else Path.home() / ".cache") / "torchquant"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: a user without an entry in the list of users
        return own_folder()
    return folder if os.access(folder, os.W_OK) else own_folder()


def own_folder() -> Path:
    """A folder of this process alone, deleted at its end."""
    return _own_folder().path


@cache
def _own_folder() -> OwnFolder:
    return OwnFolder("torchquant-")


def built(library: Path, build: Callable[[Path], Path]) -> Path:
    """The library, built there if it is not or not whole: by one process, while others wait for it.

    Args:
        build: makes it in a folder that is deleted afterwards, and says where.
    """
    with FileLock(library.with_suffix(".lock")):
        if not is_whole(library):
            with OwnFolder("build-", library.parent) as place:
                made = build(place)
                digest = hashlib.sha256(made.read_bytes()).hexdigest()
                os.replace(made, library)
            write_whole(_digest_of(library), lambda part: part.write_text(digest))
    return library


def _digest_of(library: Path) -> Path:
    return library.with_suffix(".sha256")


def is_whole(library: Path) -> bool:
    """Whether a library is what was built: not cut off, not overwritten."""
    try:
        return hashlib.sha256(library.read_bytes()).hexdigest() == _digest_of(library).read_text().strip()
    except (OSError, ValueError):
        return False


def run_compiler(command: list[str]) -> None:
    """Run a compiler's command.

    Raises:
        LoweringError: it cannot be run, or ends with an error; with its own words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LoweringError(f"torchquant's kernels need a C++ compiler; {command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise LoweringError(f"torchquant's kernels do not compile with {command[0]}:\n{done.stderr[-3000:]}")
