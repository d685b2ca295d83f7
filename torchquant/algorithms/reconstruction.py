"""Reconstruction of a span's float output by gradient descent on sampled data.

    z, zq       outputs of the span: float function, and quantized on inputs from the quantized prefix
    F           weight of each element of z: its squared gradient (BRECQ's Fisher diagonal), or one
    L = sum_c F (zq - z)^2, mean over samples and places, + the rounding term of AdaRound over all weights

The parts that can be learned are small modules: how a weight is rounded, and the step of an activation grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from torchquant.algorithms.contract import Clock
from torchquant.algorithms.layerwise import float_bias, float_weight
from torchquant.fx import ops
from torchquant.fx.blocks import weight_grid, weight_of
from torchquant.fx.grids import Grid, grid_of
from torchquant.fx.sites import observer_of
from torchquant.fx.stream import Task
from torchquant.parallel import total, total_, world_size
from torchquant.solved import Solution, SolvedWeight

__all__ = ["LearnedStep", "Reconstruction", "SoftRounding", "StraightThrough"]

_LOW, _HIGH = -0.1, 1.1
_PROBES = 4
_NEAR = 0.25  # steps from a code chosen before, within which its relaxation starts


def _round(x: torch.Tensor) -> torch.Tensor:
    """Round to nearest, with the gradient of the identity."""
    return x + (x.round() - x).detach()


def _near(steps: torch.Tensor, chosen: torch.Tensor, distance: float) -> torch.Tensor:
    """`steps` moved to within `distance` of those chosen before."""
    return chosen + (steps - chosen).clamp(-distance, distance)


class SoftRounding(nn.Module):
    """A weight whose codes are floor(u) + h(a), h from 0 to 1 (AdaRound, eq. 23).

    Args:
        weight: float weight. grid: its grid. codes: those chosen already, or None; they are where it starts.
    """

    def __init__(self, weight: torch.Tensor, grid: Grid, codes: torch.Tensor | None = None) -> None:
        super().__init__()
        self.grid = grid
        scale, zero_point = grid.expand(weight.shape)
        self._scale, self._zero_point = scale, zero_point
        u = weight / scale
        if codes is not None:
            u = _near(u, codes - zero_point, _NEAR)
        self._floor = u.floor()
        fraction = (u - self._floor).clamp(1e-4, 1 - 1e-4)
        self.a = nn.Parameter(torch.logit((fraction - _LOW) / (_HIGH - _LOW)))

    def h(self) -> torch.Tensor:
        """The rectified sigmoid."""
        return (torch.sigmoid(self.a) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def forward(self) -> torch.Tensor:
        """The soft-quantized weight."""
        return (self._clamp(self._floor + self.h()) - self._zero_point) * self._scale

    def penalty(self, beta: float) -> torch.Tensor:
        """sum(1 - |2 h - 1|^beta)."""
        return (1 - (2 * self.h() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def answer(self) -> tuple[torch.Tensor, Grid]:
        """Codes and grid."""
        return self._clamp(self._floor + (self.h() > 0.5)), self.grid

    def _clamp(self, steps: torch.Tensor) -> torch.Tensor:
        return (steps + self._zero_point).clamp(self.grid.quant_min, self.grid.quant_max)


class StraightThrough(nn.Module):
    """A weight W + V and its scale, learned through the rounding (AdaQuant, eq. 4)."""

    def __init__(self, weight: torch.Tensor, grid: Grid, codes: torch.Tensor | None = None) -> None:
        super().__init__()
        self.grid = grid
        self._cells = grid.cells(weight.shape)
        scale, self._zero_point = grid.expand(weight.shape)
        steps = weight / scale  # of the first scale, so that one learning rate fits all
        self.a = nn.Parameter(steps if codes is None else _near(steps, codes - self._zero_point, 0.45))
        self.log_scale = nn.Parameter(torch.zeros(grid.scale.numel()))

    def _steps(self) -> torch.Tensor:
        steps = _round(self.a / self.log_scale.exp()[self._cells]) + self._zero_point
        return steps.clamp(self.grid.quant_min, self.grid.quant_max)

    def forward(self) -> torch.Tensor:
        """The quantized weight."""
        return (self._steps() - self._zero_point) * (self.grid.scale * self.log_scale.exp())[self._cells]

    def penalty(self, beta: float) -> torch.Tensor:
        """Nothing to push: the codes are integers all along."""
        return torch.zeros(())

    @torch.no_grad()
    def answer(self) -> tuple[torch.Tensor, Grid]:
        """Codes and grid."""
        return self._steps(), self.grid.with_scale(self.grid.scale * self.log_scale.exp())


class LearnedStep(nn.Module):
    """A static activation grid with a learned step (LSQ), which lets elements pass unquantized at random (QDrop).

    Args:
        grid: one cell. drop: probability that an element passes. generator: for the draws.
    """

    def __init__(self, grid: Grid, drop: float, generator: torch.Generator) -> None:
        super().__init__()
        self.grid, self.drop, self._generator = grid, drop, generator
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, quantized but for what is dropped."""
        scale, zero_point = self.grid.scale.reshape(()) * self.log_scale.exp(), self.grid.zero_point.reshape(())
        steps = (_round(x / scale) + zero_point).clamp(self.grid.quant_min, self.grid.quant_max)
        quantized = (steps - zero_point) * scale
        if not self.drop:
            return quantized
        return torch.where(torch.rand(x.shape, generator=self._generator) < self.drop, x, quantized)

    def answer(self) -> tuple[float, int]:
        """Scale and zero point."""
        return float(self.grid.scale * self.log_scale.detach().exp()), int(self.grid.zero_point)


class Reconstruction:
    """Learns a span's weights, activation steps and biases.

    Args:
        weights: site -> its learned weight. steps: observer's target -> its learned step.
        biases: site -> bias. sensitive: weigh errors by `Task.sensitivity`.
        drop: probability that an element of the span's input comes from the float function.
        start: codes and biases to start from; those in the graph if None.
    """

    def __init__(
        self,
        task: Task,
        clock: Clock,
        rounding: type[SoftRounding] | type[StraightThrough],
        *,
        drop: float,
        sensitive: bool,
        learn_steps: bool,
        learn_biases: bool,
        start: Solution | None = None,
    ) -> None:
        self.task, self.clock, self.drop, self.sensitive = task, clock, drop, sensitive
        self.generator = clock.generator()
        self._start = start or Solution()
        self.weights = {site: self._rounding(site, rounding) for site in task.span.sites}
        self.steps = dict(self._learned_steps(drop)) if learn_steps or drop else {}
        self.learn_steps = learn_steps
        self.biases = {site: self._bias(site) for site in task.span.sites} if learn_biases else {}

    def _rounding(self, site: Node, rounding: Any) -> Any:
        weight, found = float_weight(self.task.prepared, site), weight_of(self.task.prepared, site)
        assert found is not None
        if site.name in self._start.weights:
            codes, grid = self._start.weights[site.name]
            return rounding(weight, grid, codes)
        old = found[1].codes if isinstance(found[1], SolvedWeight) else None
        return rounding(weight, weight_grid(self.task.prepared, site), old)

    def _learned_steps(self, drop: float) -> Iterator[tuple[str, LearnedStep]]:
        seen, known = _observed_elsewhere(self.task), dict[int, LearnedStep]()
        for node in self.task.span.nodes:
            observer = observer_of(self.task.prepared, node)
            value = node.args[0].meta.get("val") if isinstance(node.args[0], Node) else None
            if observer is None or value is None or str(node.target) in seen:
                continue
            grid = grid_of(observer, value.shape)
            if grid is not None and grid.dialect == "tensor" and grid.scale.numel() == 1:
                yield str(node.target), known.setdefault(id(observer), LearnedStep(grid, drop, self.generator))

    def _bias(self, site: Node) -> nn.Parameter:
        if site.name in self._start.biases:
            return nn.Parameter(self._start.biases[site.name].clone())
        source = ops.argument(site, 2)
        value: Any = None if source is None else self.task.evaluator().value(source, {})
        shape = float_weight(self.task.prepared, site).shape
        exact = float_bias(self.task.prepared, site)
        outputs = shape[0] if exact is None else exact.numel()
        return nn.Parameter(torch.zeros(outputs) if value is None else value.detach().clone().float())

    def run(
        self,
        iterations: int,
        *,
        lr: float,
        step_lr: float,
        bias_lr: float,
        lam: float,
        beta: tuple[float, float],
        warm_up: float,
    ) -> None:
        """Adam on samples drawn from all batches, until the iterations or the time are used up."""
        groups: list[dict[str, Any]] = [{"params": [w.a for w in self.weights.values()], "lr": lr}]
        scales = [w.log_scale for w in self.weights.values() if isinstance(w, StraightThrough)]
        scales += list({s.log_scale for s in self.steps.values()}) if self.learn_steps else []
        groups += [{"params": scales, "lr": step_lr}] if scales else []
        groups += [{"params": list(self.biases.values()), "lr": bias_lr}] if self.biases else []
        optimizer = torch.optim.Adam(groups)
        decays = [lambda step: 0.5 + 0.5 * math.cos(math.pi * step / iterations)] * len(groups)
        if lam:
            decays[0] = lambda _: 1.0  # the rounding term ends the weights' search
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decays)
        parameters = [p for g in groups for p in g["params"]]
        unit = self._unit()
        for step in range(iterations):
            if self.clock.is_over:
                break
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = self.data_loss() * unit
                progress = step / iterations
                if progress >= warm_up and lam:
                    b = beta[1] + (beta[0] - beta[1]) * (1 - (progress - warm_up) / (1 - warm_up))
                    loss = loss + lam * sum(w.penalty(b) for w in self.weights.values())
                loss.backward()
            for parameter in parameters:
                if parameter.grad is not None:
                    total_(parameter.grad)
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def _unit(self) -> float:
        """Weights, divided by the loss at the codes where learning starts: lam then fits any network."""
        start = sum(float(self.data_loss(hard=True)) for _ in range(_PROBES)) / _PROBES
        start = total(start)[0] / world_size()
        return sum(w.a.numel() for w in self.weights.values()) / max(start, 1e-30)

    def data_loss(self, hard: bool = False) -> torch.Tensor:
        """L without the rounding term, on samples drawn now; with the codes where the weights would end if `hard`."""
        env, targets, sensitivity = self._sample()
        weights = {
            self._weight_node(site): _decoded(*learned.answer()) if hard else learned()
            for site, learned in self.weights.items()
        }
        fakes: dict[str, Any] = dict(self.steps)
        evaluator = self.task.evaluator(weights=weights, fakes=fakes, biases=self.biases)
        evaluator.run(self.task.span.nodes, env)
        loss = torch.zeros(())
        for node, wanted, weight in zip(self.task.results, targets, sensitivity, strict=True):
            if not isinstance(wanted, torch.Tensor) or not wanted.is_floating_point():
                continue
            error = (env[node] - wanted).square()
            error = error if weight is None else error * (weight / weight.mean().clamp(min=1e-30))
            axis = 1 if self._channels_first() and error.ndim > 2 else -1
            loss = loss + error.sum(axis).mean()
        return loss

    def _channels_first(self) -> bool:
        return ops.op_name(self.task.span.sites[-1]).startswith("conv")

    def _weight_node(self, site: Node) -> Node:
        found = weight_of(self.task.prepared, site)
        assert found is not None
        return found[0]

    def answer(self) -> Solution:
        """What was learned."""
        return Solution(
            {site.name: learned.answer() for site, learned in self.weights.items()},
            {site.name: bias.detach().clone() for site, bias in self.biases.items()},
            {target: step.answer() for target, step in self.steps.items()} if self.learn_steps else {},
        )

    # samples ------------------------------------------------------------------------------------------------------

    def _sample(self) -> tuple[dict[Node, Any], list[Any], list[Any]]:
        """Inputs, targets and sensitivities of a batch whose samples come from two batches, where that can be."""
        first, second = (int(torch.randint(self.task.count, (), generator=self.generator)) for _ in range(2))
        one, other = self._batch(first), self._batch(second)
        size = _samples(one)
        if size is None or size != _samples(other):
            return self._mixed(one)
        pick = torch.randperm(2 * size, generator=self.generator)[:size]
        joined = [_pick(a, b, pick) for a, b in zip(one, other, strict=True)]
        return self._mixed(joined)

    def _batch(self, batch: int) -> list[Any]:
        quantized, exact = self.task.inputs(batch, "quantized"), self.task.inputs(batch, "float")
        targets = self.task.targets(batch)
        sensitivity = self.task.sensitivity(batch) if self.sensitive else [None] * len(targets)
        return [*quantized.values(), *exact.values(), *targets, *sensitivity]

    def _mixed(self, values: Sequence[Any]) -> tuple[dict[Node, Any], list[Any], list[Any]]:
        reads = list(self.task.inputs(0, "quantized"))
        n, m = len(reads), len(self.task.results)
        inputs = [self._drop(q, x) for q, x in zip(values[:n], values[n : 2 * n], strict=True)]
        return dict(zip(reads, inputs, strict=True)), list(values[2 * n : 2 * n + m]), list(values[2 * n + m :])

    def _drop(self, quantized: Any, exact: Any) -> Any:
        if not self.drop or not isinstance(quantized, torch.Tensor) or not quantized.is_floating_point():
            return quantized
        return torch.where(torch.rand(quantized.shape, generator=self.generator) < self.drop, exact, quantized)


def _decoded(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    return grid.decode(codes)


def _samples(values: Sequence[Any]) -> int | None:
    """The common first size of all tensors, or None."""
    sizes = {v.shape[0] if v.ndim else -1 for v in values if isinstance(v, torch.Tensor)}
    plain = all(v is None or isinstance(v, (torch.Tensor, int, float)) for v in values)
    return sizes.pop() if len(sizes) == 1 and plain and -1 not in sizes else None


def _pick(a: Any, b: Any, pick: torch.Tensor) -> Any:
    return torch.cat([a, b])[pick] if isinstance(a, torch.Tensor) else a


def _observed_elsewhere(task: Task) -> set[str]:
    """Observers of the span that other parts of the graph use too: their range is not this span's to choose."""
    inside = set(task.span.nodes)
    outside = [n for n in task.prepared.graph.nodes if n.op == "call_module" and n not in inside]
    modules = {id(task.prepared.get_submodule(str(n.target))) for n in outside}
    return {
        str(n.target)
        for n in inside
        if n.op == "call_module" and id(task.prepared.get_submodule(str(n.target))) in modules
    }
