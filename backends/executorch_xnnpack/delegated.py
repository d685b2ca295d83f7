"""What a delegate really computes in int8: read from the XNNPACK graphs inside the program, op by op.

A `.pte` in which an op stands between a dequantize and a quantize op says nothing yet: XNNPACK computes many of them in
float. So each delegate's graph is read back from its bytes, and an op counts where the tensors that it reads are int8.
"""

from __future__ import annotations

import importlib.resources
import json
import operator
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from torchquant.backends.executorch_xnnpack.capabilities import TARGET
from torchquant.errors import LoweringError, TorchquantWarning
from torchquant.files.owned import OwnFolder
from torchquant.fx.sites import marked
from torchquant.lowering.accounts import names
from torchquant.types import Site

__all__ = ["Delegated", "read_delegates"]

_MOVES = ("XNNConvert", "XNNStaticTranspose", "XNNStaticReshape")
_PLACES = ("input_id", "input1_id", "input2_id", "input3_id", "input4_id", "input5_id", "filter_id")


@dataclass
class Delegated:
    """The ops of a lowered program.

    Args:
        calls: delegate calls. integer, inexact: sites whose ops all read int8, and those with an op that reads float.
        outside: edge op -> how many run in portable kernels.
    """

    calls: int = 0
    integer: set[str] = field(default_factory=set)
    inexact: set[str] = field(default_factory=set)
    outside: Counter[str] = field(default_factory=Counter)

    def check(self, wanted: Sequence[Site]) -> None:
        """Raise LoweringError if an annotated compute op, or a quantize op, runs outside int8 kernels."""
        lost = [s for s in wanted if s.compute and s.node not in self.integer]
        left = {name: n for name, n in self.outside.items() if "quantize" in name or "qparams" in name}
        if lost or left:
            static = any(s.activation is not None and not s.activation.dynamic for s in lost)
            raise LoweringError(
                f"{len(wanted)} ops are annotated, and the XNNPACK delegate computes {len(lost)} compute ops of them "
                f"in float or not at all: {names(lost) or 'none'}"
                + (f"; outside it are {left}" if left else "")
                + (". A static op has to be given an int8 output, too (an output_qspec)" if static else "")
                + ". Exclude what is not delegated, or pass allow_float."
            )

    def warn_of_float(self, wanted: Sequence[Site]) -> list[Site]:
        """The annotated sites that run in float after all; a warning names them."""
        lost = [s for s in wanted if s.node not in self.integer]
        if lost:
            warnings.warn(
                f"{len(lost)} ops are annotated, yet XNNPACK computes them in float, between a dequantize and a "
                f"quantize op: {names(lost)}. The result is that of the converted graph; it is slower than int8.",
                TorchquantWarning,
                stacklevel=4,
            )
        return lost

    def kernels(self, wanted: Sequence[Site]) -> dict[str, int]:
        """Delegate calls, int8 ops inside them by kind, ops outside them."""
        inside = Counter(s.op for s in wanted if s.node in self.integer)
        return {
            "delegate calls": self.calls,
            **{f"delegated int8 {op}": n for op, n in inside.items()},
            **{f"portable {name}": n for name, n in self.outside.items() if name not in ("getitem", "alloc")},
        }


def read_delegates(edge: Any) -> Delegated:
    """Which sites run as integers in the delegate, which do not, and which ops run outside it."""
    graph: GraphModule = edge.exported_program().graph_module
    delegated = Delegated(outside=Counter(_edge_name(n) for n in graph.graph.nodes if n.op == "call_function"))
    delegated.calls = delegated.outside.pop("executorch_call_delegate", 0)
    for lowered in graph.children():
        if hasattr(lowered, "original_module"):
            for site, integer in _sites_of(lowered):
                (delegated.integer if integer else delegated.inexact).add(site)
    for node in graph.graph.nodes:
        if node.op == "call_function" and _edge_name(node) not in ("executorch_call_delegate", "getitem"):
            delegated.inexact.add(marked(node))
    delegated.integer -= delegated.inexact
    return delegated


def _sites_of(lowered: Any) -> Iterator[tuple[str, bool]]:
    """The sites of one delegate, each with whether its op reads int8; a fused one is what it is fused into."""
    nodes = [n for n in lowered.original_module.graph_module.graph.nodes if n.op == "call_function"]
    integer = _integer_handles(_graph_of(lowered.processed_bytes))
    verdicts: dict[Node, bool] = {}
    for node in nodes:
        site = marked(node)
        if not site or "quantize" in _edge_name(node) or "qparams" in _edge_name(node):
            continue
        handle, source = node.meta.get("debug_handle"), node.all_input_nodes[0] if node.all_input_nodes else None
        verdict = integer.get(handle)
        if verdict is None and source is not None and source in verdicts:
            verdict = verdicts[source]  # fused into the op that it reads
        if verdict is not None:
            verdicts[node] = verdict
            yield site, verdict


def _integer_handles(graph: Mapping[str, Any]) -> dict[int, bool]:
    """Debug handle -> whether every XNNPACK op of it reads quantized tensors."""
    types = [_datatype(value["xvalue_union"]) for value in graph["xvalues"]]
    verdicts: dict[int, bool] = {}
    moves: dict[int, bool] = {}
    for node in graph["xnodes"]:
        operands = [v for k, v in node["xnode_union"].items() if k in _PLACES and v < len(types)]
        integer = all(types[i] != "fp32" for i in operands)
        kind = node["xnode_union_type"]
        if kind != "XNNConvert":
            into = moves if kind in _MOVES else verdicts
            into[node["debug_handle"]] = into.get(node["debug_handle"], True) and integer
    return {**moves, **verdicts}


def _datatype(value: Mapping[str, Any]) -> str:
    return str((value.get("tensor_value") or value)["datatype"]).removeprefix("xnn_datatype_")


def _graph_of(payload: bytes) -> dict[str, Any]:
    """The XNNPACK graph of a delegate's bytes, as its schema names things."""
    from executorch.backends.xnnpack import serialization
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    with OwnFolder("torchquant-xnnpack-") as folder:
        schema, file = folder / "schema.fbs", folder / "graph.bin"
        schema.write_bytes(importlib.resources.files(serialization).joinpath("schema.fbs").read_bytes())
        file.write_bytes(payload[start : start + header.flatbuffer_size])
        try:
            _flatc_decompile(str(folder), str(schema), str(file))
            text = (folder / "graph.json").read_text()
        except Exception as error:
            raise LoweringError(f"{TARGET}: the delegate's graph cannot be read back: {error}") from error
    return dict(json.loads(re.sub(r":\s*(-?)(inf|nan)\b", _json_number, text)))


def _json_number(match: re.Match[str]) -> str:
    return f": {match[1]}{'Infinity' if match[2] == 'inf' else 'NaN'}"


def _edge_name(node: Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    parts = str(getattr(node.target, "__name__", node.target)).split(".")  # namespace, op, overload
    return parts[1] if len(parts) == 3 else parts[0]
