"""Write docs/results.md from the result files, and tables into pages of docs/.

python benchmarks/tables.py
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import gpu_tables
import language_tables
import qat_tables
import records
import study_tables

from torchquant.backends import executorch_xnnpack, inductor_cuda, inductor_x86, onnx_qdq, openvino
from torchquant.files.whole import write_whole
from torchquant.lowering.target import brief
from torchquant.types import Capability

ROOT = Path(__file__).resolve().parents[1]
MARKERS = ("<!-- capabilities -->", "<!-- /capabilities -->")
ALGORITHM_MARKERS = ("<!-- algorithms -->", "<!-- /algorithms -->")
MEMORY_MARKERS = ("<!-- memory -->", "<!-- /memory -->")
LAYER_MARKERS = ("<!-- gpu layers -->", "<!-- /gpu layers -->")
CODE_MARKERS = ("<!-- machine code -->", "<!-- /machine code -->")
PERPLEXITY_MARKERS = ("<!-- perplexity -->", "<!-- /perplexity -->")
ENCODER_MARKERS = ("<!-- encoders -->", "<!-- /encoders -->")
DECODING_MARKERS = ("<!-- decoding -->", "<!-- /decoding -->")
REPRODUCTION_MARKERS = ("<!-- reproduction -->", "<!-- /reproduction -->")
QAT_MARKERS = ("<!-- qat -->", "<!-- /qat -->")
SCHEME_MARKERS = ("<!-- schemes -->", "<!-- /schemes -->")
TARGETS = {
    "x86 (Inductor)": inductor_x86.CAPABILITIES,
    "NVIDIA GPUs (Inductor)": inductor_cuda.CAPABILITIES,
    "XNNPACK (ExecuTorch)": executorch_xnnpack.CAPABILITIES,
    "ONNX Runtime (CPU)": onnx_qdq.CAPABILITIES,
    "OpenVINO (CPU)": openvino.CAPABILITIES,
}
Row = dict[str, Any]


def main() -> None:
    """Write all pages that have tables."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = ROOT / "docs" / "results.md"
    _write(
        results,
        "\n\n".join(
            [
                "# Results",
                *_accuracy(records.read("accuracy")),
                *_latency(records.read("cpu")),
                *_profile(records.read("profile")),
                *_zoo(records.read("zoo"), records.read("executorch_suite")),
                *_gpu(records.read("gpu")),
            ]
        ),
    )
    page = ROOT / "docs" / "algorithms.md"
    text = _between(page.read_text(encoding="utf-8"), ALGORITHM_MARKERS, algorithms(records.read("accuracy")))
    _write(page, _between(text, MEMORY_MARKERS, memory(records.read("memory"))))
    page = ROOT / "docs" / "gpu.md"
    text = _between(page.read_text(encoding="utf-8"), SCHEME_MARKERS, gpu_schemes(records.read("accuracy")))
    text = _between(text, LAYER_MARKERS, _table(gpu_tables.ratios(records.read("gpu"))))
    _write(page, _between(text, CODE_MARKERS, _table(gpu_tables.machine_code(records.read("gpu_code")))))
    page = ROOT / "docs" / "language.md"
    table = language_tables.perplexities(records.read("language"))
    text = _between(page.read_text(encoding="utf-8"), PERPLEXITY_MARKERS, f"{_table(table)}\n\n{table.note}.")
    text = _between(text, REPRODUCTION_MARKERS, _table(language_tables.reproduction(records.read("language"))))
    table = language_tables.encoders(records.read("accuracy.intel-r-xeon-r-processor-2-cores"))
    text = _between(text, ENCODER_MARKERS, f"{_table(table)}\n\n{table.note}.")
    table = language_tables.decoding(records.read("decoding"))
    _write(page, _between(text, DECODING_MARKERS, f"{_table(table)}\n\n{table.note}."))
    page = ROOT / "docs" / "capabilities.md"
    _write(page, with_capabilities(page.read_text(encoding="utf-8")))
    page, table = ROOT / "docs" / "qat.md", qat_tables.training(records.read("qat"))
    text = page.read_text(encoding="utf-8")
    _write(page, _between(text, QAT_MARKERS, f"{_table(table)}\n\n{table.note}."))
    _write_studies()


def _write_studies() -> None:
    """Tables between `<!-- NAME -->` and `<!-- /NAME -->` of pages of docs/."""
    for page, name, table in (
        ("calibration.md", "calibration", study_tables.calibration(records.read("calibration_study"))),
        ("robustness.md", "robustness", study_tables.robustness(records.read("robustness"))),
        ("analysis.md", "mixed precision", study_tables.mixed_precision(records.read("mixed_precision"))),
        ("rate_distortion.md", "theory", study_tables.code_theory(records.read("rate_distortion"))),
        ("rate_distortion.md", "formats", study_tables.code_points(records.read("rate_distortion"))),
        ("rate_distortion.md", "stages", study_tables.code_stages(records.read("rate_distortion"))),
        ("targets.md", "targets", study_tables.targets(records.read("targets"))),
        ("analysis.md", "profiles", study_tables.profiles(records.read("program_profile"))),
    ):
        path = ROOT / "docs" / page
        markers = f"<!-- {name} -->", f"<!-- /{name} -->"
        _write(path, _between(path.read_text(encoding="utf-8"), markers, f"{_table(table)}\n\n{table.note}."))


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda part: part.write_text(text.rstrip() + "\n", encoding="utf-8"))
    print(f"{path.relative_to(ROOT)} written")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _table(table: gpu_tables.Table) -> str:
    return markdown(table.head, table.rows)


# capabilities -------------------------------------------------------------------------------------------------


def with_capabilities(page: str) -> str:
    """The page with a fresh table between the markers."""
    return _between(page, MARKERS, capabilities())


def _between(text: str, markers: tuple[str, str], table: str) -> str:
    start, end = markers
    return re.sub(f"{start}.*?{end}", lambda _: f"{start}\n{table}\n{end}", text, flags=re.DOTALL)


def capabilities() -> str:
    """Op by op, the schemes in which each target runs it, or why it stays float there."""
    tables = [{row.op: row for row in rows} for rows in TARGETS.values()]
    ops = sorted({op for table in tables for op in table}, key=lambda op: (_rank(op, tables), op))
    cells = [[f"`{op}`", *(_cell(op, table.get(op)) for table in tables)] for op in ops]
    return markdown(["op", *TARGETS], cells)


def _rank(op: str, tables: Sequence[dict[str, Capability]]) -> int:
    """Ops that more targets run in integers come first."""
    return -sum(bool(table[op].schemes) for table in tables if op in table)


def _cell(op: str, row: Capability | None) -> str:
    if row is None:
        moves = op in ("reshape", "slice")  # no kernel of their own
        return "moves values, whatever their type" if moves else "float: the compiler's own kernel"
    if not row.schemes:
        return f"float: {row.reason}"
    return brief(row.schemes) + (f" ({row.reason})" if row.reason else "")


# accuracy -----------------------------------------------------------------------------------------------------


def _accuracy(results: Row) -> list[str]:
    parts = ["## Accuracy", _about(results, "accuracy"), _ACCURACY_NOTE]
    for name in _distinct(results["rows"], "network"):
        rows = [r for r in results["rows"] if r["network"] == name]
        first = next((r for r in rows if "metric" in r), None)
        if first is None:
            continue
        parts.append(
            f"### {name}: float {first['metric_name']} {first['float_metric']:.2f}\n\n"
            f"{first['calibration_samples']} samples for calibration, {first['held_out_samples']} held out."
        )
        head = [
            "Quantizer",
            "algorithms",
            "measured",
            "int8 ops",
            "SQNR dB",
            first["metric_name"],
            "to float",
            "bytes",
            "delegates",
        ]
        parts.append(markdown(head, [_accuracy_cells(r) for r in rows]))
        parts += [f"{r['quantizer']}: first refused: {r['refusal']}" for r in rows if r.get("refusal")]
    return parts


_ACCURACY_NOTE = (
    "Every Quantizer saw the same calibration samples. SQNR is that of the outputs against the float network's; "
    "it means little without the share of compute ops in int8 beside it. `delegates`: calls to the XNNPACK delegate."
)


def _accuracy_cells(row: Row) -> list[str]:
    if "error" in row:
        return [
            row["quantizer"],
            row["algorithm"],
            row["artefact"],
            row.get("coverage", ""),
            row["error"],
            "",
            "",
            "",
            "",
        ]
    size, calls = row.get("size_bytes"), row.get("delegate_calls")
    return [
        row["quantizer"],
        row["algorithm"],
        row["artefact"],
        row["coverage"],
        _number(row["sqnr_db"], ".2f"),
        f"{row['metric']:.2f}",
        f"{row['delta']:+.2f}",
        f"{size:,}" if size else "",
        str(calls) if calls else "",
    ]


# algorithms ---------------------------------------------------------------------------------------------------


def algorithms(results: Row) -> str:
    """Every converted graph measured with an algorithm, beside the plain one."""
    rows = [r for r in results["rows"] if r["artefact"] == "converted graph" and "metric" in r]
    tried = {(r["network"], r["quantizer"]) for r in rows if r["algorithm"] != "none"}
    rows = [r for r in rows if (r["network"], r["quantizer"]) in tried]
    order = {key: i for i, key in enumerate(dict.fromkeys((r["network"], r["quantizer"]) for r in rows))}
    rows.sort(key=lambda r: (order[r["network"], r["quantizer"]], r["algorithm"] != "none"))
    head = ["network", "Quantizer", "algorithms", "samples seen", "SQNR dB", "metric"]
    head += ["to float", "agreement %", "seconds", "peak GB"]
    return markdown(head, [_algorithm_cells(r) for r in rows])


def _algorithm_cells(row: Row) -> list[str]:
    peak, agreement = row.get("peak_bytes"), row.get("agreement")
    not_kept = f" (not kept: {', '.join(row['not_kept'])})" if row.get("not_kept") else ""
    return [
        row["network"],
        row["quantizer"],
        row["algorithm"] + not_kept,
        str(row["calibration_samples"]),
        _number(row["sqnr_db"], ".2f"),
        f"{row['metric']:.2f}",
        f"{row['delta']:+.2f}",
        f"{agreement:.2f}" if agreement is not None and row["metric_name"].startswith("top") else "",
        f"{row['seconds']:.0f}",
        f"{peak / 1e9:.2f}" if peak else "",
    ]


def gpu_schemes(results: Row) -> str:
    """What each scheme of `CudaQuantizer` costs, network by network."""
    mine = "CudaQuantizer "
    rows = [r for r in results["rows"] if r["quantizer"].startswith(mine) and "metric" in r]
    networks = list(dict.fromkeys(r["network"] for r in rows))
    rows.sort(key=lambda r: networks.index(r["network"]))
    head = ["network", "scheme", "algorithms", "quantized ops", "SQNR dB", "metric", "", "to float"]
    cells = [
        [
            r["network"],
            f"`{r['quantizer'].removeprefix(mine)}`",
            r["algorithm"],
            r["coverage"],
            _number(r["sqnr_db"], ".1f"),
            r["metric_name"],
            f"{r['metric']:.2f}",
            f"{r['delta']:+.2f}",
        ]
        for r in rows
    ]
    return markdown(head, cells)


def memory(results: Row) -> str:
    """What algorithms added to the memory of the process, against the bound."""
    head = ["network", "algorithm", "budget MB", "bound MB", "added MB", "on disk MB"]
    fields = ("budget_bytes", "bound_bytes", "added_bytes", "spilled_bytes")
    rows = [[r["network"], r["algorithm"], *(f"{r[f] / 1e6:.0f}" for f in fields)] for r in results["rows"]]
    return markdown(head, rows)


# latency ------------------------------------------------------------------------------------------------------


def _latency(results: Row) -> list[str]:
    parts = ["## Latency on a CPU", _about(results, "cpu"), _LATENCY_NOTE]
    for name in _distinct(results["rows"], "network"):
        rows = [r for r in results["rows"] if r["network"] == name]
        settings = sorted({(r["batch"], r["threads"]) for r in rows})
        head = ["runtime", "int8 ops", "SQNR dB", *(f"batch {b}, threads {t}" for b, t in settings)]
        body = [_latency_cells(r, rows, settings) for r in _distinct(rows, "runtime")]
        parts += [f"### {name}", markdown(head, body)]
    return parts


_LATENCY_NOTE = (
    "Milliseconds a call: median / minimum (interquartile range). All runtimes of a column were measured "
    "interleaved in one process, so compare within a column."
)


def _latency_cells(runtime: str, rows: Sequence[Row], settings: Sequence[tuple[int, int]]) -> list[str]:
    mine = {(r["batch"], r["threads"]): r for r in rows if r["runtime"] == runtime}
    first = mine[min(mine)]
    times = [_time(mine[s]) if s in mine else "" for s in settings]
    return [runtime, first["coverage"], _number(first["sqnr_db"], ".1f"), *times]


def _time(row: Row) -> str:
    return f"{row['median_ms']:.2f} / {row['min_ms']:.2f} ({row['iqr_ms']:.2f})"


# profile ------------------------------------------------------------------------------------------------------


def _profile(results: Row) -> list[str]:
    """Where the time of a program goes, kind by kind, beside the machine's bound."""
    parts = ["## Where the time goes on x86", _about(results, "profile_cpu"), _PROFILE_NOTE]
    for setting in dict.fromkeys((r["network"], r["batch"]) for r in results["rows"]):
        rows = [r for r in results["rows"] if (r["network"], r["batch"]) == setting]
        whole = next((r["measured_us"] for r in rows if r["kind"] == "whole program"), None)
        kinds = [k for k in _distinct(rows, "kind") if k != "whole program"]
        body = [_profile_cells(kind, [r for r in rows if r["kind"] == kind], whole) for kind in kinds]
        inside = sum(r.get("measured_us", 0.0) for r in rows if r["kind"] != "whole program")
        if whole is not None:
            body.append(["everything else", "", "", "", f"{whole - inside:.0f}", _share(whole - inside, whole), ""])
            body.append(["**whole program**", "", "", "", f"{whole:.0f}", "", ""])
        head = ["", "ops", "MMAC", "bound us", "measured us", "of the program", "of the bound"]
        parts += [f"### {setting[0]}, batch {setting[1]}, one thread", markdown(head, body)]
    return parts


_PROFILE_NOTE = (
    "The bound of an op is the longer of its multiply-accumulates at the peak rate of the CPU's int8 instruction "
    "(attention: of its float one) and its bytes at the bandwidth of the cache that holds them, both measured by "
    "`benchmarks/roofline.py`. Everything else: attention, embeddings, what Inductor compiles, calls and copies. "
    "Parts and whole are medians of separate runs, so that their difference may fall below zero."
)


def _profile_cells(kind: str, rows: Sequence[Row], whole: float | None) -> list[str]:
    macs, bound = (sum(r[f] for r in rows) for f in ("macs", "ideal_us"))
    measured = sum(r["measured_us"] for r in rows) if all("measured_us" in r for r in rows) else None
    ops = str(len(rows)) if macs else ""
    cells = [kind, ops, f"{macs / 1e6:.1f}" if macs else "", f"{bound:.0f}" if macs else ""]
    if measured is None:
        return [*cells, "", "", ""]
    return [*cells, f"{measured:.0f}", _share(measured, whole), _share(bound, measured) if macs else ""]


def _share(part: float, whole: float | None) -> str:
    return f"{100 * part / whole:.0f} %" if whole else ""


# zoo ----------------------------------------------------------------------------------------------------------


def _zoo(results: Row, suite: Row) -> list[str]:
    """What became of the models of `tests/zoo`, and of ExecuTorch's own tests; nothing where they were not run."""
    if not results["rows"]:
        return []
    ways = sorted({r["way"] for r in results["rows"]})
    families = _distinct(results["rows"], "family")
    body = [
        [f, *(_outcomes(r for r in results["rows"] if (r["family"], r["way"]) == (f, w)) for w in ways)]
        for f in families
    ]
    body.append(["**all**", *(_outcomes(r for r in results["rows"] if r["way"] == w) for w in ways)])
    parts = ["## A zoo of models", _about(results, "model_zoo"), _ZOO_NOTE, markdown(["family", *ways], body)]
    if suite["rows"]:
        head = ["part", "outcome", "tests", "reason"]
        body = [[r["part"], r["outcome"], str(r["tests"]), r["reason"]] for r in suite["rows"]]
        parts += [
            "### ExecuTorch's own tests with XnnpackQuantizer",
            _about(suite, "executorch_suite"),
            markdown(head, body),
        ]
    return parts


_ZOO_NOTE = (
    "Small models of distinct kinds on unseen inputs: right (every output, integers and states included, at most 3 dB "
    "further from float than the converted graph) / refused by an error that names the cause and a way out / other, of "
    "those that were run. `ours` is the target's torchquant Quantizer, `foreign` torchao's X86InductorQuantizer or "
    "ExecuTorch's XNNPACKQuantizer."
)


def _outcomes(rows: Iterable[Row]) -> str:
    kinds = [r["outcome"] for r in rows]
    right, refused = kinds.count("right"), kinds.count("refused")
    return f"{right} / {refused} / {len(kinds) - right - refused}" if kinds else ""


# GPU ----------------------------------------------------------------------------------------------------------


def _gpu(results: Row) -> list[str]:
    """Everything of `results/gpu.json`; nothing where no GPU was measured."""
    if not results["rows"]:
        return []
    parts = [f"## On an {results['gpu']}", f"{_about(results, 'gpu')} Triton {results['triton']}."]
    for table in gpu_tables.tables(results):
        parts += [f"### {table.title}", *([table.note] if table.note else [])]
        parts += [markdown(table.head, table.rows)] if table.head else []
    return parts


# all ----------------------------------------------------------------------------------------------------------


def _about(results: Row, name: str) -> str:
    """How the rows were made: commands, machine, versions, date."""
    if not results["rows"]:
        return f"Not measured yet: `python benchmarks/{name}.py`."
    commands = "\n".join(_distinct(results["rows"], "command"))
    versions = ", ".join(f"{package} {v}" for package, v in results["versions"].items())
    return f"```\n{commands}\n```\n{results['cpu']}; {versions}; {results['date']}."


def _distinct(rows: Iterable[Row], field: str) -> list[str]:
    return list(dict.fromkeys(row[field] for row in rows))


def _number(value: float | str, form: str) -> str:
    return value if isinstance(value, str) else format(value, form)


if __name__ == "__main__":
    main()
