"""Tables of docs/calibration.md, docs/robustness.md and docs/analysis.md, from what the studies measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpu_tables import Table

__all__ = [
    "calibration", "code_points", "code_stages", "code_theory", "mixed_precision", "profiles", "robustness", "targets",
]  # fmt: skip

Row = Mapping[str, Any]


def calibration(results: Row) -> Table:
    """For each network, kind of data and count: mean and range over the seeds."""
    head = ["network", "calibrated on", "samples", "seeds", "SQNR dB", "metric", "to float"]
    rows = []
    for (network, data, count), group in _groups(results["rows"], ("network", "data", "samples")):
        deltas = [row["metric"] - row["float_metric"] for row in group]
        rows.append(
            [
                network,
                data,
                str(count),
                str(len(group)),
                _spread([float(row["sqnr_db"]) for row in group], ".1f"),
                f"{_mean(row['metric'] for row in group):.2f} {group[0]['metric_name']}",
                _spread(deltas, "+.2f"),
            ]
        )
    return Table("Calibration", _about(results), head, rows)


def robustness(results: Row) -> Table:
    """For each network, change and strength: metric and agreement of each model."""
    models = ("float", "int8", "4 bits")
    head = [
        "network", "change", "strength", *(f"metric, {m}" for m in models), "agreement, int8", "agreement, 4 bits",
        *(f"calibration error, {m}" for m in models),
    ]  # fmt: skip
    rows = []
    for (network, change, strength), group in _groups(results["rows"], ("network", "change", "strength")):
        by = {row["model"]: row for row in group}
        if set(by) != set(models):
            continue
        rows.append(
            [
                network,
                change,
                "" if change == "none" else f"{strength:g}",
                *(f"{by[m]['metric']:.1f}" for m in models),
                *(f"{by[m]['agreement']:.1f} %" for m in models[1:]),
                *(f"{by[m]['calibration_error']:.1f} %" if "calibration_error" in by[m] else "" for m in models),
            ]
        )
    return Table("Robustness", _about(results), head, rows)


def mixed_precision(results: Row) -> Table:
    """For each network and seed: the uniform plan and the mixed one."""
    head = ["network", "seed", "bytes, uniform", "bytes, mixed", "dB, uniform", "dB, mixed", "metric, uniform",
            "metric, mixed", "float"]  # fmt: skip
    rows = []
    for (network, seed), group in _groups(results["rows"], ("network", "seed")):
        by = {row["plan"]: row for row in group}
        if set(by) != {"uniform", "mixed"}:
            continue
        one, two = by["uniform"], by["mixed"]
        rows.append(
            [
                network,
                str(seed),
                f"{one['weight_bytes']:,}",
                f"{two['weight_bytes']:,}" + (" (uniform kept)" if two["kept"] else ""),
                f"{float(one['sqnr_db']):.2f}",
                f"{float(two['sqnr_db']):.2f}",
                f"{one['metric']:.2f}",
                f"{two['metric']:.2f}",
                f"{one['float_metric']:.2f}",
            ]
        )
    return Table("Mixed precision", _about(results), head, rows)


def profiles(results: Row) -> Table:
    """For each network and program: time, and how much of it the parts that were measured make up."""
    head = ["network", "program", "median ms", "p99 ms", "float ms", "parts of the whole", "int8 GOP", "float GOP",
            "CPU s a call", "load average"]  # fmt: skip
    rows = [
        [
            row["network"],
            row["program"],
            f"{row['median_ms']:.2f}",
            f"{row['p99_ms']:.2f}",
            f"{row['float_ms']:.2f}",
            f"{row['parts_ms']:.2f} of {row['whole_ms']:.2f} ms ({row['parts_ms'] / row['whole_ms']:.0%})",
            f"{row['int_operations'] / 1e9:.2f}",
            f"{row['float_operations'] / 1e9:.2f}",
            f"{row['cpu_seconds']:.4f}",
            f"{row['load']:.1f}",
        ]
        for row in results["rows"]
    ]
    return Table("Profiles", _about(results), head, rows)


def targets(results: Row) -> Table:
    """For each network, target and peer: what runs in integers, how close it is, what it takes."""
    head = [
        "network", "target", "int8 ops", "dB to converted", "as it stands", "dB to float", "metric", "float metric",
        "bytes", "ms", "outcome",
    ]  # fmt: skip
    return Table("Targets", _about(results), head, [_target_cells(row) for row in results["rows"]])


def _target_cells(row: Row) -> list[str]:
    def number(field: str, form: str) -> str:
        value = row.get(field)
        return "" if value is None else value if isinstance(value, str) else format(value, form)

    alone = f" ({row['file_ms']:.2f})" if "file_ms" in row else ""
    outcome = (
        f"{row['outcome']}: {row['reason']}" if "reason" in row else f"{row['outcome']}, {row.get('proof', 'peer')}"
    )
    return [
        row["network"],
        row["target"],
        row.get("ops", ""),
        number("converted_db", ".1f"),
        row.get("translated", "").partition(" dB")[0],
        number("float_db", ".1f"),
        f"{row['metric']:.2f} {row['metric_name']}" if "metric" in row else "",
        number("float_metric", ".2f"),
        number("bytes", ","),
        f"{number('median_ms', '.2f')}{alone}",
        outcome.replace("|", "/"),
    ]


def _groups(rows: Sequence[Row], fields: Sequence[str]) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Rows with the same values of the fields, in the order in which these first come."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[field] for field in fields), []).append(row)
    return list(groups.items())


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _spread(values: Sequence[float], form: str) -> str:
    """The mean, and the least and the most."""
    if len(values) == 1:
        return format(values[0], form)
    return f"{statistics.fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _about(results: Row) -> str:
    return f"{results['cpu']}; {results['date']}" if results["rows"] else "not measured yet"


def code_theory(results: Row) -> Table:
    """Scalar codes of known sources: dB above the limit at 1 to 4 bits."""
    rows = [row for row in results["rows"] if row["kind"] == "theory"]
    limit = {(row["source"], row["rate"]): row["mse"] for row in rows if row["code"] == "limit"}
    head = ["source", "code", *(f"{rate} bits" if rate > 1 else "1 bit" for rate in (1, 2, 3, 4))]
    table = []
    for (source, code), group in _groups(rows, ("source", "code")):
        cells = [f"{row['mse']:.4g} ({_above(row['mse'], limit[source, row['rate']])})" for row in group]
        table.append([source, code, *cells])
    return Table("Theory", _about(results), head, table)


def code_points(results: Row) -> Table:
    """Every format: exact bits and dB above the Gaussian limit, on Gaussian and on real weights, the nearest first."""
    rows = [row for row in results["rows"] if row["kind"] == "format"]
    sources = list(dict.fromkeys(row["source"] for row in rows))
    table = []
    for (code,), group in _groups(rows, ("code",)):
        gaps = {row["source"]: row["gap_db"] for row in group}
        rate = group[0]["rate"]
        table.append((rate, [code, f"{rate:.3f}", *(f"{gaps[s]:.2f}" if s in gaps else "" for s in sources)]))
    ordered = [cells for _, cells in sorted(table, key=lambda item: (math.floor(item[0]), float(item[1][2] or "inf")))]
    return Table("Formats", _about(results), ["format", "bits a weight", *(f"dB above, {s}" for s in sources)], ordered)


def code_stages(results: Row) -> Table:
    """The same bits spent in one, two or three stages."""
    rows = [row for row in results["rows"] if row["kind"] == "stages"]
    sources = list(dict.fromkeys(row["source"] for row in rows))
    table = []
    for (rate, code), group in _groups(rows, ("rate", "code")):
        gaps = {row["source"]: row["gap_db"] for row in group}
        table.append([f"{rate:g}", code, *(f"{gaps[s]:.2f}" for s in sources)])
    return Table("Stages", _about(results), ["bits", "code", *(f"dB above, {s}" for s in sources)], table)


def _above(mse: float, limit: float) -> str:
    return f"{10 * math.log10(mse / limit):+.2f} dB"
