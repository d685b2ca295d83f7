"""GPTQ: round a layer's weights input by input, and let those not yet rounded make good for the error.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, section 3; inputs of the largest second moment first ("act-order", in the authors' code), with
scales and zero points chosen before, so that groups stay groups of neighbours ("static groups").

    U = chol(A^-1), upper      A = E[x xT], damped
    e_j = (w_j - Q(w_j)) / U_jj,   w_i -= e_j U_ji  for i > j

With `compensate`, what is rounded is not W but the weight T that best gives the float layer's output from the inputs
that the quantized prefix makes (see `gram`), as GPTAQ (Li et al., 2025) and Qronos (Zhang et al., 2025) correct it.
"""

from __future__ import annotations

import math

import torch

from torchquant.algorithms.layers.layerwise import Inside, RowRounding
from torchquant.algorithms.layers.rounding import Problem
from torchquant.calibration.stream import Task
from torchquant.ops.rounding import native
from torchquant.solving.contract import Clock
from torchquant.solving.solved import Solution

__all__ = ["GPTQ", "propagate"]

_BLOCK = native.MOST_COLUMNS  # inputs after which the error is carried on to all that follow
_MOST_DAMP = 1e4  # times the mean diagonal


class GPTQ(RowRounding):
    """Codes by error propagation in each layer, in the order of the graph, for any Quantizer's integer grids.

    Args:
        act_order: round inputs of the largest second moment first.
        search: choose each scale (and zero point, of an affine grid) by the layer's output error first; without,
            they are the observer's.
        sweeps: of coordinate descent on the codes afterwards, 0 for the paper's method.
        refits: how often scales and codes are improved in turn then.
        correct_bias, compensate, damp, sensitive, weigh_places: see `Layerwise`; without a bias none is added, as
            decoders and their checkpoints have none. The paper's method is `GPTQ(search=False, sweeps=0, refits=0,
            correct_bias=False, compensate=False, damp=0.01)`.
    """

    def __init__(
        self,
        *,
        act_order: bool = True,
        search: bool = True,
        sweeps: int = 8,
        refits: int = 2,
        correct_bias: bool | None = None,
        compensate: bool = True,
        damp: float | None = None,
        sensitive: bool = False,
        weigh_places: bool = False,
    ) -> None:
        super().__init__(
            search=search,
            sweeps=sweeps,
            refits=refits,
            correct_bias=correct_bias,
            compensate=compensate,
            damp=damp,
            sensitive=sensitive,
            weigh_places=weigh_places,
        )
        self.act_order, self._raised = act_order, 0.0

    def solve(self, task: Task | Inside, clock: Clock) -> Solution:
        """The answer for a span of one site, which says where the moments had to be damped more than was asked for."""
        self._raised = 0.0
        solution = super().solve(task, clock)
        if self._raised:
            solution.notes.append(f"{task.span.sites[0].name}: {_reason(self._raised)}")
            self._raised = 0.0
        return solution

    def round_rows(self, problem: Problem, clock: Clock) -> torch.Tensor:
        """Codes by error propagation, or the nearest where they are better."""
        codes, self._raised = propagate(problem, self.act_order)
        return min(codes, problem.nearest(), key=problem.error)


def _reason(raised: float) -> str:
    what = "the second moments of its inputs are not positive definite"
    if math.isinf(raised):
        return f"{what} under any damping: the errors of its weights are not propagated"
    return f"{what}: {raised:.0e} of their mean diagonal was added to the damping (damp); more calibration data help"


def propagate(problem: Problem, act_order: bool = True) -> tuple[torch.Tensor, float]:
    """Codes (g, o, k): each input's error is carried on to the inputs that are not yet rounded.

    Returns the codes and the largest share of the mean diagonal that had to be added to the diagonal of a metric to
    make it positive definite: 0 where they all are, infinite where nothing helped, and no error is carried on.
    """
    codes, raised = torch.empty_like(problem.target), 0.0
    for group, metric in enumerate(problem.metric):
        diagonal = metric.diagonal()
        order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
        upper, damp = _inverse_factor(metric[order][:, order])
        raised = max(raised, damp)
        target, scale, zero_point = (
            t.expand(codes.shape)[group].T[order] for t in (problem.target, problem.scale, problem.zero_point)
        )
        codes[group, :, order] = _rounded(target, scale, zero_point, upper, problem).T
    return codes, raised


def _rounded(
    target: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, upper: torch.Tensor, problem: Problem
) -> torch.Tensor:
    """Codes (k, o) of a target (k, o), in the order of its rows."""
    target, scale, zero_point = (t.clone(memory_format=torch.contiguous_format) for t in (target, scale, zero_point))
    codes, limits = torch.empty_like(target), (problem.low, problem.high)
    for start in range(0, len(target), _BLOCK):
        end = min(start + _BLOCK, len(target))
        part = slice(start, end)
        codes[part], errors = native.propagate(target[part], scale[part], zero_point[part], upper[part, part], limits)
        target[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return codes


def _inverse_factor(metric: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The upper Cholesky factor of the inverse of a (k, k), and what had to be added; see `propagate`.

    A = R RT with R upper, which is the factor of A with its inputs in reverse, gives A^-1 = UT U with U = R^-1.
    """
    wide = metric.double()
    mean, unit = wide.diagonal().mean().clamp(min=1e-12), torch.eye(len(wide), dtype=wide.dtype)
    damp = 0.0
    while damp < _MOST_DAMP:
        reverse, failed = torch.linalg.cholesky_ex((wide + damp * mean * unit).flip(0, 1))
        if not failed:
            upper = torch.linalg.solve_triangular(reverse.flip(0, 1), unit, upper=True)
            if bool(upper.isfinite().all()):
                return upper.float().contiguous(), damp
        damp = max(1e-6, 10 * damp)
    return torch.eye(len(wide)), math.inf
