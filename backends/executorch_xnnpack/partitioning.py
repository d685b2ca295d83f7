"""ExecuTorch's partitioner and decompositions in one trace of the graph where that comes to the same, else in more."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.fx import Node

from torchquant.fx import ops

__all__ = ["decomposed_once", "partitioner_class"]


@cache
def partitioner_class() -> Any:
    """A subclass of ExecuTorch's partitioner, which is imported here."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    class OncePartitioner(XnnpackPartitioner):
        """Names the ops to keep without a condition, where all of them meet it: then ExecuTorch has not to try."""

        def ops_to_not_decompose(self, ep: Any) -> tuple[list[Any], Callable[[Node], bool] | None]:
            kept, takes = super().ops_to_not_decompose(ep)
            if ep.dialect == "EDGE" or any(map(ops.is_higher_order, ep.graph.nodes)):
                return kept, takes
            nodes = [n for n in ep.graph.nodes if n.target in kept]
            targets = list(dict.fromkeys(n.target for n in nodes))
            return (targets, None) if all(map(_is_value, targets)) and all(map(takes, nodes)) else (kept, takes)

    return OncePartitioner


def _is_value(target: Any) -> bool:
    schema = target._schema
    return not schema.is_mutable and all(r.alias_info is None for r in schema.returns)


def decomposed_once(exported: torch.export.ExportedProgram, partitioner: Any) -> torch.export.ExportedProgram:
    """The program, which is decomposed as soon as it is asked to make itself functional, and not once more behind that.

    Both are traces of the whole graph.
    """
    from executorch.exir.program._program import _default_decomposition_table

    kept = partitioner.ops_to_not_decompose(exported)[0]
    table = {op: rule for op, rule in _default_decomposition_table().items() if op not in kept}
    done: list[torch.export.ExportedProgram] = []

    def first(wanted: Any = None, *args: Any, **options: Any) -> torch.export.ExportedProgram:
        if wanted != {} or done:
            return run(wanted, *args, **options)
        done.append(run(table, *args, **options))
        again = done[0].run_decompositions

        def second(wanted: Any = None, *args: Any, **options: Any) -> torch.export.ExportedProgram:
            is_done = wanted is not None and wanted.keys() == table.keys()
            return done[0] if is_done else again(wanted, *args, **options)

        done[0].run_decompositions = second
        return done[0]

    run = exported.run_decompositions
    exported.run_decompositions = first
    return exported
