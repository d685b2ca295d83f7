"""Export, prepare, calibrate, convert: one visible list of calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, overload

import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

from torchquant.algorithms.bias_correction import BiasCorrection
from torchquant.calibration import batches as data
from torchquant.calibration.calibrate import calibrate, refuse_uncalibrated
from torchquant.calibration.digests import digest_of
from torchquant.calibration.parallel import agree, is_parallel, together
from torchquant.errors import (
    ExportError,
    InputError,
    PrepareError,
    TorchquantError,
    TorchquantWarning,
)
from torchquant.fx import ops, passes
from torchquant.fx.batch_axes import add_batch_axes
from torchquant.fx.functional import functionalize
from torchquant.fx.reading import is_converted, is_prepared
from torchquant.fx.rewrites.decompose import expand_batch_norms
from torchquant.fx.signature import Signature, placeholders
from torchquant.fx.sites import read_sites
from torchquant.fx.states import hidden_states, own_states
from torchquant.fx.storing import fold_codes, pack_weights
from torchquant.fx.subclasses import split_parts
from torchquant.measure.metric import Metric, check_metric, scored
from torchquant.observers.minmax import least_scale
from torchquant.solving.contract import Algorithm
from torchquant.solving.results import Optimization
from torchquant.solving.run import DEFAULT_MEMORY_BYTES, run
from torchquant.surroundings import unchanged, without_autocast

__all__ = ["convert", "export", "optimize", "prepare", "quantize"]


@unchanged(modes=False)  # an export takes them down: what a model makes has the default dtype
def export(model: torch.nn.Module, example_inputs: Any, *, dynamic_shapes: Any = None) -> GraphModule:
    """`torch.export` a float model into the graph that Quantizers annotate.

    Ops inside `torch.no_grad()` regions are inlined, so that Quantizers see them, and writes in place become values
    (`fx/functional.py`), so that none is lost between quantized copies of a tensor. Buffers that the graph writes (its
    state) are copies: running the graph does not change the model. The caller's autocast does not reach the graph:
    export a model of the dtypes that it is to have.

    Args:
        model: a float module; put in eval mode (and back) if it is in training mode.
        example_inputs: one batch: a tensor, a tuple of arguments or a dict of keyword arguments.
        dynamic_shapes: as for `torch.export.export`.

    Raises:
        InputError: no module, or a graph that is prepared or converted.
        ExportError: torch cannot capture the model; carries torch's reason and the line.
    """
    if isinstance(model, GraphModule) and (is_prepared(model) or is_converted(model)):
        raise InputError("the model is prepared or converted already; export the float model")
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"export takes a torch.nn.Module, not {type(model).__name__}")
    args, kwargs = data.split(example_inputs)
    if isinstance(model, GraphModule) and all("val" in n.meta for n in placeholders(model)):
        signature = Signature.of(model)
        args, kwargs = signature.arguments(data.leaves_of(signature, example_inputs, "example_inputs"))
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        with torch.no_grad(), without_autocast():  # autograd refuses writes through views that are right without it
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes).module()
    except Exception as error:
        hint = _hint(str(error), data.flatten(example_inputs))
        raise ExportError(f"torch.export cannot capture {type(model).__name__}: {_first_lines(error)}{hint}") from error
    finally:
        for module, training in modes.items():
            module.training = training
    assert isinstance(exported, GraphModule)
    split_parts(exported)
    passes.inline_regions(exported)
    _refuse_hidden_states(exported)
    functionalize(exported)
    add_batch_axes(exported)
    expand_batch_norms(exported)
    own_states(exported)
    return exported


def _refuse_hidden_states(exported: GraphModule) -> None:
    for node in hidden_states(exported):
        raise ExportError(
            f"{ops.op_name(node)} {node.name} normalizes by the statistics of each batch and updates its running ones, "
            "which torch.export hides: call it with training=False, or without running statistics"
        )


def _hint(error: str, leaves: list[Any]) -> str:
    """What to do about some errors of torch.export that do not say it."""
    if "DynamicCache" in error or "past_key_values" in error:
        return (
            "\nThe model returns a cache that grows, which torch.export cannot capture: export it with a static cache, "
            "by torchquant.export_causal_lm(model, max_cache_len), or call it with use_cache=False."
        )
    if "positional argument" in error and len(leaves) > 1:
        return "\nIf a batch holds a label too, leave it out, e.g. [x for x, _ in loader]."
    sizes_of_one = any(isinstance(v, torch.Tensor) and 1 in v.shape for v in leaves)
    if sizes_of_one and ("onstraints violated" in error or "specialized" in error):
        return "\ntorch.export makes a size of 1 a constant: give an example with two samples or more."
    return ""


def _first_lines(error: Exception, limit: int = 1500) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text[:limit]}"


@unchanged()
def prepare(exported: GraphModule, quantizer: Quantizer) -> GraphModule:
    """torchao's `prepare_pt2e` on a copy, so that one export serves several Quantizers.

    Args:
        exported: a float graph of `export`; it is not changed.
        quantizer: any Quantizer of torchao, ours or others.

    Raises:
        PrepareError: a Quantizer of another make fails on this graph, or torchao on what it asked for.
    """
    check_quantizer(quantizer)
    try:
        return prepare_pt2e(passes.copy_graph(exported), quantizer)
    except (TorchquantError, Warning):  # a warning may be raised as an error
        raise
    except Exception as error:
        name = f"{type(quantizer).__module__}.{type(quantizer).__name__}"
        raise PrepareError(
            f"{name} cannot annotate this model: {_first_lines(error)}\nTake another Quantizer, e.g. one of "
            "torchquant.quantizers, or keep this one from the module at fault (its set_module_name)."
        ) from error


def check_quantizer(quantizer: object) -> None:
    """Raise InputError unless it is a Quantizer."""
    if isinstance(quantizer, type) and issubclass(quantizer, Quantizer):
        raise InputError(f"{quantizer.__name__} is a class; make one of it: {quantizer.__name__}()")
    if not isinstance(quantizer, Quantizer):
        raise InputError(
            f"{quantizer!r:.80} is no Quantizer; give one of torchquant.quantizers, e.g. X86Quantizer(), or any other "
            "torchao Quantizer"
        )


@unchanged()
def convert(prepared: GraphModule) -> GraphModule:
    """torchao's `convert_pt2e`, with weights packed (see `pack_weights`) and no dead float ones. Works in place.

    Weights become codes one after the other, so that no more than one of them is there in both forms but for what the
    caller holds.

    Args:
        prepared: a calibrated graph of `prepare`, or of torchao's `prepare_pt2e`.

    Raises:
        CalibrationError: a static observer of any make never saw data (torchao would use scale 1.0).
        PrepareError: torchao fails on what a Quantizer of another make asked for.
    """
    refuse_uncalibrated(prepared)
    _warn_of_vanishing(prepared)
    passes.hide_batch_norms(prepared)
    try:
        converted = convert_pt2e(prepared, fold_quantize=False)
        fold_codes(converted)
    except (TorchquantError, Warning):
        raise
    except Exception as error:
        raise PrepareError(
            f"torchao cannot convert what the Quantizer asked for: {_first_lines(error)}\nExport a float32 model, or "
            "exclude the op in the Quantizer."
        ) from error
    passes.show_batch_norms(converted)
    pack_weights(converted)
    return converted


def _warn_of_vanishing(prepared: GraphModule) -> None:
    """Warn of activations that are smaller than the least scale that their observers may choose: they become 0."""
    lost = []
    for node, observer in passes.static_observers(prepared):
        bounds = [getattr(observer, name, None) for name in ("min_val", "max_val")]
        known = [b.reshape(-1) for b in bounds if isinstance(b, torch.Tensor)]
        if getattr(observer, "observes_weight", False) or not known:
            continue
        most, least = float(torch.cat(known).abs().max()), least_scale(observer)
        if 0 < most < least / 2:
            site = getattr(observer, "site", node.args[0])
            lost.append(f"{site} (at most {most:.1e}, the least scale is {least:.1e})")
    if lost:
        warnings.warn(
            f"{len(lost)} activations are too small to be told from 0 in the integers they are stored in: "
            f"{', '.join(lost[:4])}. Scale the model's inputs up, or exclude what computes them.",
            TorchquantWarning,
            stacklevel=4,
        )


class QuantizerLike(Protocol):
    """A torchao Quantizer, of which type checkers know nothing: what tells it from a list of them."""

    def annotate(self, model: GraphModule) -> GraphModule: ...

    def validate(self, model: GraphModule) -> None: ...


@overload
def quantize(
    model: torch.nn.Module,
    example_inputs: Any,
    batches: Iterable[Any],
    *,
    quantizer: QuantizerLike,
    algorithms: Sequence[Algorithm] = ...,
    validation: Iterable[Any] | None = None,
    metric: Metric | None = None,
    dynamic_shapes: Any = None,
    progress: bool = True,
) -> GraphModule: ...


@overload
def quantize(
    model: torch.nn.Module,
    example_inputs: Any,
    batches: Iterable[Any],
    *,
    quantizer: Sequence[QuantizerLike],
    algorithms: Sequence[Algorithm] = ...,
    validation: Iterable[Any] | None = None,
    metric: Metric | None = None,
    dynamic_shapes: Any = None,
    progress: bool = True,
) -> list[GraphModule]: ...


def quantize(
    model: torch.nn.Module,
    example_inputs: Any,
    batches: Iterable[Any],
    *,
    quantizer: Quantizer | Sequence[Quantizer],
    algorithms: Sequence[Algorithm] = (BiasCorrection(),),
    validation: Iterable[Any] | None = None,
    metric: Metric | None = None,
    dynamic_shapes: Any = None,
    progress: bool = True,
) -> GraphModule | list[GraphModule]:
    """Export, prepare, calibrate and convert in one call; several Quantizers share one pass over the data.

    Args:
        model, example_inputs, dynamic_shapes: as for `export`. A GraphModule from `export` is taken as it is.
        batches: calibration data, as for `calibrate`.
        quantizer: a Quantizer, or several.
        algorithms, validation, metric: see `optimize`; no algorithm leaves what the observers chose. To bound how much
            the metric may lose, see `quantize_within`.
        progress: show a progress bar on stderr.

    Returns:
        The converted GraphModule, or a list of them in the order of the Quantizers.

    Raises:
        InputError: no Quantizer, or an argument that the others make pointless.
        TorchquantError: one of those of `export`, `prepare`, `calibrate`, `optimize` and `convert`.
    """
    with together("quantize"):
        graph = partial(exported_of, model, example_inputs, dynamic_shapes)
        return _quantize(graph, batches, quantizer, algorithms, validation, metric, progress)


def exported_of(model: torch.nn.Module, example_inputs: Any, dynamic_shapes: Any = None) -> GraphModule:
    """The model's graph; a GraphModule from `export` is taken as it is."""
    return model if isinstance(model, GraphModule) else export(model, example_inputs, dynamic_shapes=dynamic_shapes)


def _quantize(
    graph: Callable[[], GraphModule],
    batches: Iterable[Any],
    quantizer: Quantizer | Sequence[Quantizer],
    algorithms: Sequence[Algorithm],
    validation: Iterable[Any] | None,
    metric: Metric | None,
    progress: bool,
) -> GraphModule | list[GraphModule]:
    several = isinstance(quantizer, Sequence) and not isinstance(quantizer, str)
    quantizers: list[Quantizer] = list(quantizer) if several else [quantizer]
    if not quantizers:
        raise InputError("quantize needs a Quantizer, e.g. quantizer=X86Quantizer()")
    for one in quantizers:
        check_quantizer(one)
    if not algorithms and (metric is not None or validation is not None):
        raise InputError("metric and validation say which algorithms are kept, and algorithms is empty: leave them out")
    exported = graph()
    prepared = [prepare(exported, q) for q in quantizers]
    if algorithms and not isinstance(batches, (list, torch.Tensor, dict, str)) and isinstance(batches, Iterable):
        batches = list(batches)
    if validation is not None:
        validation = data.listed(validation, "validation")
    calibrate(prepared, batches, progress=progress)
    if algorithms:
        for graph in prepared:
            optimize(graph, batches, algorithms, validation=validation, metric=metric, progress=progress)
    converted = [convert(p) for p in prepared]
    for graph in converted:
        _warn_if_nothing_happened(graph)
    if is_parallel():
        agree(" ".join(map(digest_of, converted)), "the quantized graph")
    return converted if several else converted[0]


def optimize(
    prepared: GraphModule,
    batches: Iterable[Any],
    algorithms: Sequence[Algorithm],
    *,
    validation: Iterable[Any] | None = None,
    metric: Metric | None = None,
    budget_s: float | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    exclude: Sequence[str] = (),
    progress: bool = True,
) -> Optimization:
    """Improve a calibrated prepared graph in place, before `convert_pt2e`; any Quantizer's.

    Each answer of an algorithm is kept only if the output of its layer or block is no worse on the calibration data,
    and each algorithm only if the network is no worse, by the metric or the SQNR of its output; a warning says so. That
    is measured on `validation`; without, on every eighth batch, which the algorithms then do not see, or of fewer than
    sixteen batches on all: the result says on which. Under `torchrun` each process
    gives its own batches (or none); what is measured is summed, and all end with the same graph or with an error.

    Args:
        prepared, batches: a calibrated graph, and calibration data, which are kept in memory while this runs.
        algorithms: run in this order; those that rewrite the float graph first: `[SmoothQuant(), AdaRound()]`.
        validation: other batches, to decide and to measure on.
        metric: `metric(model)`, a number, higher is better, of a model that it calls as the float one. It decides
            instead of the SQNR, and should use data of its own. Each algorithm costs one call of it and one convert.
        budget_s: seconds to spend; what is not solved by then stays as it was.
        memory_bytes: activations kept in memory between layers; the rest lies on disk while this runs.
        checkpoint: folder that keeps answers: the same call goes on where a run was stopped. Delete it afterwards.
        seed: of everything drawn at random.
        progress: show a progress bar on stderr.
        exclude: patterns of modules and ops to leave as they are (see `fx/patterns.py`).

    Raises:
        InputError: a batch does not fit, no algorithm, or one in the wrong place.
        CalibrationError: the graph is not prepared or not calibrated.
        SchemeError: an algorithm cannot honour how a weight is quantized.
        ArtifactError: the checkpoints are those of another run, or another process is at work on them.
        ParallelError: under torchrun another process failed, or they end with different graphs.
        KeyboardInterrupt: what was solved is in the graph, which can be used; with a checkpoint folder it is there, and
            the graph is as it came, as after any other error.
    """
    with together("optimize"):
        refuse_uncalibrated(prepared)
        if metric is not None:
            check_metric(metric)
        return run(
            prepared,
            batches,
            algorithms,
            validation=validation,
            score=None if metric is None else lambda graph: score_of(graph, metric),
            budget_s=budget_s,
            memory_bytes=memory_bytes,
            checkpoint=checkpoint,
            seed=seed,
            exclude=exclude,
            progress=progress,
        )


def score_of(prepared: GraphModule, metric: Metric) -> float:
    """What a metric says of a calibrated prepared graph, as `convert` will quantize it."""
    return scored(metric, convert(passes.copy_graph(prepared)), "the quantized model")


def _warn_if_nothing_happened(converted: GraphModule) -> None:
    if not any(s.status == "quantized" for s in read_sites(converted)):
        warnings.warn(
            "nothing was quantized: torchquant.report(quantized) says why for each op", TorchquantWarning, stacklevel=3
        )
