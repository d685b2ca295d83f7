"""Linears for NVIDIA GPUs as operators: packing, schema, shapes, references; torch.compile and export keep them."""

import pytest
import torch
from torch import nn

from tests.ops.gpu_cases import EPS, Convolution, Scaled, WeightOnly, relative_error
from torchquant.ops.gpu import convolutions, linears, packing  # noqa: F401 - registers operators

WEIGHT_ONLY = [
    WeightOnly(5, 24, 256, 4, 128, False, None, "relu", bias=True, residual=True),
    WeightOnly(5, 24, 200, 4, 0, True, None, "gelu"),
    WeightOnly(1, 7, 96, 8, 32, True, None, bias=True),
]
SCALED = [
    Scaled(5, 24, 100, torch.int8, "rows", None, "silu", bias=True, residual=True),
    Scaled(5, 24, 100, torch.int8, "affine", None, bias=True),
    Scaled(5, 24, 100, torch.int8, "codes", None),
    Scaled(5, 24, 96, torch.float8_e4m3fn, "rows", None, "relu"),
    Scaled(5, 24, 96, torch.float8_e4m3fn, "tensor", None),
]


def weight_only(case, dtype=torch.float32):
    x, packed, params, bias, residual, bits, group = case.arguments(dtype=dtype)
    return x, packed, params, bias, residual, bits, group, case.asymmetric, case.activation


def scaled(case, dtype=torch.float32):
    return *case.arguments(dtype=dtype), dtype


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (16, 128), (7, 200), (33, 384)])
def test_packed_codes_come_back_and_take_their_bits(bits, shape):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    packed = packing.pack_weight(codes, bits)
    assert torch.equal(packing.unpack_weight(packed, bits, shape[1]), codes)
    assert packed.is_contiguous()
    assert packed.nbytes == shape[0] * -(-shape[1] // 128) * 128 * bits // 8


def test_codes_beyond_their_bits_are_refused():
    with pytest.raises(ValueError, match="codes from -9 to 3 do not fit 4 signed bits"):
        packing.pack_weight(torch.tensor([[-9, 3]], dtype=torch.int8), 4)
    with pytest.raises(ValueError, match="not 3"):
        packing.pack_weight(torch.zeros(1, 1, dtype=torch.int8), 3)


def test_scale_and_zero_point_are_one_word():
    scale, zero = torch.rand(6, 3).bfloat16(), torch.randint(-8, 8, (6, 3))
    params = packing.pack_params(scale, zero)
    words = params.view(torch.int32)[..., 0]
    assert torch.equal((words & 0xFFFF).to(torch.int16).view(torch.bfloat16), scale.t())
    assert torch.equal((words >> 16).to(torch.int16).view(torch.bfloat16), zero.t().bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(packing.unpack_params(params), (scale, zero.bfloat16()), strict=True))


@pytest.mark.parametrize("case", WEIGHT_ONLY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_only_is_the_float_linear_of_the_unpacked_weight(case, dtype):
    x, packed, params, bias, residual, bits, group, _, activation = arguments = weight_only(case, dtype)
    scale, zero = (v.double().repeat_interleave(group, 1)[:, : case.k] for v in packing.unpack_params(params))
    weight = (packing.unpack_weight(packed, bits, case.k).double() - zero) * scale
    y = nn.functional.linear(x.double(), weight, None if bias is None else bias.double())
    y = linears.ACTIVATIONS[activation](y if residual is None else y + residual.double())
    output = torch.ops.torchquant.weight_only_linear(*arguments)
    assert output.dtype == dtype
    assert relative_error(output, y) < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]


def test_scaled_is_the_product_of_codes():
    x, weight, by_output, _, _, _, bias, residual, low, high, eps, _, _ = arguments = scaled(SCALED[0])
    scale = (x.abs().amax(1, keepdim=True) / 127).clamp(min=eps)
    codes = (x * (1 / scale)).round().clamp(low, high)
    y = (codes.double() @ weight.double().t()) * scale * by_output + bias + residual
    assert relative_error(torch.ops.torchquant.scaled_linear(*arguments), nn.functional.silu(y)) < 1e-6


def test_a_zero_point_is_taken_off_the_codes():
    x, weight, by_output, scale, zero, _, bias, _, low, high, _, _, _ = arguments = scaled(SCALED[1])
    values = ((x / scale).round() + zero).clamp(low, high).sub(zero).double() * scale
    y = values @ (weight.double() * by_output[:, None]).t() + bias
    assert relative_error(torch.ops.torchquant.scaled_linear(*arguments), y) < 1e-5


def test_rows_of_zeros_and_of_denormals_have_finite_codes():
    x = torch.tensor([[0.0, 0.0], [1e-40, -1e-41], [3e38, 1.0]])
    codes, scale = torch.ops.torchquant.quantize_rows(x, torch.int8, -127.0, 127.0, EPS)
    assert codes.tolist() == [[0, 0], [0, 0], [127, 0]]
    assert bool((scale > 0).all())
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("case", WEIGHT_ONLY + SCALED, ids=str)
def test_operators_keep_their_contract(case):
    if isinstance(case, WeightOnly):
        torch.library.opcheck(torch.ops.torchquant.weight_only_linear, weight_only(case))
        return
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    float8 = case.dtype == torch.float8_e4m3fn  # which torch's check of the schema cannot compare
    torch.library.opcheck(torch.ops.torchquant.scaled_linear, scaled(case), test_utils=tests[float8:])


CONVOLUTIONS = [
    Convolution((2, 7, 9, 5), 6, (3, 3), torch.int8, None, (2, 1), (1, 1), (1, 2), "relu"),
    Convolution((1, 6, 6, 16), 8, (1, 2), torch.float8_e4m3fn, None),
]


def convolution(case):
    tensors, form = case.arguments()
    return *tensors, None, *form, torch.float32


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_a_convolution_keeps_its_contract(case):
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    float8 = case.dtype == torch.float8_e4m3fn
    torch.library.opcheck(torch.ops.torchquant.scaled_conv2d, convolution(case), test_utils=tests[float8:])


def test_a_convolution_pads_with_real_zeros():
    x, weight, by_output, scale, zero, _, bias, _, stride, padding, dilation, *_ = arguments = convolution(
        CONVOLUTIONS[0]
    )
    values = ((x.double() - zero) * scale).permute(0, 3, 1, 2)
    weight = (weight.double() * by_output[:, None, None, None]).permute(0, 3, 1, 2)
    y = nn.functional.conv2d(values, weight, bias.double(), stride, padding, dilation).relu().permute(0, 2, 3, 1)
    output = torch.ops.torchquant.scaled_conv2d(*arguments)
    assert output.is_contiguous()
    assert relative_error(output, y) < 1e-6


def test_quantize_rows_keeps_its_contract():
    for dtype, high in ((torch.int8, 127.0), (torch.float8_e4m3fn, 448.0)):
        torch.library.opcheck(torch.ops.torchquant.quantize_rows, (torch.randn(2, 3, 8), dtype, -high, high, EPS))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        _, packed, params, *_ = weight_only(WEIGHT_ONLY[0])
        self.register_buffer("packed", packed)
        self.register_buffer("params", params)

    def forward(self, x):
        y = torch.ops.torchquant.weight_only_linear(x, self.packed, self.params, None, None, 4, 128, False, "none")
        return y * 2


@pytest.mark.parametrize("freezing", [False, True])
def test_compile_keeps_packed_weights_at_any_batch(freezing):
    model = Packed().eval()
    kernels = []
    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        torch._dynamo.reset()
        run = torch.compile(model, dynamic=True)
        for rows in (3, 5, 17):
            x = torch.randn(rows, 4, 256)
            if not kernels:
                result, kernels = torch._inductor.utils.run_and_get_code(run, x)
            else:
                result = run(x)
            torch.testing.assert_close(result, model(x))
    assert "torchquant.weight_only_linear" in kernels[0]


def test_export_keeps_the_operator():
    dynamic = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(Packed().eval(), (torch.randn(3, 4, 256),), dynamic_shapes=dynamic)
    graph = exported.run_decompositions().graph
    assert torch.ops.torchquant.weight_only_linear.default in [n.target for n in graph.nodes]


def test_arguments_that_do_not_fit_are_refused():
    x, *rest = weight_only(WEIGHT_ONLY[0])
    with pytest.raises(ValueError, match="cast the lowered model as a whole"):
        torch.ops.torchquant.weight_only_linear(x.bfloat16(), *rest)
    with pytest.raises(ValueError, match="x has 128 features"):
        torch.ops.torchquant.weight_only_linear(x[:, :128].contiguous(), *rest)
    with pytest.raises(ValueError, match="no activation 'tanh'"):
        torch.ops.torchquant.weight_only_linear(x, *rest[:-1], "tanh")
    x, weight, by_output, *rest = scaled(SCALED[0])
    with pytest.raises(ValueError, match=r"int8 or float8_e4m3fn, not torch\.uint8"):
        torch.ops.torchquant.scaled_linear(x, weight.to(torch.uint8), by_output, *rest)
    with pytest.raises(ValueError, match="needs x_scale"):
        torch.ops.torchquant.scaled_linear(x.to(torch.int8), weight, by_output, *rest)


def test_operands_of_too_few_elements_are_refused():
    """Kernels would read what lies behind them."""
    x, packed, params, bias, residual, *rest = weight_only(WEIGHT_ONLY[0])
    op = torch.ops.torchquant.weight_only_linear
    for short, match in (
        (bias[:1], "bias has 1 elements, and 24"),
        (bias[:0], "bias has 0"),
        (bias.sum(), "bias has 1"),
    ):
        with pytest.raises(ValueError, match=match):
            op(x, packed, params, short, residual, *rest)
    with pytest.raises(ValueError, match="the residual is"):
        op(x, packed, params, bias, residual[:, :1], *rest)
    for bad in ((packed.int(), params), (packed, params[:, :1])):
        with pytest.raises(ValueError, match=r"packed is torch\.int.* of 24 outputs, and the scales are"):
            op(x, *bad, bias, residual, *rest)
    x, weight, by_output, x_scale, zero_point, sums, *rest = scaled(SCALED[1])
    op = torch.ops.torchquant.scaled_linear
    with pytest.raises(ValueError, match="weight_scale has 2 elements, and 24"):
        op(x, weight, by_output[:2], x_scale, zero_point, sums, *rest)
    with pytest.raises(ValueError, match="weight_sum has 1 elements, and 24"):
        op(x, weight, by_output, x_scale, zero_point, sums[:1], *rest)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [((0, 1), (0, 0), (1, 1)), ((1, 1), (-1, 0), (1, 1)), ((1,), (0, 0), (1, 1))]
)
def test_a_convolution_of_no_geometry_is_refused(stride, padding, dilation):
    x, weight = torch.zeros(1, 4, 4, 8, dtype=torch.int8), torch.zeros(3, 3, 3, 8, dtype=torch.int8)
    one, tail = torch.ones(1), (stride, padding, dilation, "none", torch.float32)
    with pytest.raises(ValueError, match="no stride"):
        torch.ops.torchquant.scaled_conv2d(x, weight, one, one, None, None, None, None, *tail)
    tail = ((1, 1), (0, 0), (1, 1), "none", torch.float32)
    with pytest.raises(ValueError, match="x_scale has 2 elements, and 1"):
        torch.ops.torchquant.scaled_conv2d(x, weight, one, torch.ones(2), None, None, None, None, *tail)
    with pytest.raises(ValueError, match="bias has 1 elements, and 3"):
        torch.ops.torchquant.scaled_conv2d(x, weight, one, one, None, None, one, None, *tail)
