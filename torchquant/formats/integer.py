"""Grids of integers and of float8: encode and decode, in the arithmetic of the ops that a graph is converted to."""

from __future__ import annotations

import torch

from torchquant.errors import InputError
from torchquant.formats.groups import spread
from torchquant.types import Format, QParams

INT8 = Format("int8", torch.int8, -128, 127)
INT8_NARROW = Format("int8_narrow", torch.int8, -127, 127)
INT7_NARROW = Format("int7_narrow", torch.int8, -63, 63)
UINT8 = Format("uint8", torch.uint8, 0, 255)
UINT7 = Format("uint7", torch.uint8, 0, 127)
INT4 = Format("int4", torch.int8, -8, 7)
INT3 = Format("int3", torch.int8, -4, 3)
INT2 = Format("int2", torch.int8, -2, 1)
TERNARY = Format("ternary", torch.int8, -1, 1)
FLOAT8 = Format("float8_e4m3", torch.float8_e4m3fn, -448.0, 448.0)


def broadcast(values: torch.Tensor, axis: int | None, ndim: int) -> torch.Tensor:
    """Reshape per-channel `values` (channels,) so that they broadcast over a tensor of `ndim` dimensions."""
    if axis is None or values.ndim == 0:
        return values
    return values.reshape([-1 if d == axis else 1 for d in range(ndim)])


def encode(x: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """Round float `x` to the codes of `qparams` (which carries scale and, unless the codes are floats, zero point)."""
    scale, zero_point = _scale_and_zero_point(qparams, x.shape)
    codes = x * (1.0 / scale)  # as the quantize ops do: a quotient may round to the other side
    codes = codes if qparams.dtype.is_floating_point else torch.round(codes) + zero_point
    return codes.clamp(qparams.quant_min, qparams.quant_max).to(qparams.dtype)


def decode(codes: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """The float32 values that `codes` stand for."""
    scale, zero_point = _scale_and_zero_point(qparams, codes.shape)
    return (codes.to(torch.float32) - zero_point) * scale


def _scale_and_zero_point(qparams: QParams, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    def fitted(values: torch.Tensor) -> torch.Tensor:
        if qparams.group_size:
            return spread(values, shape, qparams.group_size)
        return broadcast(values, qparams.axis, len(shape))

    if qparams.scale is not None and qparams.dtype.is_floating_point:
        return fitted(qparams.scale), torch.zeros(())
    if qparams.scale is None or qparams.zero_point is None:
        raise InputError("these qparams carry no scale: the tensor is dynamic or was not calibrated")
    return fitted(qparams.scale), fitted(qparams.zero_point)
