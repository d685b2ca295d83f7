"""Spans of a prepared graph: single layers, and blocks between the graph's cut points. No table of architectures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.errors import SchemeError
from torchquant.fx import ops
from torchquant.fx.grids import Grid, grid_of
from torchquant.fx.reading import observer_of
from torchquant.types import Format

__all__ = ["Span", "blocks", "data_order", "is_shared", "keeps_state", "layers", "weight_grid", "weight_of"]

SOLVABLE = (
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "linear",
)


@dataclass(frozen=True)
class Span:
    """Consecutive nodes that are solved together.

    Args:
        nodes: in graph order, constants (weights, their observers) left out.
        sites: those of them whose weight is quantized on a grid.
    """

    nodes: tuple[Node, ...]
    sites: tuple[Node, ...]

    @property
    def name(self) -> str:
        """For progress and messages: the module path of the first site, or the name of the first node."""
        names = [ops.module_path(n) or n.name for n in self.sites or self.nodes[:1]]
        return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"


def data_order(prepared: GraphModule) -> list[Node]:
    """The nodes whose value depends on the data (or on nothing), in graph order, inputs and output left out."""
    constant: set[Node] = set()
    nodes = []
    for node in prepared.graph.nodes:
        if node.op == "get_attr" and ops.is_overwritten(node):
            continue  # an input like any other
        if node.op == "get_attr" or (node.all_input_nodes and all(n in constant for n in node.all_input_nodes)):
            constant.add(node)
        elif node.op not in ("placeholder", "output"):
            nodes.append(node)
    return nodes


def weight_of(prepared: GraphModule, node: Node) -> tuple[Node, torch.nn.Module] | None:
    """The observer node and module of an op's constant weight, or None if it isn't quantized."""
    kind = ops.kind_of(node)
    source = ops.argument(node, kind.weight) if kind is not None and kind.weight is not None else None
    observer = observer_of(prepared, source) if source is not None else None
    if source is None or observer is None or not ops.is_constant(source.args[0]):  # type: ignore[arg-type]
        return None
    return source, observer


def weight_grid(prepared: GraphModule, node: Node) -> Grid:
    """The grid of a site's weight.

    Raises:
        SchemeError: its observer has no static integer grid, so codes cannot be chosen for it.
    """
    weight = weight_of(prepared, node)
    assert weight is not None
    source, observer = weight
    grid = grid_of(observer, ops.constant_value(prepared, source.args[0]).shape)  # type: ignore[arg-type]
    if grid is None:
        format: Any = getattr(observer, "format", None)
        cause = f"{format.name} is" if isinstance(format, Format) else f"{type(observer).__name__} gives its weight"
        raise SchemeError(
            f"{ops.module_path(node) or node.name}: {cause} no static integer grid, so no algorithm can choose codes "
            "for it; leave it out with exclude=[...]"
        )
    return grid


def solvable(prepared: GraphModule, node: Node) -> bool:
    """Whether the op is a convolution or linear whose constant weight has an observer."""
    return ops.op_name(node) in SOLVABLE and weight_of(prepared, node) is not None


def is_shared(prepared: GraphModule, site: Node) -> bool:
    """Whether other ops read the weight of a site through the same observer."""
    weight = weight_of(prepared, site)
    return weight is not None and len(weight[0].users) > 1


def layers(prepared: GraphModule, excluded: frozenset[str] = frozenset(), *, every_reader: bool = False) -> list[Span]:
    """One span for each site, just the op itself.

    Args:
        excluded: node names.
        every_reader: of a weight that several ops share; else the first of them alone, since all read what is chosen.
    """
    sites = _sites(prepared, data_order(prepared), excluded, every_reader)
    return [Span((node,), (node,)) for node in sites]


def _sites(
    prepared: GraphModule, order: Sequence[Node], excluded: frozenset[str], every_reader: bool = False
) -> list[Node]:
    sites = [node for node in order if node.name not in excluded and solvable(prepared, node)]
    first = {node.args[1]: node for node in reversed(sites)}
    return [node for node in sites if every_reader or first[node.args[1]] is node]


def blocks(
    prepared: GraphModule, excluded: frozenset[str] = frozenset(), *, min_sites: int = 2, max_sites: int = 8
) -> list[Span]:
    """Cut the graph where one value crosses, into spans of at least `min_sites` sites where that is possible.

    A value counts as crossing only if it comes from a site and if the span made it or reads it: a mask, positions, or
    the result of another branch that is kept for later do not hinder a cut. So residual blocks, the halves of a
    transformer layer and the towers of a two-input net are spans. Where more than `max_sites` would stand
    between two such cuts (a U-Net, a DenseNet), the span is cut where the fewest values cross.
    """
    order = data_order(prepared)
    chosen = set(_sites(prepared, order, excluded))
    crossing = _Crossing(prepared, order, _end(prepared, order, chosen))
    spans: list[Span] = []
    start = 0
    while any(n in chosen for n in order[start:]):
        end = crossing.next_cut(start, chosen, min_sites, max_sites)
        nodes = tuple(order[start:end])
        sites = tuple(n for n in nodes if n in chosen)
        if sites:
            spans.append(Span(nodes, sites))
        start = end
    return spans


def _end(prepared: GraphModule, order: Sequence[Node], chosen: set[Node]) -> int:
    """Where the last block ends at the latest: in front of a head that is left out, or behind everything."""
    last = max((i for i, n in enumerate(order) if n in chosen), default=-1)
    left_out = (i for i in range(last + 1, len(order)) if solvable(prepared, order[i]))
    return next(left_out, len(order))


def keeps_state(user: Node) -> bool:
    """Whether a node only writes what it reads into the graph's state, of which this call sees nothing more."""
    return bool(ops.written(user)) and not user.users


def _felt_by(node: Node) -> list[Node]:
    """The users of a value through which the rest of this call depends on it."""
    return [u for u in node.users if not keeps_state(u)]


class _Crossing:
    """How many values cross each place of the order, seen from where a span starts."""

    def __init__(self, prepared: GraphModule, order: Sequence[Node], end: int) -> None:
        self._prepared, self._order, self._end = prepared, order, end
        place = {node: i for i, node in enumerate(order)}
        self._uses = [sorted(place.get(u, len(order)) for u in _felt_by(node)) for node in order]
        computed: set[Node] = set()
        for node in order:
            if solvable(prepared, node) or any(n in computed for n in node.all_input_nodes):
                computed.add(node)
        self._computed = [node in computed and bool(uses) for node, uses in zip(order, self._uses, strict=True)]

    def at(self, start: int, end: int, carried: Sequence[int]) -> int:
        """Values that a span of order[start:end] makes or reads and that are read behind it.

        `carried`: places of the values that were made in front of `start` and are read behind it.
        """
        read = [i for i in carried if any(start <= u < end for u in self._uses[i])]
        return sum(self._computed[i] and self._uses[i][-1] >= end for i in (*read, *range(start, end)))

    def next_cut(self, start: int, chosen: set[Node], min_sites: int, max_sites: int) -> int:
        """Where the span that starts at `start` should end."""
        sites = 0
        carried = [i for i in range(start) if self._computed[i] and self._uses[i][-1] >= start]
        single: dict[int, int] = {}
        fewest: dict[tuple[int, int], int] = {}
        for end in range(start + 1, self._end + 1):
            sites += self._order[end - 1] in chosen
            if sites == 0 or self._splits(end):
                continue
            if sites > max_sites and (single or fewest):
                break
            count = self.at(start, end, carried)
            if count <= 1:
                single[sites] = end  # the last place before the next site
            fewest[(count, -sites)] = end
            if any(s < sites and s >= min_sites for s in single):
                break
        enough = [end for s, end in single.items() if s >= min_sites]
        if enough:
            end = enough[0]
        elif len(single) and sites > max_sites:
            end = max(single.values())
        else:
            end = fewest[min(fewest)] if sites > max_sites else self._end
        return end if any(n in chosen for n in self._order[end:]) else self._end

    def _splits(self, end: int) -> bool:
        """Whether a cut here would part an observer from what it feeds."""
        return end < len(self._order) and observer_of(self._prepared, self._order[end - 1]) is not None
