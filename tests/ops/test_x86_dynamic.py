"""Linears whose inputs are quantized by their own range: grids as torch chooses them, sums exact."""

import copy
import math
from dataclasses import dataclass

import nets
import pytest
import torch
import torch.nn.functional as F
from exact import INPUT, OUTPUT, Layer, Q, exported, linear, products_left, regions_in
from foreign import SpecQuantizer, dynamic, per_channel
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Call, callers_agree
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import torchquant as tq
from torchquant.artifacts.serialize import export_again
from torchquant.backends import inductor_x86
from torchquant.fx.flat import flat
from torchquant.ops.x86 import native, tuning
from torchquant.ops.x86.plan import Dynamic
from torchquant.ops.x86.translation import replace_regions
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer

EPS = 2.0**-23


@dataclass(frozen=True)
class Chosen:
    """`choose_qparams`, a quantize and a dequantize op: `chosen(x)` is x on the grid of its own range."""

    low: int = 0
    high: int = 255
    dtype: torch.dtype = torch.uint8
    symmetric: bool = False
    eps: float = EPS
    scale: float = 0.02  # about that of a normal variable

    def qparams(self, x):
        choose = Q.choose_qparams_symmetric if self.symmetric else Q.choose_qparams
        return choose.tensor(x, self.low, self.high, self.eps, self.dtype)

    def __call__(self, x, qparams=None):
        options = (*(qparams or self.qparams(x)), self.low, self.high, self.dtype)
        return Q.dequantize_per_tensor.tensor(Q.quantize_per_tensor.tensor(x, *options), *options)


U8 = Chosen()
GRIDS = {
    "uint8": U8,
    "uint8 of 7 bits": Chosen(0, 127),
    "int8": Chosen(-128, 127, torch.int8, eps=2.0**-12),
    "int8 symmetric": Chosen(-127, 127, torch.int8, symmetric=True),
    "full int8 symmetric": Chosen(-128, 127, torch.int8, symmetric=True, eps=2.0**-12),
    "uint8 symmetric": Chosen(symmetric=True),
}


class Replaced:
    """A module as a graph, and the same graph with its regions replaced."""

    def __init__(self, module, *inputs, regions=1, dynamic_shapes=None):
        self.graph = exported(module, inputs, dynamic_shapes)
        self.replaced = copy.deepcopy(self.graph)
        self.built = replace_regions(self.replaced)
        assert len(regions_in(self.replaced)) == regions
        assert not regions or not products_left(self.replaced)

    def check(self, *inputs):
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(self.graph(*inputs))
            for name in native.instruction_sets():
                with native.use(name):
                    actual = torch.utils._pytree.tree_leaves(self.replaced(*inputs))
                for a, b in zip(expected, actual, strict=True):
                    assert a.shape == b.shape
                    assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max()) + 1e-9, name

    def ranges(self):
        return [{v.grid for s in b.plan.steps for v in s.reads() if isinstance(v.grid, Dynamic)} for b in self.built]


BATCH = ({0: torch.export.Dim("batch")},)  # of a layer; `Call` takes any number of arguments


# scale, zero point and codes are torch's, bit by bit -----------------------------------------------------------------


@pytest.fixture(scope="module")
def identities():
    """Linears that return their quantized input: sums of one term are exact, so results are equal or wrong."""
    layers = {}
    for name, grid in GRIDS.items():
        layer = Layer(F.linear, grid, (20, 20), bias=False, codes=torch.eye(20))
        layer.scales.fill_(1.0)
        layers[name] = Replaced(layer, torch.randn(3, 20), dynamic_shapes=BATCH)
    return layers


def assert_equal_to_torch(case, x):
    expected = case.graph(x)
    for name in native.instruction_sets():
        with native.use(name):
            assert torch.equal(case.replaced(x), expected), name


@pytest.mark.parametrize("grid", GRIDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31),
    st.integers(1, 40),
    st.floats(-12, 12),
    st.sampled_from([0.0, 0.3, -0.3, 1.0, -1.0, 7.0, -7.0]),
)
def test_a_range_gives_torchs_own_scale_zero_point_and_codes(identities, grid, seed, rows, magnitude, middle):
    torch.manual_seed(seed)
    assert_equal_to_torch(identities[grid], (torch.randn(rows, 20) + middle) * 10.0**magnitude)


CONSTANTS = (0.0, -0.0, 1.0, -1.0, 3.7, 1e-9, -1e-9, 1e-30, 1e-42, -1e-42, 3e38, -3e38)


@pytest.mark.parametrize("grid", GRIDS)
def test_zeros_constants_and_single_numbers_are_quantized_as_torch_does(identities, grid):
    for value in CONSTANTS:
        assert_equal_to_torch(identities[grid], torch.full((3, 20), value))
        for place in (0, 15, 16, 59, 99):
            x = torch.zeros(5, 20)
            x.view(-1)[place] = value
            assert_equal_to_torch(identities[grid], x)


@pytest.mark.parametrize("grid", GRIDS)
def test_ties_are_rounded_to_even(identities, grid):
    chosen = GRIDS[grid]
    steps = torch.arange(-50, 50) + 0.5
    x = torch.cat([steps, torch.tensor([float(chosen.low - chosen.high), 0.0] * 5), steps[:10]]).view(-1, 20) / 64
    assert_equal_to_torch(identities[grid], x)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000, 70000])
def test_the_range_is_found_wherever_its_ends_are(size):
    layer = Layer(F.linear, U8, (1, 1), bias=False, codes=torch.ones(1, 1))
    layer.scales.fill_(1.0)
    case = Replaced(layer, torch.randn(3, 1), dynamic_shapes=BATCH)
    for low, high in {(0, size - 1), (size - 1, 0), (size // 2, size // 3), (size - 1, size // 2)}:
        x = torch.rand(size, 1)
        x[low], x[high] = -9.0, 7.0
        assert_equal_to_torch(case, x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 19, 1000, 1999])
def test_what_is_not_finite_spreads_to_all_results(identities, bad, place):
    x = torch.randn(100, 20)
    x.view(-1)[place] = bad
    for case in identities.values():
        for name in native.instruction_sets():
            with native.use(name):
                assert case.replaced(x).isnan().all(), name


def test_no_samples_give_no_results(identities):
    for case in identities.values():
        with pytest.raises(RuntimeError, match="empty"):  # torch has no range for it
            case.graph(torch.randn(0, 20))
        assert case.replaced(torch.randn(0, 20)).shape == (0, 20)


# linears -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("c", "n"), [(1, 1), (5, 17), (16, 64), (30, 1), (40, 100), (67, 64), (384, 48)])
def test_linears_of_all_sizes(grid, c, n):
    torch.manual_seed(c + n)
    case = Replaced(linear(c, n, GRIDS[grid]), torch.randn(3, c), dynamic_shapes=BATCH)
    for rows in (1, 2, 17, 64):
        case.check(torch.randn(rows, c) + 0.5)


@pytest.mark.parametrize("shape", [(1, 1, 24), (3, 19, 24), (2, 5, 7, 24)])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"per_channel": False}])
def test_inputs_of_more_dimensions(shape, options):
    torch.manual_seed(0)
    Replaced(linear(24, 33, U8, **options), torch.randn(shape)).check(torch.randn(shape))


FUSED = {
    "relu": (lambda m, x, y: F.relu(m.a(x)), 1),
    "gelu": (lambda m, x, y: F.gelu(m.a(x)), 1),
    "gelu, residual, layer norm": (lambda m, x, y: F.layer_norm(F.gelu(m.a(x)) + y, (33,)), 1),
    "residual of the input itself": (lambda m, x, y: x + m.b(x), 1),
    "two linears of one input": (lambda m, x, y: m.a(x) * torch.sigmoid(m.c(x)), 1),
    "linears of two inputs added": (lambda m, x, y: m.a(x) + m.d(y), 1),
    "the input read as floats too": (lambda m, x, y: (m.a(x), F.layer_norm(m.b(x) + x, (40,)), F.gelu(x)), 1),
    "requantized to a fixed grid": (lambda m, x, y: OUTPUT(F.relu(m.a(x))), 1),
    "a static linear behind": (lambda m, x, y: m.e(F.relu(m.a(x))), 1),
    "a static linear in front": (lambda m, x, y: m.d(m.f(x)), 2),
}


@pytest.mark.parametrize("grid", ["uint8", "int8"])
@pytest.mark.parametrize("name", FUSED)
def test_what_follows_a_linear_is_fused(name, grid):
    torch.manual_seed(3)
    function, regions = FUSED[name]
    chosen = GRIDS[grid]
    layers = {
        "a": linear(40, 33, chosen),
        "b": linear(40, 40, chosen),
        "c": linear(40, 33, chosen),
        "d": linear(33, 33, chosen),
        "e": linear(33, 20, INPUT),
        "f": linear(40, 33, INPUT),
    }
    inputs = torch.randn(2, 9, 40), torch.randn(2, 9, 33)
    case = Replaced(Call(function, **layers), *inputs, regions=regions)
    case.check(*inputs)


def test_quantizations_of_one_tensor_are_one():
    torch.manual_seed(0)
    layers = {name: linear(32, 32, U8) for name in "qkv"}
    case = Replaced(Call(lambda m, x: (m.q(x), m.k(x), m.v(x)), **layers), torch.randn(2, 5, 32))
    case.check(torch.randn(2, 5, 32))
    [ranges], [built] = case.ranges(), case.built
    assert len(ranges) == 1
    assert built.products == ["linear"] * 3
    assert [s.kind for s in built.plan.steps] == ["elementwise", "conv", "conv", "conv"]


def test_quantizations_of_one_tensor_on_different_grids_are_apart():
    torch.manual_seed(0)
    layers = {str(i): linear(32, 8, grid) for i, grid in enumerate(GRIDS.values())}
    model = Call(lambda m, x: [getattr(m, name)(x) for name in layers], **layers)
    case = Replaced(model, torch.randn(4, 32))
    case.check(torch.randn(4, 32))
    assert len(case.ranges()[0]) == len(GRIDS)


def test_a_linear_behind_a_dynamic_linear_is_another_region():
    torch.manual_seed(0)
    model = Call(lambda m, x: x + m.b(F.gelu(m.a(x))), a=linear(32, 64, U8), b=linear(64, 32, U8))
    case = Replaced(model, torch.randn(4, 32), regions=2)
    assert tq.sqnr_db(case.graph(torch.ones(4, 32)), case.replaced(torch.ones(4, 32))) > 60


# threads and callers -------------------------------------------------------------------------------------------------


@pytest.fixture
def thread_setting():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    model = Call(
        lambda m, x: m.b(F.relu(m.a(x)) + m.c(x)), a=linear(96, 80, U8), b=linear(80, 50), c=linear(96, 80, U8)
    )
    return Replaced(model, torch.randn(3, 19, 96), dynamic_shapes={"args": BATCH})


@pytest.mark.usefixtures("thread_setting")
@pytest.mark.parametrize("batch", [1, 2, 7, 40])
def test_the_number_of_threads_changes_no_bit(batch, wide):
    x = torch.randn(batch, 19, 96)
    for name in native.instruction_sets():
        with native.use(name):
            torch.set_num_threads(1)
            expected = wide.replaced(x)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                for _ in range(3):
                    assert torch.equal(wide.replaced(x), expected), (name, threads)


@pytest.mark.usefixtures("thread_setting")
@pytest.mark.parametrize("threads", [1, 2])
def test_callers_at_once_have_ranges_of_their_own(threads, wide):
    torch.set_num_threads(threads)
    inputs = [torch.randn(1 + i, 19, 96) * 10.0**i for i in range(4)]
    assert callers_agree(wide.replaced, inputs)


def test_a_plan_is_tuned_and_profiled_as_any_other(wide, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "_file", lambda: tmp_path / "choices.json")
    x = torch.randn(3, 19, 96)
    expected = wide.replaced(x)
    tuning.tune(lambda: wide.replaced(x), wide.built, "3x19x96")
    assert (tmp_path / "choices.json").exists()
    assert torch.equal(wide.replaced(x), expected)
    plans, counts = [b.memory for b in wide.built], [len(b.plan.laid_out) for b in wide.built]
    assert all(t >= 0 for row in native.profiled(lambda: wide.replaced(x), plans, counts) for t in row)


# what stays with Inductor --------------------------------------------------------------------------------------------


def other_reader(m, x):
    y = U8(x)
    return F.linear(y, m.a.codes * 0.1) + F.linear(y, weight_of(m.a)), y.sin()


def weight_of(layer):
    return Q.dequantize_per_channel(layer.codes, layer.scales, layer.zeros, 0, -128, 127, torch.int8)


OTHER = {
    "a float linear reads the grid too": other_reader,
    "another op reads the grid": lambda m, x: (lambda y: (F.linear(y, weight_of(m.a)), y + 1))(U8(x)),
    "the scale is read": lambda m, x: (lambda p: F.linear(U8(x, p), weight_of(m.a)) * p[0].float())(U8.qparams(x)),
    "the zero point is returned": lambda m, x: (lambda p: (F.linear(U8(x, p), weight_of(m.a)), p[1]))(U8.qparams(x)),
    "the range is of another tensor": lambda m, x: F.linear(U8(x, U8.qparams(x.sin())), weight_of(m.a)),
    "scale and zero point are of different tensors": lambda m, x: F.linear(
        U8(x, (U8.qparams(x)[0], U8.qparams(x.sin())[1])), weight_of(m.a)
    ),
    "the range is for other codes": lambda m, x: F.linear(U8(x, Chosen(0, 127).qparams(x)), weight_of(m.a)),
}


@pytest.mark.parametrize("name", OTHER)
def test_dynamic_quantization_of_another_kind_is_no_region(name):
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    graph = exported(Call(OTHER[name], a=linear(8, 17, U8)), (x,))
    replaced = copy.deepcopy(graph)
    replace_regions(replaced)
    assert not regions_in(replaced)
    leaves = torch.utils._pytree.tree_leaves
    for expected, actual in zip(leaves(graph(x)), leaves(replaced(x)), strict=True):
        assert torch.equal(expected, actual)


def test_a_dynamic_convolution_is_no_region():
    graph = exported(Layer(F.conv2d, U8, (16, 5, 3, 3)), (torch.randn(2, 5, 6, 7),))
    assert replace_regions(graph) == []


def test_a_range_for_each_token_is_no_region():
    x = torch.randn(4, 8)
    graph = export_again(flat(quantized(nets.mlp(), x, XnnpackQuantizer("dynamic_int8"))).graph, x).module()
    assert replace_regions(graph) == []


# whole models --------------------------------------------------------------------------------------------------------


class Encoder(torch.nn.Module):
    """A block of a transformer encoder."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = torch.nn.Linear(32, 70), torch.nn.Linear(70, 32)
        self.first, self.second = torch.nn.LayerNorm(32), torch.nn.LayerNorm(32)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = self.first(x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return self.second(x + self.down(F.gelu(self.up(x))))


def torchao_quantizer():
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_dynamic=True))


QUANTIZERS = {
    "X86Quantizer": lambda: X86Quantizer("dynamic_int8"),
    "torchao": torchao_quantizer,
    "any": lambda: SpecQuantizer({"linear"}, dynamic(), per_channel()),
}


def quantized(model, x, quantizer, **options):
    return tq.quantize(model, x, [x], quantizer=quantizer, algorithms=(), progress=False, **options)


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")  # attention is float
@pytest.mark.parametrize("name", QUANTIZERS)
def test_all_linears_of_an_encoder_are_in_regions(name):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32)
    graph = export_again(flat(quantized(Encoder().eval(), x, QUANTIZERS[name]())).graph, x).module()
    expected = graph(x)[0]
    built = replace_regions(graph)
    assert sorted(len(b.products) for b in built) == [1, 1, 1, 3]
    assert not products_left(graph)
    assert "choose_qparams" not in str(graph.code)
    assert tq.sqnr_db(expected, graph(x)[0]) > 60


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")  # attention is float
@pytest.mark.parametrize("name", ["X86Quantizer", pytest.param("torchao", marks=pytest.mark.slow)])
def test_a_lowered_encoder_proves_that_all_linears_are_ours(name, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32)
    shapes = ({0: torch.export.Dim("batch", min=1, max=8)},)
    converted = quantized(Encoder().eval(), x, QUANTIZERS[name](), dynamic_shapes=shapes)
    program = inductor_x86.lower(converted, x)
    assert program.proof.kernels == {"torchquant_linear": 6}
    assert program.proof.annotated == program.proof.fused == 6
    loaded = inductor_x86.load(program.save(tmp_path / "encoder.pt2"))
    for batch in (1, 2, 8):
        y = torch.randn(batch, 5, 32)
        assert tq.sqnr_db(converted(y), loaded(y)) > 50


@pytest.mark.slow
def test_a_lowered_mlp_is_ours():
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    program = inductor_x86.lower(quantized(nets.mlp(), x, X86Quantizer("dynamic_int8")), x)
    assert set(program.proof.kernels) == {"torchquant_linear"}
