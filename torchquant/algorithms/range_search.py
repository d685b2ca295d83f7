"""Range search: the range of each static activation that does least harm behind it.

A range is judged by what its consumers make of the tensor, not by the tensor: values that a ReLU6 cuts off, or that a
softmax turns to zero, need no codes. Choosing steps by the error of the next layer's output: Nahshan et al.,
"Loss Aware Post-training Quantization", Machine Learning 2021, section 4; here one tensor at a time, in the order
of the graph, with the quantized prefix.

    low, high      ends of the range, each shrunk by itself from what the observer saw
    sum over the results r of the span of |rq(low, high) - r|^2 / |r|^2
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.algorithms.contract import Clock
from torchquant.errors import InputError
from torchquant.fx.blocks import Span, data_order
from torchquant.fx.grids import Grid, grid_of, per_tensor
from torchquant.fx.sites import observer_of
from torchquant.fx.stream import Task
from torchquant.parallel import total
from torchquant.solved import Solution

__all__ = ["RangeSearch"]


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
        found = []
        for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
            members = [i for i, module in ranges.items() if module == ranges[start]]
            touched = {user.name for i in members for user in order[i].users}
            if members[0] == start and members[-1] < end and not touched & excluded:
                found.append(Span(tuple(order[start:end]), ()))
        return found

    def solve(self, task: Task, clock: Clock) -> Solution:
        """The range of the span's observer."""
        node = task.span.nodes[0]
        observer = observer_of(task.prepared, node)
        grid = grid_of(observer, task.inputs(0, "float")[_source(node)].shape)
        if grid is None or grid.dialect != "tensor" or hasattr(observer, "derive_qparams_fn"):
            return Solution()
        judge = _Judge(task, grid, self.samples)
        low = float((grid.quant_min - grid.zero_point) * grid.scale)
        high = float((grid.quant_max - grid.zero_point) * grid.scale)
        low, high = _widened(observer, low, high)
        if grid.symmetric:
            share = self._shrink(lambda f: judge.error(_scaled(grid, f)), clock)
            chosen = _scaled(grid, share)
        else:
            top = self._shrink(lambda f: judge.error(_between(grid, low, high * f)), clock) if high > 0 else 1.0
            high *= top
            bottom = self._shrink(lambda f: judge.error(_between(grid, low * f, high)), clock) if low < 0 else 1.0
            chosen = _between(grid, low * bottom, high)
            if top == bottom == 1.0:
                return Solution()
        return Solution(activations={str(node.target): (float(chosen.scale), int(chosen.zero_point))})

    def _shrink(self, error: Callable[[float], float], clock: Clock) -> float:
        """The share of an end with the least error, refined once between its neighbours."""
        best, found = 1.0, error(1.0)
        share, idle = 1.0, 0
        while idle < self.patience and share > 1e-6 and not clock.is_over:
            share *= self.factor
            tried = error(share)
            idle = 0 if tried < found * 0.999 else idle + (tried > found)  # a plateau may end: a mask's does
            if tried < found:
                best, found = share, tried
        for share in (best * self.factor**0.5, best * self.factor**-0.5):
            if share < 1.0 and (tried := error(share)) < found:
                best, found = share, tried
        return best


class _Judge:
    """The error of a span's results for a trial grid, on a few batches."""

    def __init__(self, task: Task, grid: Grid, samples: int) -> None:
        observer = observer_of(task.prepared, task.span.nodes[0])
        self._task = task
        self._targets = [str(n.target) for n in task.span.nodes if observer_of(task.prepared, n) is observer]
        size = max(1, len(task.inputs(0, "float")[_source(task.span.nodes[0])]))
        self._batches = range(min(task.count, math.ceil(samples / size)))
        self._energy = [1e-30] * len(task.results)
        for batch in self._batches:
            for i, wanted in enumerate(task.targets(batch)):
                if isinstance(wanted, torch.Tensor) and wanted.is_floating_point():
                    self._energy[i] += float(wanted.square().sum(dtype=torch.float64))
        self._energy = total(*self._energy)

    def error(self, grid: Grid) -> float:
        """Relative squared error, summed over the results."""
        evaluator = self._task.evaluator(fakes=dict.fromkeys(self._targets, per_tensor(grid)))
        found = [0.0] * len(self._task.results)
        for batch in self._batches:
            pairs = zip(self._task.outputs(batch, evaluator), self._task.targets(batch), strict=True)
            for i, (got, wanted) in enumerate(pairs):
                if isinstance(wanted, torch.Tensor) and wanted.is_floating_point():
                    found[i] += float(torch.linalg.vector_norm(got - wanted)) ** 2
        return sum(e / s for e, s in zip(total(*found), self._energy, strict=True))


def _between(grid: Grid, low: float, high: float) -> Grid:
    """The grid whose ends are `low` and `high`, zero among its values."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / (grid.quant_max - grid.quant_min), torch.finfo(torch.float32).eps)
    zero_point = min(max(round(grid.quant_min - low / scale), grid.quant_min), grid.quant_max)
    return grid.with_scale(torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32))


def _widened(observer: Any, low: float, high: float) -> tuple[float, float]:
    """The ends with what the observer saw: beside a far end, rounding the zero point may have lost the near one."""
    inner = getattr(observer, "activation_post_process", observer)
    seen = [getattr(inner, name, None) for name in ("min_val", "max_val")]
    if not all(isinstance(v, torch.Tensor) and v.numel() == 1 and bool(v.isfinite()) for v in seen):
        return low, high
    return min(low, float(seen[0])), max(high, float(seen[1]))  # type: ignore[arg-type]


def _scaled(grid: Grid, share: float) -> Grid:
    return grid.with_scale(grid.scale * share)


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source
