"""OnnxQuantizer and OpenvinoQuantizer: what ONNX Runtime, TensorRT (schemes of its own) and OpenVINO run quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from torchquant.backends.onnx_qdq.capabilities import REDUCED, TARGET, TENSORRT
from torchquant.backends.openvino import capabilities as openvino
from torchquant.errors import SchemeError
from torchquant.fx import ops
from torchquant.quantizers.engine import CapabilityQuantizer
from torchquant.types import Capability, Scheme

__all__ = ["OnnxQuantizer", "OpenvinoQuantizer"]

_AUTO = "auto"


class OnnxQuantizer(CapabilityQuantizer):
    """Annotates for `torchquant.backends.onnx_qdq`.

    Schemes: `static_int8`: uint8 activations with ranges from calibration, int8 weights per channel; convolutions, sums
    and pools hand on codes, linears return floats. `dynamic_int8`: linears alone, the range of the whole activation at
    run time. `auto`, the default, takes `dynamic_int8` for a network without convolutions.

    `..._reduced_range`, or `reduced_range=True`: weights of 7 bits, for x86 CPUs without VNNI, where 8 bits overflow.

    `w{8,4,2}[_symmetric][_g{128,64,32,16}]`: weights alone, of linears and lookups, as int8, int4 or int2, with a scale
    for each group of input features, or without `_g...` for each output.

    `tensorrt_int8`: symmetric int8 activations at the inputs of convolutions and linears, no zero point anywhere;
    `tensorrt_fp8`: float8 likewise. Such files follow TensorRT's rules (`onnx_qdq.tensorrt.check`); it was not run.

    Args:
        scheme: one of those above; None: the default.
        reduced_range: weights of 7 bits.
        options: `exclude`, `overrides`, `is_qat`, `observer`, see `CapabilityQuantizer`.
    """

    target = TARGET
    schemes: ClassVar[Mapping[str, Scheme]] = {
        **TARGET.schemes,
        _AUTO: replace(TARGET.schemes["static_int8"], name=_AUTO),
    }
    default_scheme = _AUTO

    def __init__(self, scheme: str | None = None, *, reduced_range: bool = False, **options: Any) -> None:
        """As `CapabilityQuantizer`; raises SchemeError where a scheme has no reduced range."""
        super().__init__(scheme, **options)
        self.reduced_range = reduced_range
        if reduced_range and self.scheme != _AUTO:
            wanted = self.scheme if self.scheme.endswith(REDUCED) else f"{self.scheme}{REDUCED}"
            if wanted not in self.schemes:
                raise SchemeError(
                    f"{self.target} has no {wanted}; reduced_range goes with static_int8, dynamic_int8 and auto"
                )
            self.scheme = wanted

    def annotate(self, model: GraphModule) -> GraphModule:
        """Resolve `auto` for this model, then annotate."""
        convolved = any(ops.op_name(n).startswith("conv") for n in model.graph.nodes)
        self._resolved = ("static_int8" if convolved else "dynamic_int8") + (REDUCED if self.reduced_range else "")
        return super().annotate(model)

    def scheme_for(self, node: Node, scheme: str) -> tuple[str, str]:
        """`auto` resolved; smaller groups where the input is no whole groups."""
        return self.smaller_groups(node, self._resolved if scheme == _AUTO else scheme)

    def _observe(self, node: Node, row: Capability, scheme: str, why: str, excluded: Any) -> None:
        """For TensorRT nothing behind an op: it wants codes at inputs alone."""
        own = replace(row, observe_output=row.observe_output and scheme not in TENSORRT)
        super()._observe(node, own, scheme, why, excluded)


class OpenvinoQuantizer(OnnxQuantizer):
    """Annotates for `torchquant.backends.openvino`.

    Schemes: `static_int8` (the default), `static_int8_reduced_range` or `reduced_range=True` for x86 CPUs without VNNI,
    and weights alone, `w{8,4}[_symmetric][_g{128,64,32,16}]`; see `OnnxQuantizer`.

    Args:
        scheme: one of those above; None: the default.
        reduced_range: weights of 7 bits.
        options: `exclude`, `overrides`, `is_qat`, `observer`, see `CapabilityQuantizer`.
    """

    target = openvino.TARGET
    capabilities: ClassVar[tuple[Capability, ...]] = openvino.CAPABILITIES
    schemes: ClassVar[Mapping[str, Scheme]] = openvino.SCHEMES
    default_scheme = "static_int8"
