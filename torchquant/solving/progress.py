"""What a run shows while it lasts, and what it took."""

from __future__ import annotations

import sys

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["bar_of", "peak_bytes"]


def bar_of(shown: bool) -> Progress:
    """A bar on stderr, which is gone at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), disable=not shown, transient=True)


def peak_bytes() -> int:
    """The largest resident memory of this process; 0 where the system does not say."""
    try:
        import resource  # noqa: PLC0415  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
