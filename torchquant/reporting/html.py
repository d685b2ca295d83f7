"""A report as one HTML file that needs no network: tables, graph and plots by libraries that it carries with it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torchquant.errors import MissingDependencyError

__all__ = ["fragment", "page", "positions"]

_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = ("tabulator.min.js", "chart.umd.min.js", "cytoscape.min.js", "report.js")
_STYLES = ("tabulator_simple.min.css", "report.css")
_SHOWN = 200  # rows of a fragment


def page(data: Mapping[str, Any]) -> str:
    """A whole page of what `Report.to_dict` gives.

    Raises:
        MissingDependencyError: Jinja2 is not installed.
    """
    try:
        jinja2: Any = import_module("jinja2")
    except ImportError as error:
        raise MissingDependencyError("HTML reports need Jinja2: pip install jinja2") from error
    environment = jinja2.Environment(autoescape=True)
    template = environment.from_string((_ASSETS / "report.html.j2").read_text(encoding="utf-8"))
    scripts, styles = (
        [jinja2.utils.markupsafe.Markup(_harmless((_ASSETS / name).read_text(encoding="utf-8"))) for name in names]
        for names in (_SCRIPTS, _STYLES)
    )
    text: str = template.render(data=data, scripts=scripts, styles=styles)
    return text


def _harmless(text: str) -> str:
    """Without what would end the element that it stands in."""
    return text.replace("</script", "<\\/script").replace("</style", "<\\/style")


def fragment(data: Mapping[str, Any]) -> str:
    """Summary and compute ops as a plain table, for notebooks."""
    heads = ("node", "op", "module", "status", "activation", "weight", "reason")
    sites = [site for site in data["sites"] if site["compute"]]
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(site[head] or ''))}</td>" for head in heads) + "</tr>"
        for site in sites[:_SHOWN]
    )
    more = f"<p>and {len(sites) - _SHOWN} more ops</p>" if len(sites) > _SHOWN else ""
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<p>{html.escape(data['summary'])}</p><table><tr>{head}</tr>{rows}</table>{more}"


def positions(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, tuple[int, int]]:
    """Node -> (column, row) of a drawing in which every edge leads down; nodes and edges in graph order."""
    row = dict.fromkeys(nodes, 0)
    for source, target in edges:
        row[target] = max(row[target], row[source] + 1)
    width: dict[int, int] = {}
    for level in row.values():
        width[level] = width.get(level, 0) + 1
    placed, used = {}, dict.fromkeys(width, 0)
    for name, level in row.items():
        placed[name] = (2 * used[level] - width[level] + 1, level)  # in half columns, around 0
        used[level] += 1
    return placed
