"""How the commands print: text for people, JSON for programs, progress on stderr."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TextIO, TypeVar

from rich.console import Console

from torchquant.files.plain import as_plain

__all__ = ["alone", "as_json", "show", "status"]

P = ParamSpec("P")
R = TypeVar("R")

quiet = False  # of the command that runs: no progress on stderr
_stdout: TextIO | None = None  # for JSON, where all else goes to stderr
_console = Console(stderr=True)


class Shown(Protocol):
    """What the commands print: a report, an analysis, a profile."""

    def to_dict(self) -> dict[str, Any]:
        """As numbers, strings and lists."""


def alone(command: Callable[P, R]) -> Callable[P, R]:
    """A command whose JSON is alone on stdout where `as_json` asks for it; what a user's code prints goes to stderr."""
    signature = inspect.signature(command)

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        global _stdout
        if not signature.bind(*args, **kwargs).arguments["as_json"]:
            return command(*args, **kwargs)
        _stdout = sys.stdout
        try:
            with redirect_stdout(sys.stderr):
                return command(*args, **kwargs)
        finally:
            _stdout = None

    return run


def as_json(values: Any) -> None:
    """Print as JSON; numbers that are not finite become null."""
    print(json.dumps(as_plain(values), indent=1, allow_nan=False), file=_stdout or sys.stdout)


def show(what: Shown, out: Path | None, is_json: bool) -> None:
    """Print it, or write it to a file by its own `save`."""
    if out is not None:
        what.save(out)  # type: ignore[attr-defined]
        if is_json:
            as_json({"path": str(out)})
        else:
            print(f"written to {out}")
    elif is_json:
        as_json(what.to_dict())
    else:
        print(what)


def status(text: str) -> AbstractContextManager[Any]:
    """Show what is being done while it lasts, unless nothing is to be shown."""
    return nullcontext() if quiet else _console.status(text)
