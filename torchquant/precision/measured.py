"""What is measured of plans: the error and the metric of the graphs that they make, and the time of their ops."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantizer import Quantizer

from torchquant import flow
from torchquant.calibration import batches as data
from torchquant.calibration.calibrate import calibrate
from torchquant.calibration.seen import data_used
from torchquant.errors import InputError, SchemeError
from torchquant.files.archive import versions
from torchquant.fx import passes
from torchquant.fx.reading import observers
from torchquant.measure.metric import Metric, scored
from torchquant.measure.verify import compare
from torchquant.ops import builds
from torchquant.ops.remembered import cpu_name, read_table, write_table
from torchquant.precision.plan import Plan, weighted_sites

__all__ = ["Bench"]

_CALLS = 20


class Bench:
    """Makes the graphs of plans and measures them, each once.

    Args:
        exported: the float graph.
        batches, judged: to calibrate on, and to measure on.
        quantizer, options: class of the Quantizer, and its arguments but for scheme and overrides.
    """

    def __init__(
        self,
        exported: GraphModule,
        batches: Sequence[Any],
        judged: Sequence[Any],
        quantizer: type[Quantizer],
        options: Mapping[str, Any],
    ) -> None:
        self._exported, self._batches, self._judged = exported, batches, judged
        self._quantizer, self._options, self._timed = quantizer, dict(options), next(data.each(judged))
        self._figures: dict[Any, tuple[float, float]] = {}
        self._times: dict[str | None, dict[str, float]] = {}
        self._fixed_ms: float | None = None
        self._names = _names(exported)
        self.measured_on = ""

    def converted(self, plan: Plan) -> GraphModule:
        """The graph that a plan makes."""
        prepared = flow.prepare(
            self._exported, self._quantizer(plan.scheme, overrides=dict(plan.schemes), **self._options)
        )
        if next(observers(prepared), None) is None:  # all in float
            return passes.copy_graph(self._exported)
        calibrate(prepared, self._batches, progress=False)
        self._names = _names(prepared)
        self.measured_on = data_used(prepared, list(data.checked(prepared, self._judged)))
        return flow.convert(prepared)

    def figure(self, plan: Plan, metric: Metric | None) -> tuple[float, float]:
        """(what decides, SQNR in dB): the metric of the plan's graph, or without one the SQNR; higher is better."""
        key = (plan.scheme, tuple(sorted(plan.schemes.items(), key=str)), metric)
        if key not in self._figures:
            graph = self.converted(plan)
            db = compare(passes.copy_graph(self._exported), graph, data.each(self._judged)).sqnr_db
            if metric is None and math.isnan(db):
                raise InputError("the model returns no floats by which plans could be compared: give a metric")
            score = db if metric is None else scored(metric, graph, f"the plan of {plan.about.get('budget')}")
            self._figures[key] = score, db
        return self._figures[key]

    def float_score(self, metric: Metric) -> float:
        """What a metric says of the float model; raises InputError unless that is finite."""
        score = scored(metric, passes.copy_graph(self._exported), "the float model")
        if math.isinf(score):
            raise InputError(f"the metric is {score} for the float model, from which no drop can be counted")
        return score

    def op_ms(self, plan: Plan | None) -> dict[str, float]:
        """Pattern of each weighted op -> milliseconds with a uniform plan, or in float.

        Times are remembered in the cache folder by CPU, versions, threads, graph and sizes: delete `op-times.json`
        there to measure them again.

        Raises:
            SchemeError: nothing here can time single ops for the target.
        """
        name = None if plan is None else str(plan.about["budget"])
        if name not in self._times:
            graph = self._exported if plan is None else self.converted(plan)  # their nodes have the same names
            times = self._remembered(graph)
            self._times[name] = {pattern: times.get(node, math.nan) for pattern, node in self._names.items()}
        return self._times[name]

    def _remembered(self, graph: GraphModule) -> dict[str, float]:
        """Node -> milliseconds: what was measured of an equal graph on this machine, or now."""
        measure, file = self._backend("op_ms"), builds.cache_folder() / "op-times.json"
        sizes = [tuple(t.shape) for t in data.flatten(self._timed) if isinstance(t, torch.Tensor)]
        shapes = {name: (tuple(t.shape), str(t.dtype)) for name, t in graph.state_dict().items()}
        about = (self._quantizer.__name__, cpu_name(), versions(), str(graph.graph), sizes, sorted(shapes.items()))
        key = hashlib.sha256(repr(about).encode()).hexdigest()
        known = read_table(file, _is_times, "milliseconds by op")
        if key not in known:
            known[key] = measure(graph, self._timed)
            write_table(file, known)
        return {node: float(ms) for node, ms in known[key].items()}

    def program_ms(self, plan: Plan) -> float:
        """Median milliseconds of a call of the program that a plan's graph is lowered to."""
        graph = self.converted(plan)
        program = self._backend("lower")(graph, self._timed, progress=False)
        times = []
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for _ in range(_CALLS + 1):
                start = time.perf_counter()
                data.call(program, self._timed)
                times.append((time.perf_counter() - start) * 1e3)
        finally:
            torch.set_num_threads(threads)
        return statistics.median(times[1:])

    def fixed_ms(self, plan: Plan) -> float:
        """What a call takes beside the weighted ops, by one program of a uniform plan; 0 at least."""
        if self._fixed_ms is None:
            weighted = sum(ms for ms in self.op_ms(plan).values() if not math.isnan(ms))
            self._fixed_ms = max(0.0, self.program_ms(plan) - weighted)
        return self._fixed_ms

    def _backend(self, name: str) -> Any:
        target = getattr(self._quantizer, "target", None)
        if target is None:
            raise InputError(f"{self._quantizer.__name__} belongs to no target, so its plans cannot be timed")
        call = getattr(target.backend(), name, None)
        if call is None:
            raise SchemeError(
                f"single ops cannot be timed for {target}: give the budget in bytes or bits a weight (4.5bpw, 3MB)"
            )
        return call


def _is_times(value: object) -> bool:
    numbers = value.values() if isinstance(value, dict) else [math.nan]
    return all(isinstance(ms, (int, float)) and not isinstance(ms, bool) and 0 <= ms < math.inf for ms in numbers)


def _names(graph: GraphModule) -> dict[str, str]:
    """Pattern of each weighted op -> name of its node."""
    return {pattern: node.name for pattern, (node, _, _) in weighted_sites(graph).items()}
