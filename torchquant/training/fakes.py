"""Fake quantizers: they stand where observers stand, and round in training as `convert_pt2e` will.

torch's `FusedMovingAvgObsFakeQuantize` trains on another scale than its observer gives to convert: another formula for
symmetric grids, and an affine grid for channels of one sign. `Fake` asks the observer, in training as in convert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase
from torchao.quantization.pt2e.observer import AffineQuantizedObserverBase

from torchquant.errors import CalibrationError, InputError
from torchquant.fx import ops
from torchquant.fx.grids import Grid, fake_quantizer, grid_of
from torchquant.fx.reading import observers
from torchquant.observers.minmax import check_finite, reset
from torchquant.training.norms import Folding
from torchquant.training.rounding import Cells, Rule, as_computed, rounded, straight_everywhere, straight_through
from torchquant.types import DTYPE_RANGE

__all__ = ["DerivedFake", "Fake", "fakes", "has_grid", "named_fakes"]

_SHARED = ("dtype", "qscheme", "ch_axis", "granularity", "format", "eps", "per_token")


def has_grid(observer: Any) -> bool:
    """Whether an observer stands for a static affine integer grid, whose scale and zero point it chooses."""
    if getattr(observer, "is_dynamic", False) or isinstance(getattr(observer, "grid", None), Grid):
        return isinstance(getattr(observer, "grid", None), Grid)
    if isinstance(observer, AffineQuantizedObserverBase):
        return observer.target_dtype in DTYPE_RANGE
    plain = not callable(getattr(observer, "convert", None)) and hasattr(observer, "qscheme")
    return plain and getattr(observer, "dtype", None) in DTYPE_RANGE and observer.quant_min is not None


class Fake(FakeQuantizeBase):
    """Rounds a tensor as the observer in it says, with gradients straight through.

    In training mode the observer watches as long as `observes`; a weight's always sees the present weight alone, so
    that its range does not lag. In evaluation nothing moves. With `rounds` off, values pass as they are, and are
    watched in either mode: that is calibration.

    Args:
        observer: an observer, or the constructor of one. kwargs: for the constructor.
    """

    rule: Rule = staticmethod(straight_through)
    site = "a tensor"
    scale: Tensor
    zero_point: Tensor
    dtype: Any
    quant_min: Any
    quant_max: Any
    qscheme: Any

    def __init__(self, observer: Any, **kwargs: Any) -> None:
        super().__init__()
        made = observer if isinstance(observer, torch.nn.Module) else observer(**kwargs)
        self.activation_post_process: Any = made
        for name in _SHARED:
            if hasattr(made, name):
                setattr(self, name, getattr(made, name))
        if getattr(made, "dtype", None) is None:
            self.dtype = made.target_dtype
        self.quant_min, self.quant_max = getattr(made, "quant_min", None), getattr(made, "quant_max", None)
        self.is_dynamic = bool(getattr(made, "is_dynamic", False))
        self.is_weight = bool(getattr(made, "observes_weight", False))
        self.has_grid, self.rounds, self.observes = has_grid(made), True, True
        if getattr(made, "passes_clipped", False):
            self.rule = straight_everywhere
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        if callable(getattr(made, "convert", None)):  # torchao asks whether there is one
            self.convert = made.convert
        self._function: Any = None  # of an observer that emits its own ops

    # torchao's interface ----------------------------------------------------------------------------------------

    def enable_fake_quant(self, enabled: bool = True) -> None:
        super().enable_fake_quant(enabled)
        self.rounds = bool(enabled)

    def enable_observer(self, enabled: bool = True) -> None:
        super().enable_observer(enabled)
        self.observes = bool(enabled)

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scale and zero point (cells,), as the forward uses them."""
        if not self.has_grid or self.is_waiting:
            qparams: tuple[Tensor, Tensor] = self.activation_post_process.calculate_qparams()
            return qparams
        scale, zero_point = self.qparams()
        return scale.detach(), zero_point.detach().int()

    def forward(self, x: Tensor) -> Tensor:
        """`x` as convert will quantize it; as it is while `rounds` is off."""
        x = self.values_of(x)
        if self.observes and (self.training or not self.rounds):
            self.observe(x.detach())
        rounds = self.rounds and x.is_floating_point()
        if rounds and not self.has_grid:
            return self._as_emitted(x)
        if rounds:
            scale, zero_point = self.qparams()
            x = rounded(x, scale, zero_point, self.cells(), int(self.quant_min), int(self.quant_max), self.rule)
        if self.folding is not None:
            return self.folding.weight(x, self.grid_now(x.shape) if rounds and not self.folding.norm.moves else None)
        return x

    folding: Folding | None = None  # of a BatchNorm into this weight

    def keep_for_training(self) -> None:
        """Refuse a plain convert from now on: it knows neither learned steps nor BatchNorm in training."""
        self.convert = self._refuse

    def _refuse(self, model: GraphModule, node: Node) -> None:
        raise InputError(
            "the graph is prepared for training: convert it with torchquant.qat.convert(prepared), and give algorithms "
            "and analysis what torchquant.qat.finish(prepared) returns"
        )

    # the grid -----------------------------------------------------------------------------------------------------

    @property
    def is_waiting(self) -> bool:
        """Whether the range must come from data and none has been seen."""
        low = getattr(self.activation_post_process, "min_val", None)
        return isinstance(low, Tensor) and (low.numel() == 0 or bool(torch.isinf(low).any()))

    def observe(self, x: Tensor) -> None:
        """Let the observer see a tensor, and take the grid that it now gives."""
        observer = self.activation_post_process
        check_finite(x, self.site)  # before a moving average holds it for ever
        if self.is_weight and not isinstance(getattr(observer, "grid", None), Grid):
            reset(observer, "a weight")
        observer(x.float() if x.dtype in (torch.bfloat16, torch.float16) and self.has_grid else x)
        self._function = None
        if self.has_grid:
            self.take(self.grid_over(x.shape))

    def grid_over(self, shape: torch.Size) -> Grid:
        """The observer's grid over a tensor of a shape."""
        grid = grid_of(self.activation_post_process, shape)
        assert grid is not None
        self.quant_min, self.quant_max = grid.quant_min, grid.quant_max
        self._block = grid.block if grid.dialect == "block" and grid.scale.numel() > 1 else None
        return grid

    def take(self, grid: Grid) -> None:
        """Round to a grid from now on."""
        self.take_qparams(grid.scale, grid.zero_point)

    @torch.no_grad()
    def take_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Round with a scale and a zero point (cells,) from now on.

        In new tensors: a fake quantizer that stands in several places is called again before the first backward.
        """
        for name, value in (("scale", scale), ("zero_point", zero_point)):
            own = getattr(self, name)
            taken = value.detach().reshape(-1).to(own.dtype, copy=True)
            if isinstance(own, torch.nn.Parameter):
                own.copy_(taken)
            else:
                setattr(self, name, taken)

    _block: tuple[int, ...] | None = None

    def cells(self) -> Cells:
        """How a tensor is cut."""
        per_channel = getattr(self, "qscheme", None) in (torch.per_channel_symmetric, torch.per_channel_affine)
        if self._block is not None:
            return Cells(block=self._block)
        return Cells(axis=int(self.ch_axis) if per_channel and self.scale.numel() > 1 else None)

    @property
    def learned(self) -> dict[str, torch.nn.Parameter]:
        """Parameters that must stay positive, by what they are called."""
        return {}

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point (cells,), with gradients where they are learned."""
        return self.scale, self.zero_point

    def values_of(self, x: Tensor) -> Tensor:
        """What becomes of a tensor before it is rounded; a method may move the weights themselves."""
        return x

    @torch.no_grad()
    def solved(self, weight: Tensor) -> tuple[Tensor, Grid]:
        """The codes of a weight and their grid, as in the last forward."""
        grid = self.grid_now(weight.shape)
        return grid.encode(self.values_of(weight).float()), grid

    @torch.no_grad()
    def grid_now(self, shape: torch.Size) -> Grid:
        """What a tensor of a shape is rounded to."""
        scale, zero_point = self.qparams()
        return self.grid_over(shape).with_scale(scale.detach().clone(), zero_point.detach().int())

    def require_data(self) -> None:
        """Raise CalibrationError if the range must come from data and none has been seen."""
        if self.is_waiting and not self.is_dynamic:
            raise CalibrationError(f"{self.site} never saw data: run torchquant.calibrate(prepared, batches) first")

    # formats that are no affine grid, and scales chosen at run time ----------------------------------------------

    def _as_emitted(self, x: Tensor) -> Tensor:
        observer = self.activation_post_process
        if hasattr(observer, "nearest"):
            function = observer.nearest
        else:
            function = self._function = self._function or fake_quantizer(observer, x.shape)
        with torch.no_grad():
            values = function(x.detach()).to(x.dtype)
        return as_computed(x, values)

    def in_words(self) -> str:
        """For messages."""
        cells = self.cells()
        where = f"per channel {cells.axis}" if cells.axis is not None else f"in blocks {cells.block}"
        where = "per tensor" if cells == Cells() else where
        return f"{str(self.dtype).removeprefix('torch.')}[{self.quant_min},{self.quant_max}] {where}"

    # state --------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        form = {name: getattr(self, name, None) for name in ("dtype", "quant_min", "quant_max", "qscheme")}
        return {"method": type(self).__name__, **{name: str(value) for name, value in form.items()}}

    def get_extra_state(self) -> dict[str, Any]:
        """The scheme, for `set_extra_state` to compare, and what is switched on."""
        return {**self.describe(), "rounds": self.rounds, "observes": self.observes}

    def set_extra_state(self, state: Any) -> None:
        """Raise InputError if a checkpoint is one of another scheme or method."""
        own = self.describe()
        known = {key: state.get(key) for key in own} if isinstance(state, dict) else {}
        others = [f"{key} {known.get(key)} there, {own[key]} here" for key in own if known.get(key) != own[key]]
        if others:
            raise InputError(
                f"the checkpoint is of another training: {self.site} has {'; '.join(others)}. "
                "Prepare the model with the same Quantizer, bits and methods before loading it"
            )
        self.rounds, self.observes = bool(state["rounds"]), bool(state["observes"])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if prefix + "_extra_state" in state_dict:
            self.set_extra_state(state_dict[prefix + "_extra_state"])
        for name in ("scale", "zero_point"):
            stored, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(stored, Tensor) and name in self._buffers and stored.shape != own.shape:
                own.resize_(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._function = None


class DerivedFake(Fake):
    """Of a tensor whose grid follows from those of others, as an int32 bias from its op's input and weight."""

    def __init__(self, observer: Any) -> None:
        super().__init__(observer)
        self.has_grid = False

    def _as_emitted(self, x: Tensor) -> Tensor:
        scale, zero_point = self.activation_post_process.calculate_qparams()
        cells = Cells(axis=int(self.ch_axis) if scale.numel() > 1 else None)
        return rounded(x, scale.detach().float(), zero_point.detach(), cells, self.quant_min, self.quant_max)


def fakes(model: torch.nn.Module) -> list[Fake]:
    """Each fake quantizer once, in order."""
    return list(dict.fromkeys(module for module in model.modules() if isinstance(module, Fake)))


def named_fakes(model: GraphModule) -> list[tuple[Node, Fake]]:
    """Each fake quantizer once, with the first node that calls it; its `site` then says where it stands."""
    first: dict[Fake, Node] = {}
    for node, module in observers(model):
        if isinstance(module, Fake):
            first.setdefault(module, node)
    for fake, node in first.items():
        readers = ", ".join(ops.module_path(user) or user.name for user in node.users)
        fake.site = f"{node.args[0]}, read by {readers}"
        fake.activation_post_process.site = fake.site
    return [(node, fake) for fake, node in first.items()]
