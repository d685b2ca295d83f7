"""The scale of ternary weights: the mean magnitude.

Ma, Wang, Ma, Wang, Wang, Huang, Dong, Wang, Xue, Wei: "The Era of 1-bit LLMs: All Large Language Models are in 1.58
Bits", 2024, arXiv 2402.17764.

    W_q = clip(round(W / (gamma + eps)), -1, 1),  gamma = mean |W|               (eq. 1 to 3)
"""

from __future__ import annotations

from typing import Any

import torch
from torchao.quantization.pt2e.observer import MinMaxObserver

from torchquant.observers.minmax import Checked

__all__ = ["AbsMeanWeight"]


class AbsMeanWeight(Checked, MinMaxObserver):
    """One scale for a weight, its mean magnitude.

    Args:
        channels: give the one scale once for each index of this axis, for targets that take no other; None: once.
        ch_axis: as torchao hands it over; not read.
    """

    observes_weight = True
    passes_clipped = True  # the paper's gradient is the identity, for weights beyond 1.5 gamma too

    def __init__(self, *, channels: int | None = None, ch_axis: int | None = None, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "qscheme": torch.per_tensor_symmetric})
        if channels is not None:
            self.qscheme, self.ch_axis = torch.per_channel_symmetric, channels
        self.channels, self.count = channels, 1
        self.register_buffer("gamma", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See a weight of any shape."""
        x = super().forward(x)
        self.gamma = x.detach().float().abs().mean()
        self.count = 1 if self.channels is None else x.shape[self.channels]
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale float32 and zero point, (1,) or (channels,)."""
        self.require_data()
        scale = self.gamma.clamp(min=1e-5).expand(self.count).clone()
        return scale, torch.zeros(self.count, dtype=torch.int32)
