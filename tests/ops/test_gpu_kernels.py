"""The Triton kernels, without a GPU: their numbers through Triton's interpreter, their machine code by compiling it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops import gpu_cases

pytest.importorskip("triton", reason="Triton comes with torch for CUDA, or with torchquant[test]")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "gpu_cases.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", gpu_cases.cases(), ids=str)
def test_a_kernel_computes_its_reference(interpreted, case):
    assert interpreted[str(case)] < 1e-3


def test_rows_are_quantized_to_the_reference_codes(interpreted):
    wrong = {name: count for name, count in interpreted.items() if name.startswith("rows")}
    assert len(wrong) == 4
    assert not any(wrong.values())


# machine code ---------------------------------------------------------------------------------------------------------

SHARED_BYTES = {80: 166912, 89: 101376, 90: 232448}  # that one program may have
MULTIPROCESSORS = {80: 108, 89: 142, 90: 132}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv",
}


class Recorder:
    """Stands in a kernel's place and notes what it is launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((self.kernel, arguments, options))


def launches_of(monkeypatch, run):
    """The kernels that `run` launches with their arguments; none of them runs."""
    from torchquant.ops.gpu import kernels

    launches = []
    for name in kernels.__all__:
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), launches))
    run()
    monkeypatch.undo()
    return launches


def compiled(kernel, arguments, options, capability):
    """A kernel as a GPU of `capability` would run it: registers, bytes spilled, bytes of shared memory, code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = POINTERS[value.dtype] if tensor else "i32"
        if tensor or (value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    usage = disassembled(folder, "-res-usage", built.asm["cubin"])
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack), built.metadata.shared, disassembled(folder, "-sass", built.asm["cubin"])


def disassembled(folder, option, cubin):
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [folder / "cuobjdump", option, file.name], capture_output=True, text=True, check=True
        ).stdout


def weight_only_launch(m, n, k, bits, asymmetric, config, group=128):
    from torchquant.ops.gpu import launch

    packed = (
        torch.empty(k // 128, n, 32, dtype=torch.int16)
        if bits == 4
        else torch.empty(k // 128, 4, n, 32, dtype=torch.int8)
    )
    params = torch.empty(k // group, n, 2, dtype=torch.bfloat16)
    x = torch.empty(m, k, dtype=torch.bfloat16)
    return lambda: launch.weight_only(x, packed, params, None, None, bits, group, asymmetric, "none", config)


def scaled_launch(m, n, k, dtype, config):
    from torchquant.ops.gpu import launch

    x, weight = torch.empty(m, k, dtype=torch.bfloat16), torch.empty(n, k, dtype=dtype)
    low = -127.0 if dtype == torch.int8 else -448.0
    factors = (torch.empty(n), None, None, None, None, None, low, -low, gpu_cases.EPS, "none", torch.bfloat16)
    return lambda: launch.scaled(x, weight, *factors, config)


def launch_for(format, m, n, k, config, asymmetric=False):
    if format in ("w4a16", "w8a16"):
        return weight_only_launch(m, n, k, 4 if format == "w4a16" else 8, asymmetric, config)
    return scaled_launch(m, n, k, torch.int8 if format == "int8" else torch.float8_e4m3fn, config)


@pytest.mark.parametrize("m", [1, 16, 64, 256])
@pytest.mark.parametrize(
    ("format", "capability"),
    [("w4a16", 80), ("int8", 80), ("fp8", 89), ("w4a16", 90), ("w8a16", 90), ("int8", 90), ("fp8", 90)],
)
def test_what_a_size_is_cut_to_fits_the_gpu(monkeypatch, format, capability, m):
    from torchquant.ops.gpu import configs

    config = configs.by_rule(format, m, 4096, MULTIPROCESSORS[capability], SHARED_BYTES[capability])
    if config.kernel == "library":
        config = configs.Config("tiled", 128, 128, 128, warps=8, stages=3)
    for kernel, arguments, options in launches_of(monkeypatch, launch_for(format, m, 4096, 4096, config)):
        registers, spilled, shared_bytes, _ = compiled(kernel, arguments, options, capability)
        assert spilled == 0
        assert registers <= 255
        assert shared_bytes <= SHARED_BYTES[capability]


def test_tensor_cores_take_unpacked_weights_from_registers(monkeypatch):
    from torchquant.ops.gpu.configs import Config

    for config, instruction in (
        (Config("skinny", 8, 16, slices=4), "HMMA.16816"),
        (Config("tiled", 128, 128, warps=8), "HGMMA.64x128x16"),
    ):
        ((kernel, arguments, options),) = launches_of(monkeypatch, weight_only_launch(1, 4096, 4096, 4, True, config))
        *_, code = compiled(kernel, arguments, options, 90)
        assert instruction in code
        assert "LOP3.LUT" in code  # two codes an instruction
        assert not re.search(r"I2FP?\.(BF16|F16|F32\.[SU])", code)  # no code is converted
        assert "STS.128" not in code  # no unpacked weight goes through shared memory


def test_one_compiled_kernel_serves_every_number_of_rows(monkeypatch):
    from torchquant.ops.gpu import kernels

    for name in (
        "weight_only_skinny",
        "weight_only_tiled",
        "scaled_skinny",
        "scaled_tiled",
        "add_splits",
        "scale_products",
    ):
        (rows,) = [p for p in getattr(kernels, name).params if p.name == "M"]
        assert rows.do_not_specialize, name
        assert not rows.is_constexpr
