"""What `tables.py` says of `results/gpu.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Table", "machine_code", "ratios", "tables"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A title, what to know about the numbers, and the numbers; no columns: text alone."""

    title: str
    note: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def tables(results: Row) -> list[Table]:
    """All that was measured, section by section."""
    gaps = [r for r in results["rows"] if "skipped" in r or "missing" in r]
    measured = [r for r in results["rows"] if r not in gaps]
    by_section = {s: [r for r in measured if r["section"] == s] for s in _SECTIONS}
    section_tables = [_SECTIONS[s](rows) for s, rows in by_section.items() if rows]
    profiled = [r for r in measured if r.get("kernels")]
    if profiled:
        section_tables.append(_profile(profiled))
    if gaps:
        rows = [[r["section"], r["case"], r["format"], r["runtime"], _rows(r), _why(r)] for r in gaps]
        section_tables.append(Table("Not measured", "", ("section", "case", "format", "runtime", "rows", "why"), rows))
    return section_tables


def machine_code(results: Row) -> Table:
    """What the GPU kernels compile to."""
    head = ["format", "rows", "kernel", "tile (rows x outputs x inputs)", "registers", "spilled", "shared KB"]
    head += ["instructions a weight", "tensor core"]
    cells = [
        [
            f"`{r['format']}`",
            str(r["rows"]),
            f"`{r['kernel']}`",
            r["tile"],
            str(r["registers"]),
            str(r["spilled_bytes"]),
            f"{r['shared_bytes'] / 1024:.0f}",
            f"{r['instructions_a_weight']:.2f}",
            f"`{r['tensor_core']}`",
        ]
        for r in results["rows"]
    ]
    return Table("Machine code", "", head, cells)


def _rows(row: Row) -> str:
    return str(row["m"] or "")


def _why(row: Row) -> str:
    return str(row.get("skipped") or row["missing"]).replace("|", "\\|")


def _ceilings(rows: list[Row]) -> Table:
    parts = [
        f"copying {r['per_s'] / 1e12:.2f} TB/s (read and written)"
        if r["case"] == "copy"
        else f"{r['case']} products {r['per_s'] / 1e12:.0f} T operations/s"
        for r in rows
    ]
    return Table("What the chip does", f"Measured in the same run: {', '.join(parts)}.")


def _checks(rows: list[Row]) -> Table:
    body = []
    for format in dict.fromkeys(r["format"] for r in rows):
        mine = [r for r in rows if r["format"] == format]
        wrong = [r["case"] for r in mine if not r.get("right")]
        worst = max(float(r["worst_error"]) for r in mine)
        body.append([format, ", ".join(r["case"] for r in mine), f"{worst:.1e}", ", ".join(wrong) or "none"])
    note = "The largest relative error of any row of an output, against float64 on the same codes; 1e-2 is allowed."
    return Table("Checks", note, ("format", "inputs", "worst error", "wrong"), body)


def _layers(rows: list[Row]) -> Table:
    sizes = sorted({r["m"] for r in rows})
    body = []
    for layer, format, runtime in dict.fromkeys((r["case"], r["format"], r["runtime"]) for r in rows):
        mine = {r["m"]: r for r in rows if (r["case"], r["format"], r["runtime"]) == (layer, format, runtime)}
        first = next(iter(mine.values()))
        cells = [_layer_cell(mine[m]) if m in mine else "" for m in sizes]
        body.append([f"{layer} ({first['n']} x {first['k']})", format, runtime, *cells])
    note = (
        "Microseconds; how many times as fast as cuBLAS in bfloat16; how much of the bound. The bound is the longer of "
        "bytes at the speed of copying and operations at that of a large product. Columns: rows of activations."
    )
    return Table("Layers of Llama 3", note, ("layer", "format", "runtime", *map(str, sizes)), body)


def ratios(results: Row) -> Table:
    """Of our layers: how many times as fast as cuBLAS in bfloat16, by format and rows of activations."""
    mine = [r for r in results["rows"] if r["section"] == "layers" and r["runtime"] == "torchquant" and "ratio" in r]
    sizes = sorted({r["m"] for r in mine})
    times = {(r["format"], r["case"], r["m"]): f"{r['ratio']:.2f}" for r in mine}
    body = [
        [f"`{format}`", layer, *(times.get((format, layer, m), "") for m in sizes)]
        for format, layer in sorted({(r["format"], r["case"]) for r in mine})
    ]
    return Table("", "", ("format", "layer", *map(str, sizes)), body)


def _layer_cell(row: Row) -> str:
    bound = f"; {100 * row['of_bound']:.0f} %" if "of_bound" in row else ""
    return f"{row['us']:.1f}; {row['ratio']:.2f}x{bound}"


def _end_to_end(rows: list[Row]) -> Table:
    head = ("", "format", "tokens/s", "ms", "to bfloat16", "weights GB", "seconds to quantize", "block's error")
    body = [
        [
            f"{r['case']}, {r['m']} tokens",
            r["format"],
            f"{r['tokens_per_s']:.0f}",
            f"{r['ms']:.3f}",
            f"{r['ratio']:.2f}x",
            f"{r['weight_bytes'] / 1e9:.2f}",
            f"{r['quantize_s']:.1f}" if r["format"] != "bf16" else "",
            f"{r['error']:.1e}" if r["format"] != "bf16" else "",
        ]
        for r in rows
    ]
    layers = {r["layers"] for r in rows}
    note = (
        f"Llama-3-8B's sizes, {', '.join(map(str, layers))} layers, random weights, compiled by torch.compile; each "
        "step is one CUDA graph. The error is that of the lowered block against the converted one."
    )
    return Table("A Llama end to end", note, head, body)


def _kernels(row: Row) -> str:
    return "; ".join(f"`{k['name']}` {k['count']} times, {k['us']:.0f} us" for k in row["kernels"][:5])


def _profile(rows: list[Row]) -> Table:
    body = []
    for r in rows:
        us, bound = r.get("us", 1e3 * r.get("ms", 0.0)), r.get("bound_us")
        body.append([r["case"], r["format"], _rows(r), f"{us:.1f}", f"{bound:.1f}" if bound else "", _kernels(r)])
    note = "A step of the Llama; and of our products with each number of rows, the one that is furthest from its bound."
    return Table("Where the time goes", note, ("", "format", "rows", "us", "bound us", "kernels"), body)


def _networks(rows: list[Row]) -> Table:
    body = [
        [
            r["case"],
            f"`{r['format']}`",
            str(r["samples"]),
            str(r["products"]),
            f"{r['sqnr_db']:.1f}",
            f"{r['sqnr_to_float_db']:.1f}",
            f"{r['float_us']:.0f}",
            f"{r['us']:.0f}",
            f"{r['ratio']:.2f}x",
        ]
        for r in rows
    ]
    head = ("network", "scheme", "samples", "products", "SQNR to converted, dB", "to float, dB", "float us", "us", "")
    note = "A batch in bfloat16, both compiled by torch.compile and replayed as a CUDA graph."
    return Table("Whole networks", note, head, body)


_SECTIONS = {
    "ceilings": _ceilings,
    "checks": _checks,
    "layers": _layers,
    "end to end": _end_to_end,
    "networks": _networks,
}
