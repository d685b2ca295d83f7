"""What a process has in common: calls of ours leave it as they found it, and change it one at a time."""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch

__all__ = ["own_modes", "unchanged", "without_autocast"]

_turn = threading.RLock()


def _turn_of_a_child() -> None:
    """A forked child has no thread that could give the turn back, or leave the block in which float32 holds."""
    global _turn, _float32_by_default
    _turn, _float32_by_default = threading.RLock(), _DefaultDtype()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_turn_of_a_child)


class _DefaultDtype:
    """torch's default dtype, which all threads share: float32 while any thread asks for it, and then what it was."""

    def __init__(self) -> None:
        self._lock, self._users, self._before = threading.Lock(), 0, torch.float32

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._before = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                torch.set_default_dtype(self._before)


_float32_by_default = _DefaultDtype()


@contextmanager
def own_modes() -> Iterator[None]:
    """Torch's modes as a process starts with them, whatever the caller's are.

    That is: gradients can be taken, no inference mode, no autocast, new tensors are float32 and on the CPU. A caller's
    modes are meant for his model: under autocast, observers would watch bfloat16 values that no target computes.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(without_autocast())
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_float32_by_default)
        yield


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

    One thread at a time: torch traces with its modules patched for the whole process, so that two threads that trace at
    once fail, or get a graph with nodes of the other's.

    Args:
        modes: if not, the caller's modes hold inside.
    """
    with _turn, _put_back(), own_modes() if modes else nullcontext():
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
