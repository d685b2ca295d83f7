"""Layer objectives that depend on the data only through second moments of a site's input.

    W (g, o, k)     weight of a conv or linear as matrices: g groups, o outputs and k inputs each
    x, xq (g, k)    an input column of the float function, and of the quantized prefix
    A = E[xq xqT]   (g, k, k), or the covariance where a bias takes up the mean error
    B = E[x xqT]    (g, k, k), likewise

    E |Wq xq - W x|^2 = tr((Wq - T) A (Wq - T)T) + const,   T = W B A^-1

The data are read once, whatever the number of iterations, and the cost of one iteration is that of a product with A.
T is what the layer should be, given what the quantized prefix makes of the data; with x = xq it is W itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch.fx import Node

from torchquant.algorithms.layers.layout import Layout
from torchquant.calibration.evaluator import Flow
from torchquant.calibration.parallel import preceding, total_

__all__ = ["Data", "Moments", "choose_damp", "compensated", "damp_", "moments"]

_JUDGED_ROWS = 128  # of a weight, enough to tell dampings apart
_LEAST_STEP, _STEPS = 128, 6  # rows of a symmetric product at once, and how many pieces there are of a large one
_LEAST_CHUNK, _LARGEST_CHUNK = 1 << 17, 1 << 23  # elements of unfolded input at once


# moments ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Second moments of a site's input.

    Args:
        a: E[xq xqT] (g, k, k). b: E[x xqT] (g, k, k), or None where it was not asked for. mean_q, mean: E[xq], E[x]
            (g, k). float32.
        count: columns they were taken over.
    """

    a: torch.Tensor
    b: torch.Tensor | None
    mean_q: torch.Tensor
    mean: torch.Tensor
    count: int

    @staticmethod
    def joined(folds: Sequence[Moments]) -> Moments:
        """Moments over the data of all folds, in tensors of their own."""
        count = max(1, sum(f.count for f in folds))

        def mean_of(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            mean = torch.zeros_like(parts[0])
            for part, fold in zip(parts, folds, strict=True):
                mean.add_(part, alpha=fold.count / count)
            return mean

        b = None if folds[0].b is None else mean_of([f.b for f in folds if f.b is not None])
        rest = (mean_of([f.mean_q for f in folds]), mean_of([f.mean for f in folds]))
        return Moments(mean_of([f.a for f in folds]), b, *rest, count)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What there is to keep; `Moments.of` takes it."""
        crossed = () if self.b is None else (self.b,)
        return self.a, self.mean_q, self.mean, torch.tensor(self.count), *crossed

    @staticmethod
    def of(
        a: torch.Tensor, mean_q: torch.Tensor, mean: torch.Tensor, count: torch.Tensor, b: torch.Tensor | None = None
    ) -> Moments:
        """Of what `tensors` gave."""
        return Moments(a, b, mean_q, mean, int(count))

    def centre_(self) -> Moments:
        """Make covariances of the second moments, in place: what is left to a layer with a free bias."""
        self.a.baddbmm_(self.mean_q[:, :, None], self.mean_q[:, None, :], alpha=-1)
        if self.b is not None:
            self.b.baddbmm_(self.mean[:, :, None], self.mean_q[:, None, :], alpha=-1)
        return self


def moments(
    task: Data, site: Node, layout: Layout, *, weigh: bool = False, halves: bool = True, crossed: bool = True
) -> tuple[Moments, ...]:
    """Read the data of a one-site task once (over all processes): moments of every other sample, and of the rest.

    Args:
        weigh: count each column as the network's output feels an error at its place, where that was measured.
        halves: without, one Moments of all samples.
        crossed: E[x xqT] too.
    """
    source = site.args[0]
    assert isinstance(source, Node)
    size = layout.matrix(torch.empty(layout.shape, device="meta")).shape
    folds = 2 if halves else 1
    sums = [_Sums(size[0], size[2], crossed) for _ in range(folds)]
    first = preceding(task.count)  # so that the halves do not depend on how many processes share the batches in order
    for batch in range(task.count):
        quantized, exact = (task.inputs(batch, flow)[source] for flow in ("quantized", "float"))
        weights = task.place_weights(site, batch) if weigh else None
        for fold in range(folds):
            weighed = None if weights is None else weights[fold::folds]
            sums[(fold + first + batch) % folds].add(quantized[fold::folds], exact[fold::folds], layout, weighed)
        del quantized, exact  # before the next ones are read
    return tuple(s.moments() for s in sums)


class Data(Protocol):
    """Where a site's inputs come from."""

    count: int

    def inputs(self, batch: int, flow: Flow) -> dict[Node, Any]:
        """The values that the site reads, for one batch."""

    def place_weights(self, site: Node, batch: int) -> torch.Tensor | None:
        """How much each place of a linear counts, (samples, ...)."""


class _Sums:
    """Moments on the way."""

    def __init__(self, groups: int, inputs: int, crossed: bool = True) -> None:
        self._products = torch.zeros(1 + crossed, groups, inputs, inputs, dtype=torch.float64)
        self._sums = torch.zeros(2, groups, inputs, dtype=torch.float64)
        self._count = torch.zeros((), dtype=torch.float64)
        # little beside a layer's values, and not so little that adding the products up takes longer than they do
        self._chunk = min(max(_LEAST_CHUNK, 2 * self._products[0].numel()), _LARGEST_CHUNK)

    def add(
        self, quantized: torch.Tensor, exact: torch.Tensor, layout: Layout, weights: torch.Tensor | None = None
    ) -> None:
        """Add the columns of some samples, each times its weight (samples, ...) of a linear."""
        pieces = (layout.pieces(side.float(), self._chunk) for side in (quantized, exact))
        done = 0
        for columns in zip(*pieces, strict=True):
            count, right = columns[0].shape[-1], columns[0].transpose(1, 2)
            if weights is not None:
                part = weights.reshape(-1)[done : done + count].float()
                columns = tuple(side * part for side in columns)
            for i, side in enumerate(columns):
                self._sums[i] += side.sum(-1, dtype=torch.float64)
            _add_gram(self._products[0], columns[0], right)
            for product in self._products[1:]:
                product += columns[1] @ right
            self._count += count if weights is None else part.sum(dtype=torch.float64)
            done += count

    def moments(self) -> Moments:
        """The means; the sums are gone then."""
        for tensor in (self._products, self._sums, self._count):
            total_(tensor)
        count = self._count.clamp(min=1)
        a, b = self._products[0], self._products[1] if len(self._products) > 1 else None
        a.triu_().add_(a.transpose(1, 2).tril(-1))
        sums = self._sums.div_(count).float()
        crossed = None if b is None else b.div_(count).float()
        a = a.div_(count).float()
        del self._products, self._sums
        return Moments(a, crossed, sums[0], sums[1], int(self._count))


def _add_gram(product: torch.Tensor, columns: torch.Tensor, right: torch.Tensor) -> None:
    """Add columns (g, k, n) times right (g, n, k) to the upper triangle of a product (g, k, k) that is symmetric."""
    inputs = product.shape[-1]
    step = max(_LEAST_STEP, -(-inputs // _STEPS))
    for start in range(0, inputs, step):
        part = slice(start, start + step)
        product[:, part, start:] += columns[:, part] @ right[..., start:]


# what the layer should be -----------------------------------------------------------------------------------------


def damp_(a: torch.Tensor, damp: float) -> torch.Tensor:
    """Add `damp` times the mean diagonal of `a` (g, k, k) to its diagonal, in place."""
    a.diagonal(dim1=1, dim2=2).add_(_ridge(a, damp))
    return a


def _ridge(a: torch.Tensor, damp: float) -> torch.Tensor:
    """(g, 1): `damp` times the mean diagonal of `a` (g, k, k)."""
    return damp * a.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp(min=1e-12)


def compensated(matrix: torch.Tensor, of: Moments, damp: float, precision: torch.dtype = torch.float64) -> torch.Tensor:
    """T = W (B + D) (A + D)^-1, D = `damp` times the mean diagonal of A: the (g, o, k) that best gives W x from xq.

    W itself where A + D is not positive definite in this precision. `of` has its `b`.
    """
    assert of.b is not None
    ridge = _ridge(of.a, damp)
    damped = of.a.to(precision, copy=True)
    damped.diagonal(dim1=1, dim2=2).add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if bool(failed.any()):
        return matrix
    moved = (matrix @ of.b).add_(matrix * ridge[..., None])
    return torch.cholesky_solve(moved.transpose(1, 2).to(precision), factor).transpose(1, 2).float()


def choose_damp(matrix: torch.Tensor, folds: Sequence[Moments], candidates: Sequence[float]) -> float:
    """The damping whose T, found on one half of the data, does best on the other half, as some of its rows tell.

    Searched downhill from the middle of `candidates`, which are in order.
    """
    if min(f.count for f in folds) == 0:
        return max(candidates)
    matrix = matrix[:, :: max(1, matrix.shape[1] // _JUDGED_ROWS)]

    @cache
    def error(index: int) -> float:
        return sum(_judged(matrix, fit, judge, candidates[index]) for fit, judge in (folds, reversed(folds)))

    best, last = len(candidates) // 2, len(candidates) - 1
    for step in (-1, 1):
        while 0 <= best + step <= last and error(best + step) < error(best):
            best += step
    return candidates[best]


def _judged(matrix: torch.Tensor, fit: Moments, judge: Moments, damp: float) -> float:
    """The error of T on data that it was not found on, but for what does not depend on T."""
    assert judge.b is not None
    target = compensated(matrix, fit, damp, torch.float32)
    wanted = 2 * (matrix @ judge.b)
    return float(((target @ judge.a - wanted) * target).sum(dtype=torch.float64))
