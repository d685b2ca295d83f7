"""What benchmarks measured is kept: rows of one CPU never take the place of another's."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import records


def test_rows_of_another_cpu_stay_and_the_new_ones_go_beside_them(tmp_path, monkeypatch):
    for cpu, value in (("AMD EPYC", 1), ("Intel(R) Xeon(R)", 2), ("AMD EPYC", 3), ("Intel(R) Xeon(R)", 4)):
        monkeypatch.setattr(records, "_cpu_name", lambda cpu=cpu: cpu)
        records.write("speed", [{"network": f"n{value % 2}", "value": value}], ("network",), folder=tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert len(names) == 2
    assert names[0].startswith("speed.intel-r-xeon-r-")
    assert [r["value"] for r in records.read("speed", tmp_path)["rows"]] == [3]
    assert [r["value"] for r in records.read(names[0].removesuffix(".json"), tmp_path)["rows"]] == [4]
