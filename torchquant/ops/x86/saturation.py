"""Which int8 products of a graph oneDNN gets wrong on a CPU without VNNI.

Without VNNI oneDNN multiplies unsigned by signed bytes with `vpmaddubsw`, which adds two neighbouring products in 16
bits and saturates (oneDNN's developer guide, "Nuances of int8 computations"). Codes so small that no such sum leaves 16
bits are multiplied exactly everywhere: activations of 7 bits by any int8 weight, or weights of up to 64 by any
activation.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.fx import GraphModule, Node

from torchquant.errors import LoweringError
from torchquant.fx import ops
from torchquant.fx.reading import GraphReading
from torchquant.ops.x86 import exactness, matching

__all__ = ["note", "refuse", "saturating", "unsafe_products"]

_LARGEST = 2**15 - 1
_REMEDY = (
    "exclude them in the Quantizer, or quantize their activations to 7 bits: codes from 0 to 127 as of "
    "torchquant.formats.UINT7, in torchao's X86InductorQuantizer with reduce_range=True"
)


def unsafe_products(graph: GraphModule) -> dict[torch.dtype, list[Node]]:
    """By the dtype of their activations: products of codes that `vpmaddubsw` may saturate on."""
    unsafe: dict[torch.dtype, list[Node]] = {}
    reading = GraphReading(graph)
    for node in graph.graph.nodes:
        dtype = _unsafe_dtype(reading, node) if ops.op_name(node) in matching.PRODUCTS else None
        if dtype is not None:
            unsafe.setdefault(dtype, []).append(node)
    return unsafe


def _unsafe_dtype(reading: GraphReading, node: Node) -> torch.dtype | None:
    values, weight = ops.argument(node, 0), matching.weight_of(reading, ops.argument(node, 1))
    quantized = None if values is None else reading.op(values)
    if quantized is None or weight is None:
        return None  # a float product
    dtype, top = quantized.qparams.dtype, quantized.qparams.quant_max
    if dtype not in (torch.uint8, torch.int8):
        return None
    top = int(top) if isinstance(top, int) else torch.iinfo(dtype).max
    top += 128 if dtype == torch.int8 else 0  # oneDNN adds 128, for its instructions multiply unsigned bytes
    heaviest = int(weight.codes.to(torch.int16).abs().max()) if weight.codes.numel() else 0
    return dtype if 2 * top * heaviest > _LARGEST else None


def saturating(unsafe: Mapping[torch.dtype, Sequence[Node]]) -> list[Node]:
    """Those of `unsafe_products` that oneDNN would get wrong on this CPU."""
    return [n for dtype, nodes in unsafe.items() if dtype not in exactness.exact_dtypes() for n in nodes]


def refuse(unsafe: Mapping[torch.dtype, Sequence[Node]], own_kernels: bool) -> None:
    """Raise LoweringError that names the products that oneDNN would get wrong on this CPU, and what to do."""
    nodes = saturating(unsafe)
    if not nodes:
        return
    limited = ", or ONEDNN_MAX_CPU_ISA hides it" if "ONEDNN_MAX_CPU_ISA" in os.environ else ""
    theirs = "torchquant's own kernels do not take" if own_kernels else "own_kernels=False leaves to it"
    first = "" if own_kernels else "pass own_kernels=True, "
    raise LoweringError(
        f"this CPU has no VNNI{limited}: oneDNN's int8 products saturate there, and would give wrong results for "
        f"what {theirs}: {_names(nodes)}. To run this model here, {first}{_REMEDY}."
    )


def _names(nodes: Sequence[Node], limit: int = 8) -> str:
    texts = [f"{ops.op_name(n)} {n.name}" + (f" ({path})" if (path := ops.module_path(n)) else "") for n in nodes]
    return "; ".join(texts[:limit]) + (f" and {len(texts) - limit} more" if len(texts) > limit else "")


def note(package: Path, unsafe: Mapping[torch.dtype, Sequence[Node]]) -> None:
    """Write into a package which of its products are exact only where oneDNN's are."""
    if not unsafe:
        return
    content = {str(dtype).removeprefix("torch."): _names(nodes) for dtype, nodes in unsafe.items()}
    with zipfile.ZipFile(package, "a", zipfile.ZIP_DEFLATED) as out:
        root = out.namelist()[0].partition("/")[0]
        out.writestr(f"{root}/extra/{exactness.NOTE}", json.dumps(content))
