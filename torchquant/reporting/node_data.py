"""Figures of ops as node data of Google's Model Explorer: `GraphNodeData` of its `node_data_builder`, version 0.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchquant.errors import InputError

__all__ = ["MEASURES", "node_data"]

# measure -> its name there, and whether much of it is good
MEASURES = {
    "share": ("share of the output's error", False),
    "alone_db": ("dB alone", True),
    "cumulative_db": ("dB up to here", True),
    "output_db": ("dB of the output", True),
    "ms": ("milliseconds", False),
}
_BAD, _GOOD = "#d64545", "#3fa34d"


def node_data(report: Mapping[str, Any], measure: str) -> dict[str, Any]:
    """The figures by node, with the colours of the least and the most of them.

    Args:
        report: what `Report.to_dict` gives. Nodes are called as in the `torch.export` graph.

    Raises:
        InputError: no such measure, or the report holds none of it.
    """
    if measure not in MEASURES:
        raise InputError(f"there is no measure {measure!r}; choose from {', '.join(MEASURES)}")
    values = _times(report) if measure == "ms" else _figures(report, measure)
    if not values:
        missing = "profile" if measure == "ms" else "analysis"
        raise InputError(f"the report holds no {measure}: make it with {missing}=torchquant.{_CALLS[missing]}(...)")
    name, is_good = MEASURES[measure]
    low, high = (_BAD, _GOOD) if is_good else (_GOOD, _BAD)
    return {
        "name": name,
        "results": {node: {"value": value} for node, value in values.items()},
        "gradient": [{"stop": 0, "bgColor": low}, {"stop": 1, "bgColor": high}],
    }


_CALLS = {"profile": "profile", "analysis": "analyze"}


def _times(report: Mapping[str, Any]) -> dict[str, float]:
    return dict((report.get("profile") or {}).get("site_ms", {}))


def _figures(report: Mapping[str, Any], measure: str) -> dict[str, float]:
    sites = (report.get("analysis") or {}).get("sites", [])
    return {site["site"]["node"]: site[measure] for site in sites if site[measure] is not None}
