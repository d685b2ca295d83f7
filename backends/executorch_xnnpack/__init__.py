"""ExecuTorch programs for the XNNPACK delegate: int8 ops counted in the artefact, run, held against their reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import GraphModule

from torchquant import batches as data
from torchquant.backends.executorch_xnnpack.capabilities import CAPABILITIES, REQUANTIZATION_LIMIT, SCHEMES, TARGET
from torchquant.backends.executorch_xnnpack.delegated import read_delegates
from torchquant.backends.executorch_xnnpack.limits import (
    refuse_missing_kernels,
    refuse_narrow,
    refuse_overflow,
    refuse_unbounded,
    refuse_unrunnable,
    refuse_unshared,
)
from torchquant.backends.executorch_xnnpack.patterns import drop_batch_counters, prepare
from torchquant.backends.executorch_xnnpack.program import (
    Method,
    XnnpackProgram,
    executorch_modules,
    load,
    with_metadata,
)
from torchquant.backends.executorch_xnnpack.quiet import undisturbed
from torchquant.errors import LoweringError
from torchquant.fx import passes
from torchquant.fx.decompose import decompose
from torchquant.fx.flat import Flat, flat
from torchquant.fx.sites import mark_sites
from torchquant.lowering import accountable_sites, left_float
from torchquant.program import Metadata, Proof
from torchquant.proof import cases_of, hold_against
from torchquant.serialize import export_again
from torchquant.surroundings import unchanged
from torchquant.types import Site

__all__ = ["CAPABILITIES", "REQUANTIZATION_LIMIT", "SCHEMES", "TARGET", "XnnpackProgram", "load", "lower"]

_OP_ERROR = 1e-5  # XNNPACK approximates exp, erf and rsqrt


@unchanged()
def lower(
    quantized: GraphModule,
    example_inputs: Any = None,
    *,
    allow_float: Sequence[str] = (),
    min_sqnr_db: float | None = None,
) -> XnnpackProgram:
    """Build a `.pte` from a converted graph, load and run it, and prove that its int8 ops are delegated.

    Attention, LayerNorm and RMSNorm are first rewritten so that the delegate takes them too.

    Args:
        quantized: what `convert_pt2e` returned, of any Quantizer. Its dead float weights are removed.
        example_inputs: one batch to prove it with; made up from the input shapes if None.
        allow_float: patterns of annotated ops that may run in float.
        min_sqnr_db: how close each output must be to the converted graph's on `example_inputs`; None: as
            `torchquant.proof.hold_against` says.

    Raises:
        MissingDependencyError: ExecuTorch is not installed.
        InputError: the graph is not converted, or `example_inputs` does not fit it.
        LoweringError: XNNPACK would drop or change something that is annotated, an annotated op is not
            delegated, or the program cannot be built, loaded or run, or its output is off.
    """
    executorch = executorch_modules()
    sites, allowed = accountable_sites(quantized, allow_float, CAPABILITIES)
    wanted = [s for s in sites if s.status == "quantized" and s.node not in allowed]
    _refuse(quantized, wanted, allowed)
    passes.remove_dead_weights(quantized)
    reference = _pure(quantized, allowed)
    refuse_unbounded(reference.signature)
    batch = data.example_of(quantized) if example_inputs is None else example_inputs
    cases = cases_of(reference, batch)
    with undisturbed():
        edge = _delegate(executorch, reference.graph, cases[0])
        found = read_delegates(edge)
        found.check(wanted)
        buffer = _buffer(edge)
        run = Method(buffer)
    lost = {s.node for s in found.warn_of_float(wanted)}
    sites = tuple(replace(s, status="unsupported", reason=_IN_FLOAT) if s.node in lost else s for s in sites)
    verdict = hold_against(
        reference.graph,
        run,
        cases,
        min_sqnr_db=min_sqnr_db,
        op_error=_OP_ERROR,
        target=TARGET,
        build=lambda graph: _built(executorch, graph, cases[0]),
    )
    compute = [s for s in wanted if s.compute]
    proof = Proof.of(verdict, found.kernels(wanted), len(compute), len(compute), left_float(sites, allowed))
    about = Metadata(reference.signature, sites, proof, states=reference.initial, returns=reference.overwritten)
    return XnnpackProgram(with_metadata(buffer, about), about)


def _pure(quantized: GraphModule, allowed: set[str]) -> Flat:
    """The converted graph as XNNPACK computes it, as a pure function of tensors, its nodes marked."""
    floats = passes.copy_graph(quantized)
    passes.make_float(floats, allowed)
    passes.per_token_linears(floats)  # what the delegate makes of a dynamic linear, whatever the graph says
    mark_sites(floats)
    drop_batch_counters(floats)
    return flat(floats)


def _built(executorch: SimpleNamespace, graph: GraphModule, tensors: Sequence[torch.Tensor]) -> Method:
    """A program of a graph with further outputs."""
    with undisturbed():
        return Method(_buffer(_delegate(executorch, graph, tensors)))


_IN_FLOAT = "annotated, yet XNNPACK computes it in float"


def _refuse(quantized: GraphModule, wanted: Sequence[Site], allowed: set[str]) -> None:
    compute = [s for s in wanted if s.compute]
    refuse_missing_kernels(quantized)
    refuse_unrunnable(compute)
    refuse_unshared(quantized, allowed)
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
    pure = flat(exported)
    refuse_unbounded(pure.signature)
    cases = cases_of(pure, example_inputs)
    with undisturbed():
        buffer = _buffer(_delegate(executorch_modules(), pure.graph, cases[0]))
        run = Method(buffer)

    def call(*args: Any, **kwargs: Any) -> Any:
        found = run(*pure.signature.tensors_of(args, kwargs), *pure.initial.values())
        return pure.signature.outputs(found[: pure.count])

    return call, len(buffer)


def _delegate(executorch: SimpleNamespace, quantized: GraphModule, batch: Any) -> Any:
    try:
        graph = passes.copy_graph(quantized)
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
