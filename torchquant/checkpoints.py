"""Answers kept on disk as they are found, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import GraphModule

from torchquant.algorithms.contract import Algorithm
from torchquant.errors import ArtifactError
from torchquant.files import write_whole
from torchquant.fx.blocks import weight_grid
from torchquant.fx.sites import observers
from torchquant.fx.stream import Task
from torchquant.parallel import is_parallel
from torchquant.solved import Solution

__all__ = ["Checkpoints", "read", "write"]


@dataclass(frozen=True)
class Checkpoints:
    """A folder with one file for each answer.

    Args:
        folder: None keeps nothing.
    """

    folder: Path | None

    @staticmethod
    def open(
        folder: Path | None,
        prepared: GraphModule,
        batches: Sequence[Any],
        algorithms: Sequence[Algorithm],
        settings: tuple[Any, ...],
    ) -> Checkpoints:
        """The folder of this very run: made, or found from one that was cut short.

        Args:
            settings: whatever else the answers depend on: the seed, what is excluded.

        Raises:
            ArtifactError: it holds another run.
        """
        if folder is None:
            return Checkpoints(None)
        if is_parallel():
            folder = folder / f"process-{dist.get_rank()}"
        folder.mkdir(parents=True, exist_ok=True)
        mark, digest = folder / "run.txt", _fingerprint(prepared, batches, algorithms, settings)
        if mark.exists() and mark.read_text() != digest:
            raise ArtifactError(
                f"{folder} holds the checkpoints of another run (other model, data, algorithms or seed); delete it or "
                "name another folder"
            )
        write_whole(mark, lambda part: part.write_text(digest))
        return Checkpoints(folder)

    def path(self, algorithm: int, span: int) -> Path | None:
        """Where the answer for a span is kept."""
        return None if self.folder is None else self.folder / f"{algorithm:02d}-{span:05d}.pt"


def _fingerprint(
    prepared: GraphModule, batches: Sequence[Any], algorithms: Sequence[Algorithm], settings: tuple[Any, ...]
) -> str:
    found = hashlib.blake2b(digest_size=16)
    found.update(str(prepared.graph).encode())
    for node in prepared.graph.nodes:
        if node.op == "get_attr":
            _digest(found, operator.attrgetter(str(node.target))(prepared))
    for node, observer in observers(prepared):
        found.update(f"{node.target} {type(observer).__qualname__}".encode())
        for name, value in sorted({**vars(observer), **dict(observer.named_buffers())}.items()):
            if isinstance(value, (torch.Tensor, torch.dtype, torch.qscheme, bool, int, float, str, tuple)):
                found.update(name.encode())
                _digest(found, value)
    for batch in batches:
        for leaf in (*batch.leaves, *batch.state.values()):
            _digest(found, leaf)
    for algorithm in algorithms:
        found.update(_description(algorithm).encode())
    found.update(repr(settings).encode())
    return found.hexdigest()


def _description(value: Any) -> str:
    """What an algorithm and its settings (other algorithms among them) are, the same in every process."""
    if isinstance(value, (list, tuple)):
        return str([_description(v) for v in value])
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    if not hasattr(value, "__dict__"):
        return repr(value)
    return f"{type(value).__qualname__} {sorted((name, _description(v)) for name, v in vars(value).items())}"


def _digest(found: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        found.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    else:
        found.update(repr(value).encode())


def write(path: Path, solution: Solution) -> None:
    """Keep an answer."""
    content = {
        "weights": {
            n: (codes.to(grid.dtype), grid.scale, grid.zero_point) for n, (codes, grid) in solution.weights.items()
        },
        "biases": solution.biases,
        "activations": solution.activations,
    }
    write_whole(path, lambda part: torch.save(content, part))


def read(path: Path, task: Task) -> Solution:
    """An answer that was kept for this span.

    Raises:
        ArtifactError: the file is none.
    """
    try:
        content = torch.load(path, weights_only=True)
        nodes = {site.name: site for site in task.span.sites}
        return Solution(
            {
                name: (codes, weight_grid(task.prepared, nodes[name]).with_scale(scale, zero_point))
                for name, (codes, scale, zero_point) in content["weights"].items()
            },
            content["biases"],
            content["activations"],
        )
    except (KeyError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{path} is no checkpoint of this run ({error}); delete the folder") from error
