"""Data-parallel runs under `torchrun`: each process has its share of the batches, sums are taken over all."""

from __future__ import annotations

import torch
import torch.distributed as dist

__all__ = ["anywhere", "everywhere", "is_parallel", "total", "total_", "world_size"]


def is_parallel() -> bool:
    """Whether a process group of more than one process is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Processes that share the data."""
    return dist.get_world_size() if is_parallel() else 1


def total_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place."""
    if is_parallel():
        dist.all_reduce(tensor)
    return tensor


def total(*values: float) -> list[float]:
    """Sums of numbers over all processes."""
    return total_(torch.tensor(values, dtype=torch.float64)).tolist() if is_parallel() else list(values)


def anywhere(condition: bool) -> bool:
    """Whether it holds in any process: they must go the same way."""
    return total(float(condition))[0] > 0


def everywhere(condition: bool) -> bool:
    """Whether it holds in all processes."""
    return total(float(condition))[0] == world_size()
