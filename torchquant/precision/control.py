"""Quantize as much as a metric allows: leave float what costs it most, and no more than that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantizer import Quantizer

from torchquant import flow
from torchquant.algorithms.bias_correction import BiasCorrection
from torchquant.analysis.walk import analyze
from torchquant.calibration import batches as data
from torchquant.calibration.calibrate import calibrate
from torchquant.errors import InputError
from torchquant.fx import ops, passes
from torchquant.measure.metric import Metric, check_drop, check_metric, scored
from torchquant.solving.contract import Algorithm
from torchquant.solving.left_float import leave_float
from torchquant.types import Site

__all__ = ["Controlled", "quantize_within"]

_REASON = "left float: quantized, the metric would lose more than is allowed"


@dataclass(frozen=True)
class Controlled:
    """A quantized graph, and what it took to keep the metric; `str()` for people.

    Args:
        quantized: the converted graph.
        left_float: the ops that stay float for the metric's sake, those first that cost the output most.
        weight_bytes, extra_bytes: of the graph's weights, and how many of them because of `left_float`.
        float_metric, metric, full_metric: of the float model, of `quantized`, and with nothing left float.
        max_drop: what was allowed.
        evaluations: how often the metric was asked.
        is_least: whether no op of `left_float` can be quantized too; if not, the evaluations were used up.
        ranked_on: the data by which the ops were put in order, in words.
    """

    quantized: GraphModule = field(repr=False)
    left_float: tuple[Site, ...]
    weight_bytes: int
    extra_bytes: int
    float_metric: float
    metric: float
    full_metric: float
    max_drop: float
    evaluations: int
    is_least: bool
    ranked_on: str

    def __str__(self) -> str:
        lines = [
            f"metric: float {self.float_metric:.6g}, quantized {self.metric:.6g} (at most {self.max_drop:g} may be "
            f"lost), all quantized {self.full_metric:.6g}; asked {self.evaluations} times",
            f"weights: {self.weight_bytes:,} bytes, {self.extra_bytes:,} of them for {len(self.left_float)} ops that "
            f"stay float{'' if self.is_least else ' (perhaps more than needed: max_evaluations was reached)'}",
        ]
        lines += [f"  {s.op} {s.node}{f' ({s.module})' if s.module else ''}" for s in self.left_float]
        return "\n".join(lines)


def quantize_within(
    model: torch.nn.Module,
    example_inputs: Any,
    batches: Iterable[Any],
    *,
    quantizer: Quantizer,
    metric: Metric,
    max_drop: float,
    algorithms: Sequence[Algorithm] = (BiasCorrection(),),
    validation: Iterable[Any] | None = None,
    dynamic_shapes: Any = None,
    max_evaluations: int = 40,
    progress: bool = True,
) -> Controlled:
    """Quantize such that a metric loses at most `max_drop`: ops that cost too much stay float, as few as are needed.

    All is quantized once. If the metric loses too much, ops are put in the order of what they cost the output (see
    `analyze`), the shortest row of them that has to stay float is found by bisection, and of these each one is
    quantized again with which the metric still holds, those with the largest weights first.

    Args:
        model, example_inputs, batches, dynamic_shapes, algorithms: as for `quantize`.
        quantizer: any Quantizer.
        metric: `metric(model)`, a number, higher is better, of a model that it calls as the float one; on data that
            nothing else has seen.
        max_drop: how much less than the float model's, in the metric's own unit.
        validation: batches to put the ops in order with; the calibration batches if None.
        max_evaluations: how often the metric may be asked, six times at least.
        progress: show a progress bar on stderr.

    Raises:
        InputError: a metric that raises or is not finite; or even with all ops but one in float it loses more.
    """
    check_metric(metric)
    flow.check_quantizer(quantizer)
    _check_numbers(max_drop, max_evaluations)
    kept = data.listed(batches, "batches")
    held_out = None if validation is None else data.listed(validation, "validation")
    exported = flow.exported_of(model, example_inputs, dynamic_shapes)
    trials = _Trials(metric, max_drop, max_evaluations)
    trials.measure_float(exported)
    prepared = flow.prepare(exported, quantizer)
    calibrate(prepared, kept, progress=progress)
    if algorithms:
        flow.optimize(prepared, kept, algorithms, validation=held_out, progress=progress)
    trials.prepared = prepared
    full = trials.convert(())
    if trials.holds(full):
        return trials.result(full, full, (), "nothing: all is quantized")
    analysis = analyze(prepared, kept if held_out is None else held_out)
    sites = {s.site.node: s.site for s in analysis.sites if s.site.status == "quantized" and _costs(s.alone_db)}
    cost = {s.site.node: s.share if s.output_db is not None else 2.0 - s.alone_db / 1e3 for s in analysis.sites}
    order = sorted(sites, key=lambda name: -cost[name])
    best = trials.fewest(order, _float_bytes(prepared))
    left = tuple(sites[name] for name in order if name in best.left)
    return trials.result(best, full, left, analysis.measured_on)


def _check_numbers(max_drop: object, max_evaluations: object) -> None:
    check_drop(max_drop)
    if type(max_evaluations) is not int or max_evaluations < 6:
        raise InputError(f"max_evaluations is a number from 6 on, not {max_evaluations!r:.40}")


def _costs(alone_db: float) -> bool:
    return not (math.isinf(alone_db) and alone_db > 0)


def _float_bytes(prepared: GraphModule) -> dict[str, int]:
    """Node -> bytes of its constant weight in float."""
    sizes = {}
    for node in prepared.graph.nodes:
        kind = ops.kind_of(node)
        weight = None if kind is None or kind.weight is None else ops.argument(node, kind.weight)
        value = None if weight is None else weight.meta.get("val")
        sizes[node.name] = value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
    return sizes


@dataclass(frozen=True)
class _Trial:
    """A graph in which some ops are left float, and what the metric says of it."""

    left: frozenset[str]
    graph: GraphModule
    score: float


class _Trials:
    """Graphs with other ops left float, and what the metric says of each."""

    prepared: GraphModule

    def __init__(self, metric: Metric, max_drop: float, most: int) -> None:
        self._metric, self._max_drop, self._most = metric, max_drop, most
        self._asked, self._float, self._is_least = 0, 0.0, True

    def measure_float(self, exported: GraphModule) -> None:
        """Ask the metric about the float model, from which the drop counts."""
        self._float = self._score(passes.copy_graph(exported), "the float model")  # it may keep state
        if math.isinf(self._float):
            raise InputError(f"the metric is {self._float} for the float model, from which no drop can be counted")

    def _score(self, model: GraphModule, of: str) -> float:
        self._asked += 1
        return scored(self._metric, model, of)

    def convert(self, left: Iterable[str]) -> _Trial:
        """The graph with these ops in float."""
        names = frozenset(left)
        graph = passes.copy_graph(self.prepared)
        leave_float(graph, names, _REASON)
        graph = flow.convert(graph)
        asked = passes.copy_graph(graph)  # the metric moves its state
        return _Trial(names, graph, self._score(asked, f"the quantized model with {len(names)} ops left float"))

    def holds(self, trial: _Trial) -> bool:
        """Whether the metric loses no more than is allowed."""
        return trial.score >= self._float - self._max_drop

    def fewest(self, order: Sequence[str], float_bytes: Mapping[str, int]) -> _Trial:
        """As few as are needed: a row of `order` from its start, by bisection, and of that each one that is needed."""
        low, high = 0, max(len(order) - 1, 0)
        best = self.convert(order[:high])
        if not self.holds(best):
            raise InputError(
                f"the metric is {self._float:.6g} for the float model and {best.score:.6g} with {high} of {len(order)} "
                f"ops left float: more than {self._max_drop:g} is lost by the last one, or by what the algorithms "
                "changed. Allow a larger max_drop, offer more bits, or leave the model in float"
            )
        while high - low > 1 and self._asked < self._most:
            middle = (low + high) // 2
            trial = self.convert(order[:middle])
            low, high, best = (low, middle, trial) if self.holds(trial) else (middle, high, best)
        for name in sorted(best.left, key=lambda n: (-float_bytes.get(n, 0), order.index(n))):
            if self._asked >= self._most:
                self._is_least = False
                break
            trial = self.convert(best.left - {name})
            best = trial if self.holds(trial) else best
        return best

    def result(self, best: _Trial, full: _Trial, left: tuple[Site, ...], ranked_on: str) -> Controlled:
        """What is handed out."""
        sizes = [passes.weight_bytes(trial.graph) for trial in (best, full)]
        return Controlled(
            best.graph,
            left,
            sizes[0],
            sizes[0] - sizes[1],
            self._float,
            best.score,
            full.score,
            self._max_drop,
            self._asked,
            self._is_least,
            ranked_on,
        )
