"""Save and load converted graphs: integer weights only, versions and digests inside, read without running anything."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the ops that a saved graph calls
from torch.fx import GraphModule

import torchquant.formats.dialect  # noqa: F401 - likewise
from torchquant.artifacts import exported
from torchquant.calibration import batches as data
from torchquant.errors import ArtifactError, InputError, SchemeError
from torchquant.files import archive
from torchquant.files.whole import reading, write_whole
from torchquant.formats.encoded import format_named
from torchquant.fx import ops, passes
from torchquant.fx.reading import is_converted
from torchquant.fx.signature import Signature
from torchquant.fx.states import own_states
from torchquant.surroundings import own_modes, unchanged

__all__ = ["export_again", "graph_in", "is_graph", "load", "save"]

_KIND = "converted graph"


@unchanged()
def save(quantized: GraphModule, path: str | os.PathLike[str], example_inputs: Any = None) -> Path:
    """Write a converted graph as an ExportedProgram (`.pt2`) with its integer weights and the versions.

    Args:
        quantized: what `convert_pt2e` returned.
        path: the file; its folder must exist.
        example_inputs: one batch to export with; made up from the graph's input shapes if None.

    Raises:
        InputError: the graph is not a converted one.
        ArtifactError: the file cannot be written.
    """
    if not isinstance(quantized, GraphModule) or not is_converted(quantized):
        raise InputError("save takes a converted graph, with dequantize ops in it; run convert_pt2e first")
    passes.remove_dead_weights(quantized)
    own_states(quantized)  # that have no part in autograd
    program = export_again(quantized, example_inputs)

    def write(part: Path) -> None:
        plain = part.with_suffix(".plain.pt2")
        torch.export.save(program, plain)
        archive.compress(plain, part)
        plain.unlink()
        archive.seal(part, _KIND, {})

    return write_whole(path, write)


@own_modes()
def export_again(graph: GraphModule, example_inputs: Any = None) -> torch.export.ExportedProgram:
    """Export a graph once more, with the dynamic sizes it has, whatever the sizes of the example.

    Raises:
        InputError: the example does not fit the graph.
    """
    graph = _with_distinct_names(graph)
    signature = Signature.of(graph)
    batch = data.example_of(graph) if example_inputs is None else example_inputs
    leaves = data.leaves_of(signature, batch, "example_inputs")
    shapes = data.dynamic_shapes_of(signature)
    with torch.no_grad():
        try:
            args, kwargs = signature.arguments(data.to_export(signature, leaves))
            return torch.export.export(graph, args, kwargs, dynamic_shapes=shapes)
        except Exception:
            if shapes is None:
                raise
        args, kwargs = signature.arguments(leaves)  # sizes of which the export asks more than bounds
        return torch.export.export(graph, args, kwargs, dynamic_shapes=shapes)


def _with_distinct_names(graph: GraphModule) -> GraphModule:
    """The graph, or a copy in which no op has the name of a parameter or buffer.

    torch.export makes inputs of those, and gives them the notes of the nodes of their names, whatever these are.
    """
    tensors = {re.sub(r"[^a-zA-Z0-9]", "_", name).lower() for name in graph.state_dict(keep_vars=True)}
    if not any(n.op == "call_function" and n.name in tensors for n in graph.graph.nodes):
        return graph
    twin = passes.copy_graph(graph)
    for node in twin.graph.nodes:
        if node.op == "call_function" and node.name in tensors:
            node._rename(f"{node.name}_op")
    twin.recompile()
    return twin


@unchanged()
def load(path: str | os.PathLike[str]) -> GraphModule:
    """Read what `save` wrote, as a callable graph with bit-equal outputs.

    Nothing that the file says is run: see `torchquant.artifacts.exported`.

    Args:
        path: of what `save` wrote.

    Raises:
        ArtifactError: no such file, truncated, damaged, foreign, of another version, with a number format that is not
            imported, or torch cannot read it.
    """
    return graph_in(path, archive.contents(path, _KIND)[1])


@own_modes()
def graph_in(path: str | os.PathLike[str], members: Mapping[str, bytes]) -> GraphModule:
    """The graph in the members of an archive; raises ArtifactError, with `path` in it."""
    program = exported.load_members(path, members)
    with reading(path, "a graph"):
        graph = program.module()
    assert isinstance(graph, GraphModule)
    _ask_for_formats(path, graph)
    return graph


def _ask_for_formats(path: str | os.PathLike[str], graph: GraphModule) -> None:
    """Raise ArtifactError for weights in a format that nothing in this process defines."""
    decoding = graph.graph.find_nodes(op="call_function", target=torch.ops.torchquant.dequantize_encoded.default)
    for node in decoding:
        try:
            format_named(ops.arguments(node)["format"])
        except SchemeError as error:
            raise ArtifactError(f"{path}: {error}") from error


def is_graph(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one that `save` wrote (rather than a lowered program)."""
    try:
        archive.read(path, _KIND)
    except ArtifactError:
        return False
    return True
