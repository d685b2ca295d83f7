"""What every launch of a kernel shares: grid arithmetic, and options that depend on the GPU and on the environment."""

from __future__ import annotations

import functools

import torch
import triton
from triton.runtime import driver

from torchquant.ops.gpu import configs

__all__ = ["INTERPRETED", "ceil_div", "launch_options", "multiprocessors"]

INTERPRETED = triton.knobs.runtime.interpret  # Triton's interpreter does not run inline assembly
_EARLY = "early" in configs.TRIAL and not INTERPRETED


def ceil_div(size: int, tile: int) -> int:
    """How many tiles cover a size."""
    return -(-size // tile)


def launch_options(x: torch.Tensor) -> dict[str, bool]:
    """Options of every launch; programmatic dependent launch on Hopper if it is tried, see `kernel_parts.follow`."""
    if not _EARLY:
        return {"EARLY": False}
    early = _has_dependent_launch(x.device.index) if x.is_cuda else driver.active.get_current_target().arch >= 90
    return {"EARLY": early, "launch_pdl": early}


@functools.cache
def _has_dependent_launch(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 without one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
