"""Answers kept on disk as they are found, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import io
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import GraphModule, Node

from torchquant.calibration.parallel import everywhere, is_parallel
from torchquant.calibration.stream import Task
from torchquant.errors import ArtifactError
from torchquant.files.archive import versions
from torchquant.files.owned import claimed
from torchquant.files.whole import digest, reading, write_whole
from torchquant.fx import ops
from torchquant.fx.blocks import weight_grid, weight_of
from torchquant.fx.grids import Grid
from torchquant.fx.reading import observers
from torchquant.solving.contract import Algorithm
from torchquant.solving.descriptions import description
from torchquant.solving.solved import Solution

__all__ = ["Checkpoints", "Parts", "read", "write"]

_MARK = "run.txt"
_HEAD = "torchquant checkpoint 3"


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
            settings: whatever else the answers depend on: the seed, what is excluded, the budget of time.

        Raises:
            ArtifactError: it holds another run, or is no folder that can be written.
        """
        if folder is None:
            return Checkpoints(None)
        if is_parallel():
            folder = folder / f"process-{dist.get_rank()}"
            settings = (*settings, dist.get_world_size())
        run = _fingerprint(prepared, batches, algorithms, settings)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"{folder} cannot be made a folder for checkpoints ({error.strerror or error}); name another one"
            raise ArtifactError(text) from error
        if (folder / _MARK).exists() and _mark(folder) != run:
            raise ArtifactError(
                f"{folder} holds the checkpoints of another run (other model, data, algorithms, seed, budget, or "
                "versions of torchquant, torch or torchao); delete it or name another folder"
            )
        write_whole(folder / _MARK, lambda part: part.write_text(run, encoding="utf-8"))
        return Checkpoints(folder)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other runs out of the folder inside the block: one deletes what another is about to read.

        Raises:
            ArtifactError: another one is in it.
        """
        with nullcontext(True) if self.folder is None else claimed(self.folder) as is_alone:
            if not is_alone:
                raise ArtifactError(
                    f"another run is at work on the checkpoints in {self.folder}; wait for its end, or name another "
                    "folder"
                )
            yield

    def path(self, algorithm: int, span: int) -> Path | None:
        """Where the answer for a span is kept."""
        return None if self.folder is None else self.folder / f"{algorithm:02d}-{span:05d}.pt"


class Parts:
    """Answers for parts of a span, beside the place of the span's own; see `Clock.part`."""

    def __init__(self, path: Path) -> None:
        self._path, self._count = path, 0

    def __call__(self, task: Any, compute: Callable[[], Solution]) -> Solution:
        path = self._path.with_name(f"{self._path.stem}-{self._count:03d}.part.pt")
        self._count += 1
        if everywhere(path.exists()):
            return read(path, task)
        solution = compute()
        write(path, solution)
        return solution

    def clear(self) -> None:
        """Forget them: the span's own answer is kept."""
        for path in self._path.parent.glob(f"{self._path.stem}-*.part.pt"):
            path.unlink(missing_ok=True)


def _mark(folder: Path) -> str:
    """Which run a folder belongs to."""
    with reading(folder / _MARK, "the mark of a run", "delete the folder"):
        return (folder / _MARK).read_text(encoding="utf-8")


def _fingerprint(
    prepared: GraphModule, batches: Sequence[Any], algorithms: Sequence[Algorithm], settings: tuple[Any, ...]
) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(repr(sorted(versions().items())).encode())
    hasher.update(str(prepared.graph).encode())
    for node in prepared.graph.nodes:
        if node.op == "get_attr":
            hasher.update(description(operator.attrgetter(str(node.target))(prepared)).encode())
    for node, observer in observers(prepared):
        hasher.update(f"{node.target} {description(observer)}".encode())
    for batch in batches:
        hasher.update(description((batch.leaves, dict(batch.state))).encode())
    hasher.update(description(algorithms).encode())
    hasher.update(repr(settings).encode())
    return hasher.hexdigest()


def write(path: Path, solution: Solution) -> None:
    """Keep an answer, behind a digest of itself, its place and its run."""
    content = {
        "weights": {
            n: (codes.to(grid.dtype), grid.scale, grid.zero_point) for n, (codes, grid) in solution.weights.items()
        },
        "biases": solution.biases,
        "activations": solution.activations,
        "notes": solution.notes,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    head = f"{_HEAD} {_digest_at(path, buffer.getvalue())}\n".encode()
    write_whole(path, lambda part: part.write_bytes(head + buffer.getvalue()))


def _digest_at(path: Path, content: bytes) -> str:
    return digest(f"{_mark(path.parent)} {path.name}\n".encode(), content)


def read(path: Path, task: Any) -> Solution:
    """An answer that was kept for this span.

    Raises:
        ArtifactError: the file is none, is damaged, or was written for another span or by another run.
    """
    with reading(path, "a checkpoint of this run", "delete it, and it is computed again"):
        head, _, stored = path.read_bytes().partition(b"\n")
        if head.decode() != f"{_HEAD} {_digest_at(path, stored)}":
            raise ValueError("its content does not match its digest")
        content = torch.load(io.BytesIO(stored), weights_only=True)
        nodes = {site.name: site for site in task.span.sites}
        return Solution(
            {name: _weight(task, nodes[name], *parts) for name, parts in content["weights"].items()},
            {name: _bias(nodes[name].name, bias) for name, bias in content["biases"].items()},
            {name: _range(task, name, *parts) for name, parts in content["activations"].items()},
            [str(note) for note in content["notes"]],
        )


def _weight(
    task: Task, node: Node, codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
) -> tuple[torch.Tensor, Grid]:
    """Codes and their grid, if they are ones for this weight."""
    grid, weight = weight_grid(task.prepared, node), weight_of(task.prepared, node)
    assert weight is not None
    shape = ops.constant_value(task.prepared, weight[0].args[0]).shape  # type: ignore[arg-type]
    fits = (codes.dtype, codes.shape) == (grid.dtype, shape)
    fits = fits and scale.numel() == grid.scale.numel() and zero_point.numel() == grid.zero_point.numel()
    fits = fits and not zero_point.is_floating_point() and bool((scale.isfinite() & (scale > 0)).all())
    if not fits or (codes.numel() and not grid.quant_min <= int(codes.min()) <= int(codes.max()) <= grid.quant_max):
        raise ValueError(f"its codes are none of {node.name}'s weight")
    return codes, grid.with_scale(scale, zero_point)


def _bias(name: str, bias: torch.Tensor) -> torch.Tensor:
    if bias.ndim != 1 or not bias.is_floating_point() or not bool(bias.isfinite().all()):
        raise ValueError(f"its bias is none of {name}")
    return bias


def _range(task: Task, target: str, scale: float, zero_point: int) -> tuple[float, int]:
    task.prepared.get_submodule(target)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"its scale for {target} is {scale}")
    return float(scale), operator.index(zero_point)
