"""Tables of measurements in the cache folder: what was timed once on a machine need not be timed again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torchquant.errors import ArtifactError
from torchquant.files.whole import reading, warn_ignored, write_whole

__all__ = ["cpu_name", "read_table", "write_table"]


@cache
def cpu_name() -> str:
    """Name, family, model and cache of the CPU, as Linux tells them; part of the keys of what was timed."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return "unknown"
    fields = dict(part.split(":", 1) for part in (line.replace("\t", "") for line in lines) if ":" in part)
    return ",".join(fields.get(k, "").strip() for k in ("model name", "cpu family", "model", "cache size"))


def read_table(file: Path, is_value: Callable[[Any], bool], values: str) -> dict[str, Any]:
    """Key -> value; what cannot be read, or is no such value, is left out with a warning.

    Args:
        file: JSON, which may not exist.
        is_value: what a value has to be; `values` says it in words.
    """
    if not file.exists():
        return {}
    try:
        with reading(file, "a table of measurements"):
            table = json.loads(file.read_text(encoding="utf-8"))
    except ArtifactError as error:
        warn_ignored(file, str(error.__cause__ or error))
        return {}
    known = {key: value for key, value in table.items() if is_value(value)} if isinstance(table, dict) else {}
    if known != table:
        warn_ignored(file, f"it holds other values than {values}")
    return known


def write_table(file: Path, known: Mapping[str, Any]) -> None:
    """Write it whole; a folder that cannot be written costs only the time to measure again."""
    text = json.dumps(known, indent=0, sort_keys=True)
    try:
        write_whole(file, lambda part: part.write_text(text, encoding="utf-8"))
    except ArtifactError:
        logging.getLogger(__name__).info("the measurements of %s could not be written", file)
