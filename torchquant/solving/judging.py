"""Whether a step of `optimize` is kept: by data that it did not see, where there are any, and by a metric."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from torchquant.calibration.batches import Given
from torchquant.calibration.parallel import everywhere
from torchquant.calibration.seen import data_used, shared
from torchquant.calibration.stream import Stream, given_to
from torchquant.errors import TorchquantWarning
from torchquant.solving.results import Optimization

__all__ = ["Figure", "Judge", "Score", "split"]

Score = Callable[[GraphModule], float]  # of a prepared graph, as it will be quantized; higher is better
_JUDGED_EVERY = 4  # batches
_JUDGED_BATCHES, _JUDGED_PLACES = 8, 1024  # at least so many batches, or two with so many samples and tokens
_HELD_OUT, _LEAST = 8, 16  # one of so many batches, where no others are given, of so many at least


@dataclass(frozen=True)
class Figure:
    """How good a graph is: the SQNR of its output in dB, and what the user's metric says of it, if there is one."""

    db: float
    score: float | None = None

    def __str__(self) -> str:
        return f"{self.db:.2f} dB" if self.score is None else f"{self.score:.6g} by the metric and {self.db:.2f} dB"

    def holds_against(self, other: Figure) -> bool:
        """Whether it is no worse: by the metric, and by the SQNR where that is the same, or there is none."""
        if self.score is None or other.score is None or self.score == other.score:
            return self.db >= other.db
        return self.score > other.score


def split(batches: Sequence[Any]) -> tuple[list[Any], list[Any] | None]:
    """Batches to solve with, and one of eight, evenly spread, to judge by; None where there are fewer than sixteen.

    One alone says too little, and of few batches none can be spared.
    """
    if not everywhere(len(batches) >= _LEAST):
        return list(batches), None
    held = range(_HELD_OUT // 2, len(batches), _HELD_OUT)
    return [b for i, b in enumerate(batches) if i not in held], [batches[i] for i in held]


class Judge:
    """What the steps of one run are judged by.

    Args:
        prepared: the graph, to know what it was calibrated on.
        solved_on, held_out: batches, as `batches.checked` gives them; None held out: those of the solving judge too.
        score: a metric of the user's.
        memory_bytes: for activations.
    """

    def __init__(
        self,
        prepared: GraphModule,
        solved_on: Sequence[Any],
        held_out: Sequence[Any] | None,
        score: Score | None,
        memory_bytes: int,
    ) -> None:
        self.has_own_data = held_out is not None
        chosen = solved_on if held_out is None else held_out
        given = given_to(prepared, chosen)
        every = 1 if self.has_own_data else _judged_every(given)
        self.walked_every = None if self.has_own_data else every
        self._batches, self._score, self._memory_bytes = given[::every], score, memory_bytes
        self.measured_on = data_used(prepared, chosen) + (
            _how(every) if held_out is None else _shown(*shared(held_out, solved_on))
        )

    def figure(self, prepared: GraphModule, stream: Stream | None = None) -> Figure:
        """Of a graph as it stands.

        Args:
            stream: walked to its end on the batches of the solving, every so many of them: good where there are no
                others.
        """
        if stream is None or self.has_own_data:
            stream = Stream(prepared, self._batches, budget_bytes=self._memory_bytes)
            for _ in stream.walk([]):
                pass
        return Figure(_db(stream), None if self._score is None else self._score(prepared))

    def step(self, name: str, after: Figure, undo: Callable[[], None], result: Optimization) -> bool:
        """Note the figure after a step, and take the step back if it is below that of the last one kept."""
        before = next(
            Figure(db, score)
            for (_, db, kept), score in reversed(list(zip(result.steps, result.scores, strict=True)))
            if kept
        )
        kept = everywhere(after.holds_against(before))
        note(result, name, after, kept)
        if not kept:
            undo()
            text = f"{name} would lower the output's SQNR from {before.db:.2f} to {after.db:.2f} dB"
            if after.score is not None:
                text = f"{name} would lead from {before} to {after}"
            text = f"{text} ({self.measured_on}); the plain result is kept"
            warnings.warn(text, TorchquantWarning, stacklevel=6)
        return kept


def _judged_every(batches: Sequence[Given]) -> int:
    """Of how many batches one is judged: of four, where enough is left; each costs a run of the whole network."""
    places = [max((_places(leaf) for leaf in batch.leaves), default=1) for batch in batches]
    for every in range(_JUDGED_EVERY, 1, -1):
        judged = places[::every]
        if len(judged) >= _JUDGED_BATCHES or (len(judged) > 1 and sum(judged) >= _JUDGED_PLACES):
            return every
    return 1


def _places(leaf: object) -> int:
    """Samples of an input, and of integers (tokens) each of them."""
    if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
        return 1
    return len(leaf) if leaf.is_floating_point() else leaf.numel()


def _shown(known: int, count: int) -> str:
    """How much of the data that others judge by the algorithms know."""
    if known == 0:
        return ", not shown to the algorithms"
    return ", which the algorithms fit" if known == count else f", {known} of which the algorithms fit"


def _how(every: int) -> str:
    """That the algorithms know the data, and how many of them are looked at."""
    return ", which the algorithms fit" + (f" (one of {every} is measured)" if every > 1 else "")


def note(result: Optimization, name: str, figure: Figure, kept: bool) -> None:
    """Add a row to what a run tells."""
    result.steps.append((name, figure.db, kept))
    result.scores.append(figure.score)


def _db(stream: Stream) -> float:
    if stream.noise == 0:
        return math.inf
    if not math.isfinite(stream.noise):
        return -math.inf
    return 10 * math.log10(stream.signal / stream.noise) if stream.signal > 0 else -math.inf
