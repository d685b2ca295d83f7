"""ExecuTorch programs for the XNNPACK delegate: int8 ops counted in the artefact, run, held against their reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from torchquant.artifacts.program import Metadata
from torchquant.artifacts.serialize import export_again
from torchquant.backends.executorch_xnnpack.blame import blamed
from torchquant.backends.executorch_xnnpack.capabilities import TARGET
from torchquant.backends.executorch_xnnpack.chains import duplicate_dynamic_chains, per_token_linears
from torchquant.backends.executorch_xnnpack.delegated import Delegated, read_delegates
from torchquant.backends.executorch_xnnpack.kernels import (
    refuse_complex,
    refuse_loops,
    refuse_unknown_sizes,
    refuse_without_kernel,
)
from torchquant.backends.executorch_xnnpack.limits import (
    refuse_missing_kernels,
    refuse_narrow,
    refuse_overflow,
    refuse_unbounded,
    refuse_unrunnable,
    refuse_unshared,
)
from torchquant.backends.executorch_xnnpack.partitioning import decomposed_once, partitioner_class
from torchquant.backends.executorch_xnnpack.patterns import drop_batch_counters, own_storage, prepare
from torchquant.backends.executorch_xnnpack.portable import RULES, other_branches, rewrite_branches
from torchquant.backends.executorch_xnnpack.program import (
    ExecutorchError,
    Method,
    XnnpackProgram,
    executorch_modules,
    with_metadata,
)
from torchquant.backends.executorch_xnnpack.quick import quick_passes
from torchquant.backends.executorch_xnnpack.quiet import undisturbed
from torchquant.errors import TorchquantError
from torchquant.fx import passes
from torchquant.fx.flat import Flat, flat
from torchquant.fx.rewrites.decompose import decompose, rewrite
from torchquant.fx.signature import Signature
from torchquant.lowering import skeleton
from torchquant.lowering.proof import Verdict, cases_of
from torchquant.lowering.skeleton import Artefact, Cases, Hold, Lowering, Run, Stage
from torchquant.types import Site

__all__ = ["lower", "lower_float"]

_IN_FLOAT = "annotated, yet XNNPACK computes it in float"


def lower(
    quantized: GraphModule,
    example_inputs: Any = None,
    *,
    allow_float: Sequence[str] = (),
    min_sqnr_db: float | None = None,
    progress: bool = True,
) -> XnnpackProgram:
    """Build a `.pte` from a converted graph, load and run it, and prove that its int8 ops are delegated.

    Attention, LayerNorm and RMSNorm are first rewritten so that the delegate takes them too. The graph is not changed.

    Args:
        quantized: what `convert_pt2e` returned, of any Quantizer.
        example_inputs: one batch to prove it with; made up from the input shapes if None.
        allow_float: patterns of annotated ops that may run in float.
        min_sqnr_db: how close each output must be to the converted graph's on `example_inputs`; None: as
            `torchquant.lowering.proof.hold_against` says.
        progress: show on stderr what is being done.

    Raises:
        MissingDependencyError: ExecuTorch is not installed.
        InputError: the graph is not converted, or `example_inputs` does not fit it.
        LoweringError: XNNPACK would drop or change something that is annotated, an annotated op is not
            delegated, or the program cannot be built, loaded or run, or its output is off.
    """
    return skeleton.lower(
        _XnnpackLowering(),
        quantized,
        example_inputs,
        allow_float=allow_float,
        min_sqnr_db=min_sqnr_db,
        progress=progress,
    )


class _XnnpackLowering(Lowering[XnnpackProgram]):
    """A program of ExecuTorch's, with as much of the graph as can be in the delegate."""

    target = TARGET
    op_error = 1e-5  # XNNPACK approximates exp, erf and rsqrt
    plans_sizes = True

    def require(self, quantized: GraphModule) -> None:
        self._executorch = executorch_modules()
        if isinstance(quantized, GraphModule):
            refuse_loops(quantized)  # before the advice to exclude them, which would not help

    def refuse(self, quantized: GraphModule) -> None:
        allowed = set(self.allowed)
        refuse_unknown_sizes(quantized)
        refuse_missing_kernels(quantized)
        refuse_unrunnable(quantized, self.compute)
        refuse_unshared(quantized, allowed)
        refuse_narrow(quantized, allowed)
        refuse_overflow(quantized, self.compute)
        refuse_unbounded(Signature.of(quantized))

    def adapt(self, graph: GraphModule) -> None:
        per_token_linears(graph)  # what the delegate makes of a dynamic linear, whatever the graph says
        drop_batch_counters(graph)

    def build(self, reference: Flat, cases: Cases, stage: Stage) -> Artefact:
        self._case = cases[0]
        self._delegated, self._buffer, run = _built_and_run(
            self._executorch, reference.graph, cases, self.wanted, stage
        )
        return Artefact(run, self._delegated.kernels(self.wanted), len(self.compute), reference.graph)

    def account(self) -> tuple[Site, ...]:
        lost = {s.node for s in self._delegated.warn_of_float(self.wanted)}
        return tuple(replace(s, status="unsupported", reason=_IN_FLOAT) if s.node in lost else s for s in self.sites)

    def build_again(self, graph: GraphModule) -> Run:
        return _built(self._executorch, graph, self._case)

    def hold(self, hold: Hold, artefact: Artefact) -> Verdict:
        """With the branches of a `cond` that the example does not take as well."""
        verdict = super().hold(hold, artefact)
        if (other := other_branches(artefact.graph)) is not None:
            hold(other, self.build_again(other))
        return verdict

    def finish(self, about: Metadata) -> XnnpackProgram:
        return XnnpackProgram(with_metadata(self._buffer, about), about)


def _built_and_run(
    executorch: SimpleNamespace,
    graph: GraphModule,
    cases: Cases,
    wanted: Sequence[Site] = (),
    stage: Callable[[str], None] = lambda stage: None,
) -> tuple[Delegated, bytes, Method]:
    """What the program runs where, its bytes, and the program, which has run on each of the cases.

    Raises:
        LoweringError: names the op that ExecuTorch fails on, or has no kernel for.
    """
    doing, case = "lower", 0
    names = [n.name for n in graph.graph.nodes if n.op == "placeholder"]

    def trial(part: GraphModule) -> None:
        """Fail as the graph fails, with a part of it that may have fewer inputs."""
        kept = [names.index(n.name) for n in part.graph.nodes if n.op == "placeholder"]
        inputs = [[tensors[i] for i in kept] for tensors in cases]
        if doing == "lower":
            _delegate(executorch, part, inputs[0])
            return
        method = _built(executorch, part, inputs[0])
        for tensors in inputs if doing == "run" else ():
            method(*tensors)

    with undisturbed():
        try:
            stage("exporting and compiling")
            edge = _delegate(executorch, graph, cases[0])
            delegated = read_delegates(edge)
            delegated.check(wanted)
            refuse_without_kernel(edge, graph)
            doing = "build a program of"
            buffer = _buffer(edge)
            run = Method(buffer)
            doing = "run"
            stage("running it")
            for case, tensors in enumerate(cases):  # noqa: B007
                run(*tensors)
        except ExecutorchError as error:
            stage("looking for the op at fault")
            raise blamed(graph, error, trial, doing, other_sizes=_differ(cases[0], cases[case])) from error
    return delegated, buffer, run


def _differ(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    return any(a.shape != b.shape for a, b in zip(first, second, strict=True))


def _built(executorch: SimpleNamespace, graph: GraphModule, tensors: Sequence[torch.Tensor]) -> Method:
    """A program of a graph with other outputs."""
    with undisturbed():
        return Method(_buffer(_delegate(executorch, graph, tensors)))


def _buffer(edge: Any) -> bytes:
    try:
        with _sizes_as_exported(), quick_passes():
            return bytes(edge.to_executorch().buffer)
    except Exception as error:
        raise ExecutorchError(f"ExecuTorch cannot build the program: {str(error)[:2000]}") from error


def lower_float(exported: GraphModule, example_inputs: Any) -> tuple[Callable[..., Any], int]:
    """The float graph through the same rewrites and delegate, and its bytes: what to compare with.

    Args:
        exported: a float graph of `export`.
        example_inputs: one batch; the sizes to build for where they are fixed.

    Raises:
        MissingDependencyError, LoweringError: as `lower`.
    """
    pure = flat(exported)
    refuse_unbounded(pure.signature)
    cases = cases_of(pure, example_inputs)
    _, buffer, run = _built_and_run(executorch_modules(), pure.graph, cases)

    def call(*args: Any, **kwargs: Any) -> Any:
        values = run(*pure.signature.tensors_of(args, kwargs), *pure.initial.values())
        return pure.signature.outputs(values[: pure.count])

    return call, len(buffer)


def _delegate(executorch: SimpleNamespace, quantized: GraphModule, batch: Any) -> Any:
    try:
        graph = passes.copy_graph(quantized)
        decompose(graph)
        rewrite(graph, RULES)
        rewrite_branches(graph)
        refuse_complex(graph)
        prepare(graph)
        duplicate_dynamic_chains(graph)
        passes.unshare_weights(graph)
        own_storage(graph)
        passes.remove_dead_weights(graph)  # a program keeps what its graph does not read
        partitioner = partitioner_class()()
        exported = decomposed_once(export_again(graph, batch), partitioner)
        with _sizes_as_exported(), quick_passes():
            return executorch.lower(exported, partitioner=[partitioner])
    except TorchquantError:
        raise
    except Exception as error:
        raise ExecutorchError(f"ExecuTorch cannot lower the converted graph: {_with_causes(error)}") from error


def _sizes_as_exported() -> AbstractContextManager[None]:
    """Let shape functions narrow no size while a program is built.

    That of a convolution looks for torch's fastest kernel and notes `fewer than 16 samples`, and ExecuTorch plans the
    program's memory for no more. What an op really fixes is found by running the program with other sizes.
    """
    return ShapeEnv().suppress_guards()


def _with_causes(error: BaseException) -> str:
    """The messages of an error and of what it was raised from; ExecuTorch's passes hide theirs there."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(texts) < 4:
        texts.append(f"{type(cause).__name__}: {str(cause)[:1000]}")
        cause = cause.__cause__
    return "; from ".join(texts)
