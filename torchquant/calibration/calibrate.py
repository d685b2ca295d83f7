"""One pass over the calibration data, for one prepared graph or for several at once."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from rich.progress import track
from torch.fx import GraphModule, Interpreter, Node
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

from torchquant.calibration import batches as data
from torchquant.calibration import merging, seen
from torchquant.calibration.parallel import is_parallel, together
from torchquant.errors import CalibrationError, InputError, TorchquantWarning
from torchquant.fx import ops, passes
from torchquant.fx.reading import is_observer, is_prepared, observers
from torchquant.fx.signature import Signature
from torchquant.fx.sites import read_sites, refuse_lost_writes
from torchquant.fx.states import restored, set_states, states_of
from torchquant.observers.minmax import check_finite, reset
from torchquant.surroundings import own_modes

__all__ = ["Recorder", "calibrate", "recalibrate", "record", "refuse_uncalibrated"]


def calibrate(
    prepared: GraphModule | Sequence[GraphModule],
    batches: Iterable[Any],
    *,
    progress: bool = True,
) -> None:
    """Run the observers of one or several prepared graphs over the data, read once.

    A graph whose observers all watch weights sees the first batch alone: the others would tell it nothing.

    Under `torchrun` each process takes its own batches (none, if there are fewer batches than processes), and all end
    with what the observers saw in all processes.

    Args:
        prepared: what `prepare_pt2e` returned (any Quantizer), or several, each for its own target.
        batches: an iterable of batches; each a tensor, a tuple of arguments or a dict of keyword arguments. Each starts
            from the state that the model was exported with; batches that follow one another are one `Steps`.
        progress: show a progress bar on stderr.

    Raises:
        InputError: a batch does not fit the model's inputs.
        CalibrationError: no batch, NaN or infinity at a site, a site that never saw data, a graph without
            observers, or in several processes an observer whose states cannot be put together.
        ParallelError: another process failed.
    """
    models = [prepared] if isinstance(prepared, GraphModule) else list(prepared)
    with together("calibrate"), own_modes():
        _calibrate(models, batches, progress)


def _calibrate(models: Sequence[GraphModule], batches: Iterable[Any], progress: bool) -> None:
    for model in models:
        _check_prepared(model)
    if is_parallel():
        merging.begin(models)
    length = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    checked = data.checked(models[0], batches)
    shown = track(checked, "calibrating", total=length, disable=not progress, transient=True)
    reached: set[int] = set()
    hooks = [h for model in models for h in _watch(model, reached)]
    try:
        with torch.no_grad(), ExitStack() as stack:
            initial = [stack.enter_context(restored(model)) for model in models]
            for model in models:
                stack.enter_context(_watching_floats(model))
            count, watched = 0, [not _sees_weights_alone(model) for model in models]
            for count, batch in enumerate(shown, start=1):
                for model, state, is_watched in zip(models, initial, watched, strict=True):
                    if count == 1 or is_watched:
                        _observe(model, batch, state)
                        seen.remember(model, batch)
            if not count:  # of several processes, one without a batch
                for model in models:
                    _observe_constants(model)
    finally:
        for hook in hooks:
            hook.remove()
    if is_parallel():
        merging.merge(models, reached)
    for model in models:
        _check_reached(model, reached)


@contextmanager
def _watching_floats(model: GraphModule) -> Iterator[None]:
    """Let fake quantizers watch the float function instead of rounding, in evaluation whatever the graph's mode."""
    modes = {module: module.training for module in model.modules()}
    rounding = [m for m in modes if isinstance(m, FakeQuantizeBase) and bool(m.fake_quant_enabled[0])]
    blind = [m for m in modes if isinstance(m, FakeQuantizeBase) and not bool(m.observer_enabled[0])]
    try:
        for module in rounding:
            module.disable_fake_quant()
        for module in blind:
            module.enable_observer()
        for module in modes if rounding else ():
            module.training = False
        yield
    finally:
        for module in rounding:
            module.enable_fake_quant()
        for module in blind:
            module.disable_observer()
        for module, training in modes.items():
            module.training = training


def _sees_weights_alone(model: GraphModule) -> bool:
    """Whether no observer would see anything else in another batch."""
    return all(ops.is_constant(node.args[0]) for node, _ in observers(model))  # type: ignore[arg-type]


def _observe(model: GraphModule, batch: data.Given | data.Steps, initial: Mapping[str, torch.Tensor]) -> None:
    """Run one batch from the initial state, or batches that follow one another, on copies of what the graph writes."""
    for i, step in enumerate(batch.batches if isinstance(batch, data.Steps) else [batch]):
        if i == 0 or step.state:
            set_states(model, {**initial, **step.state})
        try:
            data.call(model, data.own_inputs(model, step))
        except (IndexError, RuntimeError) as error:  # of an op, which knows no batches
            where = f"step {i} of a batch of steps" if isinstance(batch, data.Steps) else "a batch"
            text = f"the model fails on {where}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise CalibrationError(f"{text}. Leave such data out, or make the model take it.") from error


def _observe_constants(model: GraphModule) -> None:
    """Show weights to their observers, as each batch does."""
    for node, observer in observers(model):
        if ops.is_constant(node.args[0]):  # type: ignore[arg-type]
            observer(ops.constant_value(model, node.args[0]))  # type: ignore[arg-type]


def refuse_uncalibrated(prepared: GraphModule) -> None:
    """Raise CalibrationError if a graph is not prepared, or an observer of it has not seen data."""
    if not isinstance(prepared, GraphModule):
        raise InputError(f"that takes the GraphModule from prepare_pt2e, not a {type(prepared).__name__}")
    if not is_prepared(prepared):
        raise CalibrationError("convert takes a prepared graph; this one has no observers")
    refuse_lost_writes(prepared)
    for node, observer in passes.static_observers(prepared):
        low = getattr(observer, "min_val", None)
        if isinstance(low, torch.Tensor) and (low.numel() == 0 or bool(torch.isinf(low).any())):
            site = getattr(observer, "site", f"{node.args[0]}, observed by {node.target},")
            raise CalibrationError(f"{site} never saw data: run torchquant.calibrate(prepared, batches) before convert")


def recalibrate(prepared: GraphModule, batches: Iterable[Any], *, progress: bool = True) -> None:
    """Forget what the observers saw, weights' included, and calibrate again: after weights changed.

    Raises:
        CalibrationError: as `calibrate`, or an observer cannot be reset.
    """
    for node, observer in observers(prepared):
        reset(observer, str(getattr(observer, "site", node.args[0])))
    seen.forget(prepared)
    calibrate(prepared, batches, progress=progress)


def record(prepared: GraphModule, statistics: Mapping[Node, Statistic], batches: Iterable[Any]) -> None:
    """Let statistics see the first inputs of chosen nodes, in the float function, over all batches of all processes."""
    recorder = Recorder(prepared, statistics, observe=False)
    with torch.no_grad():
        for batch in batches:
            recorder(batch)
    for statistic in {id(s): s for s in statistics.values()}.values():
        statistic.share()


class Statistic(Protocol):
    """What `record` fills."""

    def update(self, value: torch.Tensor) -> None:
        """Add one batch."""

    def share(self) -> None:
        """Become the statistic over the batches of all processes (see `torchquant.calibration.parallel`)."""


class Recorder(Interpreter):
    """Runs a prepared graph and hands the first input of chosen nodes to their statistics.

    Args:
        prepared: the graph.
        statistics: node -> an object with `update(tensor)`.
        observe: let the observers see the data too; if not, this is the float function and nothing else.
    """

    def __init__(self, prepared: GraphModule, statistics: Mapping[Node, Any], *, observe: bool) -> None:
        super().__init__(prepared)
        self._prepared, self._statistics, self._observe = prepared, statistics, observe

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one batch, or the arguments of one; neither they nor the graph's state are changed."""
        whole = len(args) == 1 and not kwargs and isinstance(args[0], (data.Given, tuple, list, dict))
        batch = args[0] if whole else (kwargs if kwargs and not args else (*args, *kwargs.values()))
        inputs = data.own_inputs(self._prepared, data.given(Signature.of(self._prepared), batch))
        self._states = {n: inputs.state.get(n, v).clone() for n, v in states_of(self._prepared).items()}
        return self.run(*inputs.leaves)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._states[target] if target in self._states else super().get_attr(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        skip = not self._observe and is_observer(self.fetch_attr(target))
        return args[0] if skip else super().call_module(target, args, kwargs)

    def run_node(self, n: Node) -> Any:
        if n in self._statistics:
            self._statistics[n].update(self.env[n.args[0]])  # type: ignore[index]
        return super().run_node(n)


def _check_prepared(model: GraphModule) -> None:
    if not isinstance(model, GraphModule):
        raise CalibrationError(f"calibrate takes the GraphModule from prepare_pt2e, not {type(model).__name__}")
    if next(observers(model), None) is None:
        raise CalibrationError(
            "the graph has no observers: the Quantizer annotated nothing, or this is not what prepare_pt2e "
            f"returned. {_why_float(model)}torchquant.report(graph) lists every op and why it stays float."
        )
    refuse_lost_writes(model)
    missed = [s for s in read_sites(model) if s.status == "missed"]
    if missed:
        names = ", ".join(f"{s.op} {s.node}" + (f" ({s.module})" if s.module else "") for s in missed[:8])
        more = f" and {len(missed) - 8} more" if len(missed) > 8 else ""
        warnings.warn(
            f"the Quantizer left {len(missed)} compute ops float without saying so: {names}{more}",
            TorchquantWarning,
            stacklevel=3,
        )


def _why_float(model: GraphModule) -> str:
    """Why the ops that compute are left float, the most frequent reasons first."""
    counts = Counter((s.op, s.reason) for s in read_sites(model) if s.compute and s.reason)
    texts = [f"{n} {op}: {reason}" for (op, reason), n in counts.most_common(3)]
    return f"Left float are {'; '.join(texts)}. " if texts else ""


def _watch(model: GraphModule, reached: set[int]) -> list[Any]:
    """Hooks that note which observers saw data and refuse NaN and infinity, for observers of any make."""
    hooks = []
    sites: dict[torch.nn.Module, str] = {}
    for node, module in observers(model):
        sites.setdefault(module, f"{node.args[0]}, observed by {node.target}")
    for module, site in sites.items():

        def see(_module: torch.nn.Module, args: tuple[Any, ...], site: str = site, key: int = id(module)) -> None:
            _check_float(args[0], str(getattr(_module, "site", site)))
            check_finite(args[0], str(getattr(_module, "site", site)))
            if args[0].numel():
                reached.add(key)

        hooks.append(module.register_forward_pre_hook(see))
    return hooks


def _check_float(value: torch.Tensor, site: str) -> None:
    if not value.is_floating_point():
        raise CalibrationError(
            f"{site}: the tensor holds {str(value.dtype).removeprefix('torch.')} values, and only floats have ranges. "
            "The Quantizer annotated an op on integers or bools: exclude that op, or take a Quantizer that leaves such "
            "operands alone, as torchquant's do."
        )


def _check_reached(model: GraphModule, reached: set[int]) -> None:
    unseen = [
        str(getattr(module, "site", node.args[0])) for node, module in observers(model) if id(module) not in reached
    ]
    if unseen:
        raise CalibrationError(
            f"{len(unseen)} sites never saw data: {', '.join(unseen[:6])}. Calibrate with batches that reach "
            "them, or exclude them."
        )
