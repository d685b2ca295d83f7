"""What stands out in an analysis, in plain words, with what to do about it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torchquant.analysis.tensors import TensorAnalysis
from torchquant.types import Site

__all__ = ["Finding", "SiteAnalysis", "findings"]

Severity = Literal["error", "warning", "note"]
_ORDER = {"error": 0, "warning": 1, "note": 2}

_LOST, _HIDDEN_DB = 0.5, 20.0  # half of the elements are gone, and the SQNR does not show it
_CLIPPED, _POOR_DB = 0.005, 25.0
_UNUSED = 1 / 8  # of the grid's range
_OUTLIER, _MASK = 10.0, 1e4  # times the median channel: large, and too large for anything that was learned
_NAMED = 5  # tensors in a note
_DOMINANT, _FINE_DB = 0.5, 30.0  # of the output's error, and how little of that matters


@dataclass(frozen=True)
class Finding:
    """One thing that stands out.

    Args:
        severity: `error` (it is wrong), `warning` (it costs accuracy), `note`.
        site: name of the node.
        module: its module path.
        kind: a word for what it is, the same for all findings of that kind.
        message: in plain words, with the figures.
        remedy: what to do, as arguments where that is possible.
    """

    severity: Severity
    site: str
    module: str
    kind: str
    message: str
    remedy: str


@dataclass(frozen=True)
class SiteAnalysis:
    """One op: what quantization does to it, and what that does to the network.

    Args:
        site: what the report says of it: op, module, status, reason.
        alone_db: SQNR of its output with only its own inputs and weight quantized; infinite where they are not.
        activations_db, weight_db: the same with its inputs, or its weight, quantized alone.
        cumulative_db: SQNR of its output with all quantized that comes before it, too.
        output_db: SQNR of the network's output if nothing else were quantized, estimated by derivatives; None where
            the output has none by it (behind a rounding, an argmax).
        share: of all such errors of the network's output, between 0 and 1; 0 where there is none.
        activations, weight: the tensors it reads.
    """

    site: Site
    alone_db: float
    activations_db: float
    weight_db: float
    cumulative_db: float
    output_db: float | None
    share: float
    activations: tuple[TensorAnalysis, ...]
    weight: TensorAnalysis | None


def findings(sites: Sequence[SiteAnalysis]) -> list[Finding]:
    """Of all sites, the gravest first; of equal ones that whose site costs the output most."""
    cost = {site.site.node: site.share for site in sites}
    complete = all(
        site.output_db is not None or math.isinf(site.alone_db) for site in sites
    )  # shares are of all errors
    named = [f for site in sites for f in _of_site(site) if complete or f.kind != "dominant"]
    ordered = sorted(_without_repeats(named), key=lambda f: (_ORDER[f.severity], -cost[f.site]))
    return [*ordered, *_dead(sites)]


def _dead(sites: Sequence[SiteAnalysis]) -> Iterator[Finding]:
    """One note on all channels that are zero: it costs nothing, and tells of what may be pruned."""
    tensors = {
        t.name: (s, t) for s in sites for t in (*s.activations, *([s.weight] if s.weight else [])) if t.dead_channels
    }
    if tensors:
        worst = sorted(tensors.values(), key=lambda pair: -pair[1].dead_channels / pair[1].channels)
        named = ", ".join(f"{t.dead_channels} of {t.channels} in {t.name}" for _, t in worst[:_NAMED])
        more = f" and in {len(worst) - _NAMED} more tensors" if len(worst) > _NAMED else ""
        site = worst[0][0].site
        message = f"channels that are zero on all of the data: {named}{more}"
        yield Finding(
            "note", site.node, site.module, "dead channels", message, "prune them, or see whether the data are all"
        )


def _without_repeats(named: Sequence[Finding]) -> Iterator[Finding]:
    """Sites that read the same tensor say the same of it: the first says it."""
    said = set()
    for finding in named:
        if (finding.kind, finding.message) not in said:
            said.add((finding.kind, finding.message))
            yield finding


def _of_site(analysis: SiteAnalysis) -> Iterator[Finding]:
    site = analysis.site
    if site.status == "missed":
        message = f"{site.op} {site.node} computes in float, and nobody decided that: {site.reason}"
        remedy = "annotate it in your Quantizer, or use one of torchquant's, which decide every op by name"
        yield Finding("error", site.node, site.module, "missed", message, remedy)
    for tensor in analysis.activations:
        yield from _of_activation(analysis, tensor)
    if analysis.weight is not None:
        yield from _of_weight(analysis, analysis.weight)
    if analysis.share > _DOMINANT and analysis.output_db is not None and analysis.output_db < _FINE_DB:
        message = f"this op alone makes {analysis.share:.0%} of the error that the output has from all of them"
        yield Finding("warning", site.node, site.module, "dominant", message, _left_out(site))


def _left_out(site: Site) -> str:
    return f'leave it in float: exclude=["node:{site.node}"]'


def _of_activation(analysis: SiteAnalysis, tensor: TensorAnalysis) -> Iterator[Finding]:
    site = analysis.site
    finding = _hidden(site, tensor) or _clipped(site, tensor) or _unused(site, tensor) or _outliers(site, tensor)
    if finding is not None:
        yield finding


def _hidden(site: Site, tensor: TensorAnalysis) -> Finding | None:
    if tensor.lost < _LOST or tensor.sqnr_db < _HIDDEN_DB or _OUTLIER <= tensor.outlier < _MASK:
        return None
    message = (
        f"{tensor.name} reaches from {tensor.low:.3g} to {tensor.high:.3g}, and a few such values set the scale: "
        f"{tensor.lost:.0%} of the elements are lost, though the SQNR of {tensor.sqnr_db:.0f} dB does not show it. "
        "Masks of -1e9 do that"
    )
    remedy = f"{_left_out(site)}, or mask with a value near the others, such as -30, or with where() after it"
    return Finding("error", site.node, site.module, "hidden by large values", message, remedy)


def _clipped(site: Site, tensor: TensorAnalysis) -> Finding | None:
    if tensor.clipped < _CLIPPED or tensor.sqnr_db > _POOR_DB:
        return None
    assert tensor.grid_low is not None
    assert tensor.grid_high is not None
    reach = f"{tensor.name} reaches from {tensor.low:.3g} to {tensor.high:.3g}"
    held = f"its grid ({tensor.grid}) from {tensor.grid_low:.3g} to {tensor.grid_high:.3g}"
    message = f"{reach}, {held}: {tensor.clipped:.1%} of the elements are cut off, {tensor.sqnr_db:.1f} dB are left"
    one_sided = tensor.low < 0 <= tensor.grid_low or tensor.high > 0 >= tensor.grid_high
    if one_sided:
        remedy = "the spec's grid has one sign and the data have both: make it affine, or symmetric with a signed dtype"
    else:
        remedy = "calibrate with data like these, or choose the range by the error: algorithms=[RangeSearch()]"
    severity: Severity = "error" if one_sided or tensor.clipped > 0.05 else "warning"
    return Finding(severity, site.node, site.module, "clipped", message, remedy)


def _unused(site: Site, tensor: TensorAnalysis) -> Finding | None:
    if tensor.used > _UNUSED or tensor.sqnr_db > _POOR_DB:
        return None
    message = (
        f"{tensor.name} reaches from {tensor.low:.3g} to {tensor.high:.3g}, {tensor.used:.1%} of what its grid "
        f"({tensor.grid}) spans: {tensor.sqnr_db:.1f} dB are left"
    )
    remedy = "the range comes from a spec or from other data: calibrate with data like these, or let an observer choose"
    return Finding("error", site.node, site.module, "grid too wide", message, remedy)


def _outliers(site: Site, tensor: TensorAnalysis) -> Finding | None:
    if tensor.outlier < _OUTLIER or (tensor.sqnr_db > _POOR_DB + 5 and tensor.lost < _LOST):
        return None
    message = (
        f"the largest channel of {tensor.name} is {tensor.outlier:.0f} times the median one, and all share a scale: "
        f"{tensor.sqnr_db:.1f} dB, {tensor.lost:.0%} of the elements lost"
    )
    remedy = "algorithms=[SmoothQuant()] moves the difference into the weights; or 16 bits, or float, for this op"
    return Finding("warning", site.node, site.module, "outlier channels", message, remedy)


def _of_weight(analysis: SiteAnalysis, tensor: TensorAnalysis) -> Iterator[Finding]:
    site = analysis.site
    if tensor.outlier > _OUTLIER and (tensor.sqnr_db < _POOR_DB or tensor.lost > _LOST):
        shared = "per channel" not in tensor.grid and "group" not in tensor.grid
        message = (
            f"the largest channel of the weight {tensor.name} is {tensor.outlier:.0f} times the median one: "
            f"{tensor.sqnr_db:.1f} dB, {tensor.lost:.0%} of the weights lost"
        )
        remedy = "one scale for each channel" if shared else "smaller groups or more bits for this op"
        remedy += "; or algorithms=[CrossLayerEqualization()] before the solver"
        severity: Severity = "error" if tensor.lost > _LOST else "warning"
        yield Finding(severity, site.node, site.module, "outlier weights", message, remedy)
    elif tensor.clipped > _CLIPPED and tensor.sqnr_db < _POOR_DB - 5:
        message = f"{tensor.clipped:.1%} of the weight {tensor.name} lie outside of its grid: {tensor.sqnr_db:.1f} dB"
        yield Finding("error", site.node, site.module, "clipped", message, "let its observer see the weight again")
