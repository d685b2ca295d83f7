"""A converted graph as a prepared one that quantizes the same, with float weights, so that it can be analyzed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torchao.quantization.pt2e.utils import _fuse_conv_bn_

from torchquant.calibration import batches as data
from torchquant.calibration.evaluator import FLOAT_BIAS
from torchquant.errors import InputError
from torchquant.fx import ops, passes
from torchquant.fx.blocks import SOLVABLE
from torchquant.fx.grids import Grid
from torchquant.fx.reading import GraphReading, Quantized
from torchquant.fx.storing import is_packed, unpack_weights
from torchquant.measure.verify import compare
from torchquant.types import QParams

__all__ = ["observed_again"]

_SAME_DB = 60.0  # of the float function, with the reference's weights in the converted graph


class _ReadBack(torch.nn.Module):
    """Stands where a dequantize op stood, as an observer that would lead to it.

    Args:
        qparams: how the tensor is quantized. values: of a constant. grid: where it is static.
    """

    def __init__(self, qparams: QParams, values: torch.Tensor | None, grid: Grid | None) -> None:
        super().__init__()
        self.dtype, self.quant_min, self.quant_max = qparams.dtype, qparams.quant_min, qparams.quant_max
        self.is_dynamic, self.per_token = qparams.dynamic, qparams.token
        self.grid, self.ch_axis = grid, qparams.axis or 0
        self.qscheme = torch.per_tensor_affine if qparams.axis is None else torch.per_channel_affine
        self.granularity: Any = qparams  # whose group_size readers ask for
        if values is not None:
            self.register_buffer("decoded", values)
            self.values = lambda: self.decoded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor as it is, like any observer."""
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, of a static grid."""
        if self.grid is None:
            raise NotImplementedError("its scale is chosen at run time")
        return self.grid.scale, self.grid.zero_point


class _ReadOps(_ReadBack):
    """The same for ops that no grid describes: it leads to copies of them."""

    def __init__(self, qparams: QParams, chain: GraphModule) -> None:
        super().__init__(qparams, None, None)
        self.chain = [chain]  # in a list: it is no part of the graph that holds the observer

    def convert(self, model: GraphModule, node: Node) -> None:
        """Put the ops in the place of the observer."""
        name = passes.fresh_name(model, f"{node.name}_ops")
        model.add_submodule(name, self.chain[0])
        with model.graph.inserting_before(node):
            call = model.graph.call_module(name, node.args)
        passes.put_in_place(model, node, call)


def observed_again(converted: GraphModule, reference: GraphModule, batches: Sequence[Any]) -> GraphModule:
    """A prepared graph whose quantized function is that of `converted`, and whose float function that of `reference`.

    Args:
        converted: of any Quantizer, from `reference`: ops are matched by the names of their nodes.
        batches: the first of them is what the float functions are held against each other by.

    Raises:
        InputError: they are not of one model, or an algorithm has rewritten the float weights.
    """
    floats = passes.copy_graph(reference)
    _fuse_conv_bn_(floats)
    graph = passes.copy_graph(converted)
    if any(map(is_packed, graph.graph.nodes)):
        unpack_weights(graph)
    twins, reading = {n.name: n for n in floats.graph.nodes}, GraphReading(graph)
    for node in list(graph.graph.nodes):
        if ops.is_dequantize(node):
            quantized = reading.op(node)
            assert quantized is not None
            _observe(graph, node, quantized, floats, twins)
        elif ops.kind_of(node) is not None:
            _mark_bias(graph, node, floats, twins.get(node.name))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    _refuse_rewritten(graph, reference, batches)
    return graph


def _refuse_rewritten(graph: GraphModule, reference: GraphModule, batches: Sequence[Any]) -> None:
    from_observers = compare(passes.copy_graph(reference), _float_function(graph), [next(data.each(batches))]).sqnr_db
    if from_observers < _SAME_DB:
        raise InputError(
            f"the converted graph is not that of this float model, or an algorithm rewrote its weights (SmoothQuant, "
            f"equalization, Rotate): the float functions are {from_observers:.1f} dB apart. Analyze the prepared graph "
            "before convert instead"
        )


def _float_function(graph: GraphModule) -> GraphModule:
    """The graph with the float biases in the place of corrected ones: observers leave values as they are."""
    twin = passes.copy_graph(graph)
    for node in list(twin.graph.nodes):
        if FLOAT_BIAS in node.meta and node.op == "get_attr":
            name = node.meta[FLOAT_BIAS]
            for user in list(node.users):
                if name is None:
                    user.args = tuple(None if arg is node else arg for arg in user.args)
                    continue
                with twin.graph.inserting_before(user):
                    user.replace_input_with(node, twin.graph.get_attr(name))
    twin.recompile()
    return twin


def _observe(graph: GraphModule, node: Node, quantized: Quantized, floats: GraphModule, twins: dict[str, Node]) -> None:
    """Put an observer in the place of a dequantize op."""
    if ops.is_constant(node):
        values = ops.constant_value(graph, node)
        exact = _exact(node, values, floats, twins)
        with graph.graph.inserting_before(node):
            source = passes.add_buffer(graph, f"{node.name}_float", values if exact is None else exact)
        source.meta["val"] = values
        observer: _ReadBack = _ReadBack(quantized.qparams, values, _grid(quantized.qparams, values.shape))
    elif quantized.source is None:
        return
    else:
        source, grid = quantized.source, _grid(quantized.qparams, torch.Size())
        chain = None if grid is not None else _chain(graph, source, node)
        observer = _ReadBack(quantized.qparams, None, grid) if chain is None else _ReadOps(quantized.qparams, chain)
    name = passes.fresh_name(graph, f"{node.name}_observer")
    graph.add_submodule(name, observer)
    with graph.graph.inserting_before(node):
        call = graph.graph.call_module(name, (source,))
    passes.put_in_place(graph, node, call)


def _exact(node: Node, values: torch.Tensor, floats: GraphModule, twins: dict[str, Node]) -> torch.Tensor | None:
    """The float constant that the codes behind a dequantize op were made of: what its readers read in the reference."""
    for user in node.users:
        twin = twins.get(user.name)
        place = user.args.index(node) if node in user.args else -1
        read = twin.args[place] if twin is not None and 0 <= place < len(twin.args) else None
        if isinstance(read, Node) and ops.is_constant(read):
            exact = ops.constant_value(floats, read)
            if exact.shape == values.shape:
                _refuse_unlike(user, values, exact)
                return exact
    return None


def _refuse_unlike(user: Node, values: torch.Tensor, exact: torch.Tensor) -> None:
    """Raise InputError if quantized values are no nearer to float ones than zeros are."""
    if float((values.double() - exact.double()).square().sum()) >= float(exact.double().square().sum()) > 0:
        raise InputError(
            f"what {user.name} reads is not what it reads in the reference: the converted graph is not that of this "
            "float model, or an algorithm rewrote its weights. Analyze the prepared graph before convert instead"
        )


def _mark_bias(graph: GraphModule, node: Node, floats: GraphModule, twin: Node | None) -> None:
    """Note on a corrected bias which float one it stands for."""
    bias = ops.argument(node, 2)
    if twin is None or bias is None or bias.op != "get_attr" or ops.op_name(node) not in SOLVABLE:
        return
    read = ops.argument(twin, 2)
    if read is None:
        bias.meta[FLOAT_BIAS] = None
        return
    exact = ops.constant_value(floats, read) if ops.is_constant(read) else None
    if exact is not None and not torch.equal(exact, ops.constant_value(graph, bias)):
        name = passes.fresh_name(graph, f"{node.name}_float_bias")
        graph.register_buffer(name, exact)
        bias.meta[FLOAT_BIAS] = name


def _grid(qparams: QParams, shape: torch.Size) -> Grid | None:
    """The static affine grid; None of others."""
    if qparams.scale is None or qparams.dynamic or qparams.format or qparams.dtype.is_floating_point:
        return None
    block = list(shape)
    if qparams.group_size and len(shape) == 2:
        block = [1, qparams.group_size]
    elif qparams.group_size or (qparams.axis is not None and not shape):
        return None
    elif qparams.axis is not None:
        block[qparams.axis % len(shape)] = 1
    scale = qparams.scale.detach().float().reshape(-1)
    points = torch.zeros_like(scale) if qparams.zero_point is None else qparams.zero_point.detach().reshape(-1)
    dialect: Any = "block" if qparams.group_size else "tensor" if qparams.axis is None else "channel"
    limits = int(qparams.quant_min), int(qparams.quant_max)
    return Grid(qparams.dtype, *limits, tuple(block), scale, points.int(), dialect, qparams.axis, symmetric=False)


def _chain(graph: GraphModule, source: Node, end: Node) -> GraphModule:
    """The ops from a tensor to its dequantized value, as a function of the tensor."""
    inside, stack = {end}, [end]
    while stack:
        for read in stack.pop().all_input_nodes:
            if read is not source and read not in inside:
                inside.add(read)
                stack.append(read)
    if outside := [n.name for n in inside if n.op in ("placeholder", "call_module")]:
        raise InputError(f"{end.name} quantizes by a scale that {outside[0]} gives: such a graph cannot be analyzed")
    own = Graph()
    places = {source: own.placeholder("x")}
    for node in graph.graph.nodes:
        if node in inside:
            places[node] = own.node_copy(node, lambda n: places[n])
    own.output(places[end])
    return GraphModule(graph, own)
