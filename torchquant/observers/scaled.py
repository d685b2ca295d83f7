"""Observers for codes with a float scale and no zero point: float8, and symmetric integers by row at run time."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import MinMaxObserver, PerChannelMinMaxObserver

from torchquant.formats.dialect import EPS, choose_scale, quantize_scaled
from torchquant.fx import ops, passes
from torchquant.observers.minmax import Checked, DynamicActivation

__all__ = ["ScaledActivation", "ScaledDynamicActivation", "ScaledTensorWeight", "ScaledWeight"]


class _Scaled(Checked):
    """A scale from the largest magnitude; `convert_pt2e` then emits the ops of `torchquant.formats.dialect`."""

    value_dtype, rank = torch.float32, 1  # of what was observed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.value_dtype, self.rank = x.dtype, x.ndim
        return super().forward(x)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale (1,) or (channels,) float32, and zeros."""
        self.require_data()
        observer: Any = self
        magnitude = torch.maximum(-observer.min_val, observer.max_val).reshape(-1, 1)
        scale = choose_scale(magnitude, 1, observer.quant_min, observer.quant_max, EPS).reshape(-1)
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    def convert(self, model: GraphModule, node: Node) -> None:
        """Called by `convert_pt2e`: quantize and dequantize in place of the observer; of a weight only its codes."""
        source, (scale, _) = node.args[0], self.calculate_qparams()
        observer: Any = self
        grid = (observer.quant_min, observer.quant_max, observer.dtype)
        assert isinstance(source, Node)
        if scale.numel() > 1:
            scale = scale.reshape(-1, *[1] * (self.rank - 1))  # the first axis is the output channels'
        with model.graph.inserting_before(node):
            scales = passes.add_buffer(model, f"{node.name}_scale", scale)
            if ops.is_constant(source):
                weight = ops.constant_value(model, source)
                codes = passes.add_buffer(model, f"{node.name}_codes", quantize_scaled(weight, scale, *grid))
            else:
                codes = model.graph.call_function(torch.ops.torchquant.quantize_scaled.default, (source, scales, *grid))
            values = model.graph.call_function(
                torch.ops.torchquant.dequantize_scaled.default, (codes, scales, *grid, self.value_dtype)
            )
        passes.put_in_place(model, node, values)


class ScaledActivation(_Scaled, MinMaxObserver):
    """One scale for a tensor, from the largest magnitude seen."""


class ScaledWeight(_Scaled, PerChannelMinMaxObserver):
    """One scale for each output channel of a weight."""

    observes_weight = True


class ScaledTensorWeight(_Scaled, MinMaxObserver):
    """One scale for a weight."""

    observes_weight = True


class ScaledDynamicActivation(DynamicActivation):
    """Marks a tensor quantized at run time with one scale for each vector along `axis`, or one in all (None)."""

    value_dtype = torch.float32

    def __init__(self, *, axis: int | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.axis, self.is_dynamic, self.per_token = axis, True, axis is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.value_dtype = x.dtype
        return super().forward(x)

    def convert(self, model: GraphModule, node: Node) -> None:
        """Called by `convert_pt2e`: choose a scale, quantize and dequantize in place of the observer."""
        source = node.args[0]
        assert isinstance(source, Node)
        dtype = getattr(source.meta.get("val"), "dtype", self.value_dtype)
        call, dialect = model.graph.call_function, torch.ops.torchquant
        with model.graph.inserting_before(node):
            scale = call(dialect.choose_scale.default, (source, self.axis, self.quant_min, self.quant_max, EPS))
            grid = (scale, self.quant_min, self.quant_max, self.dtype)
            codes = call(dialect.quantize_scaled.default, (source, *grid))
            values = call(dialect.dequantize_scaled.default, (codes, *grid, dtype))
        passes.put_in_place(model, node, values)
