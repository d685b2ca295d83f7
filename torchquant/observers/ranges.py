"""Observers that search for a range instead of taking the smallest and the largest value.

    activations: `ActivationPercentile`, `ActivationMSE`, `ActivationEntropy`, on a histogram of all values seen
    weights: `WeightMSE`, `PerChannelWeightMSE`, `GroupWeightMSE`, on the weight itself

Every candidate is judged on the grid that it would give: the scale and the integer zero point of the observer's own
formula, rounding and clipping included. The range of min-max is always among the candidates, and wins ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e._affine_quantization import (
    AffineQuantizedMinMaxObserver,
    _get_reduction_params,
    choose_qparams_affine_with_min_max,
)
from torchao.quantization.pt2e.observer import MappingType, MinMaxObserver, ZeroPointDomain

from torchquant.errors import SchemeError
from torchquant.observers import histograms as search
from torchquant.observers.histograms import Codes, Pair
from torchquant.observers.minmax import Checked, PerChannelWeight
from torchquant.types import DTYPE_RANGE

__all__ = [
    "ActivationEntropy",
    "ActivationMSE",
    "ActivationPercentile",
    "GroupWeightMSE",
    "PerChannelWeightMSE",
    "WeightMSE",
]


class _Histogram(Checked, MinMaxObserver):
    """Min, max and a histogram of all values seen, from which a subclass chooses (low, high) when asked for qparams.

    Args:
        bins: how many; the memory is `bins` int64.
        kwargs: as `MinMaxObserver` takes them: dtype, quant_min, quant_max, qscheme, eps.

    Raises:
        SchemeError: fewer than 2048 bins, or a dtype that is no integer grid.
    """

    def __init__(self, *, bins: int = 4096, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check(bins >= 2048, f"a histogram of {bins} bins is too coarse; use 2048 or more")
        _check_integer(self.dtype)
        self.register_buffer("counts", torch.zeros(bins, dtype=torch.int64))
        self.register_buffer("zeros", torch.zeros((), dtype=torch.int64))
        self.codes = (self.quant_min, self.quant_max)
        self.symmetric = self.qscheme == torch.per_tensor_symmetric

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the values of `x`, of any shape, and return it."""
        bins, old = len(self.counts), (float(self.min_val), float(self.max_val))
        values = super().forward(x.detach().to(torch.float32))
        if values.numel():
            new = search.placement(float(self.min_val), float(self.max_val), bins)
            if math.isfinite(old[0]) and search.placement(*old, bins) != new:
                self.counts.copy_(search.fold(self.counts, search.placement(*old, bins), new))
            counts, zeros = search.count_values(values, *new, bins)
            self.counts += counts.to(self.counts.device)
            self.zeros += zeros.to(self.zeros.device)
        return x

    def reset_min_max_vals(self) -> None:
        """Forget all values."""
        super().reset_min_max_vals()
        self.counts.zero_()
        self.zeros.zero_()

    def calculate_qparams(self) -> Any:
        """Scale (1,) float32 and zero_point (1,) of the chosen range."""
        super().calculate_qparams()  # raises if no data came
        low, high = self.find_range(*self.histogram())
        return self._calculate_qparams(*(t.to(self.min_val) for t in (low, high)))

    def histogram(self) -> Pair:
        """Counts (bins,) float64 of the values other than zero, and edges (bins + 1,) float64; no empty ends."""
        exponent, first = search.placement(float(self.min_val), float(self.max_val), len(self.counts))
        last = math.floor(math.ldexp(float(self.max_val), -exponent))
        edges = torch.arange(first, last + 2, dtype=torch.float64) * math.ldexp(1.0, exponent)
        return self.counts[: last + 1 - first].cpu().double(), edges

    def find_range(self, counts: torch.Tensor, edges: torch.Tensor) -> Pair:
        """The chosen (low, high)."""
        raise NotImplementedError

    def _search(self, score: Callable[[Pair], torch.Tensor]) -> Pair:
        def of_range(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
            scale, zero_point = self._calculate_qparams(low.to(self.min_val), high.to(self.min_val))
            return score((scale.cpu(), zero_point.cpu()))

        ends, top = (float(self.min_val), float(self.max_val)), search.widest_factor(self.codes, self.symmetric)
        return search.search_range(of_range, *ends, symmetric=self.symmetric, top=top)


class ActivationPercentile(_Histogram):
    """The range that holds `percentile` % of all values, as many below it as above it; exact to a bin's width."""

    def __init__(self, percentile: float = 99.99, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check(0 < percentile <= 100, f"percentile {percentile} must be over 0 and at most 100")
        self.percentile = percentile

    def find_range(self, counts: torch.Tensor, edges: torch.Tensor) -> Pair:
        if self.percentile == 100:
            return self.min_val, self.max_val
        outside = (1 - self.percentile / 100) / 2
        q = torch.tensor([outside, 1 - outside], dtype=torch.float64)
        low, high = search.quantiles(counts, edges, self.zeros.cpu(), q).clamp(float(self.min_val), float(self.max_val))
        return low, high


class ActivationMSE(_Histogram):
    """The range of least sum |x - Q(x)|**p over all values; p = 2.4 is BRECQ's (Li et al., ICLR 2021)."""

    def __init__(self, p: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check(p > 0, f"p {p} must be over 0")
        self.p = p

    def find_range(self, counts: torch.Tensor, edges: torch.Tensor) -> Pair:
        return self._search(lambda grid: search.lp_error(counts, edges, grid, self.codes, self.p))


class ActivationEntropy(_Histogram):
    """The range of least KL divergence (`kl_divergence`); min-max for grids of more codes than an eighth of the bins.

    Zeros are left out: every grid has them exactly, and after a ReLU they would outweigh all else.
    """

    def find_range(self, counts: torch.Tensor, edges: torch.Tensor) -> Pair:
        if 8 * (self.quant_max - self.quant_min + 1) > len(self.counts):
            return self.min_val, self.max_val
        return self._search(lambda grid: search.kl_divergence(counts, edges, grid, self.codes))


class _WeightSearch:
    """Chooses a factor for each row's min-max range. It sees one weight; if the weight changes, the last one decides.

    A calibration calls it with the same weight for every batch: it searches again only if min, max or norm changed.
    """

    def _start(self, p: float, symmetric: bool, codes: Codes) -> None:
        _check(p > 0, f"p {p} must be over 0")
        self.p, self.symmetric, self.codes = p, symmetric, codes
        self._forget()

    def _forget(self) -> None:
        self.factor, self.norm = torch.nn.Buffer(torch.zeros(0)), torch.nn.Buffer(torch.zeros(0))

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Search for the weight `x`, and return it."""
        self.min_val, self.max_val = self.min_val.to(x.device), self.max_val.to(x.device)
        before = self.min_val.clone(), self.max_val.clone()
        x = super().forward(x)  # type: ignore[misc]
        if x.numel():
            rows = self._rows(x.detach().float())
            norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
            known = torch.equal(before[0], self.min_val) and torch.equal(before[1], self.max_val)
            if not known or not torch.equal(norm, self.norm):
                top = search.widest_factor(self.codes, self.symmetric)
                self.norm, self.factor = norm, search.search_factor(rows, self._qparams, self.codes, self.p, top)
        return x

    def calculate_qparams(self: Any) -> Any:
        """Scale float32 and zero_point, in the shape that the min-max observer has them."""
        super().calculate_qparams()  # type: ignore[misc]  # raises if no data came
        return self._qparams(self.factor)

    def reset_min_max_vals(self) -> None:
        """Forget the weight."""
        super().reset_min_max_vals()  # type: ignore[misc]
        self._forget()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in ("min_val", "max_val", "factor", "norm", "block"):
            stored, own = state_dict.get(prefix + name), getattr(self, name, None)
            if stored is not None and own is not None:
                setattr(self, name, torch.empty_like(stored, device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]


class WeightMSE(_WeightSearch, Checked, MinMaxObserver):
    """Per-tensor range of least sum |w - Q(w)|**p: a factor of the min-max range."""

    def __init__(self, p: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_integer(self.dtype)
        self._start(p, self.qscheme == torch.per_tensor_symmetric, (self.quant_min, self.quant_max))

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(1, -1)

    def _qparams(self, factor: torch.Tensor) -> Any:
        return self._calculate_qparams(self.min_val * factor, self.max_val * factor)


class PerChannelWeightMSE(_WeightSearch, PerChannelWeight):
    """Per-channel ranges of least sum |w - Q(w)|**p, no scale under `PerChannelWeight`'s floor for this weight."""

    def __init__(self, p: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_integer(self.dtype)
        _check(self.qscheme != torch.per_channel_affine_float_qparams, "the search is for integer zero points")
        self._start(p, self.qscheme == torch.per_channel_symmetric, (self.quant_min, self.quant_max))

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, self.ch_axis).flatten(1)

    def _qparams(self, factor: torch.Tensor) -> Any:
        floor = self._calculate_qparams(self.min_val, self.max_val)[0].max() * 2**-16
        scale, zero_point = self._calculate_qparams(self.min_val * factor, self.max_val * factor)
        return torch.maximum(scale, floor), zero_point


class _GroupMinMax(AffineQuantizedMinMaxObserver):
    """torchao's observer, which keeps what it saw in plain attributes, with buffers."""

    min_val: torch.Tensor
    max_val: torch.Tensor
    block_size: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reset_min_max_vals()

    def reset_min_max_vals(self) -> None:
        for name in ("min_val", "max_val", "block"):
            setattr(self, name, torch.nn.Buffer(torch.zeros(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel():
            if self.min_val.numel() == 0:
                del self.min_val, self.max_val
            super().forward(x.contiguous())
            for name, value in (("min_val", self.min_val), ("max_val", self.max_val)):
                delattr(self, name)
                self.register_buffer(name, value)
            self.block = torch.tensor(self.block_size)
        return x

    def convert(self, model: GraphModule, observer_node: Node) -> None:
        self.calculate_qparams()  # raises if no data came, before torchao asserts
        if self.block_size is None:  # the buffers came from a state_dict
            self.block_size, self.original_dtype = tuple(self.block.tolist()), self.min_val.dtype
        super().convert(model, observer_node)


class GroupWeightMSE(_WeightSearch, Checked, _GroupMinMax):
    """Ranges of least sum |w - Q(w)|**p for each group (or whatever block `granularity` says).

    Takes the arguments of torchao's `AffineQuantizedMinMaxObserver`, whose `convert` it keeps.

    Raises:
        SchemeError: a float target_dtype or zero point, or no quant_min and quant_max where the dtype is under 8 bits.
    """

    quant_min: Any
    quant_max: Any

    def __init__(self, p: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_integer(self.target_dtype)
        integer = self.preserve_zero and self.zero_point_domain == ZeroPointDomain.INT
        _check(integer, "the search is for integer zero points")
        if self.quant_min is None or self.quant_max is None:
            _check(self.target_dtype in DTYPE_RANGE, f"give quant_min and quant_max for {self.target_dtype}")
            self.quant_min, self.quant_max = DTYPE_RANGE[self.target_dtype]
        self._start(p, self.mapping_type != MappingType.ASYMMETRIC, (self.quant_min, self.quant_max))

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        shape, reduced = _get_reduction_params(self.block_size, x.shape)
        kept = [d for d in range(len(shape)) if d not in reduced]
        return x.reshape(shape).permute(*kept, *reduced).reshape(self.min_val.numel(), -1)

    def _qparams(self, factor: torch.Tensor) -> Any:
        factor = factor.reshape(self.min_val.shape)
        low, high = ((v * factor).to(v.dtype) for v in (self.min_val, self.max_val))
        grid = (self.target_dtype, *self.codes, self.eps, self.scale_dtype, self.zero_point_dtype)
        return choose_qparams_affine_with_min_max(low, high, self.mapping_type, (), *grid)


def _check_integer(dtype: torch.dtype) -> None:
    _check(not dtype.is_floating_point, f"the search is for integer grids, not {dtype}")


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise SchemeError(message)
