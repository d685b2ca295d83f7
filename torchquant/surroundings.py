"""What a process has in common: calls of ours leave it as they found it."""

from __future__ import annotations

import logging
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch

__all__ = ["own_modes", "unchanged", "without_autocast"]


@contextmanager
def own_modes() -> Iterator[None]:
    """Torch's modes as a process starts with them, whatever the caller's are.

    That is: gradients can be taken, no inference mode, no autocast, new tensors are float32 and on the CPU. A caller's
    modes are meant for his model: under autocast, observers would watch bfloat16 values that no target computes.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(without_autocast())
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the dtypes that a model has."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def unchanged(*, modes: bool = True) -> Iterator[None]:
    """Put back what torch, Inductor and ExecuTorch change on the way, and compute in torch's `own_modes`.

    That is: random numbers (torch's on the CPU, and Python's), warning filters, the root logger's handlers and level,
    the limit of recursion.

    `sys.path` is not put back: setuptools, which Inductor imports, finds its own parts through what it appends there.

    Args:
        modes: if not, the caller's modes hold inside.
    """
    numbers, python_numbers = torch.get_rng_state(), random.getstate()
    filters, limit = list(warnings.filters), sys.getrecursionlimit()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with own_modes() if modes else nullcontext():
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
