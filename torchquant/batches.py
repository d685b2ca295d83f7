"""Calibration and example data: how a batch is written, and whether it fits a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from torchquant.errors import CalibrationError, InputError

Batch = torch.Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]


def split(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as (args, kwargs): a tensor is one argument, a tuple or list all of them, a dict keyword ones."""
    if isinstance(batch, dict):
        return (), batch
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    raise InputError(
        f"a batch is a tensor, a tuple of arguments or a dict of keyword arguments, not {type(batch).__name__}"
    )


def call(model: Any, batch: Any) -> Any:
    """Run a model on one batch."""
    args, kwargs = split(batch)
    return model(*args, **kwargs)


def flatten(batch: Any) -> list[Any]:
    """The batch's leaves in argument order (keyword arguments as given)."""
    return pytree.tree_leaves(split(batch))


def in_order(model: GraphModule, batch: Any) -> list[Any]:
    """The batch's leaves in the order of the graph's placeholders."""
    if isinstance(batch, dict):
        names = [str(n.target) for n in placeholders(model)]
        if set(names) == set(batch):
            return [batch[n] for n in names]
    return flatten(batch)


def placeholders(model: GraphModule) -> list[Node]:
    return [n for n in model.graph.nodes if n.op == "placeholder"]


@dataclass(frozen=True)
class InputSpec:
    """What one input of a graph or program must be: a tensor of `dtype` and `shape` (None: any size)."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def check(self, value: Any, batch: str) -> None:
        """Raise InputError unless `value` is such a tensor."""
        where = f"{batch}, input {self.name!r}"
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{where}: expected a tensor, got {type(value).__name__}")
        if str(value.dtype) != self.dtype:
            raise InputError(f"{where}: expected {self.dtype}, got {value.dtype}; convert the data, or export with it")
        if len(value.shape) != len(self.shape) or any(
            want not in (None, got) for want, got in zip(self.shape, value.shape, strict=True)
        ):
            wanted = ", ".join("any" if s is None else str(s) for s in self.shape)
            raise InputError(
                f"{where}: expected shape ({wanted}), got {tuple(value.shape)}. To accept several sizes, export "
                "with dynamic_shapes, e.g. {'x': {0: torch.export.Dim('batch')}}."
            )


def input_specs(model: GraphModule) -> tuple[InputSpec, ...]:
    """One InputSpec for each placeholder that is a tensor, in order."""
    fakes = [(str(n.target), n.meta.get("val")) for n in placeholders(model)]
    return tuple(
        InputSpec(name, str(v.dtype), tuple(s if isinstance(s, int) else None for s in v.shape))
        for name, v in fakes
        if isinstance(v, torch.Tensor)
    )


def arrange(specs: Sequence[InputSpec], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The tensors of a call in the order of `specs`: positional ones first, the others by name.

    Raises:
        InputError: too many, too few, an unknown name, or a tensor that does not fit.
    """
    names = [spec.name for spec in specs]
    given = [v for v in pytree.tree_leaves(tuple(args)) if isinstance(v, torch.Tensor)]
    rest = names[len(given) :]
    if kwargs and set(kwargs) == set(rest):
        given += [kwargs[name] for name in rest]
    else:
        unknown = sorted(set(kwargs) - set(names))
        if unknown and all(isinstance(v, torch.Tensor) for v in kwargs.values()):
            raise InputError(f"the model has no inputs {', '.join(unknown)}; it takes {', '.join(names)}")
        given += [v for v in pytree.tree_leaves(dict(kwargs)) if isinstance(v, torch.Tensor)]
    if len(given) != len(specs):
        raise InputError(f"the input has {len(given)} tensors, the model takes {len(specs)}: {', '.join(names)}")
    for value, spec in zip(given, specs, strict=True):
        spec.check(value, "the input")
    return given


def check(specs: Sequence[InputSpec], batch: Any, name: str = "the input") -> None:
    """Raise InputError if `batch` does not fit: count, type, dtype, rank or a static size."""
    names = [spec.name for spec in specs]
    if isinstance(batch, dict) and set(batch) == set(names):
        given = [batch[n] for n in names]
    else:
        given = [v for v in flatten(batch) if v is not None and not isinstance(v, (bool, int, float, str))]
    if len(given) != len(specs):
        raise InputError(f"{name} has {len(given)} tensors, the model takes {len(specs)}: {', '.join(names)}")
    for value, spec in zip(given, specs, strict=True):
        spec.check(value, name)


def checked(model: GraphModule, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches one by one, each checked against the graph.

    Raises:
        InputError: `batches` is a single tensor or not iterable, or a batch does not fit.
        CalibrationError: there is no batch at all, or one holds NaN.
    """
    if isinstance(batches, (torch.Tensor, dict, str)) or not isinstance(batches, Iterable):
        raise InputError(f"batches is an iterable of batches, not a single {type(batches).__name__}; wrap it: [batch]")
    count, specs = 0, input_specs(model)
    for count, batch in enumerate(batches, start=1):
        check(specs, batch, f"batch {count - 1}")
        for value in flatten(batch):
            # infinity is refused where it is observed: a mask of minus infinity is a legitimate input
            if isinstance(value, torch.Tensor) and value.is_floating_point() and bool(value.isnan().any()):
                raise CalibrationError(f"batch {count - 1} holds NaN")
        yield batch
    if count == 0:
        raise CalibrationError("there is no calibration batch: the iterable is empty (or was used up before)")


def example_of(model: GraphModule) -> Any:
    """One batch made up from the graph's input shapes: standard normal floats, integer ones.

    Raises:
        InputError: an input has no recorded shape.
    """
    leaves = [_example_value(node) for node in placeholders(model)]
    spec = getattr(model, "_in_spec", None)
    if spec is None:
        return tuple(leaves)
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    if args and kwargs:
        return (*args, *kwargs.values())
    return kwargs or args


def _example_value(node: Node) -> Any:
    fake = node.meta.get("val")
    if not isinstance(fake, torch.Tensor):
        if fake is None or isinstance(fake, (int, float, bool, str)):
            return fake
        raise InputError(f"input {node.name!r} has no recorded shape; pass example_inputs")
    shape = [s if isinstance(s, int) else s.node.hint or 2 for s in fake.shape]
    if fake.is_floating_point():
        return torch.randn(shape, dtype=fake.dtype, generator=torch.Generator().manual_seed(0))
    return torch.ones(shape, dtype=fake.dtype)


def contiguous(batch: Any) -> Any:
    """The batch with contiguous tensors: an export remembers the layout of its example."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, batch)


def below_bounds(model: GraphModule, batch: Any) -> Any:
    """The batch cut by one wherever a dynamic size is at its upper bound: there a compiler may fix the size."""
    leaves, structure = pytree.tree_flatten(batch)
    nodes = placeholders(model)
    if len(leaves) != len(nodes) or isinstance(batch, dict):
        return batch
    return pytree.tree_unflatten([_below(v, n.meta.get("val")) for v, n in zip(leaves, nodes, strict=True)], structure)


def _below(value: Any, fake: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not isinstance(fake, torch.Tensor):
        return value
    for axis, size in enumerate(fake.shape):
        if isinstance(size, torch.SymInt) and value.shape[axis] > 2:
            upper = size.node.shape_env.bound_sympy(size.node.expr).upper
            if upper == value.shape[axis]:
                value = value.narrow(axis, 0, value.shape[axis] - 1)
    return value.contiguous()


def dynamic_shapes_of(model: GraphModule, batch: Any) -> Any:
    """The `dynamic_shapes` that exporting the graph on `batch` again needs to keep its dynamic sizes."""
    leaves = [_dynamic_dims(node) for node in placeholders(model)]
    if not any(leaves):
        return None
    args, kwargs = split(batch)
    structure = pytree.tree_structure((args, kwargs))
    dims_args, dims_kwargs = pytree.tree_unflatten(leaves, structure)
    return {**dims_kwargs} if kwargs and not args else tuple(dims_args)


def _dynamic_dims(node: Node) -> dict[int, Any]:
    fake = node.meta.get("val")
    if not isinstance(fake, torch.Tensor):
        return {}
    return {i: torch.export.Dim.AUTO for i, s in enumerate(fake.shape) if not isinstance(s, int)}
