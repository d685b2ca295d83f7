"""How the next token is chosen from its logits: the most likely one, or one drawn at random."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant.errors import InputError

__all__ = ["Chooser", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """The arguments that `generate` of transformers has, with their meaning there.

    Args:
        do_sample: draw at random; if not, the most likely token is taken and the rest is not looked at.
        temperature: logits are divided by it; above 0.
        top_k: of how many most likely tokens is drawn; 0 or None: of all.
        top_p: of the fewest most likely tokens whose probabilities add up to that much is drawn; above 0, 1 at most.
        seed: of what is drawn; None: another one each time.

    Raises:
        InputError: a value out of these bounds.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, (int, float)) or not 0 < self.temperature < math.inf:
            raise InputError(f"temperature is a number above 0, not {self.temperature!r}; do_sample=False is greedy")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 0):
            raise InputError(f"top_k is a number of tokens, 0 or None for all, not {self.top_k!r}")
        if not isinstance(self.top_p, (int, float)) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p is a probability above 0 and at most 1, not {self.top_p!r}")
        if self.seed is not None and type(self.seed) is not int:
            raise InputError(f"seed is an int or None, not {self.seed!r}")


class Chooser:
    """Chooses one token after the other; the seed is set once."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling, self._random = sampling, torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Token ids int64 (B,) of logits (B, vocabulary)."""
        if not self._sampling.do_sample:
            return logits.argmax(-1)
        scores = logits.double() / self._sampling.temperature
        probabilities = _nucleus(_most_likely(scores, self._sampling.top_k), self._sampling.top_p)
        return torch.multinomial(probabilities, 1, generator=self._random)[:, 0]


def _most_likely(scores: Tensor, top_k: int | None) -> Tensor:
    """Scores (B, vocabulary) with all but the `top_k` largest of each row, and their equals, at minus infinity."""
    if not top_k or top_k >= scores.shape[-1]:
        return scores
    least = scores.topk(top_k, dim=-1).values[:, -1:]
    return scores.masked_fill(scores < least, -math.inf)


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Probabilities (B, vocabulary), not normalized: those above the first that reach `top_p` together are 0."""
    probabilities = scores.softmax(-1)
    if top_p >= 1:
        return probabilities
    ordered, places = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, places, ordered.masked_fill(before >= top_p, 0.0))
