"""ExecuTorch without its traces: no noise on the terminal, and the process left as it was found."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["undisturbed"]


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
