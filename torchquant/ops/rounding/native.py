"""The library of `rounding.cpp`: built once for this machine, by the compiler that Inductor uses.

It speeds up what PyTorch can do as well; so where there is no compiler, there is no library, and no error.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from torchquant.errors import LoweringError
from torchquant.ops.builds import built, cache_folder, compiler, own_folder, run_compiler

__all__ = ["MOST_COLUMNS", "descend", "is_built", "propagate"]

MOST_COLUMNS = 128  # of a block

_SOURCE = Path(__file__).parent / "rounding.cpp"
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-w")


def is_built() -> bool:
    """Whether there is a library; the first call builds it."""
    return _library() is not None


def descend(
    codes: torch.Tensor,
    slope: torch.Tensor,
    scale: torch.Tensor,
    inverse: torch.Tensor,
    metric: torch.Tensor,
    limits: tuple[int, int],
) -> torch.Tensor:
    """Let the codes of a block's columns move in turn, each to its best value; returns by how much values (k, o) did.

    Args:
        codes: (k, o), changed. slope, scale, inverse: (k, o); inverse: what a slope is worth in codes.
        metric: (k, k), whose rows may lie apart. limits: of the codes. All float32.
    """
    moved = torch.empty_like(slope)
    matrices = (codes, slope, scale, inverse, moved)
    _check(matrices, metric)
    pointers = [t.data_ptr() for t in (codes, slope, scale, inverse, metric, moved)]
    _loaded().tq_descend(*pointers, *codes.shape, metric.stride(0), *map(float, limits))
    return moved


def propagate(
    target: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    upper: torch.Tensor,
    limits: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a block's columns in turn, each error carried on to those behind it: codes and errors, (k, o) each.

    Args:
        target, scale, zero_point: (k, o). upper: (k, k), whose rows may lie apart: the factor of the inverse moments.
        limits: of the codes. All float32.
    """
    codes, errors = torch.empty_like(target), torch.empty_like(target)
    if not is_built():
        left = target.clone()
        for j in range(len(target)):
            codes[j] = torch.round(left[j] / scale[j]).add_(zero_point[j]).clamp_(*limits)
            errors[j] = (left[j] - (codes[j] - zero_point[j]) * scale[j]) / upper[j, j]
            left[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
        return codes, errors
    matrices = (target, scale, zero_point, codes, errors)
    _check(matrices, upper)
    pointers = [t.data_ptr() for t in (target, scale, zero_point, upper, codes, errors)]
    _loaded().tq_propagate(*pointers, *target.shape, upper.stride(0), *map(float, limits))
    return codes, errors


def _check(matrices: Sequence[torch.Tensor], square: torch.Tensor) -> None:
    rows = len(matrices[0])
    assert rows <= MOST_COLUMNS
    assert square.shape == (rows, rows)
    assert square.stride(1) == 1
    assert all(m.is_contiguous() and m.shape == matrices[0].shape for m in matrices)
    assert {t.dtype for t in (*matrices, square)} == {torch.float32}


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "ask is_built() first"
    return library


@cache
def _library() -> ctypes.CDLL | None:
    for folder in (cache_folder, own_folder):  # the second where nothing may be run from the first
        try:
            library = ctypes.CDLL(str(built(folder() / _name(), _build)))
        except (LoweringError, OSError):
            continue
        pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        library.tq_descend.argtypes = library.tq_propagate.argtypes = [*[pointer] * 6, *[integer] * 3, *[real] * 2]
        library.tq_descend.restype, library.tq_propagate.restype = integer, None
        return library
    return None


def _name() -> str:
    """Of the library: by its source, and by the machine, for it is built for that alone."""
    flags = next((line for line in _cpu_lines() if line.startswith(("flags", "Features"))), platform.processor())
    content = _SOURCE.read_bytes() + repr((_FLAGS, platform.machine(), flags)).encode()
    return f"torchquant-rounding-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def _build(folder: Path) -> Path:
    library = folder / "rounding.so"
    run_compiler([compiler(), *_FLAGS, str(_SOURCE), "-o", str(library)])
    return library
