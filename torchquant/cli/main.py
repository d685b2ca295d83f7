"""The `torchquant` command: quantize, report, analyze, search, compare, profile, run, targets, doctor."""

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
from torchquant.cli import output
from torchquant.errors import InputError, TorchquantError, TorchquantWarning
from torchquant.files.archive import versions

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
Validation = Annotated[str | None, typer.Option("--validation", help="data to decide and measure on, as --calibration")]
MetricName = Annotated[
    str | None, typer.Option("--metric", help="package.module:function of a model; a number, higher is better")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of text, and nothing else, on stdout")]
MinSqnr = Annotated[float | None, typer.Option("--min-sqnr", help="dB of the output; exit code 2 if it has less")]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="run what is in the file, code or pickles: you know who wrote it"),
]


def _show_versions(wanted: bool) -> None:
    if wanted:
        print("\n".join(f"{name} {number}" for name, number in versions().items()))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="print the versions", callback=_show_versions, is_eager=True)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress and no warnings on stderr")] = False,
) -> None:
    """Quantize PyTorch models for any target, and see what that costs."""
    output.quiet = quiet
    if quiet:
        warnings.filterwarnings("ignore", category=TorchquantWarning)


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
    validation: Validation = None,
    metric: MetricName = None,
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", help="of the metric: ops stay float so that no more is lost"),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="schemes of the weights, from `torchquant search`")
    ] = None,
    min_sqnr: MinSqnr = None,
    report: ReportFile = None,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Quantize a model for one or several backends with one calibration, prove the artefacts, and write them."""
    holds = _commands().quantize(
        model,
        calibration,
        out,
        backend or [_DEFAULT],
        exclude or [],
        scheme,
        dynamic_batch,
        max_batch,
        algorithm or ["bias-correction"],
        validation,
        metric,
        max_drop,
        plan,
        min_sqnr,
        report,
        as_json,
        trust,
    )
    if not holds:
        raise typer.Exit(2)


@app.command()
def report(
    path: Annotated[Path | None, typer.Argument(help="an artefact or a saved converted graph; or give --model")] = None,
    model: Annotated[str | None, typer.Option("--model", help="what a Quantizer would do to this float model")] = None,
    calibration: Annotated[str | None, typer.Option("--calibration", help="its inputs, as for quantize")] = None,
    backend: Annotated[str, typer.Option("--backend", help=f"one of: {', '.join(TARGETS)}")] = _DEFAULT,
    exclude: Exclude = None,
    scheme: SchemeName = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="write it instead of printing it: .html, .json, or text"),
    ] = None,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Account for every op: of a saved artefact, or of a float model before any calibration."""
    if path is not None:
        _commands().report(path, out, as_json)
    elif model is None or calibration is None:
        raise InputError("give a saved file, or --model and --calibration")
    else:
        _commands().preview(model, calibration, backend, exclude or [], scheme, trust, out, as_json)


@app.command()
def analyze(
    model: Model,
    calibration: Calibration,
    validation: Validation = None,
    backend: Annotated[str, typer.Option("--backend", help=f"one of: {', '.join(TARGETS)}")] = _DEFAULT,
    exclude: Exclude = None,
    scheme: SchemeName = None,
    algorithm: Algorithms = None,
    report: ReportFile = None,
    min_sqnr: MinSqnr = None,
    metric: MetricName = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", help="of the metric, from float; exit code 2 if more is lost")
    ] = None,
    as_json: AsJson = False,
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
        metric,
        max_drop,
        as_json,
        trust,
    )
    if not holds:
        raise typer.Exit(2)


@app.command()
def search(
    model: Model,
    calibration: Calibration,
    scheme: Annotated[list[str], typer.Option("--scheme", help="a scheme to choose from; repeatable")],
    out: Annotated[Path, typer.Option("--out", help="file for the plan (.json), which quantize --plan takes")],
    budget: Annotated[
        str | None, typer.Option("--budget", help="4.5bpw (bits a weight), 3MB, 500KiB, or 2ms (measured)")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", help="instead of a budget: the fewest bytes with which --metric loses less"),
    ] = None,
    validation: Validation = None,
    metric: MetricName = None,
    backend: Annotated[str, typer.Option("--backend", help=f"one of: {', '.join(TARGETS)}")] = _DEFAULT,
    exclude: Exclude = None,
    allow_float: Annotated[bool, typer.Option(help="a weight may stay float, too")] = False,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Choose a scheme for each weight: the least error under a budget, or the fewest bytes that a metric allows."""
    _commands().search(
        model,
        calibration,
        budget,
        max_drop,
        scheme,
        out,
        validation,
        metric,
        backend,
        exclude or [],
        allow_float,
        as_json,
        trust,
    )


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="the reference: an artefact, or a model as for quantize")],
    second: Annotated[str, typer.Argument(help="what is held against it, likewise")],
    inputs: Annotated[str, typer.Option("--inputs", help="data, as --calibration of quantize")],
    min_sqnr: MinSqnr = None,
    metric: MetricName = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", help="of the metric, from A to B; exit code 2 if more is lost")
    ] = None,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Run two models or artefacts on the same data and say how close their outputs are."""
    if not _commands().compare(first, second, inputs, min_sqnr, metric, max_drop, as_json, trust):
        raise typer.Exit(2)


@app.command()
def profile(
    path: Annotated[str, typer.Argument(help="an artefact, or a model as for quantize")],
    inputs: Annotated[str, typer.Option("--inputs", help="data, as --calibration of quantize; the first batch counts")],
    reference: Annotated[str | None, typer.Option("--reference", help="another one, timed in turns with it")] = None,
    callers: Annotated[list[int] | None, typer.Option("--callers", help="threads at once; repeatable")] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="calls that count")] = 50,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Measure what a program takes: time and its parts, callers at once, memory, work, energy."""
    _commands().profile(path, inputs, reference, callers or [1, 2], rounds, as_json, trust)


@app.command()
def run(
    path: Annotated[Path, typer.Argument(help="an artefact that quantize wrote")],
    inputs: Annotated[str, typer.Option("--inputs", help="as --calibration of quantize")],
    trust: Trust = False,
) -> None:
    """Run a saved artefact on inputs and print the shape and range of each output."""
    _commands().run(path, inputs, trust)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, what this machine can do, and what is missing for the rest; exit code 2 if too much is."""
    if not _commands().doctor(as_json):
        raise typer.Exit(2)


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
