"""What a program takes: time, its parts, callers at once, memory, work and energy; measured, or said to be unknown."""

from __future__ import annotations

import dataclasses
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from torchquant.calibration import batches as data
from torchquant.errors import InputError
from torchquant.files.archive import versions
from torchquant.files.plain import as_plain
from torchquant.fx.passes import copy_graph
from torchquant.measure.benchmark import Latency, interleaved
from torchquant.measure.resources import Energy, forget_peak, measure_energy, peak_bytes, resident_bytes
from torchquant.measure.traced import Traced, traced
from torchquant.types import check_whole

__all__ = ["Concurrent", "Profile", "profile"]

_INTEGER, _FLOAT = ("int8",), ("fp32", "weights")
_SHOWN = 12  # parts in the text


@dataclass(frozen=True)
class Concurrent:
    """Several threads that call at once.

    Args:
        callers: how many. p50_ms, p99_ms: of one call.
        calls_per_s: of all together.
    """

    callers: int
    p50_ms: float
    p99_ms: float
    calls_per_s: float


@dataclass(frozen=True)
class Profile:
    """What `profile` measured; `str()` for people.

    Args:
        name: of the target, or of the model's class.
        threads: of torch, in one call.
        sizes: of the inputs.
        latency: of the program; `others`: of what was timed in turns with it.
        trace: the parts of a call, with the whole as it was under the profiler, which adds to it.
        op_ms: node -> milliseconds, of single ops, where they can be told apart.
        concurrent: several callers at once.
        program_bytes: as saved; None of what is no program.
        resident_bytes, peak_bytes: of the whole process before, and at most during calls; None if unknown.
        weight_bytes, activation_bytes: of the matrix products: their codes, and all that they read and write.
        int_operations, float_operations: of the matrix products, two for a multiplication and an addition.
        energy: of one call.
        versions: of what made it.
    """

    name: str
    threads: int
    sizes: tuple[tuple[int, ...], ...]
    latency: Latency
    others: Mapping[str, Latency]
    trace: Traced
    op_ms: Mapping[str, float]
    concurrent: tuple[Concurrent, ...]
    program_bytes: int | None
    resident_bytes: int | None
    peak_bytes: int | None
    weight_bytes: int | None
    activation_bytes: int | None
    int_operations: int | None
    float_operations: int | None
    energy: Energy
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def site_ms(self) -> dict[str, float]:
        """Node -> milliseconds: of single ops, or of parts that compute one op alone."""
        alone = {part.sites[0]: part.ms for part in self.trace.parts if len(part.sites) == 1}
        return {**alone, **self.op_ms}

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings and lists, as JSON has them."""
        fields = dataclasses.asdict(self)
        fields["trace"] |= {"parts_ms": self.trace.parts_ms, "is_complete": self.trace.is_complete}
        plain: dict[str, Any] = as_plain({**fields, "site_ms": self.site_ms})
        return plain

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def __str__(self) -> str:
        sizes = ", ".join("x".join(map(str, size)) or "scalar" for size in self.sizes)
        lines = [f"{self.name}, inputs {sizes}, {self.threads} thread{'' if self.threads == 1 else 's'}"]
        for name, latency in {self.name: self.latency, **self.others}.items():
            ratio = f", {latency.median_ms / self.latency.median_ms:.2f} times" if name in self.others else ""
            lines.append(
                f"  {name:24s}{latency.median_ms:9.3f} ms (min {latency.min_ms:.3f}, quartiles {latency.iqr_ms:.3f} "
                f"apart, p99 {latency.p99_ms:.3f}{ratio})"
            )
        lines += [
            f"  {c.callers} callers at once: p50 {c.p50_ms:.3f} ms, p99 {c.p99_ms:.3f} ms, {c.calls_per_s:.0f} calls/s"
            for c in self.concurrent
        ]
        return "\n".join([*lines, *self._work_lines(), *self._part_lines()])

    def _work_lines(self) -> list[str]:
        shown = lambda n: "unknown" if n is None else f"{n:,}"  # noqa: E731
        joules = "" if self.energy.joules is None else f"{self.energy.joules:.4g} J, "
        return [
            f"  memory: {shown(self.resident_bytes)} bytes resident, {shown(self.peak_bytes)} at most; the program has "
            f"{shown(self.program_bytes)}",
            f"  matrix products: {shown(self.int_operations)} integer and {shown(self.float_operations)} float "
            f"operations, {shown(self.weight_bytes)} bytes of weights, {shown(self.activation_bytes)} of activations",
            f"  energy of a call: {joules}{self.energy.cpu_seconds:.4g} CPU seconds ({self.energy.meter})",
        ]

    def _part_lines(self) -> list[str]:
        trace = self.trace
        if not trace.parts:
            return [f"  parts: {trace.note or 'none seen'}"]
        share = trace.parts_ms / trace.whole_ms if trace.whole_ms else 0.0
        times = f"{trace.parts_ms:.3f} of {trace.whole_ms:.3f} ms under the profiler ({share:.0%})"
        lines = [f"  parts: {times}{trace.note}"]
        longest = sorted(trace.parts, key=lambda part: -part.ms)
        for part in longest[:_SHOWN]:
            lines.append(f"    {part.ms:9.3f} ms  {part.name}{_sites_text(part.sites)}")
        if len(longest) > _SHOWN:
            rest = longest[_SHOWN:]
            lines.append(f"    {sum(part.ms for part in rest):9.3f} ms  {len(rest)} more")
        return lines

    def _repr_html_(self) -> str:
        return f"<pre>{str(self).replace('&', '&amp;').replace('<', '&lt;')}</pre>"


def _sites_text(sites: Sequence[str]) -> str:
    if not sites:
        return ""
    return f": {sites[0]}" if len(sites) == 1 else f": {sites[0]} .. {sites[-1]} ({len(sites)} ops)"


def profile(
    program: Callable[..., Any],
    inputs: Any,
    *,
    reference: Callable[..., Any] | None = None,
    compiled: bool = False,
    graph: torch.fx.GraphModule | None = None,
    callers: Sequence[int] = (1, 2),
    rounds: int = 50,
) -> Profile:
    """Measure what a program takes on one batch, on this machine as it is now. States of programs and graphs stay.

    Args:
        program: what a backend's `lower` or `load` returned; a graph or module will do, with less to tell.
        inputs: one batch: a tensor, a tuple of arguments or a dict of keyword arguments.
        reference: another model, e.g. the float one, to time in turns with the program.
        compiled: time `torch.compile(reference)`, too; takes as long as that takes to compile.
        graph: the converted graph that the program was lowered from: of x86 programs, tells the time of each op.
        callers: numbers of threads that call at once.
        rounds: calls that count, of each.

    Raises:
        InputError: inputs that do not fit, or arguments that make no sense.
    """
    _check(program, reference, compiled, callers, rounds)
    before = resident_bytes()
    with _as_it_was(program), _as_it_was(reference):
        return _measured(
            _with_own_state(program), inputs, _with_own_state(reference), compiled, _with_own_state(graph), callers,
            rounds, before,
        )  # fmt: skip


def _with_own_state(model: Any) -> Any:
    """A graph whose state calls may move; anything else as it is."""
    return copy_graph(model) if isinstance(model, torch.fx.GraphModule) else model


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Give a program back the state of this thread, which the calls move."""
    state = getattr(model, "state", {}) if isinstance(getattr(model, "target", None), str) else {}
    try:
        yield
    finally:
        if state:
            model.state = state


def _measured(
    program: Any,
    inputs: Any,
    reference: Any,
    compiled: bool,
    graph: torch.fx.GraphModule | None,
    callers: Sequence[int],
    rounds: int,
    before: int | None,
) -> Profile:
    candidates: dict[str, Any] = {_name(program): program}
    if reference is not None:
        candidates["reference"] = reference
    if compiled:
        candidates["torch.compile"] = torch.compile(reference)
    times = interleaved(candidates, inputs, rounds=rounds)
    run = lambda: data.call(program, inputs)  # noqa: E731
    with torch.no_grad():
        peak = _peak(run)
        concurrent = tuple(_at_once(run, n, max(4, rounds // 2)) for n in callers)
        energy = measure_energy(run, max(4, rounds // 2))
        own_trace = getattr(program, "trace", None)
        trace = own_trace(inputs) if callable(own_trace) else traced(run)
        own_ops = getattr(program, "op_ms", None)
        op_ms = own_ops(graph, inputs) if callable(own_ops) and graph is not None else {}
    latency = times.pop(_name(program))
    size = getattr(program, "size_bytes", None)
    return Profile(
        _name(program),
        torch.get_num_threads(),
        tuple(tuple(v.shape) for v in data.flatten(inputs) if isinstance(v, torch.Tensor)),
        latency,
        times,
        trace,
        op_ms,
        concurrent,
        size if isinstance(size, int) else None,
        before,
        peak,
        *_work(getattr(program, "facts", {}).get("work")),
        energy,
    )


def _check(program: Any, reference: Any, compiled: bool, callers: Any, rounds: Any) -> None:
    check_whole(rounds, "rounds", 4, 100_000)
    for model in (program, *([] if reference is None else [reference])):
        if not callable(model) or isinstance(model, type):
            raise InputError(f"profile takes a program, a graph or a module, not {model!r:.80}")
    if isinstance(callers, (int, str)) or not all(type(n) is int and 0 < n <= 256 for n in callers):
        raise InputError(f"callers is a list of numbers of threads from 1 to 256, not {callers!r:.80}")
    if compiled and reference is None:
        raise InputError("compiled=True times torch.compile(reference): give the float model as reference")


def _name(program: Any) -> str:
    target = getattr(program, "target", None)
    return target if isinstance(target, str) else type(program).__name__


def _peak(run: Callable[[], object]) -> int | None:
    """The most memory during calls; None where the system cannot start the peak anew."""
    if not forget_peak():
        return None
    for _ in range(3):
        run()
    return peak_bytes()


def _at_once(run: Callable[[], object], callers: int, rounds: int) -> Concurrent:
    """Each caller calls `rounds` times; all start together."""
    times: list[float] = []
    errors: list[BaseException] = []
    start = threading.Barrier(callers + 1)

    def call() -> None:
        own = []
        try:
            with torch.no_grad():
                run()
                start.wait()
                for _ in range(rounds):
                    begin = time.perf_counter()
                    run()
                    own.append((time.perf_counter() - begin) * 1e3)
        except BaseException as error:
            errors.append(error)
            start.abort()
        times.extend(own)

    threads = [threading.Thread(target=call, daemon=True) for _ in range(callers)]
    for thread in threads:
        thread.start()
    with suppress(threading.BrokenBarrierError):  # a caller failed
        start.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    ranks = statistics.quantiles(times, n=100)
    return Concurrent(callers, statistics.median(times), ranks[98], len(times) / seconds)


def _work(rows: Sequence[Mapping[str, Any]] | None) -> tuple[int | None, int | None, int | None, int | None]:
    """Bytes of weights and of activations, integer and float operations of the products, as they were lowered."""
    if rows is None:
        return None, None, None, None
    operations = [2 * sum(r["macs"] for r in rows if r["precision"] in of) for of in (_INTEGER, _FLOAT)]
    moved = sum(r["input_bytes"] + r["output_bytes"] for r in rows)
    return sum(r["weight_bytes"] for r in rows), moved, *operations
