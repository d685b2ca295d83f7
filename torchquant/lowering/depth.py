"""A graph held part by part, each on the artefact's own inputs to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from torchquant.calibration import batches as data
from torchquant.errors import LoweringError
from torchquant.fx import dataflow, ops, passes
from torchquant.lowering.judging import (
    MARGIN_DB,
    Perturbed,
    Run,
    Verdict,
    fault_of,
    is_clear,
    is_explained,
    reproduced,
)
from torchquant.measure.verify import Comparison, compare_tensors

_SAME_DB = 60.0  # between the artefact and the one built to look into
_PARTS = 16  # that a graph is cut into, at most
_MOST_CROSSING = 4  # values from one part to the next
_EQUAL = 0.99  # share of integers


@dataclass(frozen=True)
class _Part:
    """Nodes of the reference in order, what they read from before (`reads`), and what is held (`results`)."""

    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]
    results: tuple[Node, ...]

    def __str__(self) -> str:
        weighted = [n for n in self.nodes if (k := ops.kind_of(n)) is not None and k.compute]
        names = [f"{ops.op_name(n)} {n.name} ({ops.module_path(n) or 'root'})" for n in weighted]
        return ", ".join(names[:4]) or ", ".join(n.name for n in self.nodes[:4])


class Depth:
    """Holds each part of a graph on the artefact's own inputs to it."""

    def __init__(
        self, reference: GraphModule, program: Run, batches: Sequence[Any], op_error: float, target: str
    ) -> None:
        self.reference, self.program, self.batches = reference, program, batches
        self.op_error, self.target = op_error, target

    def verdict(self, comparison: Comparison, weak: list[int], build: Callable[[GraphModule], Run] | None) -> Verdict:
        fault = fault_of(self.target, weak[0], comparison.outputs[weak[0]])
        parts = parts_of(self.reference)
        results = [n for part in parts for n in part.results]
        taps = [n for n in dict.fromkeys(results) if n not in _returned(self.reference)]
        if build is None or not taps:
            raise LoweringError(
                f"{fault}. Its kernels compute something else: report this, or exclude the sites at fault."
            )
        try:
            deep = build(with_outputs(self.reference, taps))
        except LoweringError as error:
            raise LoweringError(f"{fault}, and it cannot be built such that one can look into it: {error}") from error
        runs = [self._run(deep, taps, batch) for batch in self.batches]
        for part in parts:
            self._hold(part, runs, fault)
        reason = f"held in depth, part by part ({len(parts)}), since {fault.removeprefix(f'{self.target}: ')}"
        pairs = [(self._outputs(self.program, b), r.outputs) for b, r in zip(self.batches, runs, strict=True)]
        same = compare_tensors(pairs).outputs
        if all(o.sqnr_db >= _SAME_DB if o.is_float else o.agreement > _EQUAL for o in same):
            return Verdict(comparison, reason=reason)
        bounds = reproduced(self.reference, self.batches, self.op_error)
        for one, bound in zip(same, bounds, strict=True):
            if one.is_float and one.sqnr_db < min(_SAME_DB, bound.sqnr_db - MARGIN_DB):
                raise LoweringError(
                    f"{fault}, though built such that one can look into it each part is right: the compiler makes "
                    "something else of the whole. Report this."
                )
        text = "; but the build that was looked into and the artefact differ, as rounding is amplified"
        return Verdict(comparison, "undecided", reason + text)

    def _outputs(self, run: Run, batch: Any) -> list[torch.Tensor]:
        return [_comparable(v) for v in _as_list(data.call(run, tuple(t.clone() for t in batch)))]

    def _run(self, deep: Run, taps: Sequence[Node], batch: Any) -> _DeepRun:
        """What the artefact computes, and of the reference what does not depend on data: sizes, masks, positions."""
        values = self._outputs(deep, batch)
        end = len(values) - len(taps)
        fixed = _Fixed(self.reference)
        with torch.no_grad():
            fixed.run(*(t.clone() for t in batch))
        inputs = dict(zip(_inputs(self.reference), batch, strict=True))
        known = {
            **dict(zip(_returned(self.reference), values, strict=False)),
            **dict(zip(taps, values[end:], strict=True)),
        }
        return _DeepRun({**fixed.found, **inputs}, known, values[:end])

    def _hold(self, part: _Part, runs: Sequence[_DeepRun], fault: str) -> None:
        """Raise LoweringError unless the part's results follow from the artefact's own inputs to it."""
        wanted = [_results(self.reference, part, run, 0.0) for run in runs]
        comparison = compare_tensors((w, [r.known[n] for n in part.results]) for w, r in zip(wanted, runs, strict=True))
        if all(map(is_clear, comparison.outputs)):
            return
        trials = [
            compare_tensors(
                (w, _results(self.reference, part, r, self.op_error, s)) for w, r in zip(wanted, runs, strict=True)
            )
            for s in range(3)
        ]
        for i, output in enumerate(comparison.outputs):
            reproduced = min((t.outputs[i] for t in trials), key=lambda o: o.sqnr_db)
            near = not output.is_float and output.agreement > _EQUAL  # of equal numbers either may come first
            if not (is_clear(output) or near or is_explained(output, reproduced)):
                raise LoweringError(
                    f"{fault}. In depth: {part}: {output.sqnr_db:.1f} dB on the artefact's own inputs to it. Its "
                    "kernels compute something else there: report this, or exclude these sites."
                )


@dataclass(frozen=True)
class _DeepRun:
    """One run of the artefact with taps: what is given, what it computed (node -> value), and its outputs."""

    given: dict[Node, Any]
    known: dict[Node, torch.Tensor]
    outputs: list[torch.Tensor]


class _Fixed(Interpreter):
    """Runs a graph and keeps the values that do not depend on data."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        data_: set[Node] = set()
        sources = dataflow.data_nodes(graph)
        for node in graph.graph.nodes:
            if node in sources or any(n in data_ for n in node.all_input_nodes):
                data_.add(node)
        self._data, self.found = data_, dict[Node, Any]()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n not in self._data or not isinstance(value, (torch.Tensor, list, tuple)):
            self.found[n] = value
        return value


def _results(graph: GraphModule, part: _Part, run: _DeepRun, op_error: float, seed: int = 0) -> list[torch.Tensor]:
    """The part's results as the reference makes them of what the artefact computed before it."""
    runner = Perturbed(graph, op_error, seed)
    env = dict(run.given)
    env |= {n: run.known[n] for n in part.reads if n in run.known}
    runner.env = env
    with torch.no_grad():
        for node in part.nodes:
            if node not in env:
                env[node] = runner.run_node(node) if op_error else Interpreter.run_node(runner, node)
    return [_comparable(env[n]) for n in part.results]


def _comparable(value: torch.Tensor) -> torch.Tensor:
    value = torch.view_as_real(value) if value.is_complex() else value
    return value.float() if value.is_floating_point() else value


def _as_list(values: Any) -> list[torch.Tensor]:
    return list(values) if isinstance(values, (tuple, list)) else [values]


def _inputs(graph: GraphModule) -> list[Node]:
    return [n for n in graph.graph.nodes if n.op == "placeholder"]


def _returned(graph: GraphModule) -> list[Node]:
    outputs = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def with_outputs(graph: GraphModule, taps: Sequence[Node]) -> GraphModule:
    """A copy of the graph that returns the values of some nodes too."""
    twin = passes.copy_graph(graph)
    twins = dict(zip(graph.graph.nodes, twin.graph.nodes, strict=True))
    output = next(n for n in twin.graph.nodes if n.op == "output")
    with twin.graph.inserting_before(output):
        # a dequantize op of its own, since delegates take one that has one reader
        seen = [twin.graph.node_copy(twins[n]) if ops.is_dequantize(n) else twins[n] for n in taps]
    output.args = ((*_returned(twin), *seen),)
    twin.recompile()
    return twin


def parts_of(graph: GraphModule) -> list[_Part]:
    """The graph cut where few values pass and none of them is about to be quantized, into parts of like many products.

    Integers that the model returns are parts of their own, so that they are made of the artefact's own floats.
    """
    data_ = dataflow.derived_nodes(graph)
    nodes = [n for n in graph.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    integers = [n for n in _returned(graph) if isinstance(n, Node) and "val" in n.meta and not ops.is_float(n)]
    decisions = [_decision(n) for n in integers if n in nodes]
    decided = {n for part in decisions for n in part.nodes}
    kept = {n for part in decisions for n in part.reads} | set(_returned(graph)) - decided
    alone: set[Node] = set()  # what nothing but these integers reads, as something may the values of a sort
    for node in reversed(nodes):
        if node in decided and all(u in alone or u.op == "output" for u in node.users):
            alone.add(node)
    nodes = [n for n in nodes if n not in alone]
    place = {n: i for i, n in enumerate(nodes)}
    last = {n: max((place.get(u, -1) for u in n.users), default=-1) for n in nodes}
    least = max(1, math.ceil(sum(map(_is_product, nodes)) / _PARTS))
    parts: list[_Part] = []
    start, count, reads = 0, 0, ()
    for i, node in enumerate(nodes):
        count += _is_product(node)
        if count < least and i + 1 < len(nodes):
            continue
        crossing = tuple(n for n in nodes[: i + 1] if last[n] > i and n in data_)
        if i + 1 == len(nodes) or (crossing and _may_cut(crossing, place, i)):
            inside = tuple(nodes[start : i + 1])
            parts.append(_Part(inside, reads, tuple(dict.fromkeys((*crossing, *(n for n in inside if n in kept))))))
            start, count, reads = i + 1, 0, crossing
    return [part for part in (*parts, *decisions) if part.results]


def _decision(node: Node) -> _Part:
    """How integers are made of the floats nearest to them."""
    floats, between = ops.float_sources(node)
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    return _Part(tuple(sorted(between, key=order.__getitem__)), tuple(floats), (node,))


def _is_product(node: Node) -> bool:
    kind = ops.kind_of(node)
    return kind is not None and kind.compute


def _may_cut(crossing: Sequence[Node], place: dict[Node, int], at: int) -> bool:
    """Whether these values may be looked at without changing how they are computed."""
    if len(crossing) > _MOST_CROSSING:
        return False
    for node in crossing:
        later = [u for u in node.users if place.get(u, -1) > at]
        if ops.is_quantize(node) or any(
            ops.is_quantize(v) and not ops.has_own_scale(v) for u in later for v in (u, *u.users)
        ):
            return False  # a kernel may end in an activation and the quantize op behind it
        if ops.has_own_scale(node):
            return False  # a kernel begins with what finds the scale and quantizes
        if not (ops.is_dequantize(node) or ops.is_float(node)):
            return False
    return True
