"""Quantized copies that are read after a write that they do not see."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.fx import GraphModule, Node

from torchquant.errors import ExportError
from torchquant.fx import ops
from torchquant.fx.functional import where, writes_in_place
from torchquant.fx.memory import source_of

aten = torch.ops.aten


def refuse_stale_copies(model: GraphModule, is_copy: Callable[[Node], bool]) -> None:
    """Raise ExportError if a quantized copy of a tensor is read after a write that only one of the two sees.

    Args:
        is_copy: whether a node is an observer, or a quantize or dequantize op: convert makes copies there.
    """
    if not writes_in_place(model):
        return
    for node in [n for n in model.graph.nodes if is_copy(n) and n.all_input_nodes]:
        source = node.all_input_nodes[0]
        writers = [u for u in source.users if source in ops.written(u) and u.target is not aten.copy_.default]
        if source.op == "get_attr" and writers:
            raise ExportError(
                f"{where(writers[0])} writes in place into the buffer {source.target}, which {node.name} quantizes: "
                "convert_pt2e would take it for a constant. Export the model with torchquant.export, or use one of "
                "torchquant's Quantizers: both rewrite such writes"
            )
    place = {node: i for i, node in enumerate(model.graph.nodes)}
    parents = {n: n.all_input_nodes[0] if is_copy(n) and n.all_input_nodes else source_of(n) for n in place}
    for writer in place:
        for target in ops.written(writer):
            for reader, copy in _stale_reads(writer, target, place, parents, is_copy):
                raise ExportError(
                    f"{where(writer)} writes in place into a tensor that {copy.name} has quantized before, and "
                    f"{where(reader) if reader.op == 'call_function' else reader.name} reads it afterwards: the "
                    "converted graph would lose the write. Export the model with torchquant.export, or use one of "
                    "torchquant's Quantizers: both rewrite such writes. Or compute a new tensor in the model's "
                    "forward, with torch.cat or torch.where."
                )


def _stale_reads(
    writer: Node,
    target: Node,
    place: dict[Node, int],
    parents: dict[Node, Node | None],
    is_copy: Callable[[Node], bool],
) -> Iterator[tuple[Node, Node]]:
    """Readers behind a write, with the copy that stands between what they read and what was written."""
    root, copies = _way_up(target, writer, parents, is_copy)
    if copies and root.op in ("get_attr", "placeholder"):  # which are read by the next call, and by the caller
        yield root, next(iter(copies))[0]
    for member in [n for n in place if place[n] < place[writer]]:
        for reader in [u for u in member.users if place[u] > place[writer] and (u.users or u.op == "output")]:
            other, between = _way_up(member, reader, parents, is_copy)
            stale_copies = [c for c, _ in between ^ copies if place[c] < place[writer]] if other is root else []
            if stale_copies:
                yield reader, stale_copies[0]


def _way_up(
    node: Node, reader: Node, parents: dict[Node, Node | None], is_copy: Callable[[Node], bool]
) -> tuple[Node, set[tuple[Node, Node]]]:
    """The root of a node's memory, and the copies on the way with what reads each: convert may make one for each."""
    copies = set()
    while (parent := parents[node]) is not None:
        copies |= {(node, reader)} if is_copy(node) else set()
        node, reader = parent, node
    return node, copies
