"""Which scale, and of an affine grid which zero point, rounds a weight to nearest at least error, cell by cell.

The error of a cell is that of its own weights, which is exact per channel and per tensor. Cells that are neighbours in
a row, all of them as wide, are looked at some rows at a time, so that what is computed with stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from torchquant.algorithms.layers.rounding import Problem

__all__ = ["by_cell", "search_grid", "search_scale"]

_SHARES = 13  # factors on the ends of an affine grid's range, at most
_AT_ONCE = 1 << 17  # weights


def search_grid(problem: Problem, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Factors (count,) on the scales of cells, and for affine grids zero points (count,), that round at least error.

    Of a symmetric grid the scale is tried times each of `factors`; of an affine one, both ends of its range times some
    of them (13 at most, evenly chosen), then each end by itself. The grid as it stands is among what is tried.
    """
    if problem.symmetric:
        return search_scale(problem, factors), None
    shares = factors[torch.linspace(0, len(factors) - 1, min(len(factors), _SHARES)).round().long()].tolist()
    best = _Best(problem)
    scale, zero_point = best.scale, best.zero_point
    low, high = (problem.low - zero_point) * scale, (problem.high - zero_point) * scale
    ends = torch.ones(2, problem.count)  # shares of the low and of the high end, of the best range so far
    for moves in ((0, 1), (0,), (1,)):
        tried = ends.clone()
        for share in shares:
            tried[list(moves)] = share
            step = ((high * tried[1] - low * tried[0]) / (problem.high - problem.low)).clamp(min=1e-30)
            zeros = (problem.low - torch.round(low * tried[0] / step)).clamp(problem.low, problem.high)
            ends = torch.where(best.offer(step / scale, zeros), tried, ends)
    return best.factor, best.zero_point


def search_scale(problem: Problem, factors: torch.Tensor) -> torch.Tensor:
    """For each cell, the factor (of `factors`) on its scale with the least error of rounding to nearest, (count,)."""
    best = _Best(problem)
    for factor in factors.tolist():
        best.offer(torch.full((problem.count,), factor), best.zero_point)
    return best.factor


def by_cell(problem: Problem, values: torch.Tensor) -> torch.Tensor:
    """(count,) of what all weights (g, o, k) of a cell have in common."""
    common = torch.zeros(problem.count)
    common[problem.cells.reshape(-1)] = values.expand(problem.cells.shape).reshape(-1)
    return common


class _Best:
    """For each cell, the best grid that was offered; first the one that stands."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self._rows = problem, list(_rows_of(problem))
        self.scale, self.zero_point = by_cell(problem, problem.scale), by_cell(problem, problem.zero_point)
        self.factor = torch.ones(problem.count)
        self._errors = self._of(self.factor, self.zero_point)

    def _of(self, factor: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        if not self._rows:
            return _errors(self._problem.scaled(factor, zero_point))
        scale = self.scale * factor
        return torch.cat([rows.errors(scale, zero_point, self._problem) for rows in self._rows])

    def offer(self, factor: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        """Take what is better than the best so far, cell by cell, and say where it is."""
        errors = self._of(factor, zero_point)
        better = errors < self._errors
        self._errors = torch.where(better, errors, self._errors)
        self.factor = torch.where(better, factor, self.factor)
        self.zero_point = torch.where(better, zero_point, self.zero_point)
        return better


def _errors(problem: Problem) -> torch.Tensor:
    """(count,) of the weights rounded to nearest."""
    off = problem.values(problem.nearest()) - problem.target
    errors = (problem.own_slope(off) * off).reshape(-1)
    return torch.zeros(problem.count).index_add_(0, problem.cells.reshape(-1), errors)


@dataclass(frozen=True)
class _Rows:
    """Some rows of one group, whose cells are neighbours: target (cells of a row, rows, width)."""

    target: torch.Tensor
    metric: torch.Tensor
    cells: slice

    def errors(self, scale: torch.Tensor, zero_point: torch.Tensor, problem: Problem) -> torch.Tensor:
        """(cells,) of these rows, of all cells' scales and zero points."""
        places, rows, _ = self.target.shape
        steps, zeros = (t[self.cells].reshape(rows, places).T[..., None] for t in (scale, zero_point))
        off = (self.target / steps).round_().add_(zeros).clamp_(problem.low, problem.high).sub_(zeros)
        off = off.mul_(steps).sub_(self.target)
        return (off @ self.metric).mul_(off).sum(-1).T.reshape(-1)


def _rows_of(problem: Problem) -> Iterator[_Rows]:
    """All rows in the order of their cells, or none where cells are not neighbours in a row."""
    width = problem.cell_width()
    if width is None or not _in_order(problem.cells, width):
        return
    groups, rows, inputs = problem.target.shape
    places, step = inputs // width, max(1, _AT_ONCE // inputs)
    for group in range(groups):
        blocks = problem.metric[group].reshape(places, width, places, width).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        for start in range(0, rows, step):
            part = problem.target[group, start : start + step]
            target = part.reshape(len(part), places, width).transpose(0, 1).contiguous()
            first = (group * rows + start) * places
            yield _Rows(target, blocks.contiguous(), slice(first, first + len(part) * places))


def _in_order(cells: torch.Tensor, width: int) -> bool:
    flat = cells.reshape(-1, width)
    return bool((flat == torch.arange(len(flat))[:, None]).all())
