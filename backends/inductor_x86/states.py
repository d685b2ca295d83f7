"""States that a package writes in place: a row of a cache, where returning the state would copy all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from torchquant.fx import ops
from torchquant.fx.flat import Flat

__all__ = ["InPlace", "returning_states", "states_in_place", "write_in_place"]

aten = torch.ops.aten

InPlace = Sequence[tuple[int, int]]  # position of a state among the inputs, and of its new value among the outputs
_WRITERS = {"index_copy", "index_put", "scatter", "select_scatter", "slice_scatter"}


def states_in_place(reference: Flat) -> InPlace:
    """The states whose new value is the old one with a part of it replaced."""
    inputs = [n for n in reference.graph.graph.nodes if n.op == "placeholder"]
    outputs = next(n for n in reference.graph.graph.nodes if n.op == "output").args[0]
    first_input, first_output = len(inputs) - len(reference.initial), reference.count
    pairs = [(first_input + i, first_output + i) for i in range(len(reference.initial))]
    return [(i, o) for i, o in pairs if _is_part_replaced(outputs[o], inputs[i])]


def _is_part_replaced(value: Any, state: Node) -> bool:
    return isinstance(value, Node) and ops.overload_of(value).partition(".")[0] in _WRITERS and value.args[0] is state


def write_in_place(graph: GraphModule, pairs: InPlace) -> None:
    """Copy these new values into their inputs, which Inductor turns into writes of the part, and return the rest."""
    if not pairs:
        return
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    output = next(n for n in graph.graph.nodes if n.op == "output")
    values = list(output.args[0])
    with graph.graph.inserting_before(output):
        for position, place in pairs:
            copy = graph.graph.call_function(aten.copy_.default, (inputs[position], values[place]))
            copy.meta = dict(inputs[position].meta)
    written = {place for _, place in pairs}
    output.args = (tuple(v for i, v in enumerate(values) if i not in written),)
    codegen: Any = graph.graph._codegen
    if (tree := getattr(codegen, "pytree_info", None)) is not None:  # a graph that was exported again
        codegen.pytree_info = tree._replace(out_spec=pytree.tree_structure(output.args[0]))
    graph.recompile()


def returning_states(run: Callable[..., list[Any]], pairs: InPlace) -> Callable[..., list[Any]]:
    """The package as a function that returns the states which it wrote, where the graph does."""

    def returning(*tensors: torch.Tensor) -> list[Any]:
        outputs = run(*tensors)
        for position, place in pairs:
            outputs.insert(place, tensors[position])
        return outputs

    return returning
