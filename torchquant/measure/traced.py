"""The parts of a call that torch's profiler sees, and the time of the whole under the same profiler."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _RecordFunctionFast  # record_function itself takes 10 us a stage under the profiler
from torch.profiler import ProfilerActivity, profile

__all__ = ["Part", "Traced", "stage", "traced"]

_WHOLE = "torchquant_call"
_ROUNDS, _WARMUP = 20, 3
_FULL = 0.9  # of the whole, that the parts cover for the trace to be called complete


@dataclass(frozen=True)
class Part:
    """One part of a call, in the order in which they run.

    Args:
        name: of the op, kernel or region.
        sites: nodes of the graph that it computes, where that is known.
        ms: in the fastest of the rounds, so that the parts and the whole are of one call.
        first_size: elements of its first tensor, which tells plans of x86 regions apart; 0 if it has none.
    """

    name: str
    sites: tuple[str, ...]
    ms: float
    first_size: int = 0


@dataclass(frozen=True)
class Traced:
    """The parts of a call.

    Args:
        parts: in order.
        whole_ms: of the call they were seen in.
        note: what is not in them, or why there are none.
    """

    parts: tuple[Part, ...]
    whole_ms: float
    note: str = ""

    @property
    def parts_ms(self) -> float:
        """All parts together."""
        return sum(part.ms for part in self.parts)

    @property
    def is_complete(self) -> bool:
        """Whether the parts make up the whole to within a tenth."""
        return bool(self.parts) and self.whole_ms > 0 and _FULL <= self.parts_ms / self.whole_ms <= 2 - _FULL


def stage(name: str) -> AbstractContextManager[Any]:
    """What runs inside is one part of the call that is traced, with that name."""
    made: AbstractContextManager[Any] = _RecordFunctionFast(name)
    return made


def traced(run: Callable[[], object], *, rounds: int = _ROUNDS, opened: str = "") -> Traced:
    """Run a call some times under torch's profiler, on one thread of the interpreter.

    Parts are the ops, kernels and stages that are directly in the call: what ops call in turn is in their time.

    Args:
        opened: name of a stage whose parts are shown one by one, and behind them what it takes beside them.
    """
    for _ in range(_WARMUP):
        run()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        for _ in range(rounds):
            with stage(_WHOLE):
                run()
    calls = [event for event in seen.events() if event.name == _WHOLE]
    fastest = min(calls, key=lambda event: event.time_range.elapsed_us())
    parts = []
    for event in sorted(fastest.cpu_children, key=lambda event: event.time_range.start):
        inside = sorted(event.cpu_children, key=lambda child: child.time_range.start) if event.name == opened else None
        if inside is None:
            parts.append(_part(event))
        else:
            beside = event.time_range.elapsed_us() - sum(child.time_range.elapsed_us() for child in inside)
            parts += [*map(_part, inside), Part(f"{opened}, beside its ops", (), max(0.0, beside) / 1e3)]
    return Traced(tuple(parts), fastest.time_range.elapsed_us() / 1e3)


def _part(event: Any) -> Part:
    name = event.name.rpartition("::")[2] if event.name.startswith("torchquant_") else event.name
    return Part(name, (), event.time_range.elapsed_us() / 1e3, _size(event))


def _size(event: Any) -> int:
    first = (event.input_shapes or [[]])[0]
    sizes = [s for s in first if isinstance(s, int)] if isinstance(first, (list, tuple)) else []
    return int(torch.Size(sizes).numel()) if sizes else 0
