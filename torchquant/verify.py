"""Float against converted against lowered: how close two callables are on the same batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchquant import batches as data
from torchquant.errors import InputError

__all__ = ["Comparison", "compare", "sqnr_db"]


@dataclass(frozen=True)
class Comparison:
    """How an output follows its reference over all batches.

    Args:
        sqnr_db: 10 log10(sum ref^2 / sum (ref - out)^2) in dB; infinite if equal.
        max_abs: largest absolute difference.
        agreement: share of rows whose largest element of the first output is at the same place.
    """

    sqnr_db: float
    max_abs: float
    agreement: float


def sqnr_db(reference: torch.Tensor, output: torch.Tensor) -> float:
    """Signal to quantization noise in dB: 10 log10(|ref|^2 / |ref - out|^2), infinite if equal.

    NaN and infinities must stand in the same places, else it is minus infinity. They may lie on different devices.

    Raises:
        InputError: the shapes differ.
    """
    _check_outputs([reference], [output])
    return _db(*_signal_and_noise(reference, output.to(reference.device))[:2])


def _signal_and_noise(reference: torch.Tensor, output: torch.Tensor) -> tuple[float, float, float]:
    """Energies of reference and difference, and the largest difference; non-finite elements must be the same."""
    finite = reference.isfinite()
    if not torch.equal(finite, output.isfinite()) or not torch.equal(
        reference[~finite].nan_to_num(), output[~finite].nan_to_num()
    ):
        return 1.0, math.inf, math.inf
    kept, difference = reference[finite].double(), (reference[finite].double() - output[finite].double()).abs()
    largest = float(difference.max()) if difference.numel() else 0.0
    return float(kept.square().sum()), float(difference.square().sum()), largest


def _db(signal: float, noise: float) -> float:
    if math.isnan(noise) or math.isinf(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def compare(reference: Callable[..., Any], candidate: Callable[..., Any], batches: Iterable[Any]) -> Comparison:
    """Run both on every batch and compare all floating-point outputs.

    Raises:
        InputError: no batch, or outputs of different structure or shape.
    """
    signal = noise = max_abs = 0.0
    same = rows = count = 0
    for batch in batches:
        count += 1
        with torch.no_grad():
            expected, got = _tensors(data.call(reference, batch)), _tensors(data.call(candidate, batch))
        _check_outputs(expected, got)
        got = [b.to(a.device) for a, b in zip(expected, got, strict=True)]
        for a, b in zip(expected, got, strict=True):
            energy, error, largest = _signal_and_noise(a, b)
            signal, noise, max_abs = signal + energy, noise + error, max(max_abs, largest)
        if expected and expected[0].ndim >= 2 and expected[0].shape[-1] > 0:
            matches = expected[0].argmax(-1) == got[0].argmax(-1)
            same, rows = same + int(matches.sum()), rows + matches.numel()
    if count == 0:
        raise InputError("there is no batch to compare on")
    return Comparison(_db(signal, noise), max_abs, same / rows if rows else math.nan)


def _tensors(outputs: Any) -> list[torch.Tensor]:
    leaves = [x for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor)]
    return [x.detach().float() for x in leaves if x.is_floating_point()]


def _check_outputs(expected: list[torch.Tensor], got: list[torch.Tensor]) -> None:
    shapes, other = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in got]
    if shapes != other:
        raise InputError(f"the outputs differ in shape: {shapes} against {other}")
    if not shapes:
        raise InputError("the model returns no floating-point tensor, so there is nothing to compare")
