"""What every backend checks before and after it builds: nothing unaccounted, nothing off its reference."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from torch.fx import GraphModule, Node

from torchquant.errors import InputError, LoweringError, TorchquantWarning
from torchquant.fx import ops
from torchquant.fx.patterns import match
from torchquant.fx.reading import is_converted, is_prepared
from torchquant.fx.sites import NOTE, read_sites, refuse_lost_writes
from torchquant.fx.states import hidden_states
from torchquant.types import Capability, Site

__all__ = ["accountable_sites", "left_float", "names"]


def accountable_sites(
    graph: GraphModule, allow_float: Sequence[str], capabilities: Sequence[Capability]
) -> tuple[tuple[Site, ...], set[str]]:
    """The sites of a converted graph, and the nodes that the user allows to run in float.

    What the target runs in no scheme is `unsupported`, with the target's reason, whoever wrote the Quantizer; `missed`
    is what it could have run.

    Raises:
        InputError: the graph is not converted.
        ExportError: it lost a write in place.
        LoweringError: our Quantizer annotated the graph, yet missed a compute op. A foreign Quantizer's missed ops are
            a warning.
    """
    if not isinstance(graph, GraphModule) or not is_converted(graph):
        state = "prepared: run convert_pt2e first" if isinstance(graph, GraphModule) and is_prepared(graph) else "not"
        raise InputError(f"lower takes a converted graph, with dequantize ops in it; this one is {state}")
    refuse_lost_writes(graph)
    for node in hidden_states(graph):
        raise LoweringError(
            f"{node.name} updates running statistics in each call, which the artefact would not: move the trained "
            "graph to evaluation (torchao's move_exported_model_to_eval), or call the op with training=False"
        )
    for node in filter(ops.draws_numbers, graph.graph.nodes):
        raise LoweringError(
            f"{ops.op_name(node)} {node.name} draws random numbers in each call, so that no artefact can be held "
            "against the graph: export the model in evaluation, as torchquant.export does, or make the numbers an input"
        )
    allowed = {n.name for pattern in allow_float for n in match(graph, pattern)}
    rows = {row.op: row for row in capabilities}
    nodes = {n.name: n for n in graph.graph.nodes}
    sites = tuple(_with_reason(s, nodes[s.node], rows.get(s.op)) for s in read_sites(graph))
    missed = [s for s in sites if s.status == "missed" and s.node not in allowed]
    if missed:
        text = f"{len(missed)} compute ops were left float without a reason: {names(missed)}"
        hidden = [s.reason for s in missed if ops.is_higher_order(nodes[s.node])]
        text += f" ({hidden[0]})" if hidden else ""
        if any(NOTE in (n.meta.get("custom") or {}) for n in graph.graph.nodes):
            raise LoweringError(f"{text}. Exclude them in the Quantizer, or pass allow_float=[...].")
        warnings.warn(f"{text}. The Quantizer never annotated them.", TorchquantWarning, stacklevel=3)
    return sites, allowed


def _with_reason(site: Site, node: Node, row: Capability | None) -> Site:
    """A missed site that the target could not have run as `unsupported`."""
    if site.status != "missed" or row is None or site.activation is not None or site.weight is not None:
        return site
    reasons = [row.condition(node, scheme) if row.condition else None for scheme in row.schemes] or [row.reason]
    return replace(site, status="unsupported", reason=reasons[0]) if all(reasons) else site  # type: ignore[arg-type]


def names(sites: Iterable[Site], limit: int = 8) -> str:
    """`conv2d conv2d_3 (layers.0.conv): reason; ...`, cut after `limit`."""
    texts = [f"{s.op} {s.node}" + (f" ({s.module})" if s.module else "") for s in sites]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return "; ".join(texts[:limit]) + more


def left_float(sites: Sequence[Site], allowed: set[str], inside: Collection[str] = ()) -> dict[str, str]:
    """What of a graph runs in float, grouped by op and reason: `{"3 softmax": "why"}`.

    Args:
        inside: sites that are computed inside of the target's int8 kernels, between their codes.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for s in sites:
        if s.node in allowed:
            counts[s.op, "allowed by the user"] += 1
        elif s.status != "quantized":
            counts[s.op, "inside torchquant's int8 kernels" if s.node in inside else s.reason] += 1
    return {f"{n} {op}": reason for (op, reason), n in counts.items()}
