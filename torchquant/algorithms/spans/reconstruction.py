"""Reconstruction of a span's output by gradient descent on sampled data: what is continuous in it.

Weights and their scales through the rounding (AdaQuant), steps of activation grids (LSQ), and biases. The parts that
can be learned are small modules; the error is that of `objective`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from torchquant.algorithms.layers.layerwise import float_weight
from torchquant.algorithms.layers.layout import Layout
from torchquant.algorithms.spans.objective import Objective, activation_observers, dropped, passing
from torchquant.calibration.parallel import total, total_all_
from torchquant.calibration.stream import Task
from torchquant.fx import ops
from torchquant.fx.blocks import weight_grid, weight_of
from torchquant.fx.grids import Grid, grid_of
from torchquant.solving.contract import Clock
from torchquant.solving.solved import Solution, SolvedWeight

__all__ = ["LearnedStep", "LearnedWeight", "Reconstruction", "StraightThrough", "rounded", "standing"]

_NEAR = 0.45  # steps from a code chosen before, within which learning starts


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Round to nearest, with the gradient of the identity."""
    return x + (x.round() - x).detach()


class LearnedWeight(nn.Module):
    """A quantized weight with parameters: called, it is the weight with gradients."""

    def answer(self) -> tuple[torch.Tensor, Grid]:
        """Codes and grid."""
        raise NotImplementedError


class StraightThrough(LearnedWeight):
    """A weight W + V and its scale, learned through the rounding (AdaQuant, eq. 4)."""

    def __init__(self, weight: torch.Tensor, grid: Grid, codes: torch.Tensor | None = None) -> None:
        super().__init__()
        self.grid = grid
        self._cells = grid.cells(weight.shape)
        scale, self._zero_point = grid.expand(weight.shape)
        steps = weight / scale  # of the first scale, so that one learning rate fits all
        self.a = nn.Parameter(steps if codes is None else _near(steps, codes - self._zero_point))
        self.log_scale = nn.Parameter(torch.zeros(grid.scale.numel()))

    def _steps(self) -> torch.Tensor:
        steps = rounded(self.a / self.log_scale.exp()[self._cells]) + self._zero_point
        return steps.clamp(self.grid.quant_min, self.grid.quant_max)

    def forward(self) -> torch.Tensor:
        """The quantized weight."""
        return (self._steps() - self._zero_point) * (self.grid.scale * self.log_scale.exp())[self._cells]

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
        steps = (rounded(x / scale) + zero_point).clamp(self.grid.quant_min, self.grid.quant_max)
        dequantized: torch.Tensor = dropped((steps - zero_point) * scale, x, self.drop, self._generator)
        return dequantized

    def answer(self) -> tuple[float, int]:
        """Scale and zero point."""
        return float(self.grid.scale * self.log_scale.detach().exp()), int(self.grid.zero_point)


class Reconstruction:
    """Learns a span's activation steps and biases, and its weights where these can be learned.

    Args:
        objective: the error of the span. clock: time and seed.
        weights: site -> codes and grid, or a learned weight, for all sites.
        biases: site -> bias to start from, of those that are to be learned.
        learn_steps: of static per-tensor activation grids that belong to this span alone.
        drop: share of the activations, in the span and at its input, that are left unquantized (QDrop).
    """

    def __init__(
        self,
        objective: Objective,
        clock: Clock,
        weights: Mapping[Node, Weight],
        biases: Mapping[Node, torch.Tensor],
        *,
        learn_steps: bool,
        drop: float = 0.0,
    ) -> None:
        self.objective, self.task, self.clock, self.drop = objective, objective.task, clock, drop
        self.generator = clock.generator()
        self.weights = dict(weights)
        self.steps = dict(self._learned_steps()) if learn_steps else {}
        self.biases = {site: nn.Parameter(bias.detach().clone()) for site, bias in biases.items()}

    def _learned_steps(self) -> Iterator[tuple[str, LearnedStep]]:
        seen, known = _observed_elsewhere(self.task), dict[int, LearnedStep]()
        for node, observer in activation_observers(self.task):
            value = node.args[0].meta.get("val") if isinstance(node.args[0], Node) else None
            if value is None or str(node.target) in seen:
                continue
            grid = grid_of(observer, value.shape)
            if grid is not None and grid.dialect == "tensor" and grid.scale.numel() == 1:
                yield str(node.target), known.setdefault(id(observer), LearnedStep(grid, self.drop, self.generator))

    def run(self, iterations: int, *, lr: float = 0.0, step_lr: float, bias_lr: float) -> None:
        """Adam on samples drawn from all batches, step sizes down to zero by a cosine, while there is time.

        Each process draws from its own batches, and counts by how many it has.
        """
        learned = [w for w in self.weights.values() if isinstance(w, StraightThrough)]
        scales = [w.log_scale for w in learned] + list(dict.fromkeys(s.log_scale for s in self.steps.values()))
        rates = [([w.a for w in learned], lr), (scales, step_lr), (list(self.biases.values()), bias_lr)]
        groups: list[dict[str, Any]] = [{"params": tensors, "lr": rate} for tensors, rate in rates if tensors]
        if not groups or not iterations:
            return
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / iterations)
        )
        parameters = [p for group in groups for p in group["params"]]  # in one order in all processes
        share = self.task.count / max(total(self.task.count)[0], 1)
        for _ in range(iterations):
            if self.clock.is_over:
                break
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            if self.task.count:
                with torch.enable_grad():
                    (self.loss() * share).backward()
            total_all_([p.grad for p in parameters if p.grad is not None])
            optimizer.step()
            schedule.step()

    def loss(self) -> torch.Tensor:
        """The error on samples drawn now, mean over these."""
        error, count = self.sampled()
        return error / count

    def sampled(self) -> tuple[torch.Tensor, int]:
        """The error on samples drawn now, summed over these, and their number."""
        inputs, wanted, sensitivities, count = self._sample()
        nodes = {self._weight_node(site): _value(weight) for site, weight in self.weights.items()}
        fakes: dict[str, Any] = {**passing(self.task, self.drop, self.generator), **self.steps}
        evaluator = self.task.evaluator(weights=nodes, fakes=fakes, biases=self.biases)
        env = evaluator.run(self.task.span.nodes, inputs)
        return self.objective.error(env, wanted, sensitivities), count

    def _weight_node(self, site: Node) -> Node:
        weight = weight_of(self.task.prepared, site)
        assert weight is not None
        return weight[0]

    def answer(self) -> Solution:
        """What was learned."""
        return Solution(
            {s.name: w.answer() if isinstance(w, LearnedWeight) else w for s, w in self.weights.items()},
            {site.name: bias.detach().clone() for site, bias in self.biases.items()},
            {target: step.answer() for target, step in self.steps.items()},
        )

    # samples ------------------------------------------------------------------------------------------------------

    def _sample(self) -> tuple[dict[Node, Any], Sequence[Any], Sequence[Any], int]:
        """Inputs, wanted results and their weights for samples from two batches, where that can be; their number."""
        first, second = (int(torch.randint(self.task.count, (), generator=self.generator)) for _ in range(2))
        one, other = self._batch(first), self._batch(second)
        size = _samples(one)
        if size is not None and size == _samples(other):
            pick = torch.randperm(2 * size, generator=self.generator)[:size]
            one = [_pick(a, b, pick) for a, b in zip(one, other, strict=True)]
        reads, m = list(self.task.inputs(first, "quantized")), len(self.task.results)
        targets, sensitivities, values = one[:m], one[m : 2 * m], one[2 * m :]
        if self.drop:
            n = len(reads)
            values = [dropped(q, x, self.drop, self.generator) for q, x in zip(values[:n], values[n:], strict=True)]
        inputs = dict(zip(reads, values, strict=True))
        return inputs, self.objective.wanted(inputs, targets), sensitivities, size or 1

    def _batch(self, batch: int) -> list[Any]:
        exact = self.task.inputs(batch, "float").values() if self.drop else ()
        quantized = self.task.inputs(batch, "quantized").values()
        return [*self.task.targets(batch), *self.objective.sensitivities(batch), *quantized, *exact]


def standing(task: Task) -> Solution:
    """Codes, grids and biases of a span's sites as they are in the graph: chosen before, or by rounding to nearest."""
    solution = Solution()
    for site in task.span.sites:
        source, grid = weight_of(task.prepared, site), weight_grid(task.prepared, site)
        assert source is not None
        codes = (
            source[1].codes.detach()
            if isinstance(source[1], SolvedWeight)
            else grid.encode(float_weight(task.prepared, site).float())
        )
        solution.weights[site.name] = codes, grid
        node = ops.argument(site, 2)
        value: Any = None if node is None else task.evaluator().value(node, {})
        outputs = Layout.of(site, codes.shape).matrix(codes).shape[:2].numel()
        solution.biases[site.name] = torch.zeros(outputs) if value is None else value.detach().clone().float()
    return solution


Weight = LearnedWeight | tuple[torch.Tensor, Grid]


def _value(weight: Weight) -> torch.Tensor:
    return weight() if isinstance(weight, LearnedWeight) else weight[1].decode(weight[0])


def _near(steps: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """`steps` moved to near those chosen before."""
    return chosen + (steps - chosen).clamp(-_NEAR, _NEAR)


def _samples(values: Sequence[Any]) -> int | None:
    """The common first size of all tensors, or None."""
    sizes = {v.shape[0] if v.ndim else -1 for v in values if isinstance(v, torch.Tensor)}
    plain = all(v is None or isinstance(v, (torch.Tensor, int, float)) for v in values)
    return sizes.pop() if len(sizes) == 1 and plain and -1 not in sizes else None


def _pick(a: Any, b: Any, pick: torch.Tensor) -> Any:
    if not isinstance(a, torch.Tensor):
        return a
    return torch.cat([a[pick[pick < len(a)]], b[pick[pick >= len(a)] - len(a)]])


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
