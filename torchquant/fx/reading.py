"""How the tensors of a prepared or converted graph are quantized, whoever wrote the Quantizer.

This is the one place that knows how observers and the ops that quantize, dequantize and choose scales are written. A
`GraphReading` answers for the nodes of one graph and remembers its answers, so each op is read once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

import torchquant.formats.packed  # noqa: F401 - registers the ops that packed graphs call
from torchquant.formats.encoded import format_named
from torchquant.fx import ops
from torchquant.types import Format, QParams

__all__ = [
    "Choice",
    "GraphReading",
    "Quantized",
    "is_converted",
    "is_observer",
    "is_prepared",
    "observer_of",
    "observers",
    "source_of",
    "stored_shape",
]


# observers ------------------------------------------------------------------------------------------------------------


def is_observer(module: object) -> bool:
    """Whether a module is an observer or a fake quantizer, whoever wrote it."""
    return isinstance(module, torch.nn.Module) and hasattr(module, "calculate_qparams")


def observer_of(model: GraphModule, node: Node) -> torch.nn.Module | None:
    """The observer that a `call_module` node calls, or None."""
    if node.op != "call_module":
        return None
    module = model.get_submodule(str(node.target))
    return module if is_observer(module) else None


def observers(model: GraphModule) -> Iterator[tuple[Node, torch.nn.Module]]:
    """Every observer node of a prepared graph with its module (a shared module comes once a node)."""
    for node in model.graph.nodes:
        module = observer_of(model, node)
        if module is not None:
            yield node, module


def is_prepared(model: GraphModule) -> bool:
    """Whether the graph holds observers."""
    return next(observers(model), None) is not None


def is_converted(model: GraphModule) -> bool:
    """Whether the graph holds dequantize ops."""
    return any(ops.is_dequantize(node) for node in model.graph.nodes)


# what is read ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """How a scale is chosen at run time from the tensor that it then quantizes.

    Args:
        node: the op that chooses.
        source: the tensor it looks at.
        axis: of the vectors that get a scale each; None: one scale for the tensor.
        symmetric: there is no zero point, or always the same.
        eps: the least scale; None where the op has a least scale of its own.
        grid: dtype, quant_min and quant_max that the op is given; None for what it takes for granted.
    """

    node: Node
    source: Node
    axis: int | None
    symmetric: bool
    eps: float | None
    grid: tuple[Any, Any, Any]


@dataclass(frozen=True)
class Quantized:
    """How one tensor is quantized, and where that stands in the graph.

    Args:
        node: the observer, the quantize op or the dequantize op.
        qparams: the grid, its granularity, and the scale where it is known before run time.
        codes: what a dequantize op reads: stored codes, or the quantize op.
        source: the float tensor that becomes codes at run time; None for stored codes.
        choice: how the scale is chosen at run time, as far as that is known; None where it is fixed.
        output_dtype: of the values that a dequantize op gives, None where it does not say.
        integer_zero_point: zero points are codes; otherwise floats.
    """

    node: Node
    qparams: QParams
    codes: Node | None = None
    source: Node | None = None
    choice: Choice | None = None
    output_dtype: torch.dtype | None = None
    integer_zero_point: bool = True


def source_of(node: Node) -> Node:
    """The node behind a chain of reshapes: where a value was made."""
    while True:
        kind = ops.kind_of(node)
        if kind is None or kind.name != "reshape" or not node.all_input_nodes:
            return node
        node = node.all_input_nodes[0]


class GraphReading:
    """Answers for one graph. Ops that are added later may be asked for; ops whose arguments change may not."""

    def __init__(self, model: GraphModule) -> None:
        self.model = model
        self._known: dict[Node, Quantized | None] = {}

    def tensor(self, node: Node | None) -> Quantized | None:
        """How the value of `node` is quantized where an op reads it, behind reshapes or not; None if it is float."""
        if node is None:
            return None
        read = source_of(node)
        return None if ops.is_quantize(read) else self.op(read)

    def op(self, node: Node) -> Quantized | None:
        """What an observer, a quantize or a dequantize op does; None for every other node."""
        if node not in self._known:
            self._known[node] = self._read(node)
        return self._known[node]

    def _read(self, node: Node) -> Quantized | None:
        observer = observer_of(self.model, node)
        if observer is not None:
            qparams = _of_observer(observer)
            return None if qparams is None else Quantized(node, qparams, source=ops.argument(node, 0))
        return _of_op(self.model, node) if ops.is_quantize(node) or ops.is_dequantize(node) else None


def _of_observer(observer: Any) -> QParams | None:
    low, high = getattr(observer, "quant_min", None), getattr(observer, "quant_max", None)
    if low is None or high is None:
        return None
    dtype: Any = getattr(observer, "dtype", None) or getattr(observer, "target_dtype", torch.int8)
    per_channel = getattr(observer, "qscheme", None) in (torch.per_channel_symmetric, torch.per_channel_affine)
    axis = int(observer.ch_axis) if per_channel and hasattr(observer, "ch_axis") else None
    granularity = getattr(observer, "granularity", None)
    dynamic = bool(getattr(observer, "is_dynamic", False))
    token = dynamic and (getattr(observer, "per_token", False) or type(granularity).__name__ == "PerToken")
    group_size = None if dynamic else getattr(granularity, "group_size", None)
    format = getattr(observer, "format", None)
    name = format.name if isinstance(format, Format) and not format.is_affine else ""
    return QParams(dtype, low, high, axis, dynamic, group_size=group_size, token=token, format=name)


# quantize and dequantize ops ------------------------------------------------------------------------------------------
# The dialects differ in what they call their arguments, and each calls them the same in all of its ops.

_SCALE, _ZERO_POINT = ("scale", "scales"), ("zero_point", "zero_points")
_DTYPE, _OUTPUT_DTYPE = ("dtype", "input_dtype", "output_dtype"), ("out_dtype", "output_dtype")


def _first(arguments: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((arguments[name] for name in names if name in arguments), None)


def _of_op(model: GraphModule, node: Node) -> Quantized:
    arguments = ops.arguments(node)
    choice = _choice_of(_first(arguments, _SCALE), _first(arguments, _ZERO_POINT))
    read = ops.argument(node, 0)
    codes = read if ops.is_dequantize(node) else None
    quantize = node if codes is None else codes if ops.is_quantize(codes) else None
    domain = arguments.get("zero_point_domain", "INT")
    return Quantized(
        node,
        _qparams(model, node, arguments, choice),
        codes,
        None if quantize is None else ops.argument(quantize, 0),
        choice,
        _first(arguments, _OUTPUT_DTYPE) if codes is not None else None,
        getattr(domain, "name", domain) == "INT",
    )


def _qparams(model: GraphModule, node: Node, arguments: dict[str, Any], choice: Choice | None) -> QParams:
    if "format" in arguments:
        return _encoded(arguments)
    scale, zero_point = (_constant(model, _first(arguments, names)) for names in (_SCALE, _ZERO_POINT))
    axis, dtype, group_size = arguments.get("axis"), _first(arguments, _DTYPE), arguments.get("group_size")
    if "block_size" in arguments:
        axis, group_size = _blocks(arguments["block_size"], stored_shape(model, arguments["input"]))
    if scale is not None and scale.ndim > 1 and not group_size:  # one scale a row
        axis, scale = 0, scale.flatten()
        zero_point = zero_point if zero_point is None else zero_point.flatten()
    dynamic = scale is None and isinstance(_first(arguments, _SCALE), Node)
    return QParams(
        dtype=dtype if isinstance(dtype, torch.dtype) else torch.int8,
        quant_min=arguments.get("quant_min"),  # type: ignore[arg-type]
        quant_max=arguments.get("quant_max"),  # type: ignore[arg-type]
        axis=axis if isinstance(axis, int) else None,
        dynamic=dynamic,
        scale=scale,
        zero_point=zero_point,
        group_size=group_size,
        token=dynamic and _is_by_token(node, arguments, choice),
    )


def _encoded(arguments: dict[str, Any]) -> QParams:
    """Of a weight in a format of its own, which knows what stands in the place of a scale."""
    format, axis, group_size = format_named(arguments["format"]), arguments["axis"], arguments["group_size"]
    return QParams(format.dtype, format.quant_min, format.quant_max, axis, group_size=group_size, format=format.name)


def _is_by_token(node: Node, arguments: dict[str, Any], choice: Choice | None) -> bool:
    """Whether each row has a scale of its own, as far as the ops say."""
    if "block_size" in arguments:
        return len(arguments["block_size"]) > 1 and all(size == 1 for size in arguments["block_size"][:-1])
    return ops.qdq_name(node).endswith("_per_token") or (choice is not None and choice.axis is not None)


def _blocks(block_size: Any, shape: Sequence[int] | None) -> tuple[int | None, int | None]:
    """Channel axis or group size of an affine block size."""
    if shape is None or all(b in (n, -1) for b, n in zip(block_size, shape, strict=True)):
        return None, None
    whole = [i for i, (b, n) in enumerate(zip(block_size, shape, strict=True)) if b == 1 and n != 1]
    if len(whole) == 1 and all(b == n for i, (b, n) in enumerate(zip(block_size, shape, strict=True)) if i != whole[0]):
        return whole[0], None
    return None, next((int(b) for b, n in zip(block_size, shape, strict=True) if 1 < b < n), 1)


def stored_shape(model: GraphModule, codes: Any) -> Sequence[int] | None:
    """The shape of stored codes, packed or not, without unpacking them; None for what is no constant."""
    if isinstance(codes, Node) and ops.qdq_name(codes) == "unpack_codes":
        shape: Sequence[int] = ops.arguments(codes)["shape"]
        return shape
    value = _constant(model, codes)
    return None if value is None else value.shape


def _constant(model: GraphModule, value: Any) -> torch.Tensor | None:
    if isinstance(value, (int, float)):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    if isinstance(value, Node) and value.op == "get_attr":
        tensor: Any = operator.attrgetter(str(value.target))(model)
        return tensor.detach() if isinstance(tensor, torch.Tensor) else None
    if isinstance(value, Node) and (ops.is_part(value) or ops.qdq_name(value) == "widen") and ops.is_constant(value):
        return ops.constant_value(model, value)
    return None


# ops that choose scales -----------------------------------------------------------------------------------------------


def _choice_by_block(arguments: dict[str, Any]) -> tuple[int | None, bool] | None:
    block, mapping = arguments.get("block_size", ()), arguments.get("mapping_type")
    rows = len(block) > 1 and all(size == 1 for size in block[:-1])
    return (-1, mapping == "SYMMETRIC") if rows and mapping in ("SYMMETRIC", "ASYMMETRIC") else None


# name of the op -> the axis of the vectors that have a scale each, and whether that comes without a zero point
_CHOOSING: dict[str, Callable[[dict[str, Any]], tuple[int | None, bool] | None]] = {
    "choose_scale": lambda arguments: (arguments["axis"], True),
    "choose_affine": lambda arguments: (arguments["axis"], False),
    "choose_qparams": lambda arguments: (None, False),
    "choose_qparams_symmetric": lambda arguments: (None, True),
    "choose_qparams_affine": _choice_by_block,
    "choose_qparams_per_token_asymmetric": lambda arguments: (-1, False),
}


def _choice_of(scale: Any, zero_point: Any) -> Choice | None:
    """The choice behind the scale and zero point that a quantize or dequantize op takes; None if there is no one op."""
    node = _part_of(scale, 0)
    name = ops.qdq_name(node) if node is not None else ""
    if node is None or name not in _CHOOSING or not isinstance(node.args[0], Node):
        return None
    if isinstance(zero_point, Node) and _part_of(zero_point, 1) is not node:
        return None
    arguments = ops.arguments(node)
    way = _CHOOSING[name](arguments)
    if way is None:
        return None
    grid = (_first(arguments, ("dtype", "target_dtype")), arguments.get("quant_min"), arguments.get("quant_max"))
    eps = arguments.get("eps")
    return Choice(node, node.args[0], *way, None if eps is None else float(eps), grid)


def _part_of(value: Any, index: int) -> Node | None:
    """The node whose result, or whose result number `index`, a value is."""
    if not isinstance(value, Node) or value.target is not operator.getitem:
        return value if isinstance(value, Node) else None
    return value.args[0] if value.args[1] == index and isinstance(value.args[0], Node) else None
