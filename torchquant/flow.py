"""Export, prepare, calibrate, convert: one visible list of calls."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from rich.progress import track
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

from torchquant import batches as data
from torchquant.algorithms.bias_correction import BiasCorrection
from torchquant.calibrate import Recorder, calibrate
from torchquant.errors import CalibrationError, ExportError, InputError, TorchquantWarning
from torchquant.fx import passes
from torchquant.fx.sites import is_converted, is_prepared, read_sites
from torchquant.verify import compare

_GUARD_BATCHES = 8

__all__ = ["convert", "export", "optimize", "prepare", "quantize"]


def export(model: torch.nn.Module, example_inputs: Any, *, dynamic_shapes: Any = None) -> GraphModule:
    """`torch.export` a float model into the graph that Quantizers annotate.

    Ops inside `torch.no_grad()` regions are inlined, so that Quantizers see them.

    Args:
        model: a float module; put in eval mode (and back) if it is in training mode.
        example_inputs: one batch: a tensor, a tuple of arguments or a dict of keyword arguments.
        dynamic_shapes: as for `torch.export.export`.

    Raises:
        ExportError: torch cannot capture the model; carries torch's reason and the line.
    """
    if isinstance(model, GraphModule) and (is_prepared(model) or is_converted(model)):
        raise InputError("the model is prepared or converted already; export the float model")
    args, kwargs = data.split(example_inputs)
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes).module()
    except Exception as error:
        raise ExportError(f"torch.export cannot capture {type(model).__name__}: {_first_lines(error)}") from error
    finally:
        for module, training in modes.items():
            module.training = training
    assert isinstance(exported, GraphModule)
    passes.inline_grad_regions(exported)
    return exported


def _first_lines(error: Exception, limit: int = 1500) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text[:limit]}"


def prepare(exported: GraphModule, quantizer: Quantizer) -> GraphModule:
    """torchao's `prepare_pt2e` on a copy, so that one export serves several Quantizers."""
    return prepare_pt2e(passes.copy_graph(exported), quantizer)


def convert(prepared: GraphModule) -> GraphModule:
    """torchao's `convert_pt2e`, then the dead float weights removed. Works in place like torchao's.

    Raises:
        CalibrationError: a static observer of any make never saw data (torchao would use scale 1.0).
    """
    _refuse_uncalibrated(prepared)
    converted = convert_pt2e(prepared)
    passes.remove_dead_weights(converted)
    return converted


def _refuse_uncalibrated(prepared: GraphModule) -> None:
    if not is_prepared(prepared):
        raise CalibrationError("convert takes a prepared graph; this one has no observers")
    for node, observer in passes.static_observers(prepared):
        low = getattr(observer, "min_val", None)
        if isinstance(low, torch.Tensor) and (low.numel() == 0 or bool(torch.isinf(low).any())):
            site = getattr(observer, "site", f"{node.args[0]}, observed by {node.target},")
            raise CalibrationError(f"{site} never saw data: run torchquant.calibrate(prepared, batches) before convert")


def quantize(
    model: torch.nn.Module,
    example_inputs: Any,
    batches: Iterable[Any],
    *,
    quantizer: Quantizer | Sequence[Quantizer],
    algorithms: Sequence[BiasCorrection] = (BiasCorrection(),),
    dynamic_shapes: Any = None,
    progress: bool = True,
) -> Any:
    """Export, prepare, calibrate and convert in one call; several Quantizers share one pass over the data.

    Args:
        model, example_inputs, dynamic_shapes: as for `export`. A GraphModule from `export` is taken as it is.
        batches: calibration data, as for `calibrate`.
        quantizer: a Quantizer, or several.
        algorithms: applied after calibration; what they need is measured in the same pass. Where they make
            the output worse on the calibration data, a warning says so and the plain result is kept.

    Returns:
        The converted GraphModule, or a list of them in the order of the Quantizers.
    """
    quantizers = [quantizer] if isinstance(quantizer, Quantizer) else list(quantizer)
    if not quantizers:
        raise InputError("quantize needs a Quantizer, e.g. quantizer=X86Quantizer()")
    exported = model if isinstance(model, GraphModule) else export(model, example_inputs, dynamic_shapes=dynamic_shapes)
    prepared = [prepare(exported, q) for q in quantizers]
    measured = [[(a, a.statistics(p)) for a in algorithms] for p in prepared]
    kept: list[Any] = []
    everything = {n: s for each in measured for _, found in each for n, s in found.items()}
    calibrate(prepared, _keeping(batches, kept), statistics=everything, progress=progress)
    for graph, each in zip(prepared, measured, strict=True):
        _improve(graph, each, kept)
    converted = [convert(p) for p in prepared]
    for graph in converted:
        _warn_if_nothing_happened(graph)
    return converted[0] if isinstance(quantizer, Quantizer) else converted


def _keeping(batches: Iterable[Any], kept: list[Any]) -> Iterable[Any]:
    """The batches as they are, the first few remembered for the guard; sized if they are."""
    if isinstance(batches, (list, tuple)):
        kept.extend(batches[:_GUARD_BATCHES])
        return batches
    return batches if isinstance(batches, (torch.Tensor, dict, str)) else _remembering(batches, kept)


def _remembering(batches: Iterable[Any], kept: list[Any]) -> Iterator[Any]:
    for batch in batches:
        if len(kept) < _GUARD_BATCHES:
            kept.append(batch)
        yield batch


def optimize(
    prepared: GraphModule, batches: Iterable[Any], algorithms: Sequence[BiasCorrection], *, progress: bool = True
) -> None:
    """Improve a calibrated prepared graph in place, before `convert_pt2e`; any Quantizer's.

    Args:
        prepared: a calibrated graph.
        batches: calibration data, read once.
        algorithms: applied together; where they make the output worse on the calibration data, a warning
            says so and the graph is left as it was.

    Raises:
        InputError, CalibrationError: as `calibrate`.
    """
    _refuse_uncalibrated(prepared)
    measured = [(a, a.statistics(prepared)) for a in algorithms]
    kept: list[Any] = []
    everything = {n: s for _, found in measured for n, s in found.items()}
    recorder = Recorder(prepared, everything, observe=False)
    checked = data.checked(prepared, _keeping(batches, kept))
    with torch.no_grad():
        for batch in track(checked, "measuring", total=None, disable=not progress, transient=True):
            data.call(recorder, batch)
    _improve(prepared, measured, kept)


def _improve(prepared: GraphModule, measured: Sequence[tuple[BiasCorrection, Any]], kept: Sequence[Any]) -> None:
    """Apply the algorithms to the prepared graph, unless the converted output on `kept` gets worse."""
    if not any(found for _, found in measured):
        return
    plain, improved = passes.copy_graph(prepared), passes.copy_graph(prepared)
    twins = dict(zip(prepared.graph.nodes, improved.graph.nodes, strict=True))
    for algorithm, found in measured:
        algorithm.apply(improved, {twins[node]: value for node, value in found.items()})
    reference = Recorder(passes.copy_graph(prepared), {}, observe=False)
    before, after = (compare(reference, convert(graph), kept).sqnr_db for graph in (plain, improved))
    if after >= before:
        for algorithm, found in measured:
            algorithm.apply(prepared, found)
        return
    names = ", ".join(type(algorithm).__name__ for algorithm, _ in measured)
    warnings.warn(
        f"{names} would lower the output's SQNR on the calibration data from {before:.2f} to {after:.2f} dB; "
        "the plain result is kept",
        TorchquantWarning,
        stacklevel=3,
    )


def _warn_if_nothing_happened(converted: GraphModule) -> None:
    if not any(s.status == "quantized" for s in read_sites(converted)):
        warnings.warn(
            "nothing was quantized: torchquant.report(quantized) says why for each op", TorchquantWarning, stacklevel=3
        )
