"""Whether an artefact computes what its converted graph does: holds, fails, or cannot be decided, and why.

Two correct implementations of a quantized graph differ where a sum lands on a rounding boundary, and a network may
amplify such a flip. Where the outputs alone decide nothing, the graph is held in depth: the artefact is built once more
with the values between its parts as outputs, and each part is held on the artefact's own inputs to it, so that no flip
travels further than one part. That also says which part is at fault.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from torchquant.calibration import batches as data
from torchquant.errors import InputError, LoweringError, TorchquantWarning
from torchquant.fx import ops
from torchquant.fx.flat import Flat
from torchquant.fx.signature import InputSpec
from torchquant.lowering.depth import Depth
from torchquant.lowering.judging import (
    FLOOR_DB,
    MIN_SQNR_DB,
    Perturbed,
    Run,
    Verdict,
    fault_of,
    is_clear,
    is_explained,
    reproduced,
)
from torchquant.measure.verify import Comparison, compare

__all__ = ["FLOOR_DB", "MIN_SQNR_DB", "Perturbed", "Verdict", "cases_of", "hold_against"]

_MOST_ELEMENTS = 1 << 18  # of inputs of the largest sizes, or twice those of the example
_STEPS = 3  # calls after which an artefact with state is looked at again


def cases_of(reference: Flat, batch: Any, *, largest: bool = False) -> list[tuple[torch.Tensor, ...]]:
    """What to prove an artefact with: tensors and states for the batch, and where the first size varies for one sample.

    With `largest` also for the largest sizes, or for larger ones where those are very large, as a target needs that
    plans its memory beforehand.

    Each is taken with the state as it is at first, and the last one as some calls leave it too. Sizes are left out
    where the graph itself cannot run on them, as where the edges of a graph point beyond its only node.

    Raises:
        InputError: the batch does not fit.
    """
    signature, states = reference.signature, list(reference.initial.values())
    leaves = data.leaves_of(signature, batch, "example_inputs")
    cases: list[tuple[torch.Tensor, ...]] = []
    limit = max(_MOST_ELEMENTS, 2 * sum(v.numel() for v in leaves if isinstance(v, torch.Tensor)))
    further = [data.with_largest_sizes(signature, leaves, limit)] if largest else []
    for sized in (leaves, *further, data.with_first_sizes(signature, leaves, 1)):
        if sized is not None:
            tensors = [v.contiguous() for v, s in zip(sized, signature.inputs, strict=True) if isinstance(s, InputSpec)]
            if not cases or _runs(reference.graph, (*tensors, *states)):
                cases.append((*tensors, *states))
    with torch.no_grad():
        for _ in range(_STEPS if states else 0):
            later = reference.split(reference.graph(*(t.clone() for t in cases[-1])))[1]
            cases.append((*cases[-1][: len(signature.tensors)], *later.values()))
    return cases


def _runs(graph: GraphModule, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the graph takes these sizes: an export may ask for more than bounds (that two divides them, say)."""
    try:
        with torch.no_grad():
            graph(*(t.clone() for t in tensors))
    except Exception:
        return False
    return True


def hold_against(
    reference: GraphModule,
    program: Run,
    batches: Sequence[Any],
    *,
    min_sqnr_db: float | None,
    op_error: float,
    target: str,
    build: Callable[[GraphModule], Run] | None = None,
) -> Verdict:
    """Run the artefact and its reference on the batches, and decide.

    Each floating-point output must be `MIN_SQNR_DB` close by itself, or as close as the reference reproduces itself
    (`MARGIN_DB` less, never below `FLOOR_DB`) when each of its float ops is off by a relative error of `op_error`;
    integers must be equal; NaN and infinity must stand in the same places. What does not meet that is held in depth.

    Args:
        reference: a pure function of tensors (`fx.flat`) or any converted graph.
        min_sqnr_db: a bound that is not relaxed in any way; None for the rules above.
        op_error: relative accuracy of the target's float arithmetic.
        build: makes an artefact of a graph that has further outputs; None where the target cannot.

    Raises:
        LoweringError: the artefact fails to run, or does not hold, or every output is NaN or infinite throughout.
    """
    if min_sqnr_db is not None and (not isinstance(min_sqnr_db, (int, float)) or math.isnan(min_sqnr_db)):
        raise InputError(f"min_sqnr_db is a number of dB or None, not {min_sqnr_db!r}")
    comparison = _compared(reference, program, batches, target)
    weak = [i for i, o in enumerate(comparison.outputs) if not is_clear(o)]
    _refuse_unprovable(reference, comparison, weak, target)
    verdict = Verdict(comparison)
    if min_sqnr_db is not None:
        verdict = _strict(comparison, min_sqnr_db, target)
        weak = [i for i in weak if not comparison.outputs[i].is_float]
    elif weak:
        weak = [i for i in weak if not is_explained(comparison.outputs[i], reproduced(reference, batches, op_error)[i])]
        verdict = Verdict(comparison, reason="as close as the converted graph reproduces itself")
    if weak:
        verdict = Depth(reference, program, batches, op_error, target).verdict(comparison, weak, build)
    empty = [i for i, o in enumerate(comparison.outputs) if o.elements and not o.compared]
    if empty:
        text = f"output {empty[0]} is NaN, infinite or empty on example_inputs"
        verdict = replace(verdict, outcome="undecided", reason=f"{text}; {verdict.reason}".rstrip("; "))
    if verdict.outcome == "undecided":
        warnings.warn(f"{target}: the artefact is not proven: {verdict.reason}", TorchquantWarning, stacklevel=3)
    return verdict


def _refuse_unprovable(reference: GraphModule, comparison: Comparison, weak: Sequence[int], target: str) -> None:
    """Raise LoweringError where no output can be compared, or the `weak` ones differ from run to run."""
    if not any(o.compared for o in comparison.outputs):
        raise LoweringError(
            f"{target}: every output of the converted graph is NaN, infinite or empty on example_inputs, so nothing "
            "can be proven; pass example_inputs on which it is not"
        )
    if weak and (draws := [n.name for n in reference.graph.nodes if ops.draws_numbers(n)]):
        raise LoweringError(
            f"{target}: {', '.join(draws[:4])} of the model draws random numbers, so no two runs agree and nothing can "
            "be proven; make them an input"
        )


def _compared(reference: GraphModule, program: Run, batches: Sequence[Any], target: str) -> Comparison:
    dtypes: list[list[torch.dtype]] = [[], []]

    def noting(run: Run, of: list[torch.dtype]) -> Run:
        def noted(*tensors: Any) -> Any:
            outputs = run(*tensors)
            of.extend(v.dtype for v in pytree.tree_leaves(outputs) if isinstance(v, torch.Tensor))
            return outputs

        return noted

    try:
        graph = noting(lambda *v: data.call(reference, v), dtypes[0])
        comparison = compare(graph, noting(program, dtypes[1]), batches)
        if dtypes[0] != dtypes[1]:
            first = next((a, b) for a, b in zip(*dtypes, strict=False) if a != b)
            raise InputError(f"{first[1]} where that returns {first[0]}")
        return comparison
    except InputError as error:
        raise LoweringError(f"{target}: the artefact does not return what the converted graph does: {error}") from error
    except Exception as error:
        raise LoweringError(f"{target}: the artefact was built but does not run: {error}") from error


def _strict(comparison: Comparison, min_sqnr_db: float, target: str) -> Verdict:
    for i, output in enumerate(comparison.outputs):
        if output.is_float and output.compared and not output.sqnr_db >= min_sqnr_db:
            raise LoweringError(f"{fault_of(target, i, output)}; you asked for {min_sqnr_db:.1f} dB (min_sqnr_db)")
    return Verdict(comparison, reason=f"each output at least {min_sqnr_db:g} dB, as asked for")


# in depth ------------------------------------------------------------------------------------------------------------
