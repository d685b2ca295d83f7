"""ExecuTorch's own tests of its XNNPACK backend, run with XnnpackQuantizer, and why some end otherwise than theirs."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import executorch

INSTALLED = Path(next(iter(executorch.__path__)))
TESTS = Path(__file__).resolve().parents[1]
PARTS = {
    "operators": "backends/test/suite/operators",
    "delegate": "backends/xnnpack/test/ops",
}
Records = dict[str, dict[str, str]]


def files(part: str) -> list[str]:
    """The files of tests of a part, as `run` takes them."""
    return sorted(str(path.relative_to(INSTALLED)) for path in (INSTALLED / PARTS[part]).glob("test_*.py"))


def run(*paths: str, flow: str = "torchquant") -> Records:
    """Test -> how it ended, of the tests below these paths of the installed package; in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
        settings = {"PYTHONPATH": path, "TORCHQUANT_RECORD": str(record), "TORCHQUANT_FLOW": flow}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "zoo.executorch_flow",
            "-p",
            "no:cacheprovider",
            "--timeout=1800",
        ]
        files = [str(INSTALLED / p) for p in paths]
        done = subprocess.run(
            [*command, *files], env={**os.environ, **settings}, cwd=folder, capture_output=True, text=True, check=False
        )
        if not record.is_file() and done.returncode in (0, 5):
            return {}  # no test of this file was run
        assert record.is_file(), f"the suite did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return json.loads(record.read_text())


# what their tests expect of the graph -> why XnnpackQuantizer's is another one
CHOICES = {
    r"torch\.ops\.quantized_decomposed|\d+ quantized_decomposed|dequantize": (
        "an op between float tensors stays float: in int8 it would only add rounding, and its neighbours gain nothing"
    ),
    r"torch\.ops\.aten\.(clamp|relu6)": "clamps are written as hardtanh, which XNNPACK fuses and runs in int8",
    r"executorch_call_delegate. but did not find it": (
        "linears that read the same values share one quantize chain, and so one delegate call; theirs have one each"
    ),
}
LIMITS = {r"the model computes in b?float16": "XnnpackQuantizer quantizes float32 models, and says so in a warning"}

UPSTREAM = {
    r"Attempting to convert non-NHWC compatible node to NHWC": (
        "ExecuTorch's own way fails on a PReLU that is no image, in float as well; torchquant's lower writes it as ops "
        "that it runs"
    ),
}


def reason(record: dict[str, str]) -> str:
    """Why a test that failed did so by choice, or by ExecuTorch's own fault; empty if neither."""
    text = record["text"]
    known = {**UPSTREAM, **LIMITS, **(CHOICES if "Expected" in text else {})}
    if record["outcome"] != "failed":
        return ""
    return next((why for pattern, why in known.items() if re.search(pattern, text)), "")


def unexplained(records: Records) -> dict[str, str]:
    """Tests that failed, and neither by choice nor by a refusal with a name."""
    failed = {name: r for name, r in records.items() if r["outcome"] == "failed"}
    return {name: r["text"] for name, r in failed.items() if not reason(r)}
