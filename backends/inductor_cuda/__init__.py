"""NVIDIA GPUs: packed weights and int8 or float8 products as opaque ops of ours, the rest compiled by Inductor.

What lowers or loads is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchquant.backends.inductor_cuda.capabilities import CAPABILITIES, SCHEMES, TARGET

if TYPE_CHECKING:
    from torchquant.backends.inductor_cuda.lowering import dynamo_backend, lower, transform
    from torchquant.backends.inductor_cuda.program import CudaProgram, load

__all__ = ["CAPABILITIES", "SCHEMES", "TARGET", "CudaProgram", "dynamo_backend", "load", "lower", "transform"]

_HOMES = {
    **dict.fromkeys(("dynamo_backend", "lower", "transform"), "lowering"),
    **dict.fromkeys(("CudaProgram", "load"), "program"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
