"""The `torchquant` command: quantize, report, analyze, run, targets."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from torchquant.backends import names
from torchquant.errors import InputError, TorchquantError, TorchquantWarning

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
TARGETS = names()
_DEFAULT = "inductor_x86"
ALGORITHMS = (
    *("adaquant", "adaround", "auto-round", "awq", "batch-norm", "bias-correction", "brecq", "equalization", "gptq"),
    *("hqq", "llm-int8", "qdrop", "range-search", "rotate", "seq-mse", "smooth-quant"),
)
_NOISY = ("torchao", "torch.utils._pytree", "root")  # they report what is missing and not needed here
_TRACING = "torch._subclasses.fake_tensor"  # writes the traceback of an error that is then raised
_console = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="package.module:function, or a saved ExportedProgram (.pt2)")]
Calibration = Annotated[
    str, typer.Option("--calibration", help="package.module:function, .npz or .safetensors (first dimension: batches)")
]
Backend = Annotated[list[str] | None, typer.Option("--backend", help=f"one or several of: {', '.join(TARGETS)}")]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", help="module glob, op:KIND or node:NAME; repeatable")]
SchemeName = Annotated[str | None, typer.Option("--scheme", help="a scheme of the target; its default if left out")]
Algorithms = Annotated[
    list[str] | None,
    typer.Option(
        "--algorithm", help=f"repeatable, in this order; bias-correction if left out: {', '.join(ALGORITHMS)}, none"
    ),
]
ReportFile = Annotated[
    Path | None, typer.Option("--report", help="file to write the report to: a page (.html), JSON (.json) or text")
]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="run what is in the file, code or pickles: you know who wrote it"),
]


@app.command()
def quantize(
    model: Model,
    calibration: Calibration,
    out: Annotated[Path, typer.Option("--out", help="file, or a folder for several backends")],
    backend: Backend = None,
    exclude: Exclude = None,
    scheme: SchemeName = None,
    dynamic_batch: Annotated[bool, typer.Option(help="let the first size of every input vary")] = False,
    max_batch: Annotated[
        int | None, typer.Option(min=2, help="the same, up to this size, for which XNNPACK plans its memory")
    ] = None,
    algorithm: Algorithms = None,
    report: ReportFile = None,
    trust: Trust = False,
) -> None:
    """Quantize a model for one or several backends with one calibration, prove the artefacts, and write them."""
    _commands().quantize(
        model,
        calibration,
        out,
        backend or [_DEFAULT],
        exclude or [],
        scheme,
        dynamic_batch,
        max_batch,
        algorithm or ["bias-correction"],
        report,
        trust,
    )


@app.command()
def report(
    path: Annotated[Path | None, typer.Argument(help="an artefact or a saved converted graph; or give --model")] = None,
    model: Annotated[str | None, typer.Option("--model", help="what a Quantizer would do to this float model")] = None,
    calibration: Annotated[str | None, typer.Option("--calibration", help="its inputs, as for quantize")] = None,
    backend: Annotated[str, typer.Option("--backend", help=f"one of: {', '.join(TARGETS)}")] = _DEFAULT,
    exclude: Exclude = None,
    scheme: SchemeName = None,
    trust: Trust = False,
) -> None:
    """Account for every op: of a saved artefact, or of a float model before any calibration."""
    if path is not None:
        _commands().report(path)
    elif model is None or calibration is None:
        raise InputError("give a saved file, or --model and --calibration")
    else:
        _commands().preview(model, calibration, backend, exclude or [], scheme, trust)


@app.command()
def analyze(
    model: Model,
    calibration: Calibration,
    validation: Annotated[
        str | None, typer.Option("--validation", help="data to measure on, as --calibration; that if left out")
    ] = None,
    backend: Annotated[str, typer.Option("--backend", help=f"one of: {', '.join(TARGETS)}")] = _DEFAULT,
    exclude: Exclude = None,
    scheme: SchemeName = None,
    algorithm: Algorithms = None,
    report: ReportFile = None,
    min_sqnr: Annotated[
        float | None, typer.Option("--min-sqnr", help="dB of the output; exit code 2 if it has less")
    ] = None,
    trust: Trust = False,
) -> None:
    """Say where the error comes from, op by op and tensor by tensor, and what to do about it."""
    holds = _commands().analyze(
        model,
        calibration,
        validation,
        backend,
        exclude or [],
        scheme,
        algorithm or ["bias-correction"],
        report,
        min_sqnr,
        trust,
    )
    if not holds:
        raise typer.Exit(2)


@app.command()
def run(
    path: Annotated[Path, typer.Argument(help="an artefact that quantize wrote")],
    inputs: Annotated[str, typer.Option("--inputs", help="as --calibration of quantize")],
    trust: Trust = False,
) -> None:
    """Run a saved artefact on inputs and print the shape and range of each output."""
    _commands().run(path, inputs, trust)


@app.command()
def targets() -> None:
    """Which op runs in which scheme on which target, and why the others do not."""
    _commands().targets()


def _commands() -> ModuleType:
    """What the commands do, imported when one runs: torch takes seconds."""
    for name in _NOISY:
        logging.getLogger(None if name == "root" else name).setLevel(logging.ERROR)
    logging.getLogger(_TRACING).setLevel(logging.CRITICAL)
    return import_module("torchquant.cli.commands")


def main() -> None:
    """Run the command; errors are a line or two on stderr and exit code 1."""
    warnings.simplefilter("ignore")  # torch's notes to its own developers
    warnings.filterwarnings("always", category=TorchquantWarning)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        app(standalone_mode=True)
    except TorchquantError as error:
        _console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except Exception as error:
        if "TORCHQUANT_TRACEBACK" in os.environ:
            raise
        _console.print(f"[bold red]error:[/] {escape(_unforeseen(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _unforeseen(error: Exception) -> str:
    """An error that is none of ours, with the place where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).strip() or "no message"
    return (
        f"{type(error).__name__}: {text}\n  raised in {frame.name}, {frame.filename}:{frame.lineno}; "
        "set TORCHQUANT_TRACEBACK=1 to see the way there"
    )
