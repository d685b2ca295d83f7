"""Weights of 2, 3, 4 and 8 bits in the order in which the kernels of row_kernels.cpp read them: see rows.h."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchquant.ops.x86.packing import rounded

__all__ = ["Grid", "pack", "unpack"]

_MAGIC, _VERSION = 0x51545238, 2
_UNIT = 64
_LANES = 16  # outputs of a panel
_TOGETHER = 4  # panels
_MOST = 256  # inputs of a block: a product of 8 by 16 bits for each stays within 32
_STEP = {2: 16, 3: 32, 4: 8, 8: 4}  # inputs of a step
_HEADER = 16


@dataclass(frozen=True)
class Grid:
    """The codes of a weight and what they stand for: `scale * (codes - zero_point)`.

    Args:
        codes: integers `(outputs, inputs)` of at most 8 bits.
        scale: float32 `(outputs, groups)`, positive or zero and finite.
        zero_point: integers `(outputs, groups)`, each within 8 bits of the least code.
        bits: 2, 3, 4 or 8.
        low: the least code of the format.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    bits: int
    low: int


@dataclass(frozen=True)
class _Blocks:
    """How inputs are cut: `count` blocks of `size` inputs with room for `room`, `by_scale` of them to a scale."""

    size: int
    room: int
    count: int
    by_scale: int

    @classmethod
    def of(cls, inputs: int, groups: int, bits: int) -> _Blocks:
        group, step = inputs // groups, _STEP[bits]
        if groups == 1:
            units = rounded(inputs, 32) // 32
            count = -(-units * 32 // _MOST)
            size = min(-(-units // count) * 32, rounded(inputs, step))
            return cls(size, size, -(-inputs // size), -(-inputs // size))
        fitting = [n for n in range(1, min(_MOST, group) + 1) if group % n == 0]
        size = max((n for n in fitting if n % 32 == 0), default=fitting[-1])
        return cls(size, rounded(size, step), inputs // size, group // size)


def pack(grid: Grid, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The bytes of rows.h, uint8.

    Scales are stored in float16 where that loses nothing.
    """
    n, k = grid.codes.shape
    groups = grid.scale.shape[1]
    blocks, lanes = _Blocks.of(k, groups, grid.bits), rounded(n, _LANES)
    codes = torch.zeros(lanes, blocks.count, blocks.room, dtype=torch.uint8)
    unsigned = (grid.codes.to(torch.int16) - grid.low).to(torch.uint8)
    unsigned = torch.nn.functional.pad(unsigned, (0, blocks.count * blocks.size - k))
    codes[:n, :, : blocks.size] = unsigned.reshape(n, blocks.count, blocks.size)
    scale = _panels(grid.scale, lanes)
    half = scale.to(torch.float16)
    is_half = bool((half.float() == scale).all())
    zero = _panels(grid.zero_point.to(torch.int16) - grid.low, lanes)
    first = int(grid.zero_point[0, 0]) - grid.low
    zero_is_byte = bool((grid.zero_point - grid.low != first).any())
    parts = [_together(_lines(codes, grid.bits)), _bytes(_together(half if is_half else scale))]
    parts.append(_together(zero.to(torch.uint8)) if zero_is_byte else torch.empty(0, dtype=torch.uint8))
    bias = None if bias is None else torch.nn.functional.pad(bias.detach().float(), (0, lanes - n))
    parts.append(torch.empty(0, dtype=torch.uint8) if bias is None else _bytes(bias))
    parts = [torch.nn.functional.pad(p, (0, rounded(p.numel(), _UNIT) - p.numel())) for p in parts]
    ends = torch.tensor([_UNIT] + [p.numel() for p in parts]).cumsum(0).div(_UNIT, rounding_mode="floor").tolist()
    places = [ends[1], ends[2] if zero_is_byte else 0, 0 if bias is None else ends[3]]
    form = [
        blocks.size,
        blocks.room,
        blocks.count,
        blocks.by_scale,
        is_half,
        zero_is_byte,
        0 if zero_is_byte else first,
    ]
    header = [_MAGIC, _VERSION, grid.bits, n, k, *form, *places, ends[4]]
    return torch.cat([torch.tensor(header, dtype=torch.int32).view(torch.uint8), *parts])


def unpack(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The float32 weight `(outputs, inputs)` and the bias of what `pack` made: what the kernels compute with."""
    header = packed[:_UNIT].view(torch.int32).tolist()
    _, _, bits, n, k, size, room, count, by_scale, is_half, zero_is_byte, zero, scales, zeros, bias, _ = header
    lanes, scale_blocks = rounded(n, _LANES), -(-count // by_scale)
    codes = _codes(packed[_UNIT : scales * _UNIT], bits, lanes, count, room)[:n, :, :size]
    dtype = torch.float16 if is_half else torch.float32

    def of_panels(at: int, dtype: torch.dtype) -> torch.Tensor:
        part = packed[at * _UNIT : at * _UNIT + lanes * scale_blocks * dtype.itemsize].view(dtype)
        apart = _apart(part, lanes // _LANES, scale_blocks)
        return apart.transpose(1, 2).reshape(lanes, scale_blocks)[:n].float()

    scale = of_panels(scales, dtype).repeat_interleave(by_scale, 1)[:, :count, None]
    points = of_panels(zeros, torch.uint8).repeat_interleave(by_scale, 1)[:, :count, None] if zero_is_byte else zero
    weight = ((codes.float() - points) * scale).reshape(n, count * size)[:, :k].contiguous()
    at = bias * _UNIT
    return weight, packed[at : at + 4 * n].view(torch.float32) if bias else None


def _panels(values: torch.Tensor, lanes: int) -> torch.Tensor:
    """`(outputs, groups)` as `(panels, groups, 16)`, padded with zeros."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, lanes - len(values)))
    return padded.view(-1, _LANES, values.shape[1]).transpose(1, 2).contiguous()


def _together(lines: torch.Tensor) -> torch.Tensor:
    """`(panels, count, size)` as they lie: of each four panels the first lines, the second lines and so on."""
    whole = len(lines) // _TOGETHER * _TOGETHER
    four = lines[:whole].reshape(-1, _TOGETHER, *lines.shape[1:]).transpose(1, 2).reshape(-1)
    return torch.cat([four, lines[whole:].transpose(0, 1).reshape(-1)])


def _apart(stored: torch.Tensor, panels: int, count: int) -> torch.Tensor:
    """The inverse of `_together`."""
    size, whole = stored.numel() // (panels * count), panels // _TOGETHER * _TOGETHER
    cut = whole * count * size
    four = stored[:cut].view(-1, count, _TOGETHER, size).transpose(1, 2).reshape(whole, count, size)
    return torch.cat([four, stored[cut:].view(count, panels - whole, size).transpose(0, 1)])


def _lines(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `(outputs, blocks, room)` as lines `(panels, count, 64)`."""
    lanes, blocks, room = codes.shape
    step, panels = _STEP[bits], lanes // _LANES
    fields = codes.view(panels, _LANES, blocks * room // step, step // 4, 4)
    fields = fields.permute(0, 2, 3, 1, 4).reshape(-1, step // 4, _UNIT)  # by panel and step: field, then lane and byte
    if bits == 3:
        lower = _merged((fields & 3).view(-1, 2, 4, _UNIT), 2)
        fields = torch.cat([lower, _merged(fields >> 2, 1)[:, None]], 1)
    elif bits < 8:
        fields = _merged(fields, bits)
    return fields.reshape(panels, -1, _UNIT)


def _merged(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """`(..., fields, 64)` into one byte each, the first field lowest."""
    merged = torch.zeros_like(fields[..., 0, :])
    for i in range(fields.shape[-2]):
        merged |= fields[..., i, :] << (bits * i)
    return merged


def _codes(stored: torch.Tensor, bits: int, lanes: int, blocks: int, room: int) -> torch.Tensor:
    """The codes that `_lines` was given, of lines that lie together."""
    step, panels = _STEP[bits], lanes // _LANES
    count = blocks * room // step * (3 if bits == 3 else 1)
    lines = _apart(stored[: panels * count * _UNIT], panels, count).reshape(-1, _UNIT)
    if bits == 3:
        three = lines.view(-1, 3, _UNIT)
        fields = _fields(three[:, :2], 2, 4).flatten(1, 2) | _fields(three[:, 2:], 1, 8).flatten(1, 2) << 2
    else:
        fields = _fields(lines[:, None], bits, step // 4).flatten(1, 2)
    ordered = fields.view(panels, -1, step // 4, _LANES, 4).permute(0, 3, 1, 2, 4)
    return ordered.reshape(lanes, blocks, room)


def _fields(merged: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """`(..., 64)` as `(..., count, 64)`."""
    return torch.stack([merged >> (bits * i) & (2**bits - 1) for i in range(count)], -2)


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(-1).view(torch.uint8)
