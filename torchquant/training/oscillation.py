"""Weights that flip between two codes late in a training: a loss that dampens it, and freezing of those that do.

Nagel, Fournarakis, Bondarenko, Blankevoort: "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, arXiv
2203.11086.

    L_dampen = || w_hat - clip(w, s n, s p) ||^2                                 (eq. 5)
    f_t = m o_t + (1 - m) f_(t-1)       how often a code turns back              (eq. 4)
    f_t > f_th: the code is frozen at the rounded moving average of what it was  (section 4.2)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torchquant.errors import InputError, SchemeError
from torchquant.training.converting import check_trained
from torchquant.training.fakes import Fake, named_fakes

__all__ = ["Freezing", "dampening"]


def _weights(prepared: GraphModule) -> list[tuple[Any, Fake]]:
    """Each trained weight that has an integer grid."""
    check_trained(prepared)
    pairs = []
    for node, fake in named_fakes(prepared):
        source = node.args[0]
        if fake.is_weight and fake.has_grid and isinstance(source, Node) and source.op == "get_attr":
            pairs.append((operator.attrgetter(str(source.target))(prepared), fake))
    return pairs


def dampening(prepared: GraphModule) -> Tensor:
    """Eq. 5, summed over all weights: add it to the loss, times a factor that grows in the training (1e-3 .. 1e-1).

    Args:
        prepared: a graph of `torchquant.qat.prepare`.
    """
    total = torch.zeros(())
    for weight, fake in _weights(prepared):
        codes, grid = fake.solved(weight)
        low, high = (grid.decode(torch.full_like(codes, float(code))) for code in (grid.quant_min, grid.quant_max))
        clipped = torch.minimum(torch.maximum(fake.values_of(weight).float(), low), high)
        total = total + (grid.decode(codes) - clipped).square().sum()
    return total


@dataclass
class _Watched:
    weight: Any
    fake: Fake
    codes: Tensor
    average: Tensor
    direction: Tensor
    frequency: Tensor
    frozen: Tensor


class Freezing:
    """Freezes weights whose codes flip too often; call `step()` after each `optimizer.step()`.

    Args:
        prepared: a graph of `torchquant.qat.prepare`.
        threshold: of the frequency, or a function of the number of steps done (the paper anneals 0.04 to 0.01).
        momentum: m of the moving averages.

    Raises:
        InputError: the momentum is out of range.
        SchemeError: a method moves the weights before they are rounded (DoReFa).
    """

    def __init__(self, prepared: GraphModule, threshold: Any = 0.02, *, momentum: float = 0.01) -> None:
        if not 0 < momentum <= 1:
            raise InputError(f"momentum {momentum} must be over 0 and at most 1")
        self.threshold = threshold if callable(threshold) else lambda done: threshold
        self.momentum, self.done = momentum, 0
        self._watched = []
        for weight, fake in _weights(prepared):
            if type(fake).values_of is not Fake.values_of:
                raise SchemeError(
                    f"{fake.site}: Freezing puts a weight on its grid, and {fake.describe()['method']} moves it"
                )
            codes, _ = fake.solved(weight)
            zeros = torch.zeros_like(codes)
            self._watched.append(_Watched(weight, fake, codes, codes.clone(), zeros, zeros.clone(), zeros.bool()))

    @property
    def frozen(self) -> float:
        """The share of weights that are frozen."""
        count = sum(w.frozen.numel() for w in self._watched)
        return sum(int(w.frozen.sum()) for w in self._watched) / max(count, 1)

    @torch.no_grad()
    def step(self) -> None:
        """See the weights after an optimizer's step; put the frozen ones back."""
        self.done += 1
        for watched in self._watched:
            self._step(watched)

    def _step(self, w: _Watched) -> None:
        codes, grid = w.fake.solved(w.weight)
        codes = torch.where(w.frozen, w.codes, codes)
        moved = (codes - w.codes).sign()
        turned = (moved != 0) & (moved == -w.direction)
        w.frequency += self.momentum * (turned.float() - w.frequency)
        w.average += self.momentum * (codes - w.average)
        w.direction = torch.where(moved != 0, moved, w.direction)
        newly = (w.frequency > self.threshold(self.done)) & ~w.frozen
        w.codes = torch.where(newly, w.average.round().clamp(grid.quant_min, grid.quant_max), codes)
        w.frozen = w.frozen | newly
        w.weight.copy_(torch.where(w.frozen, grid.decode(w.codes).to(w.weight.dtype), w.weight))
