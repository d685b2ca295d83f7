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
from torchquant.ops.gpu import configs, linears
from torchquant.ops.gpu.configs import Config
from torchquant.ops.gpu.operands import ConvolutionParams, Epilogue, Grid, PackedWeight, Scales

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


def weight_only_launch(m, n, k, bits, asymmetric, config, group=128, dtype=torch.bfloat16):
    from torchquant.ops.gpu import launch

    packed = torch.empty(k // 128, *([2] if bits == 8 else []), n, 32, dtype=torch.int16)
    params = torch.empty(k // group, n, 2, dtype=dtype)
    x, weight = torch.empty(m, k, dtype=dtype), PackedWeight(packed, params, bits, group, asymmetric)
    return lambda: launch.weight_only(x, weight, Epilogue(), config)


def scaled_launch(m, n, k, dtype, config):
    from torchquant.ops.gpu import launch

    x, weight = torch.empty(m, k, dtype=torch.bfloat16), torch.empty(n, k, dtype=dtype)
    low = -127.0 if dtype == torch.int8 else -448.0
    scales, grid = Scales(torch.empty(n)), Grid(low, -low, gpu_cases.EPS)
    return lambda: launch.scaled(x, weight, scales, grid, Epilogue(), torch.bfloat16, config)


def launch_for(format, m, n, k, config, asymmetric=False):
    if format in ("w4a16", "w8a16"):
        return weight_only_launch(m, n, k, 4 if format == "w4a16" else 8, asymmetric, config)
    return scaled_launch(m, n, k, torch.int8 if format == "int8" else torch.float8_e4m3fn, config)


@pytest.mark.parametrize("m", [1, 64, *(pytest.param(m, marks=pytest.mark.slow) for m in (16, 256, 1024))])
@pytest.mark.parametrize(
    ("format", "capability"),
    [("w4a16", 80), ("int8", 80), ("fp8", 89), ("w4a16", 90), ("w8a16", 90), ("int8", 90), ("fp8", 90)],
)
def test_what_a_size_is_cut_to_fits_the_gpu(compiled, format, capability, m):
    config = configs.by_rule(format, m, 4096, MULTIPROCESSORS[capability], SHARED_BYTES[capability])
    if config.kernel == "library":
        config = configs.Config("tiled", 128, 128, 128, warps=8, stages=3)
    for code in compiled(capability, launch_for(format, m, 4096, 4096, config)):
        assert code.stack_bytes == 0
        assert code.registers <= 255
        assert code.shared_bytes <= SHARED_BYTES[capability]


def test_tensor_cores_take_unpacked_weights_from_registers(compiled):
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
    config = Config("direct", 8, 32, slices=4, warps=4, stages=ahead)
    for capability in (80, 90):
        (code,) = compiled(capability, launch_for(format, 1, 4096, 4096, config, asymmetric))
        loop = "\n".join(code.loop())
        assert "HMMA.16816" in loop
        assert "LDG.E.128" in loop  # eight codes of each chunk at a time
        assert not re.search(r"\b(STS|LDS|LDSM|LDGSTS|BAR)\b", loop)  # and warps never wait for each other
        assert code.stack_bytes == 0


def pipelined_configs():
    return [Config("pipelined", m, n, warps=warps, stages=stages) for m, n, warps, stages in configs._PIPELINED]


CHUNKS = [(4, 128, False, torch.bfloat16), (4, 32, True, torch.float16), (8, 4096, False, torch.bfloat16)]
FEW = {
    (i, i % len(CHUNKS)) for i in range(0, 8, 2)
}  # each form of weights, and half of the cuts; all with the slow tests


@pytest.mark.parametrize(
    ("config", "bits", "group", "asymmetric", "dtype"),
    [
        pytest.param(config, *form, marks=[] if (i, j) in FEW else [pytest.mark.slow], id=f"{config} {form}")
        for i, config in enumerate(pipelined_configs())
        for j, form in enumerate(CHUNKS)
    ],
)
def test_tensor_cores_multiply_a_chunk_while_the_next_is_unpacked(compiled, config, bits, group, asymmetric, dtype):
    (code,) = compiled(90, weight_only_launch(512, 4096, 4096, bits, asymmetric, config, group, dtype))
    assert code.stack_bytes == 0
    assert (code.shared_bytes + 1024) * (8 // config.warps) <= SHARED_BYTES[90] + 1024  # of which a program costs 1024
    waits = re.findall(r"WARPGROUP.DEPBAR.LE gsb0, 0x(\d)", code.instructions)
    assert waits == ["1"] * 4 + ["0"]  # all but the last chunk after each of a block; all at the end
    assert not overwritten(code.loop())
    assert any(instruction.split()[0] == "SYNCS.PHASECHK.TRANS64.TRYWAIT" for instruction in code.loop())


def overwritten(loop):
    """Instructions that write a register of a product that may not have finished, in two rounds of a loop."""
    under_way, product, hazards = [], set(), []
    for line in loop + loop:
        name, _, operands = re.sub(r"^@!?\w+\s+", "", line).partition(" ")
        registers = [int(r) for r in re.findall(r"\bR(\d+)", operands)]
        if name.startswith("HGMMA"):
            sums = int(re.search(r"64x(\d+)x16", name).group(1)) // 2
            product |= {*range(registers[0], registers[0] + sums), *range(registers[1], registers[1] + 4)}
            if "gsb0" in operands:
                under_way.append(product)
                product = set()
        elif name == "WARPGROUP.DEPBAR.LE":
            last = int(re.search(r"0x(\d)", operands).group(1))
            under_way = under_way[len(under_way) - last :] if last else []
        elif re.match(r"\s*R\d+\b", operands) and not re.match(r"ST|R2UR", name):
            width = 4 if "LDSM" in name or ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
            written = set(range(registers[0], registers[0] + width))
            hazards += [line for taken in (*under_way, product) if written & taken]
    return hazards


def test_products_that_the_copy_engine_cannot_serve_are_cut_otherwise(compiled):
    from torchquant.ops.gpu import launch

    packed, params = torch.empty(2, 64, 32, dtype=torch.int16), torch.empty(1, 64, 2, dtype=torch.bfloat16)
    config = pipelined_configs()[0]
    for x, kernel in (
        (torch.empty(64, 136, dtype=torch.bfloat16), "weight_only_pipelined"),
        (torch.empty(64, 132, dtype=torch.bfloat16), "weight_only_tiled"),  # rows of 264 bytes
        (torch.empty(64 * 136 + 1, dtype=torch.bfloat16)[1:].view(64, 136), "weight_only_tiled"),
    ):
        arguments = (x, PackedWeight(packed, params, 4, x.shape[1], False), Epilogue(), config)
        (code,) = compiled(90, lambda arguments=arguments: launch.weight_only(*arguments))
        assert code.name == kernel
    for k, kernel in ((144, "scaled_copied"), (136, "scaled_tiled")):
        *_, code = compiled(90, scaled_launch(128, 64, k, torch.int8, Config("copied", 64, 64, 128)))
        assert code.name == kernel


def test_codes_are_copied_by_the_engine_that_hopper_has_for_it(compiled):
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
    from torchquant.ops.gpu import launch, launch_options, machine_code

    m, n, k = 40, 256, 512
    x, bias, residual = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((m, k), (n,), (m, n)))
    packed, params = torch.empty(k // 128, n, 32, dtype=torch.int16), torch.empty(k // 32, n, 2, dtype=torch.bfloat16)
    scale, zero, sums = torch.empty(1), torch.empty(1, dtype=torch.int32), torch.empty(n, dtype=torch.int32)
    weight = torch.zeros(n, k, dtype=torch.int8)
    packed_weight, epilogue = PackedWeight(packed, params, 4, 32, True), Epilogue(bias, residual, "gelu")
    grid = Grid(-128.0, 127.0, gpu_cases.EPS)
    tile = Config("tiled", 32, 64, 128)

    def run(capability):
        direct = Config("direct", 8, 32, slices=4, warps=4, stages=1)
        pipelined = [Config("pipelined", 64, 128, slices=s, stages=2) for s in (1, 2)] * (capability >= 90)
        skinny = Config("skinny", 8, 16, slices=4)
        for config in (skinny, direct, *pipelined, replace(tile, slices=2), tile, Config("dequantize")):
            launch.weight_only(x, packed_weight, epilogue, config)
        copied = [replace(tile, kernel="copied", m=64, slices=s) for s in (1, 2)] * (capability >= 90)
        skinny = Config("skinny", 8, 16, 128, slices=4, quantizes=True)
        for config in (skinny, tile, replace(tile, slices=2), *copied, Config("library")):
            for scales in (Scales(torch.empty(n), scale, zero, sums), Scales(torch.empty(n))):
                launch.scaled(x, weight, scales, grid, epilogue, torch.bfloat16, config)
        image, window = torch.empty(2, 8, 8, 64, dtype=torch.int8), torch.empty(n, 3, 3, 64, dtype=torch.int8)
        scales = Scales(torch.empty(n), scale, zero, torch.empty(n, 9, dtype=torch.int32))
        out = torch.empty(2, 8, 8, n, dtype=torch.bfloat16)
        params = ConvolutionParams(*((1, 1),) * 3)
        launch.convolution(image, window, scales, Epilogue(bias, torch.empty_like(out), "gelu"), params, out)

    with mock.patch.object(launch_options, "_EARLY", True):
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


def test_no_kernel_begins_early_unless_it_is_tried(compiled):
    codes = compiled(90, launch_for("int8", 1, 4096, 4096, Config("skinny", 8, 16, 128, slices=4)))
    assert len(codes) == 2
    assert not any("ACQBULK" in code.instructions for code in codes)


@pytest.mark.parametrize("activation", linears.ACTIVATIONS)
def test_every_activation_compiles(compiled, activation):
    from torchquant.ops.gpu import launch

    x, packed = torch.empty(4, 128, dtype=torch.float16), torch.empty(1, 64, 32, dtype=torch.int16)
    params, config = torch.empty(1, 64, 2, dtype=torch.float16), Config("skinny", 8, 16)
    weight, epilogue = PackedWeight(packed, params, 4, 128, False), Epilogue(activation=activation)
    (code,) = compiled(80, lambda: launch.weight_only(x, weight, epilogue, config))
    assert code.stack_bytes == 0


def test_one_compiled_kernel_serves_every_number_of_rows(monkeypatch):
    from torchquant.ops.gpu import kernels

    for name in (
        "weight_only_direct",
        "weight_only_pipelined",
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


def carried_out(text, *inputs):
    """The registers that a block of inline assembly leaves behind, as int32; `inputs` (n, 2) of 16 bits go in last."""
    count = 1 + max(int(i) for i in re.findall(r"\$(\d)", text)) - len(inputs)
    registers = {f"${count + i}": pairs.view(torch.int32)[:, 0].long() & 0xFFFFFFFF for i, pairs in enumerate(inputs)}

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
        elif name in WITH_TWO:
            operation, dtype = WITH_TWO[name]
            a, b = (value(v).to(torch.int32).view(dtype).double() for v in operands)
            b = b if len(b) == len(a) else b.repeat(len(a) // 2)
            registers[target] = operation(a, b).to(dtype).view(torch.int32).long()
        else:
            assert name == ".reg"
    return [registers[f"${i}"].to(torch.int32) for i in range(count)]


WITH_TWO = {
    f"{name}.rn.{kind}x2": (getattr(torch, name), dtype)
    for name in ("add", "sub", "mul")
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16))
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("bits", "chunk"), [(bits, chunk) for bits in (4, 8) for chunk in range(4)])
def test_the_assembly_of_pipelined_products_scales_two_codes_at_a_time(bits, chunk, zero, dtype):
    import triton.language as tl

    from torchquant.ops.gpu import pipelined_kernels

    kind = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
    text = pipelined_kernels._unpacking(bits, chunk, kind, zero)
    words = torch.arange(-(2**15), 2**15, dtype=torch.int16).reshape(-1, 2)
    scales = (torch.rand(words.shape) * 0.02 + 0.01).to(dtype)
    zeros = torch.randint(-8, 8, words.shape)
    offset = (136 if dtype == torch.bfloat16 else 1032) if bits == 4 else 0  # that `_values` adds
    inputs = (scales, (zeros + offset).to(dtype)) if zero else (scales,)
    (register,) = carried_out(text.strip("{} "), words, *inputs)
    codes = (words.int() >> 4 * chunk & 15) - 8 if bits == 4 else (words >> 8 * (chunk % 2)).to(torch.int8).int()
    expected = ((codes - zeros * zero).to(dtype).double() * scales.double()).to(dtype)
    assert torch.equal(register.view(dtype).reshape(-1, 2), expected)


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
