"""x86 CPUs: our int8 kernels where they apply, oneDNN's through Inductor elsewhere, in one AOTInductor package.

The int8 convolutions and linears of the package are counted and proven. Loading a program needs torch alone; what
lowers is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchquant.backends.inductor_x86.capabilities import CAPABILITIES, SCHEMES, TARGET
from torchquant.backends.inductor_x86.program import X86Program, load

if TYPE_CHECKING:
    from torchquant.backends.inductor_x86.lowering import dynamo_backend, lower, lower_float
    from torchquant.backends.inductor_x86.op_times import op_ms

__all__ = ["CAPABILITIES", "SCHEMES", "TARGET", "X86Program", "dynamo_backend", "load", "lower", "lower_float", "op_ms"]

_LAZY = {"dynamo_backend": "lowering", "lower": "lowering", "lower_float": "lowering", "op_ms": "op_times"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
