"""What the layer-by-layer algorithms share: one site, its moments, and codes, scale and bias in return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.algorithms.layers.descent import descend, refit
from torchquant.algorithms.layers.gram import Moments, choose_damp, compensated, damp_, moments
from torchquant.algorithms.layers.grid_search import search_grid
from torchquant.algorithms.layers.layout import Layout
from torchquant.algorithms.layers.rounding import Problem
from torchquant.calibration.evaluator import Evaluator, Fake, Flow
from torchquant.calibration.stream import Stream, Task
from torchquant.errors import InputError
from torchquant.formats.groups import storable
from torchquant.fx import ops
from torchquant.fx.blocks import Span, layers, weight_grid, weight_of
from torchquant.fx.grids import Grid
from torchquant.solving.contract import Clock
from torchquant.solving.solved import Solution

__all__ = [
    "DAMPS",
    "Answer",
    "Inside",
    "Layerwise",
    "RowRounding",
    "by_groups",
    "float_bias",
    "float_weight",
    "floored",
    "moved_bias",
    "trial",
]

DAMPS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
_LEAST_DAMP, _METRIC_DAMP = 0.001, 0.01
_FACTORS = torch.linspace(1.2, 0.3, 37)  # on the observer's scale
_DRAWS = 2  # random projections of the network's output
_FLOOR = 2.0**-16  # of the largest scale: a bias in units of the smallest must fit an int32


@dataclass(frozen=True)
class Answer:
    """Codes (g, o, k), the factor (cells,) on the grid's scale they belong to, and other zero points (cells,)."""

    codes: torch.Tensor
    factor: torch.Tensor
    zero_point: torch.Tensor | None = None


class Layerwise:
    """An algorithm that chooses each site's codes from the second moments of its input.

    Args:
        correct_bias: choose the bias too: the mean error of the output on the calibration data becomes zero. None:
            where the layer has a bias.
        compensate: aim at the output of the float network, given the inputs from the quantized prefix; if not, at
            the output of the float layer on its float inputs.
        damp: share of the mean diagonal of the moments added to their diagonal, which holds the answer near the float
            weight. None: chosen at each site by two-fold cross-validation.
        sensitive: count errors of a layer's outputs as the network's output feels them together.
        weigh_places: count errors at each place of a linear's input (token) as the network's output feels them there:
            padding, which it does not feel, not at all.
    """

    def __init__(
        self,
        *,
        correct_bias: bool | None = True,
        compensate: bool = True,
        damp: float | None = None,
        sensitive: bool = False,
        weigh_places: bool = False,
    ) -> None:
        if damp is not None and damp <= 0:
            raise InputError(f"damp is {damp}; it must be above 0, or the moments may have no inverse")
        self.correct_bias, self.compensate, self.damp = correct_bias, compensate, damp
        self.sensitive, self.weigh_places = sensitive, weigh_places

    def spans(self, prepared: GraphModule, excluded: frozenset[str]) -> list[Span]:
        """The spans to solve: each site for itself."""
        return layers(prepared, excluded)

    def begin(self, stream: Stream, spans: Sequence[Span], seed: int) -> None:
        """Measure what the network's output feels of the sites' outputs."""
        if self.sensitive or self.weigh_places:
            options = {"metrics": self.sensitive, "places": self.weigh_places}
            stream.sensitivities(spans, seed, _DRAWS, elements=False, **options)

    def choose(self, problem: Problem, clock: Clock) -> Answer:
        """Codes and scale factors for one site."""
        raise NotImplementedError

    def solve(self, task: Task | Inside, clock: Clock) -> Solution:
        """The answer for a span of one site."""
        (site,) = task.span.sites
        weight, grid = float_weight(task.prepared, site), weight_grid(task.prepared, site)
        layout = Layout.of(site, weight.shape)
        target, metric, means = self._aim(task, site, layout, layout.matrix(weight.float()))
        task.give_back()
        problem = Problem.of(weight, layout, grid, target, metric)
        outputs = task.output_metric(site)
        if outputs is not None:
            problem = replace(problem, outputs=by_groups(outputs, layout))
        answer = self.choose(problem, clock)
        chosen = floored(grid, answer)
        solution = Solution(weights={site.name: (layout.tensor(answer.codes), chosen)})
        if self._corrects_bias(task, site):
            decoded = layout.matrix(chosen.decode(solution.weights[site.name][0]))
            solution.biases[site.name] = moved_bias(task.prepared, site, layout, decoded, *means)
        return solution

    def _corrects_bias(self, task: Task | Inside, site: Node) -> bool:
        return float_bias(task.prepared, site) is not None if self.correct_bias is None else self.correct_bias

    def _aim(
        self, task: Task | Inside, site: Node, layout: Layout, matrix: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Target (g, o, k), metric (g, k, k), and the mean input of the float function and of the prefix (g, k)."""
        options = {"halves": self.compensate and self.damp is None, "crossed": self.compensate}
        folds = self._folds(task, site, layout, options)
        whole = Moments.joined(folds)
        means = whole.mean, whole.mean_q
        task.give_back()
        if self._corrects_bias(task, site):
            for part in (*folds, whole):
                part.centre_()
        if not self.compensate:
            return matrix, damp_(whole.a, self.damp or _LEAST_DAMP), means
        damp = choose_damp(matrix, folds, DAMPS) if self.damp is None else self.damp
        del folds
        return compensated(matrix, whole, damp), damp_(whole.a, min(damp, _METRIC_DAMP)), means

    def _folds(self, task: Task | Inside, site: Node, layout: Layout, options: dict[str, bool]) -> Sequence[Moments]:
        """Moments of the data, which linears that read the same values (queries, keys, values) share."""
        if self.weigh_places:
            return moments(task, site, layout, weigh=True, **options)
        source = site.args[0]
        assert isinstance(source, Node)
        readers = [u for u in source.users if ops.op_name(u) == "linear" and weight_of(task.prepared, u) is not None]
        if isinstance(task, Inside) or len(readers) < 2 or site not in readers:
            return moments(task, site, layout, **options)
        kept = task.shared(source, lambda: [fold.tensors() for fold in moments(task, site, layout, **options)])
        return [Moments.of(*(t.clone() for t in tensors)) for tensors in kept]


class RowRounding(Layerwise):
    """A layer-by-layer algorithm whose codes come from rounding each row of a weight for itself.

    Grids are searched first; the codes are improved by coordinate descent, then scales and codes in turn.

    Args:
        search: choose each scale (and zero point, of an affine grid) by the layer's output error first.
        sweeps: of coordinate descent. refits: how often scales and codes are improved in turn.
        options: of `Layerwise`.
    """

    def __init__(self, *, search: bool, sweeps: int, refits: int, **options: Any) -> None:
        super().__init__(**options)
        self.search, self.sweeps, self.refits = search, sweeps, refits

    def round_rows(self, problem: Problem, clock: Clock) -> torch.Tensor:
        """Codes (g, o, k) on the problem's grid, which has no `outputs`."""
        raise NotImplementedError

    def choose(self, problem: Problem, clock: Clock) -> Answer:
        """Codes, scale factors and zero points for one site."""
        rows, factor, zero_point = problem.by_rows(), torch.ones(problem.count), None
        if self.search:
            factor, zero_point = search_grid(rows, _FACTORS)
        scaled = rows.scaled(factor, zero_point)
        codes = descend(scaled, self.round_rows(scaled, clock), self.sweeps)
        factor, codes = refit(rows, factor, zero_point, codes, self.refits, self.sweeps)
        if problem.outputs is not None:
            codes = descend(problem.scaled(factor, zero_point), codes, self.sweeps)
        return Answer(codes, factor, zero_point)


class Inside:
    """One site within a span, as a task of its own.

    Args:
        task: of the span. site: one of its sites.
        before: how the nodes in front of the site see the inputs from the quantized prefix.
    """

    def __init__(self, task: Task, site: Node, before: Evaluator) -> None:
        self.prepared, self.count, self.span = task.prepared, task.count, Span((site,), (site,))
        self._task, self._source = task, site.args[0]
        self._before = task.span.nodes[: task.span.nodes.index(site)]
        self._evaluators = {"float": task.evaluator("float"), "quantized": before}

    def inputs(self, batch: int, flow: Flow) -> dict[Node, Any]:
        """The site's input, for one batch."""
        assert isinstance(self._source, Node)
        env = self._task.inputs(batch, flow)
        if self._source not in env:
            with torch.no_grad():
                self._evaluators[flow].run(self._before, env)
        return {self._source: env[self._source]}

    def place_weights(self, site: Node, batch: int) -> torch.Tensor | None:
        """See `Task.place_weights`."""
        return self._task.place_weights(site, batch)

    def output_metric(self, site: Node) -> torch.Tensor | None:
        """See `Task.output_metric`."""
        return self._task.output_metric(site)

    def give_back(self) -> None:
        """See `Task.give_back`."""
        self._task.give_back()


def trial(task: Task, solution: Solution) -> Evaluator:
    """An Evaluator of the quantized graph with a solution in it."""
    nodes = {site.name: site for site in task.span.sites}
    weights, biases = {}, {}
    for name, (codes, grid) in solution.weights.items():
        weight = weight_of(task.prepared, nodes[name])
        assert weight is not None
        weights[weight[0]] = grid.decode(codes)
    for name, bias in solution.biases.items():
        biases[nodes[name]] = bias
    fakes = {target: _fixed(task, target, *grid) for target, grid in solution.activations.items()}
    return task.evaluator(weights=weights, biases=biases, fakes=fakes)


def _fixed(task: Task, target: str, scale: float, zero_point: int) -> Fake:
    original: Any = task.prepared.get_submodule(target)
    low, high = int(original.quant_min), int(original.quant_max)
    return lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)


def float_weight(prepared: GraphModule, site: Node) -> torch.Tensor:
    """The float weight of a site."""
    weight = weight_of(prepared, site)
    assert weight is not None
    return ops.constant_value(prepared, weight[0].args[0])  # type: ignore[arg-type]


def floored(grid: Grid, answer: Answer) -> Grid:
    """The grid of an answer, its scales as they are stored, none of them too small beside the largest."""
    scale = grid.scale * answer.factor
    zero_point = None if answer.zero_point is None else answer.zero_point.to(grid.zero_point.dtype)
    scale = torch.maximum(scale, scale.max() * _FLOOR)
    is_free = grid.dialect == "block" and grid.stored_as is None
    return grid.with_scale(storable(scale, torch.float32) if is_free else scale, zero_point)


def moved_bias(
    prepared: GraphModule, site: Node, layout: Layout, matrix: torch.Tensor, mean: torch.Tensor, mean_q: torch.Tensor
) -> torch.Tensor:
    """b + W E[x] - V E[xq]: the bias (out,) that makes the mean error of a site with weight V (g, o, k) zero.

    Args:
        mean, mean_q: E[x] and E[xq], (g, k).
    """
    exact, bias = layout.matrix(float_weight(prepared, site).float()), float_bias(prepared, site)
    moved = (exact @ mean[..., None] - matrix @ mean_q[..., None]).reshape(-1)
    return moved if bias is None else bias + moved


def by_groups(outputs: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(g, o, o) of a matrix over all outputs (out, out)."""
    size = len(outputs) // layout.matrix(torch.empty(layout.shape, device="meta")).shape[0]
    return torch.stack([outputs[i : i + size, i : i + size] for i in range(0, len(outputs), size)])


def float_bias(prepared: GraphModule, site: Node) -> torch.Tensor | None:
    """The bias of the float function, (out,), or None."""
    source = ops.argument(site, 2)
    value = None if source is None else Evaluator(prepared, "float").value(source, {})
    return None if value is None else value.float()
