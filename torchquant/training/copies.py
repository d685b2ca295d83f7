"""A graph with tensors of its own."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["own_tensors"]


def own_tensors(model: nn.Module) -> None:
    """Give a module parameters and buffers of its own; what was one tensor under several names stays one."""
    own: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                copied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                module._parameters[name] = own.setdefault(id(parameter), copied)  # type: ignore[assignment]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = own.setdefault(id(buffer), buffer.detach().clone())
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor):
                setattr(module, name, own.setdefault(id(value), value.detach().clone()))
