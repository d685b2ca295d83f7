"""What `tables.py` says of `results/language.json` and `results/decoding.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gpu_tables import Table

__all__ = ["decoding", "encoders", "perplexities", "reproduction"]

Row = dict[str, Any]
_NEAREST = ("float", "nearest", "rotate_nearest", "hqq", "awq")
_ORDER = (*_NEAREST, "auto_round", "gptq_paper", "gptq_compensated", "gptq", "awq_gptq", "rotate_gptq")


def perplexities(results: Row) -> Table:
    """Method by method, the widest scheme first; what was not measured has no row."""
    models = list(dict.fromkeys(row["model"] for row in results["rows"]))
    rows = sorted(results["rows"], key=lambda r: _place(r, models))
    exact = {row["model"]: row["perplexity"] for row in rows if row["method"] == "float"}
    head = (
        "model",
        "scheme",
        "table and head",
        "method",
        "bits a weight",
        "perplexity",
        "of float's",
        "KL",
        "same top-1 %",
        "CPU seconds",
        "peak GB",
        "calibration",
    )
    about = f"{results['cpu']}; {results['date']}" if rows else ""
    return Table("Perplexity", about, head, [_cells(row, exact.get(row["model"])) for row in rows])


_GPTQ_README = "[GPTQ's README](https://github.com/IST-DASLab/gptq)"
_AWQ_PAPER = "[AWQ, table 4](https://arxiv.org/abs/2306.00978)"
# where, model, scheme, method, perplexity in float, with nearest codes, with the method
_PUBLISHED = (
    (_GPTQ_README, "LLaMA-7B", "4 bits, a scale an output", "GPTQ", 5.68, 6.29, 6.09),
    (_GPTQ_README, "LLaMA-7B", "3 bits, a scale an output", "GPTQ", 5.68, 25.54, 8.07),
    (_AWQ_PAPER, "Llama-2-7B", "4 bits, groups of 128", "GPTQ", 5.47, 5.73, 5.69),
    (_AWQ_PAPER, "Llama-2-7B", "4 bits, groups of 128", "AWQ", 5.47, 5.73, 5.60),
    (_AWQ_PAPER, "Llama-2-7B", "3 bits, groups of 128", "GPTQ", 5.47, 6.66, 6.43),
    (_AWQ_PAPER, "Llama-2-7B", "3 bits, groups of 128", "AWQ", 5.47, 6.66, 6.24),
)


def reproduction(results: Row) -> Table:
    """Published results and ours, by the share of the loss of nearest codes that a method takes away."""
    head = ("from", "model", "scheme", "method", "float", "nearest", "method", "loss taken away")
    plain = {
        (r["model"], r["scheme"], r["table"]): r["perplexity"] for r in results["rows"] if r["method"] == "nearest"
    }
    exact = {r["model"]: r["perplexity"] for r in results["rows"] if r["method"] == "float"}
    rows = list(_PUBLISHED)
    for row in sorted(results["rows"], key=lambda r: (r["model"], r["scheme"], _ORDER.index(r["method"]))):
        where = row["model"], row["scheme"], row["table"]
        numbers = exact.get(row["model"]), plain.get(where), row["perplexity"]
        if row["method"] in ("gptq_paper", "gptq", "awq", "hqq") and all(isinstance(n, float) for n in numbers):
            method = f"{row['method']}, {row['calibration'].split(' of ')[0]}".removesuffix(", none")
            rows.append(("here", row["model"], f"`{row['scheme']}`", method, *numbers))  # type: ignore[arg-type]
    return Table("Reproduction", "", head, [_reproduced(row) for row in rows])


def _reproduced(row: tuple[str, str, str, str, float, float, float]) -> list[str]:
    exact, nearest, reached = row[4:]
    share = 1 - math.log(reached / exact) / math.log(nearest / exact)
    return [*row[:4], *(f"{n:.2f}" for n in row[4:]), f"{100 * share:.0f} %"]


def encoders(results: Row) -> Table:
    """What few bits cost an encoder: rows of `accuracy.py` whose activations stay floats."""
    kind = "WeightOnlyQuantizer "
    rows = [r for r in results["rows"] if r["quantizer"].startswith(kind) and "metric" in r]
    rows = list(
        {
            (r["quantizer"], r["algorithm"], r["algorithm"] != "none" and r["calibration_samples"]): r for r in rows
        }.values()
    )
    rows.sort(key=lambda r: (-_width(r["quantizer"].removeprefix(kind)), r["quantizer"], r["algorithm"] != "none"))
    head = ("network", "scheme", "method", "sentences seen", "SQNR dB", "metric", "value", "to float", "CPU seconds")
    cells = [
        [
            r["network"],
            f"`{r['quantizer'].removeprefix(kind)}`",
            "nearest" if r["algorithm"] == "none" else r["algorithm"],
            "" if r["algorithm"] == "none" else str(r["calibration_samples"]),
            f"{r['sqnr_db']:.2f}",
            r["metric_name"],
            f"{r['metric']:.2f}",
            f"{r['delta']:+.2f}",
            f"{r['cpu_seconds']:.0f}",
        ]
        for r in rows
    ]
    return Table("Encoders", f"{results['cpu']}; {results['date']}" if rows else "", head, cells)


def decoding(results: Row) -> Table:
    """Tokens a second of each runtime, medians and ranges."""
    head = (
        "model",
        "runtime",
        "scheme",
        "threads",
        "busy beside",
        "decode, tokens/s",
        "prompt of 128, tokens/s",
        "file, MB",
        "GB/s",
        "load before",
    )
    rows = [
        [
            row["model"],
            row["runtime"],
            f"`{row['scheme']}`",
            str(row["threads"]),
            str(row["busy"]),
            f"{row['decode_tokens_s']:.1f} ({row['decode_range']})",
            f"{row['prompt_tokens_s']:.0f} ({row['prompt_range']})",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['bytes'] * row['decode_tokens_s'] / 1e9:.1f}",
            f"{row['load_before']:.1f}",
        ]
        for row in sorted(results["rows"], key=lambda r: (r["model"] != "SmolLM2-135M", r["threads"], r["busy"]))
    ]
    return Table("Decoding", f"{results['cpu']}; {results['date']}" if rows else "", head, rows)


def _place(row: Row, models: Sequence[str]) -> tuple[int, ...]:
    return models.index(row["model"]), -_width(row["scheme"]), -_width(row["table"]), _ORDER.index(row["method"])


def _width(scheme: str) -> int:
    """Bits of a scheme's weights: `w4_g64` has 4, `float32` has 32."""
    return int(scheme.removeprefix("float").removeprefix("w").split("_")[0].split("a")[0])


def _cells(row: Row, exact: Any) -> list[str]:
    undone = f" (not kept: {', '.join(row['not_kept'])})" if row.get("not_kept") else ""
    cells = [
        row["model"],
        f"`{row['scheme']}`",
        f"`{row['table']}`",
        row["method"] + undone,
        f"{row['bits_per_weight']:.2f}",
    ]
    cells += [_perplexity(row), _share(row["perplexity"], exact)]
    if row["kl_divergence"] is None:
        return [*cells, "", "", "", "", ""]
    compared = [f"{row['kl_divergence']:.4f}", f"{100 * row['top1_agreement']:.1f}"]
    return [*cells, *compared, f"{row['cpu_seconds']:.0f}", f"{row['peak_bytes'] / 1e9:.2f}", row["calibration"]]


def _share(value: Any, exact: Any) -> str:
    return f"{value / exact:.3g}" if isinstance(value, float) and isinstance(exact, float) else ""


def _perplexity(row: Row) -> str:
    value = row["perplexity"]
    return value if isinstance(value, str) else format(value, ".2f" if value < 1000 else ".3g")
