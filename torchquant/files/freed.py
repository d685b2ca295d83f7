"""Memory that was freed and that the C library still holds."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

__all__ = ["CAN_GIVE_BACK", "give_back"]


def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim if Path("/proc/self/statm").exists() else None
    except (AttributeError, OSError, TypeError):  # another C library
        return None


_TRIM = _trim()
CAN_GIVE_BACK = _TRIM is not None


def give_back() -> None:
    """Return freed memory of this process to the system, where the C library can."""
    if _TRIM is not None:
        _TRIM(0)
