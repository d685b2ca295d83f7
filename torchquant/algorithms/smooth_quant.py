"""SmoothQuant: divide each input channel of a layer by a factor and multiply its weights by it.

Xiao, Lin, Seznec, Wu, Demouth, Han: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", ICML 2023 (section 4: the factor), and Wei et al.: "Outlier Suppression+: Accurate Quantization of
Large Language Models by Equivalent and Effective Shifting and Scaling", EMNLP 2023 (sections 3 and 4: the offset, and
factors that leave all but the outlying channels alone).

    X (rows, in)   the input           W (out, in)   the weight           Q   rounding to an observer's grid
    z_j = (max X_j + min X_j) / 2      or 0
    s_j = max|X_j - z_j|^alpha / max|W_j|^(1 - alpha)     or     s_j = max(1, max|X_j - z_j| / t)
    minimize  || Q((X - z) / s) Q(W s)ᵀ - (X - z) Wᵀ ||²  over alpha, t, and z or 0

All layers that read the same tensor share s and z.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e.observer import MinMaxObserver

from torchquant.algorithms.channels import folding
from torchquant.algorithms.channels.channel_statistics import ChannelSample, Fold
from torchquant.algorithms.channels.tied_factors import smooth_ties
from torchquant.calibration.calibrate import record
from torchquant.errors import InputError
from torchquant.fx import ops
from torchquant.fx.consumers import Group, Reader, groups_of
from torchquant.fx.grids import fake_quantizer
from torchquant.fx.producers import is_padded, shape_behind
from torchquant.fx.reading import observer_of
from torchquant.fx.ties import quantizes_output

__all__ = ["Rule", "SmoothQuant", "outlier_factor", "smoothing_factor"]

ALPHAS = tuple(i / 10 for i in range(11))
OCTAVES = tuple(i / 2 for i in range(1, 15))  # t = max|X| / 2**octave
# What must be left of the squared error at most for an op at run time to pay, and for an exponent instead of a
# threshold: where every channel fills the range, each one is cut off by data beyond the calibration data.
_WORTH = 0.8
_BYTES = 2**30  # of rows kept for the search, over all sites


def smoothing_factor(x_max: torch.Tensor, w_max: torch.Tensor, alpha: float) -> torch.Tensor:
    """x_max^alpha / w_max^(1 - alpha) (in,), of geometric mean 1; dead channels count as 1e-5 of the largest."""
    x_max, w_max = (v.clamp(min=max(1e-5 * float(v.max()), 1e-30)) for v in (x_max, w_max))
    log = alpha * x_max.log() - (1 - alpha) * w_max.log()
    return (log - log.mean()).exp()


def outlier_factor(x_max: torch.Tensor, octave: float) -> torch.Tensor:
    """max(1, x_max / t) (in,) with t = max(x_max) / 2^octave: only channels beyond t shrink."""
    return (x_max * 2**octave / max(float(x_max.max()), 1e-30)).clamp(min=1)


@dataclass(frozen=True)
class Rule:
    """How to get s and z from the range of X and max |W| of each channel.

    Args:
        alpha: the exponent of `smoothing_factor`, or None.
        octave: the threshold of `outlier_factor`, or None; without either, s is one.
        shift: whether z is the middle of the range.
    """

    alpha: float | None = None
    octave: float | None = None
    shift: bool = False

    def __call__(self, low: torch.Tensor, high: torch.Tensor, w_max: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(s, z), each (in,)."""
        z = (low + high) / 2 if self.shift else torch.zeros_like(low)
        x_max = torch.maximum(high - z, z - low)
        if self.alpha is not None:
            return smoothing_factor(x_max, w_max, self.alpha), z
        return outlier_factor(x_max, self.octave) if self.octave is not None else torch.ones_like(low), z


def _thresholds(shift: bool) -> list[Rule]:
    return [*(Rule(octave=o, shift=shift) for o in OCTAVES), *([Rule(shift=True)] if shift else [])]


def _exponents(shift: bool) -> list[Rule]:
    return [Rule(alpha, shift=shift) for alpha in ALPHAS]


class SmoothQuant:
    """Moves the outliers of activations into the weights that read them.

    A factor goes into the op that makes the activation (a normalization, a convolution or linear, a multiplication by
    a constant: see `torchquant.fx.producers`), if all its readers are smoothed; else into a multiplication in front
    of a linear's observer, where that takes at least a fifth off the squared error. Convolutions get no such op.

    Args:
        alpha: how much of the outliers to move, 0 to 1; None: the best of a grid for each tensor, by output error.
        shift: subtract the middle of each channel's range too, where that pays: its effect goes into biases.
        explicit: insert ops where nothing can take the factor; if not, such tensors stay as they are (see `notes`).
        ties: smooth also what quantized additions tie together: see `torchquant.algorithms.channels.tied_factors`.
        rows: how many rows of each tensor the search looks at.
        seed: of their draw.
    """

    def __init__(
        self,
        alpha: float | None = None,
        shift: bool = True,
        explicit: bool = True,
        ties: bool = True,
        rows: int = 1024,
        seed: int = 0,
    ) -> None:
        if alpha is not None and not 0 <= alpha <= 1:
            raise InputError(f"alpha {alpha} must be between 0 and 1, or None for a search")
        self.alpha, self.shift, self.explicit, self.ties = alpha, shift, explicit, ties
        self.rows, self.seed = rows, seed
        self.notes: list[str] = []

    def transform(self, prepared: GraphModule, batches: Sequence[Any]) -> int:
        """Smooth in place, float function unchanged; returns how many places changed. Recalibrate afterwards."""
        self.notes, tied = [], 0
        if self.ties:
            tied, self.notes = smooth_ties(prepared, batches, explicit=self.explicit, seed=self.seed)
        groups = [g for g in groups_of(prepared) if self._possible(g)]
        samples = self._measure(prepared, groups, batches)
        changed = sum(self._smooth(prepared, g, s) for g, s in zip(groups, samples, strict=True))
        folding.tidy(prepared)
        return tied + changed

    def _possible(self, group: Group) -> bool:
        reason = group.reason
        if isinstance(group.producer, str) and not reason:
            linear = all(ops.op_name(r.layer) == "linear" for r in group.readers)
            beside = quantizes_output(group.tensor)  # an op between the two would leave it float
            reason = "" if self.explicit and linear and not beside else group.producer
        if reason:
            self.notes.append(f"{group.tensor.name}: left as it is: {reason}")
        return not reason

    def _measure(self, prepared: GraphModule, groups: list[Group], batches: Sequence[Any]) -> list[ChannelSample]:
        sizes = [_elements(g) for g in groups]
        rows = min(self.rows, max(64, _BYTES // (4 * max(1, sum(c for c, _ in sizes)))))
        samples = [
            ChannelSample(g.axis, rows if g.by_rows else max(1, rows // positions), g.by_rows, self.seed)
            for g, (_, positions) in zip(groups, sizes, strict=True)
        ]
        record(prepared, {g.readers[0].observer: s for g, s in zip(groups, samples, strict=True)}, batches)
        return samples

    def _smooth(self, prepared: GraphModule, group: Group, sample: ChannelSample) -> int:
        whole = sample.range
        if whole is None:
            self.notes.append(f"{group.tensor.name}: left as it is: no batch reaches it")
            return 0
        search = _Search(prepared, group, sample)
        rule = self._choose(group, search)
        if rule is None:
            self.notes.append(f"{group.tensor.name}: left as it is: no factor lowers the error of what reads it")
            return 0
        folding.fold(prepared, group, *rule(*whole, search.w_max), name="SmoothQuant")
        return len(group.readers)

    def _choose(self, group: Group, search: _Search) -> Rule | None:
        """The rule of least error, or None if none is worth it."""
        shifts = (False, True) if self.shift and _may_shift(group) else (False,)
        if self.alpha is not None:
            return min((Rule(self.alpha, shift=shift) for shift in shifts), key=search.error)
        op = _WORTH if isinstance(group.producer, str) else 1.0
        best, least = None, search.error(Rule())
        for family, worth in ((_thresholds, op), (_exponents, _WORTH)):
            for shift in shifts:
                bar = least * (min(worth, op) if shift else worth)
                for rule in family(shift):
                    if (error := search.error(rule)) < bar:
                        best, least, bar = rule, error, error
        return best


def _may_shift(group: Group) -> bool:
    folds = isinstance(group.producer, str) or group.producer.shift
    return folds and not any(is_padded(r.layer) for r in group.readers)


class _Search:
    """What it takes to judge a rule for one tensor: sampled input, and the weights and grids of its readers."""

    def __init__(self, prepared: GraphModule, group: Group, sample: ChannelSample) -> None:
        self._layers = [_Layer(prepared, r, sample.rows) for r in group.readers]
        self._observers = {r.observer: _inner(observer_of(prepared, r.observer)) for r in group.readers}
        self._folds, axis = list(sample.folds()), -1 if sample.rows else max(1, sample.axis)
        items = self._folds[0].items
        self._around = (slice(None), *[None] * (items.ndim - 1 - axis % items.ndim))
        self.w_max = torch.stack([folding.input_magnitudes(r.weight, r.groups) for r in self._layers]).amax(0)

    def error(self, rule: Rule) -> float:
        """Squared error of all readers' outputs with input and weights rounded."""
        return sum(self._error_on(fold, rule) for fold in self._folds)

    def _error_on(self, fold: Fold, rule: Rule) -> float:
        s, z = rule(fold.low, fold.high, self.w_max)
        x = (fold.items - z[self._around]) / s[self._around]
        ends = torch.stack([(edge - z) / s for edge in (fold.low, fold.high)])
        rounded = {node: _round_activation(o, x, ends) for node, o in self._observers.items()}
        return sum(layer.error(fold, rounded[layer.observer], s, z) for layer in self._layers)


class _Layer:
    """One reader's share of the search."""

    def __init__(self, prepared: GraphModule, reader: Reader, rows: bool) -> None:
        weight, source = folding.constant_at(prepared, reader.layer, 1), ops.argument(reader.layer, 1)
        assert weight is not None
        assert source is not None
        self.observer, self.weight = reader.observer, weight
        self.groups = int(ops.arguments(reader.layer).get("groups", 1))
        self._node, self._rows = reader.layer, rows
        self._exact: dict[int, torch.Tensor] = {}
        self._grid = copy.deepcopy(_inner(observer_of(prepared, source)))

    def error(self, fold: Fold, rounded: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> float:
        """Squared error of the output where (input - z) / s is `rounded`, and so is the weight times s."""
        if id(fold) not in self._exact:
            self._exact[id(fold)] = self._run(fold.items, self.weight)
        exact = self._exact[id(fold)]
        weight = folding.rounded(self._grid, folding.scale_inputs(self.weight, s, self.groups))
        output = self._run(rounded, weight)
        if bool(z.any()):
            offset = folding.scale_inputs(self.weight, z, self.groups).flatten(1).sum(1)
            output += offset if self._rows else offset.reshape(-1, *[1] * (self.weight.ndim - 2))
        return float((output - exact).square().sum())

    def _run(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self._rows:
            return torch.nn.functional.linear(x, weight.flatten(1))
        return self._node.target(x, weight, None, *self._node.args[3:], **self._node.kwargs)  # type: ignore[operator]


def _round_activation(observer: Any, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`x` rounded to the observer's grid; a static one spans `ends`, whatever else the observer would choose.

    What a histogram would cut off is not foreseen: a sample is too small to tell.
    """
    if getattr(observer, "is_dynamic", False) or callable(getattr(observer, "convert", None)):
        return fake_quantizer(observer, x.shape)(x)
    grid = MinMaxObserver(observer.dtype, observer.qscheme, quant_min=observer.quant_min, quant_max=observer.quant_max)
    grid(ends)
    return fake_quantizer(grid, x.shape)(x)


def _inner(observer: Any) -> Any:
    return getattr(observer, "activation_post_process", observer)


def _elements(group: Group) -> tuple[int, int]:
    """Channels of the tensor, and positions of one sample of the batch (as far as the sizes are fixed)."""
    shape = [s if isinstance(s, int) else 1 for s in shape_behind(group.tensor)]
    channels = shape[group.axis]
    return channels, max(1, math.prod(shape[1:]) // channels)
