"""What a process has in common: calls of ours leave it as they found it."""

from __future__ import annotations

import logging
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["unchanged"]


@contextmanager
def unchanged() -> Iterator[None]:
    """Put back what torch, Inductor and ExecuTorch change on the way.

    That is: random numbers (torch's on the CPU, and Python's), warning filters, the root logger's handlers and level,
    the limit of recursion.

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
