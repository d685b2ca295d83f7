"""What the commands of `torchquant` do; `cli.py` says how they are written, and imports this when one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from torchquant import flow
from torchquant.algorithms.adaquant import AdaQuant
from torchquant.algorithms.adaround import AdaRound
from torchquant.algorithms.auto_round import AutoRound
from torchquant.algorithms.awq import AWQ
from torchquant.algorithms.batch_norm import BatchNormReestimation
from torchquant.algorithms.bias_correction import BiasCorrection
from torchquant.algorithms.brecq import BRECQ
from torchquant.algorithms.equalization import CrossLayerEqualization
from torchquant.algorithms.gptq import GPTQ
from torchquant.algorithms.hqq import HQQ
from torchquant.algorithms.llm_int8 import LLMInt8
from torchquant.algorithms.qdrop import QDrop
from torchquant.algorithms.range_search import RangeSearch
from torchquant.algorithms.rotate import Rotate
from torchquant.algorithms.seq_mse import SeqMSE
from torchquant.algorithms.smooth_quant import SmoothQuant
from torchquant.analysis.walk import analyze as make_analysis
from torchquant.artifacts import serialize
from torchquant.artifacts.program import Program, read_metadata
from torchquant.backends import names, target
from torchquant.calibration import batches as data
from torchquant.calibration.calibrate import calibrate
from torchquant.cli import sources
from torchquant.errors import InputError
from torchquant.files import archive
from torchquant.lowering.target import Target, brief
from torchquant.measure.verify import compare
from torchquant.reporting.terminal import program_text, proof_text
from torchquant.reporting.terminal import report as make_report

_console = Console(stderr=True)
ALGORITHMS: dict[str, type] = {
    "adaquant": AdaQuant,
    "adaround": AdaRound,
    "auto-round": AutoRound,
    "awq": AWQ,
    "batch-norm": BatchNormReestimation,
    "bias-correction": BiasCorrection,
    "brecq": BRECQ,
    "equalization": CrossLayerEqualization,
    "gptq": GPTQ,
    "hqq": HQQ,
    "llm-int8": LLMInt8,
    "qdrop": QDrop,
    "range-search": RangeSearch,
    "rotate": Rotate,
    "seq-mse": SeqMSE,
    "smooth-quant": SmoothQuant,
}


def _algorithms(names: list[str]) -> list[Any]:
    if names == ["none"]:
        return []
    unknown = [name for name in names if name not in ALGORITHMS]
    if unknown:
        raise InputError(f"there is no algorithm {unknown[0]!r}; choose from {', '.join(ALGORITHMS)}, none")
    return [ALGORITHMS[name]() for name in names]


def quantize(
    model: str,
    calibration: str,
    out: Path,
    backends: list[str],
    exclude: list[str],
    scheme: str | None,
    dynamic_batch: bool,
    max_batch: int | None,
    algorithms: list[str],
    report: Path | None,
    trust: bool,
) -> None:
    """Quantize, prove and write; see `torchquant quantize --help`."""
    for name in backends:
        _target(name)
    chosen = _algorithms(algorithms)
    paths = _outputs(out, backends)
    batches = sources.load_batches(calibration)
    shapes = _dynamic_first(batches[0], max_batch) if dynamic_batch or max_batch is not None else None
    float_model = flow.export(sources.load_model(model, trust=trust), batches[0], dynamic_shapes=shapes)
    quantizers = [_target(name).quantizer_class()(scheme, exclude=exclude) for name in backends]
    converted = flow.quantize(float_model, batches[0], batches, quantizer=quantizers, algorithms=chosen)
    programs = []
    for name, graph in zip(backends, converted, strict=True):
        with _console.status(f"lowering and proving for {name}"):
            program = _lower(_target(name), graph, batches[0])
        program.save(paths[name])
        programs.append(program)
        accuracy = compare(float_model, program, batches[:8])
        print(make_report(graph, program))
        print(f"{name}: {accuracy.sqnr_db:.1f} dB against float on calibration data; written to {paths[name]}\n")
    if report is not None:
        make_report(converted[0], programs).save(report)


def report(path: Path) -> None:
    """Account for every op of a saved artefact or graph."""
    if serialize.is_graph(path):
        print(make_report(serialize.load(path)))
        return
    made_for = _target_of(path)
    if made_for.is_code:  # what it says of itself; the program is not loaded, for that would run it
        proof = read_metadata(path, made_for.name).proof
        print(proof_text(made_for.name, path.stat().st_size, proof))
    else:
        print(program_text(_load(path, trust=False)))


def preview(model: str, calibration: str, backend: str, exclude: list[str], scheme: str | None, trust: bool) -> None:
    """Account for every op of a float model before any calibration."""
    exported = flow.export(sources.load_model(model, trust=trust), sources.load_batches(calibration)[0])
    print(make_report(flow.prepare(exported, _target(backend).quantizer_class()(scheme, exclude=exclude))))


def analyze(
    model: str,
    calibration: str,
    validation: str | None,
    backend: str,
    exclude: list[str],
    scheme: str | None,
    algorithms: list[str],
    report: Path | None,
    min_sqnr: float | None,
    trust: bool,
) -> bool:
    """Say where the error comes from; whether the output's SQNR is what was asked for."""
    chosen, batches = _algorithms(algorithms), sources.load_batches(calibration)
    judged = batches if validation is None else sources.load_batches(validation)
    exported = flow.export(sources.load_model(model, trust=trust), batches[0])
    prepared = flow.prepare(exported, _target(backend).quantizer_class()(scheme, exclude=exclude))
    calibrate(prepared, batches)
    if chosen:
        flow.optimize(prepared, batches, chosen)
    with _console.status("analyzing"):
        analysis = make_analysis(prepared, judged)
    if report is not None:
        make_report(prepared, analysis=analysis).save(report)
    print(analysis)
    print(f"measured on {'the calibration data' if validation is None else validation}")
    return min_sqnr is None or analysis.output_db >= min_sqnr


def run(path: Path, inputs: str, trust: bool) -> None:
    """Run a saved artefact on inputs and print the shape and range of each output."""
    program = _load(path, trust)
    for i, batch in enumerate(sources.load_batches(inputs)):
        for j, output in enumerate(pytree.tree_leaves(data.call(program, batch))):
            if not isinstance(output, torch.Tensor) or not output.numel():
                shown = f"shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else repr(output)
                print(f"batch {i} output {j}: {shown}")
                continue
            of, values = (" magnitude", output.abs()) if output.is_complex() else ("", output)
            low, high = values.double().aminmax()
            print(f"batch {i} output {j}: shape {tuple(output.shape)}{of} from {float(low):.4g} to {float(high):.4g}")


def targets() -> None:
    """Which op runs in which scheme on which target, and why the others do not."""
    for name in names():
        of = target(name)
        table = Table("op", "schemes", "condition, or why it stays float", title=f"{name} ({of.suffix})", expand=False)
        for row in of.capabilities:
            table.add_row(row.op, brief(row.schemes) or "float", row.reason)
        Console().print(table)


def _target(name: str) -> Target:
    if name not in names():
        raise InputError(f"there is no backend {name!r}; choose from {', '.join(names())}")
    backend: Target = target(name)
    return backend


def _outputs(out: Path, chosen: list[str]) -> dict[str, Path]:
    """Where each artefact goes; folders that are missing are made."""
    is_folder = len(chosen) > 1 or out.is_dir()
    folder = out if is_folder else out.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = f"{folder} cannot be made a folder for the artefacts ({error}); choose another --out"
        raise InputError(text) from error
    return {name: out / f"{name}{_target(name).suffix}" for name in chosen} if is_folder else {chosen[0]: out}


def _dynamic_first(batch: Any, most: int | None) -> Any:
    """The first axis of every tensor as one that varies, up to a size."""
    args, kwargs = data.split(batch)
    varies = torch.export.Dim.DYNAMIC if most is None else torch.export.Dim.DYNAMIC(max=most)
    is_batch = lambda value: isinstance(value, torch.Tensor) and value.ndim > 0  # noqa: E731
    return pytree.tree_map(lambda value: {0: varies} if is_batch(value) else None, kwargs if kwargs else args)


def _lower(made_for: Target, graph: GraphModule, batch: Any) -> Program:
    """The artefact; where this machine is not what it is made for, with the options that prove it here all the same."""
    options, said = made_for.here()
    if said:
        print(f"{made_for}: {said}")
    program: Program = made_for.backend().lower(graph, batch, **options)
    return program


def _load(path: Path, trust: bool) -> Program:
    made_for = _target_of(path)
    if made_for.is_code and not trust:
        text = f"{path} is code: a program for {made_for} holds shared libraries, which run with your rights once it"
        raise InputError(f"{text} is loaded. If you know who wrote it, give --trust")
    program: Program = made_for.backend().load(path, **made_for.here()[0])
    return program


def _target_of(path: Path) -> Target:
    """By the file's suffix, or where that is not enough by what the file says."""
    alike = [t for t in map(_target, names()) if t.suffix == path.suffix]
    if len(alike) == 1:
        return alike[0]
    kind = archive.read_any(path).get("kind")
    if kind not in names():
        raise InputError(f"{path} holds a {kind}, which is no program; lower it first")
    return _target(str(kind))
