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


class Driver:
    """Stands in for the driver of a GPU that is not there: kernels are compiled for it as at a launch."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


class Compiled:
    """Stands in a kernel's place, and compiles where that one would be launched."""

    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.found.append(self.kernel.warmup(*arguments, grid=grid, **options))


@pytest.fixture
def compiled(monkeypatch):
    """A function that compiles what `run` launches on a GPU of `capability`."""
    from triton.runtime import driver

    from torchquant.ops.gpu import kernels

    def compile_for(capability, run):
        found = []
        with monkeypatch.context() as patch:
            for name in kernels.__all__:
                kernel = getattr(kernels, name)
                kernel.device_caches.clear()  # of another capability
                patch.setattr(kernels, name, Compiled(kernel, found))
            patch.setattr(driver, "_active", Driver(capability))
            run()
        return [Code(built) for built in found]

    return compile_for


class Code:
    """Registers, bytes of stack (spilled registers), bytes of shared memory, and instructions of a compiled kernel."""

    def __init__(self, built):
        usage = disassembled("-res-usage", built.asm["cubin"])
        self.registers, self.stack = (int(v) for v in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        self.shared_bytes = built.metadata.shared
        self.instructions = disassembled("-sass", built.asm["cubin"])

    def loop(self):
        """The instructions of the longest loop."""
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", self.instructions)
        at = {int(address, 16): i for i, (address, _) in enumerate(lines)}
        bodies = []
        for address, instruction in lines:
            back = re.search(r"BRA\S*\s+(?:\S+,\s*)?0x([0-9a-f]+)", instruction)
            if back and int(back.group(1), 16) < int(address, 16):
                first, last = at[int(back.group(1), 16)], at[int(address, 16)]
                bodies.append([text for _, text in lines[first : last + 1]])
        return "\n".join(max(bodies, key=len))


def disassembled(option, cubin):
    import tempfile

    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
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
def test_what_a_size_is_cut_to_fits_the_gpu(compiled, format, capability, m):
    from torchquant.ops.gpu import configs

    config = configs.by_rule(format, m, 4096, MULTIPROCESSORS[capability], SHARED_BYTES[capability])
    if config.kernel == "library":
        config = configs.Config("tiled", 128, 128, 128, warps=8, stages=3)
    for code in compiled(capability, launch_for(format, m, 4096, 4096, config)):
        assert code.stack == 0
        assert code.registers <= 255
        assert code.shared_bytes <= SHARED_BYTES[capability]


def test_tensor_cores_take_unpacked_weights_from_registers(compiled):
    from torchquant.ops.gpu.configs import Config

    for config, instruction in (
        (Config("skinny", 8, 16, slices=4), "HMMA.16816"),
        (Config("tiled", 128, 128, warps=8), "HGMMA.64x128x16"),
    ):
        (code,) = compiled(90, weight_only_launch(1, 4096, 4096, 4, True, config))
        assert instruction in code.loop()
        assert "LOP3.LUT" in code.loop()  # two codes an instruction
        assert "I2F" not in code.loop()  # no code is converted
        assert not re.search(r"\bSTS", code.loop())  # no unpacked weight goes through shared memory


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


@pytest.mark.parametrize(("dtype", "offset"), [(torch.bfloat16, 136), (torch.float16, 1032)])
def test_the_inline_assembly_unpacks_two_codes_at_a_time(dtype, offset):
    """The assembly's two instructions carried out on all words, since Triton's interpreter leaves them out."""
    from torchquant.ops.gpu import kernels

    source = Path(kernels.__file__).read_text()
    constant = "0x43004300" if dtype == torch.bfloat16 else "0x64006400"
    (text,) = (block for block in re.findall(r'"""\s*\{(.*?)\}\s*"""', source, re.S) if constant in block)
    words = torch.randint(-(2**15), 2**15, (512, 2), dtype=torch.int16)
    registers = {"$4": words.view(torch.int32)[:, 0].long() & 0xFFFFFFFF}
    for line in filter(None, (part.strip() for part in text.split(";"))):
        name, *operands = re.split(r",?\s+", line)
        if name == "shr.u32":
            registers[operands[0]] = registers[operands[1]] >> int(operands[2])
        elif name == "lop3.b32":
            assert int(operands[4], 16) == (0xF0 & 0xCC) | 0xAA  # (a and b) or c
            registers[operands[0]] = (registers[operands[1]] & int(operands[2], 16)) | int(operands[3], 16)
        else:
            assert line == ".reg .b32 t"
    for i in range(4):
        codes = registers[f"${i}"].to(torch.int32).view(dtype).reshape(512, 2)
        assert torch.equal(codes.float(), ((words.int() >> 4 * i) & 15).float() + offset - 8)
