"""AWQ: scale up the weights of the input channels that matter, so that rounding costs them less.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: "AWQ: Activation-aware Weight Quantization for LLM Compression
and Acceleration", MLSys 2024, section 3.2; the normalization of s is that of the authors' code.

    X (rows, in)   the input        W (out, in)   the weight       Q   rounding to the grid that its observer chooses
    s_j = E|X_j|^alpha / sqrt(max s min s)
    minimize  || (Q(W s) / s - W) Xᵀ ||²  over alpha = 0, 0.05 ... 1

All layers that read the same tensor share s, chosen by the sum of their errors, where the authors take the error of
the block behind them: tr(D A Dᵀ), D = Q(W s) / s - W, A = E[x xᵀ], costs no pass over the data. The paper's second
step, clipping each group's range by the output error, is the search of `SeqMSE`, `GPTQ` and `AdaRound`: let one of
them follow.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.algorithms.channels import folding
from torchquant.algorithms.channels.channel_statistics import ChannelProducts
from torchquant.calibration.calibrate import record
from torchquant.errors import InputError
from torchquant.fx import ops
from torchquant.fx.consumers import Group, Reader, groups_of
from torchquant.fx.producers import shape_behind
from torchquant.fx.reading import observer_of
from torchquant.fx.ties import quantizes_output

__all__ = ["AWQ", "salience_factor"]

_LEAST = 1e-4  # of E|X_j|^alpha, as in the authors' code
_WORTH = 0.8  # what must be left of the error at most for an op at run time to pay
_BYTES = 2**30  # of second moments in memory at once


def salience_factor(magnitude: torch.Tensor, alpha: float) -> torch.Tensor:
    """E|X|^alpha (in,), divided by the root of its largest times its smallest value."""
    factor = magnitude.pow(alpha).clamp(min=_LEAST)
    return factor / (factor.max() * factor.min()).sqrt()


class AWQ:
    """Scales input channels by the magnitude of their activations, for the sake of weights in few bits.

    A factor goes into the op that makes the tensor (a normalization, a linear, a multiplication by a constant: see
    `torchquant.fx.producers`), if linears and 1x1 convolutions are all that read it. Everything else stays as it is,
    and `notes` say why. Activations that are quantized too are not part of the error; `SmoothQuant` is for them.

    Args:
        steps: values of alpha to try above 0.
        explicit: where nothing can take the factor, multiply in front of the layers, if that takes at least a fifth
            off the squared error: one float op more at run time.

    Raises:
        InputError: `steps` is not above 0.
    """

    def __init__(self, steps: int = 20, *, explicit: bool = False) -> None:
        if steps < 1:
            raise InputError(f"steps is {steps}; it must be at least 1")
        self.steps, self.explicit = steps, explicit
        self.notes: list[str] = []

    def transform(self, prepared: GraphModule, batches: Sequence[Any]) -> int:
        """Scale in place, float function unchanged; returns how many layers changed. Recalibrate afterwards."""
        self.notes, changed = [], 0
        groups = [g for g in groups_of(prepared, unobserved=True) if _is_rounded(prepared, g) and self._possible(g)]
        for part in _in_memory(groups):
            products = [ChannelProducts(g.axis, _channels(g)) for g in part]
            record(prepared, {_first(g): p for g, p in zip(part, products, strict=True)}, batches)
            changed += sum(self._scale(prepared, g, p) for g, p in zip(part, products, strict=True))
        folding.tidy(prepared)
        return changed

    def _possible(self, group: Group) -> bool:
        reason = group.reason
        if not reason and not group.by_rows:
            reason = "a convolution of more than one position reads it"
        if isinstance(group.producer, str) and not reason:
            beside = quantizes_output(group.tensor)  # an op between the two would leave it float
            reason = "" if self.explicit and not beside else group.producer
        if reason:
            self.notes.append(f"{group.tensor.name}: left as it is: {reason}")
        return not reason

    def _scale(self, prepared: GraphModule, group: Group, products: ChannelProducts) -> int:
        if not products.count:
            self.notes.append(f"{group.tensor.name}: left as it is: no batch reaches it")
            return 0
        if not bool(products.products.isfinite().all()):
            self.notes.append(f"{group.tensor.name}: left as it is: it holds NaN, infinity, or values beyond float32")
            return 0
        s = self._search(prepared, group, products)
        if s is None:
            self.notes.append(f"{group.tensor.name}: left as it is: no factor lowers the error of what reads it")
            return 0
        folding.fold(prepared, group, s, name="AWQ")
        return len(group.readers)

    def _search(self, prepared: GraphModule, group: Group, products: ChannelProducts) -> torch.Tensor | None:
        """The factor (in,) of least error, or None if none is worth it."""
        magnitude, metric = products.magnitude, products.products
        layers = [(_weight(prepared, r), _rounding(prepared, r)) for r in group.readers]

        def error(s: torch.Tensor) -> float:
            return sum(_error(weight, copy.deepcopy(observer), s, metric) for weight, observer in layers)

        factors = [salience_factor(magnitude, step / self.steps) for step in range(1, self.steps + 1)]
        errors = [error(s) for s in factors]
        bar = error(torch.ones_like(magnitude)) * (_WORTH if isinstance(group.producer, str) else 1.0)
        return factors[errors.index(min(errors))] if min(errors) < bar else None


def _error(weight: torch.Tensor, observer: Any, s: torch.Tensor, metric: torch.Tensor) -> float:
    """tr(D A DT), D = Q(W s) / s - W."""
    rounded = folding.rounded(observer, folding.scale_inputs(weight, s))
    off = folding.scale_inputs(rounded, 1 / s).sub_(weight).flatten(1).float()
    return float(((off @ metric) * off).sum(dtype=torch.float64))


def _weight(prepared: GraphModule, reader: Reader) -> torch.Tensor:
    weight = folding.constant_at(prepared, reader.layer, 1)
    assert weight is not None
    return weight


def _rounding(prepared: GraphModule, reader: Reader) -> Any:
    """The observer of a layer's weight, or None if it stays float."""
    source = ops.argument(reader.layer, 1)
    observer = observer_of(prepared, source) if source is not None else None
    return getattr(observer, "activation_post_process", observer)


def _is_rounded(prepared: GraphModule, group: Group) -> bool:
    return any(_rounding(prepared, r) is not None for r in group.readers)


def _first(group: Group) -> Node:
    """A node whose first input is the tensor."""
    reader = group.readers[0]
    return reader.layer if reader.observer is group.tensor else reader.observer


def _channels(group: Group) -> int:
    return int(shape_behind(group.tensor)[group.axis])


def _in_memory(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """The groups, some at a time: as many as their second moments leave room for."""
    part, size = list[Group](), 0
    for group in groups:
        mine = 8 * _channels(group) ** 2
        if part and size + mine > _BYTES:
            yield part
            part, size = [], 0
        part.append(group)
        size += mine
    if part:
        yield part
