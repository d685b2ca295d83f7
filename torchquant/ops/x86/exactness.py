"""Whether oneDNN's int8 products are exact on this CPU, and whether a package needs that (see `saturation.py`)."""

from __future__ import annotations

import json
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from torchquant.errors import ArtifactError

__all__ = ["NOTE", "check_package", "exact_dtypes"]

NOTE = "torchquant_exact_products.json"


@cache
def exact_dtypes() -> frozenset[torch.dtype]:
    """Which of uint8 and int8 activations oneDNN multiplies by int8 weights exactly in this process.

    Measured by one small product of the largest codes each, so that it holds for whatever oneDNN chose, by the CPU or
    by ONEDNN_MAX_CPU_ISA.
    """
    return frozenset(dtype for dtype in (torch.uint8, torch.int8) if _is_exact(dtype))


def _is_exact(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return True  # there is no kernel that could saturate
    rows, depth, columns, weight = 4, 64, 32, 127
    largest = torch.iinfo(dtype).max
    codes = torch.full((rows, depth), largest, dtype=dtype)
    packed = torch.ops.onednn.qlinear_prepack(torch.full((columns, depth), weight, dtype=torch.int8), [rows, depth])
    scales, zeros = torch.ones(columns), torch.zeros(columns, dtype=torch.int64)
    form: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
    products = torch.ops.onednn.qlinear_pointwise(codes, 1.0, 0, packed, scales, zeros, *form)
    return bool((products == float(depth * largest * weight)).all())


def check_package(package: Path) -> None:
    """Raise ArtifactError if a package has products that oneDNN would get wrong on this CPU."""
    with zipfile.ZipFile(package) as source:
        notes = [json.loads(source.read(n)) for n in source.namelist() if n.endswith(f"extra/{NOTE}")]
    exact = {str(dtype).removeprefix("torch.") for dtype in exact_dtypes()} if notes else set()
    wrong = [names for note in notes for dtype, names in note.items() if dtype not in exact]
    if wrong:
        raise ArtifactError(
            f"{package} was lowered on a CPU with VNNI, which this one lacks: oneDNN's int8 products saturate here, "
            f"and would give wrong results for {'; '.join(wrong)}. Lower the model on this CPU."
        )
