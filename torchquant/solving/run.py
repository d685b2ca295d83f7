"""Algorithms on a calibrated prepared graph: run, guarded, timed, resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from torchquant.calibration import batches as data
from torchquant.calibration.calibrate import recalibrate
from torchquant.calibration.digests import digest_of
from torchquant.calibration.parallel import agree, anywhere, everywhere, is_parallel, together
from torchquant.calibration.stream import Stream, Task, given_to
from torchquant.errors import InputError
from torchquant.fx import ops, patterns
from torchquant.fx.batch_axes import lacks_batch_axis
from torchquant.fx.blocks import Span, is_shared, weight_of
from torchquant.fx.passes import copy_graph
from torchquant.fx.reading import observers
from torchquant.solving.checkpoints import Checkpoints, Parts, read, write
from torchquant.solving.contract import Algorithm, Clock, Judging, Measuring, Noting, Solver, Transform
from torchquant.solving.judging import Figure, Judge, Score, note, split
from torchquant.solving.progress import bar_of, peak_bytes
from torchquant.solving.results import Optimization, SpanResult
from torchquant.solving.solved import Solution, SolvedActivation, SolvedWeight, apply
from torchquant.surroundings import own_modes
from torchquant.types import check_whole

__all__ = ["DEFAULT_MEMORY_BYTES", "run"]

DEFAULT_MEMORY_BYTES = 4 << 30


@dataclass
class _Settings:
    budget_s: float
    memory_bytes: int
    checkpoint: Path | None
    seed: int
    excluded: frozenset[str]
    progress: bool
    start: float = field(default_factory=time.perf_counter)

    @property
    def left_s(self) -> float:
        return self.budget_s - (time.perf_counter() - self.start)

    @property
    def is_late(self) -> bool:
        """Whether the time is up, in any process."""
        return not math.isinf(self.budget_s) and anywhere(self.left_s <= 0)


def run(
    prepared: GraphModule,
    batches: Iterable[Any],
    algorithms: Sequence[Algorithm],
    *,
    validation: Iterable[Any] | None = None,
    score: Score | None = None,
    budget_s: float | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    exclude: Sequence[str] = (),
    progress: bool = True,
) -> Optimization:
    """See `torchquant.optimize`; `score` is its metric, of a prepared graph."""
    with together("optimize"), own_modes():
        _check(prepared, algorithms, budget_s)
        check_whole(seed, "seed")
        if isinstance(exclude, str):
            raise InputError(f"exclude is a list of patterns: write [{exclude!r}]")
        if is_parallel():
            agree(_description(algorithms, budget_s, checkpoint, seed, exclude), "what `optimize` is to do")
            agree(digest_of(prepared), "the graph that `optimize` is given")
        settings = _Settings(
            math.inf if budget_s is None else budget_s,
            memory_bytes,
            None if checkpoint is None else Path(checkpoint),
            seed,
            frozenset(node.name for pattern in exclude for node in patterns.match(prepared, pattern)),
            progress,
        )
        solved_on, held_out = list(data.checked(prepared, batches)), None
        if validation is not None:
            held_out = list(data.checked(prepared, validation))
        elif algorithms:
            solved_on, held_out = split(solved_on)
        judge = Judge(prepared, solved_on, held_out, score, memory_bytes)
        return _run(prepared, given_to(prepared, solved_on), algorithms, settings, judge)


def _run(
    prepared: GraphModule,
    kept: Sequence[data.Given],
    algorithms: Sequence[Algorithm],
    settings: _Settings,
    judge: Judge,
) -> Optimization:
    result = Optimization(measured_on=judge.measured_on)
    note(result, "as calibrated", judge.figure(prepared), True)
    choices = (settings.seed, sorted(settings.excluded), None if math.isinf(settings.budget_s) else settings.budget_s)
    checkpoints = Checkpoints.open(settings.checkpoint, prepared, kept, algorithms, choices)
    original = copy_graph(prepared)
    try:
        with checkpoints.claimed():
            for number, algorithm in enumerate(algorithms):
                if isinstance(algorithm, Solver):
                    _solve(prepared, kept, algorithm, number, settings, checkpoints, judge, result)
                else:
                    _transform(prepared, kept, algorithm, settings, judge, result)
        if is_parallel():
            agree(digest_of(prepared), "what the algorithms made of the graph")
    except BaseException as error:
        if settings.checkpoint is not None or not isinstance(error, KeyboardInterrupt):
            _become(prepared, original)
        prepared.recompile()
        raise
    prepared.recompile()
    result.seconds = time.perf_counter() - settings.start
    result.peak_bytes = peak_bytes()
    return result


def _description(
    algorithms: Sequence[Algorithm],
    budget_s: float | None,
    checkpoint: str | Path | None,
    seed: int,
    exclude: Sequence[str],
) -> str:
    """What the processes of a parallel run must be told alike."""
    names = [type(a).__qualname__ for a in algorithms]
    return repr((names, budget_s is None, checkpoint is None, seed, sorted(exclude)))


def _check(prepared: GraphModule, algorithms: Sequence[Algorithm], budget_s: float | None) -> None:
    if isinstance(algorithms, str) or not isinstance(algorithms, Sequence):
        name = algorithms.__name__ if isinstance(algorithms, type) else type(algorithms).__name__
        hint = f": write [{name}()]" if isinstance(algorithms, (Solver, Transform)) else ""
        raise InputError(f"algorithms is a list of algorithms, not a single {name}{hint}")
    solved = any(isinstance(o, (SolvedWeight, SolvedActivation)) for _, o in observers(prepared))
    for algorithm in algorithms:
        if isinstance(algorithm, type):
            raise InputError(f"{algorithm.__name__} is a class; pass an instance: {algorithm.__name__}()")
        if isinstance(algorithm, Solver):
            solved = True
        elif not isinstance(algorithm, Transform):
            raise InputError(
                f"{type(algorithm).__name__} is no algorithm: it has neither spans() and solve() nor transform()"
            )
        elif solved:
            raise InputError(
                f"{type(algorithm).__name__} changes float weights, so it must come before the algorithms that choose "
                "codes and ranges for them"
            )
    if budget_s is not None and (isinstance(budget_s, (str, bool)) or not budget_s > 0):
        raise InputError(f"budget_s is {budget_s}; it must be above 0 seconds")
    elsewhere = {t.device.type for t in (*prepared.parameters(), *prepared.buffers())} - {"cpu"}
    if algorithms and elsewhere:
        raise InputError(
            f"the graph lies on {', '.join(sorted(elsewhere))}, and algorithms compute on the CPU: quantize the model "
            "there (lower moves the result to its device), or pass algorithms=() for plain rounding"
        )
    for node in filter(lacks_batch_axis, prepared.graph.nodes) if algorithms else ():
        if weight_of(prepared, node) is not None:
            raise InputError(
                f"{ops.op_name(node)} {node.name} takes a single sample, without a batch axis, over which algorithms "
                "average: export the model with torchquant.export, which adds one"
            )


# transforms -------------------------------------------------------------------------------------------------------


def _transform(
    prepared: GraphModule,
    batches: Sequence[Any],
    algorithm: Any,
    settings: _Settings,
    judge: Judge,
    result: Optimization,
) -> None:
    """Rewrite a copy, calibrate it again, and keep it if its output is no worse."""
    name, trial = type(algorithm).__name__, copy_graph(prepared)
    changed = algorithm.transform(trial, batches)
    result.notes += [f"{name}: {note}" for note in (algorithm.notes if isinstance(algorithm, Noting) else ())]
    if not changed:
        result.notes.append(f"{name}: nothing to change")
        return
    trial.recompile()
    recalibrate(trial, batches, progress=settings.progress)
    if judge.step(name, judge.figure(trial), lambda: None, result):
        _become(prepared, trial)


def _become(prepared: GraphModule, other: GraphModule) -> None:
    """Give a graph module the graph, parameters and modules of another."""
    for table in ("_parameters", "_buffers", "_modules"):
        mine, theirs = getattr(prepared, table), getattr(other, table)
        mine.clear()
        mine.update(theirs)
    for name in other.__dict__.keys() - prepared.__dict__.keys():
        prepared.__dict__[name] = other.__dict__[name]
    prepared._graph = other.graph
    prepared._graph.owning_module = prepared
    prepared.meta.update(other.meta)
    prepared.recompile()


@dataclass(frozen=True)
class _Kept:
    """An answer that is in the graph, and what takes it out again.

    Args:
        solution: None unless it is for a weight that other ops read, too, and may have to be put back.
    """

    solution: Solution | None
    undo: Callable[[], None]


# solvers ----------------------------------------------------------------------------------------------------------


def _solve(
    prepared: GraphModule,
    batches: Sequence[Any],
    algorithm: Solver,
    number: int,
    settings: _Settings,
    checkpoints: Checkpoints,
    judge: Judge,
    result: Optimization,
) -> None:
    name, kept = type(algorithm).__name__, dict[Span, _Kept]()
    spans = algorithm.spans(prepared, settings.excluded)
    stream = Stream(prepared, batches, budget_bytes=settings.memory_bytes, judged_every=judge.walked_every)
    weights = [_cost(span) for span in spans]
    late = 0
    with closing(stream), bar_of(settings.progress) as bar:
        if isinstance(algorithm, Measuring):
            algorithm.begin(stream, spans, settings.seed + 7919 * number)
        row = bar.add_task(name, total=len(spans))
        for index, task in enumerate(stream.walk(spans)):
            bar.update(row, description=f"{name}: {task.span.name}")
            seconds = settings.left_s * weights[index] / sum(weights[index:])
            if settings.is_late:
                late += 1
            else:
                clock = Clock(seconds, settings.seed + 7919 * number + index)
                answer = _solve_span(task, algorithm, clock, checkpoints.path(number, index), result)
                kept |= {} if answer is None else {task.span: answer}
            bar.advance(row)
    result.spilled_bytes += stream.store.spilled_bytes
    if late:
        result.notes.append(f"{name}: the time was up; {late} of {len(spans)} spans were left as they were")
    shared = [span for span, answer in kept.items() if answer.solution is not None]
    after = _judge_shared(name, prepared, kept, shared, judge, result) if shared else judge.figure(prepared, stream)
    judge.step(name, after, lambda: _take_back(kept.values()), result)


def _judge_shared(
    name: str,
    prepared: GraphModule,
    kept: dict[Span, _Kept],
    shared: Sequence[Span],
    judge: Judge,
    result: Optimization,
) -> Figure:
    """Take back each answer for a weight that other ops read, too, if that is better; returns the best figure.

    The walk saw readers in front of a span (lookups in a table that is also the head) with what stood there before.
    """
    best = judge.figure(prepared)
    for span in reversed(shared):
        kept[span].undo()
        without = judge.figure(prepared)
        solution = kept[span].solution
        if solution is not None and everywhere(best.holds_against(without)):
            kept[span] = _Kept(solution, apply(prepared, solution))
        else:
            best = without
            del kept[span]
            result.notes.append(f"{name}: {span.name}: left as it was, for the sake of other readers of its weight")
    return best


def _take_back(kept: Iterable[_Kept]) -> None:
    for answer in reversed([*kept]):
        answer.undo()


def _solve_span(task: Task, algorithm: Solver, clock: Clock, path: Path | None, result: Optimization) -> _Kept | None:
    """Solve (or read) one span, and keep the answer unless the span's output got worse."""
    start, name = time.perf_counter(), type(algorithm).__name__
    stored = read(path, task) if path is not None and everywhere(path.exists()) else None
    parts = clock.parts = None if path is None else Parts(path)
    solution = algorithm.solve(task, clock) if stored is None else stored
    result.notes += [f"{name}: {note}" for note in solution.notes]
    if not solution:
        return None
    error = algorithm.error if isinstance(algorithm, Judging) else None
    before = task.error() if error is None else error(task)
    undo = apply(task.prepared, solution)
    after = task.error_passed_on() if error is None else error(task)
    kept = after <= before
    if not kept:
        undo()
        task.take_back()
    if path is not None and parts is not None:
        if stored is None:
            write(path, solution)
        parts.clear()
    seconds = time.perf_counter() - start
    result.spans.append(SpanResult(name, task.span.name, before, after, kept, seconds))
    shared = bool(solution.weights) and any(is_shared(task.prepared, site) for site in task.span.sites)
    return _Kept(solution if shared else None, undo) if kept else None


def _cost(span: Span) -> float:
    """Relative time that a span takes: its weights, times their inputs."""
    cost = 1.0
    for site in span.sites:
        value = site.args[1].meta.get("val") if hasattr(site.args[1], "meta") else None  # type: ignore[union-attr]
        shape = getattr(value, "shape", (1, 1))
        cost += math.prod(shape) * math.prod(shape[1:])
    return cost
