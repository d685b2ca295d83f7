"""Observers that hold an answer: codes that an algorithm chose for a weight, a range that it chose for a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import ObserverBase

from torchquant.calibration.evaluator import FLOAT_BIAS
from torchquant.files.shelf import is_open, kept
from torchquant.formats.packed import LARGEST_BITS, bits_of, pack_codes, unpack_codes
from torchquant.fx import ops, passes
from torchquant.fx.blocks import weight_of
from torchquant.fx.grids import Grid
from torchquant.fx.storing import pack_weight
from torchquant.observers.minmax import least_scale

__all__ = ["Solution", "SolvedActivation", "SolvedWeight", "apply", "put_observer"]

_QDQ = torch.ops.quantized_decomposed


class SolvedWeight(ObserverBase):
    """Stands in the place of a weight's observer; `convert_pt2e` then emits exactly these codes.

    The weight itself stays float in the graph, so that the float function of a prepared graph stays what it was.

    Args:
        codes: integers on the grid, in the weight's shape; any dtype.
        grid: the grid, with its scale.
        original: the observer that stood there.
    """

    def __init__(self, codes: torch.Tensor, grid: Grid, original: Any) -> None:
        super().__init__(grid.dtype)
        grid = replace(grid, scale=kept(grid.scale), zero_point=kept(grid.zero_point))
        self.grid, self.original = grid, original
        self.quant_min, self.quant_max = grid.quant_min, grid.quant_max
        self.site = getattr(original, "site", "a weight")
        per_channel, symmetric = grid.dialect == "channel", grid.symmetric
        self.qscheme = (
            (torch.per_channel_symmetric if symmetric else torch.per_channel_affine)
            if per_channel
            else (torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine)
        )
        self.ch_axis = grid.axis if grid.axis is not None else 0
        if grid.dialect == "block":
            self.granularity = original.granularity
        self._bits, self._shape = bits_of(grid.quant_min, grid.quant_max), tuple(codes.shape)
        self._is_packed = self._bits <= LARGEST_BITS and grid.dtype in (torch.int8, torch.uint8)
        stored = codes.to(grid.dtype)
        self.register_buffer(
            "stored", kept(pack_codes(stored, self._bits, grid.quant_min) if self._is_packed else stored)
        )

    @property
    def codes(self) -> torch.Tensor:
        """The codes in the weight's shape, of the grid's dtype."""
        stored: torch.Tensor = self.stored
        form = (self._bits, self.grid.quant_min, self._shape, self.grid.dtype)
        return unpack_codes(stored, *form) if self._is_packed else stored

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor as it is, like any observer."""
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale (cells,) float32 and zero point (cells,) int32."""
        return self.grid.scale, self.grid.zero_point

    def values(self) -> torch.Tensor:
        """The decoded weight, float32."""
        return self.grid.decode(self.codes)

    def convert(self, model: GraphModule, node: Node) -> None:
        """Called by `convert_pt2e`: the codes and the dequantize op that the old observer would have led to."""
        source = node.args[0]
        assert isinstance(source, Node)
        with model.graph.inserting_before(node):
            codes = passes.add_buffer(model, f"{node.name}_codes", self.codes)
            values = self._dequantize(model, node, codes, source.meta.get("val"))
        passes.put_in_place(model, node, values)
        if is_open():
            pack_weight(model, values)

    def _dequantize(self, model: GraphModule, node: Node, codes: Node, float_value: Any) -> Node:
        grid, call = self.grid, model.graph.call_function
        limits = (grid.quant_min, grid.quant_max, grid.dtype)
        wanted = getattr(float_value, "dtype", torch.float32)
        if grid.dialect == "tensor":
            scale, zero_point = float(grid.scale), int(grid.zero_point)
            options = {} if wanted == torch.float32 else {"out_dtype": wanted}
            return call(_QDQ.dequantize_per_tensor.default, (codes, scale, zero_point, *limits), options)
        scales = grid.scale
        zero_points = grid.zero_point
        if grid.dialect == "block":
            counts = [n // b for n, b in zip(self._shape, grid.block, strict=True)]
            scales, zero_points = scales.reshape(counts), zero_points.reshape(counts)
        scale_node = passes.add_buffer(model, f"{node.name}_scale", scales)
        zero_node = passes.add_buffer(model, f"{node.name}_zero_point", zero_points)
        if grid.dialect == "channel":
            options = {} if wanted == torch.float32 else {"out_dtype": wanted}
            args = (codes, scale_node, zero_node, grid.axis, *limits)
            return call(_QDQ.dequantize_per_channel.default, args, options)
        blocks = (codes, list(grid.block), scale_node, zero_node, grid.dtype, grid.quant_min, grid.quant_max)
        return call(torch.ops.torchao.dequantize_affine, blocks, {"output_dtype": wanted})


class SolvedActivation(ObserverBase):
    """Stands in the place of a static per-tensor activation observer, with a fixed scale and zero point.

    Args:
        scale, zero_point: one number each.
        original: the observer that stood there: its grid is kept.
    """

    def __init__(self, scale: float, zero_point: int, original: Any) -> None:
        super().__init__(original.dtype)
        self.quant_min, self.quant_max = int(original.quant_min), int(original.quant_max)
        self.qscheme, self.original = original.qscheme, original
        self.site = getattr(original, "site", "a tensor")
        scale, zero_point = self._raised(scale, zero_point, least_scale(original))
        self.register_buffer("scale", torch.tensor([scale], dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor([zero_point], dtype=torch.int32))

    def _raised(self, scale: float, zero_point: int, least: float) -> tuple[float, int]:
        """No scale below what the target's integers take; the same low end with the larger scale."""
        if scale >= least:
            return scale, zero_point
        if self.qscheme == torch.per_tensor_symmetric:
            return least, zero_point
        moved = round(self.quant_min - (self.quant_min - zero_point) * scale / least)
        return least, min(max(moved, self.quant_min), self.quant_max)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor as it is, like any observer."""
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, (1,) each."""
        return self.scale, self.zero_point


# solutions --------------------------------------------------------------------------------------------------------


@dataclass
class Solution:
    """What an algorithm chose for one span.

    Args:
        weights: site's node name -> codes (in the weight's shape) and grid.
        biases: site's node name -> bias (out,) float32.
        activations: observer's target -> scale and zero point.
        notes: what the user should know of how it was found.
    """

    weights: dict[str, tuple[torch.Tensor, Grid]] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    activations: dict[str, tuple[float, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.weights or self.biases or self.activations)


def apply(prepared: GraphModule, solution: Solution) -> Callable[[], None]:
    """Put a solution into a prepared graph; returns a function that takes it out again.

    Weights and ranges whose scale is not finite, and elements of a bias that are not, stay as they were.
    """
    nodes = {node.name: node for node in prepared.graph.nodes}
    undo: list[Callable[[], None]] = []
    for name, (codes, grid) in solution.weights.items():
        if not bool(grid.scale.isfinite().all()):
            continue
        weight = weight_of(prepared, nodes[name])
        assert weight is not None
        undo.append(_exchange(prepared, str(weight[0].target), SolvedWeight(codes, grid, _origin(weight[1]))))
    for target, (scale, zero_point) in solution.activations.items():
        if not math.isfinite(scale):
            continue
        original = _origin(prepared.get_submodule(target))
        undo.append(_exchange(prepared, target, SolvedActivation(scale, zero_point, original)))
    for name, bias in solution.biases.items():
        undo.append(_set_bias(prepared, nodes[name], bias))

    def take_back() -> None:
        for step in reversed(undo):
            step()

    return take_back


def _origin(observer: torch.nn.Module) -> Any:
    return observer.original if isinstance(observer, (SolvedWeight, SolvedActivation)) else observer


def _exchange(prepared: GraphModule, target: str, new: torch.nn.Module) -> Callable[[], None]:
    """Replace an observer, also where a derived spec (an int32 bias) refers to it."""
    old = prepared.get_submodule(target)
    put_observer(prepared, target, old, new)
    return lambda: put_observer(prepared, target, new, old)


def put_observer(prepared: GraphModule, target: str, old: torch.nn.Module, new: torch.nn.Module) -> None:
    """Put `new` in the place of the observer `old` under all of its names, and where a derived spec refers to it."""
    names = [name for name, module in prepared.named_modules(remove_duplicate=False) if module is old]
    for name in {target, *(n for n in names if ".original" not in n)}:
        owner, _, leaf = name.rpartition(".")
        setattr(prepared.get_submodule(owner), leaf, new)
    for module in prepared.modules():
        sources = getattr(module, "obs_or_fqs", None)
        if isinstance(sources, list):
            sources[:] = [new if source is old else source for source in sources]


def _where_finite(prepared: GraphModule, bias: torch.Tensor, old: Node | None) -> torch.Tensor:
    """A bias, and the old one at outputs that are infinite or NaN, where nothing can be averaged."""
    if bool(bias.isfinite().all()) or (old is not None and not ops.is_constant(old)):
        return bias
    kept = torch.zeros(()) if old is None else ops.constant_value(prepared, old).to(bias)
    return torch.where(bias.isfinite(), bias, kept)


def _set_bias(prepared: GraphModule, node: Node, bias: torch.Tensor) -> Callable[[], None]:
    """Give a convolution or linear another bias; the float flow of the stream keeps the old one."""
    old_args, source = node.args, ops.argument(node, 2)
    observed = source is not None and source.op == "call_module"
    reader = source if observed else node
    assert reader is not None
    old = source.args[0] if observed else source  # type: ignore[union-attr]
    assert old is None or isinstance(old, Node)
    bias = _where_finite(prepared, bias, old).to(getattr(node.meta.get("val"), "dtype", bias.dtype))
    name = passes.fresh_name(prepared, f"{node.name}_corrected_bias")
    prepared.register_parameter(name, torch.nn.Parameter(bias, requires_grad=False))
    with prepared.graph.inserting_before(reader):
        attribute = prepared.graph.get_attr(name)
    attribute.meta["val"] = bias
    attribute.meta[FLOAT_BIAS] = None if old is None else old.meta.get(FLOAT_BIAS, str(old.target))
    if observed:
        old_reader_args = reader.args
        reader.args = (attribute, *reader.args[1:])
    else:
        node.args = (*node.args[:2], attribute, *node.args[3:])

    def take_back() -> None:
        if observed:
            reader.args = old_reader_args
        node.args = old_args
        prepared.graph.erase_node(attribute)
        delattr(prepared, name)

    return take_back
