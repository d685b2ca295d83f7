"""Values read from JSON: of the types that their fields say, or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["fits", "made"]

_T = TypeVar("_T")


def made(kind: type[_T], stored: Mapping[str, Any], unchecked: Collection[str] = ()) -> _T:
    """A dataclass of `stored` fields.

    Raises:
        TypeError: a field is missing, or there is one too many.
        ValueError: a field holds something else than its type says.
    """
    value = kind(**stored)
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        field_value = getattr(value, field.name)
        if field.name not in unchecked and not fits(field_value, hints[field.name]):
            raise ValueError(f"{kind.__name__}.{field.name} cannot be {field_value!r:.100}")
    return value


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of a type, as far as fields of frozen values go: containers, unions, literals, classes."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        types = [parts[0]] * len(value) if parts[-1] is ... else parts
        return len(types) == len(value) and all(map(fits, value, types))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if hint in (int, float):
        return type(value) is int or (hint is float and type(value) is float)
    return hint is Any or isinstance(value, hint)
