"""Quantized modules on grids of one's choice, and what they compute in exact arithmetic."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Interpreter

from torchquant.fx import ops
from torchquant.ops.x86 import native
from torchquant.ops.x86.matching import PRODUCTS
from torchquant.ops.x86.translation import replace_regions

Q = torch.ops.quantized_decomposed
REGION = native.ops()
SAFE = 1e-4  # of a step: how far from a tie a value inside a network is, so that float32 rounds it the same way


@dataclass(frozen=True)
class Grid:
    """A quantize and a dequantize op: `grid(x)` is x on the grid."""

    scale: float
    zero_point: int
    low: int = 0
    high: int = 255
    dtype: torch.dtype = torch.uint8

    def __call__(self, x):
        qparams = (self.scale, self.zero_point, self.low, self.high, self.dtype)
        return Q.dequantize_per_tensor(Q.quantize_per_tensor(x, *qparams), *qparams)

    def sample(self, *shape):
        """Random values that are on the grid."""
        codes = torch.randint(self.low, self.high + 1, shape)
        return (codes - self.zero_point).float() * self.scale


def signed(scale, zero_point):
    return Grid(scale, zero_point, -128, 127, torch.int8)


INPUT, OUTPUT = Grid(0.02, 117), Grid(0.031, 101)


class Layer(nn.Module):
    """A convolution or linear: its input on `grid`, symmetric int8 weights, results of about one."""

    def __init__(self, function, grid, shape, bias=True, per_channel=True, codes=None, most=127, axis=0, **options):
        super().__init__()
        self.function, self.grid, self.options, self.per_channel, self.axis = function, grid, options, per_channel, axis
        codes = torch.randint(-most, most + 1, shape) if codes is None else codes.expand(shape)
        terms, outputs = codes.select(axis, 0).numel(), shape[axis]
        size = 1 / (73 * 74 * terms**0.5 * (grid.scale if grid else 0.02))
        scales = (torch.rand(outputs) + 0.5) * size
        self.scale = size  # of the whole tensor
        self.register_buffer("codes", codes.to(torch.int8).contiguous())
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", torch.zeros(outputs, dtype=torch.int64))
        channels = outputs * (options.get("groups", 1) if axis else 1)
        self.bias = nn.Parameter(torch.randn(channels) / 4) if bias else None

    def forward(self, x):
        if self.per_channel:
            weight = Q.dequantize_per_channel(self.codes, self.scales, self.zeros, self.axis, -128, 127, torch.int8)
        else:
            weight = Q.dequantize_per_tensor(self.codes, self.scale, 0, -128, 127, torch.int8)
        return self.function(self.grid(x) if self.grid else x, weight, self.bias, **self.options)


def conv(c, n, kernel=3, grid=INPUT, **options):
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    return Layer(F.conv2d, grid, (n, c // options.get("groups", 1), *kernel), **options)


def depthwise(c, kernel=3, grid=INPUT, **options):
    return conv(c, c, kernel, grid, groups=c, **options)


def transposed(c, n, kernel=3, grid=INPUT, **options):
    function = F.conv_transpose1d if len(kernel) == 1 else F.conv_transpose2d
    return Layer(function, grid, (c, n // options.get("groups", 1), *kernel), axis=1, **options)


def linear(c, n, grid=INPUT, **options):
    return Layer(F.linear, grid, (n, c), **options)


class Exact(Interpreter):
    """Runs a converted graph: products as sums of integers, all else in float64.

    `before` holds for each dequantize node what its value was in steps before it was rounded.
    """

    def __init__(self, graph):
        super().__init__(graph)
        self.codes, self.before = {}, {}

    def run_node(self, node):
        arguments = {k: self._value(v) for k, v in ops.arguments(node).items()}
        if node.op == "get_attr":
            return _double(super().run_node(node))
        if node.op == "placeholder":
            return _double(super().run_node(node))
        if ops.is_quantize(node):
            steps = arguments["input"] / arguments["scale"]
            self.before[node] = steps
            codes = (steps.round() + arguments["zero_point"]).clamp(arguments["quant_min"], arguments["quant_max"])
            return codes
        if ops.is_dequantize(node):
            source = node.args[0]
            if source in self.before:
                self.before[node] = self.before[source]
            zero, scale = arguments.get("zero_point", 0), arguments.get("scale", arguments.get("scales"))
            codes = arguments["input"].double() - (zero if isinstance(zero, int) else 0)  # weights are symmetric
            self.codes[node] = codes, scale
            shape = [-1 if i == arguments.get("axis", 0) else 1 for i in range(codes.dim())]
            return codes * (scale.view(shape) if isinstance(scale, torch.Tensor) else scale)
        if ops.op_name(node) in PRODUCTS and {node.args[0], node.args[1]} <= set(self.codes):
            return self._product(node)
        return super().run_node(node)

    def _value(self, argument):
        return self.env.get(argument, argument) if isinstance(argument, torch.fx.Node) else argument

    def _product(self, node):
        (x, x_scale), (w, w_scale) = self.codes[node.args[0]], self.codes[node.args[1]]
        bias = self._value(node.args[2]) if len(node.args) > 2 else None
        rest = [self._value(a) for a in node.args[3:]]
        product = node.target(x, w, None, *rest, **node.kwargs)
        assert float(product.abs().max() if product.numel() else 0) < 2**52  # so each sum was exact
        axis = -1 if ops.op_name(node) == "linear" else 1 - product.dim()
        shape = [1] * product.dim()
        shape[axis] = -1
        if isinstance(w_scale, torch.Tensor):  # of the channels of one group, where the convolution is transposed
            w_scale = w_scale.repeat(product.shape[axis] // len(w_scale))
        scale = x_scale * (w_scale.view(shape) if isinstance(w_scale, torch.Tensor) else w_scale)
        return product * scale + (0 if bias is None else bias.view(shape))


def _double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def from_tie(steps):
    """How far values counted in steps are from where rounding changes."""
    return (steps - steps.floor() - 0.5).abs()


def exported(module, inputs, dynamic_shapes=None):
    return torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic_shapes).module()


def targets(graph):
    return [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]


def products_left(graph):
    """Convolutions and linears that the kernels do not run."""
    return [n.name for n in graph.graph.nodes if ops.op_name(n) in PRODUCTS]


def regions_in(graph):
    return [n for n in graph.graph.nodes if n.target is REGION.x86_region.default]


class Case:
    """A module with its regions replaced, and its exact results for inputs of which no value inside is near a tie."""

    def __init__(self, module, sample, dynamic_shapes=None, regions=1, tries=60):
        torch.manual_seed(1)
        inputs = sample()
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        graph = exported(module, inputs, dynamic_shapes)
        self.inputs, self.expected, self.steps, self.grids = self._clear_of_ties(graph, sample, tries)
        self.found = replace_regions(graph)
        self.graph = graph
        assert regions is None or len(regions_in(graph)) == regions
        assert not products_left(graph)

    @staticmethod
    def _clear_of_ties(graph, sample, tries):
        [output] = [n for n in graph.graph.nodes if n.op == "output"]
        outputs = torch.utils._pytree.tree_leaves(output.args)
        last = {n for n in outputs if ops.is_dequantize(n) and len(n.users) == 1}
        inner = [n for n in graph.graph.nodes if ops.is_quantize(n) and not set(n.users) <= last]
        grids = [ops.arguments(n) if ops.is_dequantize(n) else None for n in outputs]
        for seed in range(tries):
            torch.manual_seed(seed)
            inputs = sample()
            inputs = inputs if isinstance(inputs, tuple) else (inputs,)
            exact = Exact(graph)
            exact.garbage_collect_values = False
            with torch.no_grad():
                values = torch.utils._pytree.tree_leaves(exact.run(*inputs))
            distances = [from_tie(exact.before[n]).min() for n in inner if exact.before[n].numel()]
            if all(d > SAFE for d in distances):
                return inputs, values, [exact.before.get(n) for n in outputs], grids
        raise AssertionError("no inputs keep clear of ties: make the case smaller")

    def check(self, sets=None):
        for name in sets or native.instruction_sets():
            with native.use(name), torch.no_grad():
                actual = torch.utils._pytree.tree_leaves(self.graph(*self.inputs))
            for value, expected, steps, grid in zip(actual, self.expected, self.steps, self.grids, strict=True):
                assert value.shape == expected.shape, name
                assert value.is_contiguous()
                if not value.numel():
                    continue
                if grid is None:
                    away = float((value.double() - expected).abs().max())
                    assert away <= 1e-5 * float(expected.abs().max()), name
                else:
                    self._check_bytes(name, value, expected, steps, grid)

    @staticmethod
    def _check_bytes(name, value, expected, steps, grid):
        codes = value.double() / grid["scale"]
        assert float((codes - codes.round()).abs().max()) < 1e-3, name
        away = (codes.round() - (expected / grid["scale"]).round()).abs()
        assert float(away.max()) <= 1, name
        assert not bool((away * (from_tie(steps) > 1e-3)).any()), name


def check(module, sample, **options):
    case = Case(module, sample, **options)
    case.check()
    return case
