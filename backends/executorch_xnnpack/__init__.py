"""ExecuTorch programs for the XNNPACK delegate: int8 ops counted in the artefact, run, held against their reference.

What lowers is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchquant.backends.executorch_xnnpack.capabilities import CAPABILITIES, SCHEMES, TARGET
from torchquant.backends.executorch_xnnpack.program import XnnpackProgram, load

if TYPE_CHECKING:
    from torchquant.backends.executorch_xnnpack.lowering import lower, lower_float

__all__ = ["CAPABILITIES", "SCHEMES", "TARGET", "XnnpackProgram", "load", "lower", "lower_float"]


def __getattr__(name: str) -> Any:
    if name not in ("lower", "lower_float"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.lowering"), name)
