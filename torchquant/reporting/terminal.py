"""Every op accounted for: quantized, excluded, unsupported with the reason, or missed."""

from __future__ import annotations

import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.fx import GraphModule

from torchquant.artifacts.program import Program, Proof
from torchquant.errors import InputError
from torchquant.files.archive import versions
from torchquant.files.whole import write_whole
from torchquant.fx import passes
from torchquant.fx.sites import read_sites, site_edges
from torchquant.reporting.html import fragment, page, positions
from torchquant.reporting.node_data import node_data
from torchquant.types import Site

__all__ = ["Report", "program_text", "proof_text", "report"]

_NOTHING: Mapping[str, Any] = {}


class Reported(Protocol):
    """A program, or what is known of one that is not loaded."""

    @property
    def target(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def sites(self) -> tuple[Site, ...]: ...
    @property
    def proof(self) -> Proof | None: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...


class Analyzed(Protocol):
    """What `analyze` returns."""

    def to_dict(self) -> dict[str, Any]:
        """As numbers, strings and lists."""


class Profiled(Protocol):
    """What `profile` returns."""

    def to_dict(self) -> dict[str, Any]:
        """As numbers, strings and lists, `site_ms` among them."""


class Planned(Protocol):
    """A plan of `search`."""

    @property
    def about(self) -> Mapping[str, Any]:
        """Its bits a weight and expected dB."""


@dataclass(frozen=True)
class Report:
    """The sites of one graph and the programs that were lowered from it. `str()` gives a table for people.

    Args:
        sites, weight_bytes: of the graph; None bytes where they are not known.
        programs: lowered from it.
        edges: (site, site) by node: the one reads what the other made, through ops that are no sites or not.
        analysis: what `analyze` found.
        plans: of `search`, for the plot of the Pareto front.
        profile: what `profile` measured: times of ops.
    """

    sites: tuple[Site, ...]
    weight_bytes: int | None
    programs: tuple[Reported, ...] = ()
    edges: tuple[tuple[str, str], ...] = ()
    analysis: Analyzed | None = None
    plans: tuple[Planned, ...] = ()
    profile: Profiled | None = None

    def count(self, status: str, *, compute: bool | None = None) -> int:
        """How many sites have a status; `compute=True` counts convolutions, linears, matmuls ... only."""
        return sum(s.status == status and compute in (None, s.compute) for s in self.sites)

    @property
    def coverage(self) -> str:
        """Quantized compute ops of all compute ops, e.g. `50/50`."""
        return f"{self.count('quantized', compute=True)}/{sum(s.compute for s in self.sites)}"

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=200, record=True, force_terminal=False)
        console.print(self.summary(), markup=False)
        for line in self._finding_lines():
            console.print(line, highlight=False, markup=False)
        for title, table in (("compute ops", self._compute_table()), ("other ops", self._other_table())):
            if table.row_count:
                console.print(f"\n{title}", highlight=False)
                console.print(table)
        for program in self.programs:
            console.print(program_text(program), highlight=False, markup=False)
        if self.profile is not None:
            console.print(f"\n{self.profile}", highlight=False, markup=False)
        return "\n".join(line.rstrip() for line in console.export_text().rstrip().splitlines())

    def _finding_lines(self) -> list[str]:
        """What the analysis found, the gravest first."""
        found = [] if self.analysis is None else self.analysis.to_dict()["findings"]
        lines = []
        for f in found:
            where = f" ({f['module']})" if f["module"] else ""
            lines.append(f"{f['severity']}: {f['kind']}: {f['site']}{where}: {f['message']}\n  -> {f['remedy']}")
        return lines

    def summary(self) -> str:
        """One line: coverage, statuses, bytes."""
        counts = Counter(s.status for s in self.sites if s.compute)
        statuses = ", ".join(f"{n} {status}" for status, n in sorted(counts.items())) or "no compute ops"
        size = "" if self.weight_bytes is None else f"; weights {self.weight_bytes:,} bytes"
        return f"compute ops quantized: {self.coverage} ({statuses}){size}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings and lists, as docs/report.schema.json says."""
        place = positions([site.node for site in self.sites], self.edges)
        return {
            "kind": "torchquant-report",
            "version": 1,
            "summary": self.summary(),
            "coverage": self.coverage,
            "weight_bytes": self.weight_bytes,
            "sites": [site.to_dict() for site in self.sites],
            "graph": {"nodes": [[name, *at] for name, at in place.items()], "edges": [list(e) for e in self.edges]},
            "programs": [_program(program) for program in self.programs],
            "analysis": None if self.analysis is None else self.analysis.to_dict(),
            "profile": None if self.profile is None else self.profile.to_dict(),
            "plans": [dict(plan.about) for plan in self.plans],
            "versions": dict(versions()),
        }

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def _repr_html_(self) -> str:
        return fragment(self.to_dict())

    def save_node_data(self, path: str | os.PathLike[str], measure: str = "share") -> Path:
        """Write a figure of each op as node data of Google's Model Explorer (`.json`), to colour the graph by.

        Args:
            measure: `share`, `alone_db`, `cumulative_db` or `output_db` of the analysis, or `ms` of the profile.

        Raises:
            InputError: the report has no such figures.
        """
        text = json.dumps(node_data(self.to_dict(), measure), indent=1, allow_nan=False) + "\n"
        return write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report: as a page if the file's name ends in `.html`, as JSON in `.json`, as text in any other.

        Raises:
            MissingDependencyError: a page needs Jinja2.
        """
        return save_data(path, self.to_dict(), str(self))

    def _compute_table(self) -> Table:
        heads = ["node", "op", "module", "status", "activation", "weight", "reason"]
        times: Mapping[str, float] = {} if self.profile is None else self.profile.to_dict()["site_ms"]
        table = Table(*heads, *(["ms"] if times else []), box=None, pad_edge=False, show_edge=False)
        for s in self.sites:
            if s.compute:
                activation, weight = (q.describe() if q else "float" for q in (s.activation, s.weight))
                cells = [s.node, s.op, s.module, s.status, activation, weight, s.reason]
                if times:
                    cells.append(f"{times[s.node]:.4f}" if s.node in times else "")
                table.add_row(*map(Text, cells))
        return table

    def _other_table(self) -> Table:
        table = Table("op", "count", "status", "reason", box=None, pad_edge=False, show_edge=False)
        rows = Counter((s.op, s.status, _general(s.reason)) for s in self.sites if not s.compute)
        for (op, status, reason), n in sorted(rows.items()):
            table.add_row(*map(Text, (op, str(n), status, reason)))
        return table


def save_data(path: str | os.PathLike[str], data: Mapping[str, Any], text: str) -> Path:
    """Write what `Report.to_dict` gave as a page (`.html`) or JSON (`.json`), or `text` under any other name.

    Raises:
        MissingDependencyError: a page needs Jinja2.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".html":
        text = page(data)
    elif suffix == ".json":
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    else:
        made_by = ", ".join(f"{name} {v}" for name, v in data["versions"].items())
        text = f"{text}\n\nmade by {made_by}\n"
    return write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def _check_analysis(analysis: Analyzed, sites: Sequence[Site]) -> None:
    """Raise InputError unless it is one, of a graph with these sites."""
    if not callable(getattr(analysis, "to_dict", None)):
        raise InputError(f"analysis is what torchquant.analyze returned, not {analysis!r:.80}")
    strangers = {s["site"]["node"] for s in analysis.to_dict()["sites"]} - {s.node for s in sites}
    if strangers:
        raise InputError(f"the analysis is of another graph: {', '.join(sorted(strangers)[:5])} are not in this one")


def _check_profile(profile: Profiled, sites: Sequence[Site]) -> None:
    """Raise InputError unless it is one, of a program with these sites."""
    described = profile.to_dict() if callable(getattr(profile, "to_dict", None)) else {}
    if "site_ms" not in described:
        raise InputError(f"profile is what torchquant.profile returned, not {profile!r:.80}")
    strangers = sorted(described["site_ms"].keys() - {s.node for s in sites})
    if strangers:
        raise InputError(f"the profile is of another graph: {', '.join(strangers[:5])} are not in this one")


def _flat_programs(programs: Sequence[Any], sites: Sequence[Site]) -> tuple[Program, ...]:
    """The programs, each checked to be one that was lowered from a graph with these sites."""
    flat = [p for group in programs for p in (group if isinstance(group, (list, tuple)) else [group])]
    present = {site.node: site for site in sites}
    for program in flat:
        if not isinstance(program, Program):
            raise InputError(f"programs are what a backend's lower() or load() returned, not {program!r:.80}")
        strange = [s.node for s in program.sites if s.node not in present or present[s.node].op != s.op]
        known = {s.node for s in program.sites}
        gone = [s.node for s in sites if s.compute and s.node not in known] if program.sites else []
        if strange or gone:
            what = f"{', '.join(strange[:5])} are not in this graph" if strange else f"{', '.join(gone[:5])} not in it"
            raise InputError(f"the program for {program.target} was lowered from another graph: {what}")
    return tuple(flat)


def _checked_plans(plans: Any) -> tuple[Planned, ...]:
    """Plans, or InputError."""
    several = isinstance(plans, Iterable) and not isinstance(plans, (str, Mapping))
    kept = list(plans) if several else [plans]
    wrong = [plan for plan in kept if not isinstance(getattr(plan, "about", None), Mapping)]
    if wrong or not several:
        raise InputError(f"plans is a list of plans, as search(...).curve() gives, not {(wrong or kept)[0]!r:.80}")
    return tuple(kept)


def _program(program: Reported) -> dict[str, Any]:
    described: dict[str, Any] = {"target": program.target, "size_bytes": program.size_bytes, "outcome": "no proof"}
    proof = program.proof
    if proof is not None:
        level = proof.comparison.sqnr_db
        described |= {
            "outcome": proof.outcome,
            "proof": {
                "kernels": dict(proof.kernels),
                "annotated": proof.annotated,
                "fused": proof.fused,
                "sqnr_db": level if math.isfinite(level) else None,
                "max_abs": proof.comparison.max_abs if math.isfinite(proof.comparison.max_abs) else None,
                "reason": proof.reason,
                "left_float": dict(proof.left_float),
            },
        }
    return described


def _general(reason: str) -> str:
    return "fused into the op before it" if reason.startswith("fused into") else reason


def program_text(program: Reported) -> str:
    """A program's size, kernels, proof, and what it runs in float."""
    return proof_text(program.target, program.size_bytes, program.proof, program.facts)


def proof_text(target: str, size_bytes: int, proof: Proof | None, facts: Mapping[str, Any] = _NOTHING) -> str:
    """The same of what a file says of the program in it."""
    if proof is None:
        return f"\n{target}: {size_bytes:,} bytes (the file carries no proof; lower again to get one)"
    kernels = ", ".join(f"{n} {name}" for name, n in sorted(proof.kernels.items())) or "none"
    lines = [
        f"\n{target}: {size_bytes:,} bytes",
        f"  matrix kernels: {kernels}",
        f"  annotated compute ops run quantized: {proof.fused}/{proof.annotated}",
        f"  against the converted graph: {proof.comparison.sqnr_db:.1f} dB, "
        f"largest difference {proof.comparison.max_abs:.3g}",
        *([f"  proof: {proof.outcome}: {proof.reason}"] if proof.reason else []),
    ]
    if race := facts.get("race_ms"):
        timed = ", ".join(f"{name} {ms:.3g} ms" for name, ms in race.items())
        lines.append(f"  a call, timed in turns when it was lowered: {timed}")
    lines += [f"  float: {op}: {why}" for op, why in sorted(proof.left_float.items())]
    return "\n".join(lines)


def report(
    graph: GraphModule,
    *programs: Program | Sequence[Program],
    analysis: Analyzed | None = None,
    profile: Profiled | None = None,
    plans: Sequence[Planned] = (),
) -> Report:
    """Account for every op of a prepared or converted graph, whoever wrote the Quantizer.

    Args:
        graph: what `prepare_pt2e` or `convert_pt2e` returned.
        programs: what backends lowered from it, if any.
        analysis: what `analyze` found in the prepared graph.
        profile: what `profile` measured of a program.
        plans: what `search(...).curve()` gave.

    Raises:
        InputError: `graph` is no GraphModule, or an analysis or a program is of another one.
    """
    if not isinstance(graph, GraphModule):
        raise InputError(f"report takes a prepared or converted GraphModule, not {type(graph).__name__}")
    sites = tuple(read_sites(graph))
    if analysis is not None:
        _check_analysis(analysis, sites)
    if profile is not None:
        _check_profile(profile, sites)
    edges = tuple(site_edges(graph, sites))
    flat = _flat_programs(programs, sites)
    return Report(sites, passes.weight_bytes(graph), flat, edges, analysis, _checked_plans(plans), profile)
