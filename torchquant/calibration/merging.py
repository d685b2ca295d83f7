"""Calibration by several processes: each sees its share of the batches, all end with the observers of one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e import DerivedObserverOrFakeQuantize
from torchao.quantization.pt2e._affine_quantization import AffineQuantizedMinMaxObserver
from torchao.quantization.pt2e.observer import (
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)

from torchquant.calibration.parallel import gathered, rank
from torchquant.errors import CalibrationError
from torchquant.fx import ops
from torchquant.fx.reading import observers
from torchquant.observers import histograms
from torchquant.observers.minmax import reset
from torchquant.observers.ranges import ActivationEntropy, ActivationMSE, ActivationPercentile

__all__ = ["begin", "merge"]

State = dict[str, torch.Tensor]
_CONSTANT = (FixedQParamsObserver, PlaceholderObserver, DerivedObserverOrFakeQuantize)
_MOVING = (MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver)
_MIN_MAX = (MinMaxObserver, PerChannelMinMaxObserver, AffineQuantizedMinMaxObserver)
_COUNTING = (ActivationPercentile, ActivationMSE, ActivationEntropy)


def begin(models: Sequence[GraphModule]) -> None:
    """Before a pass over the data: what was seen in an earlier one counts once, in the first process.

    Raises:
        CalibrationError: an observer whose states cannot be merged; it is named.
    """
    for site, observer in _stateful(models):
        _check(site, observer)
        if rank():
            reset(observer, site)


def merge(models: Sequence[GraphModule], reached: set[int]) -> None:
    """After it: give every process the observers' state over all batches.

    Minima, maxima and the histograms of `torchquant.observers.ranges` become exactly those of one process. torchao's
    histogram depends on the order of its batches: here those of the processes are put together, in the order of their
    ranks.

    Args:
        reached: ids of the observers that saw data; those that saw some in another process are added.
    """
    ids = [id(module) for model in models for _, module in observers(model)]
    stateful = [observer for _, observer in _stateful(models)]
    everything = gathered(([key in reached for key in ids], [_state(observer) for observer in stateful]))
    for flags, _ in everything:
        reached.update(key for key, seen in zip(ids, flags, strict=True) if seen)
    for observer, *parts in zip(stateful, *(states for _, states in everything), strict=True):
        seen = [part for part in parts if part and bool(torch.isfinite(part["min_val"]).all())]
        if seen:
            _put_together(observer, seen)


def _stateful(models: Sequence[GraphModule]) -> list[tuple[str, Any]]:
    """Each observer of data (weights are alike everywhere) that keeps something, once, with the name of its site."""
    stateful: dict[int, tuple[str, Any]] = {}
    for model in models:
        for node, module in observers(model):
            inner: Any = getattr(module, "activation_post_process", module)
            if ops.is_constant(node.args[0]) or isinstance(inner, _CONSTANT) or getattr(inner, "is_dynamic", False):  # type: ignore[arg-type]
                continue
            stateful.setdefault(id(inner), (str(getattr(inner, "site", node.args[0])), inner))
    return list(stateful.values())


def _check(site: str, observer: Any) -> None:
    kept = {name for name, _ in observer.named_buffers()} - {"min_val", "max_val", "eps"}
    known = isinstance(observer, (HistogramObserver, *_COUNTING)) or (isinstance(observer, _MIN_MAX) and not kept)
    if not known or isinstance(observer, _MOVING):
        raise CalibrationError(
            f"{site}: what several {type(observer).__name__} saw cannot be put together; calibrate in one process, or "
            "use an observer of minima, maxima or a histogram"
        )


def _state(observer: Any) -> State:
    names = ("min_val", "max_val", "histogram", "counts", "zeros")
    kept = {name: getattr(observer, name, None) for name in names}
    tensors = {name: value.detach().cpu() for name, value in kept.items() if isinstance(value, torch.Tensor)}
    return tensors if "min_val" in tensors and tensors["min_val"].numel() else {}


def _put_together(observer: Any, parts: Sequence[State]) -> None:
    low = torch.stack([part["min_val"] for part in parts]).amin(0)
    high = torch.stack([part["max_val"] for part in parts]).amax(0)
    if isinstance(observer, HistogramObserver):
        total = torch.zeros(observer.bins)
        for part in parts:
            total = observer._combine_histograms(part["histogram"], part["min_val"], part["max_val"], total, low, high)
        observer.histogram = total.to(observer.histogram.device)
    elif isinstance(observer, _COUNTING):
        bins = len(observer.counts)
        new = histograms.placement(float(low), float(high), bins)
        olds = [histograms.placement(float(part["min_val"]), float(part["max_val"]), bins) for part in parts]
        observer.counts.copy_(sum(histograms.fold(p["counts"], old, new) for p, old in zip(parts, olds, strict=True)))
        observer.zeros.copy_(sum(part["zeros"] for part in parts))
    for name, value in (("min_val", low), ("max_val", high)):
        device = getattr(observer, name).device if hasattr(observer, name) else value.device
        setattr(observer, name, value.to(device))
