"""Which products ONNX Runtime multiplies in integers, read from the model as it runs it, and why not the others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torchquant.backends.onnx_qdq.twice import Kernels
from torchquant.types import Site

__all__ = ["read_kernels", "site_name"]

INTEGER = (
    *("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
    *("QGemm", "MatMulNBits", "GatherBlockQuantized"),
)
_FLOAT = ("Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "NhwcFusedConv")
_BYTES = (2, 3)  # uint8 and int8 among the types of ONNX
_ENDINGS = re.compile(r"(_token_\d+|/MatMulAddFusion|_nhwc|\.\d+)+$")  # what the runtime, and we, put behind a name


def read_kernels(optimized: Any, wanted: Sequence[Site]) -> Kernels:
    """Count the integer kernels of the model as the runtime runs it.

    Args:
        optimized: an `onnx.ModelProto` whose nodes bear the names of their sites.
        wanted: compute sites that are to run in integers.
    """
    made: dict[str, list[Any]] = {}
    for node in optimized.graph.node:
        made.setdefault(site_name(node.name), []).append(node)
    counts: Counter[str] = Counter()
    for nodes in made.values():
        counts.update(n.op_type for n in nodes if n.op_type in INTEGER)
    codes = {i.name for i in optimized.graph.initializer if i.data_type in _BYTES}
    integer = {s.node for s in wanted if any(_is_integer(n, codes) for n in made.get(s.node, ()))}
    lookups = sum(n.op_type == "Gather" for s in wanted for n in made.get(s.node, ()) if s.node in integer)
    found = {**counts, **({"Gather of codes": lookups} if lookups else {})}
    why = {s.node: _why(s, made.get(s.node, [])) for s in wanted if s.node not in integer}
    return Kernels(found, frozenset(integer), why)


def site_name(node: str) -> str:
    """The site of a node, by the name that it was written with and the runtime has changed."""
    return _ENDINGS.sub("", node.removeprefix("fused "))


def _is_integer(node: Any, codes: set[str]) -> bool:
    return node.op_type in INTEGER or (node.op_type == "Gather" and node.input[0] in codes)


def _why(site: Site, nodes: Sequence[Any]) -> str:
    """Why ONNX Runtime computes a site in float that the graph has codes for."""
    kinds = {n.op_type for n in nodes}
    if site.op.startswith("conv_transpose"):
        return "ONNX Runtime has no integer transposed convolution on CPUs"
    if site.op == "embedding":
        return "the whole table is decoded in each call"
    if site.activation is None and site.op.startswith("conv"):
        return "ONNX Runtime has no convolution with codes as weights alone: it decodes them"
    if site.activation is not None and site.activation.dtype.is_floating_point:
        return "ONNX Runtime multiplies float8 codes in float on CPUs"
    if site.op.startswith("conv") and kinds & set(_FLOAT):
        return "its output is not quantized, and ONNX Runtime's integer convolution returns codes"
    if not nodes:
        return "ONNX Runtime computed it in advance, or with its neighbours in one float kernel"
    return f"ONNX Runtime runs it as {', '.join(sorted(kinds))}, in float: a weight that several ops read, or odd sizes"
