"""Programs for x86 of two versions of torchquant, whose kernels take different plans, in one process."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.backends import inductor_x86
from torchquant.ops.x86 import native, plan
from torchquant.quantizers.x86 import X86Quantizer

ROOT = Path(tq.__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not native.supported(), reason="kernels for x86")

CHANGES = [  # file of the other version, pattern of text there, and what stands in its place
    ("plan.h", r"kVersion = \d+", "kVersion = 1002"),
    ("plan.py", r"_UNIT = 0x51543836, \d+,", "_UNIT = 0x51543836, 1002,"),
    # one set of instructions, not optimized, is quick to build
    ("runtime.cpp", r"(?<=TQ_SETS\(X\) ).*", "X(portable)"),
    ("native.py", r"_SETS\.items\(\)", '{"portable": _SETS["portable"]}.items()'),
    ("native.py", r"for name in _SETS for", 'for name in ("portable",) for'),
    ("native.py", '"-O3"', '"-O0"'),
]
LOWER = "from test_x86_side_by_side import lowered; lowered({folder!r})"
LOAD = """
from test_x86_side_by_side import inductor_x86, runs_right
programs = {{folder: inductor_x86.load(folder + "/model.pt2") for folder in {folders!r}}}
for _ in range(2):
    for folder, program in programs.items():
        runs_right(program, folder)
print("right")
"""


class Net(nn.Module):
    """A region on its own, and an attention."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 96), nn.Linear(32, 16)

    def forward(self, x):
        q, k, v = self.first(x).view(2, 8, 3, 2, 16).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.second(y.transpose(1, 2).reshape(2, 8, 32)).relu()


def lowered(folder):
    """A program and its converted graph's output, written to a folder."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 32)
    quantized = tq.quantize(Net(), x, [x], quantizer=X86Quantizer(), algorithms=(), progress=False)
    program = inductor_x86.lower(quantized, x, tune=False, progress=False)
    program.save(f"{folder}/model.pt2")
    torch.save((x, quantized(x), program(x)), f"{folder}/expected.pt")
    return program


def runs_right(program, folder):
    x, reference, output = torch.load(f"{folder}/expected.pt")
    assert torch.equal(program(x), output)
    assert (output - reference).norm() < 0.02 * reference.norm()


def run(script, root, **more):
    environment = {**os.environ, "PYTHONPATH": f"{root}:{Path(__file__).parent}", **more}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with a program of ours, and with one of another version of torchquant, with kernels of its own."""
    ours, theirs, root = (tmp_path_factory.mktemp(name) for name in ("ours", "theirs", "root"))
    package = root / "torchquant"
    shutil.copytree(ROOT / "torchquant", package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, pattern, other in CHANGES:
        file = package / "ops" / "x86" / name
        text, count = re.subn(pattern, other, file.read_text())
        assert count == 1
        file.write_text(text)
    lowered(ours)
    run(LOWER.format(folder=str(theirs)), root, TORCHQUANT_CACHE=str(root / "cache"))
    return ours, theirs


@pytest.mark.slow
def test_programs_of_two_versions_run_side_by_side_in_either_order(folders):
    for order in (folders, folders[::-1]):
        script = LOAD.format(folders=[str(f) for f in order])
        assert run(script, ROOT).strip() == "right"


def test_neither_version_runs_the_plans_of_the_other(folders):
    """Else the two would not be told apart, and the test above would hold with one library."""
    inductor_x86.load(folders[1] / "model.pt2")
    [other] = set(native._loaded) - {native.build_name()}
    regions = getattr(torch.ops, native._namespace(other))
    header = torch.zeros(64, dtype=torch.uint8)
    header.view(torch.int32)[:2] = torch.tensor([plan._MAGIC, plan._VERSION])
    with pytest.raises(RuntimeError, match="these kernels run version 1002"):
        regions.x86_region(header, [torch.zeros(1)], [1, 1])
