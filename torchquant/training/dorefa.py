"""DoReFa: weights are squeezed by tanh before they are rounded, so that few of them stand far out.

Zhou, Wu, Ni, Zhou, Wen, Zou: "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth
Gradients", 2016, arXiv 1606.06160.

    w_q = 2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1                     (eq. 9)

That has 2^k levels and none at 0, which no symmetric integer weight has; here the levels are the format's own, and the
range is the largest |w| (of each cell) instead of 1, so that a trained network may be started from.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchquant.errors import SchemeError
from torchquant.training.fakes import Fake

__all__ = ["DoReFa", "squeezed"]


def squeezed(w: Tensor, axis: int | None) -> Tensor:
    """max|w| tanh(w) / max|tanh(w)|, over the whole weight or each index of an axis."""
    axes = [i for i in range(w.ndim) if i != axis]
    most = w.detach().abs().amax(axes, keepdim=True)
    return most * w.tanh() / most.tanh().clamp(min=1e-12)


class _Squeezing(Fake):
    def __init__(self, fake: Fake) -> None:
        super().__init__(fake.activation_post_process)
        self.is_weight, self.rounds, self.observes = True, fake.rounds, True
        self.quant_min, self.quant_max, self._block = fake.quant_min, fake.quant_max, fake._block
        self.folding = fake.folding
        self.take_qparams(*fake.calculate_qparams())

    def values_of(self, x: Tensor) -> Tensor:
        return squeezed(x, self.cells().axis)

    def describe(self) -> dict[str, str]:
        return {**super().describe(), "method": "DoReFa"}


@dataclass(frozen=True)
class DoReFa:
    """Weights squeezed by tanh. The paper's activations, clipped to [0, 1], are PACT's with a clip that is learned."""

    def weight(self, fake: Fake, weight: Tensor) -> Fake:
        """Squeeze a weight that has a scale for all of it or for each channel."""
        squeezing = _Squeezing(fake)
        if squeezing.cells().block is not None:
            raise SchemeError(f"DoReFa is for one scale a weight or a channel, not for {fake.in_words()}")
        squeezing.observe(squeezing.values_of(weight.detach()))
        return squeezing

    def activation(self, fake: Fake) -> Fake:
        """Raise SchemeError: what the paper does to activations is PACT with a fixed clip."""
        raise SchemeError("DoReFa squeezes weights; take another method for activations, e.g. activations=PACT()")
