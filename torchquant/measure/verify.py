"""Float against converted against lowered: how close two callables are on the same batches, output by output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchquant.calibration import batches as data
from torchquant.errors import InputError

__all__ = ["Comparison", "OutputComparison", "compare", "compare_tensors", "sqnr_db"]

_LOST_DB = 10.0
_FEW = 8  # elements of a slice that tell nothing
_NEGLIGIBLE = 1e-5  # of the largest slice's root mean square: rounding of float sums


@dataclass(frozen=True)
class OutputComparison:
    """How one output follows its reference over all batches.

    Args:
        is_float: whether it holds floats; integers and bools are compared for equality.
        sqnr_db: of floats: 10 log10(sum ref^2 / sum (ref - out)^2) over the finite elements; NaN for others.
        max_abs: largest absolute difference.
        agreement: share of rows with the largest element at the same place (of floats) or of equal elements.
        compared: elements that were compared: those that are finite in the reference; of `elements` in all.
        lost: (axis, index) of a slice of the output (a channel, a sample) whose values are lost: below 10 dB, most of
            them off by half and more, however well larger ones hide that; (-1, 0) if that is so of most of the output.
            None too where there are few elements.
    """

    is_float: bool
    sqnr_db: float
    max_abs: float
    agreement: float
    compared: int
    elements: int
    lost: tuple[int, int] | None = None


@dataclass(frozen=True)
class Comparison:
    """How the outputs follow their reference over all batches.

    Args:
        sqnr_db: 10 log10(sum ref^2 / sum (ref - out)^2) in dB over all floating-point outputs; infinite if equal.
        max_abs: largest absolute difference.
        agreement: of the first output: the share of rows (of images: pixels) whose largest element is at the same
            place, or if it holds integers the share of equal elements.
        outputs: each output by itself.
    """

    sqnr_db: float
    max_abs: float
    agreement: float
    outputs: tuple[OutputComparison, ...] = ()


def sqnr_db(reference: torch.Tensor, output: torch.Tensor) -> float:
    """Signal to quantization noise in dB: `10 log10(|ref|^2 / |ref - out|^2)`, infinite if equal.

    NaN and infinities must stand in the same places, else it is minus infinity. They may lie on different devices.

    Args:
        reference: (...) of any dtype.
        output: of the same shape.

    Raises:
        InputError: the shapes differ.
    """
    if reference.shape != output.shape:
        raise InputError(f"the tensors differ in shape: {tuple(reference.shape)} against {tuple(output.shape)}")
    tally = _Tally(reference)
    tally.add(reference, output.to(reference.device))
    return _db(tally.signal, tally.noise)


def compare(reference: Callable[..., Any], candidate: Callable[..., Any], batches: Iterable[Any]) -> Comparison:
    """Run both on every batch and compare all outputs that are tensors or numbers.

    Each gets its own copy of the batch, so that a model that writes into its inputs changes nothing.

    Args:
        reference: called as `reference(*args)`; what the other is held against.
        candidate: a model, graph or program that takes the same.
        batches: what both are called with, each as `example_inputs` of `export`.

    Raises:
        InputError: no batch, or outputs of different structure, shape or type.
    """

    def outputs_of(model: Callable[..., Any], batch: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return _tensors(data.call(model, _copy(batch)))

    return compare_tensors((outputs_of(reference, b), outputs_of(candidate, b)) for b in batches)


def compare_tensors(pairs: Iterable[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]) -> Comparison:
    """As `compare`, of the outputs of the reference and of the candidate for each batch."""
    tallies: list[_Tally] = []
    for expected, got in pairs:
        _check_outputs(expected, got)
        tallies = tallies or [_Tally(t) for t in expected]
        for tally, a, b in zip(tallies, expected, got, strict=True):
            tally.add(a.detach(), b.detach().to(a.device))
    if not tallies:
        raise InputError("there is no batch to compare on")
    outputs = tuple(t.result() for t in tallies)
    floats = [t for t in tallies if t.is_float]
    total = _db(sum(t.signal for t in floats), sum(t.noise for t in floats)) if floats else math.nan
    return Comparison(total, max(o.max_abs for o in outputs), outputs[0].agreement, outputs)


@dataclass
class _Tally:
    """Sums over the batches for one output."""

    example: torch.Tensor
    signal: float = 0.0
    noise: float = 0.0
    max_abs: float = 0.0
    same: int = 0
    rows: int = 0
    compared: int = 0
    elements: int = 0
    slices: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # by axis: signal, noise, elements, off by half

    @property
    def is_float(self) -> bool:
        return self.example.is_floating_point()

    @property
    def axis(self) -> int:
        """Channels of images are on axis 1, all others' last."""
        return 1 if self.example.ndim >= 4 else -1

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Count one batch."""
        self.elements += a.numel()
        if not self.is_float:
            equal = a == b
            self.same, self.rows = self.same + int(equal.sum()), self.rows + a.numel()
            self.compared += a.numel()
            self.max_abs = max(self.max_abs, float((a.double() - b.double()).abs().max()) if a.numel() else 0.0)
            return
        finite = a.isfinite()
        self.compared += int(finite.sum())
        if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
            self.signal, self.noise, self.max_abs = self.signal + 1.0, math.inf, math.inf
        else:
            self._add_errors(torch.where(finite, a, 0).double(), torch.where(finite, b, 0).double(), finite)
        if a.ndim >= 2 and a.numel():
            matches = a.argmax(self.axis) == b.argmax(self.axis)
            self.same, self.rows = self.same + int(matches.sum()), self.rows + matches.numel()

    def _add_errors(self, a: torch.Tensor, b: torch.Tensor, finite: torch.Tensor) -> None:
        error = a - b
        self.signal, self.noise = self.signal + float(a.square().sum()), self.noise + float(error.square().sum())
        self.max_abs = max(self.max_abs, float(error.abs().max()) if error.numel() else 0.0)
        floor = _NEGLIGIBLE * a.abs().amax() if a.numel() else 0.0
        off = ((error.abs() > 0.5 * a.abs()) & (error.abs() > floor)).double()
        parts = (a.square(), error.square(), finite.double(), off)
        for axis in range(a.ndim):
            sums = [t.movedim(axis, 0).flatten(1).sum(1) if t.ndim > 1 else t for t in parts]
            known = self.slices.get(axis, [])
            if known and len(known[0]) == len(sums[0]):
                sums = [x + y for x, y in zip(known, sums, strict=True)]
            self.slices[axis] = sums

    def result(self) -> OutputComparison:
        agreement = self.same / self.rows if self.rows else math.nan
        db = _db(self.signal, self.noise) if self.is_float else math.nan
        return OutputComparison(self.is_float, db, self.max_abs, agreement, self.compared, self.elements, self._lost())

    def _lost(self) -> tuple[int, int] | None:
        for axis, (signal, noise, count, off) in self.slices.items():
            if len(signal) < 2:
                continue
            worst = (signal / count.clamp(min=1)).max() * _NEGLIGIBLE**2
            lost = (signal < noise * 10 ** (_LOST_DB / 10)) & (2 * off > count) & (count >= _FEW)
            lost &= noise > worst * count
            if bool(lost.any()):
                return axis, int(lost.nonzero()[0])
        _, _, count, off = self.slices.get(0, [torch.zeros(1)] * 4)
        return (-1, 0) if float(count.sum()) >= _FEW and float(off.sum()) > 0.5 * float(count.sum()) else None


def _db(signal: float, noise: float) -> float:
    if math.isnan(noise) or math.isinf(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _copy(batch: Any) -> Any:
    if isinstance(batch, data.Given):
        return data.Given(tuple(_copy(v) for v in batch.leaves), batch.state)
    return pytree.tree_map_only(torch.Tensor, torch.clone, batch)


def _tensors(outputs: Any) -> list[torch.Tensor]:
    leaves = [x for x in pytree.tree_leaves(outputs) if isinstance(x, (torch.Tensor, bool, int, float))]
    tensors = [torch.as_tensor(x).detach() for x in leaves]
    tensors = [torch.view_as_real(x) if x.is_complex() else x for x in tensors]
    return [x.float() if x.is_floating_point() else x for x in tensors]


def _check_outputs(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> None:
    kinds, others = (
        [("float" if t.is_floating_point() else "integer", tuple(t.shape)) for t in outputs]
        for outputs in (expected, got)
    )
    if kinds != others:
        raise InputError(f"the outputs differ in shape or type: {kinds} against {others}")
    if not kinds:
        raise InputError("the model returns no tensor, so there is nothing to compare")
