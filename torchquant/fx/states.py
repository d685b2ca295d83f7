"""Buffers that a graph writes: what one call hands to the next."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.fx import GraphModule, Node

from torchquant.fx import ops

__all__ = ["hidden_states", "own_states", "restored", "set_states", "state_nodes", "states_of"]


def state_nodes(model: GraphModule) -> list[Node]:
    """The nodes that read a buffer which the graph writes."""
    return [n for n in model.graph.nodes if n.op == "get_attr" and ops.is_overwritten(n)]


def states_of(model: GraphModule) -> dict[str, torch.Tensor]:
    """Name -> present value of each buffer that the graph writes; the tensors themselves, no copies."""
    names = dict.fromkeys(str(n.target) for n in state_nodes(model))
    return {name: operator.attrgetter(name)(model).detach() for name in names}


def hidden_states(model: GraphModule) -> list[Node]:
    """Normalizations that update running statistics in each call, though their ops say nothing of writing."""
    names = {"batch_norm": "training", "instance_norm": "use_input_stats"}
    normalizations = []
    for node in model.graph.nodes:
        arguments = ops.arguments(node)
        switch = names.get(ops.overload_of(node).partition(".")[0])
        if switch and arguments.get(switch) and arguments.get("running_mean") is not None:
            normalizations.append(node)
    return normalizations


def own_states(model: GraphModule) -> None:
    """Give the graph its own copies of the buffers that it writes."""
    for name, value in states_of(model).items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        delattr(module, leaf)
        module.register_buffer(leaf, value.clone())


def set_states(model: GraphModule, values: Mapping[str, torch.Tensor]) -> None:
    """Write values into the buffers of these names."""
    with torch.no_grad():
        for name, value in values.items():
            operator.attrgetter(name)(model).copy_(value)


@contextmanager
def restored(model: GraphModule) -> Iterator[dict[str, torch.Tensor]]:
    """Put the state back at the end; gives a copy of the initial one."""
    initial = {name: value.clone() for name, value in states_of(model).items()}
    try:
        yield initial
    finally:
        set_states(model, initial)
