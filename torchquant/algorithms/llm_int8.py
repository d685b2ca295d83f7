"""LLM.int8: the few input channels of a linear with outliers are multiplied in float, all others in integers.

Dettmers, Lewis, Belkada, Zettlemoyer: "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", NeurIPS
2022, section 3.2.

    X (rows, in)   the input       W (out, in)   the weight       O = {j : max |X_j| >= threshold}
    X Wᵀ = X_O W_Oᵀ + X_{not O} W_{not O}ᵀ       the second product quantized, its ranges without the outliers

The paper finds O anew in each input, whose size no exported graph can know: here O is fixed by the calibration data.
The quantized linear keeps its shape; its input is multiplied by 0 in O, and so are its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import FixedQParamsObserver

from torchquant.algorithms.channels import folding
from torchquant.algorithms.channels.channel_statistics import ChannelMoments
from torchquant.calibration.calibrate import record
from torchquant.errors import InputError
from torchquant.fx import ops, passes
from torchquant.fx.producers import LAYERS, has_constants
from torchquant.fx.reading import observer_of
from torchquant.fx.sites import note
from torchquant.fx.ties import quantizes_output

__all__ = ["LLMInt8"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Read:
    """Linears that read a tensor through one observer."""

    observer: Node
    layers: list[Node]

    @property
    def tensor(self) -> Node:
        """What they read now: where it was a linear that is split meanwhile, the sum of its two products."""
        return self.observer.args[0]  # type: ignore[return-value]


class LLMInt8:
    """Splits linears whose input has a few outlying channels into an integer product and a small float one.

    What stays as it is is named in `notes`: convolutions, linears whose input is not quantized or is another op's
    quantized output, and those without outliers or with too many.

    Args:
        threshold: of `|x|`, from which a channel is an outlier; the paper's is 6.0.
        share: of the channels that may be outliers at most.

    Raises:
        InputError: an argument out of its range.
    """

    def __init__(self, threshold: float = 6.0, *, share: float = 0.1) -> None:
        if threshold <= 0:
            raise InputError(f"threshold is {threshold}; it must be above 0")
        if not 0 < share <= 1:
            raise InputError(f"share is {share}; it must be above 0 and at most 1")
        self.threshold, self.share = threshold, share
        self.notes: list[str] = []

    def transform(self, prepared: GraphModule, batches: Sequence[Any]) -> int:
        """Split in place, float function unchanged; returns how many linears changed. Recalibrate afterwards."""
        self.notes = []
        reads = self._reads(prepared)
        moments = [ChannelMoments(-1) for _ in reads]
        record(prepared, {r.observer: m for r, m in zip(reads, moments, strict=True)}, batches)
        changed = sum(self._split(prepared, r, m) for r, m in zip(reads, moments, strict=True))
        folding.tidy(prepared)
        return changed

    def _reads(self, prepared: GraphModule) -> list[_Read]:
        reads: dict[Node, list[Node]] = {}
        for node in prepared.graph.nodes:
            weight = ops.argument(node, 1) if ops.op_name(node) in LAYERS else None
            if weight is None or observer_of(prepared, weight) is None:
                continue
            reason = _refusal(prepared, node)
            if reason:
                self._leave(node, reason)
            else:
                reads.setdefault(node.args[0], []).append(node)
        return [_Read(observer, layers) for observer, layers in reads.items()]

    def _leave(self, node: Node, reason: str) -> None:
        self.notes.append(f"{node.name}: left as it is: {reason}")

    def _split(self, prepared: GraphModule, read: _Read, moments: ChannelMoments) -> int:
        """How many layers were split."""
        if moments.low is None or moments.high is None:
            self._leave(read.tensor, "no batch reaches it")
            return 0
        outlying = torch.maximum(moments.high, -moments.low) >= self.threshold
        count, channels = int(outlying.sum()), len(outlying)
        if not count:
            self._leave(read.tensor, f"no channel reaches {self.threshold}")
        elif count > self.share * channels:
            self._leave(read.tensor, f"{count} of {channels} channels reach {self.threshold}, more than a few")
        else:
            _apply(prepared, read, outlying, f"LLMInt8: {count} of {channels} input channels are outliers")
            return len(read.layers)
        return 0


def _refusal(prepared: GraphModule, layer: Node) -> str:
    """Why a layer with a quantized weight cannot be split; empty if it can."""
    source = ops.argument(layer, 0)
    observer = observer_of(prepared, source) if source is not None else None
    if ops.op_name(layer) != "linear":
        return "only linears are split"
    if source is None or observer is None:
        return "its input is not quantized"
    if isinstance(observer, FixedQParamsObserver):
        return "the range of its input is fixed"
    if not has_constants(prepared, layer):
        return "its weight is no constant"
    tensor = ops.argument(source, 0)
    if tensor is not None and quantizes_output(tensor):
        return f"its input is the quantized output of {tensor.name}, which an op between the two would leave float"
    return ""


def _apply(prepared: GraphModule, read: _Read, outlying: torch.Tensor, why: str) -> None:
    """Split the layers of one read; `outlying` (in,) is bool."""
    tensor, observer = read.tensor, folding.alone(prepared, read.observer, read.layers)
    columns = outlying.nonzero().flatten()
    first = folding.constant_at(prepared, read.layers[0], 1)
    assert first is not None
    factor = torch.where(outlying, torch.inf, 1.0).to(first.dtype)  # that the input is divided by
    folding.insert_ops(prepared, tensor, [observer], -1, factor, None, why)
    with prepared.graph.inserting_before(observer):
        index = passes.add_buffer(prepared, f"{tensor.name}_outliers", columns)
        outliers = prepared.graph.call_function(aten.index_select.default, (tensor, -1, index))
    outliers.meta = {"nn_module_stack": read.layers[0].meta.get("nn_module_stack", {})}
    if isinstance(value := tensor.meta.get("val"), torch.Tensor):
        outliers.meta["val"] = value[..., : len(columns)]
    note(outliers, "unsupported", why)
    for layer in read.layers:
        weight = folding.constant_at(prepared, layer, 1)
        assert weight is not None
        _add_float(prepared, layer, outliers, weight[:, columns], why)
        folding.fold_input(prepared, layer, torch.where(outlying, 0.0, 1.0).to(weight.dtype))


def _add_float(prepared: GraphModule, layer: Node, outliers: Node, weight: torch.Tensor, why: str) -> None:
    """Let what reads a layer read its sum with a float linear of the outliers."""
    constant = folding.new_constant(prepared, layer, f"{layer.name}_outlier_weight", weight)
    with prepared.graph.inserting_after(layer):
        side = prepared.graph.call_function(aten.linear.default, (outliers, constant))
    with prepared.graph.inserting_after(side):
        total = prepared.graph.call_function(aten.add.Tensor, (layer, side))
    layer.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    for node, status in ((side, "excluded"), (total, "unsupported")):
        node.meta = {k: layer.meta[k] for k in ("val", "tensor_meta", "nn_module_stack") if k in layer.meta}
        note(node, status, why)  # type: ignore[arg-type]
