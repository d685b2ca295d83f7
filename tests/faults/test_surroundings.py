"""What belongs to the whole process is after our calls what it was before them, also at the first call in a process.

And what a caller set for his own model changes nothing in ours.
"""

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import nets
import pytest
import torch

import torchquant as tq
from torchquant.backends import executorch_xnnpack, inductor_cuda
from torchquant.quantizers import CudaQuantizer, X86Quantizer, XnnpackQuantizer
from torchquant.surroundings import own_modes

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


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
ALGORITHMS = {
    "AdaRound, QDrop": lambda: [tq.AdaRound(5), tq.QDrop(2, rounds=1)],
    "SmoothQuant, RangeSearch": lambda: [tq.SmoothQuant(), tq.RangeSearch()],
    "SeqMSE, AdaQuant": lambda: [tq.SeqMSE(4), tq.AdaQuant(2)],
}


def net():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 16), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(16, 4)).eval()


@pytest.fixture(scope="module")
def alone():
    """What algorithms make of a network where no mode is set."""
    return {name: quantized(net(), images(), make()) for name, make in ALGORITHMS.items()}


def images():
    return [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def quantized(model, batches, algorithms):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tq.TorchquantWarning)  # a step that is not kept is no matter here
        options = {"quantizer": X86Quantizer(), "algorithms": algorithms, "progress": False}
        return tq.quantize(model, batches[0], batches, **options).state_dict()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_caller_s_modes_change_nothing_in_what_is_quantized(alone, name, mode):
    model, batches = net(), images()
    with MODES[mode]():
        held = quantized(model, batches, ALGORITHMS[name]())
        dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
        inside = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_device().type
    assert held.keys() == alone[name].keys()
    assert [key for key, value in held.items() if not torch.equal(value, alone[name][key])] == []
    assert inside == (mode == "inference mode", mode == "autocast", "meta" if mode == "device" else "cpu")
    assert (str(dtype)[6:], grad) == (
        mode if "float" in mode else "float32",
        mode not in ("no gradients", "inference mode"),
    )


@pytest.mark.parametrize(
    ("backend", "quantizer", "options"),
    [(executorch_xnnpack, XnnpackQuantizer, {}), (inductor_cuda, CudaQuantizer, {"device": "cpu"})],
    ids=["xnnpack", "cuda"],
)
def test_all_of_a_caller_s_modes_change_nothing_in_a_program(tmp_path, backend, quantizer, options):
    x = torch.randn(4, 16)
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).eval()
    graph = tq.quantize(model, x, [x], quantizer=quantizer(), algorithms=(), progress=False)
    expected = backend.lower(graph, x, **options)(x)
    with ExitStack() as stack:
        for name in ("inference mode", "bfloat16", "device", "autocast"):
            stack.enter_context(MODES[name]())
        program = backend.lower(graph, x, **options)
        again = backend.load(program.save(tmp_path / "program"), **options)
        outputs = [program(x), again(x), program(x)]
        read = tq.load(tq.save(graph, tmp_path / "graph.pt2", x))
    assert all(torch.equal(y, expected) for y in outputs)
    assert torch.equal(read(x), graph(x))


def test_the_default_dtype_is_what_it_was_once_the_last_of_several_calls_has_ended():
    torch.set_default_dtype(torch.float64)
    try:
        first, second = own_modes(), own_modes()
        for modes in (first, second):
            modes.__enter__()
        assert torch.get_default_dtype() == torch.float32
        second.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float32  # the first call goes on
        first.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
