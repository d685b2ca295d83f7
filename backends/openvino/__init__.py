"""OpenVINO's IR for Intel CPUs and what else OpenVINO runs on: written by way of ONNX, int8 layers counted, held.

What writes it is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchquant.backends.openvino.capabilities import CAPABILITIES, SCHEMES, TARGET
from torchquant.backends.openvino.program import OpenvinoProgram, load

if TYPE_CHECKING:
    from torchquant.backends.openvino.lowering import lower

__all__ = ["CAPABILITIES", "SCHEMES", "TARGET", "OpenvinoProgram", "load", "lower"]


def __getattr__(name: str) -> Any:
    if name != "lower":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.lowering").lower
