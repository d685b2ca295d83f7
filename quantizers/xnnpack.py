"""XnnpackQuantizer: what ExecuTorch's XNNPACK delegate runs in int8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from torchquant.backends.executorch_xnnpack.capabilities import (
    FEW_BITS,
    LOOKUPS,
    REQUANTIZATION_LIMIT,
    TARGET,
    inputs_of,
)
from torchquant.errors import SchemeError
from torchquant.fx import ops
from torchquant.fx.rewrites.decompose import normalize
from torchquant.quantizers.engine import CapabilityQuantizer, has_quantized_output, is_annotated
from torchquant.quantizers.floors import set_floors
from torchquant.types import Scheme

__all__ = ["XnnpackQuantizer"]

_AUTO, _AS_EXECUTORCH_SAYS = "auto", "8da4w"


class XnnpackQuantizer(CapabilityQuantizer):
    """Annotates for `torchquant.backends.executorch_xnnpack`.

    Schemes: `static_int8` quantizes activations per tensor with ranges from calibration, int8 from op to op;
    `dynamic_int8` quantizes the input of each linear per token at run time and leaves everything between
    linears float. `auto`, the default, takes `dynamic_int8` for a network without convolutions, and `static_int8` for
    any other: for linears dynamic is as fast and more accurate, on transformers far more. Networks that are trained
    (`is_qat`) or whose sizes vary keep static ranges unless they have attention or LayerNorm.

    In `static_int8` a linear whose output joins a float residual sum runs in `dynamic_int8`: XNNPACK's static
    linear must round its output to int8, and the outliers of a residual stream do not fit there.

    `w4a8_symmetric_g{256,128,64,32}`: linears with 4-bit weights, a scale for each group of input features, or without
    `_g...` for each output, on inputs that are quantized as in `dynamic_int8`; `8da4w` is ExecuTorch's name for
    `w4a8_symmetric_g32`. Tables of lookups then have 4 bits too; `overrides={"op:embedding": "w8"}` and the like (`w8`,
    `w4_g32`, `w4_symmetric_g64` ...) choose for them, with any scheme. A weight whose inputs are no whole groups gets
    the largest smaller group that fits, or one scale for each output, and the report says so.

    Args:
        scheme: one of those above; None: the default.
        options: `exclude`, `overrides`, `is_qat`, `observer`, see `CapabilityQuantizer`.
    """

    target = TARGET
    schemes: ClassVar[Mapping[str, Scheme]] = {
        **TARGET.schemes,
        _AUTO: replace(TARGET.schemes["static_int8"], name=_AUTO),
        _AS_EXECUTORCH_SAYS: replace(TARGET.schemes["w4a8_symmetric_g32"], name=_AS_EXECUTORCH_SAYS),
    }
    default_scheme = _AUTO

    def __init__(self, scheme: str | None = None, **options: Any) -> None:
        """As `CapabilityQuantizer`; raises SchemeError for a scheme of lookups alone, which no linear runs in."""
        super().__init__(scheme, **options)
        if self.scheme in LOOKUPS:
            raise SchemeError(
                f"{self.target} runs lookups in {self.scheme}, and no linear: XNNPACK multiplies no such weights with "
                f"float activations. Take {FEW_BITS[-1]} (activations of 8 bits, quantized at run time), and for "
                f'tables overrides={{"op:embedding": "{self.scheme}"}}'
            )

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Also write clamps, chunks, selects, shuffles and means in the forms that XNNPACK runs in int8."""
        model = super().transform_for_annotation(model)
        normalize(model)
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """Resolve `auto` for this model, then annotate; again, while a linear turns out to feed a float sum.

        Whether a sum is float is known only once the whole graph is annotated: both its operands may be linears.
        """
        chosen = recommended_scheme(model, is_qat=self.is_qat)
        self._resolved = {_AUTO: chosen, _AS_EXECUTORCH_SAYS: "w4a8_symmetric_g32"}
        self._joining: set[Node] = set()
        before = {n: (n.meta.get(Q_ANNOTATION_KEY), n.meta.get("custom")) for n in model.graph.nodes}
        while True:
            super().annotate(model)
            joining = {n for n in model.graph.nodes if ops.op_name(n) == "linear" and _joins_float_sum(n)}
            if joining <= self._joining:
                return model
            self._joining |= joining
            for node, (annotation, custom) in before.items():
                _restore(node, Q_ANNOTATION_KEY, annotation)
                _restore(node, "custom", custom)

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, Any]) -> None:
        """Also keep scales where XNNPACK's int32 biases and requantization factors do not overflow."""
        super().prepare_obs_or_fq_callback(model, edge_or_node_to_obs_or_fq)
        set_floors(model, edge_or_node_to_obs_or_fq, REQUANTIZATION_LIMIT)

    def scheme_for(self, node: Node, scheme: str) -> tuple[str, str]:
        """`auto` resolved; dynamic for a linear that feeds a float residual sum; weights alone for lookups."""
        scheme = self._resolved.get(scheme, scheme)
        if scheme == "static_int8" and node in self._joining:
            return "dynamic_int8", "its output joins a float residual sum, whose outliers a static int8 output loses"
        odd = f"its {inputs_of(node)} inputs are odd in number, and codes of 4 bits are packed in pairs"
        odd = odd if inputs_of(node) % 2 else ""
        if ops.op_name(node) == "embedding":
            weights = scheme.replace("a8", "", 1)
            eight = weights.replace("w4", "w8", 1)
            scheme, why = (eight, odd) if odd and eight != weights else (weights, "")
            chosen, smaller = self.smaller_groups(node, scheme)
            return chosen, smaller or why
        if scheme in FEW_BITS and odd:
            return "dynamic_int8", odd
        chosen, why = self.smaller_groups(node, scheme)
        return self._resolved.get(chosen, chosen), why


def recommended_scheme(model: GraphModule, *, is_qat: bool = False) -> str:
    """`dynamic_int8` without convolutions, else `static_int8`.

    In QAT, and where sizes vary, only with attention or LayerNorm: ExecuTorch fails on some linears of varying sizes.
    """
    kinds = {ops.op_name(n) for n in model.graph.nodes if n.op == "call_function"}
    is_transformer = bool(kinds & {"attention", "layer_norm", "softmax"}) or _has_rms_norm(kinds)
    has_convolutions = any(k.startswith("conv") for k in kinds)
    plain = not is_qat and not _has_varying_sizes(model)
    return "dynamic_int8" if not has_convolutions and (is_transformer or plain) else "static_int8"


def _has_varying_sizes(model: GraphModule) -> bool:
    shapes = [ops.shape_of(n) or () for n in model.graph.nodes if n.op == "placeholder"]
    return any(not isinstance(size, int) for shape in shapes for size in shape)


def _has_rms_norm(kinds: set[str]) -> bool:
    return {"rsqrt", "mean"} <= kinds


def _joins_float_sum(node: Node) -> bool:
    """Whether a linear with a static int8 output is added to what is float."""
    if not has_quantized_output(node):
        return False
    return any(ops.op_name(user) == "add" and not is_annotated(user) for user in node.users)


def _restore(node: Node, key: str, value: Any) -> None:
    if value is None:
        node.meta.pop(key, None)
    else:
        node.meta[key] = value
