"""What the x86 kernels know of a node of a converted graph: grids, weights, windows, activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.fx import ops
from torchquant.fx.reading import Choice, GraphReading, Quantized
from torchquant.ops.x86 import transposed
from torchquant.ops.x86.plan import Dynamic, Quantization

ACCUMULATOR = 2**31 - 1
ALIASES = ("dropout.default", "clone.default", "contiguous.default", "alias.default", "detach.default")
RESHAPES = (
    *("flatten.using_ints", "view.default", "reshape.default"),
    *("squeeze.dims", "squeeze.dim", "unsqueeze.default"),
)
ACTIVATIONS = {
    "relu": "clamp",
    "hardtanh": "clamp",
    "gelu": "gelu",
    "silu": "silu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "hardswish": "hardswish",
    "hardsigmoid": "hardsigmoid",
}


IMAGE, ROWS, PIXELS = "image", "rows", "pixels"  # (n, c, h, w); (..., c); the rows (n, h, w, c) of a turned image
TURN = "permute.default"
_TURNED = {IMAGE: ((0, 2, 3, 1), PIXELS), PIXELS: ((0, 3, 1, 2), IMAGE)}
CONVOLUTIONS = ("conv1d", "conv2d")
_CHOOSING = ("choose_qparams", "choose_qparams_symmetric")
PRODUCTS = (*CONVOLUTIONS, *transposed.NAMES, "linear")
_MOST_TAPS = 512  # of a depthwise window, in groups of four: as many as kernels.cpp has room for


def shape_of(node: Any) -> tuple[int | str, ...]:
    """Sizes of a node's value; one that is not known before run time by its expression."""
    return tuple(s if isinstance(s, int) else str(s) for s in ops.shape_of(node) or ())


def tensors_of(node: Node) -> list[Node]:
    """The nodes whose values an op reads; a reshape also has nodes for sizes among its arguments."""
    return node.all_input_nodes[:1] if ops.overload_of(node) in RESHAPES else node.all_input_nodes


def turned(node: Node, layout: str | None) -> str | None:
    """The layout of a `permute` of an image or its pixels, which moves nothing where channels come last; else None."""
    if ops.overload_of(node) != TURN or layout not in _TURNED:
        return None
    order, new_layout = _TURNED[layout]
    dims = ops.arguments(node)["dims"]
    return new_layout if len(dims) == 4 and tuple(d % 4 for d in dims) == order else None


def factor_of(graph: GraphModule, node: Node) -> tuple[Node, torch.Tensor] | None:
    """What a product multiplies by constants, and these: one for all, or one for each channel on some axis."""
    if ops.op_name(node) != "mul":
        return None
    pair: list[Any] = list(node.args[:2])
    if isinstance(pair[0], Node) and ops.is_constant(pair[0]):
        pair.reverse()
    source, factor = pair
    if not isinstance(source, Node) or ops.is_constant(source) or shape_of(source) != shape_of(node):
        return None
    if isinstance(factor, (int, float)):
        return (source, torch.tensor(float(factor))) if math.isfinite(factor) else None
    if not isinstance(factor, Node) or not ops.is_constant(factor):
        return None
    value = ops.constant_value(graph, factor)
    return (source, value) if value.is_floating_point() and bool(value.isfinite().all()) else None


def channels_of(factor: torch.Tensor, channels: int, layout: str, dims: int) -> torch.Tensor | None:
    """A constant factor as one number a channel, float64; None if it differs along another axis."""
    axis = 1 if layout == IMAGE else dims - 1
    sizes = [1] * (dims - factor.dim()) + list(factor.shape)
    if len(sizes) != dims or any(s != 1 for i, s in enumerate(sizes) if i != axis):
        return None
    return factor.double().flatten().expand(channels)


def is_float32(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def static(sizes: Sequence[object]) -> bool:
    return all(isinstance(s, int) for s in sizes)


def pair(value: object, flat: bool = False) -> tuple[int, int] | None:
    """A size for height and width; `flat`: of a one-dimensional op, along the width."""
    if isinstance(value, int):
        return (1, value) if flat else (value, value)
    if isinstance(value, (list, tuple)) and len(value) in (1, 2) and all(isinstance(v, int) for v in value):
        return (1, int(value[0])) if flat else (int(value[0]), int(value[-1]))
    return None


def byte_grid(quantized: Quantized | None) -> Quantization | Dynamic | None:
    """The grid of a per-tensor quantize or dequantize op, counted as unsigned bytes; None for all else."""
    if quantized is None or ops.qdq_name(quantized.node) not in ("quantize_per_tensor", "dequantize_per_tensor"):
        return None
    qparams = quantized.qparams
    low, high = qparams.quant_min, qparams.quant_max
    if qparams.dtype not in (torch.uint8, torch.int8) or quantized.output_dtype not in (None, torch.float32):
        return None
    if not isinstance(low, int) or not isinstance(high, int):
        return None
    shift = 128 if qparams.dtype == torch.int8 else 0
    if quantized.choice is not None:
        return _dynamic_grid(quantized, quantized.choice, low + shift, high + shift)
    scale, zero_point = (_number(value) for value in (qparams.scale, qparams.zero_point))
    if scale is None or zero_point is None or not 0 < scale < math.inf:
        return None
    grid = Quantization(scale, int(zero_point) + shift, low + shift, high + shift, nan=shift)
    return grid if 0 <= grid.low <= grid.zero_point <= grid.high <= 255 else None


def qparams_nodes(quantized: Quantized | None) -> list[Node]:
    """What makes the scale and zero point of a dynamic quantize op: the op that chooses and what takes it apart."""
    choice = None if quantized is None else quantized.choice
    return [] if choice is None else [choice.node, *choice.node.users]


def _dynamic_grid(quantized: Quantized, choice: Choice, low: int, high: int) -> Dynamic | None:
    """The grid of an op whose scale is chosen from the range of the very tensor that is quantized."""
    qparams = quantized.qparams
    if ops.qdq_name(choice.node) not in _CHOOSING or quantized.source is not choice.source or choice.eps is None:
        return None
    if choice.grid != (qparams.dtype, qparams.quant_min, qparams.quant_max):
        return None
    grid = Dynamic(low, high, choice.eps, choice.symmetric)
    middle = 128 if choice.symmetric else grid.low
    return grid if 0 <= grid.low <= middle <= grid.high <= 255 and grid.low < grid.high else None


def _number(value: torch.Tensor | None) -> float | None:
    return float(value) if value is not None and value.numel() == 1 else None


@dataclass(frozen=True)
class Weight:
    codes: torch.Tensor  # int8, channels first
    scale: torch.Tensor  # float64, one a channel


def weight_of(reading: GraphReading, node: object, axis: int = 0) -> Weight | None:
    """The codes and scales behind a dequantized constant: symmetric int8 on `axis` or for the whole tensor."""
    if not isinstance(node, Node) or ops.qdq_name(node) not in ("dequantize_per_channel", "dequantize_per_tensor"):
        return None
    quantized = reading.op(node)
    if quantized is None or quantized.codes is None or not ops.is_constant(quantized.codes):
        return None
    scale, zero_point = quantized.qparams.scale, quantized.qparams.zero_point
    codes = ops.constant_value(reading.model, quantized.codes)
    if scale is None or codes.dtype != torch.int8 or quantized.qparams.axis not in (None, axis):
        return None
    if scale.numel() not in (1, codes.shape[axis]):
        return None
    if zero_point is not None and bool(zero_point.any()):
        return None
    return Weight(codes, scale.float().double().flatten().expand(codes.shape[axis]))


def factors_of(reading: GraphReading, node: Node) -> Weight | None:
    """What the kernels multiply by: a product's weight, or the phases of a transposed one's; None if they cannot."""
    weight, phases = ops.arguments(node)["weight"], transposed.phases_of(node)
    if ops.op_name(node) not in transposed.NAMES:
        return weight_of(reading, weight)
    found = weight_of(reading, weight, axis=1) if phases is not None else None
    return None if found is None or phases is None else Weight(phases.weight(found.codes), phases.spread(found.scale))


def quantize_behind(node: object) -> Node | None:
    """The quantize op behind a dequantize op."""
    if not isinstance(node, Node) or not ops.is_dequantize(node):
        return None
    source = ops.argument(node, 0)
    return source if source is not None and ops.is_quantize(source) else None


def window_of(node: Node) -> dict[str, int] | None:
    """Kernel, stride, padding in front, dilation of a convolution or max pool; a conv1d lies along the width."""
    arguments = ops.arguments(node)
    flat = ops.op_name(node) == "conv1d"
    size = shape_of(arguments["weight"])[2:] if "weight" in arguments else arguments.get("kernel_size")
    kernel, stride = pair(size, flat), pair(arguments.get("stride") or (1 if "weight" in arguments else size), flat)
    dilation, padding = pair(arguments.get("dilation", 1), flat), arguments.get("padding", 0)
    if kernel is None or stride is None or dilation is None:
        return None
    if padding == "same":
        before: tuple[int, int] | None = (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2)
    else:
        before = pair(0 if padding == "valid" else padding, flat)
    if before is None:
        return None
    if flat:
        before = (0, before[1])
    names = ("kh", "kw", "sh", "sw", "pt", "pl", "dh", "dw")
    return dict(zip(names, (*kernel, *stride, *before, *dilation), strict=True))


def image_size(shape: Sequence[int | str]) -> tuple[int, int, int]:
    """h, w, c of (n, c, h, w), or of (n, c, w) with a height of one."""
    height, width = (1, *shape[2:])[-2:]
    return int(height), int(width), int(shape[1])


def padding_of(node: Node) -> list[int] | None:
    """top, left, bottom, right of a pad with zeros in space alone."""
    arguments = ops.arguments(node)
    pad = arguments.get("pad")
    if (
        arguments.get("mode", "constant") != "constant"
        or (arguments.get("value") or 0) != 0
        or not isinstance(pad, (list, tuple))
    ):
        return None
    if len(pad) not in (2, 4) or not all(isinstance(p, int) and p >= 0 for p in pad):
        return None
    left, right, top, bottom = (*pad, 0, 0)[:4]
    return [top, left, bottom, right]


def _clamp(node: Node) -> tuple[float, float] | None:
    name, arguments = ops.overload_of(node).rstrip("_"), ops.arguments(node)
    if "relu6" in name:
        return 0.0, 6.0
    if ops.op_name(node) == "relu":
        return 0.0, math.inf
    low, high = arguments.get("min_val", arguments.get("min")), arguments.get("max_val", arguments.get("max"))
    if "hardtanh" in name:
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)) or math.isnan(low) or math.isnan(high):
        return None
    return float(low), float(high)


def activation_of(node: Node) -> dict[str, Any] | None:
    """name, low, high of an activation, or None."""
    name = ACTIVATIONS.get(ops.op_name(node))
    schema = ops.schema_of(node)
    if name is None or schema is None or (schema.is_mutable and len(node.all_input_nodes[0].users) > 1):
        return None
    if name == "clamp":
        bounds = _clamp(node)
        return None if bounds is None else {"name": "clamp", "low": bounds[0], "high": bounds[1]}
    if name == "gelu" and ops.arguments(node).get("approximate", "none") == "tanh":
        name = "gelu_tanh"
    return {"name": name, "low": 0.0, "high": 0.0}


def is_depthwise(codes: torch.Tensor, groups: int) -> bool:
    """Whether the depthwise kernel runs a convolution with these weights; else it is a product of groups."""
    height, width = (1, *codes.shape[2:])[-2:]
    return codes.shape[1] == 1 and groups == codes.shape[0] > 1 and (-(-height // 4) + 1) * width <= _MOST_TAPS
