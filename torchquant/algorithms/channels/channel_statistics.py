"""What the graph transforms measure of each channel of a tensor, batch by batch, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from torchquant.calibration.parallel import gathered, rank, total_

__all__ = ["ChannelMoments", "ChannelProducts", "ChannelSample", "Fold", "Smallest"]


@dataclass
class Smallest:
    """The smallest value of each channel (channels,) that a tensor had."""

    axis: int
    value: torch.Tensor | None = None

    def update(self, value: torch.Tensor) -> None:
        """Add one batch."""
        if value.numel():
            low = value.detach().movedim(self.axis, -1).flatten(0, -2).amin(0)
            self.value = low if self.value is None else torch.minimum(self.value, low)

    def share(self) -> None:
        """Of all processes' batches."""
        minima = [low for low in gathered(self.value) if low is not None]
        self.value = torch.stack(minima).amin(0) if minima else None


@dataclass
class ChannelMoments:
    """Range and mean square of each channel (channels,) of a tensor.

    Args:
        axis: of the channels.
    """

    axis: int
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    squares: torch.Tensor | float = 0.0
    count: int = 0

    def update(self, value: torch.Tensor) -> None:
        """Add one batch."""
        if not value.numel():
            return
        rows = value.detach().movedim(self.axis, -1).reshape(-1, value.shape[self.axis])
        low, high = torch.aminmax(rows, dim=0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.squares = self.squares + rows.square().sum(0, dtype=torch.float64)
        self.count += len(rows)

    def share(self) -> None:
        """Of all processes' batches."""
        parts = [p for p in gathered((self.low, self.high, self.squares, self.count)) if p[3]]
        if parts:
            lows, highs, squares, counts = zip(*parts, strict=True)
            self.low, self.high = torch.stack(lows).amin(0), torch.stack(highs).amax(0)
            self.squares, self.count = torch.stack(squares).sum(0), sum(counts)

    @property
    def square(self) -> torch.Tensor:
        """Mean square of each channel, float32."""
        return torch.as_tensor(self.squares / max(1, self.count)).float()


class ChannelProducts:
    """Mean magnitude of each channel (channels,) of a tensor, and mean products of them (channels, channels)."""

    def __init__(self, axis: int, channels: int) -> None:
        self.axis, self._products = axis, torch.zeros(channels, channels, dtype=torch.float64)
        self._magnitudes, self._count = torch.zeros(channels, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def update(self, value: torch.Tensor) -> None:
        """Add one batch."""
        rows = value.detach().movedim(self.axis, -1).reshape(-1, value.shape[self.axis]).float()
        self._products += rows.T @ rows
        self._magnitudes += rows.abs().sum(0, dtype=torch.float64)
        self._count += len(rows)

    def share(self) -> None:
        """Of all processes' batches."""
        for tensor in (self._products, self._magnitudes, self._count):
            total_(tensor)

    @property
    def count(self) -> int:
        """Positions seen."""
        return int(self._count)

    @property
    def magnitude(self) -> torch.Tensor:
        """E|x| of each channel (channels,), float32."""
        return (self._magnitudes / self._count.clamp(min=1)).float()

    @property
    def products(self) -> torch.Tensor:
        """E[x xT] (channels, channels), float32."""
        return (self._products / self._count.clamp(min=1)).float()


@dataclass(frozen=True)
class Fold:
    """Items to judge by, and the range (channels,) of the other half of the data, which did not see them."""

    items: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


@dataclass
class ChannelSample:
    """Range of each channel in both halves of the samples, and items drawn evenly over all batches.

    Args:
        axis: of the channels.
        items: how many to keep.
        rows: an item is one position with its channels, not one sample of the batch.
        seed: of the draw.
    """

    axis: int
    items: int
    rows: bool
    seed: int
    ranges: list[tuple[torch.Tensor, torch.Tensor] | None] = field(default_factory=lambda: [None, None])
    kept: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed + 7919 * rank())
        self._keys, self._half, self._seen = torch.empty(0), torch.empty(0, dtype=torch.int64), 0

    def update(self, value: torch.Tensor) -> None:
        """Add one batch."""
        axis, value = (1, value.detach()[None]) if self.axis == 0 else (self.axis, value.detach())  # without a batch
        half = (torch.arange(len(value)) + self._seen) % 2
        self._seen += len(value)
        for which in (0, 1):
            part = value[half == which].movedim(axis, -1).flatten(0, -2)
            if len(part):
                low, high = torch.aminmax(part, dim=0)
                known = self.ranges[which] or (low, high)
                self.ranges[which] = torch.minimum(low, known[0]), torch.maximum(high, known[1])
        if self.rows:
            value = value.movedim(axis, -1)
            half = half.reshape(-1, *[1] * (value.ndim - 2)).expand(value.shape[:-1]).flatten()
            value = value.flatten(0, -2)
        self._draw(value, half)

    def _draw(self, items: torch.Tensor, half: torch.Tensor) -> None:
        if self.kept is None:
            self.kept = items[:0]
        if self.kept.shape[1:] != items.shape[1:]:
            return  # images of another size
        keys = torch.cat([self._keys, torch.rand(len(items), generator=self._generator)])
        chosen = keys.argsort()[: self.items]  # the smallest of all keys so far: an even draw
        old, new = chosen[chosen < len(self._keys)], chosen[chosen >= len(self._keys)] - len(self._keys)
        self.kept, self._half = torch.cat([self.kept[old], items[new]]), torch.cat([self._half[old], half[new]])
        self._keys = torch.cat([keys[old], keys[new + len(self._keys)]])

    def share(self) -> None:
        """Of all processes' batches: the items with the smallest keys of all."""
        parts = gathered((self.ranges, self._keys, self._half, self.kept))
        for which in (0, 1):
            known = [extent for ranges, *_ in parts if (extent := ranges[which]) is not None]
            lows, highs = zip(*known, strict=True) if known else ((), ())
            self.ranges[which] = (torch.stack(lows).amin(0), torch.stack(highs).amax(0)) if known else None
        drawn = [(keys, half, kept) for _, keys, half, kept in parts if kept is not None]
        alike = [part for part in drawn if part[2].shape[1:] == drawn[0][2].shape[1:]]
        if alike:
            self._keys, self._half, self.kept = (torch.cat([part[i] for part in alike]) for i in range(3))
            chosen = self._keys.argsort()[: self.items]
            self._keys, self._half, self.kept = self._keys[chosen], self._half[chosen], self.kept[chosen]

    @property
    def range(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Smallest and largest value (channels,) of all samples; None if there were none."""
        known = [r for r in self.ranges if r is not None]
        lows, highs = zip(*known, strict=True) if known else ((), ())
        return (torch.stack(lows).amin(0), torch.stack(highs).amax(0)) if known else None

    def folds(self) -> Iterator[Fold]:
        """The kept items of each half, to judge the range of the other by; without another, a half judges itself."""
        assert self.kept is not None
        for which in (0, 1):
            known = self.ranges[1 - which] or self.ranges[which]
            items = self.kept[self._half == which]
            if known is not None and len(items):
                yield Fold(items, *known)
