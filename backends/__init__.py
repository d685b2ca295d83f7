"""Targets: a folder each, whose `capabilities.py` holds its `TARGET`; the folder's name is the target's.

Other packages add theirs by an entry point of the group `torchquant.targets`: `name = "package.module:TARGET"`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules
from typing import Any

__all__ = ["names", "target"]

_GROUP = "torchquant.targets"


def names() -> tuple[str, ...]:
    """Of all targets that are installed; nothing of them is imported."""
    return (*_own(), *(name for name in _foreign() if name not in _own()))


def target(name: str) -> Any:
    """The `Target` of a name from `names`."""
    if name in _own():
        return import_module(f"{__name__}.{name}.capabilities").TARGET
    return _foreign()[name].load()


def _own() -> tuple[str, ...]:
    return tuple(sorted(module.name for module in iter_modules(__path__) if module.ispkg))


def _foreign() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=_GROUP)}
