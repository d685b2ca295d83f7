"""What a model of the zoo is: how it is made, called and exported, and what is expected of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

RIGHT = "right"
MOST = 8  # samples in a batch whose size varies


@dataclass(frozen=True)
class Case:
    """One model.

    Args:
        name: of the kind of model.
        model: makes the float model.
        batch: makes the arguments of one call for a size (of a batch, of a sequence, of what varies).
        size: that of the example; None of the others is used where no size varies.
        dynamic_shapes: as `torch.export` takes them, made anew for each export; None: no size of the model varies.
        sizes: the others, that a program with sizes that vary must be right for.
        calls: that follow one another with state, in a stream of inputs.
        expected: start of a way, e.g. `x86`, `xnnpack/foreign` or `xnnpack/ours/dynamic` -> `right`, or a word that the
            refusal must contain; the longest start counts. Without one: right.
        at_least_db: that the converted graph must be close to the model, on unseen inputs.
        most_unequal: share of the integers of an output that may differ then.
        clear_db: beyond which only rounding of the model's own floats is left, so that nothing is asked of a program.
    """

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    size: int = 2
    dynamic_shapes: Callable[[], Any] | None = None
    sizes: Sequence[int] = (1, 3)
    calls: int = 1
    expected: Mapping[str, str] = field(default_factory=dict)
    at_least_db: float = 12.0
    most_unequal: float = 0.0
    clear_db: float = 60.0

    def expectation(self, way: str) -> str:
        """`right`, or the word that a refusal must contain."""
        starts = [start for start in self.expected if f"{way}/".startswith(f"{start}/")]
        return self.expected[max(starts, key=len)] if starts else RIGHT

    def __str__(self) -> str:
        return self.name


def rows(arguments: int = 1) -> Callable[[], Any]:
    """`dynamic_shapes` of a model whose arguments all have a batch axis in front."""

    def shapes() -> Any:
        batch = torch.export.Dim("batch", min=1, max=MOST)
        return tuple({0: batch} for _ in range(arguments))

    return shapes


def images(channels: int = 3, side: int = 16) -> Callable[[int], Any]:
    """Standard normal images (size, channels, side, side)."""
    return lambda size: (torch.randn(size, channels, side, side),)


def vectors(*shape: int) -> Callable[[int], Any]:
    """Standard normal values (size, *shape)."""
    return lambda size: (torch.randn(size, *shape),)


class Call(nn.Module):
    """A function with submodules, parameters and buffers, where a class would say no more."""

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def weight(*shape: int) -> nn.Parameter:
    """A parameter whose products keep the variance."""
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)
