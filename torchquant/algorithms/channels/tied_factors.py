"""SmoothQuant for tensors that quantized additions tie together: one factor for each channel of a residual stream.

The factor of Wei et al.: "Outlier Suppression+", EMNLP 2023 (section 4.2: only channels beyond a threshold shrink),
chosen by the error of the network's output to second order, as in Li et al.: "BRECQ", ICLR 2021 (section 3.2). Where
SmoothQuant has one tensor, here all operands and results of the additions must share s; where nothing can take it up
(in front of a normalization, which mixes the channels), a multiplication by s stands behind the quantized tensor.

    x_i (..., channels)  the tied tensors        g_i (channels,)  squared derivatives of the network's output, summed
    d_i(s)  step of x_i: its range over the number of its steps, of the channels' ranges divided by s
    noise(s) = sum over i and channels c of g_ic min((s_c d_i(s))^2 / 12, E[x_ic^2])
             + sum over the layers that read x_i, whose weight becomes W s, of g_o (Q(W s) / s - W)_oc^2 E[x_ic^2]
    s <- s max(1, r / t)^a, as long as noise(s) falls: r the range of one of the x_i / s; over t and a
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.algorithms.channels import folding
from torchquant.algorithms.channels.channel_statistics import ChannelMoments
from torchquant.calibration import batches as data
from torchquant.calibration.calibrate import record
from torchquant.calibration.parallel import gathered, rank, world_size
from torchquant.calibration.stream import Stream
from torchquant.fx import ops
from torchquant.fx.blocks import Span, data_order
from torchquant.fx.consumers import Reader
from torchquant.fx.producers import channel_axis
from torchquant.fx.reading import observer_of
from torchquant.fx.signature import Signature
from torchquant.fx.ties import Tie, has_static_range, ties_of

__all__ = ["smooth_ties", "spread"]

OCTAVES = tuple(i / 2 for i in range(1, 18))
EXPONENTS = (0.25, 0.5, 0.75, 1.0)
_GAIN = 0.99  # a round must leave less than this share of the noise
_WORTH = 0.8  # what must be left of a tie's noise at most for ops at run time to pay
_SHARE = 0.02  # and each op must save at least this share of the noise that is left in all ties
_SAMPLES = 32  # that the derivatives are measured on


def spread(r: torch.Tensor, octave: float, exponent: float) -> torch.Tensor:
    """max(1, r / t)^exponent (channels,), t = max(r) / 2^octave."""
    return (r * (2**octave / max(float(r.max()), 1e-30))).clamp(min=1) ** exponent


def smooth_ties(
    prepared: GraphModule, batches: Sequence[Any], *, explicit: bool = True, seed: int = 0
) -> tuple[int, list[str]]:
    """Smooth what quantized additions tie together, in place; the float function stays what it was.

    Args:
        prepared: a prepared graph; its observers must run again afterwards.
        batches: the calibration data.
        explicit: whether ops may be inserted where nothing takes a factor up.
        seed: of the random projections of the output.

    Returns:
        How many ties changed, and why others did not.
    """
    candidates, notes = [], []
    for tie in ties_of(prepared):
        reason = tie.reason or ("" if explicit or not tie.operations else "nothing takes up the factor")
        if not reason:
            candidates.append(tie)
        elif tie.is_sum:
            notes.append(f"{tie.values[0].name}: left as it is: {reason}")
    measured = zip(candidates, _measure(prepared, candidates, batches, seed) if candidates else (), strict=True)
    ties, noises = [], []
    for tie, noise in measured:
        if noise.activations:  # what no data reach costs nothing
            ties.append(tie)
            noises.append(noise)
    factors = [_search(noise) for noise in noises]
    before = [noise(torch.ones_like(s)) for noise, s in zip(noises, factors, strict=True)]
    after = [noise(s) for noise, s in zip(noises, factors, strict=True)]
    changed = 0
    for tie, s, old, new in zip(ties, factors, before, after, strict=True):
        pays = new <= _WORTH * old and old - new >= _SHARE * sum(after) * tie.operations
        if pays or (new < old and not tie.operations):
            _apply(prepared, tie, s)
            changed += 1
        elif tie.is_sum:
            notes.append(f"{tie.values[0].name}: left as it is: no factor for it and what it is added to pays")
    folding.tidy(prepared)
    return changed, notes


@dataclass(frozen=True)
class _Activation:
    """One observed tensor: ranges, mean squares and derivatives (channels,); `levels` steps in its range."""

    low: torch.Tensor
    high: torch.Tensor
    square: torch.Tensor
    feels: torch.Tensor
    levels: int
    symmetric: bool

    def noise(self, s: torch.Tensor) -> float:
        low, high = float((self.low / s).min().clamp(max=0)), float((self.high / s).max().clamp(min=0))
        step = (2 * max(-low, high) if self.symmetric else high - low) / self.levels
        return float((self.feels * torch.minimum((s * step).square() / 12, self.square)).sum())


@dataclass(frozen=True)
class _Weight:
    """One layer that reads a tensor: its weight's observer, mean squares of its input, derivatives of its output."""

    weight: torch.Tensor
    observer: Any
    square: torch.Tensor
    feels: torch.Tensor
    groups: int

    def noise(self, s: torch.Tensor) -> float:
        scaled = folding.scale_inputs(self.weight, s, self.groups)
        error = (folding.rounded(self.observer, scaled) - scaled).square()
        error = folding.scale_inputs(error, self.square / s.square(), self.groups)
        return float(self.feels @ error.flatten(1).sum(1))


@dataclass(frozen=True)
class _Noise:
    """What a factor does to the network's output."""

    activations: list[_Activation]
    weights: list[_Weight]

    def __call__(self, s: torch.Tensor, bound: float = float("inf")) -> float:
        """Squared error; beyond `bound` it may be too low."""
        noise = sum(a.noise(s) for a in self.activations)
        return noise + sum(w.noise(s) for w in self.weights) if noise < bound else noise


def _search(noise: _Noise) -> torch.Tensor:
    """The factor (channels,) of least noise."""
    s = torch.ones_like(noise.activations[0].low)
    least = noise(s)
    while True:
        best, bar = None, _GAIN * least
        for x in noise.activations:
            r = torch.maximum(x.high, -x.low) / s
            for octave in OCTAVES:
                for exponent in EXPONENTS:
                    trial = s * spread(r, octave, exponent)
                    if (error := noise(trial, bar)) < bar:
                        best, bar = trial, error
        if best is None:
            return s
        s, least = best, bar


# measuring --------------------------------------------------------------------------------------------------------


def _measure(prepared: GraphModule, ties: list[Tie], batches: Sequence[Any], seed: int) -> list[_Noise]:
    moments = {o: ChannelMoments(tie.axis) for tie in ties for o in tie.observers}
    record(prepared, moments, batches)
    flowing = set(data_order(prepared))
    axes = {v: tie.axis for tie in ties for v in tie.observers.values() if v in flowing}
    axes |= {r.layer: channel_axis(r.layer) for tie in ties for r in tie.layers if r.layer in flowing}
    feels = _derivatives(prepared, axes, batches, seed)
    return [_noise_of(prepared, tie, moments, feels) for tie in ties]


def _derivatives(
    prepared: GraphModule, axes: dict[Node, int], batches: Sequence[Any], seed: int
) -> dict[Node, torch.Tensor]:
    """Squared derivatives of the output by each channel (channels,), summed over positions and samples.

    Each process measures some of its own batches, so nothing is exchanged before all are through.
    """
    squares: dict[Node, torch.Tensor] = {}
    seen = 0
    for number, batch in enumerate(batches):
        stream = Stream(prepared, [batch])
        stream.sensitivities([Span((node,), ()) for node in axes], seed + number * world_size() + rank(), metrics=False)
        for node, axis in axes.items():
            if ("sensitivity", node, 0) in stream.store:
                value = stream.store.get(("sensitivity", node, 0)).movedim(axis, -1)
                squares[node] = squares.get(node, 0) + value.reshape(-1, value.shape[-1]).sum(0)
        seen += max(
            len(v) for v in data.given(Signature.of(prepared), batch).leaves if isinstance(v, torch.Tensor) and v.ndim
        )
        if seen >= _SAMPLES:
            break
    everywhere = zip(axes, zip(*gathered([squares.get(node) for node in axes]), strict=True), strict=True)
    sums = {node: [v for v in values if v is not None] for node, values in everywhere}
    return {node: torch.stack(values).sum(0) for node, values in sums.items() if values}


def _noise_of(
    prepared: GraphModule, tie: Tie, moments: dict[Node, ChannelMoments], feels: dict[Node, torch.Tensor]
) -> _Noise:
    activations = []
    for node, value in tie.observers.items():
        observer, seen = _inner(observer_of(prepared, node)), moments[node]
        if not has_static_range(prepared, node) or value not in feels or seen.low is None or seen.high is None:
            continue
        symmetric = observer.qscheme is torch.per_tensor_symmetric
        levels = int(observer.quant_max - observer.quant_min)
        activations.append(_Activation(seen.low, seen.high, seen.square, feels[value], levels, symmetric))
    weights = [_weight_of(prepared, r, moments[r.observer].square, feels) for r in tie.layers if r.observer in moments]
    return _Noise(activations, [w for w in weights if w is not None])


def _weight_of(
    prepared: GraphModule, reader: Reader, square: torch.Tensor, feels: dict[Node, torch.Tensor]
) -> _Weight | None:
    weight, source = folding.constant_at(prepared, reader.layer, 1), ops.argument(reader.layer, 1)
    assert weight is not None
    assert source is not None
    observer = copy.deepcopy(_inner(observer_of(prepared, source)))
    if observer is None or reader.layer not in feels:
        return None
    groups = int(ops.arguments(reader.layer).get("groups", 1))
    return _Weight(weight, observer, square, feels[reader.layer], groups)


def _inner(observer: Any) -> Any:
    return getattr(observer, "activation_post_process", observer)


def _apply(prepared: GraphModule, tie: Tie, s: torch.Tensor) -> None:
    for producer in tie.producers:
        folding.fold_output(prepared, producer, s)
    order = {n: i for i, n in enumerate(prepared.graph.nodes)}
    for value in tie.made:
        users = sorted(set(value.users) - set(tie.outside.pop(value, ())), key=order.__getitem__)
        folding.insert_ops(prepared, value, users, tie.axis, s, None, "SmoothQuant: a factor for each channel")
    for source, users in tie.outside.items():
        behind = sorted(set(users), key=order.__getitem__)
        folding.insert_ops(prepared, source, behind, tie.axis, 1 / s, None, "SmoothQuant: its inverse")
    for reader in tie.layers:
        folding.fold_input(prepared, reader.layer, s)
