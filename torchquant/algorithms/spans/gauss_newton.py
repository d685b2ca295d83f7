"""Codes of a block by Gauss-Newton steps over the integers.

    L        error of the block (see `objective`)          C (g, o, k)  its codes, V the values they stand for
    A        second moments of a site's inputs (g, k, k)    G (g, o, o)  those of the derivatives of L's roots by a
                                                                         site's outputs, summed over places
    L(V + D) ~ L + <dL/dV, D> + kappa tr(G D A DT)           for each site by itself

A round takes the gradient on all calibration data and minimizes the model over the codes by coordinate descent. If L
really falls the step is kept, if not kappa grows (Levenberg, Quarterly of Applied Mathematics 1944; Marquardt, SIAM
Journal 1963), so that fewer codes move. From codes that are good layer by layer this gets lower than the relaxation
of AdaRound and BRECQ, which must first leave them, and L never rises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from torchquant.algorithms.layers.descent import descend
from torchquant.algorithms.layers.gram import damp_, moments
from torchquant.algorithms.layers.layerwise import Inside, by_groups, trial
from torchquant.algorithms.layers.layout import Layout
from torchquant.algorithms.layers.rounding import Problem
from torchquant.algorithms.spans.objective import Objective, dropped, passing
from torchquant.calibration.evaluator import Env
from torchquant.calibration.parallel import total, total_, total_all_
from torchquant.fx import ops
from torchquant.fx.blocks import weight_of
from torchquant.solving.contract import Clock
from torchquant.solving.solved import Solution

__all__ = ["improve_codes"]

_KAPPA, _SHRINK, _GROW, _LARGEST = 4.0, 1.5, 2.0, 1e4
_DAMP = 0.01  # on A and on G
_SWEEPS = 2
_LEAST = 1e-3  # relative gain of a round below which it is the last
_LARGEST_COUPLED = 2048  # outputs up to which G is more than a diagonal


def improve_codes(
    objective: Objective, start: Solution, clock: Clock, *, rounds: int, drop: float = 0.0, biases: bool = True
) -> Solution:
    """A solution whose error is at most that of `start`.

    Args:
        objective: the error of a span. start: codes and grids of all its sites. clock: time, and the seed of the drops.
        rounds: passes over the data, at most.
        drop: share of the activations, in the span and at its input, that are left unquantized (QDrop).
        biases: let them move too; those of `start`.
    """
    if not rounds or not start.weights:
        return start
    steps = _Steps(objective, start, clock, drop, biases)
    current, kappa = steps.look(start), _KAPPA
    for _ in range(rounds):
        if clock.is_over or kappa > _LARGEST:
            break
        moved = steps.step(current, kappa)
        while moved is None and kappa > 1:
            kappa = max(kappa / _SHRINK, 1.0)
            moved = steps.step(current, kappa)
        if moved is None:
            break
        candidate = steps.look(moved)
        if not candidate.error < current.error:
            kappa *= _GROW
            continue
        gain = 1 - candidate.error / current.error
        current, kappa = candidate, max(kappa / _SHRINK, 1.0)
        if gain < _LEAST:
            break
    return current.solution


@dataclass(frozen=True)
class _Point:
    """A solution, its error, and half the derivatives of the error by each site's values and biases."""

    solution: Solution
    error: float
    slopes: dict[str, torch.Tensor]
    bias_slopes: dict[str, torch.Tensor]


class _Steps:
    """Quadratic models of the error in the weights and biases of a span's sites, and the steps that minimize them."""

    def __init__(self, objective: Objective, start: Solution, clock: Clock, drop: float, biases: bool) -> None:
        self._objective, self._task, self._drop, self._biases = objective, objective.task, drop, biases
        self._seed, self._generator = clock.seed, torch.Generator()
        self._fakes = passing(self._task, drop, self._generator)
        self._sites = {s.name: s for s in self._task.span.sites if s.name in start.weights}
        self._layouts = {n: Layout.of(s, start.weights[n][0].shape) for n, s in self._sites.items()}
        self._inputs = {n: self._input_moments(s, start) for n, s in self._sites.items()}
        self._outputs = self._output_moments(start)

    def look(self, solution: Solution) -> _Point:
        """Error and derivatives at a solution; the dropped elements are the same in each call."""
        weights = {n: grid.decode(codes).requires_grad_() for n, (codes, grid) in solution.weights.items()}
        biases = {n: b.detach().clone().requires_grad_() for n, b in solution.biases.items()}
        error = 0.0
        with torch.enable_grad():
            for env, wanted, sensitivities in self._batches():
                self._run(env, weights, biases)
                loss = self._objective.error(env, wanted, sensitivities)
                if loss.requires_grad:
                    loss.backward()
                error += float(loss.detach())
        for tensor in (*weights.values(), *biases.values()):
            tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        total_all_([t.grad for t in (*weights.values(), *biases.values()) if t.grad is not None])
        slopes = {n: self._layouts[n].matrix(_half_gradient(w)) for n, w in weights.items()}
        return _Point(solution, total(error)[0], slopes, {n: _half_gradient(b) for n, b in biases.items()})

    def step(self, point: _Point, kappa: float) -> Solution | None:
        """The codes and biases at which the quadratic models are least, or None if those are the ones of `point`."""
        solution = replace(point.solution, weights=dict(point.solution.weights), biases=dict(point.solution.biases))
        moved = False
        for name in self._sites:
            codes, grid = point.solution.weights[name]
            layout, outputs, slope = self._layouts[name], self._outputs[name] * kappa, point.slopes[name]
            matrix = layout.matrix(codes).float()
            problem = Problem.of(codes, layout, grid, matrix, self._inputs[name])
            own = outputs if outputs.ndim == 1 else outputs.diagonal()
            if outputs.ndim == 1:  # each row for itself, in units of its own curvature
                slope = slope / own.reshape(slope.shape[:2])[..., None]
            else:
                problem = replace(problem, outputs=by_groups(outputs, layout))
            better = descend(problem, matrix, _SWEEPS, slope=slope)
            moved |= not torch.equal(better, matrix)
            solution.weights[name] = layout.tensor(better), grid
            if self._biases and name in solution.biases:
                solution.biases[name] = solution.biases[name] - point.bias_slopes[name] / own
        return solution if moved else None

    def _input_moments(self, site: Node, start: Solution) -> torch.Tensor:
        inside = Inside(self._task, site, trial(self._task, start))
        (whole,) = moments(inside, site, self._layouts[site.name], halves=False, crossed=False)
        return damp_(whole.a, _DAMP)

    def _output_moments(self, start: Solution) -> dict[str, torch.Tensor]:
        """G (out, out), or its diagonal (out,), by backward passes of random signs times the roots of F."""
        signs = torch.Generator().manual_seed(self._seed + 1)
        weights = {n: grid.decode(codes) for n, (codes, grid) in start.weights.items()}
        sizes = {n: layout.matrix(start.weights[n][0]).shape[:2].numel() for n, layout in self._layouts.items()}
        sums = {n: torch.zeros((size, size) if size <= _LARGEST_COUPLED else (size,)) for n, size in sizes.items()}
        for env, wanted, sensitivities in self._batches():
            with torch.enable_grad():
                outputs = self._run(env, weights, start.biases, outputs=True)
                loss = torch.zeros(())
                for node, z, f in zip(self._task.results, wanted, sensitivities, strict=True):
                    if isinstance(z, torch.Tensor) and z.is_floating_point():
                        sign = torch.randint(0, 2, z.shape, generator=signs) * 2.0 - 1.0
                        loss = loss + (env[node] * (sign if f is None else sign * f.sqrt())).sum()
                gradients = _gradients(loss, list(outputs.values()))
            for name, gradient in zip(outputs, gradients, strict=True):
                if gradient is not None:
                    axis = -1 if ops.op_name(self._sites[name]) == "linear" else 1
                    rows = gradient.movedim(axis, 0).flatten(1).float()
                    sums[name] += rows @ rows.T if sums[name].ndim == 2 else rows.square().sum(1)
        for moment in sums.values():
            diagonal = total_(moment) if moment.ndim == 1 else total_(moment).diagonal()
            diagonal += _DAMP * diagonal.mean().clamp(min=1e-20)
        return sums

    def _batches(self) -> Iterator[tuple[Env, Any, Any]]:
        generator = self._generator.manual_seed(self._seed)
        for batch in range(self._task.count):
            pairs = zip(
                self._task.inputs(batch, "quantized").items(), self._task.inputs(batch, "float").values(), strict=True
            )
            inputs = {node: dropped(q, x, self._drop, generator) for (node, q), x in pairs}
            wanted = self._objective.wanted(inputs, self._task.targets(batch))
            yield dict(inputs), wanted, self._objective.sensitivities(batch)

    def _run(self, env: Env, weights: Any, biases: Any, *, outputs: bool = False) -> dict[str, torch.Tensor]:
        """Run the span; with `outputs`, also give each site's output, with a gradient."""
        nodes, site_outputs = {}, dict[str, torch.Tensor]()
        for name, site in self._sites.items():
            source = weight_of(self._task.prepared, site)
            assert source is not None
            nodes[source[0]] = weights[name]
        evaluator = self._task.evaluator(
            weights=nodes, biases={self._sites[n]: b for n, b in biases.items()}, fakes=self._fakes
        )
        if not outputs:
            evaluator.run(self._task.span.nodes, env)
            return site_outputs
        for node in self._task.span.nodes:
            evaluator.run([node], env)
            if self._sites.get(node.name) is node:
                if not env[node].requires_grad:
                    env[node] = env[node].detach().requires_grad_()
                site_outputs[node.name] = env[node]
        return site_outputs


def _half_gradient(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad / 2


def _gradients(loss: torch.Tensor, of: list[torch.Tensor]) -> Sequence[torch.Tensor | None]:
    return torch.autograd.grad(loss, of, allow_unused=True) if loss.requires_grad else [None] * len(of)
