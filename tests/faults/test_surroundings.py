"""What belongs to the whole process is after our calls what it was before them, also at the first call in a process."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nets
import pytest
import torch

import torchquant as tq
from torchquant.quantizers import X86Quantizer

SCRIPT = """
import importlib, logging, random, sys, warnings
import numpy, torch
import torchquant as tq
backends = {backends}
modules = [importlib.import_module("torchquant.backends." + name) for name, _, _ in backends]
from torchquant import quantizers

tq.export, tq.quantize  # are imported when they are named

def state():
    return {{
        "torch's random numbers": torch.get_rng_state().tolist(),
        "numpy's random numbers": str(numpy.random.get_state()),
        "python's random numbers": random.getstate(),
        "filters": [str(f) for f in warnings.filters],
        "handlers": list(logging.root.handlers),
        "level": logging.root.level,
        "recursion": sys.getrecursionlimit(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "engine": torch.backends.quantized.engine,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }}

def same(before, what):
    after = state()
    for name in before:
        assert before[name] == after[name], (what, name, str(before[name])[:300], str(after[name])[:300])

layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Flatten()]
model, x = torch.nn.Sequential(*layers, torch.nn.Linear(288, 4)).eval(), torch.randn(2, 3, 8, 8)
before = state()
exported = tq.export(model, (x,))
same(before, "export")
for backend, (name, quantizer, options) in zip(modules, backends):
    quantizer = getattr(quantizers, quantizer)()
    quantized = tq.quantize(exported, (x,), [(x,)], quantizer=quantizer, algorithms=(), progress=False)
    same(before, "quantize " + name)
    program = backend.lower(quantized, (x,), **options)
    same(before, "lower " + name)
    program(x)
    same(before, "call " + name)
    backend.load(program.save(sys.argv[1] + "/" + name + ".pt2"), **options)(x)
    same(before, "save and load " + name)
"""


X86, XNNPACK = ("inductor_x86", "X86Quantizer", {}), ("executorch_xnnpack", "XnnpackQuantizer", {})
CUDA = ("inductor_cuda", "CudaQuantizer", {"device": "cpu"})


@pytest.mark.parametrize("backends", [[X86, XNNPACK], [CUDA]], ids=["CPUs", "GPUs"])  # which share no compiler
def test_a_whole_flow_leaves_the_process_as_it_was(backends, tmp_path):
    script = SCRIPT.format(backends=backends)
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(tq.__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]


def test_threads_that_quantize_at_once_wait_for_each_other():
    """torch's tracing patches its modules for the whole process."""
    x = torch.randn(4, 8)

    def quantized(seed):
        numbers = torch.Generator().manual_seed(seed)
        model = nets.mlp()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=numbers))
        graph = tq.quantize(model, x, [x], quantizer=X86Quantizer(), algorithms=(), progress=False)
        return tq.sqnr_db(model(x), graph(x))

    with ThreadPoolExecutor(4) as threads:
        assert min(threads.map(quantized, range(8))) > 25
