"""ExecuTorch's passes without the part of their work that changes nothing.

Each of its passes runs the whole graph anew on tensors without data, and a program is made by dozens of passes. With
sizes that vary that takes 95 % of the time. What a node computes is known where the pass before has computed the same
op on the same values; and a pass that only edits the graph needs no run where it has edited nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

__all__ = ["quick_passes"]

_CALLBACKS = (  # what a pass overrides that changes ops while it runs
    *("call_operator", "call_getitem", "call_sym", "call_cond", "call_map", "call_scan", "call_delegate"),
    *("call_function", "call_submodule", "placeholder", "output", "get_attr", "on_attr", "inputs", "_fx"),
)


@contextmanager
def quick_passes() -> Iterator[None]:
    """ExecuTorch's passes, quick until the end of the context; what they return stays the same."""
    from executorch.exir import pass_base

    base, interpreter = pass_base._ExportPassBase, pass_base._ExportPassBase.ExportInterpreter
    ways = _Ways(pass_base)
    patches = [(base, "call", ways.call), (base, "_fx", ways.fx), (interpreter, "run_node", ways.run_node)]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


class _Given:
    """Stands for an interpreter that is asked for one value, which is known."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def call_function(self, *_: Any) -> Any:
        return self.value


class _Ways:
    """The three methods of passes that are replaced, and what they remember.

    Args:
        pass_base: ExecuTorch's module of passes.
    """

    def __init__(self, pass_base: Any) -> None:
        base, self._export_pass, self._proxy = pass_base._ExportPassBase, pass_base.ExportPass, pass_base.ProxyValue
        self._result = pass_base.PassResult
        self._plain: dict[type, bool] = {}
        self._current: dict[int, Node] = {}
        self._computed: weakref.WeakKeyDictionary[Node, tuple[Any, ...]] = weakref.WeakKeyDictionary()
        self._finished: weakref.WeakKeyDictionary[GraphModule, list[Any]] = weakref.WeakKeyDictionary()
        original_call, original_fx, original_run = base.call, base._fx, base.ExportInterpreter.run_node

        def call(self_: Any, graph: GraphModule) -> Any:
            if self._only_edits(type(self_)) and self._finished.get(graph) == _edited(graph):
                return self._result(graph, False)
            result = original_call(self_, graph)
            if result.graph_module is not graph:
                self._forget(graph)
            self._finished[result.graph_module] = _edited(result.graph_module)
            return result

        def fx(self_: Any, kind: str, target: Any, args: Any, kwargs: Any, meta: Any) -> Any:
            node = self._current.get(id(self_)) if kind == "call_function" else None
            known = self._computed.get(node) if node is not None else None
            interpreter = self_.interpreter
            if known is not None and self._is_same(node, known, target, args, kwargs):
                self_.interpreter = _Given(known[-1])
            try:
                value = original_fx(self_, kind, target, args, kwargs, meta)
            finally:
                self_.interpreter = interpreter
            made = value.proxy.node
            if kind == "call_function" and made.meta.get("val") is not None:
                self._computed[made] = (made.args, made.kwargs, self._read((args, kwargs)), value.data)
            return value

        def run_node(self_: Any, node: Node) -> Any:
            self._current[id(self_.callback)] = node
            return original_run(self_, node)

        self.call, self.fx, self.run_node = call, fx, run_node

    def _forget(self, graph: GraphModule) -> None:
        """Let go of a graph that another one has followed; what is known of it would keep it in memory."""
        self._finished.pop(graph, None)
        for node in graph.graph.nodes:
            self._computed.pop(node, None)

    def _only_edits(self, kind: type) -> bool:
        """Whether a pass changes the graph before it runs it, and nothing while it does."""
        if kind not in self._plain:
            plain = [getattr(kind, name, None) is getattr(self._export_pass, name, None) for name in _CALLBACKS]
            self._plain[kind] = all(plain)
        return self._plain[kind]

    def _is_same(self, node: Any, known: tuple[Any, ...], target: Any, args: Any, kwargs: Any) -> bool:
        """Whether `target` on these values is what the node was computed as."""
        if getattr(target, "_op", target) is not getattr(node.target, "_op", node.target):
            return False
        if not _alike(node.meta.get("val"), known[-1]) or (node.args, node.kwargs) != known[:2]:
            return False
        return _matches(self._read((args, kwargs)), known[2])

    def _read(self, arguments: Any) -> Any:
        """What a pass computes with, in the place of what stands for it."""
        return pytree.tree_map_only(self._proxy, lambda proxy: proxy.data, arguments)


def _matches(given: Any, recorded: Any) -> bool:
    """Whether arguments are those that were recorded: values without data alike, all others equal."""
    if isinstance(recorded, (tuple, list)):
        same = isinstance(given, (tuple, list)) and len(given) == len(recorded)
        return same and all(map(_matches, given, recorded))
    if isinstance(recorded, dict):
        return given.keys() == recorded.keys() and all(_matches(given[k], v) for k, v in recorded.items())
    if isinstance(recorded, (torch.Tensor, torch.SymInt)):
        return _alike(given, recorded)
    return type(given) is type(recorded) and bool(given == recorded)


def _alike(a: Any, b: Any) -> bool:
    """Whether two values without data are the same to every op."""
    if a is b:
        return True
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return a.node.shape_env is b.node.shape_env and bool(a.node.expr == b.node.expr)
    if not isinstance(a, FakeTensor) or not isinstance(b, FakeTensor):
        return type(a) is type(b) and isinstance(a, (int, float, bool)) and a == b
    same = a.fake_mode is b.fake_mode and a.dtype == b.dtype and a.device == b.device and a.layout == b.layout
    return (
        same and a.constant is b.constant and _alike(tuple(a.shape), tuple(b.shape)) and _alike(a.stride(), b.stride())
    )


class _Same:
    """A value that equals itself alone."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


def _edited(graph: GraphModule) -> list[Any]:
    """What an edit of a graph changes: its nodes, and what its inputs stand for."""
    inputs = [_Same(n.meta.get("val")) for n in graph.graph.nodes if n.op == "placeholder"]
    return [*inputs, *((n, n.op, n.target, n.args, n.kwargs) for n in graph.graph.nodes)]
