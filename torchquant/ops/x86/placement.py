"""How the values of a converted graph lie in memory where the x86 kernels run them: images, their pixels, rows."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from torchquant.fx import ops
from torchquant.fx.reading import GraphReading
from torchquant.ops.x86 import matching, transposed
from torchquant.ops.x86.plan import Dynamic, Quantization

__all__ = ["Placement"]

_SPATIAL = ("conv1d", "conv2d", *transposed.NAMES, "max_pool2d", "adaptive_avg_pool2d")


class Placement:
    """A graph read: the grids of its values, and their layouts once `place` was called for each node in order.

    Attributes:
        layout: of each node's value: `matching.IMAGE`, `PIXELS` or `ROWS`.
        known: nodes that the kernels run.
        constants: nodes that depend on no input.
    """

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        self.reading = GraphReading(graph)
        self.layout: dict[Node, str] = {}
        self.known: set[Node] = set()
        self.constants: set[Node] = set()

    def grid(self, node: Node) -> Quantization | Dynamic | None:
        """The grid of a quantize or dequantize op, counted as unsigned bytes, or None."""
        return matching.byte_grid(self.reading.op(node))

    def weight(self, product: Node) -> matching.Weight | None:
        """The codes and scales of what a product multiplies by, where the kernels take them."""
        return matching.factors_of(self.reading, product)

    def place(self, node: Node) -> None:
        """Whether a node's value is an image (n, c, h, w), its pixels (n, h, w, c), or rows (..., c)."""
        name, shape = ops.op_name(node), matching.shape_of(node)
        before = [self.layout[n] for n in node.all_input_nodes if n in self.layout and n not in self.constants]
        if name in (*_SPATIAL, "pad"):
            self.layout[node] = matching.IMAGE
        elif name in ("linear", "layer_norm"):
            self.layout[node] = matching.PIXELS if before[:1] == [matching.PIXELS] else matching.ROWS
        elif ops.overload_of(node) in matching.RESHAPES or name == "mean":
            image = len(shape) == 4 and (tuple(shape[2:]) == (1, 1) or self._leads_to_image(node))
            image = image or (len(shape) == 3 and self._is_convolved(node))
            self.layout[node] = matching.IMAGE if image or self._half_unsqueezed(node) else matching.ROWS
        else:
            layout = matching.turned(node, before[0]) if before else None
            if layout == matching.IMAGE or (layout is not None and self._turns_back(node)):
                self.layout[node] = layout
            elif before and self._keeps_layout(node):
                self.layout[node] = before[0]
            elif len(shape) in (3, 4) and self._leads_to_image(node):
                self.layout[node] = matching.IMAGE
            else:
                self.layout[node] = matching.ROWS

    @staticmethod
    def _keeps_layout(node: Node) -> bool:
        """Whether an op computes element by element; what others make is told by what reads it."""
        elementwise = ops.op_name(node) in (*matching.ACTIVATIONS, "add", "mul")
        return elementwise or bool(ops.qdq_name(node)) or ops.overload_of(node) in matching.ALIASES

    def _leads_to_image(self, node: Node) -> bool:
        """Whether the first op behind the elementwise ops that follow takes images."""
        seen, work = {node}, [node]
        while work:
            for user in work.pop().users:
                name = ops.op_name(user)
                if name in _SPATIAL:
                    return True
                if name not in ("linear", "layer_norm") and user not in seen and len(seen) < 64:
                    seen.add(user)
                    work.append(user)
        return False

    @staticmethod
    def _is_convolved(node: Node) -> bool:
        """Whether a convolution over a length reads a value, elementwise ops between them."""
        work = [node]
        while work:
            for user in work.pop().users:
                if ops.op_name(user) in ("conv1d", "conv_transpose1d"):
                    return True
                if Placement._keeps_layout(user) and len(work) < 64:
                    work.append(user)
        return False

    @staticmethod
    def _half_unsqueezed(node: Node) -> bool:
        """Whether (n, c, 1) only becomes (n, c, 1, 1), as `x[:, :, None, None]` does in two steps."""
        after = [matching.shape_of(user) for user in node.users if ops.overload_of(user) in matching.RESHAPES]
        shape = matching.shape_of(node)
        return len(shape) == 3 and len(after) == len(node.users) and all(a == (*shape[:2], 1, 1) for a in after)

    @staticmethod
    def _turns_back(node: Node) -> bool:
        """Whether pixels become an image again behind linears, norms and elementwise ops: else they are but rows."""
        seen, work = {node}, [node]
        while work:
            for user in work.pop().users:
                if matching.turned(user, matching.PIXELS) is not None:
                    return True
                inner = ops.op_name(user) in ("linear", "layer_norm") or Placement._keeps_layout(user)
                if inner and user not in seen and len(seen) < 64:
                    seen.add(user)
                    work.append(user)
        return False

    def key(self, node: Node) -> tuple[Any, ...]:
        """The sizes that count samples: two values of a region have the same."""
        shape = matching.shape_of(node)
        return tuple(shape[:-1]) if self.layout.get(node) == matching.ROWS else tuple(shape[:1])

    def agrees(self, node: Node) -> bool:
        """Whether the inputs are laid out as the node is; `mean`, reshapes and turns look for themselves."""
        if ops.op_name(node) == "mean" or ops.overload_of(node) in matching.RESHAPES or self.turns(node):
            return True
        inputs = [n for n in node.all_input_nodes if n not in self.constants]
        return all(self.layout.get(n) == self.layout[node] for n in inputs)

    def turns(self, node: Node) -> bool:
        """Whether a node only calls an image pixels or pixels an image."""
        before = self.layout.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        return before != self.layout[node] == matching.turned(node, before)
