"""Cross-layer equalization: make the channels between two layers equally large in both, so that one scale fits them.

Nagel, van Baalen, Blankevoort, Welling: "Data-Free Quantization Through Weight Equalization and Bias Correction",
ICCV 2019, sections 4.1 and 4.1.3; with the smallest pre-activation measured instead of derived from BatchNorm.

    y = W2 f(W1 x + b1) + b2       f (s a) = s f(a) for a positive factor s of each channel
    r1_i = max|W1_i|  (output channel i)        r2_i = max|W2_i|  (input channel i)
    s_i = sqrt(r1_i r2_i) / r2_i                W1 <- W1 / s,  b1 <- b1 / s,  W2 <- W2 s,  so that r1 = r2
    c_i = max(0, min over the data of (W1 x + b1)_i)             b1 <- b1 - c,  b2 <- b2 + W2 c
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.algorithms.channels import folding
from torchquant.algorithms.channels.channel_statistics import Smallest
from torchquant.calibration.calibrate import record
from torchquant.errors import InputError
from torchquant.fx import ops
from torchquant.fx.producers import LAYERS, Producer, channel_axis, has_constants, is_padded, producer_of, readers
from torchquant.fx.reading import observer_of

__all__ = ["CrossLayerEqualization", "equalizing_factor"]

_STILL = 1e-3


def equalizing_factor(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """s (channels,) for the ranges r1 and r2 (channels,); one where a channel is dead in either layer."""
    alive = (first > 0) & (second > 0)
    return torch.where(alive, (first / second).sqrt(), 1.0)


@dataclass(frozen=True)
class Pair:
    """Two layers and what lies between: the producer of the second one's input is the first."""

    first: Producer
    second: Node


class CrossLayerEqualization:
    """Equalizes pairs of convolutions and linears, depthwise ones in the middle of a chain included.

    Between the two may stand observers, ReLU, leaky ReLU, PReLU with one slope, pooling, reshapes and transposes, each
    with one reader. ReLU6 and hardtanh saturate at a fixed value and do not commute with a factor, so such pairs stay
    as they are. So do pairs of which another op reads the weight.

    Args:
        iterations: over all pairs, at most; it stops once no factor differs from one by more than 0.1 %.
        absorb_bias: move what a ReLU never cuts off on the data into the next layer's bias; not where that layer pads
            with zeros, since its borders would see no such offset.
    """

    def __init__(self, iterations: int = 50, absorb_bias: bool = True) -> None:
        if iterations < 1:
            raise InputError(f"iterations {iterations} must be 1 or more")
        self.iterations, self.absorb_bias = iterations, absorb_bias
        self.notes: list[str] = []

    def transform(self, prepared: GraphModule, batches: Sequence[Any]) -> int:
        """Equalize in place, float function unchanged; returns how many pairs changed. Recalibrate afterwards."""
        self.notes = []
        pairs = self._pairs(prepared)
        changed = _equalize(prepared, pairs, self.iterations)
        if self.absorb_bias:
            changed |= self._absorb(prepared, pairs, batches)
        folding.tidy(prepared)
        return len(changed)

    def _pairs(self, prepared: GraphModule) -> list[Pair]:
        pairs = []
        for node in prepared.graph.nodes:
            if ops.op_name(node) not in LAYERS or not has_constants(prepared, node):
                continue
            pair = _pair(prepared, node)
            if isinstance(pair, str):
                self.notes.append(f"{node.name}: not equalized with what feeds it: {pair}")
            else:
                pairs.append(pair)
        return pairs

    def _absorb(self, prepared: GraphModule, pairs: Sequence[Pair], batches: Sequence[Any]) -> set[Node]:
        """Move the biases; returns the second layers of the pairs that changed."""
        spans = {pair.second: span for pair in pairs if (span := _absorbing(pair)) is not None}
        smallest = {relu: Smallest(axis) for relu, axis in spans.values()}
        if not smallest:
            return set()
        record(prepared, smallest, batches)
        changed = set()
        for pair in pairs:
            if pair.second not in spans or (low := smallest[spans[pair.second][0]].value) is None:
                continue
            offset = low.clamp(min=0)
            if bool(offset.any()):
                _move_bias(prepared, pair, offset)
                changed.add(pair.second)
        return changed


def _pair(prepared: GraphModule, second: Node) -> Pair | str:
    tensor = second.args[0]
    assert isinstance(tensor, Node)
    if len(readers(tensor)) > 1:
        return f"{tensor.name} has other readers"
    producer = producer_of(prepared, tensor, channel_axis(second))
    if isinstance(producer, str):
        return producer
    if ops.op_name(producer.node) not in LAYERS:
        return f"{ops.op_name(producer.node)} {producer.node.name} is no layer"
    if any(_readers_of_weight(prepared, node) > 1 for node in (producer.node, second)):
        return "another op reads the same weight"
    return Pair(producer, second)


def _readers_of_weight(prepared: GraphModule, layer: Node) -> int:
    """How many ops read the layer's weight, observers looked through."""
    source = ops.argument(layer, 1)
    if source is not None and observer_of(prepared, source) is not None:
        source = ops.argument(source, 0)
    same = [n for n in prepared.graph.nodes if n is source or (n.op == "get_attr" and n.target == source.target)]  # type: ignore[union-attr]
    direct = [user for node in same for user in node.users]
    return sum(len(u.users) if observer_of(prepared, u) is not None else 1 for u in direct)


def _ranges(pair: Pair, weights: Mapping[Node, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """r1 and r2 of a pair, each for the first layer's channels that the second one reads."""
    inputs = folding.input_magnitudes(weights[pair.second], _groups(pair.second))
    inputs = inputs.reshape(-1, pair.first.repeat).amax(1)
    outputs = weights[pair.first.node].abs().flatten(1).amax(1)
    return outputs[pair.first.start : pair.first.start + len(inputs)], inputs


def _equalize(prepared: GraphModule, pairs: Sequence[Pair], iterations: int) -> set[Node]:
    """Equalize all pairs in turn until nothing moves; returns the second layers of those that changed."""
    weights = {}
    for layer in {n for pair in pairs for n in (pair.first.node, pair.second)}:
        weight = folding.constant_at(prepared, layer, 1)
        assert weight is not None
        weights[layer] = weight.clone()
    factors = {pair: torch.ones_like(_ranges(pair, weights)[0]) for pair in pairs}
    for _ in range(iterations):
        largest = 0.0
        for pair in pairs:
            s = equalizing_factor(*_ranges(pair, weights))
            _scale(weights, pair, s)
            factors[pair] = factors[pair] * s
            largest = max(largest, float((s - 1).abs().max()))
        if largest <= _STILL:
            break
    moved = {pair: s for pair, s in factors.items() if float((s - 1).abs().max()) > _STILL}
    for pair, s in moved.items():
        folding.fold_output(prepared, pair.first, s)
        folding.fold_input(prepared, pair.second, s.repeat_interleave(pair.first.repeat))
    return {pair.second for pair in moved}


def _scale(weights: dict[Node, torch.Tensor], pair: Pair, s: torch.Tensor) -> None:
    """W1 / s and W2 s, on the copies."""
    first = weights[pair.first.node]
    rows = slice(pair.first.start, pair.first.start + len(s))
    first[rows] = first[rows] / s.reshape(-1, *[1] * (first.ndim - 1))
    repeated = s.repeat_interleave(pair.first.repeat)
    weights[pair.second] = folding.scale_inputs(weights[pair.second], repeated, _groups(pair.second))


def _groups(layer: Node) -> int:
    return int(ops.arguments(layer).get("groups", 1))


def _absorbing(pair: Pair) -> tuple[Node, int] | None:
    """The ReLU between the two and its channel axis, where nothing else stands that an offset would not pass."""
    between = [n for n in pair.first.path if n.op == "call_function"]
    relus = [n for n in between if ops.op_name(n) == "relu"]
    moves = all(ops.op_name(n) in ("relu", "reshape") for n in between)
    whole = pair.first.start == 0 and not any(ops.op_name(n) == "slice" for n in between)
    if len(relus) != 1 or not moves or not whole or is_padded(pair.second):
        return None
    source = relus[0].args[0]
    direct = source is pair.first.node or (isinstance(source, Node) and source.args[:1] == (pair.first.node,))
    return (relus[0], pair.first.axis) if direct and pair.first.node.meta.get("val") is not None else None


def _move_bias(prepared: GraphModule, pair: Pair, offset: torch.Tensor) -> None:
    one = torch.ones_like(offset)
    folding.fold_output(prepared, pair.first, one, offset)
    repeated = offset.repeat_interleave(pair.first.repeat)
    folding.fold_input(prepared, pair.second, torch.ones_like(repeated), repeated)
