"""A converted graph of any Quantizer, in the ops of `dialect` and the forms that run in integers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.backends.onnx_qdq.dialect import OPS
from torchquant.backends.onnx_qdq.quantities import (
    bits_of,
    by_groups,
    grid_of,
    has_zero_point,
    is_by_row,
    is_needless,
    is_plain,
    limits_of,
    no_operator,
    readable_bits,
    zeros_are_codes,
    zeros_fit,
)
from torchquant.backends.onnx_qdq.windows import absorb_pads, fold_clamps, pool_globally, shield_clamps
from torchquant.fx import ops, passes
from torchquant.fx.reading import GraphReading, Quantized

__all__ = ["rewrite"]

aten = torch.ops.aten
_BYTES = ((torch.uint8, 0, 255), (torch.int8, -128, 127))
_CODES = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.float8_e4m3fn)


def rewrite(graph: GraphModule) -> None:
    """Write the graph, in place, such that each node of it is one that ONNX has.

    ReLUs and clamps that a quantize op implies go; zeros padded in front of an integer convolution become its own; a
    linear with stored codes becomes MatMul with a weight [inputs, outputs] and Add; what quantizes by the tensor at run
    time becomes DynamicQuantizeLinear, by the row arithmetic and MatMulInteger.

    Raises:
        LoweringError: something is quantized in a way that ONNX has no op for.
    """
    absorb_pads(graph, GraphReading(graph))
    fold_clamps(graph, GraphReading(graph))
    shield_clamps(graph, GraphReading(graph))
    pool_globally(graph)
    writer = _Writer(graph, GraphReading(graph))
    for node in list(graph.graph.nodes):
        if ops.op_name(node) == "linear":
            writer.linear(node)
        elif ops.op_name(node) == "embedding":
            writer.embedding(node)
    passes.finished(graph, 1)
    for node in list(graph.graph.nodes):
        if not node._erased and ops.is_dequantize(node):
            writer.dequantize(node)
    passes.finished(graph, 1)
    for node in list(graph.graph.nodes):
        if ops.is_quantize(node):
            writer.quantize(node)
    passes.finished(graph, 1)
    passes.remove_dead_weights(graph)


class _Writer:
    """Puts ops of the dialect in the place of those of a converted graph."""

    def __init__(self, graph: GraphModule, reading: GraphReading) -> None:
        self.graph, self.reading = graph, reading
        self._at = next(iter(graph.graph.nodes))
        self._quantized: dict[Node, tuple[Node, Node, Node]] = {}  # quantize op -> codes, scale, zero point
        # ONNX Runtime makes some signed codes unsigned on x86, and then has no kernel that takes both
        self._unsigned = any(has_zero_point(reading.op(n)) for n in graph.graph.nodes if ops.is_quantize(n))

    # each kind of node ----------------------------------------------------------------------------------------

    def linear(self, node: Node) -> None:
        """MatMul with [inputs, outputs] codes; MatMulInteger where each row of the input has its scale."""
        x, weight, bias = (ops.argument(node, i) for i in range(3))
        stored = None if weight is None else self._stored(weight)
        if x is None or weight is None or stored is None or stored.qparams.axis not in (None, 0):
            return
        self._at = node
        rows = self.reading.op(x) if ops.is_dequantize(x) else None
        if rows is not None and is_by_row(rows) and is_plain(stored, self._codes(stored)):
            product = self._integer_product(node, rows, stored)
        else:
            product = self._call(aten.matmul.default, node, x, self._weight(stored, transposed=True))
        self._replace(node, product if bias is None else self._biased(node, product, bias))

    def _biased(self, node: Node, product: Node, bias: Node) -> Node:
        """The product and a bias; as a difference where ONNX Runtime would make a Gemm of MatMul and Add.

        It does so with matrices and with sizes that it knows, and has no integer Gemm from a float bias to floats.
        """
        shape = ops.shape_of(node) or ()
        becomes_gemm = len(shape) == 2 or all(isinstance(size, int) for size in shape)
        if not becomes_gemm or all(map(ops.is_quantize, node.users)) or not ops.is_constant(bias):
            return self._call(aten.add.Tensor, node, product, bias)
        negated = self._constant(f"{node.name}_minus_bias", -ops.constant_value(self.graph, bias).detach())
        return self._call(aten.sub.Tensor, node, product, negated)

    def embedding(self, node: Node) -> None:
        """Look up the codes of rows and their scales, then decode them: the table itself is never decoded."""
        weight, indices = ops.argument(node, 0), ops.argument(node, 1)
        stored = None if weight is None else self._stored(weight)
        if stored is None or indices is None or "embedding_bag" in ops.overload_of(node):
            return
        codes, q = self._codes(stored), stored.qparams
        if q.scale is None or not (q.axis == 0 or q.group_size) or q.format or codes.dtype.is_floating_point:
            return
        self._at = node
        values = self._looked_up_codes(node, codes, bits_of(stored), indices)
        groups = codes.shape[1] // (q.group_size or codes.shape[1])
        values = self._call(aten.unflatten.int, node, values, -1, [groups, codes.shape[1] // groups])
        if q.zero_point is not None and bool(q.zero_point.any()):
            zeros = self._looked_up(node, "zero_point", q.zero_point, indices)
            values = self._call(aten.sub.Tensor, node, values, zeros)
        values = self._call(aten.mul.Tensor, node, values, self._looked_up(node, "scale", q.scale, indices))
        values = self._call(aten.flatten.using_ints, node, values, -2, -1)
        self._replace(node, self._in_dtype(stored, node, values))

    def _looked_up_codes(self, node: Node, codes: torch.Tensor, bits: int, indices: Node) -> Node:
        """Rows of codes as floats; those of few bits lie in bytes, for ONNX Runtime looks up nothing smaller."""
        each = 8 // bits if bits else 1
        if each == 1 or codes.shape[1] % each:
            rows = self._call(aten.embedding.default, node, self._constant(f"{node.name}_codes", codes), indices)
            return self._call(aten.to.dtype, node, rows, torch.float32)
        low = int(codes.min())
        low = -(1 << bits - 1) if low < 0 else 0
        digits = (codes.to(torch.int16) - low).unflatten(1, (-1, each))
        packed = sum(digits[..., i] << (bits * i) for i in range(each)).to(torch.uint8)
        rows = self._call(aten.embedding.default, node, self._constant(f"{node.name}_codes", packed), indices)
        rest, parts = self._call(aten.to.dtype, node, rows, torch.float32), []
        for _ in range(each - 1):
            higher = self._call(aten.floor.default, node, self._call(aten.div.Tensor, node, rest, float(1 << bits)))
            parts.append(self._call(aten.sub.Tensor, node, rest, self._call(aten.mul.Tensor, node, higher, 1 << bits)))
            rest = higher
        whole = self._call(
            aten.flatten.using_ints, node, self._call(aten.stack.default, node, [*parts, rest], -1), -2, -1
        )
        return self._call(aten.add.Tensor, node, whole, float(low)) if low else whole

    def _looked_up(self, node: Node, name: str, values: torch.Tensor, indices: Node) -> Node:
        """What each group of a row has, as (..., groups, 1)."""
        table = self._constant(f"{node.name}_{name}", values.to(torch.float32).reshape(values.shape[0], -1))
        return self._call(aten.unsqueeze.default, node, self._call(aten.embedding.default, node, table, indices), -1)

    def dequantize(self, node: Node) -> None:
        quantized = self.reading.op(node)
        if quantized is None:
            raise no_operator(node)
        self._at = node
        if quantized.source is None:
            codes = quantized.codes
            if codes is None or not ops.is_constant(codes):
                raise no_operator(node)
            values = self._weight(quantized)
        else:
            codes, scale, zero_point = self._chain(node.args[0])  # type: ignore[arg-type]
            values = self._values(node, codes, scale, zero_point, quantized)
        self._replace(node, self._in_dtype(quantized, node, values))

    def quantize(self, node: Node) -> None:
        """A quantize op whose codes are read as they are."""
        quantized = self.reading.op(node)
        codes, _, _ = self._chain(node)
        if quantized is not None and quantized.qparams.dynamic:
            if codes.target is operator.getitem and quantized.qparams.dtype == torch.int8:
                raise no_operator(node)  # these codes are unsigned
            self._at = node
            codes = self._call(aten.to.dtype, node, codes, quantized.qparams.dtype)
        self._replace(node, codes)

    # parts of them --------------------------------------------------------------------------------------------

    def _chain(self, node: Node) -> tuple[Node, Node, Node]:
        """Codes, scale and zero point of what a quantize op quantizes."""
        if node not in self._quantized:
            quantized = self.reading.op(node)
            if quantized is None or quantized.source is None or quantized.qparams.dtype not in _CODES:
                raise no_operator(node)
            before, self._at = self._at, node
            x, choice = self._float(node, node.args[0]), quantized.choice  # type: ignore[arg-type]
            if quantized.qparams.dynamic:
                if choice is None:
                    raise no_operator(node)
                is_bytes = choice.axis is None and not choice.symmetric and grid_of(quantized) in _BYTES
                self._quantized[node] = self._bytes(node, x) if is_bytes else self._counted(node, x, quantized)
            else:
                self._quantized[node] = self._static(node, x, quantized)
            self._at = before
        return self._quantized[node]

    def _static(self, node: Node, x: Node, quantized: Quantized) -> tuple[Node, Node, Node]:
        q = quantized.qparams
        if q.scale is None or q.group_size:
            raise no_operator(node)
        zeros = torch.zeros(q.scale.shape) if q.zero_point is None else q.zero_point
        shift = 128 if self._unsigned and q.dtype == torch.int8 and all(map(ops.is_dequantize, node.users)) else 0
        dtype = torch.uint8 if shift else q.dtype
        scale = self._constant(f"{node.name}_scale", q.scale.to(torch.float32))
        zero_point = self._constant(f"{node.name}_zero_point", (zeros + shift).to(dtype))
        codes = self._call(OPS.quantize.default, node, x, scale, zero_point, q.axis or 0)
        if not dtype.is_floating_point and grid_of(quantized)[1:] != limits_of(q.dtype):
            codes = self._call(aten.clamp.default, node, codes, int(q.quant_min) + shift, int(q.quant_max) + shift)
        return codes, scale, zero_point

    def _bytes(self, node: Node, x: Node) -> tuple[Node, Node, Node]:
        """By the range of the tensor: signed codes and their zero point both move by 128, which changes no value."""
        whole = self._call(OPS.dynamic_quantize.default, node, x)
        codes, scale, zero_point = (self._call(operator.getitem, node, whole, i) for i in range(3))
        return codes, scale, zero_point

    def _counted(self, node: Node, x: Node, quantized: Quantized) -> tuple[Node, Node, Node]:
        """By the range of the tensor or of each row, in arithmetic: float codes, as whole numbers."""
        choice, q = quantized.choice, quantized.qparams
        assert choice is not None
        low, high = float(q.quant_min), float(q.quant_max)
        if q.dtype.is_floating_point:
            raise no_operator(node)
        dims = [] if choice.axis is None else [choice.axis]
        eps = torch.finfo(torch.float32).eps if choice.eps is None else choice.eps
        call = self._call
        if choice.symmetric:
            reach = call(aten.amax.default, node, call(aten.abs.default, node, x), dims, bool(dims))
            scale = call(aten.clamp.default, node, call(aten.div.Tensor, node, reach, (high - low) / 2), eps)
            zero_point = self._constant(f"{node.name}_zero_point", torch.tensor(0.0 if low < 0 else 128.0))
        else:
            least = call(aten.clamp.default, node, call(aten.amin.default, node, x, dims, bool(dims)), None, 0.0)
            most = call(aten.clamp.default, node, call(aten.amax.default, node, x, dims, bool(dims)), 0.0)
            reach = call(aten.sub.Tensor, node, most, least)
            scale = call(aten.clamp.default, node, call(aten.div.Tensor, node, reach, high - low), eps)
            below = call(aten.round.default, node, call(aten.div.Tensor, node, least, scale))
            zero_point = call(aten.rsub.Scalar, node, below, low)
            zero_point = call(aten.clamp.default, node, zero_point, low, high)
        inverse = call(aten.reciprocal.default, node, scale)  # as the quantize ops do
        codes = call(aten.round.default, node, call(aten.mul.Tensor, node, x, inverse))
        codes = call(aten.clamp.default, node, call(aten.add.Tensor, node, codes, zero_point), low, high)
        return codes, scale, zero_point

    def _values(self, node: Node, codes: Node, scale: Node, zero_point: Node, quantized: Quantized) -> Node:
        if codes.target is aten.clamp.default and quantized.qparams.dynamic:  # whole numbers in floats
            return self._call(aten.mul.Tensor, node, self._call(aten.sub.Tensor, node, codes, zero_point), scale)
        zeros = None if quantized.qparams.dtype.is_floating_point else zero_point
        return self._call(OPS.dequantize.default, node, codes, scale, zeros, quantized.qparams.axis or 0, 0, 0)

    def _integer_product(self, node: Node, rows: Quantized, stored: Quantized) -> Node:
        """Rows by MatMulInteger: (codes - zero point) W = codes W - zero point * (sums of W's columns)."""
        assert stored.qparams.scale is not None
        codes, scale, zero_point = self._chain(rows.node.args[0])  # type: ignore[arg-type]
        weight, call = self._codes(stored).T.contiguous(), self._call
        shift = 0 if rows.qparams.quant_min >= 0 else 128
        moved = call(aten.add.Tensor, node, codes, float(shift)) if shift else codes
        moved = call(aten.to.dtype, node, moved, torch.uint8)
        by = self._constant(f"{node.name}_codes", weight)
        zero = self._constant(f"{node.name}_shift", torch.tensor(shift, dtype=torch.uint8))
        sums = call(aten.to.dtype, node, call(OPS.matmul_integer.default, node, moved, by, zero), torch.float32)
        if rows.choice is None or not rows.choice.symmetric or rows.qparams.quant_min >= 0:
            columns = self._constant(f"{node.name}_sums", weight.sum(0, dtype=torch.int32).to(torch.float32))
            sums = call(aten.sub.Tensor, node, sums, call(aten.mul.Tensor, node, zero_point, columns))
        factors = self._constant(f"{node.name}_scale", stored.qparams.scale.to(torch.float32))
        return call(aten.mul.Tensor, node, sums, call(aten.mul.Tensor, node, scale, factors))

    def _weight(self, stored: Quantized, *, transposed: bool = False) -> Node:
        """DequantizeLinear of stored codes; `transposed` those of a linear, as (inputs, outputs)."""
        q, node = stored.qparams, stored.node
        codes, scale = self._codes(stored), q.scale
        if scale is None or q.format or codes.dtype not in _CODES or not stored.integer_zero_point:
            raise no_operator(node)
        zeros = torch.zeros(scale.shape, dtype=torch.int32) if q.zero_point is None else q.zero_point
        axis, block = q.axis or 0, q.group_size or 0
        if block:
            scale, zeros, axis = by_groups(scale, codes), by_groups(zeros, codes), 1
        if transposed:
            codes, axis = codes.T.contiguous(), 1 - axis
            scale, zeros = (v.T.contiguous() if v.ndim > 1 else v for v in (scale, zeros))
        bits = readable_bits(bits_of(stored), codes.shape) if zeros_are_codes(zeros, stored) else 0
        is_float = codes.dtype.is_floating_point
        if not is_float and not zeros_fit(zeros, codes.dtype):
            raise no_operator(node)
        by = self._constant(f"{node.name}_codes", codes), self._constant(f"{node.name}_scale", scale.to(torch.float32))
        has_zeros = not is_float and not is_needless(zeros, block)
        zero_point = self._constant(f"{node.name}_zero_point", zeros.to(codes.dtype)) if has_zeros else None
        values = self._call(OPS.dequantize.default, node, *by, zero_point, axis, block, bits)
        return self._in_dtype(stored, node, values) if transposed else values

    # small things ---------------------------------------------------------------------------------------------

    def _stored(self, node: Node) -> Quantized | None:
        quantized = self.reading.op(node) if ops.is_dequantize(node) else None
        known = quantized is not None and quantized.codes is not None and ops.is_constant(quantized.codes)
        return quantized if known else None

    def _codes(self, stored: Quantized) -> torch.Tensor:
        assert stored.codes is not None
        return ops.constant_value(self.graph, stored.codes).detach()

    def _float(self, node: Node, x: Node) -> Node:
        value = x.meta.get("val")
        is_other = isinstance(value, torch.Tensor) and value.dtype != torch.float32
        return self._call(aten.to.dtype, node, x, torch.float32) if is_other else x

    def _in_dtype(self, quantized: Quantized, node: Node, values: Node) -> Node:
        dtype = quantized.output_dtype
        return values if dtype in (None, torch.float32) else self._call(aten.to.dtype, node, values, dtype)

    def _constant(self, name: str, value: torch.Tensor) -> Node:
        with self.graph.graph.inserting_before(self._at):
            return passes.add_buffer(self.graph, name, value.contiguous())

    def _call(self, target: Any, like: Node, *args: Any) -> Node:
        with self.graph.graph.inserting_before(self._at):
            node = self.graph.graph.call_function(target, args)
        node.meta = {k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace", "custom")}
        return node

    def _replace(self, node: Node, by: Node) -> None:
        if "val" in node.meta:
            by.meta.setdefault("val", node.meta["val"])
        node.replace_all_uses_with(by)
        self.graph.graph.erase_node(node)
