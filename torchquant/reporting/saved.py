"""Reports again: of a program, from what it keeps of its graph; and of a report's own JSON, whole."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchquant.artifacts.program import Proof
from torchquant.errors import ArtifactError
from torchquant.files.plain import as_plain
from torchquant.reporting.terminal import Report, Reported, save_data
from torchquant.types import Site

__all__ = ["KeptReport", "Saved", "read_report", "saved_report"]

_HEADS = ("node", "op", "module", "status", "activation", "weight", "reason")
_NONE = {"activation": "float", "weight": "float"}
_FIELDS = {
    "summary": str,
    "coverage": str,
    "sites": list,
    "graph": dict,
    "programs": list,
    "plans": list,
    "versions": dict,
}


@dataclass(frozen=True)
class Saved:
    """What a file says of the program in it, which is not loaded.

    Args:
        target, size_bytes, sites, proof, facts: as a `Program` has them.
    """

    target: str
    size_bytes: int
    sites: tuple[Site, ...]
    proof: Proof | None
    facts: Mapping[str, Any]


def saved_report(program: Reported) -> Report:
    """Account for every op of the graph that a program was lowered from; empty of one that torchquant did not write."""
    edges = tuple((source, target) for source, target in program.facts.get("edges", ()))
    return Report(tuple(program.sites), program.facts.get("weight_bytes"), (program,), edges)


@dataclass(frozen=True)
class KeptReport:
    """What `Report.save("report.json")` wrote: analysis, profile and plans are in it, graph and program are not.

    Args:
        data: see docs/report.schema.json.
    """

    data: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """What the file holds."""
        return dict(self.data)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as `Report.save` does: a page, JSON or text."""
        return save_data(path, self.data, str(self))

    def __str__(self) -> str:
        table = Table(*_HEADS, box=None, pad_edge=False, show_edge=False)
        for site in self.data["sites"]:
            if site.get("compute"):
                table.add_row(*(Text(str(site.get(head) or _NONE.get(head, ""))) for head in _HEADS))
        console = Console(file=io.StringIO(), width=200, record=True, force_terminal=False)
        console.print(self.data["summary"], markup=False, highlight=False)
        for found in (self.data.get("analysis") or {}).get("findings", []):
            console.print(
                f"{found.get('severity')}: {found.get('kind')}: {found.get('site')}: {found.get('message')}\n"
                f"  -> {found.get('remedy')}",
                highlight=False,
                markup=False,
            )
        console.print(table)
        return "\n".join(line.rstrip() for line in console.export_text().rstrip().splitlines())


def read_report(path: str | os.PathLike[str]) -> KeptReport:
    """Read what `Report.save` wrote as JSON.

    Raises:
        ArtifactError: no such file, or no report of this version.
    """
    file = Path(path)
    try:
        data = as_plain(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} cannot be read as a report: {error}") from error
    if not isinstance(data, dict) or data.get("kind") != "torchquant-report" or data.get("version") != 1:
        raise ArtifactError(f"{file} is no report of torchquant's, version 1")
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(data.get(name), kind)]
    wrong += [] if wrong or all(isinstance(s, dict) and "node" in s for s in data["sites"]) else ["sites"]
    if wrong:
        raise ArtifactError(f"{file} is damaged: it has no sensible {', '.join(wrong)}")
    return KeptReport(data)
