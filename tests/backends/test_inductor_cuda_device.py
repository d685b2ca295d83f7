"""Lowering for NVIDIA GPUs, on one: skipped where there is none."""

import nets
import pytest
import torch

import torchquant as tq
from torchquant.backends import inductor_cuda
from torchquant.backends.inductor_cuda import SCHEMES
from torchquant.quantizers import CudaQuantizer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("cuts_by_rule"),
]
ANY = torch.export.Dim.DYNAMIC


def converted(scheme, model, batch, dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    model, batch = model.to("cuda", dtype).eval(), batch.to("cuda", dtype)
    quantizer = CudaQuantizer(scheme)
    graph = tq.quantize(model, batch, [batch], quantizer=quantizer, algorithms=(), progress=False, **options)
    return graph, batch


def runs_here(scheme):
    return "fp8" not in scheme or torch.cuda.get_device_capability() >= (8, 9)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_block_of_a_language_model_agrees_with_its_converted_graph(scheme, cuda_graphs):
    if not runs_here(scheme):
        pytest.skip("this GPU has no float8")
    shapes = {"x": {0: ANY, 1: ANY}}
    graph, x = converted(scheme, nets.Decoder(), torch.randn(2, 6, 64), dynamic_shapes=shapes)
    program = inductor_cuda.lower(graph, x, cuda_graphs=cuda_graphs, freezing=cuda_graphs)
    assert program.proof.fused == program.proof.annotated > 0
    for batch, length in ((1, 1), (3, 5), (1, 40)):
        more = torch.randn(batch, length, 64, device="cuda", dtype=torch.bfloat16)
        first, second = program(more), program(more)
        assert torch.equal(first, second)
        assert tq.sqnr_db(graph(more).float(), first.float()) > 20


@pytest.mark.parametrize("scheme", ["static_int8", "dynamic_int8", "static_fp8"])
def test_a_convolutional_network_agrees_with_its_converted_graph(scheme):
    if not runs_here(scheme):
        pytest.skip("this GPU has no float8")
    graph, x = converted(scheme, nets.cnn(), torch.randn(2, 3, 8, 8), torch.float32)
    program = inductor_cuda.lower(graph, x)
    assert sum(program.proof.kernels.values()) == program.proof.annotated
    assert program.proof.comparison.sqnr_db > 20


def test_a_package_and_a_saved_program_run(tmp_path):
    graph, x = converted("w4a16_g32", nets.Decoder(), torch.randn(2, 6, 64))
    program = inductor_cuda.lower(graph, x)
    expected = program(x)
    loaded = inductor_cuda.load(program.save(tmp_path / "program.pt2"))
    assert torch.equal(loaded(x), expected)
    package = torch._inductor.aoti_load_package(str(program.package(tmp_path / "package.pt2")))
    assert tq.sqnr_db(expected.float(), package(x).float()) > 40
