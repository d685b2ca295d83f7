"""Lowering for NVIDIA GPUs, with the kernels' references on the CPU: what a graph becomes, and what is refused."""

from collections import Counter

import nets
import pytest
import torch
import torch.nn.functional as F
from foreign import EveryKind, EverySpec, SpecQuantizer, calibrated, dynamic, groupwise, per_channel, per_tensor
from nets import Call
from torch import nn
from torch._inductor.utils import run_and_get_code
from torchao.quantization.granularity import PerGroup
from torchao.quantization.pt2e._affine_quantization import AffineQuantizedMinMaxObserver
from torchao.quantization.pt2e.observer import MappingType
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationSpec
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import torchquant as tq
from torchquant.backends import inductor_cuda
from torchquant.backends.inductor_cuda import SCHEMES
from torchquant.backends.inductor_cuda import program as program_of_ops
from torchquant.fx import ops, passes
from torchquant.fx.storing import unpack_weights
from torchquant.ops.gpu.rewriting import OPS
from torchquant.quantizers import CudaQuantizer, X86Quantizer, XnnpackQuantizer

ANY = torch.export.Dim.DYNAMIC
SMALL = [name for name, s in SCHEMES.items() if (s.weight.group_size or 32) == 32]  # that divide small layers


class Layers(nn.Module):
    """A pair of siblings, a product with a residual, and a convolution with an activation behind it."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96, bias=False), nn.Linear(96, 64)
        self.conv = nn.Conv2d(64, 32, 1, stride=2)

    def forward(self, x):
        x = self.down(F.silu(self.gate(x)) * self.up(x)) + x
        return F.relu6(self.conv(x.unflatten(1, (-1, 1)).permute(0, 3, 1, 2)))


def converted(quantizer, model, batch, **options):
    quantizer = CudaQuantizer(quantizer) if isinstance(quantizer, str) else quantizer
    return tq.quantize(model, batch, [batch], quantizer=quantizer, algorithms=(), progress=False, **options)


def our_ops(graph):
    return [n for n in graph.graph.nodes if str(n.target).split(".")[1:2] in ([name] for name in OPS)]


def convolutions(graph):
    return [n for n in our_ops(graph) if "scaled_conv2d" in str(n.target)]


def endings(graph):
    """Activation and whether there is a residual, of each op of ours."""
    calls = [ops.arguments(n) for n in our_ops(graph)]
    return [(arguments["activation"], arguments["residual"] is not None) for arguments in calls]


def agree(graph, lowered, *batch):
    """SQNR in dB; where both round to the same codes, that of float32 arithmetic."""
    return tq.sqnr_db(graph(*batch).float(), lowered(*batch).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SMALL)
def test_every_scheme_becomes_packed_ops_with_their_endings(scheme, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 64).to(dtype)
    graph = converted(scheme, Layers().to(dtype).eval(), x)
    lowered = inductor_cuda.transform(graph)
    assert endings(lowered) == [("none", False), ("none", True), ("relu6", False)]
    assert not [n for n in lowered.graph.nodes if ops.is_dequantize(n)]
    assert agree(graph, lowered, x) > (100 if dtype == torch.float32 else 30)


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_asymmetric_g32", "dynamic_int8", "dynamic_fp8"])
def test_a_llama_block_becomes_four_products(scheme):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 64)
    graph = converted(scheme, nets.Decoder().eval(), x, dynamic_shapes=({0: ANY, 1: ANY},))
    lowered = inductor_cuda.transform(graph)
    # q, k and v; o and its residual; gate and up; down and its residual
    assert endings(lowered) == [("none", False), ("none", True), ("none", False), ("none", True)]
    for rows, length in ((1, 3), (3, 1), (2, 9)):
        x = torch.randn(rows, length, 64)
        assert agree(graph, lowered, x) > 100


def test_packed_weights_take_the_bits_they_say():
    x = torch.randn(4, 512, dtype=torch.bfloat16)
    model = nn.Linear(512, 256, bias=False).bfloat16()
    taken = {
        scheme: 8 * passes.weight_bytes(inductor_cuda.transform(converted(scheme, model, x))) / model.weight.numel()
        for scheme in SCHEMES
    }
    # a scale and a zero point of 16 bits each for a group; a float32 scale for a channel; one for a tensor
    assert taken["w4a16"] == taken["w4a16_asymmetric"] == 4 + 32 / 128
    assert taken["w4a16_g64"] == 4 + 32 / 64
    assert taken["w4a16_g32"] == 4 + 32 / 32
    assert taken["w8a16"] == 8 + 32 / 512
    for scheme in ("dynamic_int8", "dynamic_fp8"):
        assert taken[scheme] == 8 + 32 / 512
    assert all(bits < 8.2 for bits in taken.values())


ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_addend_and_an_activation_end_in_the_kernel(activation):
    x, y = torch.randn(4, 32), torch.randn(4, 32)
    function = ACTIVATIONS[activation]
    model = Call(lambda m, x, y: function(y + m.inner(x)), inner=nn.Linear(32, 32)).eval()
    graph = tq.quantize(model, (x, y), [(x, y)], quantizer=CudaQuantizer("dynamic_int8"), algorithms=(), progress=False)
    lowered = inductor_cuda.transform(graph)
    assert endings(lowered) == [(activation, True)]
    assert agree(graph, lowered, x, y) > 100


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: m.inner(x) + x[:1], ("none", False)),  # another shape
        (lambda m, x: m.inner(x) + (m.inner.weight[0] + 1), ("none", False)),
        (lambda m, x: torch.add(m.inner(x), x, alpha=2), ("none", False)),
        (lambda m, x: m.inner(x) + x.double(), ("none", False)),  # a sum of another dtype
        (lambda m, x: (y := m.inner(x)).relu() + y, ("none", False)),  # read twice
        (lambda m, x: F.hardtanh(m.inner(x), 0.0, 5.0), ("none", False)),
        (lambda m, x: x.add_(m.inner(x)), ("none", True)),  # the sum is copied into the addend
        (lambda m, x: m.inner(x).relu_(), ("relu", False)),
        (lambda m, x: m.inner(x).clamp(min=0), ("relu", False)),
        (lambda m, x: m.inner(x).clamp(0, 6), ("relu6", False)),
    ],
)
def test_only_what_the_kernel_computes_ends_in_it(function, expected):
    x = torch.randn(4, 32)
    graph = converted("w8a16", Call(function, inner=nn.Linear(32, 32)).eval(), x)
    lowered = inductor_cuda.transform(graph)
    assert endings(lowered) == [expected]
    assert tq.sqnr_db(graph(x.clone()), lowered(x.clone())) > 100


def test_linears_become_one_only_if_they_read_the_same_values_in_the_same_way():
    x = torch.randn(4, 32)
    model = Call(
        lambda m, x: m.a(x).relu() + m.b(x).relu() + m.c(x) + m.d(x + 1),
        **{name: nn.Linear(32, size) for name, size in zip("abcd", (32, 32, 32, 32), strict=True)},
    )
    lowered = inductor_cuda.transform(converted("dynamic_int8", model, x))
    assert len(our_ops(lowered)) == 2
    alike = Call(lambda m, x: m.a(x).relu() + m.b(x).relu(), a=nn.Linear(32, 32), b=nn.Linear(32, 32))
    graph = converted("static_int8", alike, x)
    lowered = inductor_cuda.transform(graph)
    assert endings(lowered) == [("relu", False)]
    assert agree(graph, lowered, x) > 100
    mixed = CudaQuantizer("dynamic_int8", overrides={"b": "w8a16"})
    assert len(our_ops(inductor_cuda.transform(converted(mixed, alike, x)))) == 2


def torchaos(**options):
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(**options))


FOREIGN = {
    "torchao static": (torchaos, "scaled", 4),
    "torchao dynamic": (lambda: torchaos(is_dynamic=True), "scaled", 4),
    "x86": (X86Quantizer, "scaled", 4),
    "xnnpack per token": (lambda: XnnpackQuantizer("dynamic_int8"), "scaled", 4),
    "xnnpack static": (lambda: XnnpackQuantizer("static_int8"), "scaled", 4),
    "groups": (lambda: SpecQuantizer({"linear"}, None, groupwise(32)), "weight_only", 4),
    "groups behind int8": (lambda: SpecQuantizer({"linear"}, dynamic(), groupwise(32)), "weight_only", 1),
    "affine weights": (
        lambda: SpecQuantizer({"linear"}, None, per_channel(torch.uint8, 0, 255, symmetric=False)),
        "weight_only",
        4,
    ),
    "affine 4 bits": (
        lambda: SpecQuantizer({"linear"}, None, per_channel(torch.uint8, 0, 15, symmetric=False)),
        "weight_only",
        4,
    ),
}


def test_sub_byte_dtypes_are_packed_in_the_bits_that_they_name():
    observer = AffineQuantizedMinMaxObserver.with_args(
        mapping_type=MappingType.ASYMMETRIC,
        target_dtype=torch.uint4,
        granularity=PerGroup(32),
        eps=1e-6,
        zero_point_dtype=torch.int32,
    )
    x = torch.randn(4, 32)
    quantizer = SpecQuantizer({"linear"}, None, QuantizationSpec(torch.uint8, observer, 0, 15))
    graph = convert_pt2e(calibrated(nn.Linear(32, 16), [(x,)], quantizer))
    lowered = inductor_cuda.transform(graph)
    assert ops.arguments(our_ops(lowered)[0])["bits"] == 4
    assert agree(graph, lowered, x) > 100


@pytest.mark.parametrize("low", [-8, 0, 3])
def test_grids_of_four_bits_are_packed_in_four_wherever_they_lie(low):
    x = torch.randn(4, 32)
    weight = per_channel(torch.int8, min(low, 0), low + 12, symmetric=False)
    graph = convert_pt2e(calibrated(nn.Linear(32, 16), [(x,)], SpecQuantizer({"linear"}, None, weight)))
    lowered = inductor_cuda.transform(graph)
    assert ops.arguments(our_ops(lowered)[0])["bits"] == 4
    assert agree(graph, lowered, x) > 100


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")  # they leave ops without a word
def test_graphs_of_other_quantizers_are_lowered_alike(name):
    torch.manual_seed(0)
    make, kind, count = FOREIGN[name]
    x = torch.randn(2, 6, 32)
    graph = convert_pt2e(calibrated(nets.Block(), [(x,)], make()))
    lowered = inductor_cuda.transform(graph)
    counts = Counter(str(n.target).split(".")[1] for n in our_ops(lowered))
    assert counts[f"{kind}_linear"] == count
    assert sum(counts.values()) == 4
    names = {ops.qdq_name(n) for n in lowered.graph.nodes}
    assert not names & {"choose_qparams", "quantize_per_token", "dequantize_per_token", "choose_qparams_affine"}
    assert agree(graph, lowered, x) > 60


def test_every_kind_of_spec_is_lowered_or_refused_by_name():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 4, 4)
    graph = convert_pt2e(calibrated(EveryKind(), [(x,)], EverySpec()))
    refused = r"conv_transpose2d conv_transpose2d \(up\).*only linears.*allow_float=\['node:conv_transpose2d'\]"
    with pytest.raises(tq.LoweringError, match=refused):
        inductor_cuda.transform(graph)
    with pytest.raises(tq.LoweringError, match=r"linear_3 \(rows\).*along axis 1"):
        inductor_cuda.transform(graph, allow_float=["up"])
    with pytest.raises(tq.LoweringError, match=r"linear_4 \(group\).*groups of 8"):
        inductor_cuda.transform(graph, allow_float=["up", "rows"])
    lowered = inductor_cuda.transform(graph, allow_float=["up", "rows", "group"])
    assert len(our_ops(lowered)) == 7


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")  # they leave ops without a word
def test_products_of_two_quantized_activations_are_refused():
    batch = nets.token_batch()
    quantizer = SpecQuantizer({"linear", "matmul"}, per_tensor(), per_channel())
    graph = convert_pt2e(calibrated(nets.MaskedTokens(), [batch], quantizer))
    with pytest.raises(tq.LoweringError, match=r"matmul matmul .*only linears"):
        inductor_cuda.transform(graph)
    assert len(our_ops(inductor_cuda.transform(graph, allow_float=["op:matmul"]))) == 2  # q, k and v are one


def test_a_network_of_convolutions_keeps_what_stays_float():
    image = torch.randn(2, 3, 16, 16)
    graph = converted("static_int8", nets.Mobile().eval(), image)
    lowered = inductor_cuda.transform(graph)
    assert endings(lowered) == [("relu6", False), ("relu6", False), ("none", True), ("none", False)]
    assert agree(graph, lowered, image) > 60


@pytest.mark.parametrize("scheme", ["dynamic_int8", "static_int8", "dynamic_fp8_tensor", "w4a16_g32"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(32, 16), (32,)),
        (nn.Conv1d(32, 16, 1, stride=2), (2, 32, 9)),
        (nn.Conv2d(32, 16, 1, stride=(2, 3)), (2, 32, 9, 7)),
    ],
)
def test_one_row_and_strided_convolutions(layer, shape, scheme):
    x = torch.randn(shape)
    graph = converted(scheme, layer, x)
    lowered = inductor_cuda.transform(graph)
    assert len(our_ops(lowered)) == 1
    assert agree(graph, lowered, x) > 100


# convolutions of codes by codes ---------------------------------------------------------------------------------------

CODES = ["dynamic_int8", "static_int8", "dynamic_fp8", "static_fp8_tensor"]


class Bottleneck(nn.Module):
    """As in a ResNet: three channels first, a strided block with in-place sums and activations, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 5, 2, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.first, self.second = nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.down, self.same = nn.Conv2d(16, 24, 1, stride=2), nn.Conv2d(24, 24, 3, padding=2, dilation=2)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        y = self.second(F.relu(self.first(x)))
        y += self.down(x)
        y = F.relu_(y)
        y = F.relu(self.same(y) + y)
        return self.head(F.adaptive_avg_pool2d(y, 1).view(y.shape[0], -1))


@pytest.mark.parametrize("scheme", CODES)
def test_a_residual_network_becomes_ops_with_their_endings_at_any_size(scheme):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40, 32)
    graph = converted(scheme, Bottleneck().eval(), x, dynamic_shapes=({0: ANY, 2: ANY, 3: ANY},))
    lowered = inductor_cuda.transform(graph)
    down = ("relu", True)
    assert endings(lowered) == [
        ("relu", False),
        ("relu", False),
        ("none", False),
        down,
        ("relu", True),
        ("none", False),
    ]
    assert len(convolutions(lowered)) == 4
    assert not [n for n in lowered.graph.nodes if ops.is_dequantize(n)]
    for shape in ((1, 3, 33, 47), (3, 3, 24, 64)):
        assert agree(graph, lowered, torch.randn(shape)) > 60


SHAPES = {
    "rgb": (nn.Conv2d(3, 8, 7, stride=2, padding=3), (2, 3, 19, 17), "scaled_conv2d"),
    "dilated": (nn.Conv2d(16, 8, 3, padding=(2, 1), dilation=(2, 3), bias=False), (2, 16, 9, 9), "scaled_conv2d"),
    "same, even": (nn.Conv2d(16, 8, (4, 3), padding="same"), (2, 16, 9, 7), "scaled_conv2d"),
    "same, even, dilated": (nn.Conv2d(16, 8, (2, 4), padding="same", dilation=(3, 1)), (2, 16, 9, 7), "scaled_conv2d"),
    "valid": (nn.Conv2d(16, 8, 3, padding="valid"), (2, 16, 9, 7), "scaled_conv2d"),
    "reflected": (nn.Conv2d(16, 8, 3, padding=1, padding_mode="reflect"), (2, 16, 9, 7), "scaled_conv2d"),
    "padded pixel": (nn.Conv2d(16, 8, 1, padding=1), (2, 16, 9, 7), "scaled_conv2d"),
    "same pixel": (nn.Conv2d(16, 8, 1, padding="same"), (2, 16, 9, 7), "scaled_linear"),
    "line": (nn.Conv1d(16, 8, 5, stride=2, padding=2, dilation=2), (2, 16, 19), "scaled_conv2d"),
    "line, same, even": (nn.Conv1d(16, 8, 4, padding="same"), (2, 16, 9), "scaled_conv2d"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("scheme", CODES)
def test_windows_of_every_shape(name, scheme):
    torch.manual_seed(0)
    layer, shape, op = SHAPES[name]
    x = torch.randn(shape) + 0.5  # so that zero points are not 0
    graph = converted(scheme, layer, x)
    (call,) = our_ops(lowered := inductor_cuda.transform(graph))
    assert op in str(call.target)
    assert agree(graph, lowered, x) > 100


def test_lines_have_residuals_too():
    x = torch.randn(2, 8, 9)
    layers = {"a": nn.Conv1d(8, 16, 3, padding=1), "b": nn.Conv1d(16, 8, 3, padding="same")}
    model = Call(lambda m, x: F.relu(m.b(F.silu(m.a(x))) + x), **layers)
    graph = converted("static_int8", model, x)
    lowered = inductor_cuda.transform(graph)
    assert endings(lowered) == [("silu", False), ("relu", True)]
    assert agree(graph, lowered, x) > 100


def test_windows_and_pixels_read_the_same_image_each_with_scales_of_its_own():
    x = torch.randn(2, 8, 6, 6)
    layers = {"a": nn.Conv2d(8, 8, 1), "b": nn.Conv2d(8, 8, 3, padding=1), "c": nn.Conv2d(8, 8, 5, padding=2)}
    graph = converted("dynamic_int8", Call(lambda m, x: m.a(x) + m.b(x) * m.c(x) + m.b(m.a(x)), **layers), x)
    lowered = inductor_cuda.transform(graph)
    assert len(convolutions(lowered)) == 3
    first, second = (ops.arguments(n)["x"] for n in convolutions(lowered)[:2])
    assert first is second  # one image of codes
    assert agree(graph, lowered, x) > 60


def test_an_image_that_is_written_in_place_is_read_again():
    def forward(m, x):
        image = x + 1
        part = image[:, :8]
        first = m.a(part)
        image.mul_(2)
        return first - m.b(part)

    x = torch.randn(2, 9, 6, 6)
    graph = converted("w8a16", Call(forward, a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 8, 1)), x)
    assert agree(graph, inductor_cuda.transform(graph), x) > 100


def test_between_convolutions_codes_are_written_once_in_the_order_they_are_read():
    x = torch.randn(2, 16, 12, 12).contiguous(memory_format=torch.channels_last)
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    lowered = inductor_cuda.transform(converted("static_int8", model.eval(), x))
    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(lowered), x)
    assert code.count("= async_compile") == 2  # a kernel that quantizes, for each convolution
    assert code.count("= torch.ops.torchquant.scaled_conv2d") == 2
    assert "transpose" not in code


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")  # they leave ops without a word
@pytest.mark.parametrize(
    "make",
    [
        torchaos,
        lambda: XnnpackQuantizer("static_int8"),
        lambda: XnnpackQuantizer("dynamic_int8"),
        X86Quantizer,
        lambda: SpecQuantizer({"conv2d"}, dynamic(), per_channel()),
    ],
)
def test_convolutions_of_other_quantizers_are_lowered_alike(make):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    layers = (
        nn.Conv2d(3, 8, 3, 2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU6(),
    )
    graph = convert_pt2e(calibrated(nn.Sequential(*layers), [(x,)], make()))
    lowered = inductor_cuda.transform(graph)
    assert [e[0] for e in endings(lowered)] == ["relu", "relu6"]
    assert len(convolutions(lowered)) == 2
    assert agree(graph, lowered, x) > 60


@pytest.mark.parametrize(
    ("layer", "shape", "activation", "weight", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), (2, 4, 6, 6), per_tensor(), per_channel(), "one group"),
        (nn.Conv2d(4, 4, 3), (4, 6, 6), per_tensor(), per_channel(), "no batch dimension"),
        (nn.Conv2d(4, 4, 1), (4, 6, 6), per_tensor(), per_channel(), "no batch dimension"),
        (nn.Conv2d(4, 4, 3), (2, 4, 6, 6), None, per_channel(), "no matrix product.*8 bits with one scale"),
        (nn.Conv2d(4, 4, 3), (2, 4, 6, 6), per_tensor(torch.int16, -(2**15), 2**15 - 1), per_channel(), "8 bits"),
        (nn.Conv2d(4, 4, 3), (2, 4, 6, 6), per_tensor(), per_channel(symmetric=False), "no zero points"),
        (nn.Conv2d(4, 4, 3), (2, 4, 6, 6), per_tensor(), per_channel(axis=1), "along axis 1"),
    ],
)
def test_convolutions_without_a_kernel_are_refused_by_name(layer, shape, activation, weight, reason):
    x, quantizer = torch.randn(shape), SpecQuantizer({"conv2d"}, activation, weight)
    model = Call(lambda m, x: m.inner(x), inner=layer).eval()
    prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    tq.calibrate(prepared, [(x,)], progress=False)
    graph = convert_pt2e(prepared)
    with pytest.raises(tq.LoweringError, match=rf"conv2d conv2d \(inner\).*{reason}.*node:conv2d"):
        inductor_cuda.transform(graph)


def test_a_saved_converted_graph_is_lowered_like_the_one_saved(tmp_path):
    x = torch.randn(2, 6, 64)
    graph = converted("static_fp8", nets.Decoder().eval(), x, dynamic_shapes=({0: ANY, 1: ANY},))
    loaded = inductor_cuda.transform(tq.load(tq.save(graph, tmp_path / "graph.pt2")))
    assert endings(loaded) == endings(inductor_cuda.transform(graph))
    assert agree(graph, loaded, x) > 100


def test_the_graph_that_came_is_left_as_it_was():
    x = torch.randn(4, 32)
    graph = converted("w8a16", nn.Linear(32, 32), x)
    before, code = graph(x), graph.code
    inductor_cuda.transform(graph)
    assert graph.code == code
    assert torch.equal(graph(x), before)


# programs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=["w4a16_g32", pytest.param("static_int8", marks=pytest.mark.slow), "dynamic_fp8"]
)
def program(request):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 64).bfloat16()
    graph = converted(request.param, nets.Decoder().bfloat16().eval(), x, dynamic_shapes=({0: ANY, 1: ANY},))
    return graph, inductor_cuda.lower(graph, x, device="cpu", freezing=request.param != "dynamic_fp8")


def test_a_program_calls_every_op_of_its_graph_whether_frozen_or_not(program):
    _, lowered = program
    assert sum(lowered.proof.kernels.values()) == 4
    assert lowered.proof.annotated == lowered.proof.fused == 7
    assert "1 attention" in lowered.proof.left_float


def test_a_program_takes_any_batch_and_length_and_checks_its_inputs(program):
    graph, lowered = program
    for rows, length in ((3, 5), (1, 7), (4, 2)):
        x = torch.randn(rows, length, 64).bfloat16()
        assert agree(graph, lowered, x) > 25
    for bad in (torch.randn(2, 6, 64), torch.randn(2, 6, 32).bfloat16(), None):
        with pytest.raises(tq.InputError):
            lowered(bad)


def test_arguments_may_be_given_by_name(program):
    _, lowered = program
    x = torch.randn(2, 6, 64).bfloat16()
    assert torch.equal(lowered(x=x), lowered(x))


def test_a_graph_moves_with_what_it_makes(program):
    _, lowered = program
    moved = program_of_ops.moved(lowered.graph, torch.device("meta"))
    assert all(t.device.type == "meta" for t in moved.state_dict().values())
    assert not [n for n in moved.graph.nodes if torch.device("cpu") in (*n.args, *n.kwargs.values())]
    assert all(t.device.type == "cpu" for t in lowered.graph.state_dict().values())


def test_a_saved_program_computes_the_same(program, tmp_path):
    graph, lowered = program
    loaded = inductor_cuda.load(lowered.save(tmp_path / "program.pt2"), device="cpu")
    x = torch.randn(2, 6, 64).bfloat16()
    assert torch.equal(loaded(x), lowered(x))
    assert loaded.proof == lowered.proof
    plain = passes.copy_graph(graph)
    unpack_weights(plain)  # a tile of the kernels is more than the weights of so small a network, packed
    assert loaded.size_bytes == lowered.size_bytes <= passes.weight_bytes(plain)
    assert "7/7" in str(tq.report(graph, loaded))


def test_a_program_of_convolutions_proves_and_packages_them(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 24, 24)
    graph = converted("static_int8", Bottleneck().eval(), x, dynamic_shapes=({0: ANY},))
    lowered = inductor_cuda.lower(graph, x, device="cpu")
    assert lowered.proof.kernels == {"scaled_conv2d": 4, "scaled_linear": 2}
    loaded = inductor_cuda.load(lowered.save(tmp_path / "program.pt2"), device="cpu")
    x = torch.randn(5, 3, 24, 24)
    assert torch.equal(loaded(x), lowered(x))
    assert agree(graph, lowered, x) > 60


def test_freezing_and_settings_concern_one_program():
    x = torch.randn(4, 64)
    graph = converted("w4a16_g32", nn.Linear(64, 32), x)
    frozen, plain = (inductor_cuda.lower(graph, x, device="cpu", freezing=f) for f in (True, False))
    assert not torch._inductor.config.freezing
    assert frozen.proof.kernels == plain.proof.kernels == {"weight_only_linear": 1}
    assert torch.equal(frozen(x), plain(x))


def test_a_package_runs_in_python(tmp_path):
    x = torch.randn(4, 64)
    graph = converted("dynamic_int8", nn.Sequential(nn.Linear(64, 32), nn.ReLU()), x, dynamic_shapes=({0: ANY},))
    lowered = inductor_cuda.lower(graph, x, device="cpu")
    run = torch._inductor.aoti_load_package(str(lowered.package(tmp_path / "package.pt2")))
    for rows in (2, 9):
        x = torch.randn(rows, 64)
        assert agree(graph, lambda *tensors: run(*tensors)[0], x) > 100


def test_a_bfloat16_network_is_held_to_what_it_reproduces_itself():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 64).bfloat16()
    graph = converted("dynamic_fp8", nets.Decoder().bfloat16().eval(), x)
    comparison = inductor_cuda.lower(graph, x, device="cpu").proof.comparison
    assert 25 < comparison.sqnr_db < 100


def test_without_a_gpu_lowering_says_how_to_check_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    graph = converted("w8a16", nn.Linear(32, 32), torch.randn(4, 32))
    with pytest.raises(tq.LoweringError, match=r'device="cpu"'):
        inductor_cuda.lower(graph)


def test_a_program_that_computes_something_else_is_refused(monkeypatch):
    x = torch.randn(4, 32)
    graph = converted("w8a16", nn.Linear(32, 32), x)
    monkeypatch.setattr(inductor_cuda.CudaProgram, "run", _twice(inductor_cuda.CudaProgram.run))
    with pytest.raises(tq.LoweringError, match="dB from the converted graph"):
        inductor_cuda.lower(graph, x, device="cpu")


def _twice(call):
    return lambda self, *args: tuple(2 * v for v in call(self, *args))


def test_dynamo_reaches_the_same_lowering():
    torch._dynamo.reset()
    x = torch.randn(3, 32)
    model = Call(lambda m, x: m.a(x).relu(), a=nn.Linear(32, 32))
    graph = converted("dynamic_int8", model, x)
    run = torch.compile(graph, backend="torchquant_cuda", options={"device": "cpu"})
    assert tq.sqnr_db(graph(x), run(x)) > 60
    torch._dynamo.reset()
    wrong = torch.compile(graph, backend="torchquant_cuda", options={"tune": True})
    with pytest.raises(Exception, match=r"no options \['tune'\]"):
        wrong(x)


def test_a_file_of_another_kind_is_told_before_a_missing_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "notes.pt2").write_text("not a program")
    with pytest.raises(tq.ArtifactError, match=r"notes\.pt2"):
        inductor_cuda.load(tmp_path / "notes.pt2")
    with pytest.raises(tq.ArtifactError, match=r"no\.pt2"):
        inductor_cuda.load(tmp_path / "no.pt2")
