"""The packages that this target needs, imported when they are first used."""

from __future__ import annotations

from types import SimpleNamespace

from torchquant.errors import MissingDependencyError

__all__ = ["exporting_packages", "runtime_package"]


def exporting_packages() -> SimpleNamespace:
    """`onnx` and the newest opset of `onnxscript`, with which torch writes ONNX.

    Raises:
        MissingDependencyError: one is not installed.
    """
    try:
        import onnx
        from onnxscript import opset21
    except ImportError as error:
        raise MissingDependencyError(f"onnx is not installed ({error}): pip install 'torchquant[onnx]'") from error
    return SimpleNamespace(onnx=onnx, opset=opset21)


def runtime_package() -> SimpleNamespace:
    """`onnxruntime` and `onnx`, which run a model and read what the runtime made of it.

    Raises:
        MissingDependencyError: one is not installed.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX Runtime is not installed ({error}): pip install 'torchquant[onnx]'"
        ) from error
    return SimpleNamespace(onnx=onnx, runtime=onnxruntime)
