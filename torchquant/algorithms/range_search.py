"""Range search: the range of each static activation that does least harm behind it.

A range is judged by what its consumers make of the tensor, not by the tensor: values that a ReLU6 cuts off, or that a
softmax turns to zero, need no codes. Choosing steps by the network's loss: Nahshan et al., "Loss Aware Post-training
Quantization", Machine Learning 2021, section 4; here one tensor at a time, all others as float, with the loss to second
order at the next ranges, as in Li et al., "BRECQ", ICLR 2021, section 3.2.

    low, high      ends of the range, each shrunk by itself from what the observer saw
    sum over the results r of the span of F (rq(low, high) - r)^2, F the squared derivatives of the network's output
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.calibration.evaluator import Evaluator
from torchquant.calibration.parallel import total
from torchquant.calibration.stream import Stream, Task
from torchquant.errors import InputError
from torchquant.fx import ops
from torchquant.fx.blocks import Span, data_order
from torchquant.fx.grids import Grid, grid_of, per_tensor
from torchquant.fx.reading import observer_of
from torchquant.observers.minmax import least_scale
from torchquant.solving.contract import Clock
from torchquant.solving.solved import Solution

__all__ = ["RangeSearch"]

_Result = tuple[torch.Tensor, torch.Tensor | None]


class RangeSearch:
    """Searches both ends of each static per-tensor activation range (one factor for symmetric grids).

    Args:
        factor: each trial is this share of the last one.
        patience: trials without a gain of one part in a thousand before an end is left.
        samples: how many a trial is judged on, at least; the guard judges on all.
    """

    def __init__(self, factor: float = 0.8, *, patience: int = 3, samples: int = 16) -> None:
        if not 0 < factor < 1:
            raise InputError(f"factor is {factor}; it must be between 0 and 1")
        self.factor, self.patience, self.samples = factor, patience, samples

    def spans(self, prepared: GraphModule, excluded: frozenset[str]) -> list[Span]:
        """From each activation observer to the next one with another range.

        A range that observers in several places share is searched if no other range lies between them.
        """
        order = data_order(prepared)
        ranges = {i: id(m) for i, n in enumerate(order) if (m := observer_of(prepared, n)) is not None}
        starts = [i for i, before in zip(ranges, [0, *ranges.values()], strict=False) if ranges[i] != before]
        spans = []
        for start, end in pairwise([*starts, len(order)]):
            members = [i for i, module in ranges.items() if module == ranges[start]]
            touched = {user.name for i in members for user in order[i].users}
            if members[0] == start and members[-1] < end and not touched & excluded:
                spans.append(Span(tuple(order[start:end]), ()))
        return spans

    def begin(self, stream: Stream, spans: list[Span], seed: int) -> None:
        """Measure what the network's output feels of the spans' results."""
        stream.sensitivities(spans, seed)

    def solve(self, task: Task, clock: Clock) -> Solution:
        """The range of the span's observer."""
        node = task.span.nodes[0]
        observer = observer_of(task.prepared, node)
        grid = grid_of(observer, _shape(task))
        if grid is None or grid.dialect != "tensor" or hasattr(observer, "derive_qparams_fn"):
            return Solution()
        judge = _Judge(task, self.samples)
        low = float((grid.quant_min - grid.zero_point) * grid.scale)
        high = float((grid.quant_max - grid.zero_point) * grid.scale)
        low, high = _widened(observer, low, high)
        least = least_scale(observer)
        if grid.symmetric:
            chosen = _scaled(grid, self._shrink(lambda f: judge.error(_scaled(grid, f, least)), clock), least)
        else:
            ends = self._shrink_ends(lambda a, b: judge.error(_between(grid, a, b, least)), low, high, clock)
            if ends == (low, high):
                return Solution()
            chosen = _between(grid, *ends, least)
        return Solution(activations={str(node.target): (float(chosen.scale), int(chosen.zero_point))})

    def error(self, task: Task) -> float:
        """What the guard holds an answer by: the measure of the search, on all batches."""
        return _Judge(task, None).error()

    def _shrink_ends(
        self, error: Callable[[float, float], float], low: float, high: float, clock: Clock
    ) -> tuple[float, float]:
        """Each end shrunk by itself, twice: at first the other one hides what an end is worth."""
        for _ in range(2):
            if high > 0:
                high *= self._shrink(lambda f: error(low, high * f), clock)  # noqa: B023
            if low < 0:
                low *= self._shrink(lambda f: error(low * f, high), clock)  # noqa: B023
        return low, high

    def _shrink(self, error: Callable[[float], float], clock: Clock) -> float:
        """The factor on an end of the range with the least error, refined once between its neighbours."""
        best, least = 1.0, error(1.0)
        share, idle = 1.0, 0
        while idle < self.patience and share > 1e-6 and not clock.is_over:
            share *= self.factor
            tried = error(share)
            idle = 0 if tried < least * 0.999 else idle + (tried > least)  # a plateau may end: a mask's does
            if tried < least:
                best, least = share, tried
        for share in (best * self.factor**0.5, best * self.factor**-0.5):
            if share < 1.0 and (tried := error(share)) < least:
                best, least = share, tried
        return best


class _Judge:
    """What rounding one tensor costs at the network's output, on the first batches of the float flow.

    Args:
        task: the span that the tensor's observers begin.
        samples: how many to judge on, at least; None: all.
    """

    def __init__(self, task: Task, samples: int | None) -> None:
        observer = observer_of(task.prepared, task.span.nodes[0])
        self._task = task
        self._targets = [str(n.target) for n in task.span.nodes if observer_of(task.prepared, n) is observer]
        self._weights = _float_weights(task)
        size = max(1, *_shape(task)[:1])
        self._count = task.count if samples is None else min(task.count, math.ceil(samples / size))
        self._exact = self._evaluator(lambda x: x)
        self._kept: dict[int, list[_Result]] = {}
        self._energy = [1e-30] * len(task.results)
        for batch in range(self._count):
            results = self._results(batch)
            for i, (wanted, felt) in enumerate(results):
                if felt is None and _is_float(wanted):
                    self._energy[i] += float(wanted.square().sum(dtype=torch.float64))
            if samples is not None:
                self._kept[batch] = results
        self._energy = total(*self._energy)

    def _results(self, batch: int) -> list[_Result]:
        """What the span should make, and how much the network's output feels each element of it (None: unknown)."""
        wanted = self._task.outputs(batch, self._exact, "float")
        return list(zip(wanted, self._task.sensitivity(batch), strict=True))

    def error(self, grid: Grid | None = None) -> float:
        """Squared error of the results, weighted by the output's sensitivity; without it relative to their energy.

        Args:
            grid: the grid to try; None: the observer's own.
        """
        evaluator = self._evaluator(None if grid is None else per_tensor(grid))
        error = 0.0
        for batch in range(self._count):
            outputs = self._task.outputs(batch, evaluator, "float")
            results = self._kept.get(batch) or self._results(batch)
            for got, (wanted, felt), energy in zip(outputs, results, self._energy, strict=True):
                if _is_float(wanted):
                    square = (got - wanted).square_()
                    square = square.div_(energy) if felt is None else square.mul_(felt)
                    error += float(square.sum(dtype=torch.float64))
        return total(error)[0]

    def _evaluator(self, fake: Callable[[torch.Tensor], torch.Tensor] | None) -> Evaluator:
        fakes = {} if fake is None else dict.fromkeys(self._targets, fake)
        return self._task.evaluator(fakes=fakes, weights=self._weights)


def _shape(task: Task) -> torch.Size:
    """Of the tensor that a span begins with, in the first batch; in a process without any, as at export."""
    source = _source(task.span.nodes[0])
    if task.count:
        shape: torch.Size = task.inputs(0, "float")[source].shape
        return shape
    return torch.Size(size if isinstance(size, int) else size.node.hint or 2 for size in source.meta["val"].shape)


def _float_weights(task: Task) -> dict[Node, torch.Tensor]:
    """The constants that the span reads through observers, as they are without."""
    near = {n for node in task.span.nodes for n in node.all_input_nodes}
    observed = [n for n in near if observer_of(task.prepared, n) is not None and ops.is_constant(_source(n))]
    return {n: ops.constant_value(task.prepared, _source(n)) for n in observed}


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _between(grid: Grid, low: float, high: float, least: float) -> Grid:
    """The grid whose ends are `low` and `high`, zero among its values, its scale at least `least`."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / (grid.quant_max - grid.quant_min), least, torch.finfo(torch.float32).eps)
    zero_point = min(max(round(grid.quant_min - low / scale), grid.quant_min), grid.quant_max)
    return grid.with_scale(torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32))


def _widened(observer: Any, low: float, high: float) -> tuple[float, float]:
    """The ends with what the observer saw: beside a far end, rounding the zero point may have lost the near one."""
    inner = getattr(observer, "activation_post_process", observer)
    seen = [getattr(inner, name, None) for name in ("min_val", "max_val")]
    if not all(isinstance(v, torch.Tensor) and v.numel() == 1 and bool(v.isfinite()) for v in seen):
        return low, high
    return min(low, float(seen[0])), max(high, float(seen[1]))  # type: ignore[arg-type]


def _scaled(grid: Grid, share: float, least: float) -> Grid:
    return grid.with_scale((grid.scale * share).clamp(min=least))


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source
