"""Observers that refuse what torchao's accept in silence: no data, NaN, infinity."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the ops that `PerTokenActivation` emits
from torch.fx import GraphModule, Node
from torchao.quantization.granularity import PerGroup
from torchao.quantization.pt2e._affine_quantization import AffineQuantizedMinMaxObserver
from torchao.quantization.pt2e.observer import (
    AffineQuantizedObserverBase,
    FixedQParamsObserver,
    HistogramObserver,
    MappingType,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)

from torchquant.errors import CalibrationError
from torchquant.files.shelf import is_open, kept
from torchquant.formats.groups import storable
from torchquant.fx import ops, passes
from torchquant.fx.storing import fold

__all__ = [
    "ActivationHistogram",
    "ActivationMinMax",
    "DynamicActivation",
    "Floor",
    "GroupWeight",
    "MovingActivation",
    "PerChannelWeight",
    "PerTokenActivation",
    "check_finite",
    "least_scale",
    "per_token",
    "reset",
]


def check_finite(x: torch.Tensor, site: str) -> None:
    """Raise CalibrationError if `x` holds NaN or infinity; `site` says where it was seen."""
    if x.numel() == 0 or not x.is_floating_point():
        return
    low, high = torch.aminmax(x.detach())
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return
    bad = "NaN" if bool(torch.isnan(low) | torch.isnan(high)) else "infinity"
    raise CalibrationError(
        f"{site}: the tensor (shape {tuple(x.shape)}) holds {bad}; no range fits it. "
        "Check the calibration data and the float model, or exclude this site."
    )


def reset(observer: torch.nn.Module, site: str = "an observer") -> None:
    """Make an observer of any make forget what it saw; one that keeps nothing stays as it is.

    Raises:
        CalibrationError: it keeps statistics in a way that torchquant does not know.
    """
    inner: Any = getattr(observer, "activation_post_process", observer)
    if isinstance(inner, HistogramObserver):
        inner.histogram = torch.zeros(inner.bins, device=inner.histogram.device)
        inner.min_val.resize_(()).fill_(torch.inf)
        inner.max_val.resize_(()).fill_(-torch.inf)
    elif callable(getattr(inner, "reset_min_max_vals", None)) and hasattr(inner, "min_val"):
        inner.reset_min_max_vals()
    elif isinstance(inner, AffineQuantizedObserverBase):
        for name in ("min_val", "max_val"):
            if hasattr(inner, name):
                delattr(inner, name)
    elif callable(getattr(inner, "reset", None)):
        inner.reset()
    elif not getattr(inner, "is_dynamic", False) and _keeps_statistics(inner):
        raise CalibrationError(
            f"{site}: {type(inner).__name__} has statistics that cannot be taken back, which a second calibration "
            "needs; give it a method `reset`"
        )


def _keeps_statistics(observer: torch.nn.Module) -> bool:
    constant = isinstance(observer, (FixedQParamsObserver, PlaceholderObserver))
    return not constant and any(True for _ in observer.buffers())


@dataclass(frozen=True)
class Floor:
    """What a scale must be at least, for a target whose integers would overflow below: factor * times / over.

    Args:
        factor: a number, or one for each channel (channels,).
        times, over: observers; the largest scale of their min-max range stands for each. While one of them has seen
            nothing there is no floor.
    """

    factor: Any
    times: tuple[Any, ...] = ()
    over: tuple[Any, ...] = ()

    def value(self) -> torch.Tensor | None:
        """The least scale, () or (channels,) float32."""
        least = torch.as_tensor(self.factor, dtype=torch.float32)
        for observer in self.times:
            scale = _widest_scale(observer)
            if scale is None:
                return None
            least = least * scale
        for observer in self.over:
            scale = _widest_scale(observer)
            if scale is None:
                return None
            least = least / scale
        return least


def _widest_scale(observer: Any) -> float | None:
    """The largest scale of what an observer saw, as min-max and quotient floors have it; None if it saw nothing."""
    inner = getattr(observer, "activation_post_process", observer)
    low, high = getattr(inner, "min_val", None), getattr(inner, "max_val", None)
    if low is None or high is None or low.numel() == 0 or not bool(low.isfinite().all() & high.isfinite().all()):
        return None
    low, high = low.clamp(max=0), high.clamp(min=0)
    symmetric = inner.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    extent = 2 * torch.maximum(-low, high) if symmetric else high - low
    scale = torch.maximum(extent / (inner.quant_max - inner.quant_min), inner.eps.to(extent.device))
    floor = _highest(f for f in getattr(inner, "floors", ()) if not f.times)
    return max(float(scale.max()), 0.0 if floor is None else float(floor.max()))


def _highest(floors: Iterable[Floor]) -> torch.Tensor | None:
    values = [value for floor in floors if (value := floor.value()) is not None]
    highest = None
    for value in values:
        highest = value if highest is None else torch.maximum(highest, value)
    return highest


def least_scale(observer: object) -> float:
    """The least scale that a per-tensor observer may choose: its `eps`, or what its target's integers need."""
    inner = getattr(observer, "activation_post_process", observer)
    eps = getattr(inner, "eps", None)
    floor = _highest(getattr(inner, "floors", ()))
    known = [float(v.max()) for v in (eps, floor) if isinstance(v, torch.Tensor)]
    return max(known, default=0.0)


class Floored:
    """Raises a scale to what the target's integers need; a Quantizer sets `floors`."""

    eps: torch.Tensor
    floors: tuple[Floor, ...] = ()

    def _calculate_qparams(self, min_val: torch.Tensor, max_val: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        floor, kept = _highest(self.floors), self.eps
        if floor is None:
            return super()._calculate_qparams(min_val, max_val)  # type: ignore[misc]
        self.eps = torch.maximum(kept, floor.to(kept.device))
        try:
            return super()._calculate_qparams(min_val, max_val)  # type: ignore[misc]
        finally:
            self.eps = kept


class Checked(Floored):
    """Refuses non-finite data when observing, and missing data when asked for qparams."""

    site = "a tensor of the prepared graph"  # set by the Quantizer once the place is known

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_finite(x, self.site)
        return super().forward(x)  # type: ignore[misc]

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.require_data()
        return super().calculate_qparams()  # type: ignore[misc]

    def require_data(self) -> None:
        """Raise CalibrationError unless data was seen."""
        observed: Any = getattr(self, "min_val", None)
        if observed is None or observed.numel() == 0 or bool(torch.isinf(observed).any()):
            raise CalibrationError(
                f"{self.site} never saw data. Run torchquant.calibrate(prepared, batches) before convert_pt2e, "
                "with batches that reach every branch of the model, or exclude this site."
            )


class ActivationMinMax(Checked, MinMaxObserver):
    """Per-tensor range from the smallest and largest value seen."""


class ActivationHistogram(Checked, HistogramObserver):
    """Per-tensor range of least squared error on a histogram of the values seen (torchao's search)."""


class PerChannelWeight(Checked, PerChannelMinMaxObserver):
    """Per-channel range of a weight. The Quantizer runs it in prepare: weights need no calibration data.

    No channel's scale is below 2**-16 of the largest one: where BatchNorm folding leaves a channel almost
    zero, a bias in units of (activation scale x weight scale) would not fit the int32 it is stored in.
    """

    observes_weight = True

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero_point = super().calculate_qparams()
        return torch.maximum(scale, scale.max() * 2**-16), zero_point


class MovingActivation(Floored, MovingAverageMinMaxObserver):
    """Per-tensor range of an activation in training: moving averages of the smallest and the largest value."""


class GroupWeight(Checked, AffineQuantizedMinMaxObserver):
    """A range for each `group_size` neighbours along the input axis (the second) of a weight.

    Scales are `storable`: numbers of `stored_as`, or if that is None of a dtype that fits the weight's. (torchao's
    would be at least the dtype's eps, which for bfloat16 is larger than most.)
    """

    observes_weight = True

    def __init__(
        self, *, group_size: int, symmetric: bool, stored_as: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
        super().__init__(
            mapping, kwargs["dtype"], PerGroup(group_size), kwargs["quant_min"], kwargs["quant_max"], eps=2.0**-24
        )
        self.stored_as = stored_as

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_finite(x, self.site)
        size = self.granularity.group_size
        self.original_dtype, self.block_size = x.dtype, (1, size, *x.shape[2:])
        groups = x.detach().float().reshape(x.shape[0], -1, size, *x.shape[2:])
        self.min_val, self.max_val = map(kept, torch.aminmax(groups.flatten(2), dim=2))
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale float32 and zero point int32 (out, groups)."""
        self.require_data()
        low, high = self.min_val.clamp(max=0), self.max_val.clamp(min=0)
        steps = self.quant_max - self.quant_min
        extent = 2 * torch.maximum(-low, high) if self.mapping_type is MappingType.SYMMETRIC else high - low
        scale = storable((extent / steps).clamp(min=self.eps), self.stored_as or self.original_dtype)
        if self.mapping_type is MappingType.SYMMETRIC:
            return scale, torch.zeros_like(scale, dtype=torch.int32)
        zero_point = self.quant_min - torch.round(low / scale)
        return scale, zero_point.clamp(self.quant_min, self.quant_max).int()

    def convert(self, model: GraphModule, node: Node) -> None:
        """Called by `convert_pt2e`: torchao's ops; where a shelf is open (see there), codes are on it at once."""
        source = node.args[0]
        super().convert(model, node)
        if is_open() and isinstance(source, Node) and ops.is_constant(source):
            for quantize in [user for user in source.users if ops.is_quantize(user)]:
                fold(model, quantize)


class DynamicActivation(PlaceholderObserver):
    """Marks a tensor whose scale is computed at run time; needs no calibration data."""

    site = "a dynamically quantized tensor"


class PerTokenActivation(DynamicActivation):
    """Marks a tensor quantized at run time with one affine scale for each row (token) of its last axis."""

    per_token = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.is_dynamic = True

    def convert(self, model: GraphModule, node: Node) -> None:
        """Called by `convert_pt2e`: replace the observer by choose, quantize and dequantize per token."""
        source = node.args[0]
        assert isinstance(source, Node)
        with model.graph.inserting_before(node):
            values = per_token(model, source, self.quant_min, self.quant_max, self.dtype)
        passes.put_in_place(model, node, values)


def per_token(model: GraphModule, x: Node, quant_min: int, quant_max: int, dtype: torch.dtype) -> Node:
    """Nodes that quantize and dequantize `x` (..., features) with an affine scale for each row."""
    decomposed, call = torch.ops.quantized_decomposed, model.graph.call_function
    chosen = call(decomposed.choose_qparams_per_token_asymmetric.default, (x, dtype))
    scale, zero_point = call(operator.getitem, (chosen, 0)), call(operator.getitem, (chosen, 1))
    grid = (scale, zero_point, quant_min, quant_max, dtype)
    codes = call(decomposed.quantize_per_token.default, (x, *grid))
    return call(decomposed.dequantize_per_token.default, (codes, *grid, torch.float32))
