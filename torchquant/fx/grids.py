"""Grids: what an observer of a prepared graph will quantize its tensor to, as `convert_pt2e` would emit it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.ao.quantization.fx._decomposed  # registers the quantize and choose_qparams ops
from torch.fx import Graph, GraphModule, Node
from torchao.quantization.pt2e.observer import AffineQuantizedObserverBase

from torchquant.errors import SchemeError
from torchquant.formats.groups import storable
from torchquant.types import DTYPE_RANGE

__all__ = ["Grid", "fake_quantizer", "grid_of", "per_tensor"]

Dialect = Literal["tensor", "channel", "block"]
Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Grid:
    """An affine integer grid over a tensor, cut into blocks ("cells") that share a scale and a zero point.

    Args:
        dtype, quant_min, quant_max: the codes.
        block: size of a cell along each axis of the tensor.
        scale, zero_point: (cells,) float32 and int32, cells in row-major order.
        dialect: which dequantize op convert emits: per tensor, per channel, or per block.
        axis: the channel axis of the `channel` dialect.
        symmetric: the zero point is the same whatever the range.
        stored_as: dtype of which all scales are numbers, because the target stores them in it; None: any.
    """

    dtype: torch.dtype
    quant_min: int
    quant_max: int
    block: tuple[int, ...]
    scale: torch.Tensor
    zero_point: torch.Tensor
    dialect: Dialect
    axis: int | None = None
    symmetric: bool = True
    stored_as: torch.dtype | None = None

    def cells(self, shape: torch.Size) -> torch.Tensor:
        """Which cell each element of a tensor of `shape` belongs to: int64, broadcastable to `shape`."""
        if self.scale.numel() == 1:
            return torch.zeros((), dtype=torch.int64)
        counts = [math.ceil(n / b) for n, b in zip(shape, self.block, strict=True)]
        index = torch.arange(math.prod(counts)).reshape(counts)
        for axis, (count, block) in enumerate(zip(counts, self.block, strict=True)):
            if count > 1 and block > 1:
                index = index.repeat_interleave(block, axis)
        return index

    def expand(self, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, broadcastable to a tensor of `shape`."""
        cells = self.cells(shape)
        return self.scale.reshape(-1)[cells], self.zero_point.reshape(-1)[cells]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest codes, as float32."""
        scale, zero_point = self.expand(x.shape)
        # times the inverse, as the quantize ops do: a quotient may round to the other side
        return (torch.round(x * (1.0 / scale)) + zero_point).clamp(self.quant_min, self.quant_max)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The float32 values of codes of any dtype."""
        scale, zero_point = self.expand(codes.shape)
        return (codes.float() - zero_point) * scale

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """`x` rounded to the grid, in its own dtype; computed in float32."""
        return self.decode(self.encode(x.float())).to(x.dtype)

    def with_scale(self, scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> Grid:
        """The same grid with another scale (cells,), as it is stored."""
        scale = scale if self.stored_as is None else storable(scale, self.stored_as)
        return replace(self, scale=scale, zero_point=self.zero_point if zero_point is None else zero_point)


def grid_of(observer: Any, shape: torch.Size) -> Grid | None:
    """The static affine integer grid of a calibrated observer over a tensor of `shape`.

    None where there is no such grid: dynamic, float, no quantization at all, or codes of the observer's own.

    Raises:
        SchemeError: a static integer grid of a kind that torchquant does not know.
    """
    own: Any = getattr(observer, "grid", None)
    if isinstance(own, Grid):
        return own
    if isinstance(observer, AffineQuantizedObserverBase):
        return _affine_grid(observer)
    dtype = getattr(observer, "dtype", None)
    if getattr(observer, "is_dynamic", False) or dtype not in DTYPE_RANGE or callable(getattr(observer, "convert", 0)):
        return None
    if getattr(observer, "quant_min", None) is None or not hasattr(observer, "qscheme"):
        return None
    scale, zero_point = observer.calculate_qparams()
    scheme, axis, block = observer.qscheme, None, list(shape)
    if scheme in (torch.per_channel_affine, torch.per_channel_symmetric):
        axis = int(observer.ch_axis) % len(shape)
        block[axis] = 1
    return Grid(
        dtype,
        int(observer.quant_min),
        int(observer.quant_max),
        tuple(block),
        _vector(scale).float(),
        _vector(zero_point).int(),
        "tensor" if axis is None else "channel",
        axis,
        symmetric=scheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric),
    )


def _affine_grid(observer: Any) -> Grid | None:
    if getattr(observer, "is_dynamic", False) or observer.target_dtype not in DTYPE_RANGE:
        return None
    if getattr(observer.zero_point_domain, "name", "INT") != "INT":
        raise SchemeError(f"{type(observer).__name__} has zero points that are no integers, which no solver here knows")
    scale, zero_point = observer.calculate_qparams()
    low, high = DTYPE_RANGE[observer.target_dtype]
    return Grid(
        observer.target_dtype,
        low if observer.quant_min is None else int(observer.quant_min),
        high if observer.quant_max is None else int(observer.quant_max),
        tuple(observer.block_size),
        _vector(scale).float(),
        _vector(torch.zeros_like(scale) if zero_point is None else zero_point).int(),
        "block",
        symmetric=observer.mapping_type.name != "ASYMMETRIC",
        stored_as=getattr(observer, "stored_as", None),
    )


def _vector(value: Any) -> torch.Tensor:
    return torch.as_tensor(value).detach().reshape(-1)


# fake quantization ------------------------------------------------------------------------------------------------


def fake_quantizer(observer: Any, shape: torch.Size) -> Function:
    """What convert's quantize and dequantize ops in the place of this observer do to a tensor.

    Static, dynamic, fixed, derived and grouped specs alike; an observer that emits its own ops is asked for them.
    """
    if callable(getattr(observer, "convert", None)) and not isinstance(getattr(observer, "grid", None), Grid):
        return _own_ops(observer)
    if getattr(observer, "is_dynamic", False):
        return _dynamic(observer)
    if getattr(observer, "dtype", None) is torch.float16:
        return lambda x: x.half().float()
    grid = grid_of(observer, shape)
    if grid is None:
        return lambda x: x
    if grid.scale.numel() == 1 and grid.dialect == "tensor":
        return per_tensor(grid)
    return grid.nearest


def per_tensor(grid: Grid) -> Function:
    """Rounding to a grid of one cell, in one pass over the tensor."""
    scale, zero_point = float(grid.scale), int(grid.zero_point)
    if not grid.quant_min <= zero_point <= grid.quant_max:
        return grid.nearest
    low, high = grid.quant_min, grid.quant_max
    return lambda x: torch.fake_quantize_per_tensor_affine(x.float(), scale, zero_point, low, high).to(x.dtype)


def _dynamic(observer: Any) -> Function:
    symmetric = getattr(observer, "qscheme", None) is torch.per_tensor_symmetric
    decomposed = torch.ops.quantized_decomposed
    choose = decomposed.choose_qparams_symmetric.tensor if symmetric else decomposed.choose_qparams.tensor
    low, high, dtype = observer.quant_min, observer.quant_max, observer.dtype
    eps = float(getattr(observer, "eps", torch.finfo(torch.float32).eps))

    def quantize(x: torch.Tensor) -> torch.Tensor:
        scale, zero_point = choose(x, low, high, eps, dtype)
        return (
            ((torch.round(x.float() * (1.0 / scale)) + zero_point).clamp(low, high) - zero_point).mul(scale).to(x.dtype)
        )

    return quantize


def _own_ops(observer: Any) -> Function:
    graph = Graph()
    x = graph.placeholder("x")
    node: Node = graph.call_module("observer", (x,))
    graph.output(node)
    model = GraphModule(torch.nn.ModuleDict({"observer": observer}), graph)
    observer.convert(model, node)
    model.recompile()
    run: Function = model
    return run
