"""Recurrent cells and layers, step by step, as products and elementwise ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from torchquant.backends.executorch_xnnpack.values import is_float32
from torchquant.fx import ops
from torchquant.fx.rewrites.builder import Builder

aten = torch.ops.aten


def _gates(b: Builder, x: Node, weight: Any, bias: Any, gates: int) -> list[Node] | None:
    """A linear, gate by gate: as one it would have to be sliced, which the delegate does for fixed sizes only."""
    if not isinstance(weight, Node) or not ops.is_constant(weight) or (bias is not None and not ops.is_constant(bias)):
        return None
    weights = ops.constant_value(b.model, weight).chunk(gates)
    biases = [None] * gates if bias is None else ops.constant_value(b.model, bias).chunk(gates)
    outputs = []
    for i, (rows, offsets) in enumerate(zip(weights, biases, strict=True)):
        name = f"{weight.name}_gate_{i}"
        parameters = [b.constant(rows.contiguous(), name)]
        parameters += [] if offsets is None else [b.constant(offsets.contiguous(), f"{name}_bias")]
        outputs.append(b.call(aten.linear.default, x, *parameters))
    return outputs


def _both_gates(b: Builder, node: Node, x: Node, h: Node, gates: int) -> tuple[list[Node], list[Node]] | None:
    arguments = ops.arguments(node)
    if not is_float32(x, 2) or not is_float32(h, 2):
        return None
    of_x = _gates(b, x, arguments["w_ih"], arguments.get("b_ih"), gates)
    of_h = _gates(b, h, arguments["w_hh"], arguments.get("b_hh"), gates)
    return None if of_x is None or of_h is None else (of_x, of_h)


def gru_cell(b: Builder, node: Node) -> Node | None:
    """One step of a GRU."""
    arguments = ops.arguments(node)
    gates = _both_gates(b, node, arguments["input"], arguments["hx"], 3)
    return None if gates is None else _gru_step(b, gates[0], gates[1], arguments["hx"])


def _gru_step(b: Builder, of_x: Sequence[Node], of_h: Sequence[Node], h: Node) -> Node:
    """(h - n) z + n with r, z = sigmoid(x' + h'), n = tanh(x' + r h')."""
    r = b.call(aten.sigmoid.default, b.call(aten.add.Tensor, of_x[0], of_h[0]))
    z = b.call(aten.sigmoid.default, b.call(aten.add.Tensor, of_x[1], of_h[1]))
    n = b.call(aten.tanh.default, b.call(aten.add.Tensor, of_x[2], b.call(aten.mul.Tensor, r, of_h[2])))
    return b.call(aten.add.Tensor, b.call(aten.mul.Tensor, b.call(aten.sub.Tensor, h, n), z), n)


def gru(b: Builder, node: Node) -> tuple[Node, ...] | None:
    """A GRU step by step, layer by layer; torch's own form of it would fix the size of the batch."""
    arguments = ops.arguments(node)
    x, hx, parameters = arguments["input"], arguments["hx"], list(arguments["params"])
    time = 1 if arguments["batch_first"] else 0
    if not is_float32(x, 3) or not is_float32(hx, 3) or arguments["train"] or not isinstance(_size(x, time), int):
        return None
    if not all(ops.is_constant(p) for p in parameters):
        return None
    directions, each = 1 + bool(arguments["bidirectional"]), 4 if arguments["has_biases"] else 2
    last = []
    for layer in range(arguments["num_layers"]):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            own = parameters[each * index : each * (index + 1)]
            steps = _gru_steps(b, x, b.call(aten.select.int, hx, 0, index), own, time, bool(direction))
            last.append(steps[0 if direction else -1])
            outputs.append(b.call(aten.stack.default, steps, time))
        x = outputs[0] if directions == 1 else b.call(aten.cat.default, outputs, 2)
    return x, b.call(aten.stack.default, last, 0)


def _gru_steps(b: Builder, x: Node, h: Node, parameters: Sequence[Node], time: int, backwards: bool) -> list[Node]:
    """The hidden states of one direction of a layer, in the order of time."""
    w_x, w_h, *biases = parameters
    b_x, b_h = biases or (None, None)
    of_x = _gates(b, x, w_x, b_x, 3) or []
    order = range(_size(x, time))
    states = []
    for t in reversed(order) if backwards else order:
        h = _gru_step(b, [b.call(aten.select.int, g, time, t) for g in of_x], _gates(b, h, w_h, b_h, 3) or [], h)
        states.append(h)
    return states[::-1] if backwards else states


def _size(node: Node, axis: int) -> Any:
    return node.meta["val"].shape[axis]


def lstm_cell(b: Builder, node: Node) -> tuple[Node, ...] | None:
    """c' = f c + i g and h' = o tanh(c') with i, f, o = sigmoid(x' + h'), g = tanh(x' + h')."""
    arguments = ops.arguments(node)
    h, c = arguments["hx"]
    gates = _both_gates(b, node, arguments["input"], h, 4)
    if gates is None or not is_float32(c, 2):
        return None
    sums = [b.call(aten.add.Tensor, of_x, of_h) for of_x, of_h in zip(*gates, strict=True)]
    i, f, o = (b.call(aten.sigmoid.default, sums[k]) for k in (0, 1, 3))
    kept = b.call(aten.mul.Tensor, f, c)
    c = b.call(aten.add.Tensor, kept, b.call(aten.mul.Tensor, i, b.call(aten.tanh.default, sums[2])))
    return b.call(aten.mul.Tensor, o, b.call(aten.tanh.default, c)), c


def rnn_cell(b: Builder, node: Node) -> Node | None:
    """tanh(x' + h') or relu(x' + h')."""
    arguments = ops.arguments(node)
    gates = _both_gates(b, node, arguments["input"], arguments["hx"], 1)
    if gates is None:
        return None
    activation = aten.tanh.default if node.target is aten.rnn_tanh_cell.default else aten.relu.default
    return b.call(activation, b.call(aten.add.Tensor, gates[0][0], gates[1][0]))
