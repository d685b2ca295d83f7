"""Nodes of a prepared graph at work: as the float function, or as convert will quantize it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from torchquant.fx import ops
from torchquant.fx.grids import fake_quantizer
from torchquant.fx.reading import observer_of

__all__ = ["FLOAT_BIAS", "Env", "Evaluator", "Fake", "Flow", "Known", "mutates"]

Flow = Literal["float", "quantized"]
FLOAT_BIAS = "torchquant_float_bias"  # meta key of a corrected bias: the attribute that held the float one, or None
Env = dict[Node, Any]
Fake = Callable[[torch.Tensor], torch.Tensor]
Known = dict[tuple[int, torch.Size], tuple[torch.nn.Module, Fake]]


class Evaluator:
    """Runs nodes of a prepared graph: as the float function, or as convert will quantize it.

    Args:
        prepared: the graph; its observers hold the grids.
        flow: `float` skips observers and reads the biases that stood there before any correction.
        weights: weight observer node -> tensor to use in its place (a solver's trial).
        fakes: activation observer's target -> function to use in its place.
        biases: op node -> bias to use in its place.
        known: what is known of observers already, shared between evaluators of one graph.
    """

    def __init__(
        self,
        prepared: GraphModule,
        flow: Flow,
        *,
        weights: Mapping[Node, torch.Tensor] | None = None,
        fakes: Mapping[str, Fake] | None = None,
        biases: Mapping[Node, torch.Tensor] | None = None,
        known: Known | None = None,
    ) -> None:
        self._prepared, self._flow = prepared, flow
        self._weights, self._fakes, self._biases = weights or {}, fakes or {}, biases or {}
        self._known: Known = {} if known is None else known
        self._constants: dict[Node, Any] = {}

    def run(self, nodes: Sequence[Node], env: Env) -> Env:
        """Evaluate the nodes in order; `env` holds the values they read from outside and is filled."""
        for node in nodes:
            env[node] = self._node(node, env)
        return env

    def value(self, of: Any, env: Env) -> Any:
        """Arguments with the values of their nodes."""
        return torch.fx.node.map_arg(of, lambda n: env[n] if n in env else self._constant(n))

    def _node(self, node: Node, env: Env, remember: bool = True) -> Any:
        if node.op == "call_module":
            observer = observer_of(self._prepared, node)
            if observer is not None:
                value = self.value(node.args[0], env)
                return value if self._flow == "float" else self._fake(node, observer, value, remember)(value)
            return self._prepared.get_submodule(str(node.target))(*self.value(node.args, env))
        args, kwargs = self.value(node.args, env), self.value(node.kwargs, env)
        if node in self._biases:
            args = (*args[:2], self._biases[node].to(args[1].dtype), *args[3:])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        target: Any = node.target
        if mutates(node):
            args = (args[0].clone(), *args[1:])
        return target(*args, **kwargs)

    def _fake(self, node: Node, observer: torch.nn.Module, value: torch.Tensor, remember: bool) -> Fake:
        if str(node.target) in self._fakes:
            return self._fakes[str(node.target)]
        if not remember:
            return fake_quantizer(observer, value.shape)
        key = (id(observer), value.shape)
        if key not in self._known:
            self._known[key] = observer, fake_quantizer(observer, value.shape)
        return self._known[key][1]

    def _constant(self, node: Node) -> Any:
        if node in self._weights:
            return self._weights[node].to(self._constant(node.all_input_nodes[0]).dtype)
        if node not in self._constants:
            self._constants[node] = self._evaluate(node)
        return self._constants[node]

    def _evaluate(self, node: Node) -> Any:
        with torch.no_grad():
            if node.op == "get_attr":
                if self._flow == "float" and FLOAT_BIAS in node.meta:
                    name = node.meta[FLOAT_BIAS]
                    return None if name is None else _attribute(self._prepared, name)
                return _attribute(self._prepared, str(node.target))
            observer: Any = observer_of(self._prepared, node)
            if observer is not None and self._flow == "quantized" and hasattr(observer, "values"):
                return observer.values().to(self._constant(node.all_input_nodes[0]).dtype)
            return self._node(node, {}, remember=False)  # once, and there are as many grids as weights


def _attribute(model: GraphModule, name: str) -> Any:
    """What `name`, a path, stands for; tensors detached."""
    value: Any = model
    for part in name.split("."):
        value = getattr(value, part)
    return value.detach() if isinstance(value, torch.Tensor) else value


def mutates(node: Node) -> bool:
    """Whether a node writes into its first operand."""
    schema = ops.schema_of(node)
    return schema is not None and schema.is_mutable and bool(node.args)
