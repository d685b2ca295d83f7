"""Which linears and lookups of a converted graph multiply weights of few bits, and what the kernel reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from torchquant.fx import ops
from torchquant.fx.reading import GraphReading, Quantized
from torchquant.ops.x86 import matching
from torchquant.ops.x86.rows import Grid
from torchquant.types import DTYPE_RANGE

__all__ = ["LEAST_SCALE", "Product", "grid_of", "read"]

LEAST_SCALE = 2.0**-126  # of activations in 16 bits, where a block is all zeros


@dataclass(frozen=True)
class Product:
    """A linear, or a lookup in a table.

    Args:
        node: the op.
        values: what it reads at run time: float32 rows, or indices.
        grid: the weight's codes.
        bias: float32, or None.
        bits: of the activations inside the kernel: 16 where they are floats; 8 where the graph has them in 8 bits with
            one scale a row and no zero point; 0 for a lookup.
        least_scale: of the activations.
    """

    node: Node
    values: Node
    grid: Grid
    bias: torch.Tensor | None
    bits: int
    least_scale: float = LEAST_SCALE

    @property
    def name(self) -> str:
        """As kernels are counted: `linear_w4a16`, `lookup_w8`."""
        return f"linear_w{self.grid.bits}a{self.bits}" if self.bits else f"lookup_w{self.grid.bits}"


def read(reading: GraphReading, node: Node) -> Product | str | None:
    """What an op with a weight of few bits multiplies; why no kernel does; None for every other op.

    A linear of codes by codes that the int8 kernels run is none of them.
    """
    op = ops.op_name(node)
    if op == "embedding":
        return _lookup(reading, node)
    if op != "linear":
        return None
    values, weight = ops.argument(node, 0), ops.argument(node, 1)
    quantized = reading.tensor(weight)
    if values is None or quantized is None or quantized.codes is None:
        return None
    activations = reading.op(values)
    if activations is not None and matching.byte_grid(activations) and matching.weight_of(reading, weight) is not None:
        return None
    grid = grid_of(reading, weight, quantized)
    if isinstance(grid, str):
        return grid
    bias = ops.argument(node, 2)
    if bias is not None and not ops.is_constant(bias):
        return "its bias is computed at run time"
    constant = None if bias is None else ops.constant_value(reading.model, bias)
    if activations is not None and (least := _least_scale(activations, values)) is not None:
        assert activations.source is not None
        return Product(node, activations.source, grid, constant, 8, least)
    return Product(node, values, grid, constant, 16)


def _lookup(reading: GraphReading, node: Node) -> Product | str | None:
    table, indices = ops.argument(node, 0), ops.argument(node, 1)
    quantized = reading.tensor(table)
    if quantized is None or quantized.codes is None or indices is None:
        return None
    if ops.overload_of(node) != "embedding.default":
        return "there is no kernel for bags of lookups in a table of few bits"
    grid = grid_of(reading, table, quantized)
    return grid if isinstance(grid, str) else Product(node, indices, grid, None, 0)


def grid_of(reading: GraphReading, weight: Node | None, quantized: Quantized) -> Grid | str:
    """The codes behind a weight `(outputs, inputs)`, and what they stand for; why there is no grid of the kernels."""
    assert quantized.codes is not None
    qparams = quantized.qparams
    if quantized.node is not weight or not ops.is_constant(weight):
        return "its weight is not stored as codes with a dequantize op right behind them"
    codes, scale = ops.constant_value(reading.model, quantized.codes), qparams.scale
    if qparams.format or codes.dtype.is_floating_point or scale is None or codes.dim() != 2:
        return f"its weight is stored in {qparams.format or codes.dtype}, and the kernels take integers of 2 to 8 bits"
    if qparams.axis not in (None, 0):
        return f"its weight has scales along axis {qparams.axis}, and the kernels take one for each output or group"
    if not quantized.integer_zero_point:
        return "its weight has zero points that are no integers"
    if 0 in codes.shape:
        return "its weight is empty"
    n, k = codes.shape
    if qparams.group_size and k % qparams.group_size:
        return f"its {k} inputs are no whole groups of {qparams.group_size}"
    groups = k // qparams.group_size if qparams.group_size else 1
    least, most = DTYPE_RANGE.get(qparams.dtype, (-128, 127))
    low = least if qparams.quant_min is None else int(qparams.quant_min)
    high = most if qparams.quant_max is None else int(qparams.quant_max)
    if not 0 < high - low < 256:
        return f"its codes go from {low} to {high}, and the kernels take at most 8 bits"
    scale = scale.detach().float().reshape(-1, groups).expand(n, groups)
    point = torch.zeros((), dtype=torch.int64) if qparams.zero_point is None else qparams.zero_point.detach()
    point = point.to(torch.int64).reshape(-1, groups if point.numel() > 1 else 1).expand(n, groups)
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        return "its scales are not all positive numbers"
    if bool((point < low).any()) or bool((point - low > 255).any()):
        return "its zero points lie outside the range of its codes"
    bits = next(b for b in (2, 3, 4, 8) if high - low < 2**b)
    return Grid(codes, scale, point, bits, low)


def _least_scale(activations: Quantized, values: Node) -> float | None:
    """The least scale of activations that the kernel makes codes of itself: one scale a row, from -127 to 127."""
    choice, qparams = activations.choice, activations.qparams
    if choice is None or activations.source is not choice.source or not choice.symmetric or choice.eps is None:
        return None
    rank = len(ops.shape_of(activations.source) or ())
    if choice.axis not in (-1, rank - 1) or (qparams.quant_min, qparams.quant_max) != (-127, 127):
        return None
    if qparams.dtype != torch.int8 or activations.output_dtype not in (None, torch.float32):
        return None
    return choice.eps
