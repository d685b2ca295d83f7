"""What `benchmarks/language.py` measured is told in order, and what it did not measure is not told."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import language_tables

PLAIN = {"model": "Small", "calibration": "none", "tokens": 2044, "not_kept": []}
FLOAT = {
    **PLAIN,
    "method": "float",
    "scheme": "float32",
    "table": "float32",
    "bits_per_weight": 32.0,
    "kl_divergence": None,
}


def row(method, scheme, perplexity, **more):
    measured = {"bits_per_weight": 4.37, "kl_divergence": 0.5, "top1_agreement": 0.6, "cpu_seconds": 4.0}
    about = {"method": method, "scheme": scheme, "table": "w8", "perplexity": perplexity, "peak_bytes": 2_000_000_000}
    return {**PLAIN, **about, **measured, **more}


def test_wide_schemes_come_first_and_methods_in_the_order_of_their_effort():
    rows = [row("gptq", "w4_g64", 25.0), row("nearest", "w2_g64", 2e7), row("nearest", "w4_g64", 31.0)]
    rows.append({**FLOAT, "perplexity": 21.2})
    table = language_tables.perplexities({"cpu": "a CPU, 2 cores", "date": "2026-11-30", "rows": rows})
    told = [(cells[1], cells[3], cells[5], cells[6]) for cells in table.rows]
    assert told == [
        ("`float32`", "float", "21.20", "1"),
        ("`w4_g64`", "nearest", "31.00", "1.46"),
        ("`w4_g64`", "gptq", "25.00", "1.18"),
        ("`w2_g64`", "nearest", "2e+07", "9.43e+05"),
    ]
    assert {len(cells) for cells in table.rows} == {len(table.head)}
    assert table.note == "a CPU, 2 cores; 2026-11-30"


def test_a_step_that_was_undone_is_told_beside_its_method():
    rows = [row("gptq", "w4a8_g32", 25.0, not_kept=["GPTQ"])]
    (cells,) = language_tables.perplexities({"cpu": "a CPU", "date": "2026-11-30", "rows": rows}).rows
    assert cells[3] == "gptq (not kept: GPTQ)"


def test_nothing_measured_is_an_empty_table():
    assert not language_tables.perplexities({"rows": []}).rows
