"""A process that was forked from one with threads: what OpenMP thinks it still has, and what is safe there.

The threads of OpenMP's pool do not survive a fork, but its record of them does, so the first parallel loop in a child
waits for them for ever: torch's own operators, oneDNN and our kernels alike. On one thread there is no pool to wait
for. A child that was forked before there was a pool keeps all its threads.
"""

from __future__ import annotations

import os
import sys
import warnings

import torch

from torchquant.errors import TorchquantWarning

__all__ = ["survive"]

_had_pool = False  # this process, or the one that it was forked from
_is_unsafe = False


def survive() -> None:
    """Before a parallel loop: in a process forked from one that had threads, go on with one thread, and say so once.

    Called each time, and from each thread: torch keeps a number of threads for each.
    """
    global _had_pool
    if torch.get_num_threads() > 1:
        if _is_unsafe:
            torch.set_num_threads(1)
            _warn_once()
        else:
            _had_pool = True


_warned: list[int] = []


def _warn_once() -> None:
    if _warned[-1:] != [os.getpid()]:
        _warned[:] = [os.getpid()]
        warnings.warn(
            "this process was forked from one that had threads already, with which OpenMP would hang: programs run on "
            "one thread here. For more, start processes with multiprocessing's `spawn` or `forkserver`, or fork before "
            "the first call of any model.",
            TorchquantWarning,
            stacklevel=4,
        )


def _before() -> None:
    """Other operators of torch may have started the pool: there are more threads than numpy's own then."""
    global _had_pool
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        _had_pool |= len(os.listdir("/proc/self/task")) > (cores if "numpy" in sys.modules else 1)
    except OSError:  # not Linux: there is no telling
        _had_pool = True


def _in_child() -> None:
    global _is_unsafe
    _is_unsafe |= _had_pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_child=_in_child)
