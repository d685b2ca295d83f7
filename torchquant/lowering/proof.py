"""Whether an artefact computes what its converted graph does: holds, fails, or cannot be decided, and why.

Two correct implementations of a quantized graph differ where a sum lands on a rounding boundary, and a network may
amplify such a flip. Where the outputs alone decide nothing, the graph is held in depth: the artefact is built once more
with the values between its parts as outputs, and each part is held on the artefact's own inputs to it, so that no flip
travels further than one part. That also says which part is at fault.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from torchquant.calibration import batches as data
from torchquant.errors import InputError, LoweringError, TorchquantWarning
from torchquant.fx import ops, passes
from torchquant.fx.flat import Flat
from torchquant.fx.signature import InputSpec, Signature
from torchquant.measure.verify import Comparison, OutputComparison, compare, compare_tensors

__all__ = ["FLOOR_DB", "MIN_SQNR_DB", "Perturbed", "Verdict", "cases_of", "hold_against"]

MIN_SQNR_DB = 30.0  # at which an output needs no further proof
FLOOR_DB = 20.0  # below which its irreproducibility is no excuse
MARGIN_DB = 6.0  # that an artefact may be worse than the reference reproduces itself
_SAME_DB = 60.0  # between the artefact and the one built to look into
_ZERO = 1e-9  # beside a reference that is zero throughout
_RANDOM = (
    *("rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm", "bernoulli", "multinomial"),
    *("normal", "normal_functional", "uniform", "poisson", "exponential"),
)
_MOST_ELEMENTS = 1 << 18  # of inputs of the largest sizes, or twice those of the example
_STEPS = 3  # calls after which an artefact with state is looked at again
_PARTS = 16  # that a graph is cut into, at most
_MOST_CROSSING = 4  # values from one part to the next
_EQUAL = 0.99  # share of integers
_EXACT = ("relu", "hardtanh", "cat", "max_pool2d", "pad", "embedding")  # ops that round nothing
Run = Callable[..., Any]


@dataclass(frozen=True)
class Verdict:
    """What comparing found.

    Args:
        comparison: the artefact's outputs against the converted graph's.
        outcome: `holds`, or `undecided`: nothing speaks against the artefact, and not enough for it. What fails raises.
        reason: how that was decided, where the outputs alone did not do it.
    """

    comparison: Comparison
    outcome: Literal["holds", "undecided"] = "holds"
    reason: str = ""


def cases_of(reference: Flat, batch: Any, *, largest: bool = False) -> list[tuple[torch.Tensor, ...]]:
    """What to prove an artefact with: tensors and states for the batch, and where the first size varies for one sample.

    With `largest` also for the largest sizes, or for larger ones where those are very large, as a target needs that
    plans its memory beforehand.

    Each is taken with the state as it is at first, and the last one as some calls leave it too. Sizes are left out
    where the graph itself cannot run on them, as where the edges of a graph point beyond its only node.

    Raises:
        InputError: the batch does not fit.
    """
    signature, states = reference.signature, list(reference.initial.values())
    leaves = data.leaves_of(signature, batch, "example_inputs")
    cases: list[tuple[torch.Tensor, ...]] = []
    limit = max(_MOST_ELEMENTS, 2 * sum(v.numel() for v in leaves if isinstance(v, torch.Tensor)))
    further = [data.with_largest_sizes(signature, leaves, limit)] if largest else []
    for given in (leaves, *further, data.with_first_sizes(signature, leaves, 1)):
        if given is not None:
            tensors = [v.contiguous() for v, s in zip(given, signature.inputs, strict=True) if isinstance(s, InputSpec)]
            if not cases or _runs(reference.graph, (*tensors, *states)):
                cases.append((*tensors, *states))
    with torch.no_grad():
        for _ in range(_STEPS if states else 0):
            later = reference.split(reference.graph(*(t.clone() for t in cases[-1])))[1]
            cases.append((*cases[-1][: len(signature.tensors)], *later.values()))
    return cases


def _runs(graph: GraphModule, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the graph takes these sizes: an export may ask for more than bounds (that two divides them, say)."""
    try:
        with torch.no_grad():
            graph(*(t.clone() for t in tensors))
    except Exception:
        return False
    return True


def hold_against(
    reference: GraphModule,
    program: Run,
    batches: Sequence[Any],
    *,
    min_sqnr_db: float | None,
    op_error: float,
    target: str,
    build: Callable[[GraphModule], Run] | None = None,
) -> Verdict:
    """Run the artefact and its reference on the batches, and decide.

    Each floating-point output must be `MIN_SQNR_DB` close by itself, or as close as the reference reproduces itself
    (`MARGIN_DB` less, never below `FLOOR_DB`) when each of its float ops is off by a relative error of `op_error`;
    integers must be equal; NaN and infinity must stand in the same places. What does not meet that is held in depth.

    Args:
        reference: a pure function of tensors (`fx.flat`) or any converted graph.
        min_sqnr_db: a bound that is not relaxed in any way; None for the rules above.
        op_error: relative accuracy of the target's float arithmetic.
        build: makes an artefact of a graph that has further outputs; None where the target cannot.

    Raises:
        LoweringError: the artefact fails to run, or does not hold, or every output is NaN or infinite throughout.
    """
    if min_sqnr_db is not None and (not isinstance(min_sqnr_db, (int, float)) or math.isnan(min_sqnr_db)):
        raise InputError(f"min_sqnr_db is a number of dB or None, not {min_sqnr_db!r}")
    found = _compared(reference, program, batches, target)
    empty = [i for i, o in enumerate(found.outputs) if o.elements and not o.compared]
    if not any(o.compared for o in found.outputs):
        raise LoweringError(
            f"{target}: every output of the converted graph is NaN, infinite or empty on example_inputs, so nothing "
            "can be proven; pass example_inputs on which it is not"
        )
    weak = [i for i, o in enumerate(found.outputs) if not _is_clear(o)]
    if weak and (draws := [n.name for n in reference.graph.nodes if ops.op_name(n) in _RANDOM]):
        raise LoweringError(
            f"{target}: {', '.join(draws[:4])} of the model draws random numbers, so no two runs agree and nothing can "
            "be proven; make them an input"
        )
    verdict = Verdict(found)
    if min_sqnr_db is not None:
        verdict = _strict(found, min_sqnr_db, target)
        weak = [i for i in weak if not found.outputs[i].is_float]
    elif weak:
        weak = [i for i in weak if not _is_explained(found.outputs[i], _reproduced(reference, batches, op_error)[i])]
        verdict = Verdict(found, reason="as close as the converted graph reproduces itself")
    if weak:
        verdict = _Depth(reference, program, batches, op_error, target).verdict(found, weak, build)
    if empty:
        text = f"output {empty[0]} is NaN, infinite or empty on example_inputs"
        verdict = replace(verdict, outcome="undecided", reason=f"{text}; {verdict.reason}".rstrip("; "))
    if verdict.outcome == "undecided":
        warnings.warn(f"{target}: the artefact is not proven: {verdict.reason}", TorchquantWarning, stacklevel=3)
    return verdict


def _compared(reference: GraphModule, program: Run, batches: Sequence[Any], target: str) -> Comparison:
    dtypes: list[list[torch.dtype]] = [[], []]

    def noting(run: Run, of: list[torch.dtype]) -> Run:
        def noted(*tensors: Any) -> Any:
            found = run(*tensors)
            of.extend(v.dtype for v in pytree.tree_leaves(found) if isinstance(v, torch.Tensor))
            return found

        return noted

    try:
        graph = noting(lambda *v: data.call(reference, v), dtypes[0])
        found = compare(graph, noting(program, dtypes[1]), batches)
        if dtypes[0] != dtypes[1]:
            first = next((a, b) for a, b in zip(*dtypes, strict=False) if a != b)
            raise InputError(f"{first[1]} where that returns {first[0]}")
        return found
    except InputError as error:
        raise LoweringError(f"{target}: the artefact does not return what the converted graph does: {error}") from error
    except Exception as error:
        raise LoweringError(f"{target}: the artefact was built but does not run: {error}") from error


def _strict(found: Comparison, min_sqnr_db: float, target: str) -> Verdict:
    for i, output in enumerate(found.outputs):
        if output.is_float and output.compared and not output.sqnr_db >= min_sqnr_db:
            raise LoweringError(f"{_fault(target, i, output)}; you asked for {min_sqnr_db:.1f} dB (min_sqnr_db)")
    return Verdict(found, reason=f"each output at least {min_sqnr_db:g} dB, as asked for")


def _is_clear(output: OutputComparison) -> bool:
    """Whether an output needs no further proof."""
    if not output.is_float:
        return output.compared == 0 or output.agreement == 1.0
    if output.elements == 0 or (output.sqnr_db == -math.inf and output.max_abs <= _ZERO):
        return True
    return output.sqnr_db >= MIN_SQNR_DB and output.lost is None


def _is_explained(output: OutputComparison, reproduced: OutputComparison) -> bool:
    """Whether the reference itself is no more reproducible than that."""
    bound = max(FLOOR_DB, min(MIN_SQNR_DB, reproduced.sqnr_db - MARGIN_DB))
    return output.is_float and output.lost is None and output.sqnr_db >= bound


def _fault(target: str, index: int, output: OutputComparison) -> str:
    where = f"{target}: output {index} of the artefact"
    if not output.is_float:
        return f"{where} equals the converted graph's in {100 * output.agreement:.1f} % of its elements"
    lost = ""
    if output.lost is not None:
        axis, index = output.lost
        lost = ", and " + ("most of it" if axis < 0 else f"what stands at index {index} of axis {axis}") + " is lost"
    largest = f"largest difference {output.max_abs:.3g}"
    return f"{where} is {output.sqnr_db:.1f} dB from the converted graph ({largest}){lost}"


def _reproduced(reference: GraphModule, batches: Sequence[Any], op_error: float) -> list[OutputComparison]:
    """Each output in the worst of three runs of the reference in which each float op is slightly off."""
    runs = [compare(reference, Perturbed(reference, op_error, seed), batches) for seed in range(3)]
    return [min(each, key=lambda o: o.sqnr_db) for each in zip(*(r.outputs for r in runs), strict=True)]


class Perturbed(Interpreter):
    """Runs a graph with the result of each float op off by a relative error of up to `op_error`."""

    def __init__(self, graph: GraphModule, op_error: float, seed: int) -> None:
        super().__init__(graph)
        self.graph_module, self.op_error = graph, op_error
        self._noise = torch.Generator().manual_seed(seed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*Signature.of(self.graph_module).leaves(args, kwargs))

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        kind = ops.kind_of(n)
        exact = kind is None or kind.moves or kind.name in _EXACT
        if exact or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        noise = 2 * torch.rand(value.shape, generator=self._noise).to(value.device) - 1
        return (value * (1 + self.op_error * noise)).to(value.dtype)


# in depth ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Nodes of the reference in order, what they read from before (`reads`), and what is held (`results`)."""

    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]
    results: tuple[Node, ...]

    def __str__(self) -> str:
        weighted = [n for n in self.nodes if (k := ops.kind_of(n)) is not None and k.compute]
        names = [f"{ops.op_name(n)} {n.name} ({ops.module_path(n) or 'root'})" for n in weighted]
        return ", ".join(names[:4]) or ", ".join(n.name for n in self.nodes[:4])


class _Depth:
    """Holds each part of a graph on the artefact's own inputs to it."""

    def __init__(
        self, reference: GraphModule, program: Run, batches: Sequence[Any], op_error: float, target: str
    ) -> None:
        self.reference, self.program, self.batches = reference, program, batches
        self.op_error, self.target = op_error, target

    def verdict(self, found: Comparison, weak: Sequence[int], build: Callable[[GraphModule], Run] | None) -> Verdict:
        fault = _fault(self.target, weak[0], found.outputs[weak[0]])
        parts = _parts(self.reference)
        made = [n for part in parts for n in part.results]
        taps = [n for n in dict.fromkeys(made) if n not in _returned(self.reference)]
        if build is None or not taps:
            raise LoweringError(
                f"{fault}. Its kernels compute something else: report this, or exclude the sites at fault."
            )
        try:
            deep = build(_with_outputs(self.reference, taps))
        except LoweringError as error:
            raise LoweringError(f"{fault}, and it cannot be built such that one can look into it: {error}") from error
        runs = [self._run(deep, taps, batch) for batch in self.batches]
        for part in parts:
            self._hold(part, runs, fault)
        reason = f"held in depth, part by part ({len(parts)}), since {fault.removeprefix(f'{self.target}: ')}"
        pairs = [(self._outputs(self.program, b), r.outputs) for b, r in zip(self.batches, runs, strict=True)]
        same = compare_tensors(pairs).outputs
        if all(o.sqnr_db >= _SAME_DB if o.is_float else o.agreement > _EQUAL for o in same):
            return Verdict(found, reason=reason)
        reproduced = _reproduced(self.reference, self.batches, self.op_error)
        for one, bound in zip(same, reproduced, strict=True):
            if one.is_float and one.sqnr_db < min(_SAME_DB, bound.sqnr_db - MARGIN_DB):
                raise LoweringError(
                    f"{fault}, though built such that one can look into it each part is right: the compiler makes "
                    "something else of the whole. Report this."
                )
        text = "; but the build that was looked into and the artefact differ, as rounding is amplified"
        return Verdict(found, "undecided", reason + text)

    def _outputs(self, run: Run, batch: Any) -> list[torch.Tensor]:
        return [_comparable(v) for v in _as_list(data.call(run, tuple(t.clone() for t in batch)))]

    def _run(self, deep: Run, taps: Sequence[Node], batch: Any) -> _DeepRun:
        """What the artefact computes, and of the reference what does not depend on data: sizes, masks, positions."""
        values = self._outputs(deep, batch)
        end = len(values) - len(taps)
        fixed = _Fixed(self.reference)
        with torch.no_grad():
            fixed.run(*(t.clone() for t in batch))
        given = dict(zip(_inputs(self.reference), batch, strict=True))
        known = {
            **dict(zip(_returned(self.reference), values, strict=False)),
            **dict(zip(taps, values[end:], strict=True)),
        }
        return _DeepRun({**fixed.found, **given}, known, values[:end])

    def _hold(self, part: _Part, runs: Sequence[_DeepRun], fault: str) -> None:
        """Raise LoweringError unless the part's results follow from the artefact's own inputs to it."""
        wanted = [_results(self.reference, part, run, 0.0) for run in runs]
        found = compare_tensors((w, [r.known[n] for n in part.results]) for w, r in zip(wanted, runs, strict=True))
        if all(map(_is_clear, found.outputs)):
            return
        trials = [
            compare_tensors(
                (w, _results(self.reference, part, r, self.op_error, s)) for w, r in zip(wanted, runs, strict=True)
            )
            for s in range(3)
        ]
        for i, output in enumerate(found.outputs):
            reproduced = min((t.outputs[i] for t in trials), key=lambda o: o.sqnr_db)
            near = not output.is_float and output.agreement > _EQUAL  # of equal numbers either may come first
            if not (_is_clear(output) or near or _is_explained(output, reproduced)):
                raise LoweringError(
                    f"{fault}. In depth: {part}: {output.sqnr_db:.1f} dB on the artefact's own inputs to it. Its "
                    "kernels compute something else there: report this, or exclude these sites."
                )


@dataclass(frozen=True)
class _DeepRun:
    """One run of the artefact with taps: what is given, what it computed (node -> value), and its outputs."""

    given: dict[Node, Any]
    known: dict[Node, torch.Tensor]
    outputs: list[torch.Tensor]


class _Fixed(Interpreter):
    """Runs a graph and keeps the values that do not depend on data."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        data_: set[Node] = set()
        sources = ops.data_nodes(graph)
        for node in graph.graph.nodes:
            if node in sources or any(n in data_ for n in node.all_input_nodes):
                data_.add(node)
        self._data, self.found = data_, dict[Node, Any]()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n not in self._data or not isinstance(value, (torch.Tensor, list, tuple)):
            self.found[n] = value
        return value


def _results(graph: GraphModule, part: _Part, run: _DeepRun, op_error: float, seed: int = 0) -> list[torch.Tensor]:
    """The part's results as the reference makes them of what the artefact computed before it."""
    runner = Perturbed(graph, op_error, seed)
    env = dict(run.given)
    env |= {n: run.known[n] for n in part.reads if n in run.known}
    runner.env = env
    with torch.no_grad():
        for node in part.nodes:
            if node not in env:
                env[node] = runner.run_node(node) if op_error else Interpreter.run_node(runner, node)
    return [_comparable(env[n]) for n in part.results]


def _comparable(value: torch.Tensor) -> torch.Tensor:
    value = torch.view_as_real(value) if value.is_complex() else value
    return value.float() if value.is_floating_point() else value


def _as_list(values: Any) -> list[torch.Tensor]:
    return list(values) if isinstance(values, (tuple, list)) else [values]


def _inputs(graph: GraphModule) -> list[Node]:
    return [n for n in graph.graph.nodes if n.op == "placeholder"]


def _returned(graph: GraphModule) -> list[Node]:
    outputs = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def _with_outputs(graph: GraphModule, taps: Sequence[Node]) -> GraphModule:
    """A copy of the graph that returns the values of some nodes too."""
    twin = passes.copy_graph(graph)
    twins = dict(zip(graph.graph.nodes, twin.graph.nodes, strict=True))
    output = next(n for n in twin.graph.nodes if n.op == "output")
    with twin.graph.inserting_before(output):
        # a dequantize op of its own, since delegates take one that has one reader
        seen = [twin.graph.node_copy(twins[n]) if ops.is_dequantize(n) else twins[n] for n in taps]
    output.args = ((*_returned(twin), *seen),)
    twin.recompile()
    return twin


def _parts(graph: GraphModule) -> list[_Part]:
    """The graph cut where few values pass and none of them is about to be quantized, into parts of like many products.

    Integers that the model returns are parts of their own, so that they are made of the artefact's own floats.
    """
    data_ = ops.derived_nodes(graph)
    nodes = [n for n in graph.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    integers = [n for n in _returned(graph) if isinstance(n, Node) and "val" in n.meta and not ops.is_float(n)]
    decisions = [_decision(n) for n in integers if n in nodes]
    decided = {n for part in decisions for n in part.nodes}
    kept = {n for part in decisions for n in part.reads} | set(_returned(graph)) - decided
    alone: set[Node] = set()  # what nothing but these integers reads, as something may the values of a sort
    for node in reversed(nodes):
        if node in decided and all(u in alone or u.op == "output" for u in node.users):
            alone.add(node)
    nodes = [n for n in nodes if n not in alone]
    place = {n: i for i, n in enumerate(nodes)}
    last = {n: max((place.get(u, -1) for u in n.users), default=-1) for n in nodes}
    least = max(1, math.ceil(sum(map(_is_product, nodes)) / _PARTS))
    found: list[_Part] = []
    start, count, reads = 0, 0, ()
    for i, node in enumerate(nodes):
        count += _is_product(node)
        if count < least and i + 1 < len(nodes):
            continue
        crossing = tuple(n for n in nodes[: i + 1] if last[n] > i and n in data_)
        if i + 1 == len(nodes) or (crossing and _may_cut(crossing, place, i)):
            inside = tuple(nodes[start : i + 1])
            found.append(_Part(inside, reads, tuple(dict.fromkeys((*crossing, *(n for n in inside if n in kept))))))
            start, count, reads = i + 1, 0, crossing
    return [part for part in (*found, *decisions) if part.results]


def _decision(node: Node) -> _Part:
    """How integers are made of the floats nearest to them."""
    floats, between = ops.float_sources(node)
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    return _Part(tuple(sorted(between, key=order.__getitem__)), tuple(floats), (node,))


def _is_product(node: Node) -> bool:
    kind = ops.kind_of(node)
    return kind is not None and kind.compute


def _may_cut(crossing: Sequence[Node], place: dict[Node, int], at: int) -> bool:
    """Whether these values may be looked at without changing how they are computed."""
    if len(crossing) > _MOST_CROSSING:
        return False
    for node in crossing:
        later = [u for u in node.users if place.get(u, -1) > at]
        if ops.is_quantize(node) or any(
            ops.is_quantize(v) and not ops.has_own_scale(v) for u in later for v in (u, *u.users)
        ):
            return False  # a kernel may end in an activation and the quantize op behind it
        if ops.has_own_scale(node):
            return False  # a kernel begins with what finds the scale and quantizes
        if not (ops.is_dequantize(node) or ops.is_float(node)):
            return False
    return True
