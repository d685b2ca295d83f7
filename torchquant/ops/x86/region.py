"""One region of a converted graph, and what the steps of its plan have made of the values of its nodes."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from torchquant.fx import ops
from torchquant.ops.x86 import matching, transposed
from torchquant.ops.x86.plan import Dynamic, Plan, Quantization, Step, Value
from torchquant.ops.x86.regions import Finder

__all__ = ["Made", "Region"]


@dataclass
class Made:
    """The forms in which the steps so far have stored a node's value: as floats, and as bytes on each grid."""

    number: Value | None = None
    bytes: dict[Quantization | Dynamic, Value] = field(default_factory=dict)


class Region:
    """Nodes that become one plan.

    Attributes:
        nodes: in graph order; `inputs` are read from outside, `outputs` are read outside.
        made: of each node's value so far.
        done: nodes that a step in front of them computes too.
        products: weight and bias of each step that is a product.
    """

    def __init__(self, finder: Finder, nodes: list[Node]) -> None:
        self.finder, self.graph, self.layouts = finder, finder.graph, finder.layout
        order = {n: i for i, n in enumerate(self.graph.graph.nodes)}
        self.nodes = sorted(nodes, key=order.__getitem__)
        self.inside = set(nodes)
        self.constants = finder.constants
        self.plan = Plan()
        self.made: dict[Node, Made] = {}
        self.inputs: list[Node] = []
        self.outputs: list[Node] = []
        self.done: set[Node] = set()
        self.products: dict[Step, tuple[matching.Weight, torch.Tensor]] = {}  # weight and bias of a step
        self.phases: dict[Step, transposed.Phases] = {}  # of a step whose blocks of channels become pixels

    def size(self, node: Node) -> tuple[int, int, int]:
        """h, w, c of a node's value for one sample."""
        shape = matching.shape_of(node)
        if len(shape) > 2 and self.layouts[node] == matching.IMAGE:
            return matching.image_size(shape)
        if self.layouts[node] == matching.PIXELS:
            h, w, c = map(int, shape[1:])
            return h, w, c
        return 1, 1, int(shape[-1])

    def import_input(self, index: int, node: Node) -> None:
        """Make a caller's tensor a value; images are rearranged, and quantized if nothing else reads them."""
        h, w, c = self.size(node)
        outer = Value(h, w, c, external=("input", index))
        forms = self.made[node] = Made()
        image = h * w > 1 and self.layouts[node] == matching.IMAGE
        if not image and c % 16 == 0:
            forms.number = outer
            return
        quantizes, others = self.readers_of(node)
        grids = {self.grid(q) for q in quantizes}
        kind = "import" if image else "elementwise"
        if len(grids) == 1 and not others and kind == "import":
            grid = next(iter(grids))
            value = Value(h, w, c, grid, narrow=c <= 4 and all(self._feeds_convolutions(q) for q in quantizes))
            self.plan.steps.append(Step("import", outer, out_byte=value, label=node.name))
            forms.bytes[grid] = value
            return
        forms.number = Value(h, w, c)
        self.plan.steps.append(Step(kind, outer, out_float=forms.number, label=node.name))

    def _feeds_convolutions(self, quantize: Node) -> bool:
        readers = [u for d in quantize.users for u in d.users]
        return all(ops.op_name(r) in matching.CONVOLUTIONS and ops.arguments(r).get("groups", 1) == 1 for r in readers)

    def export_output(self, index: int, node: Node) -> None:
        """Rows are written by the step that makes them; images are rearranged."""
        source = self.number(node)
        h, w, c = source.h, source.w, source.c
        outer = Value(h, w, c, external=("output", index))
        if h * w > 1 and self.layouts[node] == matching.IMAGE:
            self.plan.steps.append(Step("export", source, out_float=outer, label=node.name))
            return
        makers = [s for s in self.plan.steps if s.out_float is source and s.kind != "import"]
        read = any(source in s.reads() for s in self.plan.steps)
        if makers and source.external is None and (c % 16 == 0 or not read):
            source.external = ("output", index)
            return
        self.plan.steps.append(Step("elementwise", source, out_float=outer, label=node.name))

    def number(self, node: Node) -> Value:
        """A node's value as floats."""
        node = self.origin(node)
        forms = self.made[node]
        if forms.number is None:
            source = next(iter(forms.bytes.values()))
            forms.number = Value(source.h, source.w, source.c)
            self.plan.steps.append(Step("elementwise", source, out_float=forms.number, label=node.name))
        return forms.number

    def bytes_of(self, quantize: Node) -> Value:
        """The output of a quantize op, as bytes."""
        grid = self.grid(quantize)
        node = self.origin(quantize.args[0])
        forms = self.made[node]
        if grid not in forms.bytes:
            source = self.number(node)
            forms.bytes[grid] = Value(source.h, source.w, source.c, grid)
            self.plan.steps.append(Step("elementwise", source, out_byte=forms.bytes[grid], label=quantize.name))
        return forms.bytes[grid]

    def bytes_or_floats(self, node: Any) -> Value:
        """A value as bytes if it is there as such alone, else as floats."""
        forms = self.made[self.origin(node)]
        if forms.number is None and len(forms.bytes) == 1:
            value = next(iter(forms.bytes.values()))
            if not value.narrow:
                return value
        return self.number(node)

    def grid(self, quantize: Node) -> Quantization | Dynamic:
        """The grid of a quantize op; of a dynamic one with the place of its source among the region's inputs."""
        grid = self.finder.grid(quantize)
        assert grid is not None
        if isinstance(grid, Dynamic):
            return replace(grid, input=self.inputs.index(quantize.all_input_nodes[0]))
        return grid

    def bias(self, product: Node, channels: int) -> torch.Tensor:
        """One number for each of a product's channels, or of the channels of all phases."""
        bias, phases = ops.arguments(product).get("bias"), transposed.phases_of(product)
        if bias is None:
            return torch.zeros(channels).double()
        value = ops.constant_value(self.graph, bias).double()
        return value if phases is None else phases.spread(value)

    def origin(self, node: Any) -> Node:
        """The node that made a value, behind ops that change nothing about it here."""
        while node in self.inside and (self.is_alias(node) or ops.op_name(node) == "pad"):
            node = node.args[0]
        return node

    @staticmethod
    def is_choice(node: Node) -> bool:
        """Whether a node makes the scale and zero point of dynamic quantization, which the runtime does itself."""
        return ops.qdq_name(node).startswith("choose_qparams") or node.target is operator.getitem

    @staticmethod
    def is_alias(node: Node) -> bool:
        return ops.overload_of(node) in (*matching.ALIASES, *matching.RESHAPES, matching.TURN)

    def only_user(self, node: Node) -> Node | None:
        if node in self.outputs or len(node.users) != 1:
            return None
        user = next(iter(node.users))
        return user if user in self.inside and user not in self.done else None

    def readers_of(self, node: Node) -> tuple[list[Node], bool]:
        """The quantize ops that read a value, and whether anything else does."""
        quantizes, others, work = [], node in self.outputs, list(node.users)
        while work:
            user = work.pop(0)
            if user not in self.inside:
                continue
            if self.is_alias(user) or ops.op_name(user) == "pad":
                others = others or user in self.outputs
                work += user.users
            elif ops.is_quantize(user):
                quantizes.append(user)
            elif not self.is_choice(user):
                others = True
        return quantizes, others
