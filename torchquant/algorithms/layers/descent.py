"""Cyclic coordinate descent on codes: each in turn takes its best value, the others as they are.

Inside, inputs come before outputs (g, k, o), so that what moves together, a column of the weight, lies together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from torchquant.algorithms.layers.rounding import Problem, fit_scale
from torchquant.ops.rounding import native

__all__ = ["descend", "refit"]

Array = NDArray[np.float32]
_FEW = 1000  # a sweep that moves no more than one of so many codes is the last


def descend(
    problem: Problem, codes: torch.Tensor, sweeps: int = 8, block: int = 128, *, slope: torch.Tensor | None = None
) -> torch.Tensor:
    """Better codes than `codes`, or these.

    The error never rises. A sweep costs as much as one product with the metric; with `outputs` also a few vector
    operations for each code that moves.

    Args:
        problem: what to make small. codes: (g, o, k), where to start. sweeps: over all codes, at most.
        block: columns after which the slope of the others is brought up to date.
        slope: half the derivative at `codes`, (g, o, k), of an error whose curvature the problem's is; None: its own.
    """
    if sweeps == 0:
        return codes
    slope = problem.slope(problem.values(codes) - problem.target) if slope is None else slope
    descent = _Descent.of(problem, codes, slope)
    for _ in range(sweeps):
        before = descent.codes.clone()
        for start in range(0, codes.shape[-1], block):
            descent.block(start, min(start + block, codes.shape[-1]))
        if int((before != descent.codes).sum()) <= codes.numel() // _FEW:
            break
    return descent.codes.transpose(1, 2).contiguous()


def refit(
    problem: Problem,
    factor: torch.Tensor,
    zero_point: torch.Tensor | None,
    codes: torch.Tensor,
    refits: int,
    sweeps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Improve the scale factors (count,) and the codes (g, o, k) in turn, while that helps; `refits` times at most."""
    scaled = problem.scaled(factor, zero_point)
    for _ in range(refits):
        refitted = factor * fit_scale(scaled, codes)
        trial = problem.scaled(refitted, zero_point)
        moved = descend(trial, codes, sweeps)
        if trial.error(moved) >= scaled.error(codes):
            break
        factor, scaled, codes = refitted, trial, moved
    return factor, codes


@dataclass
class _Descent:
    """Codes on their way: `codes`, `slope`, `scale` and `inverse` (what a slope is worth in codes) are (g, k, o)."""

    problem: Problem
    codes: torch.Tensor
    slope: torch.Tensor
    scale: torch.Tensor
    inverse: torch.Tensor
    coupled: bool

    @staticmethod
    def of(problem: Problem, codes: torch.Tensor, slope: torch.Tensor) -> _Descent:
        own = (t.transpose(1, 2) for t in (codes, slope, problem.scale.expand(codes.shape)))
        turned, turned_slope, scale = (t.clone(memory_format=torch.contiguous_format) for t in own)
        curvature = problem.metric.diagonal(dim1=1, dim2=2).clamp(min=1e-30)[..., None]
        if problem.outputs is not None:
            curvature = curvature * problem.outputs.diagonal(dim1=1, dim2=2)[:, None]
        coupled = problem.outputs is not None and codes.shape[1] > 1
        return _Descent(problem, turned, turned_slope, scale, 1 / (curvature * scale), coupled)

    def block(self, start: int, end: int) -> None:
        """Let the codes of columns start .. end move, and bring the slopes of all columns up to date."""
        moved = (
            self._moved(start, end) if self.problem.outputs is None and native.is_built() else self._walked(start, end)
        )
        if bool(moved.any()):
            moved = moved if self.problem.outputs is None else moved @ self.problem.outputs
            self.slope.baddbmm_(self.problem.metric[:, :, start:end], moved)

    def _moved(self, start: int, end: int) -> torch.Tensor:
        """Move the codes of some columns, and say by how much their values (g, k, o) did."""
        matrices = (self.codes, self.slope, self.scale, self.inverse, self.problem.metric[:, :, start:end])
        limits = (self.problem.low, self.problem.high)
        groups = zip(*(m[:, start:end] for m in matrices), strict=True)
        return torch.stack([native.descend(c, s, step, i, m, limits) for c, s, step, i, m in groups])

    def _walked(self, start: int, end: int) -> torch.Tensor:
        """`_moved`, column by column in PyTorch; with `outputs` too."""
        metric, outputs = self.problem.metric[:, start:end, start:end], self.problem.outputs
        slope = self.slope[:, start:end].clone()  # of the columns that are still to come in this block
        moved = torch.empty_like(slope)
        for j in range(end - start):
            delta = self._column(start + j, slope[:, j], metric[:, j, j])
            moved[:, j] = delta
            if j + 1 == end - start:
                break
            felt = delta if outputs is None else (outputs @ delta[..., None])[..., 0]
            if len(slope) == 1:
                slope[0, j + 1 :].addr_(metric[0, j, j + 1 :], felt[0])
            else:
                slope[:, j + 1 :] += metric[:, j, j + 1 :, None] * felt[:, None]
        return moved

    def _column(self, column: int, slope: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
        """Move the codes of a column with a slope (g, o), and say by how much their values (g, o) did."""
        old = self.codes[:, column]
        if self.coupled:
            new = self._settled(column, slope, curvature)
        else:
            new = torch.addcmul(old, slope, self.inverse[:, column], value=-1).round_()
            new = new.clamp_(self.problem.low, self.problem.high)
        delta = (new - old).mul_(self.scale[:, column])
        old.copy_(new)
        return delta

    def _settled(self, column: int, slope: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
        """Better codes (g, o) of a column whose rows are coupled: each in turn takes its best value."""
        assert self.problem.outputs is not None
        new, slope = self.codes[:, column].clone(), slope.clone()
        for group, factor in enumerate(curvature.clamp(min=1e-30).tolist()):
            tensors = (new, self.scale[:, column], slope, self.problem.outputs)
            codes, steps, slopes, outputs = (t[group].numpy() for t in tensors)
            _settle(codes, steps, slopes, outputs, factor, self.problem.low, self.problem.high)
        return new


def _settle(codes: Array, scale: Array, slope: Array, outputs: Array, factor: float, low: int, high: int) -> None:
    """Let the codes (o,) of one column move, the largest gains first, until none helps; changes codes and slope."""
    own = np.maximum(outputs.diagonal() * factor, 1e-30)
    inverse = 1 / (own * scale)
    for _ in range(len(codes)):
        delta = (np.clip(np.rint(codes - slope * inverse), low, high) - codes) * scale
        gain = -delta * (2 * slope + own * delta)
        rows = np.flatnonzero(gain > 0)
        if not len(rows):
            return
        for row in rows[np.argsort(-gain[rows])].tolist():
            best = min(max(round(float(codes[row] - slope[row] * inverse[row])), low), high)
            if best != codes[row]:
                slope += outputs[row] * ((best - codes[row]) * scale[row] * factor)
                codes[row] = best
