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
_ALIKE = 40  # letters of two errors that make them one and the same
_CODES = {  # ExecuTorch's runtime/core/error.h
    "1": "internal",
    "10": "not supported",
    "12": "invalid argument",
    "14": "missing operator",
    "20": "not found",
    "21": "out of memory",
}
Trial = Callable[[GraphModule], object]


def blamed(graph: GraphModule, error: Exception, trial: Trial, doing: str, other_sizes: bool = False) -> LoweringError:
    """The error as one of ours, which names the op that is at fault and says what to do.

    Args:
        graph: a pure function of tensors, on which `trial` fails with `error`.
        trial: lowers a graph, or runs it too.
        doing: what ExecuTorch cannot do, e.g. `lower`.
        other_sizes: it fails with other sizes than the example's.
    """
    nodes = [n for n in graph.graph.nodes if (ops.is_op(n) or ops.is_higher_order(n)) and not _is_within_chain(n)]
    named = next((i for i, n in enumerate(nodes) if str(n.target) in _brief(error)), None)
    first, last, failed = (named, named, True) if named is not None else _search(graph, nodes, trial, _brief(error))
    where = called(nodes[last]) if last == first else f"one of {called(nodes[first])} ... {called(nodes[last])}"
    where = where if failed else "the model, though each part of it"
    sizes = " with other sizes than the example's" if other_sizes else ""
    remedy = way_out(nodes[last]) if failed else "Lower it for another target, and report this."
    remedy = f"Export with fixed sizes (no dynamic_shapes). Or: {remedy}" if other_sizes else remedy
    return LoweringError(f"ExecuTorch cannot {doing} {where}{sizes} ({_brief(error)}). {remedy}")


def _search(graph: GraphModule, nodes: Sequence[Node], trial: Trial, brief: str) -> tuple[int, int, bool]:
    """Between which of the nodes the first one lies up to which the graph fails in this way, and whether a part did."""
    low, high, failed = 0, len(nodes) - 1, len(nodes) == 1
    end = time.monotonic() + _SECONDS
    while low < high and time.monotonic() < end:
        middle = (low + high) // 2
        if _fails(_until(graph, nodes[middle]), trial, brief):
            high, failed = middle, True
        else:
            low = middle + 1
    return low, high, failed or _fails(_until(graph, nodes[high]), trial, brief)


def _fails(part: GraphModule, trial: Trial, brief: str) -> bool:
    """Whether a part of the graph fails in the same way; it may fail in others because it is a part."""
    if not any(n.op == "placeholder" for n in part.graph.nodes):
        return False
    try:
        trial(part)
    except Exception as error:
        return _brief(error)[:_ALIKE] == brief[:_ALIKE]
    return False


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


def _is_within_chain(node: Node) -> bool:
    """Whether a node makes scales or codes for a dequantize op; a part that ends there fails for that alone."""
    return bool(ops.qdq_name(node)) and not ops.is_dequantize(node)


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
    if code := re.search(r"error:? 0x:?([0-9a-f]+)", str(cause)):
        return f"its runtime stops with error 0x{code[1]}" + (f", {_CODES[code[1]]}" if code[1] in _CODES else "")
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"its error: {(lines[0] if lines else type(cause).__name__)[:200]}"
