"""The time of each op in the regions that our kernels compute, one by one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from torchquant.artifacts.serialize import export_again
from torchquant.calibration import batches as data
from torchquant.errors import LoweringError
from torchquant.fx import ops, passes
from torchquant.fx.signature import Signature
from torchquant.fx.sites import mark_sites, marked
from torchquant.fx.storing import is_packed, unpack_weights
from torchquant.fx.work import KINDS
from torchquant.ops.x86 import native, tuning
from torchquant.ops.x86.row_products import replace_row_products
from torchquant.ops.x86.translation import replace_regions

__all__ = ["measured_us", "op_ms", "product_ms"]

_ROUNDS = 20


def product_ms(graph: GraphModule, batch: Any) -> dict[str, float]:
    """Milliseconds of each product in our regions, by the name of its node in a converted graph."""
    return {name: us / 1e3 for name, us in measured_us(graph, batch)[0].items()}


def measured_us(graph: GraphModule, batch: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds on one thread: of each op by the name of its node, and of the other steps of our regions by kind.

    What stays with Inductor, and our attention, are in neither: the whole program's time less these is theirs.

    Raises:
        LoweringError: the kernels cannot be built here.
    """
    if any(map(is_packed, graph.graph.nodes)):
        graph = passes.copy_graph(graph)
        unpack_weights(graph)
    exported = export_again(graph, batch).module()
    names = {new.name: old.name for old, new in zip(_products(graph), _products(exported), strict=True)}
    regions = replace_regions(exported)
    with torch.no_grad():
        run = lambda: data.call(exported, batch)  # noqa: E731
        leaves = [v for v in data.flatten(batch) if isinstance(v, torch.Tensor)]
        tuning.tune(run, regions, "x".join(str(s) for t in leaves for s in t.shape))
        memories, steps = [r.memory for r in regions], [r.plan.laid_out for r in regions]
        rounds = [native.profiled(run, memories, [len(s) for s in steps]) for _ in range(_ROUNDS)]
    products: dict[str, float] = {}
    others: dict[str, float] = {}
    for i, region in enumerate(steps):
        for k, step in enumerate(region):
            us = statistics.median(microseconds[i][k] for microseconds in rounds)
            if step.kind in ("conv", "depthwise"):
                products[names[step.label]] = us
            else:
                others[step.kind] = others.get(step.kind, 0.0) + us
    if any(us < 0 for us in (*products.values(), *others.values())):
        raise LoweringError("a region did not run, so its ops have no time: profile with inputs that reach it")
    return products, others


def op_ms(graph: GraphModule, batch: Any) -> dict[str, float]:
    """Milliseconds of each op of a float or converted graph by the name of its node, one by one, on one thread.

    Products in our regions are timed inside of them. Linears that read the same rows are one product, of whose time
    each gets the share of its outputs. Ops that our kernels do not run take the time of torch's own.

    Args:
        graph: as `lower` takes it, or a float one of `export`.
        batch: as `example_inputs` of `export`.

    Raises:
        LoweringError: the kernels cannot be built here.
    """
    graph = passes.copy_graph(graph)
    if any(map(is_packed, graph.graph.nodes)):
        unpack_weights(graph)
    mark_sites(graph)
    exported = export_again(graph, batch).module()
    assert isinstance(exported, GraphModule)
    names = {node.name: marked(node) for node in exported.graph.nodes}
    replace_row_products(exported)
    regions = replace_regions(exported)
    signature = Signature.of(exported)
    leaves = data.leaves_of(signature, batch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            timed = _Timed(exported)
            rounds = [timed.times(leaves) for _ in range(_ROUNDS)][1:]
            memories, steps = [r.memory for r in regions], [r.plan.laid_out for r in regions]
            run = lambda: data.call(exported, batch)  # noqa: E731
            inside = (
                [native.profiled(run, memories, [len(s) for s in steps]) for _ in range(_ROUNDS)] if regions else []
            )
    finally:
        torch.set_num_threads(threads)
    times: dict[str, float] = {}
    for node in exported.graph.nodes:
        ms = statistics.median(each[node] for each in rounds) if node in rounds[0] else 0.0
        for name, share in _shares(node):
            times[name] = times.get(name, 0.0) + share * ms
    for i, region in enumerate(steps):
        for k, step in enumerate(region):
            if step.kind in ("conv", "depthwise") and names.get(step.label):
                times[names[step.label]] = statistics.median(us[i][k] for us in inside) / 1e3
    return times


def _shares(node: Node) -> list[tuple[str, float]]:
    """The marked ops that a node computes, with the share of its time that each takes."""
    if marked(node):
        return [(marked(node), 1.0)] if ops.op_name(node) != "slice" else []
    slices = [u for u in node.users if ops.op_name(u) == "slice" and marked(u)]
    widths = [int(u.args[3]) - int(u.args[2]) for u in slices]  # type: ignore[arg-type]
    return [(marked(u), width / sum(widths)) for u, width in zip(slices, widths, strict=True)]


class _Timed(Interpreter):
    """Runs a graph and notes how long each node takes."""

    def times(self, leaves: Sequence[Any]) -> dict[Node, float]:
        """Node -> milliseconds."""
        self._times: dict[Node, float] = {}
        self.run(*leaves)
        return self._times

    def run_node(self, n: Node) -> Any:
        start = time.perf_counter()
        value = super().run_node(n)
        self._times[n] = (time.perf_counter() - start) * 1e3
        return value


def _products(graph: GraphModule) -> list[Node]:
    return [node for node in graph.graph.nodes if ops.op_name(node) in KINDS]
