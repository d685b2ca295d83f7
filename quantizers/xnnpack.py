"""XnnpackQuantizer: what ExecuTorch's XNNPACK delegate runs in int8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from torchquant.backends.executorch_xnnpack import CAPABILITIES, REQUANTIZATION_LIMIT, SCHEMES, TARGET
from torchquant.fx import ops
from torchquant.quantizers.engine import CapabilityQuantizer, has_quantized_output
from torchquant.quantizers.floors import set_floors
from torchquant.types import Scheme

__all__ = ["XnnpackQuantizer"]

_AUTO = "auto"


class XnnpackQuantizer(CapabilityQuantizer):
    """Annotates for `torchquant.backends.executorch_xnnpack`.

    Schemes: `static_int8` quantizes activations per tensor with ranges from calibration, int8 from op to op;
    `dynamic_int8` quantizes the input of each linear per token at run time and leaves everything between
    linears float. `auto`, the default, takes `dynamic_int8` for a network with attention or LayerNorm and no
    convolution, and `static_int8` for any other: on transformers dynamic is as fast and far more accurate.

    In `static_int8` a linear whose output joins a float residual sum runs in `dynamic_int8`: XNNPACK's static
    linear must round its output to int8, and the outliers of a residual stream do not fit there.
    """

    target = TARGET
    capabilities = CAPABILITIES
    schemes: ClassVar[Mapping[str, Scheme]] = {**SCHEMES, _AUTO: replace(SCHEMES["static_int8"], name=_AUTO)}
    default_scheme = _AUTO

    def annotate(self, model: GraphModule) -> GraphModule:
        """Resolve `auto` for this model, then annotate."""
        chosen = recommended_scheme(model)
        self._resolved = {_AUTO: chosen, **{name: name for name in SCHEMES}}
        return super().annotate(model)

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, Any]) -> None:
        """Also keep scales where XNNPACK's int32 biases and requantization factors do not overflow."""
        super().prepare_obs_or_fq_callback(model, edge_or_node_to_obs_or_fq)
        set_floors(model, edge_or_node_to_obs_or_fq, REQUANTIZATION_LIMIT)

    def scheme_for(self, node: Node, scheme: str) -> tuple[str, str]:
        """`auto` resolved; dynamic for a linear that feeds a float residual sum."""
        scheme = self._resolved[scheme]
        if scheme == "static_int8" and ops.op_name(node) == "linear" and _joins_float_sum(node):
            return "dynamic_int8", "its output joins a float residual sum, whose outliers a static int8 output loses"
        return scheme, ""


def recommended_scheme(model: GraphModule) -> str:
    """`dynamic_int8` for a network with attention or LayerNorm and no convolution, else `static_int8`."""
    kinds = {ops.op_name(n) for n in model.graph.nodes if n.op == "call_function"}
    is_transformer = bool(kinds & {"attention", "layer_norm", "softmax"}) or _has_rms_norm(kinds)
    return "dynamic_int8" if is_transformer and not any(k.startswith("conv") for k in kinds) else "static_int8"


def _has_rms_norm(kinds: set[str]) -> bool:
    return {"rsqrt", "mean"} <= kinds


def _joins_float_sum(node: Node) -> bool:
    for user in node.users:
        if ops.op_name(user) == "add":
            others = [n for n in user.all_input_nodes if n is not node]
            if others and not all(has_quantized_output(n) for n in others):
                return True
    return False
