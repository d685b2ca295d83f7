"""How a graph is called: which argument each of its inputs is, in any order of names and keys, and what it returns."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from torchquant.errors import InputError
from torchquant.fx.inputs import Constant, InputSpec, Size, input_from, input_of
from torchquant.fx.trees import check_tree

__all__ = ["Constant", "InputSpec", "Signature", "Size", "placeholders"]


def placeholders(model: GraphModule) -> list[Node]:
    return [n for n in model.graph.nodes if n.op == "placeholder"]


@dataclass(frozen=True)
class Signature:
    """How a graph is called and what it returns.

    Args:
        inputs: for each leaf of the arguments what it must be, in the order of the graph's placeholders.
        parameters: names of the arguments, those given by position at export first.
        in_spec: the tree of (args, kwargs).
        out_spec: the tree of the outputs, or None where they are returned as the graph makes them.
        fixed_outputs: leaf of the outputs -> its value, where that is no tensor.
    """

    inputs: tuple[InputSpec | Constant, ...]
    parameters: tuple[str, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec | None = None
    fixed_outputs: Mapping[int, Any] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(model: GraphModule) -> Signature:
        """The signature of an exported, prepared or converted graph, or of any other with plain inputs."""
        inputs = tuple(input_of(node) for node in placeholders(model))
        about = getattr(model.graph._codegen, "pytree_info", None)
        in_spec = getattr(about, "in_spec", None) or getattr(model, "_in_spec", None)
        out_spec = getattr(about, "out_spec", None) or getattr(model, "_out_spec", None)
        if in_spec is None or in_spec.num_leaves != len(inputs):
            in_spec = pytree.tree_structure((tuple(range(len(inputs))), {}))
        positional, keywords = in_spec.children()
        names = list(getattr(about, "orig_args", None) or [])[: positional.num_children]
        if len(names) < positional.num_children:
            one_each = positional.num_children == len(inputs)
            names = [s.name if one_each else f"argument {i}" for i, s in enumerate(inputs[: positional.num_children])]
        outputs = next(n for n in model.graph.nodes if n.op == "output").args[0]
        leaves = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        if out_spec is not None and out_spec.num_leaves != len(leaves):
            out_spec = None
        fixed = {i: v for i, v in enumerate(leaves) if not isinstance(v, Node)}
        return Signature(inputs, (*names, *_keys_of(keywords)), in_spec, out_spec, fixed)

    @staticmethod
    def flat(inputs: Iterable[InputSpec]) -> Signature:
        """Of a function of tensors by position."""
        specs = tuple(inputs)
        return Signature(specs, tuple(s.name for s in specs), pytree.tree_structure((tuple(range(len(specs))), {})))

    @property
    def tensors(self) -> tuple[InputSpec, ...]:
        """The inputs that are tensors."""
        return tuple(s for s in self.inputs if isinstance(s, InputSpec))

    # calling -----------------------------------------------------------------------------------------------------

    def leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any], batch: str = "the input") -> list[Any]:
        """The leaves of a call in the order of the placeholders, checked.

        Arguments may be given by position or by name, whichever way they were given at export, dicts with their keys in
        any order. Instead, all tensors may be given by the names of the inputs.

        Raises:
            InputError: a missing, surplus or unknown argument, another structure, or a value that does not fit.
        """
        leaves = self._by_leaf_name(args, kwargs)
        if leaves is None:
            leaves = []
            for name, spec, value in self._pairs(args, kwargs, batch):
                leaves += _flatten(value, spec, f"{batch}, argument {name!r}")
        symbols: dict[str, tuple[int, str]] = {}
        for value, wanted in zip(leaves, self.inputs, strict=True):
            if isinstance(wanted, InputSpec):
                wanted.check(value, batch, symbols)
            else:
                wanted.check(value, batch)
        return leaves

    def tensors_of(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], device: str | None = None
    ) -> list[torch.Tensor]:
        """The tensors of a call in the order of the placeholders; raises as `leaves`.

        Args:
            device: the kind of device that they must lie on, e.g. `cpu`; None: any.
        """
        leaves = self.leaves(args, kwargs)
        for value, wanted in zip(leaves, self.inputs, strict=True):
            if device is not None and isinstance(wanted, InputSpec) and value.device.type != device:
                raise InputError(f"input {wanted.name!r} lies on {value.device}; the program runs on {device}: move it")
        return [v for v, wanted in zip(leaves, self.inputs, strict=True) if isinstance(wanted, InputSpec)]

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) as at export, of leaves in order."""
        args, kwargs = pytree.tree_unflatten(list(leaves), self.in_spec)
        return tuple(args), dict(kwargs)

    def outputs(self, values: Sequence[Any]) -> Any:
        """The outputs as the model returns them, of its tensors in order."""
        rest = iter(values)
        count = len(values) + len(self.fixed_outputs)
        leaves = [self.fixed_outputs[i] if i in self.fixed_outputs else next(rest) for i in range(count)]
        if self.out_spec is not None:
            return pytree.tree_unflatten(leaves, self.out_spec)
        return leaves[0] if len(leaves) == 1 else tuple(leaves)

    def _by_leaf_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """The leaves, if all tensors are given by the names of the inputs and those are not the arguments' names."""
        names = {s.name for s in self.tensors}
        if args or not kwargs or set(kwargs) != names or set(kwargs) <= set(self.parameters):
            return None
        return [kwargs[s.name] if isinstance(s, InputSpec) else s.value for s in self.inputs]

    def _pairs(self, args: Sequence[Any], kwargs: Mapping[str, Any], batch: str) -> list[tuple[str, Any, Any]]:
        """(name, tree, value) of each argument in order."""
        positional, keywords = self.in_spec.children()
        specs = [*positional.children(), *keywords.children()]
        listed = ", ".join(self.parameters)
        if len(args) > len(specs):
            hint = "; if a batch holds a label too, leave it out, e.g. [x for x, _ in loader]" if len(args) == 2 else ""
            raise InputError(f"{batch} has {len(args)} arguments, the model takes {len(specs)}: {listed}{hint}")
        arguments = dict(zip(self.parameters, args, strict=False))
        unknown = [k for k in kwargs if k not in self.parameters]
        twice = [k for k in kwargs if k in arguments]
        if unknown or twice:
            text = f"the model has no argument {unknown[0]!r}" if unknown else f"argument {twice[0]!r} is given twice"
            raise InputError(f"{batch}: {text}; it takes {listed}")
        arguments |= kwargs
        for name, spec in zip(self.parameters, specs, strict=True):
            if name not in arguments and not self._is_none(name):
                raise InputError(
                    f"{batch} has no {name!r}: the model takes {listed}"
                    + ("" if spec.num_leaves else "; give an empty one")
                )
        return [(name, spec, arguments.get(name)) for name, spec in zip(self.parameters, specs, strict=True)]

    def _is_none(self, parameter: str) -> bool:
        return any(isinstance(s, Constant) and s.value is None and s.name == parameter for s in self.inputs)

    # storing -----------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads. Trees of types that cannot be stored become dicts and tuples."""
        return {
            "inputs": [{"kind": type(s).__name__, **asdict(s)} for s in self.inputs],
            "parameters": list(self.parameters),
            "in_spec": _dumped(self.in_spec),
            "out_spec": None if self.out_spec is None else _dumped(self.out_spec),
            "fixed_outputs": [[i, v] for i, v in self.fixed_outputs.items()],
        }

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> Signature:
        """Read what `to_json` gave; raises KeyError, TypeError or ValueError for anything else."""
        return Signature(
            tuple(input_from(s) for s in stored["inputs"]),
            tuple(map(str, stored["parameters"])),
            _loaded(stored["in_spec"]),
            None if stored["out_spec"] is None else _loaded(stored["out_spec"]),
            {int(i): v for i, v in stored["fixed_outputs"]},
        )


def _flatten(value: Any, spec: pytree.TreeSpec, where: str) -> list[Any]:
    """The leaves of `value` in the order of `spec`."""
    if spec.is_leaf():
        return [value]
    keys = _keys_of(spec)
    if keys is not None:
        if not isinstance(value, Mapping) or set(value) != set(keys):
            actual = f"one with {sorted(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__
            raise InputError(f"{where}: expected a dict with the keys {list(keys)}, got {actual}")
        names, parts = [repr(k) for k in keys], [value[k] for k in keys]
    else:
        parts = _parts(value, spec, where)
        names = [str(i) for i in range(len(parts))]
    if len(parts) != spec.num_children:
        raise InputError(f"{where}: expected {spec.num_children} elements, got {len(parts)}")
    pairs = zip(names, parts, spec.children(), strict=True)
    return [leaf for name, part, s in pairs for leaf in _flatten(part, s, f"{where}[{name}]")]


def _keys_of(spec: pytree.TreeSpec) -> Any:
    """The keys of a dict's tree, in order; None for any other."""
    if spec.type in (dict, OrderedDict):
        return list(spec.context)
    return list(spec.context[1]) if spec.type is defaultdict else None


def _parts(value: Any, spec: pytree.TreeSpec, where: str) -> list[Any]:
    """The children of a value that is no dict."""
    kind = spec.type
    if kind in (tuple, list, namedtuple) and isinstance(value, (tuple, list)):
        return list(value)
    if kind in pytree.SUPPORTED_NODES and type(value) is kind:
        parts, context = pytree.SUPPORTED_NODES[kind].flatten_fn(value)
        if context == spec.context:
            return list(parts)
        raise InputError(f"{where}: a {kind.__name__} of another structure than at export")
    raise InputError(f"{where}: expected a {getattr(kind, '__name__', kind)}, got {type(value).__name__}")


def _dumped(spec: pytree.TreeSpec) -> dict[str, str | None]:
    """A tree as text, and as one of dicts and tuples alone, for where its types are not registered."""
    try:
        exact: str | None = pytree.treespec_dumps(spec)
    except (NotImplementedError, TypeError, ValueError):
        exact = None
    return {"exact": exact, "plain": pytree.treespec_dumps(_plain(spec))}


def _loaded(stored: Mapping[str, str | None]) -> pytree.TreeSpec:
    for text in filter(None, stored.values()):
        check_tree(text)
    try:
        return pytree.treespec_loads(stored["exact"] or "")
    except (NotImplementedError, TypeError, ValueError):
        return pytree.treespec_loads(str(stored["plain"]))


def _plain(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """The tree with dicts for whatever has named parts and tuples for all else."""
    if spec.is_leaf():
        return spec
    children = [_plain(child) for child in spec.children()]
    if spec.type in (list, tuple):
        return pytree.TreeSpec(spec.type, None, children)
    keys, context = _keys_of(spec), spec.context
    if keys is None and isinstance(context, (list, tuple)):  # of a registered dataclass, of a Hugging Face output
        keys = next((c for c in (context, *context[:1]) if isinstance(c, (list, tuple)) and _names(c, children)), None)
    if keys is None:
        return pytree.TreeSpec(tuple, None, children)
    return pytree.TreeSpec(dict, [k if isinstance(k, (str, int)) else str(k) for k in keys], children)


def _names(keys: Sequence[Any], children: Sequence[Any]) -> bool:
    return len(keys) == len(children) and all(isinstance(k, str) for k in keys)
