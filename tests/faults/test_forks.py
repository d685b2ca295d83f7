"""A program in a process that was forked after a call: OpenMP would wait for threads that the fork did not copy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchquant as tq
from torchquant.ops.x86 import native

pytestmark = pytest.mark.skipif(not native.supported() or not hasattr(os, "fork"), reason="x86, and fork")
ROOT = str(Path(tq.__file__).parents[1])
SCRIPT = """
import os, signal, sys, threading, warnings
import torch
from torchquant.backends import inductor_x86
torch.set_num_threads(2)
program = inductor_x86.load(sys.argv[1])
inputs = torch.load(sys.argv[2])
wanted = program(inputs)  # which starts the pool of threads
assert torch.get_num_threads() == 2

def check():
    assert torch.equal(program(inputs), wanted)
    assert torch.get_num_threads() == 1

def child():
    signal.alarm(30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check()
        torch.set_num_threads(2)
        check()
        thread = threading.Thread(target=check)
        thread.start()
        thread.join()
    assert [str(w.message)[:23] for w in caught] == ["this process was forked"]
    grandchild = os.fork()
    if not grandchild:
        check()
        os._exit(0)
    assert os.waitpid(grandchild, 0)[1] == 0

for _ in range(5):
    pid = os.fork()
    if not pid:
        status = 1
        try:
            child()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
assert torch.equal(program(inputs), wanted)
assert torch.get_num_threads() == 2
"""
EARLY = """
import os, signal, sys, warnings
import torch
from torchquant.backends import inductor_x86
threads = torch.get_num_threads()
program = inductor_x86.load(sys.argv[1])
inputs = torch.load(sys.argv[2])
pid = os.fork()
if not pid:
    warnings.simplefilter("error", inductor_x86.program.forks.TorchquantWarning)
    signal.alarm(30)
    status = 1
    try:
        program(inputs)
        status = int(torch.get_num_threads() != threads)
    finally:
        os._exit(status)
assert os.waitpid(pid, 0)[1] == 0
"""


def run(script, *arguments):
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("script", [SCRIPT, EARLY], ids=["after a call", "before"])
def test_a_forked_child_runs_on_one_thread_where_more_would_hang(x86_pixels, tmp_path, script):
    torch.save(torch.randn(64, 4, 8, 8), tmp_path / "inputs.pt")
    run(script, x86_pixels.program.save(tmp_path / "model.pt2"), tmp_path / "inputs.pt")
