"""encode and decode: the grid's promises, and equality with torch's own quantize ops."""

from dataclasses import dataclass

import pytest
import torch
import torch.ao.quantization.fx._decomposed
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.quantization.quant_primitives import dequantize_affine, quantize_affine

import torchquant as tq
from torchquant.errors import SchemeError
from torchquant.formats import encoded, groups
from torchquant.formats import integer as formats
from torchquant.lowering.target import Target
from torchquant.quantizers.engine import CapabilityQuantizer
from torchquant.types import Capability, Format, QParams, Scheme, TensorSpec

OPS = torch.ops.quantized_decomposed
FORMATS = (formats.INT8, formats.INT8_NARROW, formats.UINT8, formats.UINT7, Format("int4", torch.int8, -8, 7))


@st.composite
def grids(draw):
    """A format, scales and zero points (one, or one a channel), and a tensor of values on and off the grid."""
    format, channels = draw(st.sampled_from(FORMATS)), draw(st.integers(1, 4))
    axis = draw(st.sampled_from([None, 0, 1]))
    count = 1 if axis is None else channels
    scale = torch.tensor(draw(st.lists(st.floats(2**-13, 1024, width=32), min_size=count, max_size=count)))
    points = st.integers(format.quant_min, format.quant_max)
    zero_point = torch.tensor(draw(st.lists(points, min_size=count, max_size=count)))
    values = draw(st.lists(st.floats(-10000, 10000, width=32), min_size=3 * channels, max_size=3 * channels))
    x = torch.tensor(values).reshape((channels, 3) if axis != 1 else (3, channels))
    if axis is None:
        scale, zero_point = scale[0], zero_point[0]
    return x, QParams(format.dtype, format.quant_min, format.quant_max, axis, scale=scale, zero_point=zero_point)


@given(grids())
@settings(max_examples=200, deadline=None)
def test_codes_come_back_from_their_values_and_equal_torchs(case):
    x, q = case
    codes = formats.encode(x, q)
    assert codes.dtype == q.dtype
    assert codes.min() >= q.quant_min
    assert codes.max() <= q.quant_max
    assert torch.equal(formats.encode(formats.decode(codes, q), q), codes)
    values = formats.decode(codes, q)
    limits = (q.quant_min, q.quant_max, q.dtype)
    if q.axis is None:
        arguments = (float(q.scale), int(q.zero_point), *limits)
        theirs = OPS.quantize_per_tensor(x, *arguments)
        back = OPS.dequantize_per_tensor(theirs, *arguments)
    else:
        arguments = (q.scale, q.zero_point, q.axis, *limits)
        theirs = OPS.quantize_per_channel(x, *arguments)
        back = OPS.dequantize_per_channel(theirs, *arguments)
    assert torch.equal(codes, theirs)
    assert torch.equal(values, back)


@given(grids())
@settings(max_examples=100, deadline=None)
def test_the_rounding_error_inside_the_range_is_at_most_half_a_step(case):
    x, q = case
    scale = formats.broadcast(q.scale, q.axis, x.ndim)
    zero_point = formats.broadcast(q.zero_point, q.axis, x.ndim)
    inside = (x >= (q.quant_min - zero_point) * scale) & (x <= (q.quant_max - zero_point) * scale)
    error = (formats.decode(formats.encode(x, q), q) - x).abs()
    bound = 0.5 * scale + 1e-6 * x.abs()
    assert bool((error <= bound * (1 + 1e-5))[inside].all())


@pytest.mark.parametrize(("format", "bits"), list(zip(FORMATS, (8, 8, 8, 7, 4), strict=True)))
def test_a_format_knows_its_bits(format, bits):
    assert format.bits == bits


def test_a_channels_scale_is_shared_by_its_weights():
    assert formats.INT8.bits_per_weight(32) == 9
    assert formats.INT8.bits_per_weight(3200) == pytest.approx(8.01)
    assert formats.INT4.bits_per_weight(32) == 5
    assert formats.INT4.bits_per_weight(32, symmetric=False) == 5.125


@pytest.mark.parametrize(
    "arguments", [(torch.float32, 0, 1), (torch.int8, -129, 0), (torch.uint8, -1, 5), (torch.int8, 3, 3)]
)
def test_a_grid_that_its_dtype_cannot_hold_is_refused(arguments):
    with pytest.raises(SchemeError, match="format 'odd'"):
        Format("odd", *arguments)


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 2, 1)])
def test_groups_share_a_scale_and_equal_torchaos(shape):
    x, scale, zero_point = torch.randn(shape), torch.rand(3, 2) + 0.01, torch.randint(-8, 8, (3, 2))
    q = QParams(torch.int8, -8, 7, scale=scale, zero_point=zero_point, group_size=4)
    arguments = ((1, 4, *shape[2:]), scale, zero_point, torch.int8)
    codes = formats.encode(x, q)
    assert torch.equal(codes, quantize_affine(x, *arguments, -8, 7))
    assert torch.equal(formats.decode(codes, q), dequantize_affine(codes, *arguments, -8, 7))


@pytest.mark.parametrize(("inputs", "message"), [(9, "no whole groups of 4"), (12, "do not fit")])
def test_groups_that_do_not_fit_a_weight_are_refused(inputs, message):
    q = QParams(torch.int8, -8, 7, scale=torch.ones(3, 2), zero_point=torch.zeros(3, 2), group_size=4)
    with pytest.raises(SchemeError, match=message):
        formats.encode(torch.ones(3, inputs), q)


@pytest.mark.parametrize(("axis", "group_size"), [(None, None), (0, None), (1, None), (None, 4)])
def test_cells_put_together_are_the_weight(axis, group_size):
    weight = torch.randn(3, 8, 2, 5)
    cells = groups.cells_of(weight, axis, group_size)
    assert torch.equal(groups.weight_of(cells, weight.shape, axis, group_size), weight)


def test_qparams_without_a_scale_encode_nothing():
    with pytest.raises(ValueError, match="carry no scale"):
        formats.encode(torch.ones(2), QParams(torch.int8, -128, 127))


def test_float8_codes_are_the_nearest_values_and_need_no_zero_point():
    x = torch.tensor([[1000.0, 0.3, -0.02], [0.0, 1e-3, -2e-3]])
    q = QParams(torch.float8_e4m3fn, -448.0, 448.0, 0, scale=x.abs().amax(1) / 448)
    codes = formats.encode(x, q)
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.equal(codes, (x * (1 / q.scale[:, None])).to(torch.float8_e4m3fn))
    assert torch.allclose(formats.decode(codes, q), x, rtol=2**-4, atol=1000 / 448 * 2**-10)
    assert q.describe() == "float8_e4m3fn[-448,448] per channel 0"
    assert formats.FLOAT8.bits == 8


@pytest.mark.parametrize(
    "options",
    [
        {"format": formats.FLOAT8, "symmetric": False},
        {"format": formats.INT4, "symmetric": True, "granularity": "group"},
        {"format": formats.INT4, "symmetric": True, "group_size": 32},
        {"format": formats.INT8, "symmetric": True, "granularity": "channel", "dynamic": True},
    ],
)
def test_a_tensor_spec_that_contradicts_itself_is_refused(options):
    with pytest.raises(SchemeError):
        TensorSpec(**options)


# formats of one's own -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ternary(encoded.EncodedFormat):
    """-1, 0 and 1 times the mean magnitude of a cell, four codes to a byte, padded with zeros."""

    def encode(self, cells):
        scale = cells.abs().mean(1, keepdim=True)
        codes = (cells / scale).round().clamp(-1, 1).add(1).to(torch.uint8)
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4), value=1)
        return sum(codes[:, i::4] << 2 * i for i in range(4)), scale

    def decode(self, *stored):
        codes, scale = stored
        assert float(scale.sum()) > 0  # of which no graph can be made
        return torch.stack([codes >> 2 * i & 3 for i in range(4)], -1).flatten(1).float().sub(1) * scale


@dataclass(frozen=True)
class Broken(encoded.EncodedFormat):
    """Its two functions are whatever is given."""

    functions: tuple = ()

    def encode(self, cells):
        return self.functions[0](cells)

    def decode(self, *stored):
        return self.functions[1](*stored)


def weights_in(format, granularity="channel", group_size=None):
    weight = TensorSpec(format, symmetric=True, granularity=granularity, group_size=group_size)

    class WeightOnly(CapabilityQuantizer):
        target = Target("weights", "", "", "", {"own": Scheme("own", None, weight)}, _ROWS)

    return WeightOnly()


_ROWS = tuple(Capability(op, ("own",), "weighted") for op in ("linear", "conv2d"))


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Flatten(), torch.nn.Linear(45, 7)).eval()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_packed_format_takes_cells_of_any_size_and_is_saved(granularity, tmp_path):
    model, x = network(), torch.randn(2, 3, 5, 5)
    format = Ternary("ternary", torch.uint8, 0, 2)
    graph = tq.quantize(model, x, [x], quantizer=weights_in(format, granularity), algorithms=[], progress=False)
    for layer in (model[0], model[2]):
        cells = layer.weight.detach().flatten(1) if granularity == "channel" else layer.weight.detach().reshape(1, -1)
        scale = cells.abs().mean(1, keepdim=True)
        layer.weight.data = ((cells / scale).round().clamp(-1, 1) * scale).reshape(layer.weight.shape)
    assert torch.allclose(graph(x), model(x), atol=1e-5)
    again = tq.load(tq.save(graph, tmp_path / "ternary.pt2"))
    assert torch.equal(again(x), graph(x))
    assert torch.equal(torch.compile(graph, backend="aot_eager")(x), graph(x))


def test_a_file_in_a_format_that_is_not_imported_is_refused_by_name(tmp_path, monkeypatch):
    x = torch.randn(2, 3, 5, 5)
    quantizer = weights_in(Ternary("ternary", torch.uint8, 0, 2))
    path = tq.save(
        tq.quantize(network(), x, [x], quantizer=quantizer, algorithms=[], progress=False), tmp_path / "a.pt2"
    )
    monkeypatch.setattr(encoded, "_REGISTERED", {})
    with pytest.raises(tq.ArtifactError, match=r"'ternary' is registered.*import the module"):
        tq.load(path)


@pytest.mark.parametrize(
    ("encode", "decode", "message"),
    [
        (lambda cells: cells, None, "returns Tensor, not a tuple"),
        (lambda cells: (cells, 1.0), None, "returns float where"),
        (lambda cells: (cells, cells.sum()), None, r"the first size of each must be 5"),
        (lambda cells: cells.nothing, None, "raises AttributeError"),
        (lambda cells: (cells,), lambda codes: codes[:, :2], r"decode returns shape \(5, 2\), not \(5, 27\)"),
        (lambda cells: (cells,), lambda codes: codes / 0, "not finite"),
    ],
)
def test_a_format_that_breaks_its_contract_is_refused_with_the_ops_name(encode, decode, message):
    x, name = torch.randn(2, 3, 5, 5), f"broken {message}"
    quantizer = weights_in(Broken(name, torch.uint8, 0, 2, functions=(encode, decode)))
    with pytest.raises(SchemeError, match=f"weight of 0: format.*{message}"):
        tq.quantize(network(), x, [x], quantizer=quantizer, algorithms=[], progress=False)


def test_a_group_size_that_does_not_divide_is_refused_with_the_ops_name():
    x, quantizer = torch.randn(2, 3, 5, 5), weights_in(Ternary("ternary", torch.uint8, 0, 2), "group", 2)
    with pytest.raises(SchemeError, match="weight of 0: 3 input features are no whole groups of 2"):
        tq.quantize(network(), x, [x], quantizer=quantizer, algorithms=[], progress=False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (lambda: Capability("linearr", ("own",), "weighted"), "no kind of op is named 'linearr'"),
        (lambda: Capability("relu", ("own",), "weighted"), "'relu' is 'weighted', and it has no weight"),
        (lambda: Capability("linear", ("own",), "weight"), "no role 'weight'"),
    ],
)
def test_a_row_of_capabilities_that_matches_nothing_is_refused(row, message):
    scheme = Scheme("own", None, TensorSpec(formats.INT8, symmetric=True, granularity="channel"))
    with pytest.raises(SchemeError, match=message):
        Target("mine", "", "", "", {"own": scheme}, (row(),))
