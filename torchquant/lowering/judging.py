"""How an output is judged by itself: close enough, as close as its reference reproduces itself, or at fault."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Interpreter, Node

from torchquant.fx import ops
from torchquant.fx.signature import Signature
from torchquant.measure.verify import Comparison, OutputComparison, compare

MIN_SQNR_DB = 30.0  # at which an output needs no further proof
FLOOR_DB = 20.0  # below which its irreproducibility is no excuse
MARGIN_DB = 6.0  # that an artefact may be worse than the reference reproduces itself
_ZERO = 1e-9  # beside a reference that is zero throughout
_EXACT = ("relu", "hardtanh", "cat", "max_pool2d", "pad", "embedding")  # ops that round nothing
Run = Callable[..., Any]


@dataclass(frozen=True)
class Verdict:
    """What comparing found.

    Args:
        comparison: the artefact's outputs against the converted graph's.
        outcome: `holds`, or `undecided`: nothing speaks against the artefact, and not enough for it. What fails raises.
        reason: how that was decided, where the outputs alone did not do it.
    """

    comparison: Comparison
    outcome: Literal["holds", "undecided"] = "holds"
    reason: str = ""


def is_clear(output: OutputComparison) -> bool:
    """Whether an output needs no further proof."""
    if not output.is_float:
        return output.compared == 0 or output.agreement == 1.0
    if output.elements == 0 or (output.sqnr_db == -math.inf and output.max_abs <= _ZERO):
        return True
    return output.sqnr_db >= MIN_SQNR_DB and output.lost is None


def is_explained(output: OutputComparison, reproduced: OutputComparison) -> bool:
    """Whether the reference itself is no more reproducible than that."""
    bound = max(FLOOR_DB, min(MIN_SQNR_DB, reproduced.sqnr_db - MARGIN_DB))
    return output.is_float and output.lost is None and output.sqnr_db >= bound


def fault_of(target: str, index: int, output: OutputComparison) -> str:
    where = f"{target}: output {index} of the artefact"
    if not output.is_float:
        return f"{where} equals the converted graph's in {100 * output.agreement:.1f} % of its elements"
    lost = ""
    if output.lost is not None:
        axis, index = output.lost
        lost = ", and " + ("most of it" if axis < 0 else f"what stands at index {index} of axis {axis}") + " is lost"
    largest = f"largest difference {output.max_abs:.3g}"
    return f"{where} is {output.sqnr_db:.1f} dB from the converted graph ({largest}){lost}"


def reproduced(reference: GraphModule, batches: Sequence[Any], op_error: float) -> list[OutputComparison]:
    """Each output in the worst of three runs of the reference in which each float op is slightly off."""
    runs = [compare(reference, Perturbed(reference, op_error, seed), batches) for seed in range(3)]
    return [min(each, key=lambda o: o.sqnr_db) for each in zip(*(r.outputs for r in runs), strict=True)]


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
