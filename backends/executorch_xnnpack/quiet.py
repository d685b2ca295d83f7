"""ExecuTorch without its traces: no noise on the terminal, and the process left as it was found."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["undisturbed", "without_cpu_lines"]

_FROM = b"[cpuinfo_utils.cpp"  # the first method that is loaded reports that an x86 CPU is no Arm CPU
_first = threading.Lock()
_was_loaded = False


@contextmanager
def without_cpu_lines() -> Iterator[None]:
    """Drop what ExecuTorch's runtime writes about the CPU when it loads a process's first method; once."""
    global _was_loaded
    with _first:
        if _was_loaded:
            yield
            return
        _was_loaded = True
        with _without_lines(_FROM):
            yield


@contextmanager
def _without_lines(start: bytes) -> Iterator[None]:
    """Hold back what is written to standard error, and let all lines through in the end but those with this start."""
    if sys.stderr is not None:
        sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            os.write(2, b"".join(line for line in held if not line.startswith(start)))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Drop warnings and log lines below errors while ExecuTorch works; put back what it changes in the process.

    Put back: warning filters, the root logger's handlers and level, torch's random state. Errors still show.
    """
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, logging.root.manager.disable
    state = torch.random.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
        torch.random.set_rng_state(state)
