"""Nodes made in front of another one, and rules that put them in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from torchquant.fx import ops

aten = torch.ops.aten


class Builder:
    """Creates nodes in front of `at`, with their fake values, and buffers by value."""

    def __init__(self, model: GraphModule, at: Node) -> None:
        self.model, self.at = model, at
        self.made: set[Node] = set()

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        with self.model.graph.inserting_before(self.at):
            node = self.model.graph.call_function(target, args, kwargs)
        self.made.add(node)
        node.meta = {k: v for k, v in self.at.meta.items() if k in ("nn_module_stack", "stack_trace", "custom")}
        fakes = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        mode = next((t.fake_mode for t in pytree.tree_leaves(fakes) if hasattr(t, "fake_mode")), None)
        with mode or torch.no_grad(), enable_python_dispatcher():  # without it some ops fix dynamic sizes
            node.meta["val"] = target(*fakes, **kwargs)
        return node

    def constant(self, value: torch.Tensor, name: str) -> Node:
        name = f"_tq_{name}"
        while hasattr(self.model, name) and not torch.equal(getattr(self.model, name), value):
            name += "_"
        if not hasattr(self.model, name):
            self.model.register_buffer(name, value)
        with self.model.graph.inserting_before(self.at):
            node = self.model.graph.get_attr(name)
        mode = getattr(self.at.meta["val"], "fake_mode", None)
        node.meta["val"] = mode.from_tensor(value, static_shapes=True) if mode is not None else value
        return node

    def scalar(self, value: float) -> Node:
        return self.constant(torch.tensor([value]), f"scalar_{value:g}".replace(".", "_").replace("-", "m"))

    def mean_last(self, x: Node) -> Node:
        """Mean over the last axis, kept: a linear with one output and weights 1/N."""
        n = x.meta["val"].shape[-1]
        return self.call(aten.linear.default, x, self.constant(torch.full((1, n), 1.0 / n), f"mean_{n}"))

    def sum_last(self, x: Node) -> Node:
        n = x.meta["val"].shape[-1]
        return self.call(aten.linear.default, x, self.constant(torch.ones(1, n), f"ones_{n}"))

    def shaped(self, x: Node, like: Node) -> Node:
        """`x` reshaped to the shape of `like`, if it differs."""
        shape = list(like.meta["val"].shape)
        return x if list(x.meta["val"].shape) == shape else self.call(aten.reshape.default, x, shape)


def is_static(*nodes: object) -> bool:
    """Whether all are nodes of float32 tensors with static shapes."""
    return all(
        isinstance(n, Node)
        and isinstance(v := n.meta.get("val"), torch.Tensor)
        and v.dtype == torch.float32
        and all(isinstance(s, int) for s in v.shape)
        for n in nodes
    )


def is_float32(node: object) -> bool:
    """Whether it is a node of a float32 tensor, of whatever shape."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def is_last(dims: Any, x: Node) -> bool:
    """Whether axes of `x` are its last one alone."""
    rank = x.meta["val"].ndim
    dims = [dims] if isinstance(dims, int) else list(dims or [])
    return len(dims) == 1 and dims[0] % rank == rank - 1


def is_aliased(node: Node) -> bool:
    """Whether a write in place is seen by others than the users of its result."""
    schema, x = ops.schema_of(node), node.args[0]
    if schema is None or not schema.is_mutable:
        return False
    made_here = isinstance(x, Node) and x.op == "call_function" and len(x.users) == 1
    return not made_here or ops.schema_of(x) is None or any(r.alias_info for r in ops.schema_of(x).returns)  # type: ignore


Rule = Callable[[Builder, Node], "Node | tuple[Node, ...] | None"]


def apply(model: GraphModule, rules: Mapping[Any, Rule]) -> int:
    """Put what a rule makes of each node that it fits in the node's place; returns how many changed."""
    done = 0
    for node in list(model.graph.nodes):
        rule = rules.get(node.target) if node.op == "call_function" else None
        builder = Builder(model, node)
        replacement = rule(builder, node) if rule is not None else None
        if replacement is None:
            continue
        if isinstance(replacement, Node):
            _replace(model, node, replacement, builder)
        else:
            for user in list(node.users):
                if user.users:
                    _replace(model, user, replacement[user.args[1]], builder)
                else:
                    model.graph.erase_node(user)
            model.graph.erase_node(node)
        done += 1
    model.graph.eliminate_dead_code()
    model.graph.lint()
    model.recompile()
    return done


def _replace(model: GraphModule, node: Node, by: Node, builder: Builder) -> None:
    node.replace_all_uses_with(by)
    model.graph.erase_node(node)
    if by in builder.made:
        by.name = node.name


def used_parts(node: Node) -> set[int]:
    """Which results of an op with several are read."""
    return {user.args[1] for user in node.users if user.users}  # type: ignore[misc]
