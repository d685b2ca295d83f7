"""Trees of arguments in files: read without importing what they name."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["UnsafeContentError", "check_tree"]

_FACTORIES = ("bool", "dict", "float", "int", "list", "set", "str", "tuple")


class UnsafeContentError(ValueError):
    """Something in a file that torch would run, or that torch never writes."""


def check_tree(text: object) -> None:
    """Refuse a tree for which `pytree.treespec_loads` would import a module that the tree names.

    Raises:
        UnsafeContentError: it names an enumeration, or a function for a defaultdict that is no built-in type.
        ValueError: it is no JSON.
    """
    if not isinstance(text, str):
        raise UnsafeContentError(f"{text!r:.200} cannot be a tree of arguments")
    _check(json.loads(text))


def _check(value: Any) -> None:
    if isinstance(value, dict):
        module, name = value.get("default_factory_module"), value.get("default_factory_name")
        known = (module, name) == (None, None) or (module == "builtins" and name in _FACTORIES)
        if "__enum__" in value or not known:
            raise UnsafeContentError(f"{str(value)[:200]!r} cannot be part of a tree of arguments: it names a module")
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            _check(part)
    elif isinstance(value, str) and value.lstrip()[:1] in ("{", "["):  # a context is JSON inside JSON
        try:
            inner = json.loads(value)
        except ValueError:
            return
        _check(inner)
