"""Regions of a converted graph translated to plans, each put back as one op."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import GraphModule, Node

from torchquant.fx import ops
from torchquant.fx.passes import fresh_name
from torchquant.fx.sites import marked
from torchquant.ops.x86 import matching, native, packing
from torchquant.ops.x86.attention import replace_attention
from torchquant.ops.x86.bounds import Bounds
from torchquant.ops.x86.plan import Dynamic, Plan, Quantization, Step, Value
from torchquant.ops.x86.region import Made, Region
from torchquant.ops.x86.regions import Finder
from torchquant.ops.x86.steps import max_pool, step_of
from torchquant.ops.x86.transposed import Phases

__all__ = ["Built", "replace_regions"]


@dataclass
class Built:
    """One region as it was built."""

    products: list[str]  # kind of each convolution and linear in it
    plan: Plan
    memory: torch.Tensor = field(repr=False)
    sites: list[str] = field(default_factory=list)  # what its nodes were marked with, see `fx.sites.mark_sites`


def replace_regions(graph: GraphModule) -> list[Built]:
    """Put `native.ops().x86_region` in the place of what the kernels can run; in place.

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
    regions, replaced = [], set()
    for nodes in list(finder.regions()):
        built = _Translator(finder, nodes).build()
        if built is not None:
            built.sites = [marked(n) for n in nodes]
            regions.append(built)
            replaced |= set(nodes)
    attention = replace_attention(graph)
    if regions or attention:
        for node in reversed(list(graph.graph.nodes)):  # dropout counts as impure, and would keep all before it
            if node in replaced and not node.users:
                graph.graph.erase_node(node)
        stable_topological_sort(graph.graph)
        graph.graph.eliminate_dead_code()
        graph.graph.lint()
        graph.recompile()
    return regions


def _code(bound: float, grid: Quantization, otherwise: int) -> int:
    """A bound of a clamp on a grid, or what holds without one."""
    if math.isinf(bound):
        return otherwise
    return min(max(round(bound / grid.scale) + grid.zero_point, grid.low), grid.high)


class _Translator(Region):
    """One region into one plan."""

    def __init__(self, finder: Finder, nodes: list[Node]) -> None:
        super().__init__(finder, nodes)
        self._bounds = Bounds(self)

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
            self.import_input(index, node)
        for node in self.nodes:
            if node not in self.done:
                self._emit(node)
        for index, node in enumerate(self.outputs):
            self.export_output(index, node)
        self.plan.inputs, self.plan.outputs = len(self.inputs), len(self.outputs)
        memory = self.plan.build()
        self._replace(memory, shapes)
        return Built([ops.op_name(n) for n in self.nodes if ops.op_name(n) in matching.PRODUCTS], self.plan, memory)

    def _output_shapes(self) -> list[int] | None:
        """As `x86_region` takes them; None if a varying size is not one of the first input's."""
        shapes: list[int] = []
        first = matching.shape_of(self.inputs[0]) if self.inputs else ()
        for node in self.outputs:
            shape = matching.shape_of(node)
            shapes.append(len(shape))
            for i, size in enumerate(shape):
                if isinstance(size, int):
                    shapes.append(size)
                    continue
                places = [p for p in (i, *range(len(first))) if p < len(first) and str(first[p]) == str(size)]
                if not places:
                    return None
                shapes.append(-1 - places[0])
        return shapes

    def _replace(self, memory: torch.Tensor, shapes: list[int]) -> None:
        graph = self.graph.graph
        name = fresh_name(self.graph, "x86_plan")
        self.graph.register_buffer(name, memory)
        order = {n: i for i, n in enumerate(graph.nodes)}
        anchor = max(self.inputs, key=order.__getitem__)
        with graph.inserting_after(anchor):
            holder = graph.get_attr(name)
        with graph.inserting_after(holder):
            call = graph.call_function(native.ops().x86_region.default, (holder, list(self.inputs), shapes))
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

    # steps

    def _emit(self, node: Node) -> None:
        if self.is_alias(node) or ops.op_name(node) == "pad" or ops.is_quantize(node) or self.is_choice(node):
            return
        if ops.is_dequantize(node):
            source = matching.quantize_behind(node)
            assert source is not None
            self.made[node] = Made(bytes={self.grid(source): self.bytes_of(source)})
            return
        name = ops.op_name(node)
        if name == "max_pool2d" and self._max_pool_of_bytes(node):
            return
        step = step_of(self, node)
        self._finish(node, step)

    def _finish(self, node: Node, step: Step) -> None:
        """Fuse what follows the step and give it its outputs."""
        end, n, chain = node, step.numbers, [node]
        stage = 2 if "binary" in n or step in self.phases else 1 if "before" in n else 0  # phases have no such operand
        while True:
            user = self.only_user(end)
            if user is None:
                break
            activation = matching.activation_of(user)
            if self.is_alias(user):
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
        forms = Made()
        self.made |= dict.fromkeys(chain, forms)
        quantizes, others = self.readers_of(end)
        h, w, c = self.size(node)
        grids = list(dict.fromkeys(self.grid(q) for q in quantizes))
        pooled = self._pooled(end) if not quantizes else None
        if pooled is not None:
            grids, others = [pooled], False
        if grids:
            step.out_byte = forms.bytes[grids[0]] = Value(h, w, c, grids[0])
        if others or len(grids) > 1 or not grids:
            step.out_float = forms.number = Value(h, w, c)
        if step.kind in ("conv", "depthwise"):
            self._scale(step)
        self.plan.steps.append(step)
        if step in self.phases:
            self._to_pixels(step, self.phases[step])

    def _to_pixels(self, step: Step, phases: Phases) -> None:
        """Give the step outputs whose blocks of channels become the pixels of those that it had."""
        for name in ("out_byte", "out_float"):
            pixels: Value | None = getattr(step, name)
            if pixels is None:
                continue
            h, w = phases.rows.pixels(pixels.h), phases.columns.pixels(pixels.w)
            blocks = Value(h, w, pixels.c * phases.cells, pixels.grid)
            setattr(step, name, blocks)
            self.plan.steps.append(Step("shuffle", blocks, **{name: pixels}, label=step.label, numbers=phases.blocks))

    def _scale_by(self, step: Step, node: Node) -> bool:
        """Multiply a product's scales and bias by the constants that its results are multiplied by."""
        scaling = matching.factor_of(self.graph, node)
        if scaling is None:
            return False
        weight, bias = self.products[step]
        shape = matching.shape_of(node)
        factor = matching.channels_of(scaling[1], len(bias), self.layouts[node], len(shape))
        assert factor is not None  # as the finder saw to
        self.products[step] = matching.Weight(weight.codes, weight.scale * factor), bias * factor
        return True

    def _joins(self, activation: Node) -> bool:
        """Whether an addition or product that can be fused follows."""
        user = self.only_user(activation)
        while user is not None and self.is_alias(user):
            user = self.only_user(user)
        return (
            user is not None
            and ops.op_name(user) in ("add", "mul")
            and self._ready_operand(user, activation) is not None
        )

    def _ready_operand(self, node: Node, mine: Node) -> tuple[Value, int] | None:
        """The other operand of an addition or product, if it has been made, and how it is broadcast."""
        first, second = node.args[0], node.args[1]
        other: Any = second if self.origin(first) is self.origin(mine) else first
        if self.origin(first) is self.origin(second) or matching.shape_of(mine) != matching.shape_of(node):
            return None
        origin = self.origin(other)
        if origin not in self.made:
            return None
        forms = self.made[origin]
        broadcast = int(matching.shape_of(other) != matching.shape_of(node))
        if forms.number is None and len(forms.bytes) == 1 and not broadcast:
            value = next(iter(forms.bytes.values()))
            if not value.narrow:
                return value, 0
        value = self.number(other)
        return value, broadcast

    def _pooled(self, node: Node) -> Quantization | Dynamic | None:
        """The one grid on which a max pool behind the node is quantized: it may be quantized before the pool too."""
        user = self.only_user(node)
        if (
            user is None
            or ops.op_name(user) != "max_pool2d"
            or user not in self.inside
            or not self._bounds.is_finite(user)
        ):
            return None
        quantizes, others = self.readers_of(user)
        grids = {self.grid(q) for q in quantizes}
        return next(iter(grids)) if len(grids) == 1 and not others else None

    def _max_pool_of_bytes(self, node: Node) -> bool:
        """A max pool on bytes whose result is read on the same grid."""
        source = self.origin(node.args[0])
        forms = self.made[source]
        if not self._bounds.is_finite(node):
            return False
        quantizes, others = self.readers_of(node)
        grids = {self.grid(q) for q in quantizes}
        if others or len(grids) != 1:
            return False
        grid = next(iter(grids))
        if grid not in forms.bytes:
            return False
        step = max_pool(self, node, forms.bytes[grid])
        h, w, c = self.size(node)
        step.out_byte = Value(h, w, c, grid)
        self.made[node] = Made(bytes={grid: step.out_byte})
        self.plan.steps.append(step)
        return True

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
        n["narrow"] = int(int(codes.min()) >= -64 and int(codes.max()) <= 63)
        deep = step.kind == "depthwise"
        size = -(-channels // 16) * 16
        for name, values in (("compensation", compensation), ("scale", scale.float()), ("bias", bias.float())):
            padded = torch.zeros(size, dtype=values.dtype)
            padded[:channels] = values
            n[name] = self.plan.constant(packing.interleave_channels(padded) if deep else padded)
        n["weights"] = self.plan.constant(
            packing.pack_depthwise(codes, n["sh"], n["dh"]) if deep else packing.pack_convolution(codes)
        )

    @staticmethod
    def _fits(largest: torch.Tensor, out: Quantization) -> bool:
        """Whether results of this size stay within what the kernels round as integers without looking."""
        return float(largest.max()) / out.scale < 2**30
