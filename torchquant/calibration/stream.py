"""The stream: all calibration batches through a prepared graph in one walk, in float and as quantized.

At each span the solver gets the inputs from the quantized prefix, the inputs and outputs of the float function, and
leaves its answer in the graph; the walk goes on with it. What no later node reads is freed; what
exceeds the byte budget lies on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from torchquant.calibration import batches as data
from torchquant.calibration.evaluator import Env, Evaluator, Flow, Known, mutates
from torchquant.calibration.metric import (
    _LARGEST_METRIC,
    OutputMetric,
    distance,
    outputs_of,
    random_gradients,
)
from torchquant.calibration.parallel import total
from torchquant.calibration.store import Store
from torchquant.errors import InputError
from torchquant.files.shelf import is_open
from torchquant.fx import ops
from torchquant.fx.blocks import Span, data_order, keeps_state
from torchquant.fx.functional import functionalize
from torchquant.fx.signature import Signature, placeholders
from torchquant.fx.states import state_nodes, states_of

__all__ = ["Stream", "Task", "given_to", "outputs_of"]

_PIECES = 4  # of the byte budget: what an evaluator decodes of weights before the values are handed on


class Task:
    """One span to be solved, with the data that reaches it.

    Args:
        prepared, span: where.
        count: batches.
    """

    def __init__(
        self, stream: Stream, span: Span, reads: Sequence[Node], results: Sequence[Node], passed_on: Sequence[Node]
    ) -> None:
        self._stream, self.span, self._reads, self.results = stream, span, reads, tuple(results)
        self.prepared, self.count = stream.prepared, stream.count
        self._passed_on, self.is_passed_on = passed_on, False  # what the rest of the walk reads; whether it is there

    def inputs(self, batch: int, flow: Flow) -> Env:
        """The values that the span reads from outside, for one batch."""
        return {node: self._stream.value(flow, node, batch) for node in self._reads}

    def targets(self, batch: int) -> list[torch.Tensor]:
        """The float values of `results`: what is made in the span and read behind it."""
        return [self._stream.value("float", node, batch) for node in self.results]

    def outputs(self, batch: int, evaluator: Evaluator, flow: Flow = "quantized") -> list[torch.Tensor]:
        """The span's results for one batch with its inputs from a flow."""
        env = evaluator.run(self.span.nodes, self.inputs(batch, flow))
        return [env[node] for node in self.results]

    def sensitivity(self, batch: int) -> list[torch.Tensor | None]:
        """For each result, how much the network's output feels an error in each element; see `Stream.sensitivities`.

        Mean square of the derivatives of the output, by random projections: the diagonal of the Gauss-Newton
        matrix. None where it was not measured.
        """
        keys = [("sensitivity", node, batch) for node in self.results]
        return [self._stream.store.get(k) if k in self._stream.store else None for k in keys]

    def place_weights(self, site: Node, batch: int) -> torch.Tensor | None:
        """How much the network's output feels an error of a linear at each place, (samples, ...); mean 1.

        None where it was not measured, see `Stream.sensitivities`.
        """
        mean = self._stream.place_means.get(site, 0.0)
        key = ("places", site, batch)
        return self._stream.store.get(key) / mean if mean > 0 and key in self._stream.store else None

    def output_metric(self, site: Node) -> torch.Tensor | None:
        """(out, out): how the network's output feels errors in the outputs of a site together; mean diagonal 1.

        None where it was not measured, see `Stream.sensitivities`.
        """
        return self._stream.output_metrics.get(site)

    def shared(self, node: Node, compute: Callable[[], Any]) -> Any:
        """Tensors that depend on the values of a node alone: computed for the first of the spans that read it.

        They are kept, beside the values, until the walk frees those of the node; nobody may change them.
        """
        key = ("shared", node, 0)
        if key not in self._stream.store:
            self._stream.store.put(key, compute())
        return self._stream.store.get(key)

    def error(self, evaluator: Evaluator | None = None) -> float:
        """Squared error of the results, summed over all batches: as the graph stands now, or with a trial."""
        evaluator = evaluator or self.evaluator()
        return total(sum(self._batch_error(batch, evaluator) for batch in range(self.count)))[0]

    def error_passed_on(self) -> float:
        """`error` as the graph stands now, whose outputs the rest of the walk takes: see `take_back`."""
        evaluator = self.evaluator()
        summed = total(sum(self._batch_error(batch, evaluator, keep=True) for batch in range(self.count)))[0]
        self.is_passed_on = True
        return summed

    def take_back(self) -> None:
        """Forget what `error_passed_on` kept: the graph is no longer as it was then."""
        self.is_passed_on = False
        for node in self._passed_on:
            for batch in range(self.count):
                self._stream.store.drop(("quantized", node, batch))

    def _batch_error(self, batch: int, evaluator: Evaluator, keep: bool = False) -> float:
        with torch.no_grad():
            env = evaluator.run(self.span.nodes, self.inputs(batch, "quantized"))
            pairs = zip(self.targets(batch), (env[node] for node in self.results), strict=True)
            error = sum(distance(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and a.is_floating_point())
        for node in self._passed_on if keep else ():
            self._stream.store.put(("quantized", node, batch), env.pop(node))
        return error

    def give_back(self) -> None:
        """Return freed memory to the system, where there is much of it: what a solver does between its stages."""
        self._stream.store.give_back()

    def evaluator(self, flow: Flow = "quantized", **trial: Any) -> Evaluator:
        """An Evaluator of the graph, with a solver's trial values."""
        return self._stream.evaluator(flow, **trial)


class Stream:
    """All batches through a prepared, calibrated graph.

    Args:
        prepared: the graph; solvers change its observers and biases while the stream walks.
        batches: the calibration batches (of this process).
        budget_bytes: for what is kept between nodes; the rest lies on disk.
        judged_every: of how many batches one is run to the end, to compare the outputs; None: no batch is.
    """

    def __init__(
        self,
        prepared: GraphModule,
        batches: Sequence[Any],
        *,
        budget_bytes: int | None = None,
        judged_every: int | None = 1,
    ) -> None:
        functionalize(prepared)
        self.prepared, self._judged_every = prepared, judged_every
        self.store = Store(budget_bytes)
        self._most_constants = math.inf if budget_bytes is None else budget_bytes // _PIECES
        inputs = [*placeholders(prepared), *state_nodes(prepared)]
        self._given = [_values(prepared, g) for g in given_to(prepared, batches)]
        self.count = len(self._given)
        self._order = data_order(prepared)
        self._place = {node: i for i, node in enumerate(self._order)}
        self._inputs = set(inputs)
        self._last = {n: max((self._place.get(u, len(self._order)) for u in n.users), default=-1) for n in self._order}
        self._measured = [n for n in ops.measured_nodes(prepared) if n in self._last]
        self._last |= {n: len(self._order) for n in self._measured}  # kept to the end
        self._alive: list[Node] = []
        self._known: Known = {}
        self.output_metrics: dict[Node, torch.Tensor] = {}
        self.place_means: dict[Node, float] = {}  # of what is stored for `Task.place_weights`
        self.signal = self.noise = 0.0  # energies of the float output and of its error, after a walk

    def value(self, flow: Flow, node: Node, batch: int) -> Any:
        """A live value."""
        inputs = self._given[batch]
        return inputs[node] if node in inputs else self.store.get((flow, node, batch))

    def evaluator(self, flow: Flow, **trial: Any) -> Evaluator:
        """An Evaluator that shares what is known of the observers."""
        return Evaluator(self.prepared, flow, known=self._known, **trial)

    def walk(self, spans: Sequence[Span]) -> Iterator[Task]:
        """Yield a task for each span, in graph order; what the caller leaves in the graph holds for the rest of it.

        After the walk, `signal` and `noise` say how the quantized output follows the float one.
        """
        start = 0
        try:
            for span in spans:
                first, end = self._place[span.nodes[0]], self._place[span.nodes[-1]] + 1
                self._advance(start, first)
                self._run(first, end, "float")
                task = Task(
                    self, span, self._reads(first, end), self._outputs_of(first, end), self._results(first, end)
                )
                yield task
                if not task.is_passed_on:
                    self._run(first, end, "quantized")
                self._free(first, end)
                start = end
            self._finish(start)
        finally:
            self.close()

    def close(self) -> None:
        """Forget all values, those on disk too: what a walk does at its end."""
        self.store.close()
        self._alive.clear()

    def sensitivities(
        self,
        spans: Sequence[Span],
        seed: int,
        draws: int = 1,
        *,
        elements: bool = True,
        metrics: bool = True,
        places: bool = False,
    ) -> None:
        """Measure with `metrics` for `Task.output_metric`, over all processes; with `elements` for `Task.sensitivity`.

        With `places` for `Task.place_weights`.

        One pass forward and `draws` backward through the float graph per batch, whose activations are all kept.

        Raises:
            InputError: the graph is one that is larger than memory.
        """
        _refuse_from_disk()
        generator = torch.Generator().manual_seed(seed)
        results = [self._outputs_of(self._place[s.nodes[0]], self._place[s.nodes[-1]] + 1) for s in spans if elements]
        borders = {span.nodes[-1]: span_results for span, span_results in zip(spans, results, strict=elements)}
        sites = {s: None for span in spans if metrics for s in span.sites if outputs_of(s) <= _LARGEST_METRIC}
        output_metrics = {site: OutputMetric(site) for site in sites}
        linears = {s: None for span in spans if places for s in span.sites if ops.op_name(s) == "linear"}
        for batch in range(self.count):
            measured, leaves = self.float_with_gradients(batch, borders, sites | linears)
            squares: dict[Node, torch.Tensor] = {}
            felt: dict[Node, torch.Tensor] = {}
            for _ in range(draws):
                for node, gradient in random_gradients(leaves, measured, generator):
                    if node in output_metrics:
                        output_metrics[node].add(gradient)
                    if any(node in span_results for span_results in results):
                        squares[node] = squares.get(node, 0) + gradient.square() / draws
                    if node in linears:
                        felt[node] = felt.get(node, 0) + gradient.square().sum(-1)
            for node, square in squares.items():
                self.store.put(("sensitivity", node, batch), square)
            for node, square in felt.items():
                self.store.put(("places", node, batch), square)
        self.place_means = {node: self._mean_of("places", node) for node in linears}
        if metrics:
            samples = total(sum(_first_size(g) for g in self._given) * draws)[0]
            self.output_metrics = {site: metric.shrunk(samples) for site, metric in output_metrics.items()}

    def _mean_of(self, kind: str, node: Node) -> float:
        """Mean of what is stored of a node, over all batches of all processes."""
        values = [self.store.get(k) for k in ((kind, node, b) for b in range(self.count)) if k in self.store]
        summed, count = total(sum(float(v.sum(dtype=torch.float64)) for v in values), sum(v.numel() for v in values))
        return summed / max(count, 1.0)

    def float_with_gradients(
        self,
        batch: int,
        borders: Mapping[Node, Sequence[Node]],
        sites: Mapping[Node, None],
        look: Callable[[Node, Env], None] = lambda node, env: None,
    ) -> tuple[dict[Node, torch.Tensor], list[Any]]:
        """The float values of one batch whose gradients are needed, and the network's outputs.

        `look` sees each site, with all values so far.
        """
        env: Env = dict(self._given[batch])
        measured: dict[Node, torch.Tensor] = {}
        evaluator = self.evaluator("float")
        with torch.enable_grad():
            for node in self._order:
                evaluator.run([node], env)
                for result in (*borders.get(node, ()), *([node] if node in sites else [])):
                    if isinstance(env[result], torch.Tensor) and env[result].is_floating_point():
                        if not env[result].requires_grad:
                            env[result] = env[result].detach().requires_grad_()
                        measured[result] = env[result]
                if node in sites:
                    look(node, env)
            return measured, pytree.tree_leaves([env[n] for n in self._measured])

    def _advance(self, start: int, end: int) -> None:
        """Run order[start:end] on all batches in both flows; keep what is read later, drop what is not."""
        for first, last in self._pieces(start, end):
            self._run(first, last, "float")
            self._run(first, last, "quantized")
            self._free(first, last)

    def _pieces(self, start: int, end: int) -> list[tuple[int, int]]:
        """order[start:end] in pieces that read a fraction of the byte budget of weights, decoded, or a single one."""
        pieces, first, read = [], start, 0
        for at in range(start, end):
            more = self._constant_bytes(self._order[at])
            if read and read + more > self._most_constants:
                pieces.append((first, at))
                first, read = at, 0
            read += more
        return [*pieces, (first, end)] if first < end else pieces

    def _constant_bytes(self, node: Node) -> int:
        """Of the constants that a node reads."""
        reads = [n for n in node.all_input_nodes if n not in self._place and n not in self._inputs]
        return sum(_bytes_of_constant(n) for n in reads)

    def _run(self, start: int, end: int, flow: Flow) -> None:
        nodes, reads, results = self._order[start:end], self._reads(start, end), self._results(start, end)
        evaluator = self.evaluator(flow)
        for batch in range(self.count):
            env = self._values(nodes, reads, evaluator, flow, batch)
            for node in results:
                self.store.put((flow, node, batch), env.pop(node))

    def _values(
        self, nodes: Sequence[Node], reads: Sequence[Node], evaluator: Evaluator, flow: Flow, batch: int
    ) -> Env:
        """What the nodes make of one batch, as far as others behind them read it."""
        env = {n: self.value(flow, n, batch) for n in reads}
        with torch.no_grad():
            for node in nodes:
                evaluator.run([node], env)
                for read in node.all_input_nodes:
                    if self._last.get(read) == self._place[node]:
                        env.pop(read, None)
        return env

    def _free(self, start: int, end: int) -> None:
        self._alive += self._results(start, end)
        for node in [n for n in self._alive if self._last[n] < end]:
            self._alive.remove(node)
            self.store.drop(("shared", node, 0))
            for batch in range(self.count):
                self.store.drop(("float", node, batch))
                self.store.drop(("quantized", node, batch))
                self.store.drop(("sensitivity", node, batch))
                self.store.drop(("places", node, batch))

    def _reads(self, start: int, end: int) -> list[Node]:
        """What order[start:end] reads from outside, constants left out."""
        operands = dict.fromkeys(n for node in self._order[start:end] for n in node.all_input_nodes)
        return [n for n in operands if n in self._inputs or self._place.get(n, start) < start]

    def _results(self, start: int, end: int) -> list[Node]:
        return [n for n in self._order[start:end] if self._last[n] >= end]

    def _outputs_of(self, start: int, end: int) -> list[Node]:
        """The results by which a span is judged: without what only becomes state (keys and values), if there are more.

        What the span's own attention makes of these is among the others.
        """
        results = self._results(start, end)
        outputs = [n for n in results if n in self._measured or not all(map(keeps_state, self._later(n, end)))]
        return outputs or results

    def _later(self, node: Node, end: int) -> list[Node]:
        return [u for u in node.users if self._place.get(u, len(self._order)) >= end]

    def _finish(self, start: int) -> None:
        """Run the rest of the order on the judged batches in both flows, and compare the outputs; they are not kept."""
        if self._judged_every is None:
            return
        *before, (start, _) = self._pieces(start, len(self._order)) or [(start, start)]
        if before:
            self._advance(before[0][0], start)
        signal = noise = 0.0
        flows: tuple[Flow, ...] = ("float", "quantized")
        evaluators = {flow: self.evaluator(flow) for flow in flows}
        for batch in range(0, self.count, self._judged_every):
            wanted, got = (self._outputs(start, evaluators[flow], flow, batch) for flow in flows)
            for a, b in zip(wanted, got, strict=True):
                signal += distance(a, torch.zeros_like(a))
                noise += distance(a, b)
        self.signal, self.noise = total(signal, noise)

    def _outputs(self, start: int, evaluator: Evaluator, flow: Flow, batch: int) -> list[torch.Tensor]:
        env = self._values(self._order[start:], self._reads(start, len(self._order)), evaluator, flow, batch)
        values = [env[n] if n in env else self.value(flow, n, batch) for n in self._measured]
        return [v for v in pytree.tree_leaves(values) if isinstance(v, torch.Tensor) and v.is_floating_point()]


def _refuse_from_disk() -> None:
    if is_open():
        raise InputError(
            "derivatives through the whole network take all its weights and activations at once, and this network is "
            "quantized from disk: leave out what asks for them (sensitive, weigh_places, BRECQ, QDrop), or quantize in "
            "memory"
        )


def _bytes_of_constant(node: Node) -> int:
    """Bytes of a constant as an op reads it, behind observers; what it is computed from counts where that is known."""
    shape = ops.shape_of(node)
    if shape is not None:
        return math.prod(map(int, shape)) * int(node.meta["val"].dtype.itemsize)
    return max((_bytes_of_constant(n) for n in node.all_input_nodes), default=0)


def _first_size(inputs: Mapping[Node, Any]) -> int:
    return next((len(v) for v in inputs.values() if isinstance(v, torch.Tensor) and v.ndim), 1)


def given_to(prepared: GraphModule, batches: Sequence[Any]) -> list[data.Given]:
    """The batches as the graph takes them, steps one by one with the state that the float function has there."""
    signature, inputs = Signature.of(prepared), []
    for batch in batches:
        if not isinstance(batch, data.Steps):
            inputs.append(data.given(signature, batch))
            continue
        state: dict[str, torch.Tensor] = {}
        for step in batch.batches:
            inputs.append(data.Given(data.given(signature, step).leaves, state))
            state = _state_after(prepared, inputs[-1])
    return inputs


def _state_after(prepared: GraphModule, inputs: data.Given) -> dict[str, torch.Tensor]:
    """What the float function leaves in the buffers that the graph writes."""
    with torch.no_grad():
        env = Evaluator(prepared, "float").run(data_order(prepared), dict(_values(prepared, inputs)))
    kept = [n for n in env if mutates(n) and n.args[0].op == "get_attr"]  # type: ignore[union-attr]
    return {str(n.args[0].target): env[n].clone() for n in kept}  # type: ignore[union-attr]


def _values(prepared: GraphModule, inputs: data.Given) -> Env:
    """Input node -> value of one batch; a buffer that the graph writes is an input too."""
    present = {**states_of(prepared), **inputs.state}
    states = {n: present[str(n.target)] for n in state_nodes(prepared)}
    return {**dict(zip(placeholders(prepared), inputs.leaves, strict=True)), **states}
