"""Backends of `torch.compile` made from a backend's `lower`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
from torch.fx import GraphModule, Node

from torchquant.errors import LoweringError
from torchquant.fx import passes
from torchquant.fx.signature import placeholders

__all__ = ["backend"]


def backend(
    lower: Callable[..., Any], known: Collection[str], graph: GraphModule, options: Mapping[str, Any] | None
) -> Callable[..., Any]:
    """What Dynamo is to call for `graph`: lowers it at the first call, and again for each new set of input sizes.

    Args:
        lower: takes a converted graph, a batch, and those of the `options` that are `known`.

    Raises:
        LoweringError: as `lower`; or an unknown option.
    """
    chosen = dict(options or {})
    unknown = set(chosen) - set(known)
    if unknown:
        raise LoweringError(f"the torchquant backend has no options {sorted(unknown)}; it has {sorted(known)}")
    programs: dict[tuple[Any, ...], Callable[..., Any]] = {}
    lifted = [_is_lifted(node) for node in placeholders(graph)]

    def run(*inputs: Any) -> Any:
        tensors = [v for v, fixed in zip(inputs, lifted, strict=True) if not fixed and isinstance(v, torch.Tensor)]
        sizes = tuple(tuple(v.shape) if isinstance(v, torch.Tensor) else v for v in inputs)
        if sizes not in programs:
            programs[sizes] = lower(_bind(graph, inputs, lifted), tuple(tensors), **chosen)
        outputs = programs[sizes](*tensors)
        return tuple(outputs) if isinstance(outputs, (list, tuple)) else (outputs,)

    return torch._dynamo.disable(run)


def _is_lifted(node: Node) -> bool:
    """Whether Dynamo made an input of what was a parameter or buffer."""
    return "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})


def _bind(graph: GraphModule, inputs: Sequence[Any], lifted: Sequence[bool]) -> GraphModule:
    """Dynamo's graph with lifted parameters and sizes put back as constants."""
    bound = passes.copy_graph(graph)
    for node in bound.graph.nodes:
        if "example_value" in node.meta:
            node.meta["val"] = node.meta["example_value"]
    for i, (node, value) in enumerate(zip(placeholders(bound), inputs, strict=True)):
        if isinstance(value, torch.Tensor) and not lifted[i]:
            node.meta["val"] = value
            continue
        replacement: Any = value
        if isinstance(value, torch.Tensor):
            bound.register_buffer(f"bound_{i}", value.detach())
            with bound.graph.inserting_before(node):
                replacement = bound.graph.get_attr(f"bound_{i}")
            replacement.meta = {"val": value}
        node.replace_all_uses_with(replacement)
        bound.graph.erase_node(node)
    bound.recompile()
    return bound
