"""One number for what a graph computes: the same in two processes exactly if they hold the same graph."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule

from torchquant.fx import ops
from torchquant.fx.grids import Grid
from torchquant.fx.reading import observers

__all__ = ["digest_of"]

_COUNTS = ("histogram", "counts", "zeros")  # of weights' observers: how often a weight was seen, not what it holds


def digest_of(model: GraphModule) -> str:
    """Digest of the ops, parameters and buffers of a graph, and of its observers' state."""
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(str(model.graph).encode())
    for node in model.graph.nodes:
        if node.op == "get_attr":
            _add(hasher, str(node.target), operator.attrgetter(str(node.target))(model))
    for node, observer in observers(model):
        hasher.update(f"{node.target} {type(observer).__qualname__}".encode())
        seen = ops.is_constant(node.args[0])  # type: ignore[arg-type]
        for name, value in _held(observer):
            if not (seen and name.rpartition(".")[2] in _COUNTS):
                _add(hasher, name, value)
    return hasher.hexdigest()


def _held(observer: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The tensors of an observer, those of the grid that an answer is on among them."""
    grid = getattr(observer, "grid", None)
    values: dict[str, Any] = {**vars(observer), **(vars(grid) if isinstance(grid, Grid) else {})}
    values.update(observer.named_buffers())
    yield from sorted((name, value) for name, value in values.items() if isinstance(value, torch.Tensor))


def _add(hasher: Any, name: str, value: Any) -> None:
    hasher.update(name.encode())
    if isinstance(value, torch.Tensor):
        hasher.update(f"{value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        hasher.update(flat.view(torch.uint8).numpy() if value.numel() else b"")
    else:
        hasher.update(repr(value).encode())
