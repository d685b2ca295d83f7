"""Floors of scales for a target that stores biases as int32 and requantizes by a bounded factor.

    bias code = bias / (s_in s_w) in int32      bias / s_out in int32      s_in s_w / s_out below a limit

A ReLU that is dead on the calibration data, a branch whose last weights start at zero or a channel that BatchNorm has
closed would get scales near 1e-7, and either would overflow. A product s_in s_w of 2**-24 of the bias loses nothing: an
8-bit output that holds the bias resolves 2**-8 of it. Nor does an s_out of that: sums are no finer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.fx import ops
from torchquant.observers.minmax import Floor

__all__ = ["set_floors"]

BIAS_CODES = 2.0**24
DEAD_SCALE = 2.0**-12  # of an activation that hardly moves; what ExecuTorch's own Quantizer takes

Observers = Mapping[Any, Any]  # as torchao's prepare hands them over: (producer, user) or node -> observer


def set_floors(model: GraphModule, observed: Observers, largest_factor: float) -> None:
    """Give the observers around each weighted op the floors that it needs.

    Args:
        model: the graph that is being prepared.
        observed: every observer or fake quantizer and its place.
        largest_factor: the bound of the requantization factor.
    """
    for node in model.graph.nodes:
        kind = ops.kind_of(node)
        if kind is None or not kind.compute or kind.weight is None:
            continue
        places = [(source, node) for source in node.all_input_nodes]
        weight_node = ops.argument(node, kind.weight)
        weight = next((observed[p] for p in places if p[0] is weight_node and p in observed), None)
        activations = [observed[p] for p in places if p[0] in ops.data_inputs(node, kind) and p in observed]
        if weight is None or not activations or getattr(_inner(activations[0]), "is_dynamic", False):
            continue
        bias = _bias_of(model, node)
        output = _output_observer(node, observed)
        if bias is not None:
            _floor_by_bias(model, weight_node, kind.axis, bias, activations[0], weight)
        if output is not None:
            _add(output, Floor(2 / largest_factor, times=(activations[0], weight)))
            if bias is not None:
                _add(output, Floor(float(bias.max()) / BIAS_CODES))


def _floor_by_bias(
    model: GraphModule, weight_node: Node | None, axis: int, bias: torch.Tensor, activation: Any, weight: Any
) -> None:
    """The activation's scale for the widest channel; then each channel's weight scale for its own bias."""
    assert weight_node is not None
    value = ops.constant_value(model, weight_node).float()
    widest = float(value.abs().max()) / 127 if value.numel() else 0.0
    least = float(bias.max()) / (BIAS_CODES * widest) if widest else DEAD_SCALE
    eps = getattr(_inner(activation), "eps", None)
    if isinstance(eps, torch.Tensor) and float(bias.max()) > 0:
        eps.clamp_(min=min(least, DEAD_SCALE))
    per_channel = getattr(_inner(weight), "qscheme", None) == torch.per_channel_symmetric
    if per_channel and len(bias) == value.shape[axis]:
        _add(weight, Floor(bias / BIAS_CODES, over=(activation,)))


def _add(observer: Any, floor: Floor) -> None:
    inner = _inner(observer)
    if hasattr(inner, "floors"):
        inner.floors = (*inner.floors, floor)
    elif floor.times and isinstance(getattr(inner, "eps", None), torch.Tensor):
        inner.eps.clamp_(min=DEAD_SCALE)  # an observer of the user's own: the floor that ExecuTorch takes for all


def _inner(observer: Any) -> Any:
    return getattr(observer, "activation_post_process", observer)


def _bias_of(model: GraphModule, node: Node) -> torch.Tensor | None:
    """The magnitude of the bias (channels,), with that of a BatchNorm that convert will fold; None without any."""
    source = ops.argument(node, 2)
    value = ops.constant_value(model, source).float() if source is not None and ops.is_constant(source) else None
    users = [u for u in node.users if ops.op_name(u) == "batch_norm"]
    if users:
        gain, shift, mean, variance = (ops.argument(users[0], p) for p in (1, 2, 3, 4))
        parts = [None if n is None else ops.constant_value(model, n).float() for n in (gain, shift, mean, variance)]
        if parts[2] is not None and parts[3] is not None:
            factor = (1.0 if parts[0] is None else parts[0]) / (parts[3] + 1e-5).sqrt()
            centred = (0.0 if value is None else value) - parts[2]
            value = centred * factor + (0.0 if parts[1] is None else parts[1])
    return None if value is None else value.abs().detach()


def _output_observer(node: Node, observed: Observers) -> Any:
    """The observer behind the op and what is fused with it."""
    tail = node
    while tail not in observed and len(tail.users) == 1:
        tail = next(iter(tail.users))
        if tail.op != "call_function" or (kind := ops.kind_of(tail)) is None or kind.compute:
            return None
    return observed.get(tail)
