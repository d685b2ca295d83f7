"""The `torchquant` command: quantize, report, run, targets."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from torchquant import archive, flow, serialize, sources
from torchquant import batches as data
from torchquant.algorithms.adaquant import AdaQuant
from torchquant.algorithms.adaround import AdaRound
from torchquant.algorithms.batch_norm import BatchNormReestimation
from torchquant.algorithms.bias_correction import BiasCorrection
from torchquant.algorithms.brecq import BRECQ
from torchquant.algorithms.equalization import CrossLayerEqualization
from torchquant.algorithms.qdrop import QDrop
from torchquant.algorithms.range_search import RangeSearch
from torchquant.algorithms.seq_mse import SeqMSE
from torchquant.algorithms.smooth_quant import SmoothQuant
from torchquant.backends import executorch_xnnpack, inductor_cuda, inductor_x86
from torchquant.errors import InputError, TorchquantError, TorchquantWarning
from torchquant.program import Program
from torchquant.quantizers.cuda import CudaQuantizer
from torchquant.quantizers.engine import CapabilityQuantizer
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer
from torchquant.report import program_text
from torchquant.report import report as make_report
from torchquant.verify import compare

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
TARGETS: dict[str, tuple[type[CapabilityQuantizer], Any, str]] = {
    inductor_x86.TARGET: (X86Quantizer, inductor_x86, ".pt2"),
    executorch_xnnpack.TARGET: (XnnpackQuantizer, executorch_xnnpack, ".pte"),
    inductor_cuda.TARGET: (CudaQuantizer, inductor_cuda, ".pt2"),
}
_console = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="package.module:function, or a saved ExportedProgram (.pt2)")]
Calibration = Annotated[
    str, typer.Option("--calibration", help="package.module:function, .npz or .safetensors (first dimension: batches)")
]
Backend = Annotated[list[str] | None, typer.Option("--backend", help=f"one or several of: {', '.join(TARGETS)}")]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", help="module glob, op:KIND or node:NAME; repeatable")]
SchemeName = Annotated[str | None, typer.Option("--scheme", help="a scheme of the target; its default if left out")]

ALGORITHMS: dict[str, type] = {
    "adaquant": AdaQuant,
    "adaround": AdaRound,
    "batch-norm": BatchNormReestimation,
    "bias-correction": BiasCorrection,
    "brecq": BRECQ,
    "equalization": CrossLayerEqualization,
    "qdrop": QDrop,
    "range-search": RangeSearch,
    "seq-mse": SeqMSE,
    "smooth-quant": SmoothQuant,
}
Algorithms = Annotated[
    list[str] | None,
    typer.Option(
        "--algorithm", help=f"repeatable, in this order; bias-correction if left out: {', '.join(ALGORITHMS)}, none"
    ),
]


def _algorithms(names: list[str]) -> list[Any]:
    if names == ["none"]:
        return []
    unknown = [name for name in names if name not in ALGORITHMS]
    if unknown:
        raise InputError(f"there is no algorithm {unknown[0]!r}; choose from {', '.join(ALGORITHMS)}, none")
    return [ALGORITHMS[name]() for name in names]


@app.command()
def quantize(
    model: Model,
    calibration: Calibration,
    out: Annotated[Path, typer.Option("--out", help="file, or a folder for several backends")],
    backend: Backend = None,
    exclude: Exclude = None,
    scheme: SchemeName = None,
    dynamic_batch: Annotated[bool, typer.Option(help="let the first size of every input vary")] = False,
    algorithm: Algorithms = None,
) -> None:
    """Quantize a model for one or several backends with one calibration, prove the artefacts, and write them."""
    chosen = backend or [inductor_x86.TARGET]
    for name in chosen:
        _target(name)
    paths = _outputs(out, chosen)
    batches = sources.load_batches(calibration)
    if not batches:
        raise InputError(f"{calibration} gave no batches")
    shapes = _dynamic_first(batches[0]) if dynamic_batch else None
    float_model = flow.export(sources.load_model(model), batches[0], dynamic_shapes=shapes)
    quantizers = [_target(name)[0](scheme, exclude=exclude or ()) for name in chosen]
    converted = flow.quantize(
        float_model, batches[0], batches, quantizer=quantizers, algorithms=_algorithms(algorithm or ["bias-correction"])
    )
    for name, graph in zip(chosen, converted, strict=True):
        program = _lower(name, graph, batches[0])
        program.save(paths[name])
        accuracy = compare(float_model, program, batches[:8])
        print(make_report(graph, program))
        print(f"{name}: {accuracy.sqnr_db:.1f} dB against float; written to {paths[name]}\n")


@app.command()
def report(
    path: Annotated[Path | None, typer.Argument(help="an artefact or a saved converted graph; or give --model")] = None,
    model: Annotated[str | None, typer.Option("--model", help="what a Quantizer would do to this float model")] = None,
    calibration: Annotated[str | None, typer.Option("--calibration", help="its inputs, as for quantize")] = None,
    backend: Annotated[str, typer.Option("--backend", help=f"one of: {', '.join(TARGETS)}")] = inductor_x86.TARGET,
    exclude: Exclude = None,
    scheme: SchemeName = None,
) -> None:
    """Account for every op: of a saved artefact, or of a float model before any calibration."""
    if path is not None:
        print(make_report(serialize.load(path)) if serialize.is_graph(path) else program_text(_load(path)))
        return
    if model is None or calibration is None:
        raise InputError("give a saved file, or --model and --calibration")
    exported = flow.export(sources.load_model(model), sources.load_batches(calibration)[0])
    print(make_report(flow.prepare(exported, _target(backend)[0](scheme, exclude=exclude or ()))))


@app.command()
def run(
    path: Annotated[Path, typer.Argument(help="an artefact that quantize wrote")],
    inputs: Annotated[str, typer.Option("--inputs", help="as --calibration of quantize")],
) -> None:
    """Run a saved artefact on inputs and print the shape and range of each output."""
    program = _load(path)
    for i, batch in enumerate(sources.load_batches(inputs)):
        for j, output in enumerate(pytree.tree_leaves(data.call(program, batch))):
            low, high = output.float().aminmax()
            print(f"batch {i} output {j}: shape {tuple(output.shape)} from {float(low):.4g} to {float(high):.4g}")


@app.command()
def targets() -> None:
    """Which op runs in which scheme on which target, and why the others do not."""
    for name, (_, backend, suffix) in TARGETS.items():
        table = Table("op", "schemes", "condition, or why it stays float", title=f"{name} ({suffix})", expand=False)
        for row in backend.CAPABILITIES:
            table.add_row(row.op, ", ".join(row.schemes) or "float", row.reason)
        Console().print(table)


def _target(name: str) -> tuple[type[CapabilityQuantizer], Any, str]:
    if name not in TARGETS:
        raise InputError(f"there is no backend {name!r}; choose from {', '.join(TARGETS)}")
    return TARGETS[name]


def _outputs(out: Path, chosen: list[str]) -> dict[str, Path]:
    if len(chosen) == 1 and not out.is_dir():
        if not out.parent.is_dir():
            raise InputError(f"the folder {out.parent} does not exist; create it, or choose another --out")
        return {chosen[0]: out}
    if not out.is_dir():
        raise InputError(f"{out} must be an existing folder to hold the artefacts of {len(chosen)} backends")
    return {name: out / f"{name}{TARGETS[name][2]}" for name in chosen}


def _dynamic_first(batch: Any) -> Any:
    args, kwargs = data.split(batch)
    return {k: _first(v) for k, v in kwargs.items()} if kwargs else tuple(_first(v) for v in args)


def _first(value: Any) -> dict[int, Any] | None:
    return {0: torch.export.Dim.DYNAMIC} if isinstance(value, torch.Tensor) else None


def _lower(name: str, graph: GraphModule, batch: Any) -> Program:
    """The artefact; one for GPUs is proven by its kernels' references where there is none."""
    options = {"device": "cpu"} if name == inductor_cuda.TARGET and not torch.cuda.is_available() else {}
    if options:
        print(f"{name}: torch sees no GPU here, so the program is checked with reference kernels on the CPU")
    program: Program = _target(name)[1].lower(graph, batch, **options)
    return program


def _load(path: Path) -> Program:
    if path.suffix != ".pte" and archive.read_any(path).get("kind") == inductor_cuda.TARGET:
        return inductor_cuda.load(path, None if torch.cuda.is_available() else "cpu")
    backend = executorch_xnnpack if path.suffix == ".pte" else inductor_x86
    program: Program = backend.load(path)
    return program


def main() -> None:
    """Run the command; errors of ours are one line on stderr and exit code 1."""
    warnings.simplefilter("ignore")  # torch's notes to its own developers
    warnings.simplefilter("always", TorchquantWarning)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        app(standalone_mode=True)
    except TorchquantError as error:
        _console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
