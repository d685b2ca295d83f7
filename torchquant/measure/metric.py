"""A metric of the user's own: a function of a model that says how good it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import torch
from torch.fx import GraphModule

from torchquant.errors import InputError, TorchquantError
from torchquant.fx.signature import Signature

__all__ = ["Metric", "callable_model", "check_drop", "check_metric", "scored"]

_CPU = torch.device("cpu")
Metric = Callable[[Any], Any]  # metric(model): a number, higher is better


class _Model(torch.nn.Module):
    """A graph or program as a model: with `eval`, `train`, `device`, and of graphs any order of keyword arguments."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self._held = [held]  # in a list: no child that `train` would reach
        self._graph = [held] if isinstance(held, GraphModule) else []
        self._signature = Signature.of(held) if isinstance(held, GraphModule) else None
        place = _CPU if isinstance(held, GraphModule) else getattr(held, "device", _CPU)
        self._none = torch.nn.Parameter(torch.zeros((), device=place), requires_grad=False)
        self.training = False

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Those of the graph; where there are none, a constant, since metrics ask the first one for its device."""
        named = [pair for graph in self._graph for pair in graph.named_parameters(*args, **kwargs)]
        return iter(named or [("none", self._none)])

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Those of the graph."""
        return (pair for graph in self._graph for pair in graph.named_buffers(*args, **kwargs))

    @property
    def device(self) -> torch.device:
        """Where the graph's weights are, as models of transformers say it."""
        values = (*self.parameters(), *self.buffers())
        return next((value.device for value in values if value is not self._none), self._none.device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._signature is not None:
            args, kwargs = self._signature.arguments(self._signature.leaves(args, kwargs))
        return self._held[0](*args, **kwargs)


def callable_model(model: Any) -> Any:
    """The model as metrics get it: a graph or a program behind `eval` and `train`, anything else as it is."""
    is_program = isinstance(getattr(model, "target", None), str) and not isinstance(model, torch.nn.Module)
    return _Model(model) if is_program or isinstance(model, GraphModule) else model


def check_metric(metric: object) -> None:
    """Raise InputError unless it can be called."""
    if not callable(metric) or isinstance(metric, (type, torch.nn.Module)):
        what = metric.__name__ if isinstance(metric, type) else f"{metric!r:.80}"
        raise InputError(
            f"metric is a function that takes a model and returns a number, higher is better, e.g. its accuracy on "
            f"your data; {what} is none"
        )


def check_drop(max_drop: object) -> None:
    """Raise InputError unless it is how much a metric may lose."""
    if isinstance(max_drop, bool) or not isinstance(max_drop, Real) or not 0 <= float(max_drop) < math.inf:
        raise InputError(f"max_drop is how much the metric may lose, a number from 0 on, not {max_drop!r:.40}")


def scored(metric: Metric, model: Any, of: str) -> float:
    """What the metric says of a model, which it may call like the float one; without gradients.

    Args:
        metric: returns a number or a tensor of one element; higher is better.
        model: a graph, a program or a module.
        of: what the model is, for errors: `the quantized model`.

    Raises:
        InputError: the metric raises, or returns NaN or no number.
    """
    check_metric(metric)
    try:
        with torch.no_grad():
            value = metric(callable_model(model))
    except TorchquantError:
        raise
    except Exception as error:
        raise InputError(f"the metric raised {type(error).__name__} on {of}: {error}") from error
    number = _number(value)
    if number is None:
        raise InputError(f"the metric returned {value!r:.80} for {of}, which is no number; return e.g. an accuracy")
    if math.isnan(number):
        raise InputError(f"the metric is NaN for {of}: nothing can be decided by it. See which of its outputs is NaN")
    return number


def _number(value: Any) -> float | None:
    """A number, or what holds one: a tensor or array of one element."""
    if isinstance(value, (str, bytes)) or value is None:
        return None
    try:
        return float(value.item() if getattr(value, "size", None) == 1 else value)  # NumPy's arrays have axes still
    except (TypeError, ValueError, RuntimeError):
        return None
