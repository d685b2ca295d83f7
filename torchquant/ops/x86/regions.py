"""Parts of a converted graph that the x86 kernels can run: connected ops on the same samples.

A region holds at least one convolution or linear on quantized inputs, and what their kernels fuse (activations,
additions, requantization), pools and layer norms. Everything else stays with Inductor. Dynamic quantization needs
the range of a whole tensor, while a region runs sample by sample: its source always lies outside the region.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch.fx import Node

from torchquant.fx import ops
from torchquant.ops.x86 import matching
from torchquant.ops.x86.placement import Placement
from torchquant.ops.x86.plan import Dynamic
from torchquant.ops.x86.support import is_run, multiplication


class Finder(Placement):
    """Which nodes the kernels can run, and how they group."""

    def regions(self) -> Iterator[list[Node]]:
        """Sets of nodes in topological order that hold a product, no path between two of them leaving the set."""
        for node in self.graph.graph.nodes:
            inputs = matching.tensors_of(node)
            if node.op == "get_attr" or (node.op == "call_function" and inputs and self.constants.issuperset(inputs)):
                self.constants.add(node)
            self.place(node)
        for node in self.graph.graph.nodes:
            if self._supported(node):
                self.known.add(node)
        self._drop_partial()
        self._part()
        yield from self._grouped()

    def _part(self) -> None:
        """Give the products of others quantize and dequantize ops of their own, in front of which a region ends.

        Inductor has an int8 kernel only for a product that it sees on quantized values.
        """
        for node in list(self.graph.graph.nodes):
            read = node.args[0] if ops.op_name(node) in matching.PRODUCTS and node not in self.known else None
            if not isinstance(read, Node) or read not in self.known or not ops.is_dequantize(read):
                continue
            quantize = matching.quantize_behind(read)
            assert quantize is not None
            with self.graph.graph.inserting_before(node):
                codes = self.graph.graph.node_copy(quantize)
                values = self.graph.graph.node_copy(read, lambda n, q=quantize, c=codes: c if n is q else n)  # type: ignore[misc]
            node.replace_input_with(read, values)
            for old, new in ((read, values), (quantize, codes)):
                self.layout[new] = self.layout[old]
                if not old.users:
                    self.known.discard(old)
                    self.graph.graph.erase_node(old)

    def _supported(self, node: Node) -> bool:
        if node.op != "call_function" or node in self.constants:
            return False
        shape = matching.shape_of(node)
        inner = shape[-1:] if self.layout.get(node) == matching.ROWS else shape[1:]
        if not shape or len(shape) < 2 or not matching.static(inner) or 0 in inner:
            return False
        if ops.is_quantize(node):
            source = ops.argument(node, 0)
            return (
                self.grid(node) is not None
                and source is not None
                and matching.is_float32(source)
                and all(ops.is_dequantize(u) for u in node.users)
            )
        if ops.is_dequantize(node):
            source, grid = matching.quantize_behind(node), self.grid(node)
            if isinstance(grid, Dynamic) and not all(ops.op_name(u) == "linear" for u in node.users):
                return False
            return source in self.known and grid == self.grid(source)
        if not matching.is_float32(node) or not self.agrees(node):
            return False
        return is_run(self, node)

    def _drop_partial(self) -> None:
        """Pads whose convolutions the kernels do not run leave with what they feed, and what Inductor does as well."""
        changed = True
        while changed:
            changed = False
            for node in list(self.known):
                name = ops.op_name(node)
                lost = name == "pad" and not all(u in self.known for u in self._readers(node))
                lost = lost or (ops.is_dequantize(node) and matching.quantize_behind(node) not in self.known)
                lost = lost or (ops.is_quantize(node) and not self.known.issuperset(node.users))
                lost = lost or (self._is_dynamic(node) and not self.known.issuperset(self._qparams_readers(node)))
                lost = lost or (name == "mul" and not multiplication(self, node)) or self._enters(node)
                if name in matching.PRODUCTS:
                    lost = lost or node.all_input_nodes[0] not in self.known
                if lost:
                    self.known.discard(node)
                    changed = True

    def _enters(self, node: Node) -> bool:
        """Whether an elementwise op on images reads no image of ours: Inductor fuses it with what makes its inputs.

        The bytes that are read behind it are then made at once, where the image is rearranged.
        """
        elementwise = ops.op_name(node) in (*matching.ACTIVATIONS, "add", "mul")
        shape = matching.shape_of(node)
        if not elementwise or self.layout[node] != matching.IMAGE or set(shape[2:]) == {1}:
            return False
        return self.known.isdisjoint(n for n in node.all_input_nodes if matching.shape_of(n) == shape)

    def _is_dynamic(self, node: Node) -> bool:
        """Whether a quantize op or the dequantize op behind it has the range of a whole tensor."""
        return isinstance(self.grid(node), Dynamic)

    def _qparams_readers(self, node: Node) -> Iterator[Node]:
        """What must be known too: the readers of the scale and zero point, and of what is on that grid."""
        for value in (node, *matching.qparams_nodes(self.reading.op(node))[1:]):
            yield from value.users

    @staticmethod
    def _readers(pad: Node) -> Iterator[Node]:
        for quantize in pad.users:
            for dequantize in quantize.users:
                yield from dequantize.users

    def _grouped(self) -> Iterator[list[Node]]:
        """By level, the number of times a path has left what is known, and connected: so no path leaves and returns."""
        level: dict[Node, int] = {}
        group: dict[Node, Node] = {}
        dynamic: dict[Node, Node] = {}  # for each source the first quantize op: all share one quantization

        def root(node: Node) -> Node:
            while group[node] is not node:
                node = group[node]
            return node

        for node in self.graph.graph.nodes:
            known = node in self.known
            whole = known and ops.is_quantize(node) and self._is_dynamic(node)
            least = 0
            for before in matching.tensors_of(node):
                if before not in self.constants:
                    left = known and (whole or before not in self.known or self.key(before) != self.key(node))
                    least = max(least, level[before] + left)
            level[node] = least
            if not known:
                continue
            group[node] = node
            for before in matching.tensors_of(node):
                if before in group and level[before] == least and self.key(before) == self.key(node):
                    group[root(before)] = root(node)
            if whole:
                group[root(dynamic.setdefault(node.all_input_nodes[0], node))] = root(node)
        members: dict[Node, list[Node]] = defaultdict(list)
        for node in group:
            members[root(node)] += [
                node,
                *(matching.qparams_nodes(self.reading.op(node)) if ops.is_quantize(node) else ()),
            ]
        for nodes in members.values():
            if any(ops.op_name(n) in matching.PRODUCTS for n in nodes):
                yield list(dict.fromkeys(nodes))
