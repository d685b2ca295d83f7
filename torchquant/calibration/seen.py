"""Which batches a graph was calibrated on, so that every figure can say whether its data are others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule

from torchquant.calibration.batches import Given, Steps

__all__ = ["data_used", "forget", "remember", "shared"]

_SEEN = "torchquant_seen"  # key in graph.meta: digests of the batches
_ELEMENTS = 1 << 16  # of a tensor that go into its digest, evenly spread


def remember(prepared: GraphModule, batch: Given | Steps) -> None:
    """Note that a graph is calibrated on a batch."""
    prepared.meta.setdefault(_SEEN, set()).update(map(_digest, _each([batch])))


def forget(prepared: GraphModule) -> None:
    """As if the graph had not been calibrated."""
    prepared.meta.pop(_SEEN, None)


def data_used(prepared: GraphModule, batches: Iterable[Given | Steps]) -> str:
    """In words, how many batches these are, and whether the graph was calibrated on them."""
    digests = [_digest(batch) for batch in _each(batches)]
    count = f"{len(digests)} batch{'' if len(digests) == 1 else 'es'}"
    if _SEEN not in prepared.meta:
        return f"{count} (whether these were calibrated on is not known: the graph was not calibrated by torchquant)"
    known = sum(digest in prepared.meta[_SEEN] for digest in digests)
    if not known:
        return f"{count} held out from calibration"
    return f"{count} of the calibration data" if known == len(digests) else f"{count}, {known} of them calibrated on"


def shared(batches: Iterable[Given | Steps], others: Iterable[Given | Steps]) -> tuple[int, int]:
    """(how many of the batches are among the others, how many there are)."""
    known, digests = set(map(_digest, _each(others))), [_digest(batch) for batch in _each(batches)]
    return sum(digest in known for digest in digests), len(digests)


def _each(batches: Iterable[Given | Steps]) -> Iterator[Given]:
    for batch in batches:
        yield from batch.batches if isinstance(batch, Steps) else [batch]


def _digest(batch: Given) -> str:
    hasher = hashlib.blake2b(digest_size=12)
    for leaf in batch.leaves:
        hasher.update(_bytes(leaf))
    return hasher.hexdigest()


def _bytes(leaf: Any) -> bytes:
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf).encode()
    flat = leaf.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _ELEMENTS)].cpu().contiguous()
    return f"{leaf.dtype} {tuple(leaf.shape)}".encode() + sample.view(torch.uint8).numpy().tobytes()
