"""What XNNPACK would drop or change in silence, or fail on without naming a site: refused by name before that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from torchquant.backends.executorch_xnnpack.capabilities import (
    FEW_BITS,
    FOUR_BITS,
    LEAST_GROUP,
    REQUANTIZATION_LIMIT,
    TARGET,
)
from torchquant.backends.executorch_xnnpack.tables import table_problem
from torchquant.errors import LoweringError
from torchquant.fx import ops
from torchquant.fx.reading import GraphReading
from torchquant.fx.signature import Signature
from torchquant.types import Site

__all__ = [
    "refuse_missing_kernels",
    "refuse_narrow",
    "refuse_overflow",
    "refuse_unbounded",
    "refuse_unrunnable",
    "refuse_unshared",
    "unshared",
]

_INT32 = 2.0**31 - 1


def refuse_unrunnable(graph: GraphModule, sites: Sequence[Site]) -> None:
    """Raise LoweringError for a weighted op whose spec the delegate drops in silence, or fails on when loaded."""
    nodes, reading = {n.name: n for n in graph.graph.nodes}, GraphReading(graph)
    for site in sites:
        node = nodes[site.node]
        if problem := _problem(site, _inputs(graph, reading, node)) or _choice_problem(reading, node):
            raise LoweringError(
                f"{site.op} {site.node} ({site.module or 'root'}) is annotated, but {problem}. Change the Quantizer's "
                f"spec, exclude the op, or pass allow_float=['node:{site.node}']."
            )


def _inputs(graph: GraphModule, reading: GraphReading, node: Node) -> int:
    """How many input features a weight of codes has, or a table columns; 0 if that is unknown."""
    kind = ops.kind_of(node)
    read = None if kind is None or kind.weight is None else reading.tensor(ops.argument(node, kind.weight))
    if read is None or read.codes is None or not ops.is_constant(read.codes):
        return 0
    codes = ops.constant_value(graph, read.codes)
    return int(codes.shape[1]) if codes.ndim == 2 else 0


def _problem(site: Site, inputs: int) -> str:
    if site.op == "embedding":
        return table_problem(site, inputs)
    if why := TARGET.why_float(site.op):
        return why
    return _weight_problem(site) or _activation_problem(site) or _few_bits_problem(site, inputs)


def _choice_problem(reading: GraphReading, node: Node) -> str:
    """What of scales that are chosen at run time XNNPACK has no kernel for."""
    kind = ops.kind_of(node)
    inputs = [] if kind is None else [reading.tensor(n) for n in ops.data_inputs(node, kind)]
    if any(read is not None and read.choice is not None and read.choice.symmetric for read in inputs):
        return (
            "its activation is quantized at run time without a zero point, and XNNPACK chooses scales with one; take "
            "XnnpackQuantizer, or asymmetric activations"
        )
    return ""


def _weight_problem(site: Site) -> str:
    weight = site.weight
    if weight is None:
        return "its weight is float, and XNNPACK's int8 ops take int8 weights"
    if weight.dtype != torch.int8:
        return f"its weight is {weight.dtype}, and XNNPACK takes int8"
    if weight.axis is not None and weight.scale is not None and weight.scale.dtype != torch.float32:
        return f"its scales are {weight.scale.dtype} (torch's default dtype at prepare), and XNNPACK takes float32"
    if weight.zero_point is not None and bool(weight.zero_point.any()):
        return f"its weight has zero points, which XNNPACK drops without a word{_symmetric(site)}"
    if site.op != "linear" and (weight.quant_min, weight.quant_max) == FOUR_BITS:
        return "its weight has the range -8..7, which XNNPACK packs as 4 bits for linear only"
    return ""


def _symmetric(site: Site) -> str:
    """What to take instead of an affine weight of few bits."""
    return f"; take symmetric ones ({FEW_BITS[-1]})" if site.weight is not None and site.weight.group_size else ""


def _few_bits_problem(site: Site, inputs: int) -> str:
    """What of a weight in groups, or in 4 bits, has no kernel or a wrong one."""
    weight, activation, otherwise = site.weight, site.activation, f"take {FEW_BITS[-1]}, or one scale for each output"
    assert weight is not None
    limits = (weight.quant_min, weight.quant_max)
    if limits == FOUR_BITS and inputs % 2:
        return f"its {inputs} inputs are odd in number, and XNNPACK goes wrong with 4-bit weights then; give it 8 bits"
    if not weight.group_size:
        return ""
    if activation is not None and not activation.dynamic:
        return f"its activation has a fixed scale, and XNNPACK takes groups with dynamic ones only; {otherwise}"
    if limits != FOUR_BITS:
        return f"its groups have codes {limits[0]}..{limits[1]}, and XNNPACK takes -8..7 only; {otherwise}"
    if weight.group_size % LEAST_GROUP:
        return f"its groups are of {weight.group_size}, and XNNPACK takes multiples of {LEAST_GROUP}; {otherwise}"
    return ""


def _activation_problem(site: Site) -> str:
    activation, weight = site.activation, site.weight
    if activation is None:
        return (
            "only its weight is quantized, and XNNPACK runs no weight-only linears or convolutions; quantize its input "
            f"at run time too (dynamic_int8, {FEW_BITS[-1]})"
        )
    if activation.dynamic:
        if weight is not None and weight.axis is None and weight.scale is not None and weight.scale.numel() == 1:
            return "its weight is per tensor, and XNNPACK's dynamic linear takes per-channel weights"
        if activation.dtype != torch.int8:
            return f"its activation is {activation.dtype}, and XNNPACK's dynamic ops take int8"
        return ""
    if activation.dtype != torch.int8:
        return f"its activation is {activation.dtype}, and XNNPACK's static ops take int8"
    if (activation.quant_min, activation.quant_max) != (-128, 127):
        return (
            f"its activation is limited to {activation.quant_min}..{activation.quant_max}, and XNNPACK clamps to "
            "-128..127 whatever the graph says"
        )
    return ""


_NOWHERE = {
    "conv3d": "a 3-D convolution",
    "conv_transpose3d": "a 3-D transposed convolution",
}


def refuse_missing_kernels(graph: GraphModule) -> None:
    """Raise LoweringError for ops that ExecuTorch runs neither in the delegate nor in a portable kernel."""
    for node in graph.graph.nodes:
        what = _NOWHERE.get(ops.op_name(node)) if ops.is_op(node) else None
        if what:
            raise LoweringError(
                f"{_named(node)}: ExecuTorch has no kernel for {what}, neither in int8 nor in float. Lower the model "
                "for another target, or write this op as others (a 3-D convolution as 2-D ones over slices)."
            )


def refuse_unbounded(signature: Signature) -> None:
    """Raise LoweringError for a size without an upper bound: ExecuTorch plans its memory for the largest."""
    for spec in signature.tensors:
        sizes = spec.sizes or (None,) * len(spec.shape)
        for axis, (fixed, size) in enumerate(zip(spec.shape, sizes, strict=True)):
            if fixed is None and (size is None or size.maximum is None):
                raise LoweringError(
                    f"input {spec.name!r}: the size of axis {axis} has no upper bound, and ExecuTorch plans its memory "
                    "for the largest size. Export with one in dynamic_shapes, e.g. "
                    f"{{{axis}: torch.export.Dim('size', max=64)}} (the command: --max-batch)."
                )


_SHARED = ("cat", "max_pool2d", "slice")


def unshared(graph: GraphModule) -> Iterator[tuple[Node, Node, Node]]:
    """Ops that XNNPACK runs in int8 with one scale only, and have another one behind: op, dequantize, quantize.

    The delegate takes them as int8 where every operand is, and a program with that fails to load.
    """
    for node in graph.graph.nodes:
        if ops.op_name(node) not in _SHARED or ops.kind_of(node) is None:
            continue
        before = node.all_input_nodes
        behind = [u for u in node.users if ops.is_quantize(u)]
        if len(behind) == len(node.users) == 1 and all(ops.is_dequantize(n) for n in before):
            differing = [n for n in before if behind[0].args[1:3] != n.args[1:3]]
            if differing:
                yield node, differing[0], behind[0]


def refuse_unshared(graph: GraphModule, allowed: set[str]) -> None:
    """Raise LoweringError for an annotated op of these: its spec cannot be honoured in int8."""
    for node, dequantize, quantize in unshared(graph):
        annotation = node.meta.get(Q_ANNOTATION_KEY)
        if annotation is not None and annotation.input_qspec_map and node.name not in allowed:
            raise LoweringError(
                f"{ops.op_name(node)} {node.name} changes scale or zero point from {dequantize.args[1:3]} to "
                f"{quantize.args[1:3]}, and XNNPACK's programs with that fail to load. Give its inputs and "
                f"output one SharedQuantizationSpec, exclude it, or pass allow_float=['node:{node.name}']."
            )


def refuse_narrow(graph: GraphModule, allowed: set[str]) -> None:
    """Raise LoweringError for a static activation on another grid than int8 -128..127, which the delegate ignores."""
    reading = GraphReading(graph)
    for node in graph.graph.nodes:
        if not ops.is_quantize(node) or ops.is_constant(node) or ops.has_own_scale(node):
            continue
        quantized = reading.op(node)
        assert quantized is not None
        grid = (quantized.qparams.dtype, quantized.qparams.quant_min, quantized.qparams.quant_max)
        around = {str(node.args[0]), *(str(user) for dequantize in node.users for user in dequantize.users)}
        if grid != (torch.int8, -128, 127) and not around & allowed:
            raise LoweringError(
                f"the tensor between {node.args[0]} and {', '.join(sorted(around - {str(node.args[0])}))} is quantized "
                f"to {grid[0]} {grid[1]}..{grid[2]}, and XNNPACK's static ops compute in int8 -128..127 whatever the "
                "graph says. Change the Quantizer's spec."
            )


@dataclass(frozen=True)
class _Layer:
    """A static weighted op: scales of its input (), weight (channels,) and output (), bias and codes (channels, n)."""

    node: Node
    s_in: float
    s_weight: torch.Tensor
    s_out: float | None
    bias: torch.Tensor | None
    codes: torch.Tensor


def refuse_overflow(graph: GraphModule, wanted: Sequence[Site]) -> None:
    """Raise LoweringError where the int32 sums or the requantization of a static weighted op would overflow.

    XNNPACK stores a bias in units of s_in s_weight and saturates it in silence; a requantization factor
    s_in s_weight / s_out of 256 or more is an error when the program is loaded, that names no site.
    """
    for layer in _layers(graph, {s.node for s in wanted}):
        units = layer.s_in * layer.s_weight.double()
        sums = 255.0 * layer.codes.double().abs().sum(1)
        bias = torch.zeros_like(units) if layer.bias is None else (layer.bias.double() / units).abs()
        if bool((bias + sums > _INT32).any()):
            channel = int((bias + sums).argmax())
            raise LoweringError(
                f"{_named(layer.node)}: the bias of channel {channel}, "
                f"{0.0 if layer.bias is None else float(layer.bias[channel]):.3g}, "
                f"is {float(bias[channel]):.3g} in units of input scale x weight scale ({layer.s_in:.3g} x "
                f"{float(layer.s_weight[channel]):.3g}), and XNNPACK stores it in an int32. The input (or the weight) "
                f"hardly moved in calibration: {_WAY_OUT}"
            )
        factor = float(units.max()) / layer.s_out if layer.s_out else 0.0
        if layer.s_out and bool((bias * units > _INT32 * layer.s_out).any()):
            raise LoweringError(
                f"{_named(layer.node)}: its largest bias, {float((bias * units).max()):.3g}, is over 2**31 steps of "
                f"its output, whose scale is {layer.s_out:.3g}. The output hardly moved in calibration: {_WAY_OUT}"
            )
        if factor >= REQUANTIZATION_LIMIT:
            raise LoweringError(
                f"{_named(layer.node)}: its requantization factor, input scale x weight scale / output scale = "
                f"{layer.s_in:.3g} x {float(layer.s_weight.max()):.3g} / {layer.s_out:.3g} = {factor:.3g}, is not "
                f"below XNNPACK's limit {REQUANTIZATION_LIMIT:g}. The output hardly moved in calibration: {_WAY_OUT}"
            )


_WAY_OUT = (
    "calibrate with data that moves it, give the observer a floor (eps=2**-12; XnnpackQuantizer sets one), exclude the "
    "op, or pass allow_float."
)


def _named(node: Node) -> str:
    module = ops.module_path(node)
    return f"{ops.op_name(node)} {node.name}" + (f" ({module})" if module else "")


def _layers(graph: GraphModule, names: set[str]) -> Iterator[_Layer]:
    reading = GraphReading(graph)
    for node in graph.graph.nodes:
        kind = ops.kind_of(node)
        if node.name not in names or kind is None or kind.weight is None or not kind.data:
            continue
        weight_node = ops.argument(node, kind.weight)
        activation, weight = (reading.tensor(n) for n in (ops.argument(node, 0), weight_node))
        if weight_node is None or activation is None or weight is None or weight.qparams.group_size:
            continue
        if activation.qparams.scale is None or not ops.is_constant(weight_node):
            continue  # dynamic; or a weight that the graph makes, which the partitioner leaves
        values = ops.constant_value(graph, weight_node).float()
        axis, groups = kind.axis, int(ops.arguments(node).get("groups", 1))
        rows = _channels(values, axis, groups)
        scale = torch.ones(1) if weight.qparams.scale is None else weight.qparams.scale.float()
        scale = scale if scale.numel() == len(rows) else scale.max().expand(len(rows))
        source = ops.argument(node, 2)
        bias = ops.constant_value(graph, source).float() if source is not None and ops.is_constant(source) else None
        codes = (rows / scale[:, None]).round()
        yield _Layer(node, float(activation.qparams.scale), scale, _output_scale(graph, node), bias, codes)


def _channels(values: torch.Tensor, axis: int, groups: int) -> torch.Tensor:
    """Weights (channels, n); those of a transposed convolution lie on the second axis, group by group."""
    if axis == 0:
        return values.flatten(1)
    parts = [part.transpose(0, 1).flatten(1) for part in values.chunk(groups)]
    return torch.cat(parts)


def _output_scale(graph: GraphModule, node: Node) -> float | None:
    """The scale of the quantize op behind the op and its fused clamp, or None."""
    tail = node
    for _ in range(3):
        users = list(tail.users)
        if len(users) != 1:
            return None
        tail = users[0]
        if ops.is_quantize(tail):
            scale = tail.args[1]
            return float(scale) if isinstance(scale, (int, float)) else None
    return None
