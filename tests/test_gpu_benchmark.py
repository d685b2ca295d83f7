"""benchmarks/gpu.py runs every section with small sizes on a CPU, and its rows fit its tables."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TRIAL = """
import json, sys, torch
sys.path.insert(0, {folder!r})
torch.set_num_threads(1)
import gpu, gpu_setup, gpu_tables
class Kept:
    def __init__(self): self.rows = []
    def add(self, rows): self.rows += list(rows)
def trial(seconds):
    setup = gpu_setup.Setup("cpu", True, seconds, True, layers=2)
    rows = gpu.run(setup, list(gpu.SECTIONS), Kept())
    return rows, [t.title for t in gpu_tables.tables({{"rows": rows}})]
print(json.dumps([trial(0), trial(600)]))
"""


@pytest.fixture(scope="module")
def trials():
    """Rows and titles of tables of a run without time, and of one with enough, in a process of their own."""
    pytest.importorskip("PIL")  # which the networks' loaders use
    pytest.importorskip("torchquant.backends.inductor_cuda")
    code = TRIAL.format(folder=str(BENCHMARKS))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_section_runs_and_every_check_holds(trials):
    rows, tables = trials[1]
    assert {r["section"] for r in rows} == {"ceilings", "checks", "layers", "end to end", "profile", "networks"}
    assert [r for r in rows if r.get("right") is False] == []
    failed = [r for r in rows if "missing" in r and r["runtime"] != "torchao" and r["section"] != "ceilings"]
    assert failed == []
    assert [r for r in rows if "skipped" in r] == []
    blocks = [r for r in rows if r["section"] == "end to end" and r["format"] != "bf16"]
    assert len(blocks) == 12
    assert all(0 < r["error"] < 1e-2 for r in blocks)
    assert {"Checks", "Layers of Llama 3", "A Llama end to end", "Whole networks"} <= set(tables)


def test_what_there_is_no_time_for_is_said_to_be_skipped(trials):
    rows, tables = trials[0]
    skipped = [r["section"] for r in rows if r.get("skipped") == "no time left"]
    assert skipped == ["checks", "layers", "end to end", "profile", "networks", "more layers"]
    assert tables == ["What the chip does", "Not measured"]
