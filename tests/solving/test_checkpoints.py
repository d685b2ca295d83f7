"""A folder of checkpoints belongs to one run at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchquant as tq
from torchquant.files.owned import claimed
from torchquant.quantizers import X86Quantizer


@pytest.fixture
def optimize(tmp_path):
    """A run with checkpoints in a folder."""
    x = torch.randn(4, 16)
    exported = tq.export(torch.nn.Linear(16, 8).eval(), x)

    def run(algorithm=None):
        prepared = tq.prepare(exported, X86Quantizer())
        tq.calibrate(prepared, [x], progress=False)
        algorithms = [algorithm or tq.BiasCorrection()]
        tq.optimize(prepared, [x], algorithms, checkpoint=tmp_path / "kept", progress=False)

    return run


HOLD = """
import sys, time
from pathlib import Path
from torchquant.files.owned import claimed
with claimed(Path(sys.argv[1])) as is_alone:
    print(is_alone, flush=True)
    time.sleep(100)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(tmp_path, optimize):
    optimize()
    command = [sys.executable, "-W", "ignore", "-c", HOLD, str(tmp_path / "kept")]
    environment = {**os.environ, "PYTHONPATH": str(Path(tq.__file__).parents[1])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "True\n"
            with pytest.raises(tq.ArtifactError, match=r"another run is at work .*kept"):
                optimize()
        finally:
            other.kill()
    optimize()


class Nested(tq.BiasCorrection):
    """While it solves, another run is begun in the same folder."""

    def __init__(self, begin):
        super().__init__()
        self.begin_other = begin

    def solve(self, task, clock):
        with pytest.raises(tq.ArtifactError, match="another run"):
            self.begin_other()
        raise ValueError("out of luck")


def test_a_run_that_fails_gives_its_folder_up(tmp_path, optimize):
    with pytest.raises(ValueError, match="out of luck"):
        optimize(Nested(optimize))
    with claimed(tmp_path / "kept") as is_alone:
        assert is_alone
        with claimed(tmp_path / "kept") as is_alone_too:
            assert not is_alone_too


def test_a_process_that_was_forked_keeps_no_folder(tmp_path):
    with claimed(tmp_path) as is_alone:
        assert is_alone
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    try:
        with claimed(tmp_path) as is_alone:
            assert is_alone
    finally:
        os.close(writing)
        os.waitpid(child, 0)
        os.close(reading)
