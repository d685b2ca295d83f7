"""What a process has in common: calls of ours leave it as they found it, and change it one at a time."""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["unchanged"]

_turn = threading.RLock()


def _turn_of_a_child() -> None:
    """A forked child has no thread that could give the turn back."""
    global _turn
    _turn = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_turn_of_a_child)


@contextmanager
def unchanged() -> Iterator[None]:
    """Put back what torch, Inductor and ExecuTorch change on the way; one thread at a time.

    torch traces with its modules patched for the whole process, so that two threads that trace at once fail, or get a
    graph with nodes of the other's.
    """
    with _turn, _put_back():
        yield


@contextmanager
def _put_back() -> Iterator[None]:
    """Random numbers (torch's on the CPU, and Python's), warning filters, the root logger, the limit of recursion.

    `sys.path` is not put back: setuptools, which Inductor imports, finds its own parts through what it appends there.
    """
    numbers, python_numbers = torch.get_rng_state(), random.getstate()
    filters, limit = list(warnings.filters), sys.getrecursionlimit()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        torch.set_rng_state(numbers)
        random.setstate(python_numbers)
        if list(warnings.filters) != filters:
            warnings.filters[:] = filters  # type: ignore[index]
            warnings._filters_mutated()  # type: ignore[attr-defined]
        for handler in [h for h in root.handlers if h not in handlers]:
            root.removeHandler(handler)
        root.setLevel(level)
        sys.setrecursionlimit(limit)
