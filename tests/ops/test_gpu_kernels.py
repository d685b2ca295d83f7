"""The Triton kernels, without a GPU: their numbers through Triton's interpreter, their machine code by compiling it."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.ops import gpu_cases
from torchquant.ops.gpu import linears

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
    through_bfloat16 = (
        case.config.kernel == "library" and case.dtype == torch.float8_e4m3fn
    )  # what `_scaled_mm` returns
    assert interpreted[str(case)] < (4e-3 if through_bfloat16 else 1e-3)


def test_rows_are_quantized_to_the_reference_codes(interpreted):
    wrong = {name: count for name, count in interpreted.items() if name.startswith("rows")}
    assert len(wrong) == 4
    assert not any(wrong.values())


def test_what_is_not_finite_comes_out_as_from_the_reference(interpreted):
    wrong = {name: count for name, count in interpreted.items() if name.startswith("wild")}
    assert len(wrong) > 2 * len(linears.ACTIVATIONS)
    assert not {name: count for name, count in wrong.items() if count}


# machine code ---------------------------------------------------------------------------------------------------------

SHARED_BYTES = {80: 166912, 89: 101376, 90: 232448}  # that one program may have
MULTIPROCESSORS = {80: 108, 89: 142, 90: 132}


@pytest.fixture
def compiled():
    from torchquant.ops.gpu import machine_code

    return machine_code.compiled


def weight_only_launch(m, n, k, bits, asymmetric, config, group=128):
    from torchquant.ops.gpu import launch

    packed = torch.empty(k // 128, *([2] if bits == 8 else []), n, 32, dtype=torch.int16)
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


@pytest.mark.parametrize("m", [1, 16, 64, 256, 1024])
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
        assert code.stack_bytes == 0
        assert code.registers <= 255
        assert code.shared_bytes <= SHARED_BYTES[capability]


def test_tensor_cores_take_unpacked_weights_from_registers(compiled):
    from torchquant.ops.gpu.configs import Config

    for config, instruction in (
        (Config("skinny", 8, 16, slices=4), "HMMA.16816"),
        (Config("tiled", 128, 128, warps=8), "HGMMA.64x128x16"),
    ):
        (code,) = compiled(90, weight_only_launch(1, 4096, 4096, 4, True, config))
        loop = "\n".join(code.loop())
        assert instruction in loop
        assert "LOP3.LUT" in loop  # two codes an instruction
        assert "I2F" not in loop  # no code is converted
        assert not re.search(r"\bSTS", loop)  # no unpacked weight goes through shared memory


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("format", "ahead"), [("w4a16", 1), ("w4a16", 2), ("w8a16", 1)])
def test_direct_loads_go_past_shared_memory(compiled, format, ahead, asymmetric):
    from torchquant.ops.gpu.configs import Config

    config = Config("direct", 8, 32, slices=4, warps=4, stages=ahead)
    for capability in (80, 90):
        (code,) = compiled(capability, launch_for(format, 1, 4096, 4096, config, asymmetric))
        loop = "\n".join(code.loop())
        assert "HMMA.16816" in loop
        assert "LDG.E.128" in loop  # eight codes of each chunk at a time
        assert not re.search(r"\b(STS|LDS|LDSM|LDGSTS|BAR)\b", loop)  # and warps never wait for each other
        assert code.stack_bytes == 0


def test_codes_are_copied_by_the_engine_that_hopper_has_for_it(compiled):
    from torchquant.ops.gpu.configs import Config

    for format, instruction in (("int8", "IGMMA.64x128x32"), ("fp8", "QGMMA.64x128x32")):
        config = Config("copied", 128, 128, 128, warps=8, stages=3)
        *_, code = compiled(90, launch_for(format, 1024, 4096, 4096, config))
        assert code.name == "scaled_copied"
        assert instruction in code.instructions
        assert "UTMALDG" in code.instructions
        assert code.stack_bytes == 0


@pytest.fixture(scope="module")
def every_kernel():
    """The code of every kernel, for an Ampere and for a Hopper GPU."""
    from torchquant.ops.gpu import launch, machine_code
    from torchquant.ops.gpu.configs import Config

    m, n, k = 40, 256, 512
    x, bias, residual = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((m, k), (n,), (m, n)))
    packed, params = torch.empty(k // 128, n, 32, dtype=torch.int16), torch.empty(k // 32, n, 2, dtype=torch.bfloat16)
    scale, zero, sums = torch.empty(1), torch.empty(1, dtype=torch.int32), torch.empty(n, dtype=torch.int32)
    weight = torch.zeros(n, k, dtype=torch.int8)
    grid = (bias, residual, -128.0, 127.0, gpu_cases.EPS, "gelu", torch.bfloat16)
    tile = Config("tiled", 32, 64, 128)

    def run(capability):
        direct = Config("direct", 8, 32, slices=4, warps=4, stages=1)
        for config in (Config("skinny", 8, 16, slices=4), direct, replace(tile, slices=2), tile, Config("dequantize")):
            launch.weight_only(x, packed, params, bias, residual, 4, 32, True, "gelu", config)
        copied = [replace(tile, kernel="copied", m=64, slices=s) for s in (1, 2)] * (capability >= 90)
        skinny = Config("skinny", 8, 16, 128, slices=4, quantizes=True)
        for config in (skinny, tile, replace(tile, slices=2), *copied, Config("library")):
            launch.scaled(x, weight, torch.empty(n), scale, zero, sums, *grid, config)
            launch.scaled(x, weight, torch.empty(n), None, None, None, *grid, config)
        image, window = torch.empty(2, 8, 8, 64, dtype=torch.int8), torch.empty(n, 3, 3, 64, dtype=torch.int8)
        factors, form = (torch.empty(n), scale, zero, torch.empty(n, 9, dtype=torch.int32), bias), ((1, 1),) * 3
        out = torch.empty(2, 8, 8, n, dtype=torch.bfloat16)
        launch.convolution(image, window, *factors, out, *form, "gelu", torch.empty_like(out))

    with mock.patch.object(launch, "_EARLY", True):
        return {capability: machine_code.compiled(capability, partial(run, capability)) for capability in (80, 90)}


def test_every_kernel_compiles_with_an_ending(every_kernel):
    from torchquant.ops.gpu import kernels

    assert {code.name for code in every_kernel[90]} == set(kernels.__all__)
    assert not any(code.stack_bytes for code in every_kernel[90])


def test_a_kernel_that_begins_early_touches_memory_after_the_one_in_front(every_kernel):
    memory = re.compile(r"\b(LDG|LDGSTS|STG|UTMALDG|ATOM|RED|LD|ST)\b")
    for code in every_kernel[90]:
        assert code.instructions.count("ACQBULK") == code.instructions.count("PREEXIT") == 1, code.name
        before, _, after = code.instructions.partition("ACQBULK")
        assert not memory.search(before), code.name
        assert "CCTL.E.PF2" in before or code.name not in ("weight_only_skinny", "weight_only_direct", "scaled_skinny")
        assert "PREEXIT" in after
    assert not any("ACQBULK" in code.instructions for code in every_kernel[80])


@pytest.mark.parametrize("activation", linears.ACTIVATIONS)
def test_every_activation_compiles(compiled, activation):
    from torchquant.ops.gpu import launch
    from torchquant.ops.gpu.configs import Config

    x, packed = torch.empty(4, 128, dtype=torch.float16), torch.empty(1, 64, 32, dtype=torch.int16)
    params, config = torch.empty(1, 64, 2, dtype=torch.float16), Config("skinny", 8, 16)
    (code,) = compiled(80, lambda: launch.weight_only(x, packed, params, None, None, 4, 128, False, activation, config))
    assert code.stack_bytes == 0


def test_one_compiled_kernel_serves_every_number_of_rows(monkeypatch):
    from torchquant.ops.gpu import kernels

    for name in (
        "weight_only_direct",
        "weight_only_skinny",
        "weight_only_tiled",
        "scaled_copied",
        "scaled_skinny",
        "scaled_tiled",
        "add_splits",
        "scale_products",
    ):
        (rows,) = [p for p in getattr(kernels, name).params if p.name == "M"]
        assert rows.do_not_specialize, name
        assert not rows.is_constexpr


def carried_out(text, words):
    """The registers that a block of inline assembly leaves behind, as int32; `words` (n, 2) int16 go in last."""
    count = max(int(i) for i in re.findall(r"\$(\d)", text))
    registers = {f"${count}": words.view(torch.int32)[:, 0].long() & 0xFFFFFFFF}

    def value(operand):
        return registers[operand] if operand in registers else torch.tensor([int(operand, 0)])

    for line in filter(None, (part.strip() for part in text.split(";"))):
        name, target, *operands = re.split(r",?\s+", line)
        if name == "shr.u32":
            registers[target] = value(operands[0]) >> value(operands[1])
        elif name == "mov.b32":
            registers[target] = value(operands[0])
        elif name == "lop3.b32":
            both, third = value(operands[0]) & value(operands[1]), value(operands[2])
            table = {(0xF0 & 0xCC) | 0xAA: both | third, (0xF0 & 0xCC) ^ 0xAA: both ^ third}
            registers[target] = table[int(operands[3], 16)]
        elif name == "fma.rn.bf16x2":
            a, b, c = (value(v).to(torch.int32).view(torch.bfloat16).double() for v in operands)
            b = b if len(b) == len(a) else b.repeat(len(a) // 2)
            registers[target] = (a * b + c).bfloat16().view(torch.int32).long()
        elif name == "add.rn.f16x2":
            a, b = (value(v).to(torch.int32).view(torch.float16).double() for v in operands)
            registers[target] = (a + b.repeat(len(a) // 2)).half().view(torch.int32).long()
        else:
            assert name == ".reg"
    return [registers[f"${i}"].to(torch.int32) for i in range(count)]


def assembly(constant, outputs):
    from torchquant.ops.gpu import kernel_parts

    source = Path(kernel_parts.__file__).read_text()
    blocks = re.findall(r'"""\s*\{(.*?)\}\s*"""', source, re.S)
    (text,) = (b for b in blocks if constant in b and f"${outputs}" in b and f"${outputs + 1}" not in b)
    return text


@pytest.mark.parametrize(
    ("dtype", "constant", "offset"), [(torch.bfloat16, "0x43004300", 136), (torch.float16, "0x64006400", 1032)]
)
def test_the_assembly_unpacks_two_four_bit_codes_at_a_time(dtype, constant, offset):
    """Carried out here, since Triton's interpreter leaves it out."""
    words = torch.randint(-(2**15), 2**15, (512, 2), dtype=torch.int16)
    for i, register in enumerate(carried_out(assembly(constant, 4), words)):
        codes = register.view(dtype).reshape(512, 2)
        assert torch.equal(codes.float(), ((words.int() >> 4 * i) & 15).float() + offset - 8)


@pytest.mark.parametrize(("dtype", "constant"), [(torch.bfloat16, "0x43004300"), (torch.float16, "0x64806480")])
def test_the_assembly_unpacks_two_eight_bit_codes_at_a_time(dtype, constant):
    words = torch.arange(-(2**15), 2**15, dtype=torch.int16).reshape(-1, 2)
    for i, register in enumerate(carried_out(assembly(constant, 2), words)):
        codes = register.view(dtype).reshape(-1, 2)
        assert torch.equal(codes.float(), (words >> 8 * i).to(torch.int8).float())
