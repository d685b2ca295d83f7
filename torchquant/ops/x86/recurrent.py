"""Recurrent layers with weights of few bits as ops of ours: LSTM, GRU and RNN, several layers, both directions.

What the input makes of the gates is one product for all steps; each step then multiplies the state and computes the
gates.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.fx import ops
from torchquant.fx.reading import GraphReading
from torchquant.fx.rewrites.builder import Builder, apply, is_float32
from torchquant.fx.sites import marked
from torchquant.ops.x86 import few_bits, native, rows
from torchquant.ops.x86.rows import Grid

__all__ = ["Layers", "Recurrent", "read", "replace_recurrent"]

aten = torch.ops.aten
_KINDS = {"lstm.input": 0, "gru.input": 1, "rnn_tanh.input": 2, "rnn_relu.input": 3}  # as `Recurrence` in rows.h
_GATES = (4, 3, 1, 1)
_BITS = 16  # of activations inside the kernel


@dataclass(frozen=True)
class Direction:
    """One direction of a layer: the weights of its input and of its state, with their biases."""

    of_input: Grid
    of_state: Grid
    biases: tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class Layers:
    """A recurrent op: its directions, layer by layer."""

    node: Node
    directions: tuple[Direction, ...]

    @property
    def name(self) -> str:
        """As kernels are counted."""
        return f"recurrent_w{self.directions[0].of_state.bits}a{_BITS}"


class Recurrent:
    """What was replaced: the names of the kernels, and what the sites were marked with, see `fx.sites.mark_sites`."""

    def __init__(self, layers: Layers) -> None:
        self.products, self.sites = [layers.name], [marked(layers.node)]


def read(reading: GraphReading, node: Node) -> Layers | str | None:
    """A recurrent op with weights stored as codes; why no kernel runs it; None for every other op, and one in float."""
    if ops.op_name(node) != "recurrent":
        return None
    own = ops.layer_parameters(node)
    weights = [w for parameters in own for w in parameters[:2]]
    if all(reading.tensor(w) is None for w in weights):
        return None
    if len(own[0]) % 2:
        return "there is no kernel for recurrent layers that project their states"
    if ops.arguments(node)["train"]:
        return "it is in training mode"
    if not is_float32(node.args[0]):
        return "its input is not float32"
    directions = [_direction(reading, parameters) for parameters in own]
    refused = [d for d in directions if isinstance(d, str)]
    return refused[0] if refused else Layers(node, tuple(d for d in directions if isinstance(d, Direction)))


def _direction(reading: GraphReading, parameters: list[Node]) -> Direction | str:
    grids = []
    for weight in parameters[:2]:
        quantized = reading.tensor(weight)
        if quantized is None or quantized.codes is None:
            return "some of its weights are quantized and others not"
        grid = few_bits.grid_of(reading, weight, quantized)
        if isinstance(grid, str):
            return grid
        grids.append(grid)
    if not all(map(ops.is_constant, parameters[2:])):
        return "its bias is computed at run time"
    biases = [ops.constant_value(reading.model, bias) for bias in parameters[2:]]
    return Direction(grids[0], grids[1], (biases[0], biases[1]) if biases else (None, None))


def replace_recurrent(graph: GraphModule) -> list[Recurrent]:
    """Put `native.ops().x86_recurrent` in the place of what it computes; in place."""
    reading = GraphReading(graph)
    found = {n: layers for n in graph.graph.nodes if isinstance(layers := read(reading, n), Layers)}
    if not found:
        return []
    native.load()
    replaced = [Recurrent(layers) for layers in found.values()]
    rule = lambda b, node: _layers(b, found[node]) if node in found else None  # noqa: E731
    apply(graph, {node.target: rule for node in found})
    return replaced


def _layers(b: Builder, layers: Layers) -> tuple[Node, ...]:
    """The output of the last layer, the last states of all and, of an LSTM, the last cells."""
    arguments, kind = ops.arguments(layers.node), _KINDS[ops.overload_of(layers.node)]
    x, time = arguments["input"], 1 if arguments["batch_first"] else 0
    initial: list[Any] = list(arguments["hx"]) if kind == 0 else [arguments["hx"]]
    count = 1 + bool(arguments["bidirectional"])
    last: list[list[Node]] = [[] for _ in initial]
    for layer in range(arguments["num_layers"]):
        outputs = []
        for reverse in range(count):
            index = layer * count + reverse
            begin = [b.call(aten.select.int, states, 0, index) for states in initial]
            out, cell = _direction_of(b, layers, index, x, begin, kind, bool(reverse), bool(time))
            outputs.append(out)
            last[0].append(b.call(aten.select.int, out, time, 0 if reverse else -1))
            if cell is not None:
                last[1].append(cell)
        x = outputs[0] if count == 1 else b.call(aten.cat.default, outputs, 2)
    return x, *(b.call(aten.stack.default, states, 0) for states in last)


def _direction_of(
    b: Builder, layers: Layers, index: int, x: Node, begin: list[Node], kind: int, reverse: bool, batch_first: bool
) -> tuple[Node, Node | None]:
    """All states of one direction of a layer, and of an LSTM its last cell."""
    own, name = layers.directions[index], f"{layers.node.name}_{index}"
    given = b.constant(rows.pack(own.of_input, own.biases[0]), f"{name}_input_packed")
    state = b.constant(rows.pack(own.of_state, own.biases[1]), f"{name}_state_packed")
    outputs = _GATES[kind] * own.of_state.codes.shape[1]
    gates = b.call(native.ops().x86_linear.default, given, x, outputs, _BITS, few_bits.LEAST_SCALE)
    cell = begin[1] if kind == 0 else None
    made = b.call(native.ops().x86_recurrent.default, state, gates, begin[0], cell, kind, batch_first, reverse)
    parts = [b.call(operator.getitem, made, i) for i in range(2 if kind == 0 else 1)]
    return parts[0], parts[1] if kind == 0 else None
