"""How a tensor is quantized, as far as ONNX asks: in bytes, by the row, in so many bits."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from torchquant.errors import LoweringError
from torchquant.fx import ops
from torchquant.fx.reading import Quantized

__all__ = [
    "bits_of",
    "by_groups",
    "grid_of",
    "has_zero_point",
    "is_by_row",
    "is_needless",
    "is_plain",
    "limits_of",
    "no_operator",
    "readable_bits",
    "zeros_are_codes",
    "zeros_fit",
]


def no_operator(node: Node) -> LoweringError:
    return LoweringError(
        f"onnx_qdq: {ops.qdq_name(node)} {node.name} quantizes in a way that ONNX has no op for. Exclude it, "
        "or name that in allow_float=[...] to have it decoded."
    )


def grid_of(quantized: Quantized) -> tuple[Any, Any, Any]:
    q = quantized.qparams
    return q.dtype, q.quant_min, q.quant_max


def limits_of(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return info.min, info.max


def has_zero_point(quantized: Quantized | None) -> bool:
    zeros = None if quantized is None else quantized.qparams.zero_point
    return zeros is not None and bool(zeros.any())


def is_by_row(rows: Quantized) -> bool:
    choice = rows.choice
    bytes_wide = not rows.qparams.dtype.is_floating_point and rows.qparams.quant_max - rows.qparams.quant_min <= 255
    return choice is not None and not (choice.axis is None and not choice.symmetric) and bytes_wide


def is_plain(stored: Quantized, codes: torch.Tensor) -> bool:
    """Whether a weight is one byte a code, a scale an output or one for all, and no zero points."""
    q = stored.qparams
    zeros = q.zero_point is None or not bool(q.zero_point.any())
    return codes.dtype == torch.int8 and not bits_of(stored) and not q.group_size and not q.format and zeros


def bits_of(stored: Quantized) -> int:
    """4 or 2 where a code takes no more, else 0: codes stay bytes."""
    q = stored.qparams
    if q.dtype.is_floating_point or q.quant_min is None or q.quant_max is None:
        return 0
    for bits in (2, 4):
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if q.dtype == torch.int8 else (0, (1 << bits) - 1)
        if low <= q.quant_min and q.quant_max <= high:
            return bits
    return 0


def readable_bits(bits: int, shape: torch.Size) -> int:
    """In how many bits runtimes read the codes of a weight (inputs, outputs) right, of so many at least; 0: as bytes.

    ONNX Runtime 1.32 decodes 2 bits wrongly where the outputs are no multiple of 4, OpenVINO 2026.4 4 bits where the
    inputs are odd.
    """
    if bits == 2 and shape[-1] % 4:
        bits = 4
    return 0 if bits == 4 and len(shape) == 2 and shape[0] % 2 else bits


def zeros_are_codes(zeros: torch.Tensor, stored: Quantized) -> bool:
    """Whether the zero points are codes too."""
    bits = bits_of(stored)
    low = -(1 << bits - 1) if bits and stored.qparams.dtype == torch.int8 else 0
    return not bits or (low <= int(zeros.min()) and int(zeros.max()) < low + (1 << bits))


def zeros_fit(zeros: torch.Tensor, dtype: torch.dtype) -> bool:
    low, high = limits_of(dtype)
    return low <= int(zeros.min()) and int(zeros.max()) <= high


def is_needless(zeros: torch.Tensor, block: int) -> bool:
    """Of groups, zero points that are all 0 take room; of channels ONNX Runtime asks for them."""
    return bool(block) and not bool(zeros.any())


def by_groups(values: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return values.reshape(codes.shape[0], -1)
