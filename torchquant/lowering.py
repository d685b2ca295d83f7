"""What every backend checks before and after it builds: nothing unaccounted, nothing off its reference."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from torchquant.errors import InputError, LoweringError, TorchquantWarning
from torchquant.fx import ops
from torchquant.fx.patterns import match
from torchquant.fx.sites import NOTE, is_converted, is_prepared, read_sites, refuse_lost_writes
from torchquant.signature import Signature
from torchquant.types import Site
from torchquant.verify import Comparison, compare

__all__ = ["MIN_SQNR_DB", "accountable_sites", "hold_against", "names"]

MIN_SQNR_DB = 30.0
MARGIN_DB = 6.0
_EXACT = ("relu", "hardtanh", "cat", "max_pool2d", "pad", "embedding")  # ops that round nothing


def accountable_sites(graph: GraphModule, allow_float: Sequence[str]) -> tuple[tuple[Site, ...], set[str]]:
    """The sites of a converted graph, and the nodes that the user allows to run in float.

    Raises:
        InputError: the graph is not converted.
        LoweringError: our Quantizer annotated the graph, yet a compute op has no status but `missed`, or
            any Quantizer's graph has an op that was annotated and left float. A foreign Quantizer's missed
            ops are a warning.
    """
    if not isinstance(graph, GraphModule) or not is_converted(graph):
        state = "prepared: run convert_pt2e first" if isinstance(graph, GraphModule) and is_prepared(graph) else "not"
        raise InputError(f"lower takes a converted graph, with dequantize ops in it; this one is {state}")
    refuse_lost_writes(graph)
    allowed = {n.name for pattern in allow_float for n in match(graph, pattern)}
    sites = tuple(read_sites(graph))
    missed = [s for s in sites if s.status == "missed" and s.node not in allowed]
    if missed:
        text = f"{len(missed)} compute ops were left float without a reason: {names(missed)}"
        if any(NOTE in (n.meta.get("custom") or {}) for n in graph.graph.nodes):
            raise LoweringError(f"{text}. Exclude them in the Quantizer, or pass allow_float=[...].")
        warnings.warn(f"{text}. The Quantizer never annotated them.", TorchquantWarning, stacklevel=3)
    return sites, allowed


def names(sites: Iterable[Site], limit: int = 8) -> str:
    """`conv2d conv2d_3 (layers.0.conv): reason; ...`, cut after `limit`."""
    texts = [f"{s.op} {s.node}" + (f" ({s.module})" if s.module else "") for s in sites]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return "; ".join(texts[:limit]) + more


def hold_against(
    reference: GraphModule,
    program: Callable[..., Any],
    batches: Sequence[Any],
    *,
    min_sqnr_db: float,
    op_error: float,
    target: str,
) -> Comparison:
    """Run the artefact and its reference on the batches.

    Two correct implementations of a quantized graph differ where a sum lands on a rounding boundary, and a
    network may amplify such a flip: so the bound is `min_sqnr_db`, or where the reference itself is less
    reproducible than that, `MARGIN_DB` below what a relative error of `op_error` in each op does to it.

    Args:
        op_error: relative accuracy of the target's float arithmetic.

    Raises:
        LoweringError: the artefact fails to run, or is further from its reference than that.
    """
    try:
        found = compare(reference, program, batches)
    except InputError as error:
        raise LoweringError(f"{target}: the artefact does not return what the converted graph does: {error}") from error
    except Exception as error:
        raise LoweringError(f"{target}: the artefact was built but does not run: {error}") from error
    if found.sqnr_db >= min_sqnr_db:
        return found
    reproduced = min(compare(reference, Perturbed(reference, op_error, seed), batches).sqnr_db for seed in range(3))
    bound = min(min_sqnr_db, reproduced - MARGIN_DB)
    if found.sqnr_db == -math.inf or found.sqnr_db < bound:
        raise LoweringError(
            f"{target}: the artefact is {found.sqnr_db:.1f} dB from the converted graph (largest difference "
            f"{found.max_abs:.3g}); at least {bound:.1f} dB are required. Its kernels compute something else: "
            "report this, or exclude the sites at fault."
        )
    return found


class Perturbed(Interpreter):
    """Runs a graph with the result of each float op off by a relative error of up to `op_error`."""

    def __init__(self, graph: GraphModule, op_error: float, seed: int) -> None:
        super().__init__(graph)
        self.graph_module, self.op_error = graph, op_error
        self._noise = torch.Generator().manual_seed(seed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*Signature.of(self.graph_module).leaves(args, kwargs))

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        kind = ops.kind_of(n)
        exact = kind is None or kind.moves or kind.name in _EXACT
        if exact or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        noise = 2 * torch.rand(value.shape, generator=self._noise).to(value.device) - 1
        return (value * (1 + self.op_error * noise)).to(value.dtype)


def left_float(sites: Sequence[Site], allowed: set[str]) -> dict[str, str]:
    """What of a graph runs in float, grouped by op and reason: `{"3 softmax": "why"}`."""
    counts: Counter[tuple[str, str]] = Counter()
    for s in sites:
        if s.node in allowed:
            counts[s.op, "allowed by the user"] += 1
        elif s.status != "quantized":
            counts[s.op, s.reason] += 1
    return {f"{n} {op}": reason for (op, reason), n in counts.items()}
