"""Regions of a converted graph translated to plans, each put back as one op."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import GraphModule, Node

from torchquant.fx import ops
from torchquant.fx.passes import fresh_name
from torchquant.fx.sites import marked
from torchquant.ops.x86 import matching, native
from torchquant.ops.x86 import plan as plans
from torchquant.ops.x86.plan import Dynamic, Plan, Quantization, Step, Value
from torchquant.ops.x86.regions import Finder

__all__ = ["Built", "replace_regions"]

_FINITE = 1e30  # a bound far enough from infinity for what float32 rounds on the way
_MOST_KEYS = 4096  # of attention; beyond, the scores of a few rows leave the cache, and torch's kernel is made for that


@dataclass
class Built:
    """One region as it was built."""

    products: list[str]  # kind of each convolution and linear in it
    plan: Plan
    memory: torch.Tensor = field(repr=False)
    sites: list[str] = field(default_factory=list)  # what its nodes were marked with, see `fx.sites.mark_sites`


def replace_regions(graph: GraphModule) -> list[Built]:
    """Put `torch.ops.torchquant.x86_region` in the place of what the kernels can run; in place.

    Args:
        graph: a converted graph whose nodes all know their values' shapes (`meta["val"]`), and whose ops write into
            nothing that others read (`serialize.functional`).

    Raises:
        LoweringError: the kernels cannot be built or loaded.
    """
    for node in list(graph.graph.nodes):
        if ops.op_name(node) == "_assert_tensor_metadata":
            graph.graph.erase_node(node)
    finder = Finder(graph)
    native.load()
    found, replaced = [], set()
    for nodes in list(finder.regions()):
        built = _Translator(finder, nodes).build()
        if built is not None:
            built.sites = [marked(n) for n in nodes]
            found.append(built)
            replaced |= set(nodes)
    attention = _replace_attention(graph)
    if found or attention:
        for node in reversed(list(graph.graph.nodes)):  # dropout counts as impure, and would keep all before it
            if node in replaced and not node.users:
                graph.graph.erase_node(node)
        stable_topological_sort(graph.graph)
        graph.graph.eliminate_dead_code()
        graph.graph.lint()
        graph.recompile()
    return found


def _replace_attention(graph: GraphModule) -> int:
    """Scaled dot product attention in float32 by our kernel, which takes strided operands; returns how many."""
    found = 0
    for node in list(graph.graph.nodes):
        given = ops.arguments(node)
        if ops.op_name(node) != "attention" or not _attends(node, given):
            continue
        width = matching.shape_of(given["query"])[-1]
        scale = given.get("scale")
        args = (given["query"], given["key"], given["value"], given.get("attn_mask"))
        options = (float(int(width) ** -0.5 if scale is None else scale), bool(given.get("is_causal", False)))
        with graph.graph.inserting_before(node):
            call = graph.graph.call_function(torch.ops.torchquant.x86_attention.default, (*args, *options))
            turned = graph.graph.call_function(torch.ops.aten.transpose.int, (call, 1, 2))
        turned.meta = dict(node.meta)
        node.replace_all_uses_with(turned)
        graph.graph.erase_node(node)
        found += 1
    return found


def _attends(node: Node, given: dict[str, Any]) -> bool:
    """Whether the kernel computes the same: float32, four dimensions, no dropout, not too many keys."""
    shapes = [matching.shape_of(given[k]) for k in ("query", "key", "value")]
    if not all(len(s) == 4 for s in shapes) or not all(
        matching.is_float32(given[k]) for k in ("query", "key", "value")
    ):
        return False
    if given.get("dropout_p", 0.0) or len({s[3] for s in shapes}) != 1 or not isinstance(shapes[0][3], int):
        return False
    if shapes[1][:3] != shapes[2][:3] or shapes[0][0] != shapes[1][0]:
        return False
    keys, heads = shapes[1][2], (shapes[0][1], shapes[1][1])
    if not isinstance(keys, int) or keys > _MOST_KEYS or (heads[0] != heads[1] and not given.get("enable_gqa")):
        return False
    mask = given.get("attn_mask")
    value = mask.meta.get("val") if isinstance(mask, Node) else None
    return mask is None or (isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.bool))


def _code(bound: float, grid: Quantization, otherwise: int) -> int:
    """A bound of a clamp on a grid, or what holds without one."""
    if math.isinf(bound):
        return otherwise
    return min(max(round(bound / grid.scale) + grid.zero_point, grid.low), grid.high)


@dataclass
class _Made:
    """What the steps so far have made of a node's value."""

    number: Value | None = None
    bytes: dict[Quantization | Dynamic, Value] = field(default_factory=dict)


class _Translator:
    """One region into one plan."""

    def __init__(self, finder: Finder, nodes: list[Node]) -> None:
        self.finder, self.graph, self.layouts = finder, finder.graph, finder.layout
        order = {n: i for i, n in enumerate(self.graph.graph.nodes)}
        self.nodes = sorted(nodes, key=order.__getitem__)
        self.inside = set(nodes)
        self.constants = finder.constants
        self.plan = Plan()
        self.made: dict[Node, _Made] = {}
        self.inputs: list[Node] = []
        self.outputs: list[Node] = []
        self.done: set[Node] = set()
        self.products: dict[Step, tuple[matching.Weight, torch.Tensor]] = {}  # weight and bias of a step
        self.largest: dict[Node, float] = {}  # filled where a max pool asks

    def build(self) -> Built | None:
        self.outputs = [n for n in self.nodes if any(u not in self.inside for u in n.users)]
        outside = {
            n: None
            for node in self.nodes
            for n in matching.tensors_of(node)
            if n not in self.inside and n not in self.constants
        }
        self.inputs = list(outside)
        shapes = self._output_shapes()
        if not self.inputs or shapes is None or not all(matching.is_float32(n) for n in self.inputs):
            return None
        for index, node in enumerate(self.inputs):
            self._import(index, node)
        for node in self.nodes:
            if node not in self.done:
                self._emit(node)
        for index, node in enumerate(self.outputs):
            self._export(index, node)
        self.plan.inputs, self.plan.outputs = len(self.inputs), len(self.outputs)
        memory = self.plan.build()
        self._replace(memory, shapes)
        return Built([ops.op_name(n) for n in self.nodes if ops.op_name(n) in matching.PRODUCTS], self.plan, memory)

    def _output_shapes(self) -> list[int] | None:
        """As `torchquant::x86_region` takes them; None if a size is none of the first input's."""
        found: list[int] = []
        first = matching.shape_of(self.inputs[0]) if self.inputs else ()
        for node in self.outputs:
            shape = matching.shape_of(node)
            found.append(len(shape))
            for i, size in enumerate(shape):
                if isinstance(size, int):
                    found.append(size)
                    continue
                places = [p for p in (i, *range(len(first))) if p < len(first) and str(first[p]) == str(size)]
                if not places:
                    return None
                found.append(-1 - places[0])
        return found

    def _replace(self, memory: torch.Tensor, shapes: list[int]) -> None:
        graph = self.graph.graph
        name = fresh_name(self.graph, "x86_plan")
        self.graph.register_buffer(name, memory)
        order = {n: i for i, n in enumerate(graph.nodes)}
        anchor = max(self.inputs, key=order.__getitem__)
        with graph.inserting_after(anchor):
            holder = graph.get_attr(name)
        with graph.inserting_after(holder):
            call = graph.call_function(torch.ops.torchquant.x86_region.default, (holder, list(self.inputs), shapes))
        holder.meta["val"] = memory
        place = call
        for index, node in enumerate(self.outputs):
            with graph.inserting_after(place):
                place = graph.call_function(operator.getitem, (call, index))
            place.meta = dict(node.meta)
            self.layouts[place] = self.layouts[node]
            for user in list(node.users):
                if user not in self.inside:
                    user.replace_input_with(node, place)

    # values

    def _size(self, node: Node) -> tuple[int, int, int]:
        """h, w, c of a node's value for one sample."""
        shape = matching.shape_of(node)
        if len(shape) > 2 and self.layouts[node] == matching.IMAGE:
            return matching.image_size(shape)
        if self.layouts[node] == matching.PIXELS:
            h, w, c = map(int, shape[1:])
            return h, w, c
        return 1, 1, int(shape[-1])

    def _import(self, index: int, node: Node) -> None:
        """Make a caller's tensor a value; images are rearranged, and quantized if nothing else reads them."""
        h, w, c = self._size(node)
        outer = Value(h, w, c, external=("input", index))
        made = self.made[node] = _Made()
        image = h * w > 1 and self.layouts[node] == matching.IMAGE
        if not image and c % 16 == 0:
            made.number = outer
            return
        quantizes, others = self._readers_of(node)
        grids = {self._grid(q) for q in quantizes}
        kind = "import" if image else "elementwise"
        if len(grids) == 1 and not others and kind == "import":
            grid = next(iter(grids))
            value = Value(h, w, c, grid, narrow=c <= 4 and all(self._feeds_convolutions(q) for q in quantizes))
            self.plan.steps.append(Step("import", outer, out_byte=value, label=node.name))
            made.bytes[grid] = value
            return
        made.number = Value(h, w, c)
        self.plan.steps.append(Step(kind, outer, out_float=made.number, label=node.name))

    def _feeds_convolutions(self, quantize: Node) -> bool:
        readers = [u for d in quantize.users for u in d.users]
        return all(ops.op_name(r) in matching.CONVOLUTIONS and ops.arguments(r).get("groups", 1) == 1 for r in readers)

    def _export(self, index: int, node: Node) -> None:
        """Rows are written by the step that makes them; images are rearranged."""
        source = self._number(node)
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

    def _number(self, node: Node) -> Value:
        """A node's value as floats."""
        node = self._origin(node)
        made = self.made[node]
        if made.number is None:
            source = next(iter(made.bytes.values()))
            made.number = Value(source.h, source.w, source.c)
            self.plan.steps.append(Step("elementwise", source, out_float=made.number, label=node.name))
        return made.number

    def _bytes(self, quantize: Node) -> Value:
        """What a quantize op makes."""
        grid = self._grid(quantize)
        node = self._origin(quantize.args[0])
        made = self.made[node]
        if grid not in made.bytes:
            source = self._number(node)
            made.bytes[grid] = Value(source.h, source.w, source.c, grid)
            self.plan.steps.append(Step("elementwise", source, out_byte=made.bytes[grid], label=quantize.name))
        return made.bytes[grid]

    def _grid(self, quantize: Node) -> Quantization | Dynamic:
        """The grid of a quantize op; of a dynamic one with the place of its source among the region's inputs."""
        grid = self.finder.grid(quantize)
        assert grid is not None
        if isinstance(grid, Dynamic):
            return replace(grid, input=self.inputs.index(quantize.all_input_nodes[0]))
        return grid

    def _origin(self, node: Any) -> Node:
        """The node that made a value, behind ops that change nothing about it here."""
        while node in self.inside and (self._is_alias(node) or ops.op_name(node) == "pad"):
            node = node.args[0]
        return node

    @staticmethod
    def _is_choice(node: Node) -> bool:
        """Whether a node makes the scale and zero point of dynamic quantization, which the runtime does itself."""
        return ops.qdq_name(node).startswith("choose_qparams") or node.target is operator.getitem

    @staticmethod
    def _is_alias(node: Node) -> bool:
        return ops.overload_of(node) in (*matching.ALIASES, *matching.RESHAPES, matching.TURN)

    # steps

    def _emit(self, node: Node) -> None:
        if self._is_alias(node) or ops.op_name(node) == "pad" or ops.is_quantize(node) or self._is_choice(node):
            return
        if ops.is_dequantize(node):
            source = matching.quantize_behind(node)
            assert source is not None
            self.made[node] = _Made(bytes={self._grid(source): self._bytes(source)})
            return
        name = ops.op_name(node)
        if name == "max_pool2d" and self._max_pool_of_bytes(node):
            return
        step = getattr(self, f"_step_{name}", self._step_elementwise)(node)
        self._finish(node, step)

    def _finish(self, node: Node, step: Step) -> None:
        """Fuse what follows the step and give it its outputs."""
        end, n, chain = node, step.numbers, [node]
        stage = 2 if "binary" in n else 1 if "before" in n else 0
        while True:
            user = self._only_user(end)
            if user is None:
                break
            activation = matching.activation_of(user)
            if self._is_alias(user):
                end = user
            elif stage == 0 and step in self.products and self._scale_by(step, user):
                end = user
                self.done.add(user)
            elif activation is not None and stage < 3:
                place = "before" if stage == 0 and self._joins(user) else "after"
                n |= {place: activation["name"], f"{place}_low": activation["low"], f"{place}_high": activation["high"]}
                stage = 1 if place == "before" else 3
                end = user
                self.done.add(user)
            elif (
                stage < 2
                and ops.op_name(user) in ("add", "mul")
                and (other := self._ready_operand(user, end)) is not None
            ):
                step.other, broadcast = other
                n |= {"binary": ops.op_name(user), "other_broadcast": broadcast}
                stage, end = 2, user
                self.done.add(user)
            else:
                break
            chain.append(end)
        made = _Made()
        self.made |= dict.fromkeys(chain, made)
        quantizes, others = self._readers_of(end)
        h, w, c = self._size(node)
        grids = list(dict.fromkeys(self._grid(q) for q in quantizes))
        pooled = self._pooled(end) if not quantizes else None
        if pooled is not None:
            grids, others = [pooled], False
        if grids:
            step.out_byte = made.bytes[grids[0]] = Value(h, w, c, grids[0])
        if others or len(grids) > 1 or not grids:
            step.out_float = made.number = Value(h, w, c)
        if step.kind in ("conv", "depthwise"):
            self._scale(step)
        self.plan.steps.append(step)

    def _scale_by(self, step: Step, node: Node) -> bool:
        """Multiply a product's scales and bias by the constants that its results are multiplied by."""
        found = matching.factor_of(self.graph, node)
        if found is None:
            return False
        weight, bias = self.products[step]
        shape = matching.shape_of(node)
        factor = matching.channels_of(found[1], len(bias), self.layouts[node], len(shape))
        assert factor is not None  # as the finder saw to
        self.products[step] = matching.Weight(weight.codes, weight.scale * factor), bias * factor
        return True

    def _only_user(self, node: Node) -> Node | None:
        if node in self.outputs or len(node.users) != 1:
            return None
        user = next(iter(node.users))
        return user if user in self.inside and user not in self.done else None

    def _joins(self, activation: Node) -> bool:
        """Whether an addition or product that can be fused follows."""
        user = self._only_user(activation)
        while user is not None and self._is_alias(user):
            user = self._only_user(user)
        return (
            user is not None
            and ops.op_name(user) in ("add", "mul")
            and self._ready_operand(user, activation) is not None
        )

    def _ready_operand(self, node: Node, mine: Node) -> tuple[Value, int] | None:
        """The other operand of an addition or product, if it has been made, and how it is broadcast."""
        first, second = node.args[0], node.args[1]
        other: Any = second if self._origin(first) is self._origin(mine) else first
        if self._origin(first) is self._origin(second) or matching.shape_of(mine) != matching.shape_of(node):
            return None
        origin = self._origin(other)
        if origin not in self.made:
            return None
        made = self.made[origin]
        broadcast = int(matching.shape_of(other) != matching.shape_of(node))
        if made.number is None and len(made.bytes) == 1 and not broadcast:
            value = next(iter(made.bytes.values()))
            if not value.narrow:
                return value, 0
        value = self._number(other)
        return value, broadcast

    def _readers_of(self, node: Node) -> tuple[list[Node], bool]:
        """The quantize ops that read a value, and whether anything else does."""
        quantizes, others, work = [], node in self.outputs, list(node.users)
        while work:
            user = work.pop(0)
            if user not in self.inside:
                continue
            if self._is_alias(user) or ops.op_name(user) == "pad":
                others = others or user in self.outputs
                work += user.users
            elif ops.is_quantize(user):
                quantizes.append(user)
            elif not self._is_choice(user):
                others = True
        return quantizes, others

    def _pooled(self, node: Node) -> Quantization | Dynamic | None:
        """The one grid on which a max pool behind the node is quantized: it may be quantized before the pool too."""
        user = self._only_user(node)
        if user is None or ops.op_name(user) != "max_pool2d" or user not in self.inside or not self._is_finite(user):
            return None
        quantizes, others = self._readers_of(user)
        grids = {self._grid(q) for q in quantizes}
        return next(iter(grids)) if len(grids) == 1 and not others else None

    def _max_pool_of_bytes(self, node: Node) -> bool:
        """A max pool on bytes whose result is read on the same grid."""
        source = self._origin(node.args[0])
        made = self.made[source]
        if not self._is_finite(node):
            return False
        quantizes, others = self._readers_of(node)
        grids = {self._grid(q) for q in quantizes}
        if others or len(grids) != 1:
            return False
        grid = next(iter(grids))
        if grid not in made.bytes:
            return False
        step = self._step_max_pool2d(node, made.bytes[grid])
        h, w, c = self._size(node)
        step.out_byte = Value(h, w, c, grid)
        self.made[node] = _Made(bytes={grid: step.out_byte})
        self.plan.steps.append(step)
        return True

    def _is_finite(self, pool: Node) -> bool:
        """Whether no input of the region makes what a max pool reads infinite or NaN.

        Then quantizing may come first. Where a number is NaN it may not: NaN is the largest, and its code is 0.
        """
        if not self.largest:
            for node in self.nodes:
                self.largest[node] = self._largest(node)
        return self.largest.get(pool.all_input_nodes[0], math.inf) < _FINITE

    def _largest(self, node: Node) -> float:
        """A bound on the magnitude of a node's values, from those of what it reads; infinity if there is none."""
        name = ops.op_name(node)
        if ops.is_dequantize(node):
            grid = self.finder.grid(node)
            if not isinstance(grid, Quantization):
                return math.inf
            return 255 * grid.scale
        inputs = [self.largest.get(n, math.inf) for n in matching.tensors_of(node) if n not in self.constants]
        if name in matching.PRODUCTS:
            return self._largest_sum(node, inputs[0])
        if factor := matching.factor_of(self.graph, node):
            return inputs[0] * float(factor[1].abs().max())
        if activation := matching.activation_of(node):
            bounds = (activation["low"], activation["high"])
            return max([inputs[0] + 1, *(abs(b) for b in bounds if math.isfinite(b))])
        if name == "add":
            return 2 * max(inputs)
        if name == "mul":
            return max(inputs) * max(inputs)
        kept = self._is_alias(node) or name in ("pad", "max_pool2d", "mean", "adaptive_avg_pool2d")
        return inputs[0] if kept else math.inf

    def _largest_sum(self, node: Node, largest: float) -> float:
        given = ops.arguments(node)
        weight = self.finder.weight(given["weight"])
        assert weight is not None
        bias = self._bias(given, len(weight.codes))
        sums = weight.codes.reshape(len(weight.codes), -1).double().abs().sum(1) * weight.scale.abs()
        found = float((sums * largest + bias.abs()).max())
        return found if math.isfinite(found) else math.inf

    def _step_max_pool2d(self, node: Node, source: Value | None = None) -> Step:
        window = matching.window_of(node)
        assert window is not None
        given = source or self._number(node.all_input_nodes[0])
        return Step("max_pool", given, label=node.name, numbers=dict(window))

    def _step_conv2d(self, node: Node) -> Step:
        given = ops.arguments(node)
        weight, window = self.finder.weight(given["weight"]), matching.window_of(node)
        assert weight is not None
        assert window is not None
        quantize = matching.quantize_behind(given["input"])
        assert quantize is not None
        source = quantize.all_input_nodes[0]
        if ops.op_name(source) == "pad" and source in self.inside:
            top, left, _, _ = matching.padding_of(source) or [0] * 4
            window["pt"], window["pl"] = window["pt"] + top, window["pl"] + left
        n, c = weight.codes.shape[:2]
        groups = given.get("groups", 1)
        deep = matching.is_depthwise(weight.codes, groups)
        numbers = {**window, "channels": n, "depth": 0 if deep else -(-c // 4) * 4}
        codes = weight.codes.unsqueeze(2) if weight.codes.dim() == 3 else weight.codes
        if groups > 1 and not deep:
            cut = plans.Groups.of(groups, c, n // groups)
            numbers |= {"depth": cut.depth, "group_in": c, "group_out": n // groups, "group_panel": cut.panel}
            codes = cut.pack(codes)
        step = Step("depthwise" if deep else "conv", self._bytes(quantize), label=node.name, numbers=numbers)
        self.products[step] = matching.Weight(codes, weight.scale), self._bias(given, n)
        return step

    _step_conv1d = _step_conv2d

    def _step_linear(self, node: Node) -> Step:
        given = ops.arguments(node)
        weight, quantize = (
            self.finder.weight(given["weight"]),
            matching.quantize_behind(given["input"]),
        )
        assert weight is not None
        assert quantize is not None
        n, c = weight.codes.shape
        numbers = {"channels": n, "depth": -(-c // 4) * 4}
        step = Step("conv", self._bytes(quantize), label=node.name, numbers=numbers)
        self.products[step] = matching.Weight(weight.codes[:, :, None, None], weight.scale), self._bias(given, n)
        return step

    def _bias(self, given: dict[str, Any], channels: int) -> torch.Tensor:
        bias = given.get("bias")
        return torch.zeros(channels).double() if bias is None else ops.constant_value(self.graph, bias).double()

    def _scale(self, step: Step) -> None:
        """Pack the weights, and fold all scales into one factor and one addend a channel."""
        n = step.numbers
        weight, bias = self.products[step]
        assert step.input is not None
        codes, channels = weight.codes, weight.codes.shape[0]
        fixed = step.input.grid if isinstance(step.input.grid, Quantization) else None
        # those of a dynamic grid the runtime multiplies in at each call
        input_scale, zero_point = (fixed.scale, fixed.zero_point) if fixed else (1.0, 1)
        scale = weight.scale * input_scale
        simple = "binary" not in n and n.get("before", "none") == "none" and n.get("after", "none") in ("none", "clamp")
        largest = 255 * codes.reshape(channels, -1).double().abs().sum(1) * scale.abs() + bias.abs()
        out = step.out_byte.grid if step.out_byte is not None and step.out_float is None else None
        if fixed is not None and simple and isinstance(out, Quantization) and self._fits(largest, out):
            scale, bias = scale / out.scale, bias / out.scale
            low, high = out.low, out.high
            if n.get("after") == "clamp":
                low, high = _code(n["after_low"], out, low), _code(n["after_high"], out, high)
            n |= {"direct": 1, "low_byte": min(low, high), "high_byte": high}
        sums = codes.reshape(channels, -1).to(torch.int64).sum(1)
        compensation = (-zero_point * sums).to(torch.int32)
        deep = step.kind == "depthwise"
        size = -(-channels // 16) * 16
        for name, values in (("compensation", compensation), ("scale", scale.float()), ("bias", bias.float())):
            padded = torch.zeros(size, dtype=values.dtype)
            padded[:channels] = values
            n[name] = self.plan.constant(plans.interleave_channels(padded) if deep else padded)
        n["weights"] = self.plan.constant(
            plans.pack_depthwise(codes, n["sh"], n["dh"]) if deep else plans.pack_convolution(codes)
        )

    @staticmethod
    def _fits(largest: torch.Tensor, out: Quantization) -> bool:
        """Whether results of this size stay within what the kernels round as integers without looking."""
        return float(largest.max()) / out.scale < 2**30

    def _step_adaptive_avg_pool2d(self, node: Node) -> Step:
        return Step("mean", self._any(node.args[0]), label=node.name)

    _step_mean = _step_adaptive_avg_pool2d

    def _any(self, node: Any) -> Value:
        """A value as bytes if it is there as such alone, else as floats."""
        made = self.made[self._origin(node)]
        if made.number is None and len(made.bytes) == 1:
            value = next(iter(made.bytes.values()))
            if not value.narrow:
                return value
        return self._number(node)

    def _step_add(self, node: Node) -> Step:
        pair: list[Any] = list(node.args[:2])
        if matching.shape_of(pair[0]) != matching.shape_of(node):
            pair.reverse()
        broadcast = int(matching.shape_of(pair[1]) != matching.shape_of(node))
        other = self._number(pair[1]) if broadcast else self._any(pair[1])
        numbers = {"binary": ops.op_name(node), "other_broadcast": broadcast}
        return Step("elementwise", self._any(pair[0]), other=other, label=node.name, numbers=numbers)

    _step_mul = _step_add

    def _step_layer_norm(self, node: Node) -> Step:
        given = ops.arguments(node)
        c = int(matching.shape_of(node)[-1])
        numbers: dict[str, Any] = {"factor": float(given.get("eps", 1e-5))}
        for field_name, key, fill in (("scale", "weight", 1.0), ("bias", "bias", 0.0)):
            padded = torch.zeros(-(-c // 16) * 16)
            given_value = given.get(key)
            padded[:c] = torch.full((c,), fill) if given_value is None else ops.constant_value(self.graph, given_value)
            numbers[field_name] = self.plan.constant(padded)
        return Step("layer_norm", self._any(node.args[0]), label=node.name, numbers=numbers)

    def _step_elementwise(self, node: Node) -> Step:
        """An activation with nothing in front of it to be fused with."""
        activation = matching.activation_of(node)
        assert activation is not None
        numbers = {"before": activation["name"], "before_low": activation["low"], "before_high": activation["high"]}
        return Step("elementwise", self._any(node.args[0]), label=node.name, numbers=numbers)
