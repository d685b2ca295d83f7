"""ExecuTorch programs for the XNNPACK delegate: int8 ops counted in the artefact, run, held against their reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from torch.fx import GraphModule

from torchquant import batches as data
from torchquant.backends.executorch_xnnpack.capabilities import CAPABILITIES, REQUANTIZATION_LIMIT, SCHEMES, TARGET
from torchquant.backends.executorch_xnnpack.delegated import mark_sites, read_delegates
from torchquant.backends.executorch_xnnpack.limits import (
    refuse_narrow,
    refuse_overflow,
    refuse_unrunnable,
    refuse_unshared,
)
from torchquant.backends.executorch_xnnpack.patterns import prepare
from torchquant.backends.executorch_xnnpack.program import XnnpackProgram, executorch_modules, load
from torchquant.backends.executorch_xnnpack.quiet import undisturbed
from torchquant.errors import LoweringError
from torchquant.fx import passes
from torchquant.fx.decompose import decompose
from torchquant.lowering import MIN_SQNR_DB, accountable_sites, hold_against, left_float
from torchquant.program import Proof
from torchquant.serialize import export_again
from torchquant.types import Site

__all__ = ["CAPABILITIES", "REQUANTIZATION_LIMIT", "SCHEMES", "TARGET", "XnnpackProgram", "load", "lower"]

_OP_ERROR = 1e-5  # XNNPACK approximates exp, erf and rsqrt


def lower(
    quantized: GraphModule,
    example_inputs: Any = None,
    *,
    allow_float: Sequence[str] = (),
    min_sqnr_db: float = MIN_SQNR_DB,
) -> XnnpackProgram:
    """Build a `.pte` from a converted graph, load and run it, and prove that its int8 ops are delegated.

    Attention, LayerNorm and RMSNorm are first rewritten so that the delegate takes them too.

    Args:
        quantized: what `convert_pt2e` returned, of any Quantizer. Its dead float weights are removed.
        example_inputs: one batch to prove it with; made up from the input shapes if None.
        allow_float: patterns of annotated ops that may run in float.
        min_sqnr_db: how close the program must be to the converted graph on `example_inputs`; where the
            graph itself is less reproducible than that, see `torchquant.lowering.hold_against`.

    Raises:
        MissingDependencyError: ExecuTorch is not installed.
        InputError: the graph is not converted, or `example_inputs` does not fit it.
        LoweringError: XNNPACK would drop or change something that is annotated, an annotated op is not
            delegated, or the program cannot be built, loaded or run, or its output is off.
    """
    executorch = executorch_modules()
    sites, allowed = accountable_sites(quantized, allow_float)
    wanted = [s for s in sites if s.status == "quantized" and s.node not in allowed]
    _refuse(quantized, wanted, allowed)
    passes.remove_dead_weights(quantized)
    reference = passes.copy_graph(quantized)
    passes.make_float(reference, allowed)
    passes.per_token_linears(reference)  # what the delegate makes of a dynamic linear, whatever the graph says
    batch = data.contiguous(data.example_of(quantized) if example_inputs is None else example_inputs)
    data.check(data.input_specs(quantized), batch, "example_inputs")
    with undisturbed():
        edge = _delegate(executorch, reference, batch)
        found = read_delegates(edge)
        found.check(wanted)
        program = XnnpackProgram(_buffer(edge), getattr(quantized, "_out_spec", None))
    lost = {s.node for s in found.warn_of_float(wanted)}
    sites = tuple(replace(s, status="unsupported", reason=_IN_FLOAT) if s.node in lost else s for s in sites)
    program.inputs, program.sites = data.input_specs(quantized), sites
    close = hold_against(reference, program, [batch], min_sqnr_db=min_sqnr_db, op_error=_OP_ERROR, target=TARGET)
    compute = [s for s in wanted if s.compute]
    program.proof = Proof(found.kernels(wanted), len(compute), len(compute), close, left_float(sites, allowed))
    return program


_IN_FLOAT = "annotated, yet XNNPACK computes it in float"


def _refuse(quantized: GraphModule, wanted: Sequence[Site], allowed: set[str]) -> None:
    compute = [s for s in wanted if s.compute]
    refuse_unrunnable(compute)
    refuse_unshared(quantized, {s.node for s in wanted})
    refuse_narrow(quantized, allowed)
    refuse_overflow(quantized, compute)


def _buffer(edge: Any) -> bytes:
    try:
        return bytes(edge.to_executorch().buffer)
    except Exception as error:
        raise LoweringError(f"ExecuTorch cannot build the program: {str(error)[:2000]}") from error


def lower_float(exported: GraphModule, example_inputs: Any) -> tuple[Callable[..., Any], int]:
    """The float graph through the same rewrites and delegate, and its bytes: what to compare with.

    Raises:
        MissingDependencyError, LoweringError: as `lower`.
    """
    with undisturbed():
        buffer = _buffer(_delegate(executorch_modules(), exported, example_inputs))
        program = XnnpackProgram(buffer)
    program.inputs, program.sites, program.proof = data.input_specs(exported), (), None
    return program, len(buffer)


def _delegate(executorch: SimpleNamespace, quantized: GraphModule, batch: Any) -> Any:
    try:
        graph = passes.copy_graph(quantized)
        mark_sites(graph)
        decompose(graph)
        prepare(graph)
        passes.duplicate_dynamic_chains(graph)
        passes.unshare_weights(graph)
        return executorch.lower(export_again(graph, batch), partitioner=[executorch.partitioner()])
    except Exception as error:
        raise LoweringError(f"ExecuTorch cannot lower the converted graph: {_with_causes(error)}") from error


def _with_causes(error: BaseException) -> str:
    """The messages of an error and of what it was raised from; ExecuTorch's passes hide theirs there."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(texts) < 4:
        texts.append(f"{type(cause).__name__}: {str(cause)[:1000]}")
        cause = cause.__cause__
    return "; from ".join(texts)
