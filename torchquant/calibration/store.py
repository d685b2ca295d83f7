"""Values kept between the nodes of a walk, within a budget of memory."""

from __future__ import annotations

import math
import os
import tempfile
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchquant.errors import ArtifactError
from torchquant.files.freed import CAN_GIVE_BACK, give_back
from torchquant.files.owned import OwnFolder
from torchquant.files.whole import reading

__all__ = ["Store", "give_back"]

_LEAST_FREED, _MOST_FREED = 1 << 20, 1 << 26


class Store:
    """Values by key; over `budget_bytes` of tensors in memory the oldest lie on disk, in a folder of its own.

    Where the process has grown by more than the budget since the store was made, freed memory goes back to the system.

    Args:
        budget_bytes: None keeps everything in memory.
    """

    def __init__(self, budget_bytes: int | None = None) -> None:
        self._budget = math.inf if budget_bytes is None else budget_bytes
        self._kept: OrderedDict[Any, Any] = OrderedDict()
        self._spilled: dict[Any, Path] = {}
        self._folder: OwnFolder | None = None
        self._bytes = self._named = 0
        self.spilled_bytes = 0
        self._freed = _Freed(self._budget)

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a value (tensors, or tuples and lists of them) under a key that is not in use."""
        self._freed.give_back()
        value = pytree.tree_map_only(torch.Tensor, _compact, value)
        self._kept[key] = value
        self._bytes += _bytes_of(value)
        while self._bytes > self._budget and self._kept:
            self._spill(*self._kept.popitem(last=False))

    def __contains__(self, key: Any) -> bool:
        return key in self._kept or key in self._spilled

    def get(self, key: Hashable) -> Any:
        """The value; one that was spilled is read from disk and stays there."""
        if key in self._kept:
            return self._kept[key]
        self._freed.give_back()
        path = self._spilled[key]
        with reading(path, "what was put there", "leave the folder of temporary files alone while this runs"):
            return torch.load(path, weights_only=True)

    def drop(self, key: Hashable) -> None:
        """Forget the value, if there is one."""
        if key in self._kept:
            self._bytes -= _bytes_of(self._kept.pop(key))
        elif key in self._spilled:
            self._spilled.pop(key).unlink()

    def give_back(self) -> None:
        """Return freed memory to the system, where the process has grown by more than the budget."""
        self._freed.give_back()

    def close(self) -> None:
        """Forget everything and delete the folder."""
        self._kept.clear()
        self._spilled.clear()
        self._bytes = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _spill(self, key: Any, value: Any) -> None:
        try:
            if self._folder is None:
                self._folder = OwnFolder("torchquant-values-")
            path = self._folder.path / f"{self._named}.pt"
            self._named += 1
            torch.save(value, path)
        except (OSError, RuntimeError) as error:  # torch raises a RuntimeError where a disk is full
            raise ArtifactError(
                f"{_bytes_of(value):,} bytes of values cannot be kept in {tempfile.gettempdir()}: "
                f"{str(error).splitlines()[0]}. Name a folder with more room in TMPDIR, or raise memory_bytes"
            ) from error
        self._spilled[key] = path
        self._bytes -= _bytes_of(value)
        self.spilled_bytes += _bytes_of(value)


class _Freed:
    """Freed memory that the process still holds: glibc keeps blocks of up to 32 MB, and holes between others.

    To give it back costs time, and so does to take it again: only where the process has grown by more than
    `budget_bytes`, and then not before it has grown by a sixteenth of them more.
    """

    def __init__(self, budget_bytes: float) -> None:
        self._most: float = math.inf
        if CAN_GIVE_BACK and not math.isinf(budget_bytes):
            self._step = min(max(int(budget_bytes) // 16, _LEAST_FREED), _MOST_FREED)
            give_back()
            self._allowed = _resident_bytes() + budget_bytes
            self._most = self._allowed

    def give_back(self) -> None:
        """Return it to the system where there may be too much of it."""
        if not math.isinf(self._most) and _resident_bytes() > self._most:
            give_back()
            self._most = max(self._allowed, _resident_bytes() + self._step)


def _resident_bytes() -> int:
    """Memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _compact(value: torch.Tensor) -> torch.Tensor:
    """Without a larger tensor behind it that would stay alive (and be saved) with a view of it."""
    value = value.detach()
    return value.clone() if value.untyped_storage().nbytes() > 2 * value.nbytes else value


def _bytes_of(value: Any) -> int:
    return sum(t.nbytes for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor))
