"""ONNX models with QuantizeLinear and DequantizeLinear, proven in ONNX Runtime: for it, TensorRT, browsers and others.

What writes them is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchquant.backends.onnx_qdq import tensorrt
from torchquant.backends.onnx_qdq.capabilities import CAPABILITIES, SCHEMES, TARGET
from torchquant.backends.onnx_qdq.program import OnnxProgram, load

if TYPE_CHECKING:
    from torchquant.backends.onnx_qdq.lowering import lower

__all__ = ["CAPABILITIES", "SCHEMES", "TARGET", "OnnxProgram", "load", "lower", "tensorrt"]


def __getattr__(name: str) -> Any:
    if name != "lower":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.lowering").lower
