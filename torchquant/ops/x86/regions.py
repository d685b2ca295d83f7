"""Parts of a converted graph that the x86 kernels can run: connected ops on the same samples.

A region holds at least one convolution or linear on quantized inputs, and what their kernels fuse (activations,
additions, requantization), pools and layer norms. Everything else stays with Inductor. Dynamic quantization needs
the range of a whole tensor, while a region runs sample by sample: its source always lies outside the region.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch.fx import GraphModule, Node

from torchquant.fx import ops
from torchquant.fx.reading import GraphReading
from torchquant.ops.x86 import matching
from torchquant.ops.x86.plan import Dynamic, Quantization

_TURNS = ("permute.default", "transpose.int", "movedim.int")  # between images and rows, whatever their shapes
_SPATIAL = ("conv1d", "conv2d", "max_pool2d", "adaptive_avg_pool2d")


class Finder:
    """Which nodes the kernels can run, and how they group."""

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        self.reading = GraphReading(graph)
        self.layout: dict[Node, str] = {}
        self.known: set[Node] = set()
        self.constants: set[Node] = set()

    def regions(self) -> Iterator[list[Node]]:
        """Sets of nodes in topological order that hold a product, no path between two of them leaving the set."""
        for node in self.graph.graph.nodes:
            inputs = matching.tensors_of(node)
            if node.op == "get_attr" or (node.op == "call_function" and inputs and self.constants.issuperset(inputs)):
                self.constants.add(node)
            self._place(node)
        for node in self.graph.graph.nodes:
            if self._supported(node):
                self.known.add(node)
        self._drop_partial()
        self._part()
        yield from self._grouped()

    def grid(self, node: Node) -> Quantization | Dynamic | None:
        """The grid of a quantize or dequantize op, counted as unsigned bytes, or None."""
        return matching.byte_grid(self.reading.op(node))

    def weight(self, node: Any) -> matching.Weight | None:
        """The codes and scales behind what a product multiplies by, where the kernels take them."""
        return matching.weight_of(self.reading, node)

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

    def _place(self, node: Node) -> None:
        """Whether a node's value is an image (n, c, h, w), its pixels (n, h, w, c), or rows (..., c)."""
        name, shape = ops.op_name(node), matching.shape_of(node)
        before = [self.layout[n] for n in node.all_input_nodes if n in self.layout and n not in self.constants]
        if name in (*_SPATIAL, "pad"):
            self.layout[node] = matching.IMAGE
        elif name in ("linear", "layer_norm"):
            self.layout[node] = matching.PIXELS if before[:1] == [matching.PIXELS] else matching.ROWS
        elif ops.overload_of(node) in matching.RESHAPES or name == "mean":
            image = len(shape) == 4 and (tuple(shape[2:]) == (1, 1) or self._leads_to_image(node))
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
                inner = ops.op_name(user) in ("linear", "layer_norm") or Finder._keeps_layout(user)
                if inner and user not in seen and len(seen) < 64:
                    seen.add(user)
                    work.append(user)
        return False

    def key(self, node: Node) -> tuple[Any, ...]:
        """The sizes that count samples: two values of a region have the same."""
        shape = matching.shape_of(node)
        return tuple(shape[:-1]) if self.layout.get(node) == matching.ROWS else tuple(shape[:1])

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
        if not matching.is_float32(node) or not self._agrees(node):
            return False
        name = ops.op_name(node)
        test = getattr(self, f"_can_{name}", None)
        if test is not None:
            return bool(test(node))
        if name in matching.ACTIVATIONS:
            return matching.activation_of(node) is not None
        if ops.overload_of(node) in matching.ALIASES:
            return (
                matching.shape_of(node) == matching.shape_of(node.all_input_nodes[0])
                and not ops.arguments(node).get("train", False)
                and "memory_format" not in node.kwargs
            )
        if ops.overload_of(node) in matching.RESHAPES:
            return self._can_flatten(node)
        return self._turns(node)

    def _agrees(self, node: Node) -> bool:
        """Whether the inputs are laid out as the node is; `mean`, reshapes and turns look for themselves."""
        if ops.op_name(node) == "mean" or ops.overload_of(node) in matching.RESHAPES or self._turns(node):
            return True
        given = [n for n in node.all_input_nodes if n not in self.constants]
        return all(self.layout.get(n) == self.layout[node] for n in given)

    def _turns(self, node: Node) -> bool:
        """Whether a node only calls an image pixels or pixels an image."""
        before = self.layout.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        return before != self.layout[node] == matching.turned(node, before)

    def _product(self, node: Node) -> matching.Weight | None:
        given = ops.arguments(node)
        source, weight = matching.quantize_behind(given["input"]), self.weight(given["weight"])
        if source is None or given["input"] not in self.known or weight is None:
            return None
        bias = given.get("bias")
        if bias is not None and not (isinstance(bias, Node) and ops.is_constant(bias)):
            return None
        terms = weight.codes[0].numel()
        return weight if terms * 255 * 128 < matching.ACCUMULATOR else None

    def _can_conv2d(self, node: Node) -> bool:
        weight = self._product(node)
        if weight is None or matching.window_of(node) is None:
            return False
        unbatched = len(matching.shape_of(node)) != weight.codes.dim()
        return not unbatched and self.layout.get(node.all_input_nodes[0]) == matching.IMAGE

    _can_conv1d = _can_conv2d

    def _can_linear(self, node: Node) -> bool:
        return self._product(node) is not None and self.layout.get(node.all_input_nodes[0]) != matching.IMAGE

    def _can_add(self, node: Node) -> bool:
        if ops.arguments(node).get("alpha", 1) != 1 or not all(isinstance(a, Node) for a in node.args[:2]):
            return False
        pair: list[Any] = list(node.args[:2])
        same = all(matching.shape_of(a) == matching.shape_of(node) for a in pair)
        return same and all(matching.is_float32(a) and a not in self.constants for a in pair)

    def _can_mul(self, node: Node) -> bool:
        """Of the same shape, of an image by one number a channel, or of a product's results by constants."""
        if self._scales_product(node):
            return True
        if not all(isinstance(a, Node) for a in node.args[:2]):
            return False
        pair: list[Any] = list(node.args[:2])
        if not all(matching.is_float32(a) and a not in self.constants for a in pair):
            return False
        shapes = [matching.shape_of(a) for a in pair]
        if shapes[0] == shapes[1] == matching.shape_of(node):
            return True
        gate = [s for s in shapes if s != matching.shape_of(node)]
        return (
            self.layout[node] == matching.IMAGE and len(gate) == 1 and gate[0] == (*matching.shape_of(node)[:2], 1, 1)
        )

    def _scales_product(self, node: Node) -> bool:
        """Whether the constants of a multiplication can be multiplied into the scales of the product in front of it."""
        found = matching.factor_of(self.graph, node)
        if found is None:
            return False
        source, factor = found
        layout, shape = self.layout[node], matching.shape_of(node)
        channels = shape[1] if layout == matching.IMAGE else shape[-1]
        if matching.channels_of(factor, int(channels), layout, len(shape)) is None:
            return False
        while source in self.known and len(source.users) == 1:
            if ops.op_name(source) in matching.PRODUCTS:
                return True
            if ops.op_name(source) == "mul":
                return self._scales_product(source)
            if not (self._turns(source) or ops.overload_of(source) in matching.ALIASES):
                return False
            source = source.all_input_nodes[0]
        return False

    def _can_adaptive_avg_pool2d(self, node: Node) -> bool:
        return (
            len(matching.shape_of(node)) == 4
            and tuple(matching.shape_of(node)[2:]) == (1, 1)
            and matching.static(matching.shape_of(node.args[0])[1:])
        )

    def _can_mean(self, node: Node) -> bool:
        given = ops.arguments(node)
        source, dims = given["self"], given.get("dim")
        layout = self.layout.get(source)
        if given.get("dtype") is not None or len(matching.shape_of(source)) != 4 or layout == matching.ROWS:
            return False
        if layout == matching.PIXELS and given.get("keepdim"):
            return False
        return (
            isinstance(dims, (list, tuple))
            and sorted(d % 4 for d in dims) == ([2, 3] if layout == matching.IMAGE else [1, 2])
            and matching.static(matching.shape_of(source)[1:])
        )

    def _can_max_pool2d(self, node: Node) -> bool:
        return (
            ops.overload_of(node) == "max_pool2d.default"
            and len(matching.shape_of(node)) == 4
            and matching.window_of(node) is not None
        )

    def _can_pad(self, node: Node) -> bool:
        """In front of convolutions alone, which read the zeros as their own padding."""
        if matching.padding_of(node) is None or len(matching.shape_of(node)) != 4:
            return False
        for user in node.users:
            if not ops.is_quantize(user):
                return False
            for read in user.users:
                if not all(ops.op_name(u) in matching.CONVOLUTIONS for u in read.users):
                    return False
        return True

    def _can_layer_norm(self, node: Node) -> bool:
        given = ops.arguments(node)
        if ops.overload_of(node) != "layer_norm.default" or list(given["normalized_shape"]) != [
            matching.shape_of(node)[-1]
        ]:
            return False
        return all(given.get(k) is None or ops.is_constant(given[k]) for k in ("weight", "bias"))

    def _can_flatten(self, node: Node) -> bool:
        """(n, c, 1, 1) as (n, c), the other way, either by way of (n, c, 1), or no change of shape."""
        source = ops.argument(node, 0)
        if source is None:
            return False
        before, after = matching.shape_of(source), matching.shape_of(node)
        if before == after:
            return self.layout[source] == self.layout[node]
        long, short = sorted((before, after), key=len, reverse=True)
        images = all(self.layout[n] == matching.IMAGE for n in (source, node) if len(matching.shape_of(n)) > 2)
        ones = {*long[2:], *short[2:]} == {1} and len(long) <= 4
        return images and ones and len(short) >= 2 and long[:2] == short[:2]

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
                lost = lost or (name == "mul" and not self._can_mul(node)) or self._enters(node)
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
        for made in (node, *matching.qparams_nodes(self.reading.op(node))[1:]):
            yield from made.users

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
