"""A model in OpenVINO's CPU plugin: with each operator in float, or with its int8 layers, and which those are."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchquant.backends.onnx_qdq.twice import Kernels
from torchquant.errors import LoweringError, MissingDependencyError
from torchquant.types import Site

__all__ = ["Compiled", "openvino_package", "read_layers"]

_ABOUT = ("layerType", "runtimePrecision", "originalLayersNames")
_PRECISIONS = ("u8", "i8", "u4", "i4")
_FUSED, _UNTOLD = "Subgraph", "untold"
_PRODUCTS = ("Convolution", "FullyConnected", "MatMul", "Deconvolution", "Gather")
# float32 throughout, and no rounding of the activations of layers whose weights alone have codes
_FAITHFUL = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def openvino_package() -> Any:
    """`openvino`, imported when it is first needed.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError(
            f"OpenVINO is not installed ({error}): pip install 'torchquant[openvino]'"
        ) from error
    return openvino


class Compiled:
    """A compiled model: tensors in, a tuple of tensors out, one call at a time.

    Args:
        model: an `openvino.Model`. integers: use int8 layers; else each operator as it stands.

    Raises:
        LoweringError: OpenVINO does not take the model.
    """

    def __init__(self, model: Any, *, integers: bool = True) -> None:
        package = openvino_package()
        options = {**_FAITHFUL, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        options |= {} if integers else {"LP_TRANSFORMS_MODE": "NO"}
        try:
            self.compiled = package.Core().compile_model(model, "CPU", options)
        except Exception as error:
            raise LoweringError(f"OpenVINO does not take the model: {_short(error)}") from error
        self._lock = threading.Lock()

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        arrays = [t.detach().contiguous().numpy() for t in tensors]
        with self._lock:
            try:
                values = self.compiled(arrays, share_inputs=True)
            except Exception as error:
                sizes = ", ".join(str(tuple(t.shape)) for t in tensors)
                raise LoweringError(f"OpenVINO cannot run the model on tensors of {sizes}: {_short(error)}") from error
            return tuple(torch.from_numpy(values[i].copy()) for i in range(len(self.compiled.outputs)))


def read_layers(compiled: Compiled, wanted: Sequence[Site], sites: Mapping[str, str]) -> Kernels:
    """Which sites run in layers whose precision OpenVINO's runtime model gives as integers of 8 bits or fewer.

    Args:
        wanted: compute sites that are to run in integers.
        sites: name of a node of the model or of its result -> its site.
    """
    counts, precisions = Counter[str](), dict[str, str]()
    for layer in compiled.compiled.get_runtime_model().get_ordered_ops():
        about = {key: value.astype(str) for key, value in dict(layer.get_rt_info()).items() if key in _ABOUT}
        kind, precision = about.get("layerType", ""), about.get("runtimePrecision", "")
        if kind == _FUSED:
            precision = _UNTOLD  # what stands there is that of its results
        elif kind not in _PRODUCTS:
            continue
        if precision in _PRECISIONS:
            counts[f"{precision} {kind}"] += 1
        for name in about.get("originalLayersNames", "").split(","):
            site = sites.get(name.partition("/")[0], "")
            if precision in _PRECISIONS or precisions.get(site, _UNTOLD) == _UNTOLD:
                precisions[site] = precision
    integer = {s.node for s in wanted if precisions.get(s.node) in _PRECISIONS}
    why = {s.node: _why(s, precisions.get(s.node, "")) for s in wanted if s.node not in integer}
    return Kernels(dict(counts), frozenset(integer), why)


def _why(site: Site, precision: str) -> str:
    if precision == _UNTOLD:
        return (
            f"OpenVINO compiles this {site.op} with its neighbours into one kernel and does not say in which precision"
        )
    if not precision:
        return f"OpenVINO's runtime model has no layer for this {site.op}"
    return f"OpenVINO runs this {site.op} in {precision}"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:1500]
