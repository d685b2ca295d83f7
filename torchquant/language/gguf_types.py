"""Which block type of ggml holds a weight: with the codes of its grid where there is one, else encoded again.

https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h: `block_q4_0` and its kin have a float16 scale for 32
neighbours, `block_q4_1` a minimum, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchquant.errors import InputError, SchemeError
from torchquant.formats import k_quants
from torchquant.language.libraries import gguf
from torchquant.measure.verify import sqnr_db
from torchquant.ops.x86.rows import Grid

__all__ = ["TYPES", "Stored", "check_type", "stored_float", "stored_grid", "stored_values"]

_BLOCK = 32
_FLOATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file.

    Args:
        type: of ggml.
        data: bytes (rows, bytes of a row), or the floats themselves.
        elements: how many weights it is.
        encoded_db: SQNR to what the graph computes with, where it was encoded again; None: it has the graph's codes.
        is_rounded: scales or minima are no float16 numbers in the graph, and were rounded to such.
    """

    type: str
    data: np.ndarray[Any, Any]
    elements: int
    encoded_db: float | None = None
    is_rounded: bool = False


def check_type(name: str | None) -> None:
    """Raise SchemeError for a type that is not written here."""
    if name is not None and name not in TYPES:
        raise SchemeError(f"{name!r} is no type that is written; there are {', '.join(TYPES)}, or None for what fits")


def stored_grid(grid: Grid, values: Callable[[], Tensor], type: str | None) -> Stored:
    """A quantized matrix in `type`, or if that is None in the smallest type that holds its codes.

    Args:
        values: gives what it stands for, float32 (outputs, inputs).
    """
    for name in _HOLDING if type is None else (type,):
        held = _HOLDING[name](grid) if name in _HOLDING else None
        if held is not None:
            return held
    return stored_values(values(), type or _ENCODED[grid.bits])


def stored_values(values: Tensor, type: str) -> Stored:
    """A float matrix encoded in `type`, or in the next one whose blocks divide its columns."""
    name = type
    while values.shape[1] % _SIZES.get(name, 1):
        name = _FALLBACKS[name]
    if name == "F32":
        return stored_float(values.float())
    if not bool(values.isfinite().all()):
        raise InputError(f"a weight of {tuple(values.shape)} holds NaN or infinity")
    kind = gguf().GGMLQuantizationType[name]
    data = _ENCODERS[name](values.float())
    decoded = torch.from_numpy(gguf().dequantize(data, kind))
    return Stored(name, data, values.numel(), sqnr_db(values.float(), decoded))


def stored_float(values: Tensor) -> Stored:
    """What is not quantized: matrices in their own dtype, all else in float32."""
    name = _FLOATS.get(values.dtype, "F32") if values.ndim > 1 else "F32"
    values = values.detach().cpu().contiguous()
    if name == "BF16":
        return Stored(name, values.view(torch.int16).numpy().view(np.uint8), values.numel())
    return Stored(name, (values if name == "F16" else values.float()).numpy(), values.numel())


# types that hold codes -----------------------------------------------------------------------------------------------


def _halves(values: Tensor) -> tuple[Tensor, bool] | None:
    """float16 values, and whether they were rounded; None where float16 cannot hold them."""
    half = values.half()
    back = half.float()
    close = (back - values).abs() <= values.abs() * 2.0**-11
    return (half, not torch.equal(back, values)) if bool(close.all()) else None


def _by_block(grid: Grid) -> tuple[Tensor, Tensor] | None:
    """Scales and zero points (outputs, blocks of 32), or None where groups are no whole blocks."""
    group = grid.codes.shape[1] // grid.scale.shape[1]
    if group % _BLOCK:
        return None
    return tuple(part.repeat_interleave(group // _BLOCK, 1) for part in (grid.scale, grid.zero_point))  # type: ignore[return-value]


def _shifted(grid: Grid, low: int, high: int) -> tuple[Tensor, Tensor] | None:
    """Codes without zero points as (outputs, blocks, 32), and scales; None where they leave [low, high]."""
    blocks = _by_block(grid)
    if blocks is None:
        return None
    scale, zero_point = blocks
    codes = grid.codes.to(torch.int16).view(*scale.shape, _BLOCK) - zero_point[..., None].to(torch.int16)
    return (codes, scale) if bool(((codes >= low) & (codes <= high)).all()) else None


def _hold_q8_0(grid: Grid) -> Stored | None:
    fit = _shifted(grid, -128, 127)
    half = None if fit is None else _halves(fit[1])
    if fit is None or half is None:
        return None
    return _blocks(grid, "Q8_0", half[1], half[0][..., None], fit[0].to(torch.int8))


def _hold_q4_0(grid: Grid) -> Stored | None:
    fit = _shifted(grid, -8, 7)
    half = None if fit is None else _halves(fit[1])
    if fit is None or half is None:
        return None
    return _blocks(grid, "Q4_0", half[1], half[0][..., None], _nibbles(fit[0] + 8))


def _hold_q4_1(grid: Grid) -> Stored | None:
    blocks = _by_block(grid) if grid.bits <= 4 else None
    if blocks is None:
        return None
    scale, zero_point = blocks
    minimum = _halves(-scale * (zero_point - grid.low))
    half = _halves(scale)
    if half is None or minimum is None:
        return None
    codes = (grid.codes.to(torch.int16) - grid.low).view(*scale.shape, _BLOCK)
    return _blocks(grid, "Q4_1", half[1] or minimum[1], half[0][..., None], minimum[0][..., None], _nibbles(codes))


def _nibbles(codes: Tensor) -> Tensor:
    low, high = codes.to(torch.uint8).split(_BLOCK // 2, -1)
    return low | high << 4


def _blocks(grid: Grid, name: str, is_rounded: bool, *parts: Tensor) -> Stored:
    """The parts (outputs, blocks, ...) of each block one after the other."""
    data = torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1).flatten(1)
    return Stored(name, data.numpy(), grid.codes.numel(), is_rounded=is_rounded)


def _of_gguf(name: str) -> Callable[[Tensor], np.ndarray[Any, Any]]:
    return lambda values: gguf().quantize(values.contiguous().numpy(), gguf().GGMLQuantizationType[name])


def _ours(encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], np.ndarray[Any, Any]]:
    return lambda values: encode(values).numpy()


# those that hold the codes of a grid, the smaller first
_HOLDING: dict[str, Callable[[Grid], Stored | None]] = {"Q4_0": _hold_q4_0, "Q4_1": _hold_q4_1, "Q8_0": _hold_q8_0}
_ENCODERS: dict[str, Callable[[Tensor], np.ndarray[Any, Any]]] = {
    **{name: _of_gguf(name) for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
    "Q4_K": _ours(k_quants.encode_q4_k),
    "Q5_K": _ours(k_quants.encode_q5_k),
    "Q6_K": _ours(k_quants.encode_q6_k),
}
TYPES = tuple(_ENCODERS)
_SIZES = {name: k_quants.SUPER_BLOCK if name.endswith("_K") else _BLOCK for name in TYPES}
_ENCODED = {2: "Q4_K", 3: "Q4_K", 4: "Q4_K", 8: "Q8_0"}  # by the bits of codes that no type holds
# where the columns are no whole blocks; the first three as llama.cpp's quantizer
_FALLBACKS = {
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), "F32"),
}
