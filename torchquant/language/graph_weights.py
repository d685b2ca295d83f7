"""The weights of a converted decoder, by the names that they have in the model it was exported from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from torchquant.errors import InputError
from torchquant.files.shelf import give_back_between
from torchquant.fx import ops
from torchquant.fx.passes import copy_graph
from torchquant.fx.reading import GraphReading, is_converted, is_prepared, stored_shape
from torchquant.fx.states import states_of
from torchquant.fx.storing import is_packed
from torchquant.language.cached import CachedDecoder
from torchquant.language.decoder import Decoder, is_decoder
from torchquant.language.lent import lent
from torchquant.measure.verify import sqnr_db
from torchquant.ops.x86.few_bits import grid_of
from torchquant.ops.x86.rows import Grid

__all__ = ["Weight", "float_activations", "refuse_other_function", "weights_of"]

_PREFIX = "model."  # the exported wrapper's name for the model
_TOKENS = 8  # on which the graph is held against the model
_PLACES = {"layer_norm": {"weight": 2, "bias": 3}}  # where an op reads what, if two may have one shape
_NO_PLACE = "the graph has a {}, for which the model of the checkpoint has no place"
_BIAS = (
    ": an algorithm added it, or the graph comes from another model. Quantize with algorithms=() instead of the "
    "default BiasCorrection, and give solvers correct_bias=False"
)
_FLOOR_DB = {torch.float32: 60.0, torch.bfloat16: 20.0, torch.float16: 30.0}  # both sum in their own order


@dataclass(frozen=True)
class Weight:
    """A parameter of the model as the graph has it.

    Args:
        graph, node: where its values are computed from what is stored.
        has_grid: it is quantized to a grid of integers.
        reason: why a quantized weight has no grid; empty for all others.
        is_turned: the parameter is (inputs, outputs), as in GPT-2.
        is_parameter: the node is the parameter as it is.
    """

    graph: GraphModule
    node: Node
    has_grid: bool = False
    reason: str = ""
    is_turned: bool = False
    is_parameter: bool = False

    @property
    def is_quantized(self) -> bool:
        return self.has_grid or bool(self.reason)

    @property
    def grid(self) -> Grid | None:
        """The codes (outputs, inputs), unpacked anew each time; None where there is no grid of integers."""
        grid = _grid_of(self.graph, self.node) if self.has_grid else None
        return grid if isinstance(grid, Grid) else None

    def matrix(self) -> Tensor:
        """What the graph computes with; a matrix is (outputs, inputs)."""
        values = ops.constant_value(self.graph, self.node)
        return values.t() if self.is_turned and self.is_parameter else values

    def values(self) -> Tensor:
        """The same in the shape of the parameter."""
        values = ops.constant_value(self.graph, self.node)
        return values.t() if self.is_turned and not self.is_parameter else values

    def shape(self) -> tuple[int, ...]:
        """Of the parameter, without decoding it."""
        shape = _shape_of(self.graph, self.node)
        return shape[::-1] if self.is_turned and not self.is_parameter else shape

    def equals(self, other: Weight) -> bool:
        """Whether both are the same codes, scales and zero points, or the same floats."""
        mine, theirs = self.grid, other.grid
        if mine is None or theirs is None:
            return mine is theirs and torch.equal(self.values(), other.values())
        pairs = zip(vars(mine).values(), vars(theirs).values(), strict=True)
        return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def _grid_of(graph: GraphModule, node: Node | None) -> Grid | str | None:
    """The codes behind a weight, why there are none, or None for floats; nothing that was read is kept."""
    give_back_between()
    reading = GraphReading(graph)
    quantized = reading.tensor(node)
    return None if quantized is None or quantized.codes is None else grid_of(reading, node, quantized)


def _shape_of(graph: GraphModule, node: Node) -> tuple[int, ...]:
    """The shape of a constant, without computing it where that decodes a weight."""
    arguments = ops.arguments(node)
    if ops.is_dequantize(node) and "shape" not in arguments:
        return tuple(stored_shape(graph, node.args[0]) or ())
    if "shape" in arguments:
        return tuple(arguments["shape"])
    source = node.args[0] if is_packed(node) else node
    assert isinstance(source, Node)
    return tuple(ops.constant_value(graph, source).shape)


def weights_of(quantized: GraphModule, model: nn.Module) -> dict[str, Weight]:
    """Every parameter of `model` as a converted graph of `export_causal_lm` has it; tied ones by each of their names.

    Raises:
        InputError: the graph is not converted, comes from elsewhere, or was exported from another model; two ops
            compute what one module of the model does; a bias has no place in the model.
    """
    _check_graph(quantized)
    reader = _Reader(quantized, model)
    for node in quantized.graph.nodes:
        reader.read(node)
    reader.read_moved()
    missing = [name for name in reader.shapes if name not in reader.weights]
    if missing:
        raise InputError(
            f"the graph has no {missing[0]} ({len(missing)} of {len(reader.shapes)} parameters are missing): it was "
            "exported from another model, or an algorithm has moved it; take the checkpoint that it comes from"
        )
    return {name: reader.weights[name] for name in reader.shapes}


def _check_graph(quantized: object) -> None:
    if not isinstance(quantized, GraphModule) or is_prepared(quantized) or not is_converted(quantized):
        raise InputError("save_causal_lm takes a converted graph, with dequantize ops in it; run convert_pt2e first")
    if not is_decoder(quantized):
        raise InputError("save_causal_lm takes a graph of export_causal_lm; torchquant.save writes any graph")


class _Reader:
    """Collects the weights of a graph, node by node."""

    def __init__(self, graph: GraphModule, model: nn.Module) -> None:
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        self.weights: dict[str, Weight] = {}
        self._graph = graph
        self._turned = {name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
        self._by: dict[str, Node] = {}

    def read(self, node: Node) -> None:
        """Take the parameter that a node reads as it is, or the weight and the bias of a linear or a lookup."""
        if node.op == "get_attr":
            name = str(node.target).removeprefix(_PREFIX)
            if name in self.shapes and name != node.target:
                is_turned = name.removesuffix(".weight") in self._turned
                wide = next((user for user in node.users if is_packed(user)), node)
                self._put(name, Weight(self._graph, wide, is_turned=is_turned, is_parameter=True))
            return
        kind = ops.kind_of(node)
        if kind is None or kind.weight is None:
            return
        module = ops.module_path(node).removeprefix(_PREFIX)
        if self._by.setdefault(module, node) is not node:
            raise InputError(
                f"{module} is computed by {self._by[module].name} and {node.name}: an algorithm has split it, and no "
                "checkpoint of the model can hold that"
            )
        self._weight(module, ops.argument(node, kind.weight))
        bias = ops.argument(node, 2) if ops.op_name(node) == "linear" else None
        if bias is not None and ops.is_constant(bias):
            self._put(f"{module}.bias", Weight(self._graph, bias))

    def read_moved(self) -> None:
        """Take what algorithms put in the place of parameters: the one constant of its shape that its module reads."""
        for name, shape in self.shapes.items():
            module, _, leaf = name.rpartition(".")
            if name in self.weights:
                continue
            nodes = [n for n in self._graph.graph.nodes if ops.module_path(n) == _PREFIX + module]
            read = {n for node in nodes for n in _constants_of(node, leaf)}
            fitting = [n for n in read if _shape_of(self._graph, n) == shape]
            if len(fitting) == 1:
                self._put(name, Weight(self._graph, fitting[0]))

    def _weight(self, module: str, node: Node | None) -> None:
        name = f"{module}.weight"
        if node is None or not ops.is_constant(node):
            return
        grid = _grid_of(self._graph, node)
        if grid is not None:
            reason = grid if isinstance(grid, str) else ""
            self._put(name, Weight(self._graph, node, not reason, reason, module in self._turned))
        elif name not in self.weights:
            self._put(name, Weight(self._graph, node, is_turned=module in self._turned))

    def _put(self, name: str, weight: Weight) -> None:
        shape = weight.shape()
        if name not in self.shapes:
            raise InputError(_NO_PLACE.format(name) + (_BIAS if name.endswith(".bias") else ""))
        if shape != self.shapes[name]:
            raise InputError(
                f"{name} is {shape} in the graph and {self.shapes[name]} in the model of the checkpoint; take the "
                "checkpoint that the graph was exported from"
            )
        self.weights[name] = weight


def _constants_of(node: Node, leaf: str) -> list[Node]:
    """The tensors behind an op's inputs that may be the parameter of this name."""
    place = _PLACES.get(ops.op_name(node), {}).get(leaf)
    inputs = node.all_input_nodes if place is None else [ops.argument(node, place)]
    return [n for n in inputs if n is not None and (n.op == "get_attr" or is_packed(n)) and ops.is_constant(n)]


def float_activations(quantized: GraphModule) -> tuple[GraphModule, int]:
    """A copy of the graph that computes on float activations, and how many are quantized in the graph itself."""
    twin = copy_graph(quantized)
    reading, count = GraphReading(twin), 0
    for node in list(twin.graph.nodes):
        read = reading.op(node) if ops.is_dequantize(node) else None
        if read is not None and read.source is not None:
            node.replace_all_uses_with(read.source)
            count += 1
    twin.graph.eliminate_dead_code()
    twin.recompile()
    return twin, count


def refuse_other_function(quantized: GraphModule, model: Any, weights: Mapping[str, Weight]) -> None:
    """Raise InputError if the model with these weights computes something else than the graph.

    An algorithm may have put ops of its own into the graph, such as factors that no weight could take.

    Args:
        quantized: with float activations.
    """
    decoder = Decoder(quantized)
    count = min(_TOKENS, decoder.max_cache_len, decoder.max_new_tokens)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, decoder.vocab_size, (decoder.batch_size, count), generator=generator)
    with torch.no_grad():
        expected = decoder.append(tokens)
        logits = _logits(model, weights, tokens.to(model.device), _cache_bits(quantized))[:, -expected.shape[1] :]
    quality = sqnr_db(expected.float(), logits.float())
    if not quality >= _FLOOR_DB.get(model.dtype, min(_FLOOR_DB.values())):
        raise InputError(
            f"{type(model).__name__} with the weights of the graph does not compute what the graph does (SQNR "
            f"{quality:.0f} dB): an algorithm put ops into the graph that no weight could take, or it comes from "
            "another model; leave out what scales activations (SmoothQuant, AWQ), or take the graph's own checkpoint"
        )


def _cache_bits(quantized: GraphModule) -> int | None:
    """Bits of the keys and values in the graph's cache, or None if they are floats."""
    dtypes = {value.dtype for value in states_of(quantized).values()}
    return 8 if torch.int8 in dtypes else 4 if torch.uint8 in dtypes else None


def _logits(model: Any, weights: Mapping[str, Weight], tokens: Tensor, cache_bits: int | None) -> Tensor:
    """Of the model with these weights, over a cache like the graph's if that rounds what it keeps."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    decoder = None if cache_bits is None else CachedDecoder(model, tokens.shape[1], len(tokens), "all", cache_bits)

    def run() -> Tensor:
        if decoder is not None:
            with decoder.set_up():
                logits: Tensor = decoder.eval()(tokens, places, places)
        else:
            logits = model(input_ids=tokens, use_cache=False).logits
        return logits

    with lent(model, weights) as loans:
        logits = run()
    unused = [loan.path for loan in loans if not loan.was_used]
    if not unused:
        return logits
    with lent(model, weights, throughout=unused):  # modules whose weights others read
        return run()
