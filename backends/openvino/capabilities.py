"""What OpenVINO's CPU plugin computes in integers from a graph written as ONNX, and why the rest stays float."""

from __future__ import annotations

from dataclasses import replace

from torchquant.backends.onnx_qdq import capabilities as onnx_qdq
from torchquant.lowering.target import Target

__all__ = ["CAPABILITIES", "SCHEMES", "TARGET"]

SCHEMES = {
    name: scheme
    for name, scheme in onnx_qdq.SCHEMES.items()
    if name not in onnx_qdq.TENSORRT and not scheme.dynamic and not name.startswith("w2")
}
_OWN_WORDS = {
    "sub": "OpenVINO computes a difference in float",
    "avg_pool": "left float, as for ONNX Runtime, whose tables these are",
}
CAPABILITIES = tuple(
    replace(
        row,
        schemes=tuple(s for s in row.schemes if s in SCHEMES),
        reason=_OWN_WORDS.get(row.op, row.reason.replace("ONNX Runtime", "OpenVINO")),
    )
    for row in onnx_qdq.CAPABILITIES
)
TARGET = Target(
    "openvino",
    "torchquant.backends.openvino",
    "torchquant.quantizers.onnx:OpenvinoQuantizer",
    ".xml",
    SCHEMES,
    CAPABILITIES,
    here=onnx_qdq.TARGET.here,
)
