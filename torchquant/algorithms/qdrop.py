"""QDrop: BRECQ with activations that pass unquantized at random, which flattens the loss around the solution.

Wei, Gong, Li, Liu, Yu: "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization",
ICLR 2022, section 3.3.
"""

from __future__ import annotations

from typing import Any

from torchquant.algorithms.brecq import BRECQ
from torchquant.errors import InputError

__all__ = ["QDrop"]


class QDrop(BRECQ):
    """Block reconstruction with dropped quantization; with drop 0 it is BRECQ.

    Args:
        drop: probability that an element of an activation stays unquantized, in the block and at its input.
        iterations, options: as for BRECQ.
    """

    def __init__(self, iterations: int = 200, *, drop: float = 0.5, **options: Any) -> None:
        super().__init__(iterations, **options)
        if not 0 <= drop < 1:
            raise InputError(f"drop is {drop}; it must be in [0, 1)")
        self.drop = drop
