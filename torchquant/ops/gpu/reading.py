"""What a linear or a convolution of a converted graph multiplies, whoever wrote the Quantizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.fx import Node

from torchquant.errors import LoweringError
from torchquant.formats.dialect import EPS
from torchquant.fx import ops
from torchquant.fx.reading import GraphReading, Quantized, source_of
from torchquant.fx.windows import Window, window_of
from torchquant.types import DTYPE_RANGE

__all__ = ["Input", "Layer", "Weight", "read_input", "read_layer"]

_CODES = {torch.int8: torch.int8, torch.uint8: torch.int8, torch.float8_e4m3fn: torch.float8_e4m3fn}
_WINDOW = (
    "a convolution that is no matrix product (kernel size 1, no padding) takes activations in 8 bits with one scale, "
    "and a weight of their dtype with a scale for each output channel and no zero points"
)
_PER_TOKEN = "choose_qparams_per_token_asymmetric"


@dataclass(frozen=True)
class Input:
    """An op's activations and their grid, integers shifted to signed ones.

    Args:
        source: the float values, before they are quantized.
        how: `float`: they are used as they are.
        dtype, low, high: of the codes.
        axis: of the vectors that have a dynamic scale each; None: one scale.
        symmetric: a dynamic scale comes without zero point; `eps` is the smallest one.
        scale, zero_point: static ones.
        output_dtype: of the values after they are dequantized.
    """

    source: Node
    how: Literal["float", "static", "dynamic"] = "float"
    dtype: torch.dtype | None = None
    low: float = 0
    high: float = 0
    axis: int | None = None
    symmetric: bool = True
    eps: float = EPS
    scale: float = 1.0
    zero_point: int = 0
    output_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Weight:
    """A weight's codes (out, in), signed integers or float8; scale and zero point (None: 0) float32 (out, groups).

    A convolution's `in` is its kernel's pixels, each with all channels.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    bits: int

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scale.shape[1]

    def per_channel(self) -> bool:
        """Whether a product of codes may be scaled afterwards."""
        return self.scale.shape[1] == 1 and self.zero_point is None


@dataclass(frozen=True)
class Layer:
    """One op to lower.

    Args:
        node: the linear or convolution.
        input, weight, bias: what it reads; the bias float, or None.
        scaled: multiplies codes by codes; otherwise floats by unpacked weights.
        window: where a convolution reads; None for a linear.
    """

    node: Node
    input: Input
    weight: Weight
    bias: torch.Tensor | None
    scaled: bool
    window: Window | None

    def kind(self) -> tuple[Any, ...]:
        """Layers of the same kind can be computed as one, side by side."""
        weight = self.weight
        weights = (weight.codes.dtype, weight.bits, weight.group_size, weight.zero_point is None)
        return (self.input, self.scaled, self.window, *(weights if not self.scaled else ()))


def read_layer(reading: GraphReading, node: Node) -> Layer:
    """What `node` multiplies.

    Raises:
        LoweringError: no kernel computes it; names the op, its module, and what to do.
    """
    try:
        return _read(reading, node)
    except _NoKernelError as problem:
        where = ops.module_path(node) or "root"
        raise LoweringError(
            f"{ops.op_name(node)} {node.name} ({where}) is annotated, but {problem}. Exclude it in the Quantizer, or "
            f"pass allow_float=['node:{node.name}'] to run it in float."
        ) from None


class _NoKernelError(Exception):
    """Why an op has no kernel."""


def _read(reading: GraphReading, node: Node) -> Layer:
    op = ops.op_name(node)
    if op not in ("linear", "conv1d", "conv2d"):
        raise _NoKernelError("only linears and convolutions in one or two dimensions have kernels that multiply codes")
    weight, window = _read_weight(reading, node, op)
    values = ops.argument(node, 0)
    assert values is not None
    read = read_input(reading, values)
    along = -1 if op == "linear" else 1
    rows = read.how != "dynamic" or read.axis is None or read.axis in (along, _rank(values) + along)
    scaled = rows and read.how != "float" and read.dtype == weight.codes.dtype and weight.per_channel()
    if window is not None and not window.one_pixel:
        if not scaled or read.axis is not None:
            raise _NoKernelError(_WINDOW)
    elif not scaled:
        _check_weight_only(weight)
        read = Input(values)
    bias = ops.argument(node, 2)
    if bias is not None and not ops.is_constant(bias):
        raise _NoKernelError("its bias is computed at run time")
    return Layer(node, read, weight, None if bias is None else ops.constant_value(reading.model, bias), scaled, window)


def _read_weight(reading: GraphReading, node: Node, op: str) -> tuple[Weight, Window | None]:
    values = ops.argument(node, 1)
    quantized = reading.tensor(values)
    if quantized is None or quantized.node is not values or quantized.codes is None or not ops.is_constant(values):
        raise _NoKernelError("its weight is not stored as codes with a dequantize op right behind them")
    grid, codes = quantized.qparams, ops.constant_value(reading.model, quantized.codes)
    window = None if op == "linear" else _read_window(node, codes)
    codes = codes.movedim(1, -1).flatten(1)
    if not quantized.integer_zero_point:
        raise _NoKernelError("its weight has zero points that are no integers")
    if codes.dtype not in _CODES or grid.scale is None:
        raise _NoKernelError(f"its weight is stored in {codes.dtype}; kernels take 4 and 8 bits")
    if grid.axis not in (None, 0):
        raise _NoKernelError(f"its weight has scales along axis {grid.axis}, and kernels scale output channels")
    if window is not None and not window.one_pixel and grid.group_size:
        raise _NoKernelError(_WINDOW)
    n, k = codes.shape
    if grid.group_size and k % grid.group_size:
        raise _NoKernelError(f"its {k} input features are no whole groups of {grid.group_size}")
    groups = k // grid.group_size if grid.group_size else 1
    scale = grid.scale.detach().float().reshape(-1, groups).expand(n, groups).contiguous()
    if codes.dtype.is_floating_point:
        return Weight(codes, scale, None, 8), window
    low, high = _limits(grid.dtype, grid.quant_min, grid.quant_max)
    offset = 0 if low < 0 else 8 if high <= 15 else 128
    zero_point = None
    if grid.zero_point is not None and bool((grid.zero_point != offset).any()):
        zero_point = (grid.zero_point.float() - offset).reshape(-1, groups).expand(n, groups).contiguous()
    elif grid.zero_point is None and offset:
        zero_point = torch.full_like(scale, -offset)
    if offset:
        codes = (codes.to(torch.int16) - offset).to(torch.int8)
    return Weight(codes, scale, zero_point, 4 if low - offset >= -8 and high - offset <= 7 else 8), window


def _read_window(node: Node, codes: torch.Tensor) -> Window:
    if ops.arguments(node).get("groups", 1) != 1:
        raise _NoKernelError("kernels take convolutions of one group")
    if (shape := ops.shape_of(node)) is not None and len(shape) != codes.dim():
        raise _NoKernelError("its input has no batch dimension; give it one of size 1")
    return window_of(node, codes.shape[2:])


def _check_weight_only(weight: Weight) -> None:
    if weight.codes.dtype.is_floating_point:
        raise _NoKernelError("its weight is float8 and its activation is not, which no kernel multiplies")
    size, k = weight.group_size, weight.codes.shape[1]
    if size != k and size % 32:
        raise _NoKernelError(f"its weight has groups of {size}, and kernels take multiples of 32")


def read_input(reading: GraphReading, values: Node) -> Input:
    """How `values` were quantized, as far as kernels take it; otherwise the floats as they are."""
    node, quantized = source_of(values), reading.tensor(values)
    activations = None if quantized is None else _input_of(quantized)
    if activations is None or (node is not values and activations.how != "static"):
        return Input(values)
    # values behind a reshape are quantized again by a kernel: only a static grid gives the same codes
    return activations if node is values else replace(activations, source=values)


def _input_of(quantized: Quantized) -> Input | None:
    grid, source = quantized.qparams, quantized.source
    if source is None or grid.dtype not in _CODES:
        return None
    low, high = _limits(grid.dtype, grid.quant_min, grid.quant_max)
    offset = 128 if grid.dtype == torch.uint8 else 0
    limits, wanted = (_CODES[grid.dtype], low - offset, high - offset), quantized.output_dtype or torch.float32
    if grid.dynamic:
        return _dynamic(quantized, source, limits, wanted)
    if grid.scale is None or grid.scale.numel() != 1 or grid.axis is not None or grid.group_size:
        return None
    zero_point = 0 if grid.zero_point is None else int(grid.zero_point) - offset
    return Input(source, "static", *limits, scale=float(grid.scale), zero_point=zero_point, output_dtype=wanted)


def _dynamic(
    quantized: Quantized, source: Node, limits: tuple[torch.dtype, float, float], wanted: torch.dtype
) -> Input | None:
    """From the op that chose the scale."""
    choice = quantized.choice
    if choice is None or choice.source is not source:
        return None
    if ops.qdq_name(choice.node) == _PER_TOKEN and limits[1:] != (-128, 127):  # the only grid that this op has
        return None
    eps = max(choice.eps or EPS, EPS)
    return Input(source, "dynamic", *limits, choice.axis, choice.symmetric, eps, output_dtype=wanted)


def _limits(dtype: torch.dtype, low: float | None, high: float | None) -> tuple[float, float]:
    if dtype.is_floating_point:
        top = torch.finfo(dtype).max
        return -top if low is None else low, top if high is None else high
    least, most = DTYPE_RANGE.get(dtype) or (0, 2 ** int(str(dtype).removeprefix("torch.uint")) - 1)  # uint1 to uint7
    return least if low is None else low, most if high is None else high


def _rank(node: Node) -> int:
    while ops.shape_of(node) is None and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return len(ops.shape_of(node) or ())
