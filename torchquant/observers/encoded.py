"""The observer of a weight in a format that is no affine grid."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.granularity import PerGroup
from torchao.quantization.pt2e.observer import ObserverBase

from torchquant.errors import SchemeError
from torchquant.files.shelf import kept
from torchquant.formats.encoded import EncodedFormat, dequantize_encoded, encoded
from torchquant.formats.groups import cells_of
from torchquant.fx import ops, passes
from torchquant.observers.minmax import check_finite

__all__ = ["EncodedWeight"]


class EncodedWeight(ObserverBase):
    """Marks a weight that `convert_pt2e` encodes; it needs no calibration data.

    Args:
        format: in which.
        axis: of the channels that are a cell each; None: the whole weight is one, or a group is.
        group_size: neighbours along the input axis that are a cell.
    """

    observes_weight = True
    site = "a weight"

    def __init__(self, *, format: EncodedFormat, axis: int | None, group_size: int | None, **_: Any) -> None:
        super().__init__(format.dtype)
        self.format, self.axis, self.group_size = format, axis, group_size
        self.quant_min, self.quant_max = format.quant_min, format.quant_max
        self.qscheme = torch.per_tensor_symmetric if axis is None else torch.per_channel_symmetric
        self.ch_axis = axis
        self.granularity = None if group_size is None else PerGroup(group_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The weight as it is."""
        check_finite(x, self.site)
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One and zero: what the cells have in common is the format's own."""
        return torch.ones(1), torch.zeros(1, dtype=torch.int32)

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as it will be decoded, in its own dtype."""
        stored = self.format.encode(cells_of(weight, self.axis, self.group_size))
        return dequantize_encoded(
            stored[0], list(stored[1:]), self.format.name, weight.shape, self.axis, self.group_size, weight.dtype
        )

    def _stored(self, node: Node, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the format stores of the weight of the op behind `node`; raises SchemeError with the op's name."""
        try:
            return encoded(self.format, cells_of(weight, self.axis, self.group_size))
        except SchemeError as error:
            owners = ", ".join(ops.module_path(user) or user.name for user in node.users)
            raise SchemeError(
                f"weight of {owners}: {error}. To leave the op out, exclude it in the Quantizer."
            ) from error

    def convert(self, model: GraphModule, node: Node) -> None:
        """Called by `convert_pt2e`: the codes, and the op that decodes them, in place of the observer."""
        source, call = node.args[0], model.graph.call_function
        assert isinstance(source, Node)
        with model.graph.inserting_before(node):
            if ops.is_constant(source):
                weight = ops.constant_value(model, source)
                stored = tuple(map(kept, self._stored(node, weight)))
                codes = passes.add_buffer(model, f"{node.name}_codes", stored[0])
                rest = [passes.add_buffer(model, f"{node.name}_scale_{i}", part) for i, part in enumerate(stored[1:])]
                form = (self.format.name, list(weight.shape), self.axis, self.group_size, weight.dtype)
                values = call(torch.ops.torchquant.dequantize_encoded.default, (codes, rest, *form))
            else:
                values = call(self.nearest, (source,))
        passes.put_in_place(model, node, values)
