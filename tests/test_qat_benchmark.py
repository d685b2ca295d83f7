"""What `benchmarks/qat.py` measured is told as means over seeds, beside the control."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import qat_tables


def row(method, seed, after, weights=3, steps=50):
    return {"method": method, "seed": seed, "after": after, "weights": weights, "activations": weights, "steps": steps}


def test_methods_stand_below_the_control_with_their_distance_from_it():
    rows = [row("LSQ", 0, 75.0), row("LSQ", 1, 76.0), row("AdaRound", 0, 70.0, steps=0)]
    rows += [{**row("float control", seed, 79.0, 32), "before": 80.8} for seed in (0, 1, 2)]
    step = {**row("step time", 0, 0, 4, 0), "ratio": 1.5, "ms_per_step": 15.0, "float_ms": 10.0, "batch": 25}
    table = qat_tables.training({"rows": [*rows, step], "cpu": "a CPU, 2 cores", "date": "2026-11-30"})
    assert table.rows == [
        ["float", "float control", "50", "3", "79.0", "79.0, 79.0, 79.0", ""],
        ["3, 3", "AdaRound", "", "1", "70.0", "", ""],
        ["3, 3", "LSQ", "50", "2", "75.5", "75.0, 76.0", "-3.5"],
    ]
    assert "1.50 times as long as the float one (15 and 10 ms, batch 25)" in table.note
    assert "before any training: 80.8 %" in table.note


def test_nothing_measured_is_told_as_such():
    table = qat_tables.training({"rows": []})
    assert table.rows == []
    assert "Not measured yet" in table.note
