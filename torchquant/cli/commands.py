"""What the commands of `torchquant` do; `cli.py` says how they are written, and imports this when one runs."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import asdict
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
from torchquant.cli import output, sources
from torchquant.cli.doctor import diagnose
from torchquant.errors import InputError
from torchquant.files import archive
from torchquant.lowering.target import Target, brief
from torchquant.measure.metric import check_metric, scored
from torchquant.measure.profile import profile as make_profile
from torchquant.measure.verify import compare as compare_models
from torchquant.precision.control import quantize_within
from torchquant.precision.search import search as make_search
from torchquant.quantizers.mixed import MixedPrecisionQuantizer
from torchquant.reporting.saved import Saved, read_report, saved_report
from torchquant.reporting.terminal import report as make_report

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


@output.alone
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
    validation: str | None,
    metric: str | None,
    max_drop: float | None,
    plan: Path | None,
    min_sqnr: float | None,
    report: Path | None,
    as_json: bool,
    trust: bool,
) -> bool:
    """Quantize, prove and write; whether each output's SQNR is what was asked for. See `torchquant quantize --help`."""
    for name in backends:
        _target(name)
    _check_places(report)
    chosen, judge = _algorithms(algorithms), _metric(metric, max_drop)
    paths = _outputs(out, backends)
    batches = sources.load_batches(calibration)
    held_out = None if validation is None else sources.load_batches(validation)
    shapes = _dynamic_first(batches[0], max_batch) if dynamic_batch or max_batch is not None else None
    float_model = flow.export(sources.load_model(model, trust=trust, inputs=batches), batches[0], dynamic_shapes=shapes)
    quantizers = [_quantizer(name, scheme, exclude, plan) for name in backends]
    options: dict[str, Any] = {"algorithms": chosen, "validation": held_out, "progress": not output.quiet}
    converted, told = _converted(float_model, batches, quantizers, judge, max_drop, options)
    judged = batches[:8] if held_out is None else held_out
    programs, rows = [], []
    for name, graph, about in zip(backends, converted, told, strict=True):
        program = _lower(_target(name), graph, batches[0])
        program.save(paths[name])
        programs.append(program)
        row: dict[str, Any] = {"target": name, "path": str(paths[name]), "size_bytes": program.size_bytes}
        row["sqnr_db"] = compare_models(float_model, program, judged).sqnr_db
        row["measured_on"] = f"{len(judged)} batches of {validation or 'the calibration data'}"
        row |= {} if judge is None else {"metric": scored(judge, program, f"the program for {name}")}
        rows.append(row)
        if not as_json:
            print(make_report(graph, program))
            print(_row_text(row), f"{about}\n", sep="\n")
    if report is not None:
        make_report(converted[0], programs).save(report)
    if as_json:
        output.as_json({"programs": rows})
    return min_sqnr is None or all(row["sqnr_db"] >= min_sqnr for row in rows)


def _converted(
    float_model: GraphModule,
    batches: list[Any],
    quantizers: list[Any],
    judge: Any,
    max_drop: float | None,
    options: dict[str, Any],
) -> tuple[list[GraphModule], list[str]]:
    """The quantized graph for each Quantizer, and what is to be told of each."""
    if judge is None or max_drop is None:
        judging = {"metric": judge} if options["algorithms"] else {"validation": None}
        graphs = flow.quantize(float_model, batches[0], batches, quantizer=quantizers, **(options | judging))
        return graphs, [""] * len(graphs)
    controlled = [
        quantize_within(float_model, batches[0], batches, quantizer=q, metric=judge, max_drop=max_drop, **options)
        for q in quantizers
    ]
    return [one.quantized for one in controlled], [str(one) for one in controlled]


def _row_text(row: dict[str, Any]) -> str:
    metric = f", metric {row['metric']:.6g}" if "metric" in row else ""
    level = f"{row['sqnr_db']:.1f} dB against float on {row['measured_on']}"
    return f"{row['target']}: {level}{metric}; written to {row['path']}"


@output.alone
def report(path: Path, out: Path | None, as_json: bool) -> None:
    """Account for every op of a saved artefact or graph, or show a saved report again."""
    if path.suffix.lower() == ".json":
        output.show(read_report(path), out, as_json)
        return
    if serialize.is_graph(path):
        output.show(make_report(serialize.load(path)), out, as_json)
        return
    made_for = _target_of(path)
    if made_for.is_code:  # what it says of itself; the program is not loaded, for that would run it
        about, size = read_metadata(path, made_for.name), path.stat().st_size
        output.show(saved_report(Saved(made_for.name, size, about.sites, about.proof, about.facts)), out, as_json)
    else:
        output.show(saved_report(_load(path, trust=False)), out, as_json)


@output.alone
def preview(
    model: str,
    calibration: str,
    backend: str,
    exclude: list[str],
    scheme: str | None,
    trust: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Account for every op of a float model before any calibration."""
    batches = sources.load_batches(calibration)
    exported = flow.export(sources.load_model(model, trust=trust, inputs=batches), batches[0])
    prepared = flow.prepare(exported, _quantizer(backend, scheme, exclude, None))
    output.show(make_report(prepared), out, as_json)


@output.alone
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
    metric: str | None,
    max_drop: float | None,
    as_json: bool,
    trust: bool,
) -> bool:
    """Say where the error comes from; whether the output's SQNR and the metric are what was asked for."""
    _check_places(report)
    judge = _metric(metric, max_drop)
    chosen, batches = _algorithms(algorithms), sources.load_batches(calibration)
    judged = batches if validation is None else sources.load_batches(validation)
    exported = flow.export(sources.load_model(model, trust=trust, inputs=batches), batches[0])
    prepared = flow.prepare(exported, _quantizer(backend, scheme, exclude, None))
    calibrate(prepared, batches, progress=not output.quiet)
    if chosen:
        held_out = None if validation is None else judged
        flow.optimize(prepared, batches, chosen, validation=held_out, progress=not output.quiet)
    with output.status("analyzing"):
        analysis = make_analysis(prepared, judged)
    if report is not None:
        make_report(prepared, analysis=analysis).save(report)
    values = [] if judge is None else [scored(judge, exported, "the float model"), flow.score_of(prepared, judge)]
    if as_json:
        told = {} if judge is None else {"float_metric": values[0], "metric": values[1]}
        output.as_json({**analysis.to_dict(), **told})
    else:
        print(analysis)
        print(f"measured on {'the calibration data' if validation is None else validation}")
        if judge is not None:
            print(f"metric: float {values[0]:.6g}, quantized {values[1]:.6g}")
    kept = max_drop is None or values[0] - values[1] <= max_drop
    return kept and (min_sqnr is None or analysis.output_db >= min_sqnr)


@output.alone
def search(
    model: str,
    calibration: str,
    budget: str | None,
    max_drop: float | None,
    schemes: list[str],
    out: Path,
    validation: str | None,
    metric: str | None,
    backend: str,
    exclude: list[str],
    allow_float: bool,
    as_json: bool,
    trust: bool,
) -> None:
    """Search a plan and write it."""
    if (budget is None) == (max_drop is None):
        raise InputError(
            "search takes a budget (--budget 4.5bpw) or what a metric may lose (--max-drop 0.5), one of them"
        )
    _check_places(out)
    judge, quantizer = _metric(metric, max_drop), _target(backend).quantizer_class()
    batches = sources.load_batches(calibration)
    held_out = None if validation is None else sources.load_batches(validation)
    exported = flow.export(sources.load_model(model, trust=trust, inputs=batches), batches[0])
    options = {"exclude": exclude} if exclude else {}
    with output.status("searching"):
        found = make_search(
            exported, batches, quantizer, schemes, validation=held_out, allow_float=allow_float, options=options
        )
        if budget is not None:
            plan = found.plan(budget, metric=judge)
        else:
            assert judge is not None
            assert max_drop is not None
            plan = found.within(judge, max_drop)
    plan.save(out)
    if as_json:
        output.as_json({"path": str(out), **plan.about})
    else:
        print("\n".join(f"{name}: {value}" for name, value in plan.about.items()))
        print(f"written to {out}")


@output.alone
def compare(
    first: str,
    second: str,
    inputs: str,
    min_sqnr: float | None,
    metric: str | None,
    max_drop: float | None,
    as_json: bool,
    trust: bool,
) -> bool:
    """Hold one model or artefact against another; whether it is as close as was asked for."""
    judge, batches = _metric(metric, max_drop), sources.load_batches(inputs)
    models = [_model_or_program(path, trust) for path in (first, second)]
    compared = compare_models(models[0], models[1], batches)
    values = [] if judge is None else [scored(judge, m, p) for m, p in zip(models, (first, second), strict=True)]
    rows = {"sqnr_db": compared.sqnr_db, "agreement": compared.agreement, "max_abs": compared.max_abs}
    rows |= {"first_metric": values[0], "second_metric": values[1]} if values else {}
    if as_json:
        output.as_json({**rows, "batches": len(batches), "outputs": [asdict(o) for o in compared.outputs]})
    else:
        print(f"{second} against {first}, on {len(batches)} batches of {inputs}")
        print("\n".join(f"  {name}: {value:.6g}" for name, value in rows.items()))
        several = compared.outputs if len(compared.outputs) > 1 else ()
        for i, one in enumerate(several):
            print(
                f"  output {i}: {one.sqnr_db:.2f} dB, largest difference {one.max_abs:.4g}, {one.agreement:.2%} agree"
            )
    kept = max_drop is None or values[0] - values[1] <= max_drop
    return kept and (min_sqnr is None or compared.sqnr_db >= min_sqnr)


@output.alone
def profile(
    path: str, inputs: str, reference: str | None, callers: list[int], rounds: int, as_json: bool, trust: bool
) -> None:
    """Measure what a program takes."""
    other = None if reference is None else _model_or_program(reference, trust)
    batch = sources.load_batches(inputs)[0]
    with output.status("measuring"):
        measured = make_profile(_model_or_program(path, trust), batch, reference=other, callers=callers, rounds=rounds)
    output.show(measured, None, as_json)


def run(path: Path, inputs: str, trust: bool) -> None:
    """Run a saved artefact on inputs and print the shape and range of each output."""
    program = _load(path, trust)
    for i, batch in enumerate(sources.load_batches(inputs)):
        for j, value in enumerate(pytree.tree_leaves(data.call(program, batch))):
            if not isinstance(value, torch.Tensor) or not value.numel():
                shown = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
                print(f"batch {i} output {j}: {shown}")
                continue
            of, values = (" magnitude", value.abs()) if value.is_complex() else ("", value)
            low, high = values.double().aminmax()
            print(f"batch {i} output {j}: shape {tuple(value.shape)}{of} from {float(low):.4g} to {float(high):.4g}")


def targets() -> None:
    """Which op runs in which scheme on which target, and why the others do not."""
    for name in names():
        of = target(name)
        table = Table("op", "schemes", "condition, or why it stays float", title=f"{name} ({of.suffix})", expand=False)
        for row in of.capabilities:
            table.add_row(row.op, brief(row.schemes) or "float", row.reason)
        Console().print(table)


def doctor(is_json: bool) -> bool:
    """Say what is there and what is not; returns whether what is needed is."""
    found = diagnose()
    if is_json:
        output.as_json(found.to_dict())
    else:
        found.show(Console())
    return found.is_right


def _target(name: str) -> Target:
    if name not in names():
        raise InputError(f"there is no backend {name!r}; choose from {', '.join(names())}")
    backend: Target = target(name)
    return backend


def _quantizer(name: str, scheme: str | None, exclude: list[str], plan: Path | None) -> Any:
    """The target's Quantizer, or one that follows a plan."""
    made = _target(name).quantizer_class()
    if plan is None:
        return made(scheme, exclude=exclude)
    if scheme is not None:
        raise InputError("the plan says which scheme each weight gets: leave --scheme out")
    return MixedPrecisionQuantizer(made, plan, **({"exclude": exclude} if exclude else {}))


def _metric(reference: str | None, max_drop: float | None) -> Any:
    """The user's metric, or None."""
    if reference is None:
        if max_drop is not None:
            raise InputError("--max-drop bounds what a metric loses: give --metric package.module:function, too")
        return None
    if max_drop is not None and not 0 <= max_drop < math.inf:
        raise InputError(f"--max-drop is how much the metric may lose, a number from 0 on, not {max_drop}")
    metric = sources.resolve(reference)
    check_metric(metric)
    return metric


def _model_or_program(reference: str, trust: bool) -> Any:
    """An artefact, a saved graph, or a float model, by its path or `package.module:name`."""
    path = Path(reference)
    if not path.is_file():
        return sources.load_model(reference, trust=trust).eval()
    if path.suffix == ".pt2" and not archive.is_ours(path):
        return sources.load_model(reference, trust=trust)
    return serialize.load(path) if serialize.is_graph(path) else _load(path, trust)


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


def _check_places(*files: Path | None) -> None:
    """Raise InputError before the work where what is asked for could not be written after it."""
    for file in files:
        if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK)):
            raise InputError(f"cannot write {file}: its folder is not there or not writable, or it is a folder itself")


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
        print(f"{made_for}: {said}", file=sys.stderr)
    program: Program = made_for.backend().lower(graph, batch, **options, progress=not output.quiet)
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
