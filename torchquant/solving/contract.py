"""What an algorithm is: a solver, which answers span by span, or a transform, which rewrites the float graph."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch.fx import GraphModule

from torchquant.calibration.parallel import anywhere
from torchquant.calibration.stream import Stream, Task
from torchquant.fx.blocks import Span
from torchquant.solving.solved import Solution

__all__ = ["Algorithm", "Clock", "Judging", "Measuring", "Noting", "Solver", "Transform"]


Parts = Callable[[Any, Callable[[], Solution]], Solution]


@dataclass
class Clock:
    """How long a solver may take for a span, and the seed of what it draws.

    Args:
        seconds: from when the clock was made; infinite without a budget.
        seed: of this span.
        parts: keeps answers for parts of the span, see `part`.
    """

    seconds: float = math.inf
    seed: int = 0
    parts: Parts | None = None
    _start: float = field(default_factory=time.perf_counter)

    @property
    def is_over(self) -> bool:
        """Whether the time is up, in any process; a solver then finishes with what it has.

        With a budget under torchrun this is a meeting of all processes, so all must ask equally often.
        """
        return not math.isinf(self.seconds) and anywhere(time.perf_counter() - self._start > self.seconds)

    def generator(self) -> torch.Generator:
        """A generator seeded for this span."""
        return torch.Generator().manual_seed(self.seed)

    def part(self, task: Any, compute: Callable[[], Solution]) -> Solution:
        """What `compute` finds, or found in a run that was cut short in this span.

        For a solver that takes long over a span: parts are counted, so they must come in the same order in each run,
        and depend on nothing that was drawn before.

        Args:
            task: whose sites the answer is for: this span's, or one within it.
        """
        return compute() if self.parts is None else self.parts(task, compute)


@runtime_checkable
class Solver(Protocol):
    """Chooses codes, ranges or biases, span by span, while the data stream through the graph.

    Three more members may be there: see `Measuring`, `Judging` and `Noting`.
    """

    def spans(self, prepared: GraphModule, excluded: frozenset[str]) -> list[Span]:
        """The spans to solve, in graph order, without overlap; `excluded` holds node names to leave alone."""

    def solve(self, task: Task, clock: Clock) -> Solution:
        """The answer for one span; an empty Solution leaves it as it is. Must not change the graph."""


@runtime_checkable
class Measuring(Protocol):
    """A solver that must see the data once before it answers."""

    def begin(self, stream: Stream, spans: list[Span], seed: int) -> None:
        """Called before the walk, in which the graph stays as it is."""


@runtime_checkable
class Judging(Protocol):
    """A solver whose answers the guard holds by a measure of its own; by the span's squared error otherwise."""

    def error(self, task: Task) -> float:
        """The error of the span as it is now; lower is better."""


@runtime_checkable
class Noting(Protocol):
    """A transform that says what it left alone and why; a solver says so in its solutions.

    `notes` are those of the last run.
    """

    notes: list[str]


@runtime_checkable
class Transform(Protocol):
    """Rewrites float weights (and the graph) such that the float function stays the same."""

    def transform(self, prepared: GraphModule, batches: Sequence[Any]) -> int:
        """Rewrite in place, no tensor overwritten; returns how many places changed. Observers then run again."""


Algorithm = Solver | Transform
