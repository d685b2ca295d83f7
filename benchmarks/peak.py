"""The most memory that the process held, from a moment on (Linux)."""

from __future__ import annotations

import resource
from pathlib import Path

__all__ = ["forget_peak", "peak_bytes"]


def forget_peak() -> None:
    """Start the process's peak of resident memory anew."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")


def peak_bytes() -> int:
    """The peak of resident memory since then."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
