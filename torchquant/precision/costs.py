"""What each scheme costs the network's output at each op: all schemes by the same passes through the float function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.analysis.tensors import decibels
from torchquant.analysis.walk import own_error
from torchquant.calibration import batches as data
from torchquant.calibration.evaluator import Env
from torchquant.calibration.felt import felt_of_several
from torchquant.calibration.stream import Stream, given_to
from torchquant.fx.blocks import weight_of
from torchquant.fx.functional import functionalize
from torchquant.fx.passes import copy_graph
from torchquant.fx.reading import observer_of
from torchquant.solving.run import DEFAULT_MEMORY_BYTES
from torchquant.surroundings import own_modes

__all__ = ["noises"]


def noises(
    prepared: Mapping[str, GraphModule], batches: Sequence[Any], seed: int, memory_bytes: int = DEFAULT_MEMORY_BYTES
) -> dict[str, dict[str, float]]:
    """Scheme -> op -> what quantizing the op alone adds to the output's error, as a share of the output's energy.

    To first order by derivatives of the output, see `analyze`; where it has none by an op, of the op's own output.

    Args:
        prepared: scheme -> calibrated graph, all of one float graph by one Quantizer; nodes are matched by name.
        batches: to measure on.
    """
    with own_modes():
        graphs = {scheme: copy_graph(graph) for scheme, graph in prepared.items()}
        for graph in graphs.values():
            functionalize(graph)
        first = next(iter(graphs.values()))
        given = given_to(first, list(data.checked(first, batches)))
        names = {n.name for graph in graphs.values() for n in graph.graph.nodes if weight_of(graph, n) is not None}
        with closing(Stream(first, given, budget_bytes=memory_bytes)) as stream:
            return _measured(stream, graphs, [n for n in first.graph.nodes if n.name in names], seed)


def _measured(
    stream: Stream, graphs: Mapping[str, GraphModule], sites: Sequence[Node], seed: int
) -> dict[str, dict[str, float]]:
    flows = {scheme: _Flow(graph) for scheme, graph in graphs.items()}
    own: dict[tuple[str, str], float] = {}
    energy: dict[str, float] = {}

    def errors_of(node: Node, env: Env) -> dict[str, torch.Tensor]:
        found = {scheme: error for scheme, flow in flows.items() if (error := flow.error(node.name, env)) is not None}
        exact = env[node]
        if found and isinstance(exact, torch.Tensor):
            energy[node.name] = energy.get(node.name, 0.0) + float(exact.double().nan_to_num().square().sum())
        for scheme, error in found.items():
            own[scheme, node.name] = own.get((scheme, node.name), 0.0) + float(error.double().square().sum())
        return found

    felt = felt_of_several(stream, sites, errors_of, seed)
    for _ in stream.walk([]):
        pass
    result: dict[str, dict[str, float]] = {scheme: {} for scheme in graphs}
    for (scheme, name), error in own.items():
        cost = next((c for node, c in felt.get(scheme, {}).items() if node.name == name), None)
        level = decibels(energy[name], error) if cost is None else decibels(stream.signal, cost)
        result[scheme][name] = 10 ** (-level / 10)
    return result


class _Flow:
    """One scheme's graph, its nodes by name."""

    def __init__(self, graph: GraphModule) -> None:
        self._graph, self._nodes = graph, {n.name: n for n in graph.graph.nodes}
        self._quantized = Stream(graph, []).evaluator("quantized")

    def error(self, name: str, env: Env) -> torch.Tensor | None:
        """What the scheme adds to the value of the op of that name; None where it quantizes no weight of it."""
        node = self._nodes.get(name)
        if node is None or weight_of(self._graph, node) is None:
            return None
        values = {n.name: value for n, value in env.items()}
        own: Env = {}
        for read in (node, *node.all_input_nodes):
            source = read
            while source.name not in values and observer_of(self._graph, source) is not None:
                source = source.all_input_nodes[0]
            if source.name in values:
                own[read] = values[source.name]
        return own_error(self._quantized, self._graph, node, own)
