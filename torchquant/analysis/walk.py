"""Float against quantized, site by site, in one walk over the data."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.fx import GraphModule, Node

from torchquant.analysis.converted import observed_again
from torchquant.analysis.findings import Finding, SiteAnalysis, findings
from torchquant.analysis.stages import Stage, stage_findings, stages_of
from torchquant.analysis.tensors import TensorStatistics, decibels
from torchquant.artifacts.program import Program
from torchquant.calibration import batches as data
from torchquant.calibration.calibrate import refuse_uncalibrated
from torchquant.calibration.evaluator import Env, Evaluator
from torchquant.calibration.felt import felt_errors
from torchquant.calibration.seen import data_used
from torchquant.calibration.stream import Stream, Task, given_to
from torchquant.errors import InputError
from torchquant.files.archive import versions
from torchquant.files.plain import as_plain
from torchquant.fx import ops
from torchquant.fx.blocks import Span, data_order
from torchquant.fx.functional import functionalize
from torchquant.fx.grids import Grid, fake_quantizer, grid_of
from torchquant.fx.passes import copy_graph
from torchquant.fx.reading import GraphReading, is_converted, is_prepared, observer_of
from torchquant.fx.sites import read_sites
from torchquant.solving.run import DEFAULT_MEMORY_BYTES
from torchquant.surroundings import own_modes
from torchquant.types import Site, check_whole

__all__ = ["Analysis", "analyze", "own_error"]


@dataclass(frozen=True)
class Analysis:
    """Where a network's error comes from; `str()` gives a table for people.

    Args:
        sites: every op with quantized inputs, and every matrix product, in graph order.
        findings: what stands out, the gravest first.
        output_db: SQNR of the network's output, all quantized, on the data of the analysis.
        batches: how many there were.
        versions: of what made it.
        measured_on: the data in words: whether they were calibrated on.
        stages: float against quantized against lowered, where a float model was given.
    """

    sites: tuple[SiteAnalysis, ...]
    findings: tuple[Finding, ...]
    output_db: float
    batches: int
    versions: Mapping[str, str]
    measured_on: str = ""
    stages: tuple[Stage, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings and lists, as JSON has them: what is not finite is None."""
        fields = dataclasses.asdict(self)
        for entry, site in zip(fields["sites"], self.sites, strict=True):
            entry["site"] = site.site.to_dict()
        plain: dict[str, Any] = as_plain(fields)
        return plain

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=160, record=True, force_terminal=False)
        console.print(f"output: {self.output_db:.1f} dB, all quantized, on {self.measured_on}", highlight=False)
        for stage in self.stages:
            beside = "" if math.isinf(stage.graph_db) else f", {stage.graph_db:.1f} dB against the quantized graph"
            text = f"{stage.name}: {stage.float_db:.1f} dB against float{beside}, {stage.agreement:.1%} agree"
            console.print(text, highlight=False, markup=False)
        for finding in self.findings:
            where = f" ({finding.module})" if finding.module else ""
            text = (
                f"{finding.severity}: {finding.kind}: {finding.site}{where}: {finding.message}\n  -> {finding.remedy}"
            )
            console.print(text, highlight=False, markup=False)
        without = [s.site.node for s in self.sites if s.output_db is None and math.isfinite(s.alone_db)]
        if without:
            text = f"{len(without)} ops that the output has no derivative by are in no share: {', '.join(without[:8])}"
            console.print(text, highlight=False, markup=False)
        if self.sites:
            console.print(_table(self.sites))
        return "\n".join(line.rstrip() for line in console.export_text().rstrip().splitlines())


def _table(sites: Sequence[SiteAnalysis]) -> Table:
    table = Table("node", "op", "module", "status", box=None, pad_edge=False, show_edge=False)
    for head in ("alone dB", "inputs dB", "weight dB", "up to here dB", "output dB", "share"):
        table.add_column(head, justify="right")
    for s in sorted(sites, key=lambda s: -s.share):
        levels = [s.alone_db, s.activations_db, s.weight_db, s.cumulative_db, s.output_db]
        shown = ["" if level is None else "exact" if math.isinf(level) else f"{level:.1f}" for level in levels]
        cells = [s.site.node, s.site.op, s.site.module, s.site.status, *shown, f"{s.share:.1%}"]
        table.add_row(*map(Text, cells))
    return table


def analyze(
    graph: GraphModule | Program,
    batches: Iterable[Any],
    *,
    reference: GraphModule | None = None,
    programs: Sequence[Program] = (),
    seed: int = 0,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Analysis:
    """Say where the error of a quantized graph comes from, in one walk over the data.

    At each op: the SQNR of its output with only its own inputs and weight quantized, with each of them alone, and with
    all quantized that comes before it; what its error costs the network's output, by the derivatives of the float
    function; of each tensor that it reads how much the grid keeps.

    Args:
        graph: what `prepare_pt2e` returned (any Quantizer), calibrated, perhaps optimized; or a converted graph with
            its `reference`; or a program, of which the output alone is seen. It stays as it is.
        batches: as for `calibrate`; better not those that were calibrated on.
        reference: the float graph that it was made from; the output is held against its, too.
        programs: lowered from the graph, to be held against it and against the reference.
        seed: of the random projections of the output.
        memory_bytes: for what is kept between ops; the rest lies on disk.

    Raises:
        InputError: no such graph, a batch that does not fit, or a converted graph whose float weights an algorithm has
            rewritten.
        CalibrationError: no batch, or an observer that has not seen data.
    """
    check_whole(seed, "seed")
    kept = data.listed(batches, "batches")
    if isinstance(programs, Program):
        raise InputError("programs is a list of programs: write [program]")
    _check_graph(graph, reference)
    if isinstance(graph, Program):
        assert reference is not None
        stages = stages_of(reference, None, [graph, *programs], kept)
        return Analysis((), (), stages[0].float_db, len(kept), versions(), f"{len(kept)} batches", stages)
    with own_modes():
        prepared = graph
        if reference is not None and not is_prepared(graph):
            prepared = observed_again(graph, reference, kept)
        refuse_uncalibrated(prepared)
        analysis = _of_prepared(prepared, kept, seed, memory_bytes)
    if reference is None:
        if programs:
            raise InputError("programs are held against the float model: give it as reference")
        return analysis
    measured = None if is_prepared(graph) else graph
    stages = stages_of(reference, measured, programs, kept)
    return dataclasses.replace(analysis, stages=stages, findings=(*stage_findings(stages), *analysis.findings))


def _check_graph(graph: Any, reference: Any) -> None:
    """Raise InputError for what cannot be analyzed."""
    if reference is not None and not isinstance(reference, GraphModule):
        raise InputError(f"reference is the float graph, from torchquant.export, not {reference!r:.80}")
    if isinstance(graph, GraphModule) and is_prepared(graph):
        return
    if not isinstance(graph, Program) and not (isinstance(graph, GraphModule) and is_converted(graph)):
        raise InputError(
            "analyze takes a prepared and calibrated graph, whose observers know the grids, from before convert_pt2e; "
            "or a converted one, or a program, with reference=. If this is one, nothing in it is quantized, and report "
            "says why"
        )
    if reference is None:
        raise InputError(
            "of a converted graph or a program, analyze needs the float graph: reference=exported; or give the "
            "prepared graph, from before convert_pt2e"
        )


def _of_prepared(prepared: GraphModule, batches: Sequence[Any], seed: int, memory_bytes: int) -> Analysis:
    graph = copy_graph(prepared)
    sites = {site.node: site for site in read_sites(graph)}
    functionalize(graph)
    kept = list(data.checked(graph, batches))
    analysis = _analyzed(graph, sites, given_to(graph, kept), seed, memory_bytes)
    return dataclasses.replace(analysis, measured_on=data_used(prepared, kept))


def _analyzed(
    graph: GraphModule, sites: Mapping[str, Site], batches: Sequence[Any], seed: int, memory_bytes: int
) -> Analysis:
    stream = Stream(graph, batches, budget_bytes=memory_bytes)
    nodes = [n for n in data_order(graph) if n.name in sites and (sites[n.name].compute or _observed(graph, n))]
    spans = [Span((node,), (node,)) for node in nodes]
    with closing(stream):
        quantized = stream.evaluator("quantized")
        felt = felt_errors(stream, nodes, lambda node, env: own_error(quantized, graph, node, env), seed)
        measures = [_Measure(task, sites[task.span.nodes[0].name]) for task in stream.walk(spans)]
    costs = [felt.get(node) for node in nodes]
    total = sum(cost or 0.0 for cost in costs)
    results = tuple(m.result(stream.signal, cost, total) for m, cost in zip(measures, costs, strict=True))
    output_db = decibels(stream.signal, stream.noise)
    return Analysis(results, tuple(findings(results)), output_db, len(batches), versions())


def _observed(graph: GraphModule, node: Node) -> bool:
    return any(observer_of(graph, n) is not None for n in node.all_input_nodes)


def _observers(graph: GraphModule, node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if observer_of(graph, n) is not None]


def _rounded(graph: GraphModule, node: Node, raw: Env) -> Env:
    """What the observers that a node reads make of their float values, which they have in the float flow."""
    rounded = {}
    for observer in _observers(graph, node):
        exact = raw.get(observer)
        if isinstance(exact, torch.Tensor) and exact.is_floating_point():
            rounded[observer] = fake_quantizer(observer_of(graph, observer), exact.shape)(exact)
    return rounded


def own_error(quantized: Evaluator, graph: GraphModule, node: Node, env: Env) -> torch.Tensor | None:
    """What a node's own quantization adds to its value, the inputs before it being float."""
    exact = env[node]
    if not isinstance(exact, torch.Tensor) or not exact.is_floating_point():
        return None
    inputs = {n: env[n] for n in node.all_input_nodes if n in env} | _rounded(graph, node, env)
    return _difference(quantized.run([node], inputs)[node], exact)


def _difference(got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return (got - exact).masked_fill_(~exact.isfinite(), 0.0).float()


def _first(value: Any) -> Any:
    """Of several results, as a recurrent layer has, the first one."""
    return value[0] if isinstance(value, (tuple, list)) and value else value


class _Measure:
    """One site over all batches."""

    def __init__(self, task: Task, site: Site) -> None:
        self._site, (self._node,) = site, task.span.nodes
        self._graph, reading = task.prepared, GraphReading(task.prepared)
        self._inputs: dict[Node, TensorStatistics] = {}
        self._weight: TensorStatistics | None = None
        self._signal, self._noises = 0.0, dict.fromkeys(("alone", "activations", "weight", "cumulative"), 0.0)
        for observer in _observers(self._graph, self._node):
            quantized = reading.op(observer)
            what = quantized.qparams.describe() if quantized is not None else "float"
            if ops.is_constant(observer.args[0]):  # type: ignore[arg-type]
                self._add_weight(observer, what)
        with torch.no_grad():
            for batch in range(task.count):
                self._add(task, batch, reading)

    def _add_weight(self, observer: Node, what: str) -> None:
        module, source = observer_of(self._graph, observer), observer.args[0]
        assert isinstance(source, Node)
        exact = ops.constant_value(self._graph, source)
        if not isinstance(exact, torch.Tensor) or not exact.is_floating_point():
            return
        kind = ops.kind_of(self._node)
        self._weight = TensorStatistics(source.name, what, _static(module, exact), None if kind is None else kind.axis)
        quantized = Evaluator(self._graph, "quantized").value(observer, {})
        self._weight.add(exact, quantized)

    def _add(self, task: Task, batch: int, reading: GraphReading) -> None:
        raw, seen = task.inputs(batch, "float"), task.inputs(batch, "quantized")
        rounded = _rounded(self._graph, self._node, raw)
        for observer, value in rounded.items():
            if observer not in self._inputs:
                module = observer_of(self._graph, observer)
                self._inputs[observer] = self._statistics(observer, module, value, reading)
            self._inputs[observer].add(raw[observer], value)
        (target,) = task.targets(batch) or (None,)
        exact = _first(target)
        if not isinstance(exact, torch.Tensor) or not exact.is_floating_point():
            return
        self._signal += _energy(exact)
        errors = {
            "alone": self._error(task, raw | rounded, "quantized", exact),
            "activations": self._error(task, raw | rounded, "float", exact),
            "weight": self._error(task, raw, "quantized", exact),
            "cumulative": self._error(task, seen, "quantized", exact),
        }
        for name, error in errors.items():
            self._noises[name] += _energy(error)

    def _error(self, task: Task, inputs: Env, flow: Any, exact: torch.Tensor) -> torch.Tensor:
        return _difference(_first(task.evaluator(flow).run([self._node], dict(inputs))[self._node]), exact)

    def _statistics(self, observer: Node, module: Any, exact: torch.Tensor, reading: GraphReading) -> TensorStatistics:
        quantized, source = reading.op(observer), observer.args[0]
        what = quantized.qparams.describe() if quantized is not None else "float"
        convolution = ops.op_name(self._node).startswith("conv")
        axis = None if exact.ndim < 2 else 1 if convolution else -1
        name = source.name if isinstance(source, Node) else observer.name
        return TensorStatistics(name, what, _static(module, exact), axis)

    def result(self, signal: float, cost: float | None, total: float) -> SiteAnalysis:
        """Args: energy of the network's output, of what this site adds to its error, and the sum of all such."""
        levels = {name: decibels(self._signal, noise) for name, noise in self._noises.items()}
        return SiteAnalysis(
            self._site,
            levels["alone"],
            levels["activations"],
            levels["weight"],
            levels["cumulative"],
            None if cost is None else decibels(signal, cost),
            (cost or 0.0) / total if total > 0 else 0.0,
            tuple(statistics.result() for statistics in self._inputs.values()),
            None if self._weight is None else self._weight.result(),
        )


def _static(module: Any, tensor: torch.Tensor) -> Grid | None:
    """The grid of an observer's tensor where it is known before run time."""
    if callable(getattr(module, "convert", None)) and not isinstance(getattr(module, "grid", None), Grid):
        return None
    return None if getattr(module, "is_dynamic", False) else grid_of(module, tensor.shape)


def _energy(x: torch.Tensor) -> float:
    return float(x.masked_fill(~x.isfinite(), 0.0).double().square().sum())
