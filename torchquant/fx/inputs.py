"""What a graph takes at one place: a tensor with its sizes and their bounds, or a constant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from torchquant.errors import InputError
from torchquant.files import typed
from torchquant.files.tensors import dtype_of

PLAIN = (int, float, bool, str, type(None), complex)


@dataclass(frozen=True)
class Size:
    """A size that may vary: `factor * symbol + offset`, where the inputs of one call agree on each symbol.

    `minimum`, `maximum` (None: unbounded): of the size itself, as declared at export.
    """

    symbol: str
    factor: int = 1
    offset: int = 0
    minimum: int = 0
    maximum: int | None = None

    def at(self, value: int) -> int:
        """The size where the symbol is `value`."""
        return self.factor * value + self.offset

    def symbol_at(self, size: int) -> int | None:
        """The symbol's value where the size is `size`; None if there is none."""
        value, rest = divmod(size - self.offset, self.factor)
        return value if rest == 0 and value >= 0 else None

    def __str__(self) -> str:
        text = self.symbol if self.factor == 1 else f"{self.factor}*{self.symbol}"
        text += f"{self.offset:+d}" if self.offset else ""
        return text if self.maximum is None else f"{text} <= {self.maximum}"


@dataclass(frozen=True)
class InputSpec:
    """What one input of a graph or program must be: a tensor of `dtype` and `shape` (None: the size may vary).

    `sizes`: for each axis how its size may vary; None where it may not, or in a way that has no such form.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    sizes: tuple[Size | None, ...] = ()

    def check(self, value: object, batch: str, symbols: dict[str, tuple[int, str]] | None = None) -> None:
        """Raise InputError unless `value` is such a tensor.

        Args:
            batch: what the message calls the batch.
            symbols: symbol -> value and where it was seen; filled, so that the inputs of one call can agree.
        """
        where = f"{batch}, input {self.name!r}"
        if not isinstance(value, torch.Tensor):
            hint = "; wrap it with torch.from_numpy" if type(value).__module__ == "numpy" else ""
            raise InputError(f"{where}: expected a tensor, got {type(value).__module__}.{type(value).__name__}{hint}")
        if value.layout is not torch.strided or value.device.type == "meta":
            kind = "a meta tensor" if value.device.type == "meta" else f"a tensor of layout {value.layout}"
            raise InputError(f"{where}: expected a dense tensor with data, got {kind}; use .to_dense()")
        if str(value.dtype) != self.dtype:
            raise InputError(f"{where}: expected {self.dtype}, got {value.dtype}; convert the data, or export with it")
        if len(value.shape) != len(self.shape) or any(
            want not in (None, got) for want, got in zip(self.shape, value.shape, strict=True)
        ):
            raise InputError(
                f"{where}: expected shape {self._wanted()}, got {tuple(value.shape)}. To accept several sizes, export "
                "with dynamic_shapes, e.g. {'x': {0: torch.export.Dim('batch')}}."
            )
        for axis, size in enumerate(self.sizes):
            if size is not None:
                self._check_size(size, value.shape[axis], f"{where}, axis {axis}", {} if symbols is None else symbols)

    def _check_size(self, size: Size, actual: int, where: str, symbols: dict[str, tuple[int, str]]) -> None:
        value = size.symbol_at(actual)
        too_large = size.maximum is not None and actual > size.maximum
        if value is None or too_large or actual < size.minimum:
            raise InputError(
                f"{where}: the size is {actual}, and the model was exported for {size}"
                + (f", at least {size.minimum}" if size.minimum else "")
                + "; export it with other bounds in dynamic_shapes"
            )
        known, seen = symbols.setdefault(size.symbol, (value, where))
        if known != value:
            raise InputError(
                f"{where}: the size is {actual}, and {size.at(known)} goes with {seen}: the model was exported with "
                f"sizes that depend on each other ({size})"
            )

    def _wanted(self) -> str:
        sizes: Sequence[Size | None] = self.sizes or [None] * len(self.shape)
        texts = [str(s) if s is not None else str(z or "any") for s, z in zip(self.shape, sizes, strict=True)]
        return f"({', '.join(texts)})"


@dataclass(frozen=True)
class Constant:
    """An argument that torch.export fixed: None, a number, a bool or a string."""

    name: str
    value: Any

    def check(self, value: Any, batch: str) -> None:
        """Raise InputError unless `value` is what the export had."""
        same = value is self.value or (type(value) is type(self.value) and value == self.value)
        number = isinstance(value, (int, float)) and isinstance(self.value, (int, float)) and value == self.value
        if not same and not (number and not isinstance(value, bool) and not isinstance(self.value, bool)):
            shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise InputError(
                f"{batch}, input {self.name!r}: the model was exported with {self.value!r}, which torch.export makes a "
                f"constant, and got {shown}. Export it again with that, or make the argument a tensor."
            )


def input_of(node: Node) -> InputSpec | Constant:
    value = node.meta.get("val", node.meta.get("example_value"))
    name = str(node.target)
    if isinstance(value, torch.Tensor):
        shape = tuple(s if isinstance(s, int) else None for s in value.shape)
        return InputSpec(name, str(value.dtype), shape, tuple(map(_size_of, value.shape)))
    if isinstance(value, PLAIN):
        return Constant(name, value)
    raise InputError(
        f"input {name!r} is a {type(value).__name__}, and torchquant knows tensors, numbers, bools, strings and None; "
        "make it a tensor"
    )


def _size_of(size: int | torch.SymInt) -> Size | None:
    """How a size may vary, if it does so linearly in one symbol."""
    if isinstance(size, int):
        return None
    expression = size.node.expr
    bounds = size.node.shape_env.bound_sympy(expression)
    minimum = int(bounds.lower) if bounds.lower.is_integer and bounds.lower > 2 else 0  # torch's own least is 2
    maximum = int(bounds.upper) if bounds.upper.is_integer and bounds.upper < 2**31 else None
    symbols = list(expression.free_symbols)
    if len(symbols) != 1:
        return None
    factor, offset = expression.coeff(symbols[0], 1), expression.coeff(symbols[0], 0)
    linear = (expression - factor * symbols[0] - offset).expand() == 0
    if not linear or not factor.is_Integer or not offset.is_Integer or factor < 1:
        return None
    return Size(str(symbols[0]), int(factor), int(offset), minimum, maximum)


def input_from(stored: Mapping[str, Any]) -> InputSpec | Constant:
    if stored["kind"] == "Constant":
        if not isinstance(stored["value"], PLAIN):
            raise ValueError(f"{stored['value']!r:.100} is no constant")
        return typed.made(Constant, {k: stored[k] for k in ("name", "value")})
    sizes = tuple(None if s is None else typed.made(Size, s) for s in stored["sizes"])
    fields = {"name": stored["name"], "dtype": str(dtype_of(stored["dtype"])), "shape": tuple(stored["shape"])}
    spec = typed.made(InputSpec, {**fields, "sizes": sizes})
    lengths = [*spec.shape, *(s.factor - 1 for s in sizes if s is not None)]
    if any(n is not None and n < 0 for n in lengths) or len(sizes) not in (0, len(spec.shape)):
        raise ValueError(f"{spec.shape} is no shape, or {sizes} are not its sizes")
    return spec
