"""Float against quantized against lowered: how far the output is from the float one after each stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from torchquant.analysis.findings import Finding
from torchquant.artifacts.program import Program
from torchquant.calibration import batches as data
from torchquant.errors import InputError
from torchquant.fx.passes import copy_graph
from torchquant.measure.verify import compare

__all__ = ["Stage", "stage_findings", "stages_of"]

_LOST_DB = 1.0  # what a program may lose beside its graph


@dataclass(frozen=True)
class Stage:
    """One stage of a model.

    Args:
        name: `quantized`, or the program's target.
        float_db: SQNR in dB of its output against the float model's.
        graph_db: against the quantized graph's; infinite for that itself.
        agreement: share of rows of the first output whose largest element is where the float model has it.
    """

    name: str
    float_db: float
    graph_db: float
    agreement: float


def stages_of(
    reference: Callable[..., Any], graph: GraphModule | None, programs: Sequence[Program], batches: Sequence[Any]
) -> tuple[Stage, ...]:
    """A stage for the graph, if there is one, and one for each program.

    Raises:
        InputError: what is no program.
    """
    for program in programs:
        if not isinstance(program, Program):
            raise InputError(f"programs are what a backend's lower() or load() returned, not {program!r:.80}")
    models: dict[str, Any] = {} if graph is None else {"quantized": copy_graph(graph)}
    models |= {program.target: program for program in programs}
    stages = []
    for name, model in models.items():
        if isinstance(model, Program):
            model.reset()  # to the state that the float graph is in
        twin = copy_graph(reference) if isinstance(reference, GraphModule) else reference  # it may keep state
        compared = compare(twin, model, data.each(batches))
        beside = None
        if graph is not None and isinstance(model, Program):
            model.reset()
            beside = compare(copy_graph(graph), model, data.each(batches)).sqnr_db
        level = float("inf") if beside is None else beside
        stages.append(Stage(name, compared.sqnr_db, level, compared.agreement))
    return tuple(stages)


def stage_findings(stages: Sequence[Stage]) -> list[Finding]:
    """Programs whose output is further from the float one than their graph's."""
    quantized = next((s for s in stages if s.name == "quantized"), None)
    if quantized is None:
        return []
    return [
        Finding(
            "error",
            "output",
            "",
            "lost in lowering",
            f"the program for {stage.name} is {stage.float_db:.1f} dB from float, its graph {quantized.float_db:.1f}",
            "look at the program's proof; lower again with min_sqnr_db, or exclude what the target computes otherwise",
        )
        for stage in stages
        if stage is not quantized and stage.float_db < quantized.float_db - _LOST_DB
    ]
