"""What the studies measured is told with its spread, and what they did not measure is not told."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import study_tables

ABOUT = {"cpu": "a CPU, 2 cores", "date": "2026-11-30"}


def _calibration(samples, seed, db, metric):
    about = {"network": "Small", "data": "matched", "samples": samples, "seed": seed, "metric_name": "top-1 %"}
    return {**about, "sqnr_db": db, "metric": metric, "float_metric": 80.0}


def test_seeds_are_a_mean_and_its_ends():
    rows = [_calibration(4, 0, 20.0, 79.0), _calibration(4, 1, 24.0, 80.5), _calibration(16, 0, 25.0, 80.0)]
    table = study_tables.calibration({**ABOUT, "rows": rows})
    assert table.note == "a CPU, 2 cores; 2026-11-30"
    four, sixteen = table.rows
    assert four[2:] == ["4", "2", "22.0 (20.0 to 24.0)", "79.75 top-1 %", "-0.25 (-1.00 to +0.50)"]
    assert sixteen[4:] == ["25.0", "80.00 top-1 %", "+0.00"]
    assert {len(row) for row in table.rows} == {len(table.head)}


def _robust(model, **more):
    about = {"network": "Small", "change": "noise", "strength": 8.0, "model": model}
    return {**about, "metric": 70.0, "agreement": 99.0, "calibration_error": 5.0, **more}


def test_a_change_that_not_all_models_have_seen_is_left_out():
    rows = [_robust("float"), _robust("int8", agreement=98.0), _robust("4 bits"), _robust("float", strength=16.0)]
    table = study_tables.robustness({**ABOUT, "rows": rows})
    (row,) = table.rows
    assert row[:3] == ["Small", "noise", "8"]
    assert row[6:8] == ["98.0 %", "99.0 %"]
    assert len(row) == len(table.head)


def test_mixed_and_uniform_stand_beside_each_other():
    plan = {"network": "Small", "seed": 0, "weight_bytes": 1000, "sqnr_db": 10.0, "metric": 1.0, "float_metric": 2.0}
    rows = [{**plan, "plan": "uniform", "kept": ""}, {**plan, "plan": "mixed", "sqnr_db": 12.0, "kept": ""}]
    (row,) = study_tables.mixed_precision({**ABOUT, "rows": rows}).rows
    assert row[4:6] == ["10.00", "12.00"]
    assert study_tables.mixed_precision({**ABOUT, "rows": rows[:1]}).rows == []


def test_what_was_not_measured_says_so():
    for make in (
        study_tables.calibration,
        study_tables.robustness,
        study_tables.mixed_precision,
        study_tables.profiles,
    ):
        table = make({"rows": []})
        assert (list(table.rows), table.note) == ([], "not measured yet")
