"""What `optimize` did, span by span and algorithm by algorithm."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Optimization", "SpanResult"]


@dataclass(frozen=True)
class SpanResult:
    """What one algorithm did to one span.

    Args:
        algorithm, span: names.
        before, after: squared error of the span's output on the calibration data.
        kept: whether the answer is in the graph; if not, it was worse than what stood there.
        seconds: spent on it.
    """

    algorithm: str
    span: str
    before: float
    after: float
    kept: bool
    seconds: float


@dataclass
class Optimization:
    """What `optimize` did.

    Args:
        spans: one by one.
        steps: (algorithm, SQNR of the whole output in dB after it, whether it was kept); the first row is the graph as
            it came.
        scores: likewise what the user's metric says, None without one.
        measured_on: which data the steps were measured on, in words.
        notes: what was left alone and why.
        seconds, peak_bytes, spilled_bytes: time, largest resident memory of the process, bytes that went to disk.
    """

    spans: list[SpanResult] = field(default_factory=list)
    steps: list[tuple[str, float, bool]] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    measured_on: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0
    spilled_bytes: int = 0

    def __str__(self) -> str:
        scores = ["" if score is None else f"  metric {score:.6g}" for score in self.scores]
        lines = [
            f"{name:28s}{db:8.2f} dB{score}{'' if kept else '   not kept'}"
            for (name, db, kept), score in zip(self.steps, scores, strict=True)
        ]
        lines.append(f"measured on {self.measured_on}")
        back = [s for s in self.spans if not s.kept]
        lines.append(f"{len(self.spans)} spans in {self.seconds:.1f} s, {len(back)} left as they were")
        return "\n".join([*lines, *self.notes])
