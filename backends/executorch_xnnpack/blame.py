"""Which op ExecuTorch fails on, where its own error does not say: the first of a graph with which it fails."""

from __future__ import annotations

import operator
import re
import time
from collections.abc import Callable, Sequence

import torch
from torch.fx import GraphModule, Node

from torchquant.backends.executorch_xnnpack.kernels import called, way_out
from torchquant.errors import LoweringError
from torchquant.fx import ops, passes

__all__ = ["blamed"]

_SECONDS = 90.0  # after which a search ends where it is
Trial = Callable[[GraphModule], object]


def blamed(graph: GraphModule, error: Exception, trial: Trial, doing: str) -> LoweringError:
    """The error as one of ours, which names the op that is at fault and says what to do.

    Args:
        graph: a pure function of tensors, on which `trial` fails with `error`.
        trial: lowers a graph, or runs it too.
        doing: what ExecuTorch cannot do, e.g. `lower`.
    """
    nodes = [n for n in graph.graph.nodes if ops.is_op(n) or ops.is_higher_order(n)]
    first, last = _search(graph, nodes, trial)
    where = called(nodes[last]) if last == first else f"one of {called(nodes[first])} ... {called(nodes[last])}"
    return LoweringError(f"ExecuTorch cannot {doing} {where} ({_brief(error)}). {way_out(nodes[last])}")


def _search(graph: GraphModule, nodes: Sequence[Node], trial: Trial) -> tuple[int, int]:
    """Between which of the nodes the first one lies up to which the graph fails; bisection."""
    low, high, end = 0, len(nodes) - 1, time.monotonic() + _SECONDS
    while low < high and time.monotonic() < end:
        middle = (low + high) // 2
        part = _until(graph, nodes[middle])
        try:
            if any(n.op == "placeholder" for n in part.graph.nodes):
                trial(part)
            low = middle + 1
        except Exception:
            high = middle
    return low, high


def _until(graph: GraphModule, last: Node) -> GraphModule:
    """The graph up to a node: the inputs that it reads, and as outputs the tensors that the rest of it reads."""
    part = passes.copy_graph(graph)
    nodes = list(part.graph.nodes)
    kept = set(nodes[: next(i for i, n in enumerate(nodes) if n.name == last.name) + 1])
    kept |= {user for n in kept for user in n.users if user.target is operator.getitem}
    read = [n for n in nodes if n in kept and _is_tensor(n) and set(n.users) - kept]
    nodes[-1].args = (tuple(read),)
    for node in reversed(nodes[:-1]):
        if node not in kept:
            part.graph.erase_node(node)
    part.graph.eliminate_dead_code()
    for node in [n for n in part.graph.nodes if n.op == "placeholder" and not n.users]:
        part.graph.erase_node(node)
    part.recompile()
    passes.remove_dead_weights(part)
    return part


def _is_tensor(node: Node) -> bool:
    """Whether a node computes a tensor that a program can return; quantize ops carry no value."""
    value = node.meta.get("val") if node.op == "call_function" else 0
    if value is None:
        return ops.is_dequantize(node)
    return isinstance(value, torch.Tensor) and not ops.is_constant(node)


def _brief(error: BaseException) -> str:
    """What ExecuTorch says, in one line without its advice."""
    cause = error.__cause__ if error.__cause__ is not None else error
    if unknown := re.search(r"Operator (?:torch\._ops\.)?(\S+) is not in Core ATen", str(cause)):
        return f"its programs have no {unknown[1]}"
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"its error: {(lines[0] if lines else type(cause).__name__)[:200]}"
