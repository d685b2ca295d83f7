"""Weights in the order in which the x86 kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def rounded(size: int, to: int) -> int:
    return -(-size // to) * to


@dataclass(frozen=True)
class Groups:
    """How blocks of 16 output channels of a grouped convolution read the inputs of their groups.

    Args:
        inputs, outputs: channels of a group.
        panel: blocks that go together.
        depth: input channels that a panel reads, a multiple of 4, from the first of its first group on, or from
            `stride - depth` on if that comes before: what belongs to other groups has weights of zero.
    """

    inputs: int
    outputs: int
    panel: int
    depth: int

    @classmethod
    def of(cls, groups: int, inputs: int, outputs: int) -> Groups:
        """For `groups` groups of `inputs` and `outputs` channels: the panels that read least, then the widest."""
        candidates = []
        for panel in (4, 3, 2, 1):
            starts = range(0, groups * outputs, 16 * panel)
            ends = [min(start + 16 * panel, groups * outputs) - 1 for start in starts]
            most = max(end // outputs - start // outputs + 1 for start, end in zip(starts, ends, strict=True))
            candidates.append(cls(inputs, outputs, panel, rounded(most * inputs, 4)))
        return min(candidates, key=lambda g: g.depth)

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """int8 `(n, inputs, kh, kw)` as the dense `(n, depth, kh, kw)` that each output channel reads."""
        n, c, kh, kw = weight.shape
        stride = rounded(n // self.outputs * c, 16)
        channels = torch.arange(n)
        start = channels // (16 * self.panel) * 16 * self.panel // self.outputs * c
        place = channels // self.outputs * c - start.clamp(max=stride - self.depth)
        dense = torch.zeros(n, self.depth, kh, kw, dtype=torch.int8)
        dense[channels[:, None], place[:, None] + torch.arange(c)] = weight
        return dense


def pack_convolution(weight: torch.Tensor) -> torch.Tensor:
    """int8 `(n, c, kh, kw)` as `(n / 16, kh * kw, c / 4, 16, 4)`, n and c padded with zeros."""
    n, c, kh, kw = weight.shape
    padded = torch.zeros(rounded(n, 16), rounded(c, 4), kh * kw, dtype=torch.int8)
    padded[:n, :c] = weight.reshape(n, c, kh * kw)
    return padded.view(-1, 16, padded.shape[1] // 4, 4, kh * kw).permute(0, 4, 2, 1, 3).contiguous()


def pack_depthwise(weight: torch.Tensor, stride: int, dilation: int) -> torch.Tensor:
    """int8 `(c, 1, kh, kw)` as the depthwise kernel reads it, for the strides and dilations of rows.

    Block by block of channels `(taps, lanes, 4)`, the lanes as `interleave_channels`: a tap is four rows of a
    column, and where one row would be left over, four columns of it. Windows of three rows that move by one have
    a second set, one row lower, for the next output row.
    """
    c, _, kh, kw = weight.shape
    padded = torch.zeros(rounded(c, 16), rounded(kh, 4), rounded(kw, 4), dtype=torch.int8)
    padded[:c, :kh, :kw] = weight[:, 0]
    if kh % 4 == 1 and kh > 1:
        down, along = padded[:, : kh - 1], padded[:, kh - 1]
    else:
        down, along = padded, padded[:, 0, :0]
    sets = [_taps(down[:, :, :kw], along)]
    if (kh, stride, dilation) == (3, 1, 1):
        sets.append(_taps(down.roll(1, 1)[:, :, :kw], along))
    return torch.cat([block.permute(1, 0, 2).reshape(-1) for s in sets for block in s.split(_blocks(len(s)))])


def _taps(down: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """`(c, taps, 4)` from `(c, rows, kw)` and `(c, columns)`, rows and columns multiples of 4; channels interleaved."""
    columns = down.view(len(down), -1, 4, down.shape[2]).transpose(2, 3).reshape(len(down), -1, 4)
    return interleave_channels(torch.cat([columns, along.reshape(len(along), -1, 4)], 1))


def _blocks(channels: int) -> list[int]:
    """How the depthwise kernel cuts a multiple of 16 channels: by 64, then 32 and 16."""
    rest = channels % 64
    return [64] * (channels // 64) + [32] * (rest // 32) + [16] * (rest % 32 // 16)


def interleave_channels(values: torch.Tensor) -> torch.Tensor:
    """Rows, a multiple of 16, in the order in which interleaving byte vectors leaves channels.

    In a block of 64, lane 4 i + t of vector j holds channel 16 i + 4 j + t; in one of 32, lane 8 h + 4 i + t of
    vector v holds 16 i + 4 (2 v + h) + t; one of 16 stays as it is.
    """
    parts = []
    for block in values.split(_blocks(len(values))):
        lanes = len(block) // 16
        parts.append(block.view(lanes, 4, 4, *values.shape[1:]).transpose(0, 1).reshape(-1, *values.shape[1:]))
    return torch.cat(parts)
