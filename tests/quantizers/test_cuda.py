"""CudaQuantizer: packed weight-only, int8 and float8 schemes, on models of three dtypes; what stays float, and why."""

import nets
import pytest
import torch
import torch.nn.functional as F
from nets import Call
from torch import nn
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

import torchquant as tq
from torchquant.algorithms.adaround import AdaRound
from torchquant.algorithms.range_search import RangeSearch
from torchquant.backends.inductor_cuda import SCHEMES
from torchquant.errors import SchemeError
from torchquant.formats.dialect import EPS, choose_scale, quantize_scaled
from torchquant.formats.integer import encode
from torchquant.fx import ops
from torchquant.observers.minmax import GroupWeight
from torchquant.quantizers.cuda import CudaQuantizer

ANY = torch.export.Dim.DYNAMIC
GROUPS = {name: s.weight.group_size for name, s in SCHEMES.items() if s.weight.group_size}


class Layers(nn.Module):
    """Two linears, a residual, and a convolution of kernel size 1 behind them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128, bias=False)
        self.conv = nn.Conv2d(128, 32, 1, stride=2)

    def forward(self, x):
        x = self.down(F.silu(self.up(x))) + x
        return self.conv(x.transpose(1, 2).unflatten(2, (2, -1)))


def quantized(scheme, model, batch, **options):
    return tq.quantize(model, batch, [batch], quantizer=CudaQuantizer(scheme), algorithms=(), progress=False, **options)


def sites(graph, op="linear"):
    return [s for s in tq.report(graph).sites if s.op == op]


def codes_of(graph):
    """The stored codes of each weight, by the op's name."""
    codes = {}
    for node in graph.graph.nodes:
        kind = ops.kind_of(node)
        if kind is not None and kind.weight is not None:
            codes[node.name] = ops.constant_value(graph, node.args[kind.weight].args[0])
    return codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_covers_linears_and_pointwise_convolutions(scheme, dtype, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 128).to(dtype)
    exported = tq.export(Layers().to(dtype), x, dynamic_shapes=({0: ANY},))
    graph = quantized(scheme, exported, x)
    spec, report = SCHEMES[scheme], tq.report(graph)
    assert report.coverage == "3/3"
    for site in (s for s in report.sites if s.compute):
        codes = codes_of(graph)[site.node]
        assert codes.dtype == site.weight.dtype == spec.weight.format.dtype
        assert codes.float().min() >= site.weight.quant_min == spec.weight.format.quant_min
        assert codes.float().max() <= site.weight.quant_max == spec.weight.format.quant_max
        assert site.weight.scale.numel() == _scales(spec.weight, codes)
        assert site.weight.group_size in (None, spec.weight.group_size)
        assert (site.activation is None) == (spec.activation is None)
        if site.activation is not None:
            assert site.activation.dynamic == spec.activation.dynamic
            assert site.activation.token == (spec.activation.granularity == "token")
    assert not [p for p in graph.parameters() if p.ndim > 1]
    # uniform weights: 4 bits leave 1 / 225 of their energy, float8 about 1 / 1400 of each factor's
    least = {"w4": 22, "fp": 26}.get("fp" if "fp8" in scheme else scheme[:2], 36)
    assert least < tq.sqnr_db(exported(x).float(), graph(x).float()) < 60
    loaded = tq.load(tq.save(graph, tmp_path / "graph.pt2"))
    assert [s.describe() for s in _grids(loaded)] == [s.describe() for s in _grids(graph)]
    for rows in (1, 5):
        x = torch.randn(rows, 8, 128).to(dtype)
        assert torch.equal(loaded(x), graph(x))


def _scales(spec, codes):
    return {"tensor": 1, "channel": len(codes)}.get(spec.granularity) or codes.numel() // spec.group_size


def _grids(graph):
    return [q for s in tq.report(graph).sites for q in (s.activation, s.weight) if q is not None]


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_asymmetric_g32", "w8a16", "dynamic_fp8", "static_fp8_tensor"])
def test_stored_codes_are_the_nearest_to_the_weight(scheme):
    x, layer = torch.randn(4, 64), nn.Linear(64, 8)
    with torch.no_grad():
        layer.weight[3] = 0
        layer.weight[4] *= 1e-30
    graph = quantized(scheme, Call(lambda m, x: m.inner(x), inner=layer), x)
    (site,) = sites(graph)
    (codes,) = codes_of(graph).values()
    weight, size = layer.weight.detach(), site.weight.group_size
    if size:
        scale = site.weight.scale.reshape(8, -1).repeat_interleave(size, 1)
        zero_point = site.weight.zero_point.reshape(8, -1).repeat_interleave(size, 1)
        values = (codes - zero_point) * scale
        assert ((values - weight).abs() <= 0.51 * scale).all()
    else:
        expected = encode(weight, site.weight)
        assert (codes.float() - expected.float()).abs().max() <= (0 if "fp8" in scheme else 1)
    assert graph(x).isfinite().all()
    assert not codes[3].float().any() or "asymmetric" in scheme


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_groups_are_numbers_of_the_weights_dtype_and_follow_small_weights(dtype):
    weight = (torch.randn(8, 64) * 1e-3).to(dtype)
    observer = GroupWeight(group_size=32, symmetric=True, dtype=torch.int8, quant_min=-8, quant_max=7)
    observer(weight)
    scale, _ = observer.calculate_qparams()
    assert torch.equal(scale, scale.to(dtype).float())
    assert torch.allclose(scale, weight.float().reshape(8, 2, 32).abs().amax(2) / 7.5, rtol=2**-7)


def test_float8_codes_are_not_rounded_to_integers_first():
    x = torch.tensor([[448.0, 0.3, -0.02, 2.6]])
    codes = quantize_scaled(x, choose_scale(x, -1, -448.0, 448.0, EPS), -448.0, 448.0, torch.float8_e4m3fn)
    assert torch.equal(codes, x.to(torch.float8_e4m3fn))
    graph = quantized("static_fp8", nn.Linear(64, 8), torch.randn(4, 64))
    target = torch.ops.quantized_decomposed.quantize_per_tensor.default  # which rounds them
    assert not [n for n in graph.graph.nodes if n.target is target]


def test_a_convolution_has_one_scale_for_each_pixel():
    image = torch.randn(2, 16, 3, 3)
    image[0, :, 0, 0] *= 1000
    model = Call(lambda m, x: m.inner(x), inner=nn.Conv2d(16, 8, 1)).eval()
    expected, actual = model(image), quantized("dynamic_int8", model, image)(image)
    assert tq.sqnr_db(expected[0, :, 0, 0], actual[0, :, 0, 0]) > 35
    assert tq.sqnr_db(expected[0, :, 1:], actual[0, :, 1:]) > 35


@pytest.mark.parametrize("scheme", ["w4a16", "dynamic_int8", "static_fp8"])
@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.Conv2d(32, 32, 3, groups=2), (2, 32, 8, 8), "grouped"),
        (nn.Conv2d(32, 32, 1, groups=32), (2, 32, 8, 8), "grouped"),
        (nn.ConvTranspose2d(32, 4, 1), (2, 32, 8, 8), "has an int8 or float8 kernel"),
        (nn.Conv3d(8, 8, 1), (2, 8, 4, 4, 4), "has an int8 or float8 kernel"),
        (nn.Embedding(8, 4), (2, 3), "lookup"),
        (nn.LSTM(8, 4), (2, 3, 8), "recurrent"),
    ],
)
def test_what_runs_in_float_says_why(scheme, layer, shape, reason):
    x = torch.zeros(shape, dtype=torch.int64) if isinstance(layer, nn.Embedding) else torch.randn(shape)
    prepared = tq.prepare(tq.export(Call(lambda m, x: m.inner(x), inner=layer), x), CudaQuantizer(scheme))
    compute = [s for s in tq.report(prepared).sites if s.compute]
    assert compute
    assert all(s.status == "unsupported" and reason in s.reason for s in compute)


@pytest.mark.parametrize("layer", [nn.Conv2d(32, 8, 3), nn.Conv2d(32, 8, 1, padding=1)])
def test_weights_alone_are_quantized_only_where_a_convolution_is_a_matrix_product(layer):
    x = torch.randn(2, 32, 8, 8)
    model = Call(lambda m, x: m.inner(x), inner=layer)
    for scheme in ("w4a16_g32", "w8a16"):
        (site,) = sites(tq.prepare(tq.export(model, x), CudaQuantizer(scheme)), "conv2d")
        assert site.status == "unsupported"
        assert "unpacks weights" in site.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if SCHEMES[s].activation])
def test_convolutions_with_windows_have_one_scale_for_their_input(scheme, dtype):
    torch.manual_seed(0)
    layers = {"line": nn.Conv1d(16, 16, 5, padding="same"), "image": nn.Conv2d(8, 8, 3, stride=2, padding=1)}
    x = torch.randn(2, 16, 32).to(dtype)
    model = Call(lambda m, x: m.image(m.line(x).unflatten(1, (8, 2))), **layers).to(dtype).eval()
    graph = quantized(scheme, model, x)
    for site in (s for s in tq.report(graph).sites if s.compute):
        assert site.status == "quantized"
        assert not site.activation.token
        assert site.activation.dynamic == SCHEMES[scheme].activation.dynamic
        assert site.weight.scale.numel() == _scales(SCHEMES[scheme].weight, codes_of(graph)[site.node])
    assert tq.sqnr_db(model(x).float(), graph(x).float()) > (24 if "fp8" in scheme else 34)


@pytest.mark.parametrize(("inputs", "group"), [(96, 32), (192, 64), (256, 128)])
def test_input_features_that_are_no_whole_groups_get_smaller_ones(inputs, group):
    for scheme in ("w4a16", "w4a16_asymmetric"):
        (site,) = sites(tq.prepare(tq.export(nn.Linear(inputs, 8), torch.randn(2, inputs)), CudaQuantizer(scheme)))
        assert site.status == "quantized"
        assert site.weight.group_size == group
        assert (f"its {inputs} inputs are no multiple of 128" in site.reason) == (group < 128)
    (fine,) = sites(tq.prepare(tq.export(nn.Linear(256, 8), torch.randn(2, 256)), CudaQuantizer("w4a16_g32")))
    assert fine.weight.group_size == 32


def test_input_features_that_no_group_divides_stay_float_with_the_reason():
    (site,) = sites(tq.prepare(tq.export(nn.Linear(40, 8), torch.randn(2, 40)), CudaQuantizer("w4a16")))
    assert site.status == "unsupported"
    assert "no multiple of the group size 128" in site.reason


def test_a_transformers_products_of_activations_stay_float_and_everything_has_a_reason():
    exported = tq.export(nets.MaskedTokens(), nets.token_batch())
    report = tq.report(tq.prepare(exported, CudaQuantizer()))
    assert {s.op for s in report.sites if s.compute and s.status == "quantized"} == {"linear"}
    assert all(s.reason or s.status == "quantized" for s in report.sites)
    assert not report.count("missed")


def test_schemes_mix_by_override():
    x = torch.randn(4, 32)
    exported = tq.export(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), x)
    quantizer = CudaQuantizer("dynamic_fp8", overrides={"2": "w4a16_g32"})
    first, second = sites(tq.prepare(exported, quantizer))
    assert first.weight.dtype == torch.float8_e4m3fn
    assert second.weight.group_size == 32


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "dynamic_int8", "dynamic_fp8"])
def test_weights_and_run_time_scales_need_no_calibration(scheme):
    x = torch.randn(4, 128)
    exported = tq.export(nn.Linear(128, 8), x)
    graph = convert_pt2e(prepare_pt2e(tq.export(nn.Linear(128, 8), x), CudaQuantizer(scheme)))
    assert tq.report(graph).coverage == "1/1"
    assert exported(x).shape == graph(x).shape


def test_static_float8_without_data_is_refused_by_name():
    prepared = tq.prepare(tq.export(nn.Linear(64, 8), torch.randn(4, 64)), CudaQuantizer("static_fp8"))
    with pytest.raises(tq.CalibrationError, match=r"linear.*never saw data"):
        tq.convert(prepared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adaround_chooses_codes_within_groups(dtype):
    torch.manual_seed(0)
    batches = [torch.randn(32, 64).to(dtype) @ torch.randn(64, 64).to(dtype) / 8 for _ in range(2)]
    exported = tq.export(nn.Linear(64, 16).to(dtype), batches[0])
    quantizer = CudaQuantizer("w4a16_g32")
    nearest, solved = (
        tq.quantize(exported, batches[0], batches, quantizer=quantizer, algorithms=a, progress=False)
        for a in ((), [AdaRound()])
    )
    error = [tq.sqnr_db(exported(batches[0]).float(), g(batches[0]).float()) for g in (nearest, solved)]
    assert error[1] > error[0] + 1
    assert sites(solved)[0].weight.describe() == "int8[-8,7] per group of 32"


def test_a_solver_refuses_float8_weights_and_names_the_layer():
    x = torch.randn(8, 64)
    prepared = tq.prepare(tq.export(nn.Sequential(nn.Linear(64, 8)), x), CudaQuantizer("dynamic_fp8"))
    tq.calibrate(prepared, [x], progress=False)
    with pytest.raises(SchemeError, match=r"0: ScaledWeight gives its weight no static integer grid"):
        tq.optimize(prepared, [x], [AdaRound()], progress=False)


@pytest.mark.parametrize("scheme", ["w4a16_g32", "dynamic_fp8"])
def test_a_range_search_has_nothing_to_do_where_no_activation_has_a_range(scheme):
    x = torch.randn(8, 64)
    prepared = tq.prepare(tq.export(nn.Linear(64, 8), x), CudaQuantizer(scheme))
    tq.calibrate(prepared, [x], progress=False)
    tq.optimize(prepared, [x], [RangeSearch()], progress=False)


@pytest.mark.parametrize("scheme", ["static_int8", "dynamic_int8", "w8a16", "w4a16_g32", "static_fp8"])
def test_every_kind_of_scheme_can_be_trained(scheme):
    torch.manual_seed(0)
    x = torch.randn(16, 32)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).train()
    prepared = prepare_qat_pt2e(torch.export.export(model, (x,)).module(), CudaQuantizer(scheme, is_qat=True))
    optimizer = torch.optim.SGD(prepared.parameters(), 0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(F.mse_loss(prepared(x), torch.ones(16, 8)))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    move_exported_model_to_eval(prepared)
    trained = prepared(x)
    graph = convert_pt2e(prepared)
    assert tq.report(graph).coverage == "2/2"
    assert tq.sqnr_db(trained, graph(x)) > 25
