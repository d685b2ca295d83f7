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

from torchquant.backends.executorch_xnnpack.capabilities import FOUR_BITS, TARGET
from torchquant.backends.executorch_xnnpack.tables import TABLE_KERNELS
from torchquant.errors import LoweringError, TorchquantWarning
from torchquant.files.owned import OwnFolder
from torchquant.fx.sites import marked
from torchquant.lowering.accounts import names
from torchquant.types import Site

__all__ = ["Delegated", "read_delegates"]

_MOVES = ("XNNConvert", "XNNStaticTranspose", "XNNStaticReshape")
_FOUR_BITS = {"qcint4", "qbint4"}
_PLACES = ("input_id", "input1_id", "input2_id", "input3_id", "input4_id", "input5_id", "filter_id")


@dataclass
class Delegated:
    """The ops of a lowered program.

    Args:
        calls: delegate calls. integer, inexact: sites whose ops all read int8, and those with an op that reads float.
        four_bits: sites of the former whose weight is stored in 4 bits. tables: lookups in codes, outside the delegate.
        outside: edge op -> how many run in portable kernels.
    """

    calls: int = 0
    integer: set[str] = field(default_factory=set)
    inexact: set[str] = field(default_factory=set)
    four_bits: set[str] = field(default_factory=set)
    tables: set[str] = field(default_factory=set)
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
        wide = [s for s in wanted if _is_four_bits(s) and s.node not in self.four_bits]
        if wide:
            raise LoweringError(
                f"{len(wide)} of the ops with 4-bit weights have them in more bits in the program: {names(wide)}. "
                "Report this, or exclude them."
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
        inside = Counter(
            f"int{4 if _is_four_bits(s) else 8} {s.op}" for s in wanted if s.node in self.integer - self.tables
        )
        return {
            "delegate calls": self.calls,
            **{f"delegated {op}": n for op, n in inside.items()},
            **{f"portable {name}": n for name, n in self.outside.items() if name not in ("getitem", "alloc")},
        }


def read_delegates(edge: Any) -> Delegated:
    """Which sites run as integers in the delegate, which do not, and which ops run outside it."""
    graph: GraphModule = edge.exported_program().graph_module
    delegated = Delegated(outside=Counter(_edge_name(n) for n in graph.graph.nodes if n.op == "call_function"))
    delegated.calls = delegated.outside.pop("executorch_call_delegate", 0)
    for lowered in graph.children():
        if hasattr(lowered, "original_module"):
            for site, types in _sites_of(lowered):
                (delegated.inexact if "fp32" in types else delegated.integer).add(site)
                if types & _FOUR_BITS:
                    delegated.four_bits.add(site)
    for node in graph.graph.nodes:
        if node.op == "call_function" and _edge_name(node) not in ("executorch_call_delegate", "getitem"):
            (delegated.tables if _edge_name(node) in TABLE_KERNELS else delegated.inexact).add(marked(node))
    delegated.integer |= delegated.tables
    delegated.integer -= delegated.inexact
    return delegated


def _is_four_bits(site: Site) -> bool:
    weight = site.weight
    return site.op == "linear" and weight is not None and (weight.quant_min, weight.quant_max) == FOUR_BITS


def _sites_of(lowered: Any) -> Iterator[tuple[str, set[str]]]:
    """The sites of one delegate, each with the types of what its op reads; a fused one is what it is fused into."""
    nodes = [n for n in lowered.original_module.graph_module.graph.nodes if n.op == "call_function"]
    read = _types_read(_graph_of(lowered.processed_bytes))
    types: dict[Node, set[str]] = {}
    for node in nodes:
        site = marked(node)
        if not site or "quantize" in _edge_name(node) or "qparams" in _edge_name(node):
            continue
        handle, source = node.meta.get("debug_handle"), node.all_input_nodes[0] if node.all_input_nodes else None
        fused = None if source is None else types.get(source)
        own = read.get(handle, fused)
        if own is not None:
            types[node] = own
            yield site, own


def _types_read(graph: Mapping[str, Any]) -> dict[int, set[str]]:
    """Debug handle -> the types of all tensors that XNNPACK ops of it read."""
    types = [_datatype(value["xvalue_union"]) for value in graph["xvalues"]]
    verdicts: dict[int, set[str]] = {}
    moves: dict[int, set[str]] = {}
    for node in graph["xnodes"]:
        operands = [v for k, v in node["xnode_union"].items() if k in _PLACES and v < len(types)]
        kind = node["xnode_union_type"]
        if kind != "XNNConvert":
            into = moves if kind in _MOVES else verdicts
            into.setdefault(node["debug_handle"], set()).update(types[i] for i in operands)
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
