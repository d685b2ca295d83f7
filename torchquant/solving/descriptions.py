"""A text for any settings: two that differ in anything have other texts, and one has the same in every process."""

from __future__ import annotations

import types
from collections.abc import Mapping
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import torch

from torchquant.files.tensors import bytes_of
from torchquant.files.whole import digest

__all__ = ["description"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.qscheme)
_OF_MODULES = frozenset(vars(torch.nn.Module()))  # hooks are numbered by how many there were before


def description(value: object, around: tuple[int, ...] = ()) -> str:
    """Settings of an algorithm or observer: values, tensors, containers, functions, and objects with attributes.

    Args:
        around: ids of the objects that this one is described within.
    """
    if isinstance(value, _PLAIN):
        return repr(value)
    if id(value) in around:
        return f"the one {len(around) - around.index(id(value))} around"
    held = _held(value)
    inside = [f"{description(k, around)}: {description(v, (*around, id(value)))}" for k, v in held]
    ordered = sorted(inside) if isinstance(value, (set, frozenset, Mapping)) else inside
    return f"{_name_of(value)}({', '.join(ordered)})"


def _held(value: Any) -> list[tuple[Any, Any]]:
    """What a value consists of, each with its name."""
    if isinstance(value, Enum):
        return [("name", value.name)]
    if isinstance(value, torch.Tensor):
        return [("dtype", value.dtype), ("shape", tuple(value.shape)), ("content", digest(bytes_of(value)))]
    if isinstance(value, np.ndarray):
        return [("dtype", str(value.dtype)), ("shape", value.shape), ("content", digest(value.tobytes()))]
    if isinstance(value, Mapping):
        return [(0, pair) for pair in value.items()]
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if isinstance(value, (set, frozenset)):
        return [(0, v) for v in value]
    if isinstance(value, partial):
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    return _held_by_code(value) if callable(value) or isinstance(value, types.CodeType) else _attributes(value)


def _held_by_code(value: Any) -> list[tuple[Any, Any]]:
    """What a function computes, and from what; a class is what its name says."""
    if isinstance(value, types.CodeType):
        return [("code", value.co_code), ("names", value.co_names), ("constants", value.co_consts)]
    if isinstance(value, types.MethodType):
        return [("function", value.__func__), ("self", value.__self__)]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [("code", value.__code__), ("defaults", value.__defaults__), ("closure", cells)]
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return []
    return _attributes(value)


def _attributes(value: Any) -> list[tuple[Any, Any]]:
    slots = [s for kind in type(value).__mro__ for s in _slots_of(kind)]
    attributes = {name: getattr(value, name) for name in slots if hasattr(value, name)} | _vars_of(value)
    if isinstance(value, torch.nn.Module):
        attributes = {name: held for name, held in attributes.items() if name not in _OF_MODULES or name == "training"}
        attributes |= {**value._parameters, **value._buffers, **value._modules}
    says_what = any("__repr__" in vars(kind) for kind in type(value).__mro__[:-1])  # and not where it lies in memory
    return sorted(attributes.items()) if attributes or not says_what else [("repr", repr(value))]


def _vars_of(value: Any) -> dict[str, Any]:
    """The attributes that an object has of its own."""
    return dict(getattr(value, "__dict__", {}))


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(s for s in slots if s not in ("__dict__", "__weakref__"))


def _name_of(value: Any) -> str:
    kind = value if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
