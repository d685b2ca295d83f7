"""A rotation folded into the constants around a space of features (see `torchquant.fx.spaces`).

x <- x R            the values of the space                    R (size, size) orthogonal, the same for each chunk
W <- Rᵀ W, b <- b R    layers that make them, along their outputs; tables and constants t <- t R
W <- W R               layers that read them, along their inputs
y = n(x) g + c      a normalization: n(x R) = n(x) R, so layers behind it take W <- W diag(g) R, b <- b + W c, and it
                    is left with g = 1, c = 0
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torchquant.algorithms.channels import folding
from torchquant.fx import ops
from torchquant.fx.norms import Norm
from torchquant.fx.producers import LAYERS
from torchquant.fx.reading import observer_of
from torchquant.fx.sites import note
from torchquant.fx.spaces import Space, Writer

__all__ = ["Branch", "Edits", "Tie", "rotated"]

_AT_ONCE = 1 << 22  # numbers in double precision


@dataclass(frozen=True)
class Branch:
    """A normalization of values of a space, and the layers that read it."""

    norm: Norm
    readers: tuple[Node, ...]


@dataclass
class _Edit:
    """What becomes of the constants of one op: rotated along windows of its outputs, and along its inputs."""

    outputs: list[Writer] = field(default_factory=list)
    inputs: bool = False
    norm: Norm | None = None


@dataclass(frozen=True)
class Tie:
    """Ops that share a weight which the rotation would make different for each: a table and a head.

    Args:
        tables: lookups. layers: the others. norm: whose gain makes the difference, or None if something else does.
    """

    tables: tuple[Node, ...]
    layers: tuple[Node, ...]
    norm: Norm | None


class Edits:
    """The rotation of one space, to be made at once.

    Args:
        model: a prepared graph. space: without a reason against. branches: of its normalizations.
        rotation: (size, size) float64.
    """

    def __init__(self, model: GraphModule, space: Space, branches: Iterable[Branch], rotation: Tensor) -> None:
        self._model, self._space, self._rotation = model, space, rotation
        self._norms = {branch.norm: branch for branch in branches}
        self._kept: set[Norm] = set()  # whose gain stands in front of the rotation
        self._edits: dict[Node, _Edit] = {}
        for writer in space.writers:
            self._edits.setdefault(writer.node, _Edit()).outputs.append(writer)
        for reader in space.readers:
            self._edits.setdefault(reader, _Edit()).inputs = True
        for branch in self._norms.values():
            for reader in branch.readers:
                edit = self._edits.setdefault(reader, _Edit())
                edit.inputs, edit.norm = True, branch.norm

    def ties(self) -> list[Tie]:
        """The weights that would no longer be one for all ops that read them."""
        readers: dict[object, list[Node]] = {}
        for node in self._model.graph.nodes:
            if source := _weight_source(self._model, node):
                readers.setdefault(source, []).append(node)
        return [_tie(self._edits, nodes) for nodes in readers.values() if self._differ(nodes)]

    def _differ(self, nodes: list[Node]) -> bool:
        edits = [self._edits.get(n) for n in nodes]
        if len(nodes) < 2 or not any(edits):
            return False
        first = self._key(nodes[0])
        return any(self._key(n) != first for n in nodes[1:])

    def _key(self, node: Node) -> tuple[object, ...]:
        """What is done to the weight of an op; equal for equal results."""
        edit = self._edits.get(node)
        if edit is None:
            return ()
        columns = edit.inputs or ops.op_name(node) == "embedding"
        gain = _gain_of(self._model, edit.norm) if edit.norm is not None and edit.norm not in self._kept else None
        gains = None if gain is None or bool((gain == 1).all()) else edit.norm
        rows = () if ops.op_name(node) == "embedding" else tuple((w.start, w.length) for w in edit.outputs)
        return columns, rows, gains

    def keep_gain(self, norm: Norm) -> None:
        """Multiply by Rᵀ diag(g) R behind a normalization instead of folding its gain into the layers."""
        self._kept.add(norm)

    def apply(self) -> None:
        """Change the graph."""
        alike: dict[tuple[object, ...], list[Node]] = {}
        for node, edit in self._edits.items():
            if ops.op_name(node) not in (*LAYERS, "embedding"):
                self._turn_constant(node, edit)
            else:
                alike.setdefault((_weight_source(self._model, node), self._key(node)), []).append(node)
        for nodes in alike.values():
            weight = folding.constant_at(self._model, nodes[0], _place(nodes[0]))
            assert weight is not None
            for node in nodes:
                self._turn_bias(node, self._edits[node], weight)
            self._put(nodes, self._turned(nodes[0], self._edits[nodes[0]], weight).to(weight.dtype))
        for norm in self._norms:
            self._settle(norm)

    def _put(self, nodes: list[Node], weight: Tensor) -> None:
        """Give ops a new weight: one for all if they alone read the old one."""
        sources = dict.fromkeys(ops.argument(n, _place(n)) for n in nodes)
        readers = {u for s in sources if s is not None for u in s.users}
        observed = all(s is not None and observer_of(self._model, s) is not None for s in sources)
        if len(nodes) == 1 or not observed or not readers <= set(nodes):
            for node in nodes:
                folding.set_constant(self._model, node, _place(node), weight)
            return
        first = next(n for n in self._model.graph.nodes if n in sources)
        constant = folding.new_constant(self._model, first, f"{nodes[0].name}_weight", weight)
        for source in sources:
            assert source is not None
            source.update_arg(0, constant)

    def _turned(self, node: Node, edit: _Edit, weight: Tensor) -> Tensor:
        """The new weight of an op."""
        if ops.op_name(node) == "embedding":
            return rotated(weight, -1, self._rotation)
        if edit.norm is not None and edit.norm not in self._kept:
            gain = _gain_of(self._model, edit.norm)
            if gain is not None:
                repeats = weight.shape[1] // len(gain)
                weight = folding.scale_inputs(weight.double(), gain.double().repeat(repeats)).to(torch.float64)
        if edit.inputs:
            weight = rotated(weight, 1, self._rotation)
        for writer in edit.outputs:
            weight = rotated(weight, 0, self._rotation, writer.start, writer.length)
        return weight

    def _turn_bias(self, node: Node, edit: _Edit, weight: Tensor) -> None:
        if ops.op_name(node) == "embedding":
            return
        bias = folding.constant_at(self._model, node, 2)
        offset = _offset_of(self._model, edit.norm) if edit.norm is not None and edit.norm not in self._kept else None
        if offset is not None and bool(offset.any()):
            repeated = offset.double().repeat(weight.shape[1] // len(offset))
            moved = folding.scale_inputs(weight.double(), repeated).flatten(1).sum(1)
            bias = moved if bias is None else bias.double() + moved
        elif bias is None or not edit.outputs:
            return
        for writer in edit.outputs:
            bias = rotated(bias, 0, self._rotation, writer.start, writer.length)
        folding.set_constant(self._model, node, 2, bias)

    def _turn_constant(self, node: Node, edit: _Edit) -> None:
        """Put a rotated constant in the place of one."""
        value = ops.constant_value(self._model, node)
        (writer,) = edit.outputs
        turned = rotated(value, writer.axis, self._rotation).to(value.dtype)
        new = folding.new_constant(self._model, node, f"{node.name}_rotated", turned)
        node.replace_all_uses_with(new)

    def _settle(self, norm: Norm) -> None:
        """Leave a normalization without gain and offset, and multiply behind it where the gain is kept."""
        gain, offset = _gain_of(self._model, norm), _offset_of(self._model, norm)
        if gain is not None and norm.gain is not None:
            folding.set_constant(self._model, norm.result, norm.gain, torch.ones_like(gain))
        if offset is not None and norm.offset is not None:
            folding.set_constant(self._model, norm.result, norm.offset, torch.zeros_like(offset))
        if norm in self._kept:
            assert gain is not None
            self._insert_gain(norm, gain, offset)

    def _insert_gain(self, norm: Norm, gain: Tensor, offset: Tensor | None) -> None:
        """y R = n(x R) Rᵀ diag(g) R + c R, as a float linear behind the normalization."""
        graph, result, turn = self._model.graph, norm.result, self._rotation
        users = list(result.users)
        first = next(n for n in graph.nodes if n in result.users)
        matrix = (turn.T * gain.double()) @ turn  # symmetric
        weight = folding.new_constant(self._model, first, f"{result.name}_gain", matrix.to(gain.dtype))
        bias = None
        if offset is not None and bool(offset.any()):
            shifted = rotated(offset, 0, turn).to(offset.dtype)
            bias = folding.new_constant(self._model, first, f"{result.name}_offset", shifted)
        with graph.inserting_before(first):
            linear = graph.call_function(
                torch.ops.aten.linear.default, (result, weight, *([] if bias is None else [bias]))
            )
        linear.meta = {k: result.meta[k] for k in ("val", "tensor_meta", "nn_module_stack") if k in result.meta}
        note(
            linear, "unsupported", "Rotate: the gain of a normalization, kept in front of a head that shares its weight"
        )
        for user in users:
            user.replace_input_with(result, linear)


def rotated(tensor: Tensor, axis: int, rotation: Tensor, start: int = 0, length: int | None = None) -> Tensor:
    """Chunks of an axis times R, in double precision; all of the axis, or `length` from `start` on."""
    turned = tensor.double().movedim(axis, -1).clone(memory_format=torch.contiguous_format)
    end = turned.shape[-1] if length is None else start + length
    window = turned[..., start:end]
    rows = window.reshape(-1, len(rotation))
    step = max(1, _AT_ONCE // len(rotation))
    parts = [rows[i : i + step] @ rotation for i in range(0, len(rows), step)]
    window.copy_(torch.cat(parts).reshape(window.shape) if parts else window)
    return turned.movedim(-1, axis).contiguous()


def _tie(edits: dict[Node, _Edit], nodes: list[Node]) -> Tie:
    tables = tuple(n for n in nodes if ops.op_name(n) == "embedding")
    layers = tuple(n for n in nodes if n not in tables)
    norms = {edit.norm for n in layers if (edit := edits.get(n)) is not None}
    return Tie(tables, layers, norms.pop() if len(norms) == 1 and all(n in edits for n in nodes) else None)


def _weight_source(model: GraphModule, node: Node) -> object:
    """What ops that share a weight, codes and all, have in common: the observer, or the tensor that they read."""
    name = ops.op_name(node)
    source = ops.argument(node, 0 if name == "embedding" else 1) if name in (*LAYERS, "embedding") else None
    if source is None:
        return None
    observer = observer_of(model, source)
    if observer is not None:
        return observer
    return (str(source.target),) if source.op == "get_attr" else source


def _place(node: Node) -> int:
    """The position of an op's weight."""
    return 0 if ops.op_name(node) == "embedding" else 1


def _gain_of(model: GraphModule, norm: Norm) -> Tensor | None:
    return None if norm.gain is None else folding.constant_at(model, norm.result, norm.gain)


def _offset_of(model: GraphModule, norm: Norm) -> Tensor | None:
    return None if norm.offset is None else folding.constant_at(model, norm.result, norm.offset)
