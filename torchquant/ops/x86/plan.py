"""Plans for the x86 kernels: values, ops and packed weights as one block of bytes, which `ops/x86/plan.h` describes."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import torch

from torchquant.errors import LoweringError

__all__ = [
    "ACTIVATIONS",
    "KINDS",
    "Dynamic",
    "Plan",
    "Quantization",
    "Step",
    "Value",
]

_MAGIC, _VERSION, _UNIT = 0x51543836, 3, 64
KINDS = ["conv", "depthwise", "elementwise", "import", "export", "mean", "max_pool", "halo", "layer_norm", "shuffle"]
ACTIVATIONS = ["none", "clamp", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid"]
_BINARY = ("", "add", "mul")
_FIELDS = [  # of Op in plan.h, in its order; f: float
    *("kind", "input", "out_byte", "out_float", "other", "binary", "other_broadcast"),
    *("kh", "kw", "sh", "sw", "pt", "pl", "dh", "dw", "depth", "channels"),
    *("weights", "compensation", "scale", "bias"),
    *("before", "f:before_low", "f:before_high", "after", "f:after_low", "f:after_high"),
    *("f:input_scale", "f:other_scale", "other_zero_point", "f:inverse", "zero_point", "f:low", "f:high"),
    *("direct", "low_byte", "high_byte"),
    *("f:factor", "panel", "dynamic", "group_in", "group_out", "group_panel", "nan_byte", "narrow"),
]
_OP_BYTES = 192
_CACHED = 2**23  # bytes of weights that stay in a third-level cache between samples
_POINT = {"kh": 1, "kw": 1, "sh": 1, "sw": 1, "pt": 0, "pl": 0, "dh": 1, "dw": 1}


@dataclass(frozen=True)
class Quantization:
    """A grid of bytes: q = clamp(round(x / scale) + zero_point, low, high), all counted as unsigned bytes.

    `nan`: the byte of NaN, which torch converts to the code 0: 128 where the codes are int8.
    """

    scale: float
    zero_point: int
    low: int
    high: int
    nan: int = 0


@dataclass(frozen=True)
class Dynamic:
    """A grid of bytes that each call makes from the range of one whole input, as `choose_qparams` of torch does.

    `low`, `high` as of `Quantization`; `eps`: the least scale; `symmetric`: the zero point is 128.
    """

    low: int
    high: int
    eps: float
    symmetric: bool
    input: int = -1


@dataclass(eq=False)
class Value:
    """A tensor of a plan, `(samples, h, w, c)`: bytes on a grid, or floats if `grid` is None.

    `external`: None in the arena, ("input", i) or ("output", i) for the caller's.
    """

    h: int
    w: int
    c: int
    grid: Quantization | Dynamic | None = None
    external: tuple[str, int] | None = None
    border: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # top, left, bottom, right
    narrow: bool = False  # four bytes a pixel: images
    offset: int = 0
    wide: bool = False  # in the arena of the steps behind the split

    @property
    def stride(self) -> int:
        """Elements from one pixel to the next."""
        if self.external:
            return self.c
        return 4 if self.narrow else -(-self.c // 16) * 16

    @property
    def units(self) -> int:
        """Arena of one sample."""
        top, left, bottom, right = self.border
        pixels = (self.h + top + bottom) * (self.w + left + right)
        return -(-pixels * self.stride * (1 if self.grid else 4) // _UNIT)

    def record(self) -> bytes:
        """As `Value` in plan.h."""
        place = -1 if self.external is None else self.external[1] + (1000 if self.external[0] == "output" else 0)
        zero = self.grid.zero_point if isinstance(self.grid, Quantization) else 0
        numbers = [int(self.grid is None), self.h, self.w, self.c, self.stride, *self.border, self.offset, place, zero]
        return struct.pack("<16i", *numbers, int(self.wide), 0, 0, 0)


@dataclass(eq=False)
class Step:
    """One op of a plan; `numbers` are fields of `Op` in plan.h, `label` names the graph node it came from."""

    kind: str
    input: Value | None
    out_byte: Value | None = None
    out_float: Value | None = None
    other: Value | None = None
    label: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        """Of its codes, as packed."""
        n = self.numbers
        return int(n["channels"] * n["depth"] * n.get("kh", 1) * n.get("kw", 1)) if self.kind == "conv" else 0

    def reads(self) -> list[Value]:
        """Values that must be there when it runs."""
        return [v for v in (self.input, self.other) if v is not None]

    def writes(self) -> list[Value]:
        """Values that it makes."""
        return [v for v in (self.out_byte, self.out_float) if v is not None]


class Plan:
    """Collects steps and constants; `build` lays out the arena and writes the block of bytes."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.laid_out: list[Step] = []  # the steps of what was built, borders among them
        self.inputs = self.outputs = 0
        self._blob: list[bytes] = []
        self._units = 0

    def constant(self, tensor: torch.Tensor) -> int:
        """Store a constant; its place in units."""
        data = tensor.contiguous().numpy().tobytes()
        data += bytes(-len(data) % _UNIT)
        place, self._units = self._units, self._units + len(data) // _UNIT
        self._blob.append(data)
        return place

    def build(self, chunk: int = 0) -> torch.Tensor:
        """The plan as uint8; `chunk`: samples that go through it together, 0 to let the runtime choose.

        Raises:
            LoweringError: it would have 2 GiB or more.
        """
        steps = self._with_borders()
        values = list(dict.fromkeys(v for s in steps for v in (*s.reads(), *s.writes())))
        split = _split(steps)
        for value in values:
            value.wide = any(value in (*s.reads(), *s.writes()) for s in steps[split:]) if split else False
        arena, wide = _lay_out(steps, values)
        places = {v: i for i, v in enumerate(values)}
        records = b"".join(v.record() for v in values)
        ranges = list(dict.fromkeys(v.grid for v in values if isinstance(v.grid, Dynamic)))
        records += b"".join(_record(s, places, ranges) for s in steps)
        records += b"".join(_range_record(r) for r in ranges)
        records += bytes(-len(records) % _UNIT)
        blob = 1 + len(records) // _UNIT
        header = [_MAGIC, _VERSION, len(values), len(steps), self.inputs, self.outputs, arena, chunk, blob]
        constants = b"".join(self._blob)
        size = _UNIT + len(records) + len(constants)
        if size >= 2**31:
            raise LoweringError(f"a region of {size:,} bytes is too large for one plan; pass own_kernels=False")
        data = struct.pack("<16i", *header, size, split, wide, len(ranges), *[0] * 3) + records + constants
        self.laid_out = steps
        self._first_op = 1 + len(values)  # in units, as are records of values
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).clone()  # where torch aligns tensors

    def set(self, memory: torch.Tensor, index: int, name: str, value: int) -> None:
        """Change an integer field of op `index` of `laid_out` in the bytes that `build` returned."""
        place = self._first_op * _UNIT + index * _OP_BYTES + 4 * _FIELDS.index(name)
        memory[place : place + 4] = torch.tensor([value], dtype=torch.int32).view(torch.uint8)

    def _with_borders(self) -> list[Step]:
        """The steps, each output that needs a border preceded by the step that fills it."""
        for step in self.steps:
            if step.kind in ("conv", "depthwise"):
                _widen(step)
        steps = []
        for step in self.steps:
            steps += [Step("halo", None, out_byte=v, label=step.label) for v in step.writes() if any(v.border)]
            steps.append(step)
        return steps


def _widen(step: Step) -> None:
    """Give the input of a window the border that it reads."""
    source, output, n = step.input, step.writes()[0], {**_POINT, **step.numbers}
    assert source is not None
    bottom = (output.h - 1) * n["sh"] + (n["kh"] - 1) * n["dh"] + 1 - n["pt"] - source.h
    right = (output.w - 1) * n["sw"] + (n["kw"] - 1) * n["dw"] + 1 - n["pl"] - source.w
    source.border = [max(a, b) for a, b in zip(source.border, (n["pt"], n["pl"], bottom, right), strict=True)]


def _split(steps: list[Step]) -> int:
    """From which step on a sample's weights outweigh its activations, so that more samples should share a pass.

    Activations count an eighth: they come from the second or third level of the cache, large weights from memory.
    0 where that holds for all steps or for none, or where the weights are few enough to stay in the cache.
    """
    if sum(step.weight_bytes for step in steps) < _CACHED:
        return 0
    best, total, split = 0.0, 0.0, 0
    for i in range(len(steps) - 1, 0, -1):
        step = steps[i]
        values = [v for v in (*step.reads(), *step.writes()) if step.kind != "halo"]
        total += step.weight_bytes - sum(v.units for v in values) * _UNIT / 8
        if total > best:
            best, split = total, i
    first = next((i for i, step in enumerate(steps) if step.weight_bytes), 0)
    return split if split > first else 0


def _lay_out(steps: list[Step], values: list[Value]) -> tuple[int, int]:
    """Offsets such that values alive at the same time do not overlap, the largest placed first.

    Returns units of a sample in front of the split and behind it, each an arena of its own.

    A sum of floats takes the place of its addend where that is used no more: one buffer for a residual stream.
    """
    first: dict[Value, int] = {}
    last: dict[Value, int] = {}
    for i, step in enumerate(steps):
        for value in (*step.reads(), *step.writes()):
            first.setdefault(value, i)
            last[value] = i
    place: dict[Value, Value] = {v: v for v in values}  # whose place a value takes
    for i, step in enumerate(steps):
        old, new = step.other, step.out_float
        if old and new and old is not new and last[old] == first[new] == i and _replaces(step):
            place[new] = place[old]
            last[place[new]] = last[new]
    owners = [v for v in values if v.external is None and place[v] is v]
    placed: list[Value] = []
    for value in sorted(owners, key=lambda v: -v.units):
        taken = sorted(
            (p.offset, p.offset + p.units)
            for p in placed
            if p.wide == value.wide and first[p] <= last[value] and first[value] <= last[p]
        )
        value.offset = 0
        for start, end in taken:
            if value.offset + value.units <= start:
                break
            value.offset = max(value.offset, end)
        placed.append(value)
    for value in values:
        value.offset = place[value].offset
    narrow, wide = (max((v.offset + v.units for v in placed if v.wide is w), default=0) for w in (False, True))
    return narrow, wide


def _replaces(step: Step) -> bool:
    """Whether a step's float result may lie where its second operand, unused afterwards, lies."""
    old, new = step.other, step.out_float
    if old is None or new is None or old is step.input or step.numbers.get("other_broadcast"):
        return False
    if any(v.grid is not None or v.external is not None for v in (old, new)):
        return False
    return (old.h, old.w, old.c, old.border, old.wide) == (new.h, new.w, new.c, new.border, new.wide)


def _range_record(grid: Dynamic) -> bytes:
    """As `Range` in plan.h."""
    return struct.pack("<4if3i", grid.input, grid.low, grid.high, int(grid.symmetric), grid.eps, 0, 0, 0)


def _record(step: Step, places: dict[Value, int], ranges: list[Dynamic]) -> bytes:
    """A step as the bytes of `Op` in plan.h."""
    n = {**_POINT, **step.numbers}
    n["kind"] = KINDS.index(step.kind)
    for name in ("input", "out_byte", "out_float", "other"):
        value = getattr(step, name)
        n[name] = -1 if value is None else places[value]
    values = (step.input, step.other, step.out_byte)
    input_grid, other_grid, output_grid = (v.grid if v is not None else None for v in values)
    dynamic = [g for g in (input_grid, other_grid, output_grid) if isinstance(g, Dynamic)]
    if dynamic:  # one, which a product reads or an elementwise op writes: the runtime fills in what it decides
        assert (step.kind, dynamic) in (("conv", [input_grid]), ("elementwise", [output_grid])), step
        n["dynamic"] = 1 + ranges.index(dynamic[0])
    if isinstance(input_grid, Quantization):
        n.setdefault("input_scale", input_grid.scale)
    if isinstance(other_grid, Quantization):
        n |= {"other_scale": other_grid.scale, "other_zero_point": other_grid.zero_point}
    if isinstance(output_grid, Quantization):
        n.setdefault("low", output_grid.low - output_grid.zero_point)
        n.setdefault("high", output_grid.high - output_grid.zero_point)
        n |= {"inverse": 1.0 / output_grid.scale, "zero_point": output_grid.zero_point, "nan_byte": output_grid.nan}
    n["binary"] = _BINARY.index(n.get("binary", ""))
    for name in ("before", "after"):
        n[name] = ACTIVATIONS.index(n.get(name, "none"))
    written = step.writes()[0] if step.writes() else step.input
    assert written is not None
    n.setdefault("channels", written.c)
    unknown = set(n) - {f.removeprefix("f:") for f in _FIELDS}
    assert not unknown, unknown
    parts = [
        struct.pack("<f", n.get(f[2:], 0.0)) if f.startswith("f:") else struct.pack("<i", int(n.get(f, 0)))
        for f in _FIELDS
    ]
    data = b"".join(parts)
    return data + bytes(_OP_BYTES - len(data))
