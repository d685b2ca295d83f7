"""The kernels on a GPU: skipped where there is none."""

import pytest
import torch

from tests.ops import gpu_cases
from tests.ops.gpu_cases import Scaled, WeightOnly

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("cuts_by_rule"),
]
SIZES = [1, 2, 7, 16, 17, 33, 64, 100, 256, 1000, 2049]
DATA = ["normal", "outliers", "zeros", "tiny"]


def runs_here(case):
    needs = (8, 9) if getattr(case, "dtype", None) == torch.float8_e4m3fn else (8, 0)
    if case.config is not None and case.config.kernel == "copied":
        needs = (9, 0)
    if case.config is not None and case.config.kernel == "pipelined":  # no other GPU has these tensor cores
        return torch.cuda.get_device_capability()[0] == 9
    return torch.cuda.get_device_capability() >= needs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", gpu_cases.cases() + gpu_cases.compiled_cases(), ids=str)
def test_a_kernel_computes_its_reference(case, dtype):
    if not runs_here(case):
        pytest.skip("this GPU has no float8")
    assert case.error("cuda", dtype) < 1e-2


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_weight_only_at_every_number_of_rows(m, bits, data):
    for n, k, group, asymmetric in ((384, 1024, 128, False), (200, 1056, 32, True), (64, 4096, 0, False)):
        case = WeightOnly(m, n, k, bits, group, asymmetric, None, bias=True, data=data)
        assert case.error("cuda", torch.bfloat16) < 1e-2, case


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_by_codes_at_every_number_of_rows(m, dtype, data):
    for n, k, mode in ((384, 1024, "rows"), (200, 1040, "tensor"), (72, 520, "codes"), (64, 4096, "rows")):
        case = Scaled(m, n, k, dtype, mode, None, bias=True, data=data)
        if not runs_here(case):
            pytest.skip("this GPU has no float8")
        assert case.error("cuda", torch.bfloat16) < 1e-2, case


@pytest.mark.parametrize(
    "case", [WeightOnly(4, 256, 512, 4, 128, False, None), Scaled(4, 256, 512, torch.int8, "rows", None)], ids=str
)
def test_operators_do_not_wait_for_the_gpu_and_record_as_graphs(case):
    operator = (
        torch.ops.torchquant.weight_only_linear if isinstance(case, WeightOnly) else torch.ops.torchquant.scaled_linear
    )
    arguments = case.arguments("cuda", torch.bfloat16)
    extra = (case.asymmetric, case.activation) if isinstance(case, WeightOnly) else (torch.bfloat16,)
    expected = operator(*arguments, *extra)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        operator(*arguments, *extra)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = operator(*arguments, *extra)
    output.fill_(float("nan"))
    graph.replay()
    assert torch.equal(output, expected)  # and deterministic


def test_no_number_of_rows_compiles_a_kernel_anew():
    from torchquant.ops.gpu import kernels
    from torchquant.ops.gpu.configs import Config

    config = Config("skinny", 8, 16, slices=4)
    compiled = set()
    for m in (1, 2, 3, 16, 31, 32):
        assert WeightOnly(m, 48, 640, 4, 128, False, config).error("cuda", torch.bfloat16) < 1e-2
        compiled.add(sum(len(cache[0]) for cache in kernels.weight_only_skinny.device_caches.values()))
    assert len(compiled) == 1
