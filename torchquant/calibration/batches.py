"""Calibration and example data: how a batch is written, and whether it fits a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from torchquant.calibration.parallel import anywhere
from torchquant.errors import CalibrationError, InputError
from torchquant.fx import ops
from torchquant.fx.signature import InputSpec, Signature, placeholders

Batch = torch.Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]


@dataclass(frozen=True)
class Steps:
    """Batches that follow one another in time, for a model with state: it starts anew before the first of them.

    Each other batch starts from the state that the model was exported with.

    Args:
        batches: in the order of time, each as `example_inputs` of `export`.
    """

    batches: Sequence[Any]


@dataclass(frozen=True)
class Given:
    """A batch as a graph takes it: leaves in the order of its placeholders, and the state that it starts from.

    `state`: name of a buffer -> value; empty: what the graph holds.
    """

    leaves: tuple[Any, ...]
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)


def split(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as (args, kwargs): a tensor is one argument, a tuple or list all of them, a dict keyword ones."""
    if isinstance(batch, dict):
        return (), batch
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    hint = "; wrap arrays with torch.from_numpy" if type(batch).__module__ == "numpy" else ""
    raise InputError(
        f"a batch is a tensor, a tuple of arguments or a dict of keyword arguments, not {type(batch).__name__}{hint}"
    )


def flatten(batch: Any) -> list[Any]:
    """The batch's leaves as they come; `leaves_of` gives them in the order of a graph's inputs."""
    return pytree.tree_leaves(split(batch))


def call(model: Any, batch: Any) -> Any:
    """Run a model on one batch; a graph takes its arguments in any order of names and keys."""
    if isinstance(model, GraphModule):
        signature = Signature.of(model)
        args, kwargs = signature.arguments(given(signature, batch).leaves)
    else:
        args, kwargs = split(batch)
    return model(*args, **kwargs)


def leaves_of(signature: Signature, batch: Any, name: str = "the input") -> list[Any]:
    """The batch's leaves in the order of the graph's placeholders; raises InputError if it does not fit."""
    args, kwargs = split(batch)
    return signature.leaves(args, kwargs, name)


def given(signature: Signature, batch: Any, name: str = "the input") -> Given:
    """The batch as the graph takes it; raises InputError if it does not fit."""
    return batch if isinstance(batch, Given) else Given(tuple(leaves_of(signature, batch, name)))


def input_specs(model: GraphModule) -> tuple[InputSpec, ...]:
    """One InputSpec for each placeholder that is a tensor, in order."""
    return Signature.of(model).tensors


def checked(model: GraphModule, batches: Iterable[Any]) -> Iterator[Given | Steps]:
    """The batches one by one, each checked against the graph, as the graph takes them.

    Raises:
        InputError: `batches` is a single tensor or not iterable, or a batch does not fit.
        CalibrationError: there is no batch at all, in any process, or one holds NaN.
    """
    if isinstance(batches, (torch.Tensor, dict, str, Steps)) or not isinstance(batches, Iterable):
        raise InputError(f"batches is an iterable of batches, not a single {type(batches).__name__}; wrap it: [batch]")
    count, signature = 0, Signature.of(model)
    for count, batch in enumerate(batches, start=1):
        name = f"batch {count - 1}"
        if isinstance(batch, Steps):
            steps = [_finite(given(signature, b, f"{name}, step {i}"), name) for i, b in enumerate(batch.batches)]
            yield Steps(steps)
        else:
            yield _finite(given(signature, batch, name), name)
    if not anywhere(count > 0):  # a process may be left without, if there are more of them than batches
        raise CalibrationError("there is no calibration batch: the iterable is empty (or was used up before)")


def listed(batches: Any, name: str) -> list[Any]:
    """Batches that are looked at more than once.

    Raises:
        InputError: `batches` is no iterable of them. CalibrationError: there is none.
    """
    if isinstance(batches, (torch.Tensor, dict, str, Steps)) or not isinstance(batches, Iterable):
        raise InputError(f"{name} is an iterable of batches, not a single {type(batches).__name__}; wrap it: [batch]")
    kept = list(batches)
    if not anywhere(bool(kept)):  # a process may be left without
        raise CalibrationError(f"{name} holds no calibration batch: the iterable is empty (or was used up before)")
    return kept


def each(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, those of `Steps` one after the other."""
    for batch in batches:
        yield from batch.batches if isinstance(batch, Steps) else [batch]


def _finite(batch: Given, name: str) -> Given:
    # infinity is refused where it is observed: a mask of minus infinity is a legitimate input
    for value in batch.leaves:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and bool(value.isnan().any()):
            raise CalibrationError(f"{name} holds NaN")
    return batch


def example_of(model: GraphModule) -> Any:
    """One batch made up from the graph's input shapes: standard normal floats, integer ones.

    Raises:
        InputError: an input has no recorded shape.
    """
    args, kwargs = Signature.of(model).arguments([_example_value(node) for node in placeholders(model)])
    if args and kwargs:
        return (*args, *kwargs.values())
    return kwargs or args


def _example_value(node: Node) -> Any:
    fake = node.meta.get("val")
    if not isinstance(fake, torch.Tensor):
        return fake
    shape = [s if isinstance(s, int) else s.node.hint or 2 for s in fake.shape]
    if fake.is_floating_point() or fake.is_complex():
        return torch.randn(shape, dtype=fake.dtype, generator=torch.Generator().manual_seed(0))
    return torch.ones(shape, dtype=fake.dtype)


def contiguous(batch: Any) -> Any:
    """The batch with contiguous tensors: an export remembers the layout of its example."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, batch)


# sizes that vary -----------------------------------------------------------------------------------------------------


def to_export(signature: Signature, leaves: Sequence[Any]) -> list[Any]:
    """The leaves with other sizes where exporting on these would fix a size that varies.

    torch.export and compilers take sizes of 0 and 1, and one at its upper bound, for constants. Tensors are repeated or
    cut, so that what indexes stays an index.
    """
    sizes = [s for spec in signature.tensors for s in spec.sizes if s is not None]
    largest = {s.symbol: s.symbol_at(s.maximum) for s in sizes if s.maximum is not None}
    wanted: dict[str, int] = {}
    for value, spec in zip(leaves, signature.inputs, strict=True):
        for axis, size in enumerate(spec.sizes if isinstance(spec, InputSpec) else ()):
            if size is not None and (symbol_value := size.symbol_at(value.shape[axis])) is not None:
                most = largest.get(size.symbol)
                symbol_value = symbol_value - 1 if symbol_value == most and symbol_value > 2 else symbol_value
                wanted[size.symbol] = max(symbol_value, 2) if most is None or most >= 2 else symbol_value
    return [_resized(v, spec, wanted) for v, spec in zip(leaves, signature.inputs, strict=True)]


def with_first_sizes(signature: Signature, leaves: Sequence[Any], value: int) -> list[Any] | None:
    """The leaves with `value` for the first size that varies; None if none does, or it may not be that."""
    sizes = [s for spec in signature.tensors for s in spec.sizes[:1] if s is not None]
    if not sizes:
        return None
    chosen = [s for spec in signature.tensors for s in spec.sizes if s is not None and s.symbol == sizes[0].symbol]
    if any(s.at(value) < s.minimum or s.at(value) > (s.maximum or s.at(value)) for s in chosen):
        return None
    return [_resized(v, spec, {sizes[0].symbol: value}) for v, spec in zip(leaves, signature.inputs, strict=True)]


def with_largest_sizes(signature: Signature, leaves: Sequence[Any], limit: int) -> list[Any] | None:
    """The leaves with the largest sizes that their bounds allow, or of `limit` elements at most.

    None if no size varies between known bounds, or none becomes larger.
    """
    most: dict[str, int] = {}
    present: dict[str, int] = {}
    for spec, value in zip(signature.inputs, leaves, strict=True):
        for axis, size in enumerate(spec.sizes if isinstance(spec, InputSpec) else ()):
            symbol_value = size.symbol_at(value.shape[axis]) if size is not None else None
            if size is None or symbol_value is None or size.maximum is None:
                continue
            bound = (size.maximum - size.offset) // size.factor
            most[size.symbol] = min(bound, most.get(size.symbol, bound))
            present[size.symbol] = symbol_value
    while any(most[s] > present[s] for s in most):
        larger = [_resized(v, spec, most) for v, spec in zip(leaves, signature.inputs, strict=True)]
        if sum(v.numel() for v in larger if isinstance(v, torch.Tensor)) <= limit:
            return larger
        most = {s: max(present[s], most[s] // 2) for s in most}
    return None


def _resized(value: Any, spec: Any, wanted: dict[str, int]) -> Any:
    """A tensor with the sizes that go with the symbols' wanted values."""
    for axis, size in enumerate(spec.sizes if isinstance(spec, InputSpec) else ()):
        if size is not None and size.symbol in wanted:
            target, present = size.at(wanted[size.symbol]), value.shape[axis]
            if present and target != present:
                value = value.index_select(axis, torch.arange(target, device=value.device) % present)
    return value


def dynamic_shapes_of(signature: Signature) -> Any:
    """The `dynamic_shapes` that exporting the graph again needs to keep the sizes that vary, and their bounds."""
    leaves = [_dims_of(spec) if isinstance(spec, InputSpec) else None for spec in signature.inputs]
    if not any(leaves):
        return None
    args, kwargs = signature.arguments(leaves)
    return dict(zip(signature.parameters, (*args, *kwargs.values()), strict=True)) if kwargs else tuple(args)


def _dims_of(spec: InputSpec) -> dict[int, Any]:
    dims = {}
    for axis, (fixed, size) in enumerate(zip(spec.shape, spec.sizes, strict=True)):
        if fixed is None:
            maximum = size.maximum if size is not None else None
            dims[axis] = torch.export.Dim.AUTO if maximum is None else torch.export.Dim.AUTO(max=maximum)
    return dims


def own_inputs(model: GraphModule, batch: Given) -> Given:
    """The batch with copies of what the graph writes into."""
    written = [ops.is_overwritten(node) for node in placeholders(model)]
    if not any(written):
        return batch
    pairs = zip(batch.leaves, written, strict=True)
    return Given(tuple(v.clone() if w and isinstance(v, torch.Tensor) else v for v, w in pairs), batch.state)
