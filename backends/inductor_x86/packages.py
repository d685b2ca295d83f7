"""What Inductor wrote, made small, with our kernels in it, and called with care."""

from __future__ import annotations

import lzma
import shutil
import statistics
import subprocess
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor

from torchquant.backends.inductor_x86.program import XZ, run_package
from torchquant.backends.inductor_x86.states import InPlace, returning_states
from torchquant.files import archive
from torchquant.files.owned import OwnFolder
from torchquant.ops.x86 import native

_XZ = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9}]
_ROUNDS = 15  # of calls to compare them by


def copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [t.clone() for t in tensors]


def pack(raw: Path, package: Path, *, with_kernels: bool) -> None:
    """What Inductor wrote, as it is kept, with our kernels if it calls them."""
    repack(raw, package)
    raw.unlink()
    if with_kernels:
        _add_kernels(package)


def race(packages: Sequence[Path], batch: Any) -> list[float]:
    """Median milliseconds of a call of each, called in turns."""
    args = copies(batch)  # a package may write into them
    runs = [run_package(p) for p in packages]
    times: list[list[float]] = [[] for _ in runs]
    with torch.no_grad():
        for _ in range(_ROUNDS + 1):
            for run, milliseconds in zip(runs, times, strict=True):
                start = time.perf_counter()
                run(*args)
                milliseconds.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(milliseconds[1:]) for milliseconds in times]


class OnCopies:
    """Calls a package on copies of its inputs and notes whether it wrote into them, but for the states that it may.

    Inductor lets `linear(x) + x` with a float result accumulate into x, even where x is the caller's.
    """

    def __init__(self, run: Callable[..., Any], in_place: InPlace = ()) -> None:
        self._run, self.overwrote = returning_states(run, in_place), False
        self._states = {position for position, _ in in_place}

    def __call__(self, *tensors: torch.Tensor) -> Any:
        copied = [t.contiguous().clone() for t in tensors]
        outputs = self._run(*copied)
        pairs = [p for i, p in enumerate(zip(tensors, copied, strict=True)) if i not in self._states]
        self.overwrote |= any(not _same(a, b) for a, b in pairs)
        return outputs


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | (a != a) & (b != b)).all())  # NaN is itself


def repack(raw: Path, package: Path) -> None:
    """The package without sources and debug symbols, compressed."""

    def keep(name: str, content: bytes) -> bytes | None:
        if name.endswith(".cpp"):
            return None
        return _stripped(content) if name.endswith(".so") else content

    archive.compress(raw, package, keep)


def _add_kernels(package: Path) -> None:
    """Put the library of our kernels into the package, so that it runs where there is no compiler."""
    library = native.library_file()
    with zipfile.ZipFile(package, "a", zipfile.ZIP_DEFLATED) as out:
        root = out.namelist()[0].partition("/")[0]
        # a third smaller than deflated, and torch, which reads deflated entries alone, does not look into it
        content = lzma.compress(library.read_bytes(), format=lzma.FORMAT_XZ, filters=_XZ)
        out.writestr(f"{root}/kernels/{library.name}{XZ}", content, zipfile.ZIP_STORED)


def _stripped(library: bytes) -> bytes:
    """A shared library without its debug information; as it is where binutils are missing."""
    strip = shutil.which("strip")
    if strip is None:
        return library
    with OwnFolder("torchquant-x86-") as folder:
        file = folder / "model.so"
        file.write_bytes(library)
        done = subprocess.run([strip, str(file)], capture_output=True, check=False)
        return file.read_bytes() if done.returncode == 0 else library
