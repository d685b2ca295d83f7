"""Result files: what ran where and when, and rows merged by key."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "read", "write"]

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torchquant", "torch", "torchao", "executorch", "onnxruntime", "openvino", "nncf")
Row = dict[str, Any]


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """The content of `results/NAME.json`; no rows if there is no such file."""
    file = folder / f"{name}.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"rows": []}
    return record


def write(
    name: str,
    rows: Iterable[Row],
    key: Sequence[str],
    *,
    folder: Path = RESULTS,
    about: Mapping[str, str] | None = None,
) -> None:
    """Put the rows in `results/NAME.json`, in the place of those with the same `key` fields.

    If that holds what another CPU measured, they go to a file of their own, `results/NAME.CPU.json`. Rows measured with
    other versions, or with other values of `about` (such as a GPU's name), are dropped: they must not stand beside
    these.
    """
    more = about or {}
    about = {**_about(), **more}
    if read(name, folder).get("cpu", about["cpu"]) != about["cpu"]:
        name = f"{name}.{_slug(about['cpu'])}"
    old = read(name, folder)
    same_setup = all(old.get(field) == about[field] for field in ("versions", *more))
    merged = {_key(row, key): row for row in (old["rows"] if same_setup else [])}
    stamp = {"date": about["date"], "command": about["command"]}
    merged |= {_key(row, key): _plain({**row, **stamp}) for row in rows}
    content = {**about, "rows": list(merged.values())}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def _slug(cpu: str) -> str:
    """The name of a CPU as part of a file's name: `AMD EPYC, 2 cores` -> `amd-epyc-2-cores`."""
    return re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")


def _about() -> dict[str, Any]:
    return {
        "versions": {p: _version(p) for p in PACKAGES} | {"python": platform.python_version()},
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def _key(row: Mapping[str, Any], key: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row[field] for field in key)


def _plain(row: Row) -> Row:
    """The row with floats rounded, and as JSON can write them: no NaN, no infinity."""
    return {k: _number(v) if isinstance(v, float) else v for k, v in row.items()}


def _number(value: float) -> float | str:
    return round(value, 4) if math.isfinite(value) else str(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
