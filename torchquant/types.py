"""Frozen values that the folders exchange: formats, schemes, capabilities, qparams, sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.fx import Node

from torchquant.errors import InputError, SchemeError

Granularity = Literal["tensor", "channel", "token", "group"]
Status = Literal["quantized", "excluded", "unsupported", "missed"]
Role = Literal["weighted", "activations", "shared", "float"]

DTYPE_RANGE = {
    torch.int8: (-128, 127),
    torch.uint8: (0, 255),
    torch.int16: (-32768, 32767),
    torch.uint16: (0, 65535),
    torch.int32: (-(2**31), 2**31 - 1),
}
FLOAT_RANGE = {torch.float8_e4m3fn: (-448.0, 448.0)}


@dataclass(frozen=True)
class Format:
    """A number format: an integer or small float grid, or a subclass of `torchquant.formats.encoded.EncodedFormat`.

    Args:
        name: in reports and errors.
        dtype: what stores a code.
        quant_min, quant_max: the codes.
    """

    name: str
    dtype: torch.dtype
    quant_min: int | float
    quant_max: int | float

    def __post_init__(self) -> None:
        known: dict[torch.dtype, tuple[int, int] | tuple[float, float]] = {**DTYPE_RANGE, **FLOAT_RANGE}
        if self.dtype not in known:
            allowed = ", ".join(str(d) for d in known)
            raise SchemeError(f"format {self.name!r}: dtype {self.dtype} is no grid of codes; use {allowed}")
        low, high = known[self.dtype]
        if not low <= self.quant_min < self.quant_max <= high:
            raise SchemeError(
                f"format {self.name!r}: quant_min {self.quant_min} and quant_max {self.quant_max} "
                f"must satisfy {low} <= quant_min < quant_max <= {high}"
            )

    @property
    def bits(self) -> int:
        """The bits a code needs: the smallest b with 2**b values or more."""
        return 8 * self.dtype.itemsize if self.is_float else int(self.quant_max - self.quant_min).bit_length()

    @property
    def is_float(self) -> bool:
        """Whether the codes are small floats, which have no zero point."""
        return self.dtype in FLOAT_RANGE

    @property
    def is_affine(self) -> bool:
        """Whether a value is a scale times the distance of an integer code from a zero point."""
        return not self.is_float

    def bits_per_weight(self, cell: int, *, symmetric: bool = True) -> float:
        """Bits for one weight, the share of what a cell of `cell` weights has in common included.

        That is a float32 scale and, if not `symmetric`, a zero point of as many bits as a code. Codes count for the
        bits that they need, in which `torchquant.convert` stores them; torchao's `convert_pt2e` takes a byte for each.
        """
        return self.bits + (32 + (0 if symmetric else self.bits)) / cell


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is quantized: its grid, its granularity, and when its scale is chosen.

    `group_size`: how many neighbours along the input axis share a scale, with granularity "group"; `scale_dtype`: what
    the target stores their scales in, None if it has a choice.
    """

    format: Format
    symmetric: bool
    granularity: Granularity = "tensor"
    dynamic: bool = False
    group_size: int | None = None
    scale_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if (self.granularity == "group") != (self.group_size is not None):
            raise SchemeError(f"granularity {self.granularity!r} does not go with group size {self.group_size}")
        if self.format.is_float and not self.symmetric:
            raise SchemeError(f"{self.format.name} codes have no zero point; make the tensor symmetric")
        if not (self.format.is_affine or self.format.is_float) and self.dynamic:
            raise SchemeError(f"{self.format.name} is a format of stored weights; a dynamic tensor takes another one")
        if self.dynamic and self.granularity == "channel":
            raise SchemeError("a dynamic tensor has per-tensor or per-token scales, not per-channel ones")

    @property
    def qscheme(self) -> torch.qscheme:
        """The torch name of granularity and symmetry."""
        if self.granularity == "channel":
            return torch.per_channel_symmetric if self.symmetric else torch.per_channel_affine
        return torch.per_tensor_symmetric if self.symmetric else torch.per_tensor_affine


@dataclass(frozen=True)
class Scheme:
    """What happens to an op's activations and weight, e.g. static W8A8."""

    name: str
    activation: TensorSpec | None
    weight: TensorSpec | None

    def __post_init__(self) -> None:
        if self.activation is None and self.weight is None:
            raise SchemeError(f"scheme {self.name!r} quantizes neither activations nor weights")

    @property
    def dynamic(self) -> bool:
        return self.activation is not None and self.activation.dynamic


@dataclass(frozen=True)
class Capability:
    """One row of a target's table: an op kind, the schemes it runs in, and the reason for everything else.

    Args:
        op: the op kind (a name of `torchquant.fx.ops.KINDS`).
        schemes: names of the schemes the target runs this op in; empty: the op stays float.
        role: `weighted` observes the activation and the weight; `activations` observes every data input
            and the output, where the inputs are integers already; `shared` keeps its input's qparams,
            likewise; `float` observes nothing.
        fuses: op kinds that may follow and are computed in the same kernel, so that a quantized output
            lies behind them.
        observe_output: whether the op's (or the fused tail's) output is quantized too.
        condition: called with (node, scheme name); the reason why this node stays float, or None.
        reason: why the op stays float, or what the condition asks (for the table in the docs).
    """

    op: str
    schemes: tuple[str, ...] = ()
    role: Role = "float"
    fuses: tuple[str, ...] = ()
    observe_output: bool = False
    condition: Callable[[Node, str], str | None] | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise SchemeError(
                f"capability {self.op!r}: no role {self.role!r}; it is one of {', '.join(get_args(Role))}"
            )
        if bool(self.schemes) == (self.role == "float"):
            raise SchemeError(f"capability {self.op!r}: a row has schemes exactly if its role is not 'float'")
        if not self.schemes and not self.reason:
            raise SchemeError(f"capability {self.op!r} stays float, so it must say why")


@dataclass(frozen=True)
class QParams:
    """One tensor's quantization as read from a prepared or converted graph.

    Args:
        dtype, quant_min, quant_max: the grid.
        axis: channel axis, or None for one scale for the tensor (or the token, or the group).
        dynamic: the scale is computed from the tensor at run time.
        scale, zero_point: (channels,), (out, groups) or scalar tensors; None in a prepared graph and when dynamic.
        group_size: how many neighbours on the input axis share a scale, or None.
        token: each row (token) has a scale of its own.
        format: name of a format that is no such grid; empty otherwise.
    """

    dtype: torch.dtype
    quant_min: int | float
    quant_max: int | float
    axis: int | None = None
    dynamic: bool = False
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    group_size: int | None = None
    token: bool = False
    format: str = ""

    def describe(self) -> str:
        """For example `int8[-127,127] per channel 0`."""
        where = "per tensor" if self.axis is None else f"per channel {self.axis}"
        where = f"per group of {self.group_size}" if self.group_size else "dynamic" if self.dynamic else where
        where += " per token" if self.token else ""
        if self.format:
            return f"{self.format} {where}"
        limits = ",".join("?" if q is None else f"{q:g}" for q in (self.quant_min, self.quant_max))
        return f"{str(self.dtype).removeprefix('torch.')}[{limits}] {where}"


@dataclass(frozen=True)
class Site:
    """One op of the graph and what became of it.

    Args:
        node: the FX node's name.
        op: the op kind, or the aten name of an op outside the table.
        module: path of the module that called it; empty for the root.
        compute: whether the op multiplies matrices (conv, linear, matmul, attention) or looks up weights.
        activation, weight: how its data input and its weight are quantized, or None.
        status, reason: see docs/architecture.md.
    """

    node: str
    op: str
    module: str
    compute: bool
    activation: QParams | None
    weight: QParams | None
    status: Status
    reason: str = ""

    def to_dict(self) -> dict[str, str | bool | None]:
        """As strings and bools: tensors in words, None for float ones."""
        tensors = {"activation": self.activation, "weight": self.weight}
        described = {name: None if q is None else q.describe() for name, q in tensors.items()}
        plain = {name: getattr(self, name) for name in ("node", "op", "module", "compute", "status", "reason")}
        return plain | described


def check_whole(value: Any, name: str, least: int = 0, most: int | None = None) -> None:
    """Raise InputError unless an argument is a whole number from `least` to `most`."""
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"from {least} on" if most is None else f"from {least} to {most:,}"
        raise InputError(f"{name} is a whole number {bounds}, not {value!r:.40}")
