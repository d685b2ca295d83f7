"""How the commands print: text for people, JSON for programs, progress on stderr."""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

__all__ = ["as_json", "show", "status"]

quiet = False  # of the command that runs: no progress on stderr
_console = Console(stderr=True)


class Shown(Protocol):
    """What the commands print: a report, an analysis, a profile."""

    def to_dict(self) -> dict[str, Any]:
        """As numbers, strings and lists."""


def as_json(values: Any) -> None:
    """Print as JSON; numbers that are not finite become null."""
    print(json.dumps(_finite(values), indent=1, allow_nan=False))


def show(what: Shown, out: Path | None, is_json: bool) -> None:
    """Print it, or write it to a file by its own `save`."""
    if out is not None:
        what.save(out)  # type: ignore[attr-defined]
        print(f"written to {out}")
    elif is_json:
        as_json(what.to_dict())
    else:
        print(what)


def status(text: str) -> AbstractContextManager[Any]:
    """Show what is being done while it lasts, unless nothing is to be shown."""
    return nullcontext() if quiet else _console.status(text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
