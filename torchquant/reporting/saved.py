"""The report of a program again, from what it keeps of its graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchquant.artifacts.program import Proof
from torchquant.reporting.terminal import Report, Reported
from torchquant.types import Site

__all__ = ["Saved", "saved_report"]


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
