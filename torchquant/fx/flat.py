"""A graph as a pure function of tensors, whatever the arguments look like: what compilers and delegates take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from torchquant.errors import ExportError
from torchquant.fx import ops, passes
from torchquant.fx.functional import functionalize
from torchquant.fx.signature import Constant, InputSpec, Signature
from torchquant.fx.states import states_of

__all__ = ["Flat", "flat"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Flat:
    """A graph without writes, that takes tensors by position and returns a tuple of them.

    Args:
        graph: takes the tensors of `signature` and then the states; returns the outputs, the new states, and the new
            values of the inputs that the model writes into.
        signature: of the model.
        initial: name of each state -> its value before the first call.
        overwritten: positions among the tensors of the inputs that the model writes into.
    """

    graph: GraphModule
    signature: Signature
    initial: dict[str, torch.Tensor]
    overwritten: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many outputs the model has that are made anew in each call."""
        return len(_returned(self.graph)) - len(self.initial) - len(self.overwritten)

    def split(self, values: Sequence[Any]) -> tuple[list[Any], dict[str, torch.Tensor], list[torch.Tensor]]:
        """What the graph returned as outputs, new states, and new values of overwritten inputs."""
        end = self.count + len(self.initial)
        return (
            list(values[: self.count]),
            dict(zip(self.initial, values[self.count : end], strict=True)),
            list(values[end:]),
        )


def flat(model: GraphModule) -> Flat:
    """A copy of `model` as a pure function of tensors; `model` stays as it is.

    Raises:
        ExportError: the graph writes in a way that has no form without the write.
        InputError: an input that is neither a tensor nor a constant.
    """
    signature, graph = Signature.of(model), passes.copy_graph(model)
    functionalize(graph)
    _drop_guards(graph)
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    for node in reversed(inputs):  # convert puts quantized buffers before them, of which some become inputs too
        next(iter(graph.graph.nodes)).prepend(node)
    for node, spec in zip(inputs, signature.inputs, strict=True):
        if isinstance(spec, Constant):
            node.replace_all_uses_with(spec.value)
            graph.graph.erase_node(node)
    tensors = [n for n, s in zip(inputs, signature.inputs, strict=True) if isinstance(s, InputSpec)]
    initial = states_of(graph)
    states = [_lift(graph, name, value) for name, value in initial.items()]
    written = _take_writes(graph)
    foreign = [n.name for n in graph.graph.nodes if ops.written(n)]
    if foreign:
        raise ExportError(
            f"{', '.join(foreign[:4])} write in place and are no ops of torch; torchquant cannot lower them"
        )
    overwritten = tuple(i for i, node in enumerate(tensors) if node in written)
    kept = [n for n in _returned(graph) if isinstance(n, Node)]
    returned = [*kept, *(written[n] for n in states), *(written[tensors[i]] for i in overwritten)]
    output = next(n for n in graph.graph.nodes if n.op == "output")
    output.args = (tuple(returned),)
    graph.graph.set_codegen(CodeGen())
    for name in ("_in_spec", "_out_spec"):
        graph.__dict__.pop(name, None)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    passes.remove_dead_weights(graph)
    return Flat(graph, signature, {k: v.clone() for k, v in initial.items()}, overwritten)


def _returned(graph: GraphModule) -> list[Any]:
    outputs = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def _drop_guards(graph: GraphModule) -> None:
    """Remove torch.export's check of the inputs, which the signature does for us."""
    for node in [n for n in graph.graph.nodes if n.op == "call_module" and str(n.target) == "_guards_fn"]:
        graph.graph.erase_node(node)
        delattr(graph, "_guards_fn")


def _lift(graph: GraphModule, name: str, value: torch.Tensor) -> Node:
    """An input in the place of a buffer, behind those that are there."""
    reads = [n for n in graph.graph.nodes if n.op == "get_attr" and n.target == name]
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    first = next(iter(graph.graph.nodes))
    with graph.graph.inserting_after(inputs[-1]) if inputs else graph.graph.inserting_before(first):
        lifted = graph.graph.placeholder(f"state_{name}".replace(".", "_"))
    lifted.meta = dict(reads[0].meta)
    if lifted.meta.get("val") is None:
        lifted.meta["val"] = value
    for node in reads:
        node.replace_all_uses_with(lifted)
        graph.graph.erase_node(node)
    return lifted


def _take_writes(graph: GraphModule) -> dict[Node, Node]:
    """Input -> the value that the graph copies into it at its end; the copies are removed."""
    writes = {}
    for node in list(graph.graph.nodes):
        target = node.args[0] if node.target is aten.copy_.default else None
        if isinstance(target, Node) and target.op == "placeholder":
            writes[target] = node.args[1]
            node.replace_all_uses_with(node.args[1])
            graph.graph.erase_node(node)
    return writes
