"""What ExecuTorch has a kernel for, held against what a program calls, before the program is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from torchquant.errors import LoweringError
from torchquant.fx import ops
from torchquant.fx.sites import marked

__all__ = ["called", "refuse_complex", "refuse_loops", "refuse_unknown_sizes", "refuse_without_kernel", "way_out"]

_ELSEWHERE = "write it as other ops, leave it outside the model, or lower the model for another target"
_RUNS = ("cond", "map_impl", "scan")  # of the ops that run graphs of their own


def refuse_loops(graph: GraphModule) -> None:
    """Raise LoweringError for an op that runs graphs of its own in a way that ExecuTorch has no instruction for."""
    for node in graph.graph.nodes:
        if ops.is_higher_order(node) and node.target.name() not in _RUNS:
            raise LoweringError(
                f"{called(node)}: ExecuTorch runs the graphs of {', '.join(_RUNS)} only. Unroll it, or {_ELSEWHERE}."
            )


def refuse_complex(graph: GraphModule) -> None:
    """Raise LoweringError for complex numbers, for which ExecuTorch's programs have no ops."""
    for owner in _graphs(graph):
        for node in [n for n in owner.graph.nodes if n.op in ("call_function", "placeholder")]:
            if any(value.is_complex() for value in _values(node)):
                raise LoweringError(
                    f"{called(node)} gives complex numbers, and ExecuTorch's programs compute with real ones. Write "
                    "real and imaginary parts as tensors (a Fourier transform as two products with cosines and sines), "
                    "leave it outside the model, or lower the model for another target."
                )


def refuse_unknown_sizes(graph: GraphModule) -> None:
    """Raise LoweringError for a tensor whose size depends on values: ExecuTorch plans its memory beforehand."""
    for owner in _graphs(graph):
        for node in [n for n in owner.graph.nodes if n.op == "call_function"]:
            if any(free_unbacked_symbols(value) for value in _values(node)):
                raise LoweringError(
                    f"{called(node)}: the size of its result depends on the values that it reads, and ExecuTorch plans "
                    "its memory beforehand. Keep the size and use a mask (torch.where), leave the op outside the "
                    "model, or lower the model for another target."
                )


def refuse_without_kernel(edge: Any, reference: GraphModule) -> None:
    """Raise LoweringError for an op outside the delegate that no kernel of this ExecuTorch computes.

    Args:
        edge: the lowered program, before its memory is planned.
        reference: the graph that it was made of, whose names the message gives.
    """
    from executorch.extension.pybindings import portable_lib

    kernels = set(portable_lib._get_operator_names())
    sites = {n.name: n for n in reference.graph.nodes}
    for graph in _graphs(edge.exported_program().graph_module):
        for node in graph.graph.nodes:
            if node.op == "call_function" and (name := _without_kernel(node, kernels)):
                site = sites.get(marked(node), node)
                raise LoweringError(
                    f"{called(site)}: ExecuTorch has no kernel for {name}, neither in the XNNPACK delegate nor among "
                    f"its portable ones. {way_out(site)}"
                )


def _without_kernel(node: Node, kernels: set[str]) -> str:
    """The name of the op that a node of a lowered graph calls, if nothing computes it; else empty."""
    target: Any = node.target
    if not hasattr(target, "to_out_variant"):
        return ""
    name = str(target._schema.name)
    try:
        out = target.to_out_variant()
    except RuntimeError:
        return name
    overload = f".{out._schema.overload_name}" if out._schema.overload_name else ""
    return "" if f"{out._schema.name}{overload}" in kernels else name


def _values(node: Node) -> list[torch.Tensor]:
    """The tensors that a node gives."""
    value = node.meta.get("val")
    return [v for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, torch.Tensor)]


def _graphs(graph: GraphModule) -> Iterator[GraphModule]:
    """A graph and those that its conditions and maps run, but no delegate's."""
    yield graph
    for node in graph.graph.nodes:
        if (inner := ops.body_of(node)) is not None:
            yield from _graphs(inner)


def way_out(node: Node) -> str:
    """What a user can do about an op that ExecuTorch does not run."""
    weights = ops.kind_of(node) is not None and any(map(ops.is_dequantize, node.all_input_nodes[1:]))
    annotated = weights or (bool(node.users) and all(map(ops.is_quantize, node.users)))
    return ("Exclude it from quantization, or w" if annotated else "W") + f"{_ELSEWHERE[1:]}."


def called(node: Node) -> str:
    """`op node (module)`, as messages name a node."""
    module = ops.module_path(node)
    name = node.target.name() if ops.is_higher_order(node) else ops.op_name(node)  # type: ignore[union-attr]
    return f"{name} {node.name}" + (f" ({module})" if module else "")
