"""A line on stderr that says what a long call is doing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["stages"]


@contextmanager
def stages(title: str, progress: bool, console: Console | None = None) -> Iterator[Callable[[str], None]]:
    """Show `title` with what is being done and for how long, until the block ends; what is called names the stage.

    Args:
        progress: False shows nothing, as does a stderr that is no terminal.
        console: where to show it; stderr if None.
    """
    console = console or Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = progress and console.is_terminal
    with Progress(*columns, console=console, disable=not shown, transient=True) as line:
        task = line.add_task(title, total=None)
        yield lambda stage: line.update(task, description=f"{title}: {stage}")
