"""The int8 kernels on every instruction set against sums of integers and float64: products, epilogues, attention."""

import pytest
import torch
import torch.nn.functional as F
from exact import (
    INPUT,
    OUTPUT,
    REGION,
    Case,
    Grid,
    Layer,
    check,
    conv,
    depthwise,
    exported,
    linear,
    signed,
    targets,
    transposed,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from nets import Call
from torch import nn

from torchquant.ops.x86 import native
from torchquant.ops.x86.translation import replace_regions

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


WIDE, FINE = Grid(0.05, 30), signed(0.013, 11)


def one(layer, output=OUTPUT):
    """A layer whose result is put on a grid, or stays float."""
    return Call(lambda m, x: output(m.a(x)) if output else m.a(x), a=layer)


def test_every_instruction_set_of_this_cpu_is_among_the_five():
    order = ["avx512_vnni", "avx512", "avx_vnni", "avx2", "portable"]
    assert native.instruction_sets() == [name for name in order if name in native.instruction_sets()]
    assert native.instruction_sets()[-1] == "portable"


# products ------------------------------------------------------------------------------------------------------------

CONVOLUTIONS = {  # in, out, kernel, options, size of the image
    "1x1 of one channel": (1, 1, 1, {}, (1, 4, 5)),
    "1x1": (16, 17, 1, {}, (2, 5, 3)),
    "1x1, stride 2": (17, 40, 1, {"stride": 2}, (2, 5, 7)),
    "1x1, stride 3 beyond the kernel": (5, 16, 1, {"stride": (3, 2)}, (1, 8, 7)),
    "1x1 with a border": (5, 16, 1, {"padding": 1}, (1, 3, 4)),
    "2x2": (3, 5, 2, {"stride": 2}, (2, 6, 6)),
    "3x3 of an image": (3, 16, 3, {"stride": 2, "padding": 1}, (2, 9, 8)),
    "3x3": (40, 63, 3, {"padding": 1}, (1, 5, 5)),
    "3x3, one scale": (17, 100, 3, {"padding": 1, "per_channel": False}, (1, 4, 5)),
    "3x3 without bias": (16, 64, 3, {"bias": False}, (2, 5, 5)),
    "3x3, dilated": (5, 17, 3, {"padding": 2, "dilation": 2}, (2, 7, 6)),
    "3x3, dilated unevenly": (16, 5, 3, {"padding": (1, 3), "dilation": (1, 3)}, (1, 5, 8)),
    "4x4 patches": (3, 40, 4, {"stride": 4}, (2, 8, 8)),
    "5x5": (17, 16, 5, {"padding": 2}, (1, 6, 5)),
    "6x6": (4, 3, 6, {"stride": 2, "padding": 2}, (1, 8, 9)),
    "7x7 of an image": (3, 64, 7, {"stride": 2, "padding": 3}, (1, 12, 13)),
    "1x7": (17, 16, (1, 7), {"padding": (0, 3)}, (1, 4, 9)),
    "7x1": (16, 17, (7, 1), {"padding": (3, 0)}, (1, 9, 4)),
    "2x5, stride 2x3": (5, 130, (2, 5), {"stride": (2, 3), "padding": (1, 2)}, (1, 6, 9)),
    "padding same": (5, 16, 3, {"padding": "same"}, (1, 5, 6)),
    "padding same of even kernels": (5, 17, (2, 4), {"padding": "same", "dilation": (1, 3)}, (1, 7, 9)),
    "padding valid": (5, 16, (3, 1), {"padding": "valid"}, (1, 5, 6)),
    "the border is all there is": (3, 5, 3, {"padding": 2}, (1, 1, 1)),
    "64 to 130": (64, 130, 1, {}, (1, 5, 5)),
    "130 to 96": (130, 96, 1, {}, (3, 3, 3)),
    "100 to 3": (100, 3, 3, {"padding": 1}, (1, 4, 4)),
    "2 groups": (8, 16, 3, {"groups": 2}, (2, 6, 6)),
    "2 groups of 64": (32, 128, 3, {"groups": 2, "padding": 1}, (1, 4, 5)),
    "3 groups of 80": (48, 240, 1, {"groups": 3}, (2, 3, 3)),
    "32 groups of 4": (128, 128, 3, {"groups": 32, "padding": 1}, (1, 5, 4)),
    "5 groups of 3 to 7": (15, 35, 3, {"groups": 5, "stride": 2, "padding": 1}, (2, 5, 6)),
    "4 groups of 24": (96, 96, 3, {"groups": 4, "padding": 2, "dilation": 2}, (1, 6, 5)),
    "1x1 in 7 groups": (35, 49, 1, {"groups": 7}, (2, 4, 4)),
    "one input a group": (8, 16, 3, {"groups": 8}, (2, 6, 6)),
    "one input and 40 outputs a group": (5, 200, (3, 1), {"groups": 5}, (1, 6, 6)),
    "depthwise of very many taps": (3, 3, 47, {"groups": 3, "padding": 23}, (1, 6, 7)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_exact(name):
    c, n, kernel, options, (batch, h, w) = CONVOLUTIONS[name]
    for output in (OUTPUT, None):
        check(one(conv(c, n, kernel, **options), output), lambda: INPUT.sample(batch, c, h, w))


DEPTHWISE = {  # channels, kernel, options, size of the image
    "3x3, even height": (16, 3, {"padding": 1}, (2, 6, 7)),
    "3x3, odd height": (17, 3, {"padding": 1}, (2, 5, 9)),
    "3x3, one row": (40, 3, {"padding": 1}, (3, 1, 5)),
    "3x3 without a border": (64, 3, {}, (1, 7, 12)),
    "3x3, one channel over 64": (65, 3, {"padding": 1}, (1, 4, 6)),
    "3x3, blocks of 64, 32 and 16": (100, 3, {"padding": 1}, (1, 5, 5)),
    "3x3, two blocks of 64": (130, 3, {"padding": 1}, (1, 3, 4)),
    "3x3, stride 2": (96, 3, {"padding": 1, "stride": 2}, (2, 7, 8)),
    "3x3, stride 1x2": (63, 3, {"padding": 1, "stride": (1, 2)}, (1, 6, 8)),
    "3x3, stride 2x1": (16, 3, {"padding": 1, "stride": (2, 1)}, (1, 7, 8)),
    "3x3, stride 3": (17, 3, {"stride": 3}, (1, 9, 10)),
    "3x3, dilated": (40, 3, {"padding": 2, "dilation": 2}, (1, 6, 7)),
    "3x3, dilated along the row": (40, 3, {"padding": (1, 2), "dilation": (1, 2)}, (1, 6, 7)),
    "3x3 without bias, one scale": (5, 3, {"padding": 1, "bias": False, "per_channel": False}, (1, 6, 7)),
    "3x3, a wide row": (16, 3, {"padding": 1}, (1, 2, 37)),
    "5x5": (64, 5, {"padding": 2}, (1, 6, 7)),
    "5x5, stride 2": (96, 5, {"padding": 2, "stride": 2}, (1, 7, 9)),
    "5x5, dilated": (17, 5, {"padding": 4, "dilation": 2}, (1, 6, 7)),
    "7x7": (96, 7, {"padding": 3}, (1, 7, 8)),
    "9x9": (17, 9, {"padding": 4}, (1, 6, 6)),
    "4x4": (17, 4, {"padding": 2}, (1, 6, 6)),
    "2x2, stride 2": (63, 2, {"stride": 2}, (1, 6, 6)),
    "1x1": (40, 1, {}, (2, 3, 3)),
    "1x5": (40, (1, 5), {"padding": (0, 2)}, (1, 3, 8)),
    "1x9": (17, (1, 9), {"padding": (0, 4)}, (1, 3, 8)),
    "5x1": (40, (5, 1), {"padding": (2, 0)}, (1, 8, 3)),
    "3x5": (64, (3, 5), {"padding": (1, 2)}, (1, 5, 6)),
    "padding same of even kernels": (17, (4, 2), {"padding": "same"}, (1, 6, 5)),
    "stride beyond the kernel": (16, 2, {"stride": 5}, (1, 8, 9)),
    "31x31": (3, 31, {"padding": 15}, (1, 4, 5)),
}


@pytest.mark.parametrize("name", DEPTHWISE)
def test_a_depthwise_convolution_is_exact(name):
    c, kernel, options, (batch, h, w) = DEPTHWISE[name]
    for output in (OUTPUT, None):
        check(one(depthwise(c, kernel, **options), output), lambda: INPUT.sample(batch, c, h, w))


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (2, 16), (13, 100), (2, 3, 17), (3, 1, 130), (2, 3, 4, 40)])
@pytest.mark.parametrize("features", [1, 17, 64, 130])
def test_a_linear_is_exact_in_any_number_of_dimensions(shape, features):
    for output in (OUTPUT, None):
        check(one(linear(shape[-1], features), output), lambda: INPUT.sample(*shape))


@pytest.mark.parametrize("c", [16, 64])
def test_more_rows_than_one_block_of_the_cache_are_exact(c):
    check(one(linear(130, c)), lambda: INPUT.sample(1700, 130), tries=1)


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"padding": 4, "dilation": 2}, {"padding": "same"}]
)
def test_a_one_dimensional_convolution_is_exact(options):
    for groups, width in ((1, 5), (5, 1)):
        layer = Layer(F.conv1d, INPUT, (5, width, 5), groups=groups, **options)
        check(one(layer), lambda: INPUT.sample(2, 5, 13))


TRANSPOSED = {  # in, out, kernel, options, size of the input
    "2x2, stride 2": (16, 24, (2, 2), {"stride": 2}, (2, 5, 7)),
    "2x2, stride 2, an image": (3, 4, (2, 2), {"stride": 2}, (1, 4, 3)),
    "3x3, stride 2, output padding": (17, 20, (3, 3), {"stride": 2, "padding": 1, "output_padding": 1}, (2, 4, 5)),
    "3x3, stride 2": (5, 33, (3, 3), {"stride": 2, "padding": 1, "bias": False}, (1, 5, 4)),
    "4x4, stride 2": (20, 16, (4, 4), {"stride": 2, "padding": 1}, (1, 3, 4)),
    "4x4, stride 2 without padding": (5, 64, (4, 4), {"stride": 2}, (1, 3, 4)),
    "3x3, stride 1": (16, 16, (3, 3), {"padding": 1}, (2, 5, 4)),
    "3x3, dilated": (8, 17, (3, 3), {"stride": 2, "dilation": 2, "padding": 2}, (1, 4, 5)),
    "dilated by the stride": (8, 6, (3, 3), {"stride": 3, "dilation": 3, "output_padding": 1}, (1, 3, 4)),
    "uneven": (7, 10, (3, 5), {"stride": (1, 3), "padding": (0, 4), "output_padding": (0, 2)}, (1, 4, 5)),
    "a stride beyond the kernel": (5, 16, (2, 1), {"stride": (4, 3)}, (2, 3, 4)),
    "padding beyond the first pixels": (8, 8, (5, 5), {"stride": 2, "padding": 4}, (1, 5, 6)),
    "one scale": (9, 12, (2, 2), {"stride": 2, "per_channel": False}, (1, 4, 4)),
    "4 groups": (16, 24, (4, 4), {"stride": 2, "padding": 1, "groups": 4}, (2, 4, 3)),
    "depthwise": (40, 40, (2, 2), {"stride": 2, "groups": 40}, (1, 4, 5)),
    "depthwise, stride 1": (40, 40, (3, 3), {"padding": 1, "groups": 40}, (1, 4, 5)),
    "one pixel": (20, 16, (1, 1), {}, (3, 1, 1)),
    "1-D": (16, 8, (16,), {"stride": 8, "padding": 4}, (2, 9)),
    "1-D, odd": (5, 17, (5,), {"stride": 3, "dilation": 2, "output_padding": 1}, (1, 7)),
    "1-D in groups": (12, 12, (4,), {"stride": 2, "padding": 1, "groups": 3}, (2, 6)),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_transposed_convolution_is_exact(name):
    c, n, kernel, options, (batch, *size) = TRANSPOSED[name]
    for output in (OUTPUT, None):
        check(one(transposed(c, n, kernel, **options), output), lambda: INPUT.sample(batch, c, *size))


def test_what_follows_a_transposed_convolution_is_fused_or_joined_to_it():
    up, image = transposed(9, 20, (2, 2), stride=2), lambda: INPUT.sample(2, 9, 4, 3)
    factor = torch.rand(1, 20, 1, 1) + 0.5
    for f in (
        lambda m, x: OUTPUT(m.a(x).relu()),
        lambda m, x: OUTPUT(F.silu(m.a(x))),
        lambda m, x: m.a(x) * 3.0,
        lambda m, x: OUTPUT(m.a(x) * m.factor),
        lambda m, x: (lambda y: y * y.sigmoid())(m.a(x)),
        lambda m, x: (lambda y: (OUTPUT(y), y))(m.a(x)),
        lambda m, x: F.max_pool2d(OUTPUT(m.a(x)), 2),
        lambda m, x: m.a(x).mean((2, 3)),
    ):
        check(Call(f, a=up, factor=nn.Parameter(factor)), image, regions=None, tries=300)
    second = conv(20, 6, padding=1, grid=OUTPUT)
    check(Call(lambda m, x: m.b(m.a(x).relu()), a=up, b=second), image, tries=300)
    check(Call(lambda m, x: m.a(x) + m.b(x), a=up, b=transposed(9, 20, (2, 2), stride=2)), image)


def test_a_pad_in_front_of_a_transposed_convolution_is_not_taken_for_its_padding():
    up = transposed(9, 20, (3, 3), stride=2)
    case = Case(Call(lambda m, x: m.a(F.pad(x, (1, 1, 0, 2))), a=up), lambda: INPUT.sample(2, 9, 4, 3))
    case.check()


NARROW = {
    "convolution": (lambda **o: conv(33, 70, 3, padding=1, **o), (2, 33, 5, 6)),
    "1x1": (lambda **o: conv(128, 64, 1, **o), (1, 128, 4, 4)),
    "grouped": (lambda **o: conv(32, 64, 3, groups=4, **o), (1, 32, 5, 5)),
    "depthwise": (lambda **o: depthwise(100, 3, padding=1, **o), (1, 100, 6, 7)),
    "depthwise 5x5, stride 2": (lambda **o: depthwise(40, 5, padding=2, stride=2, **o), (1, 40, 7, 9)),
    "linear": (lambda **o: linear(130, 33, **o), (5, 130)),
    "transposed": (lambda **o: transposed(20, 16, (4, 4), stride=2, padding=1, **o), (1, 20, 4, 5)),
}


@pytest.mark.parametrize("name", NARROW)
def test_weights_of_seven_bits_are_exact_at_their_ends_too(name):
    """Two products of 255 by 63 or by -64 stay within 16 bits; larger weights are not called narrow."""
    layer, shape = NARROW[name]
    check(one(layer(most=63)), lambda: INPUT.sample(*shape))
    for code in (-64, 63, 64):
        for x in (torch.full(shape, (255 - 117) * 0.02), torch.full(shape, -117 * 0.02)):
            case = check(one(layer(codes=torch.tensor(code)), None), lambda x=x: x)
            [step] = [s for s in case.found[0].plan.steps if s.kind in ("conv", "depthwise")]
            assert step.numbers["narrow"] == (code < 64)


GRIDS = {
    "zero point 0": Grid(0.05, 0),
    "zero point 255": Grid(0.05, 255),
    "int8": signed(0.02, -17),
    "int8, zero point -128": signed(0.02, -128),
    "int8, symmetric": signed(0.02, 0),
    "reduced range": Grid(0.04, 60, 3, 127),
    "reduced int8": Grid(0.04, 5, -63, 64, torch.int8),
}


@pytest.mark.parametrize("name", GRIDS)
def test_activations_are_exact_on_any_grid(name):
    grid = GRIDS[name]
    for layer, shape in (
        (conv(5, 17, padding=1, grid=grid), (2, 5, 4, 5)),
        (depthwise(20, padding=1, grid=grid), (1, 20, 5, 4)),
        (linear(9, 33, grid), (4, 9)),
    ):
        check(one(layer, grid), lambda shape=shape: grid.sample(*shape))


@pytest.mark.parametrize("zero_point", [0, 3, 255])
@pytest.mark.parametrize("weight", [-128, 127])
def test_the_largest_codes_do_not_saturate(weight, zero_point):
    grid, codes = Grid(0.05, zero_point), torch.tensor(weight)
    for layer, shape in (
        (conv(20, 17, grid=grid, codes=codes), (1, 20, 4, 5)),
        (depthwise(40, 5, grid=grid, codes=codes), (1, 40, 6, 7)),
        (depthwise(64, 3, grid=grid, codes=codes), (1, 64, 5, 7)),
        (linear(130, 33, grid, codes=codes), (3, 130)),
    ):
        largest = torch.full(shape, (255 - zero_point) * grid.scale)
        alternating = torch.where(torch.arange(shape[-1]) % 2 == 0, largest, -zero_point * grid.scale)
        for x in (largest, alternating):
            check(one(layer, None), lambda x=x: x)
            check(one(layer, Grid(0.5, 101)), lambda x=x: x)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_products_of_random_shapes_are_exact(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    kind = data.draw(st.sampled_from(["conv", "grouped", "depthwise", "linear"]))
    zero = draw(0, 255)
    grid = data.draw(st.sampled_from([Grid(0.02, zero), signed(0.03, zero - 128)]))
    output = data.draw(st.sampled_from([OUTPUT, None, Grid(0.03, draw(0, 255))]))
    c, n, batch = draw(1, 70), draw(1, 70), draw(1, 3)
    if kind == "linear":
        rows = draw(1, 15)
        check(one(linear(c, n, grid), output), lambda: grid.sample(batch, rows, c))
        return
    kernel, stride, dilation = ((draw(1, 5), draw(1, 5)), (draw(1, 3), draw(1, 3)), (draw(1, 2), draw(1, 2)))
    padding, size = (draw(0, 3), draw(0, 3)), (draw(1, 9), draw(1, 9))
    assume(all(s + 2 * p > d * (k - 1) for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    options = {"stride": stride, "dilation": dilation, "padding": padding, "bias": data.draw(st.booleans())}
    groups = draw(1, 9) if kind == "grouped" else 1
    c, n = -(-c // groups) * groups, -(-n // groups) * groups
    layer = (
        depthwise(c, kernel, grid, **options)
        if kind == "depthwise"
        else conv(c, n, kernel, grid, groups=groups, **options)
    )
    check(one(layer, output), lambda: grid.sample(batch, c, *size))


# what is fused behind them -------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": F.relu,
    "relu_": lambda x: F.relu_(x),
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.7, 0.9),
    "clamp": lambda x: x.clamp(-0.3, 1.2),
    "clamp from below": lambda x: x.clamp(min=-0.3),
    "clamp from above": lambda x: x.clamp(max=0.4),
    "clamp above the grid": lambda x: x.clamp(min=6.0),
    "clamp below the grid": lambda x: x.clamp(max=-6.0),
    "crossed clamp": lambda x: x.clamp(1.0, -1.0),
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "two in a row": lambda x: x.sigmoid().tanh(),
    "three in a row": lambda x: F.relu(x).sigmoid().tanh(),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_exact(name):
    f = ACTIVATIONS[name]
    for layer, shape in ((conv(5, 17), (2, 5, 4, 5)), (depthwise(40), (1, 40, 4, 5)), (linear(9, 33), (4, 9))):
        check(Call(lambda m, x: OUTPUT(f(m.a(x))), a=layer), lambda shape=shape: INPUT.sample(*shape))
        check(Call(lambda m, x: f(m.a(x)), a=layer), lambda shape=shape: INPUT.sample(*shape))
    check(Call(lambda m, x: m.a(f(INPUT(x))), a=conv(5, 4, grid=WIDE)), lambda: INPUT.sample(1, 5, 4, 4))


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "sigmoid", "tanh", "hardswish"])
def test_an_activation_of_very_large_values_is_exact(name):
    f = ACTIVATIONS[name]
    check(Call(lambda m, x: f(m.a(x)), a=linear(4, 16, Grid(30.0, 128))), lambda: torch.randn(64, 4) * 3000)


RESIDUALS = {
    "added": lambda y, o: y + o,
    "added to": lambda y, o: o + y,
    "then relu": lambda y, o: (y + o).relu(),
    "after relu": lambda y, o: y.relu() + o,
    "after silu, then relu6": lambda y, o: F.relu6(F.silu(y) + o),
    "after two activations": lambda y, o: y.sigmoid().tanh() + o,
    "then two activations": lambda y, o: (y + o).relu().sigmoid(),
    "in place": lambda y, o: y.add_(o).relu_(),
    "multiplied": lambda y, o: y * o,
    "multiplied, then gelu": lambda y, o: F.gelu(y * o),
    "added twice": lambda y, o: (y + o) + o,
    "added and multiplied": lambda y, o: (y + o) * o,
    "with itself": lambda y, o: y + y + o,
    "with its own activation": lambda y, o: y * y.sigmoid() + o,
    "with its own two activations": lambda y, o: y.sigmoid().tanh() + y + o,
}


@pytest.mark.parametrize("name", RESIDUALS)
@pytest.mark.parametrize("quantized", [True, False])
def test_a_second_operand_is_exact(name, quantized):
    f = RESIDUALS[name]
    for a, b, shape, second in (
        (conv(5, 17, padding=1), conv(5, 17, 1), (2, 5, 4, 5), (2, 17, 4, 5)),
        (depthwise(40, padding=1), depthwise(40, 1), (1, 40, 4, 5), (1, 40, 4, 5)),
        (linear(9, 33), linear(9, 33), (2, 3, 9), (2, 3, 33)),
    ):
        other = (lambda o: OUTPUT(o)) if quantized else (lambda o: o)
        inner = Call(lambda m, x, f=f, other=other: OUTPUT(f(m.a(x), other(m.b(x)))), a=a, b=b)
        check(inner, lambda shape=shape: INPUT.sample(*shape), tries=300)
        outer = Call(lambda m, x, o, f=f, other=other: OUTPUT(f(m.a(x), other(o))), a=a)
        sample = OUTPUT.sample if quantized else torch.randn
        check(outer, lambda shape=shape, second=second, sample=sample: (INPUT.sample(*shape), sample(*second)))


@pytest.mark.parametrize("c", [16, 17])
@pytest.mark.parametrize("first", [True, False])
def test_a_gate_of_one_number_a_channel_is_exact(c, first):
    def squeeze_excite(m, x):
        y = F.silu(m.a(x))
        gate = m.c(m.b(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return OUTPUT(gate * y if first else y * gate)

    for a in (conv(c, c), depthwise(c)):
        check(Call(squeeze_excite, a=a, b=conv(c, 4, 1), c=conv(4, c, 1)), lambda: INPUT.sample(2, c, 5, 4), tries=300)
        outer = Call(lambda m, x, g: m.a(x) * g.sigmoid() if first else g.sigmoid() * m.a(x), a=a)
        check(outer, lambda: (INPUT.sample(2, c, 5, 4), torch.randn(2, c, 1, 1)))


# pools, norms, borders -----------------------------------------------------------------------------------------------

POOLS = [
    (2, {}),
    (3, {"stride": 2, "padding": 1}),
    (3, {"stride": 2, "padding": 1, "ceil_mode": True}),
    (2, {"stride": 2, "ceil_mode": True}),
    ((2, 3), {"stride": (1, 2), "padding": (1, 0)}),
    (3, {"stride": 1, "padding": 1, "dilation": 2}),
    (5, {"stride": 1, "padding": 2}),
]


@pytest.mark.parametrize(("kernel", "options"), POOLS)
def test_a_max_pool_is_exact(kernel, options):
    def pool(x):
        return F.max_pool2d(x, kernel, **options)

    size = (2, 5, 7, 8)
    for f in (
        lambda m, x: OUTPUT(pool(m.a(x).relu())),
        lambda m, x: pool(m.a(x)),
        lambda m, x: OUTPUT(pool(OUTPUT(m.a(x).relu()))),
        lambda m, x: pool(OUTPUT(m.a(x))),
        lambda m, x: (lambda y: (pool(y), y.relu()))(m.a(x)),
        lambda m, x: OUTPUT(pool(m.a(x))).relu(),
        lambda m, x: m.a(pool(x)),
        lambda m, x: m.a(pool(INPUT(x))),
    ):
        check(Call(f, a=conv(5, 17, padding=1)), lambda: INPUT.sample(*size), tries=300)


def test_all_values_of_a_pool_may_be_below_zero():
    f = Call(lambda m, x: F.max_pool2d(F.hardtanh(m.a(x), -9.0, -1.0), 3, 2, 1), a=conv(5, 17))
    check(f, lambda: INPUT.sample(2, 5, 7, 7))


@pytest.mark.parametrize("c", [16, 17])
def test_means_over_a_whole_image_are_exact(c):
    for pooled in (
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: x.mean((2, 3), keepdim=True),
        lambda x: x.mean((-1, -2)),
        lambda x: F.adaptive_avg_pool2d(x, (1, 1)).flatten(1),
    ):
        for f in (
            lambda m, x, pooled=pooled: OUTPUT(pooled(m.a(x).relu())),
            lambda m, x, pooled=pooled: pooled(OUTPUT(m.a(x))),
            lambda m, x, pooled=pooled: F.silu(pooled(m.a(x))),
        ):
            check(Call(f, a=conv(5, c)), lambda: INPUT.sample(2, 5, 6, 5), tries=300)


def test_a_flattened_mean_is_read_by_a_linear():
    for flat in (
        lambda x: x.flatten(1),
        lambda x: x.view(2, 17),
        lambda x: x.reshape(2, -1),
        lambda x: x.squeeze((2, 3)),
        lambda x: F.dropout(x.flatten(1), 0.5, training=False),
    ):
        f = Call(
            lambda m, x, flat=flat: m.b(flat(F.adaptive_avg_pool2d(m.a(x).relu(), 1))), a=conv(5, 17), b=linear(17, 10)
        )
        check(f, lambda: INPUT.sample(2, 5, 5, 4))


def test_a_reshape_to_a_size_known_at_run_time_leaves_the_region_whole():
    """As `flatten` is, once a graph with a dynamic batch has been exported twice."""
    f = Call(
        lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x).relu(), 1).view(x.shape[0], 17)), a=conv(5, 17), b=linear(17, 10)
    )
    batch = {"args": ({0: torch.export.Dim("batch")},)}
    check(f, lambda: INPUT.sample(3, 5, 5, 4), dynamic_shapes=batch)


def test_rows_seen_as_images_of_one_pixel_and_back():
    f = Call(lambda m, x: m.b(m.a(x).view(2, 17, 1, 1)).flatten(1), a=linear(5, 17), b=conv(17, 9, 1))
    check(f, lambda: INPUT.sample(2, 5))


@pytest.mark.parametrize("width", [1, 5, 16, 17, 40, 100])
@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_norm_of_any_width_is_exact(width, affine):
    norm = nn.LayerNorm(width, elementwise_affine=affine, eps=1e-5)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    f = Call(lambda m, x: m.b(m.norm(m.a(x))), norm=norm, a=linear(5, width), b=linear(width, 9))
    check(f, lambda: INPUT.sample(2, 3, 5))
    f = Call(lambda m, x: m.b(m.norm(x)), norm=norm, b=linear(width, 9))
    check(f, lambda: torch.randn(2, 3, width) * 3 + 1)
    f = Call(
        lambda m, x: (lambda y: (m.b(m.norm(y)) + y, m.norm(OUTPUT(y))))(m.a(x)),
        norm=norm,
        a=linear(5, width),
        b=linear(width, width),
    )
    check(f, lambda: INPUT.sample(2, 3, 5))


@pytest.mark.parametrize("c", [16, 17])
def test_the_pixels_of_an_image_stay_in_its_region(c):
    """As ConvNeXt has them: pixels as rows, through a layer norm and linears, scaled, and back."""

    def block(m, x):
        y = F.layer_norm(m.a(x).permute(0, 2, 3, 1), (c,))
        y = (m.c(F.gelu(m.b(y))) * m.scale).permute(0, 3, 1, 2)
        return m.d(y) + m.e(x.permute(0, 2, 3, 1)).permute(0, 3, 1, -2)

    layers = {"a": depthwise(c, padding=1), "b": linear(c, 33), "c": linear(33, c), "d": conv(c, c, 1)}
    model = Call(block, **layers, e=linear(c, c), scale=torch.randn(c))
    check(model, lambda: INPUT.sample(1, c, 3, 4), tries=2000)


TURNS = {
    "returned": lambda m, x: (lambda y: (turned(y).contiguous(), F.layer_norm(turned(y), (17,))))(m.a(x)),
    "returned with the image": lambda m, x: (lambda y: (m.d(turned(m.b(turned(y)))), y, turned(y).contiguous()))(
        m.a(x)
    ),
    "the other way": lambda m, x: (lambda y: (m.d(turned(m.b(y))), F.silu(y), turned(F.silu(y))))(turned(m.a(x))),
    "of an input": lambda m, x: m.d(turned(m.c(turned(x)))),
    "of an input, back at once": lambda m, x: m.a(turned(F.silu(turned(x)))),
    "pooled": lambda m, x: (lambda y: (m.d(turned(y)), F.layer_norm(y, (17,)).mean((1, 2))))(m.b(turned(m.a(x)))),
    "another order": lambda m, x: m.b(m.a(x).permute(0, 3, 2, 1)),
}


def turned(x):
    """Pixels as an image; an image as pixels."""
    return x.permute(0, 2, 3, 1) if x.shape[1] in (5, 17) else x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", TURNS)
def test_an_image_and_its_pixels_are_one_value(name):
    layers = {"a": conv(5, 17, padding=1), "b": linear(17, 17), "c": linear(5, 17), "d": conv(17, 9, padding=1)}
    check(Call(TURNS[name], **layers), lambda: INPUT.sample(2, 5, 4, 3), regions=None, tries=2000)


SCALED = {
    "by a number": lambda m, x: OUTPUT(F.relu(m.a(x) * 0.17)),
    "by a negative number": lambda m, x: OUTPUT(-0.5 * m.a(x)),
    "by one number a channel": lambda m, x: m.a(x) * m.scale,
    "twice": lambda m, x: (m.a(x) * 3) * m.scale,
    "and added": lambda m, x: m.b(x) + m.a(x) * m.scale,
    "and read twice": lambda m, x: (lambda y: (F.gelu(y), OUTPUT(y)))(m.scale * m.a(x)),
    "where the result is needed too": lambda m, x: (lambda y: (y * m.scale, y))(m.a(x)),
    "behind an activation": lambda m, x: F.relu(m.a(x)) * m.scale,
}


@pytest.mark.parametrize("name", SCALED)
def test_results_multiplied_by_constants_are_exact(name):
    for layers, shape, scale in (
        ((conv(5, 17), conv(5, 17)), (2, 5, 4, 5), (17, 1, 1)),
        ((depthwise(40), depthwise(40)), (1, 40, 4, 5), (1, 40, 1, 1)),
        ((linear(9, 33), linear(9, 33)), (4, 9), (33,)),
        ((linear(9, 33), linear(9, 33)), (2, 4, 9), (1,)),
        ((conv(5, 4), conv(5, 4)), (2, 5, 4, 6), (4,)),  # along a line: no factor of a channel
    ):
        model = Call(SCALED[name], a=layers[0], b=layers[1], scale=torch.randn(scale))
        check(model, lambda shape=shape: INPUT.sample(*shape), regions=None, tries=300)


def test_constants_behind_a_product_are_in_its_scales():
    for f in (SCALED["twice"], SCALED["by a negative number"]):
        case = check(Call(f, a=conv(5, 17), scale=torch.randn(17, 1, 1)), lambda: INPUT.sample(2, 5, 4, 5))
        assert "aten.mul.Tensor" not in targets(case.graph)


def test_what_is_reshaped_for_a_linear_is_rows():
    """As the windows of Swin, put together again."""

    def block(m, x):
        y = x.sin().view(2, 2, 3, 2, 2, 16).transpose(2, 3).reshape(2, 4, 6, 16)
        return m.a(F.layer_norm(y + x.cos().view(2, 4, 6, 16), (16,)))

    case = check(Call(block, a=linear(16, 20)), lambda: torch.randn(2, 24, 16), tries=300)
    assert not {"aten.layer_norm.default", "aten.add.Tensor"} & set(targets(case.graph))


def test_a_gate_may_be_made_by_linears():
    """As squeeze-and-excitation is written as often as with 1x1 convolutions."""

    def gated(m, x):
        y = F.silu(m.a(x))
        return m.d(y * m.c(m.b(y.mean((2, 3))).relu()).sigmoid()[:, :, None, None])

    layers = {"a": conv(5, 17), "b": linear(17, 4), "c": linear(4, 17), "d": conv(17, 6, 1)}
    check(Call(gated, **layers), lambda: INPUT.sample(2, 5, 5, 4), tries=2000)
    check(
        Call(lambda m, x: m.b(m.a(x).unsqueeze(-1)), a=linear(5, 17), b=linear(1, 9)),
        lambda: INPUT.sample(2, 5),
        regions=2,
    )


def test_what_comes_before_all_bytes_of_an_image_is_left_to_inductor():
    """As the batch norm and ReLU in front of each convolution of a DenseNet: one pass instead of two."""
    case = check(Call(lambda m, x: m.a(F.relu(x.sin() + x)), a=conv(5, 17)), lambda: torch.randn(2, 5, 4, 6))
    assert [t for t in targets(case.graph) if t.startswith("aten")] == [
        "aten.sin.default",
        "aten.add.Tensor",
        "aten.relu.default",
    ]
    assert [s.kind for s in case.found[0].plan.steps] == ["import", "conv", "export"]
    gated = Call(lambda m, x, g: x.sin() * m.a(g)[:, :, None, None], a=linear(9, 17))
    case = check(gated, lambda: (torch.randn(2, 17, 4, 6), INPUT.sample(2, 9)))
    assert not {"import", "export"} & {s.kind for s in case.found[0].plan.steps}


@pytest.mark.parametrize("pad", [(1, 2, 0, 1), (0, 1, 0, 1), (3, 0, 2, 0), (0, 0, 0, 0), (1, 1)])
def test_zeros_in_front_of_a_convolution_are_its_padding(pad):
    for layer in (conv(5, 16, stride=2), conv(5, 16, 3, padding=1), depthwise(5, stride=2), depthwise(5, 5, padding=1)):
        check(Call(lambda m, x: m.a(F.pad(x, pad)), a=layer), lambda: INPUT.sample(1, 5, 6, 7))
    inner = Call(
        lambda m, x: (lambda y: (m.b(F.pad(y, pad)), m.c(y), m.d(y), y))(m.a(x).relu()),
        a=conv(5, 17),
        b=depthwise(17, stride=2),
        c=depthwise(17, 5, padding=2),
        d=conv(17, 4, 1),
    )
    check(inner, lambda: INPUT.sample(1, 5, 6, 7))


# values with many readers --------------------------------------------------------------------------------------------


def test_a_value_is_read_on_several_grids():
    for a, b, c, shape in (
        (conv(5, 17), conv(17, 4, 1, WIDE), conv(17, 5, 3, FINE, padding=2), (1, 5, 5, 4)),
        (depthwise(5), conv(5, 4, 1, WIDE), depthwise(5, 3, FINE, padding=2), (1, 5, 5, 4)),
        (linear(5, 17), linear(17, 4, WIDE), linear(17, 3, FINE), (3, 5)),
    ):
        f = Call(lambda m, x: (lambda y: (m.b(y), m.c(y), OUTPUT(y)))(m.a(x).relu()), a=a, b=b, c=c)
        check(f, lambda shape=shape: INPUT.sample(*shape), tries=300)


def test_an_input_is_read_on_several_grids_and_as_floats():
    f = Call(
        lambda m, x: (lambda y: (m.a(x) + y, y + x))(m.b(x)),
        a=conv(5, 5, padding=1),
        b=conv(5, 5, 1, WIDE),
    )
    check(f, lambda: torch.randn(2, 5, 4, 4), tries=300)


@pytest.mark.parametrize("c", [16, 17])
def test_an_output_may_be_read_inside(c):
    for a, b, shape in ((conv(5, c), conv(c, 4, 1), (2, 5, 5, 4)), (linear(5, c), linear(c, 4), (3, 5))):
        for f in (
            lambda m, x: (lambda y: (y, m.b(y)))(m.a(x).relu()),
            lambda m, x: (lambda y: (y, y.relu(), m.b(y), OUTPUT(y)))(m.a(x)),
            lambda m, x: (lambda y: (F.dropout(y, 0.5, False), y, m.b(y) + m.b(y.relu())))(m.a(x)),
        ):
            check(Call(f, a=a, b=b), lambda shape=shape: INPUT.sample(*shape), tries=300)


def test_a_region_may_have_several_inputs_and_outputs():
    def function(m, x, y, z):
        u = m.a(x) + m.b(y)
        v = F.silu(u) * m.c(z)
        return m.d(v), u, v.mean((2, 3)), OUTPUT(v)

    f = Call(function, a=conv(5, 17), b=depthwise(17), c=conv(3, 17, 1), d=conv(17, 4, 3, padding=1))
    check(f, lambda: (INPUT.sample(2, 5, 5, 4), INPUT.sample(2, 17, 5, 4), INPUT.sample(2, 3, 3, 2)), tries=300)


def test_a_small_network_is_exact():
    def function(m, x):
        x = F.relu6(m.stem(x))
        y = m.narrow(F.relu6(m.deep(F.relu6(m.widen(x)))))
        x = F.max_pool2d((x + y).relu(), 3, 2, 1)
        return m.head(F.adaptive_avg_pool2d(F.hardswish(m.last(x)), 1).flatten(1))

    f = Call(
        function,
        stem=conv(3, 8, 3, stride=2, padding=1),
        widen=conv(8, 24, 1),
        deep=depthwise(24, padding=1),
        narrow=conv(24, 8, 1),
        last=conv(8, 20, 1),
        head=linear(20, 5),
    )
    check(f, lambda: INPUT.sample(1, 3, 7, 6), tries=2000)


@pytest.fixture(scope="module")
def dynamic():
    torch.manual_seed(0)
    f = Call(
        lambda m, x: (m.b(F.adaptive_avg_pool2d(m.a(x).relu(), 1).flatten(1)), OUTPUT(m.a(x)), m.c(x)),
        a=conv(5, 17, padding=1),
        b=linear(17, 4),
        c=depthwise(5),
    )
    batch = torch.export.Dim("batch", min=0)
    return f, Case(f, lambda: INPUT.sample(3, 5, 4, 5), dynamic_shapes={"args": ({0: batch},)}, regions=None)


@pytest.mark.parametrize("batch", [0, 1, 2, 5])
def test_the_batch_may_be_of_any_size(dynamic, batch):
    function, case = dynamic
    x = INPUT.sample(batch, 5, 4, 5)
    for name in native.instruction_sets():
        with native.use(name):
            actual = case.graph(x)
        for value, expected in zip(actual, function(x), strict=True):
            assert value.shape == expected.shape
            torch.testing.assert_close(value, expected, rtol=0, atol=0.032 if value is actual[1] else 0.02)


def test_the_bytes_do_not_depend_on_how_an_input_lies_in_memory():
    f = one(conv(5, 17, padding=1))
    case = Case(f, lambda: INPUT.sample(2, 5, 4, 6))
    [x] = case.inputs
    expected = case.graph(x)
    for same in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT, x.repeat(1, 1, 1, 2)[..., :6]):
        assert torch.equal(case.graph(same), expected)


def test_all_instruction_sets_give_the_same_bytes():
    case = Case(one(conv(40, 100, padding=1)), lambda: INPUT.sample(2, 40, 6, 7))
    codes = []
    for name in native.instruction_sets():
        with native.use(name):
            codes.append((case.graph(*case.inputs) / OUTPUT.scale).round())
    assert all(float((f - codes[0]).abs().max()) <= 1 for f in codes)
    assert all(float((f != codes[0]).double().mean()) < 1e-3 for f in codes)


# attention -----------------------------------------------------------------------------------------------------------


def mask_of(batch, rows, keys):
    hidden = torch.rand(batch, 1, rows, keys) > 0.7
    return torch.zeros(batch, 1, rows, keys).masked_fill(hidden, -1e3)


ATTENTION = {  # (batch, heads, key heads, rows, keys, width), mask, options
    "plain": ((2, 3, 3, 7, 9, 20), None, {}),
    "one query, one key": ((1, 1, 1, 1, 1, 8), None, {}),
    "width 8": ((1, 2, 2, 33, 31, 8), None, {}),
    "width 32": ((2, 2, 2, 13, 17, 32), None, {}),
    "width 64": ((1, 2, 2, 25, 48, 64), None, {}),
    "width 80": ((1, 3, 3, 17, 35, 80), None, {}),
    "197 tokens": ((1, 1, 1, 197, 197, 32), None, {}),
    "no samples": ((0, 2, 2, 5, 7, 20), None, {}),
    "no queries": ((2, 2, 2, 0, 7, 20), None, {}),
    "no keys": ((2, 2, 2, 3, 0, 20), None, {}),
    "causal, fewer queries": ((2, 2, 2, 7, 19, 20), None, {"is_causal": True}),
    "causal, square": ((2, 2, 2, 29, 29, 20), None, {"is_causal": True}),
    "causal, more queries": ((1, 2, 2, 35, 9, 20), None, {"is_causal": True}),
    "two heads a key head": ((2, 4, 2, 7, 9, 20), None, {"enable_gqa": True}),
    "one key head": ((2, 4, 1, 7, 9, 20), None, {"enable_gqa": True, "is_causal": True}),
    "scale": ((1, 2, 2, 7, 9, 20), None, {"scale": 0.7}),
    "large scores": ((1, 2, 2, 7, 9, 20), None, {"scale": 30.0}),
    "mask of keys": ((2, 3, 3, 7, 9, 20), lambda: mask_of(2, 1, 9), {}),
    "mask of rows and keys": ((2, 3, 3, 7, 9, 20), lambda: mask_of(1, 7, 9), {}),
    "mask of everything": ((2, 3, 3, 5, 21, 20), lambda: torch.randn(2, 3, 5, 21), {}),
    "mask of rows": ((2, 3, 3, 7, 9, 20), lambda: torch.randn(2, 1, 7, 1), {}),
    "mask of two dimensions": ((2, 3, 3, 7, 9, 20), lambda: torch.randn(7, 9), {}),
    "mask of three dimensions": ((2, 3, 3, 7, 9, 20), lambda: torch.randn(3, 7, 9), {}),
    "transposed mask": ((2, 3, 3, 7, 9, 20), lambda: torch.randn(2, 1, 9, 7).mT, {}),
    "bool mask": ((2, 3, 3, 7, 9, 20), lambda: mask_of(2, 7, 9) == 0, {}),
    "bool mask of keys": ((2, 3, 3, 7, 9, 20), lambda: torch.arange(9).expand(2, 1, 1, 9) < 4, {}),
    "mask of the least float": ((1, 2, 2, 7, 9, 20), lambda: (mask_of(1, 7, 9) < 0) * torch.finfo().min, {}),
    "mask and key heads": ((2, 4, 2, 7, 9, 20), lambda: mask_of(2, 7, 9), {"enable_gqa": True}),
    "a row that sees nothing, bool": ((1, 2, 2, 7, 19, 20), lambda: torch.arange(7)[:, None].expand(7, 19) != 3, {}),
    "a row that sees nothing, float": (
        (1, 2, 2, 7, 19, 20),
        lambda: torch.zeros(7, 19).index_fill(0, torch.tensor(3), -torch.inf),
        {},
    ),
}


def attention_case(inputs, options):
    module = Call(lambda m, q, k, v, *mask: F.scaled_dot_product_attention(q, k, v, *mask, **options))
    expected = module(*(t.double() if t.is_floating_point() else t for t in inputs))
    graph = exported(module, inputs)
    replace_regions(graph)
    return graph, expected


def check_attention(inputs, options):
    graph, expected = attention_case(inputs, options)
    assert str(REGION.x86_attention.default) in targets(graph)
    for name in native.instruction_sets():
        with native.use(name):
            actual = graph(*inputs)
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    return expected


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_equals_torchs(name):
    (batch, heads, groups, rows, keys, width), mask, options = ATTENTION[name]
    query, key, value = (torch.randn(batch, h, n, width) for h, n in ((heads, rows), (groups, keys), (groups, keys)))
    if name == "large scores":
        query = query.round()  # products exact in float32 too, which the exponential would magnify
        key = key.round()
    inputs = (query, key, value) if mask is None else (query, key, value, mask())
    expected = check_attention(inputs, options)
    if "sees nothing" in name:
        assert not expected[:, :, 3].any()
        assert expected[:, :, 2].any()


def test_attention_reads_strided_operands():
    packed = torch.randn(2, 9, 3, 4, 20)
    query, key, value = (t.transpose(1, 2) for t in packed.unbind(2))
    assert not query.is_contiguous()
    check_attention((query, key, value), {})
    wide = torch.randn(2, 4, 20, 9)
    check_attention((wide.mT, wide.mT, wide.mT), {"is_causal": True})
    check_attention((query, key.flip(2), value[:, :1].expand(2, 4, 9, 20)), {})
    check_attention((torch.randn(2, 4, 9, 40)[..., ::2], key, value), {})


BROADCAST = {
    "over samples": ((2, 4, 7, 8), (1, 4, 9, 8), (1, 4, 9, 8), {}),
    "over heads": ((2, 4, 7, 8), (2, 1, 9, 8), (2, 1, 9, 8), {}),
    "values over heads": ((2, 4, 7, 8), (2, 2, 9, 8), (2, 1, 9, 8), {"enable_gqa": True}),
    "values of another width": ((2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 12), {}),
    "three dimensions": ((4, 7, 8), (4, 9, 8), (4, 9, 8), {}),
    "very many keys": ((1, 1, 2, 8), (1, 1, 4097, 8), (1, 1, 4097, 8), {}),
}


@pytest.mark.parametrize("name", BROADCAST)
def test_other_attention_stays_with_torch(name):
    *shapes, options = BROADCAST[name]
    inputs = tuple(torch.randn(*s) for s in shapes)
    graph, expected = attention_case(inputs, options)
    assert str(REGION.x86_attention.default) not in targets(graph)
    torch.testing.assert_close(graph(*inputs).double(), expected, rtol=0, atol=1e-5)


# registration --------------------------------------------------------------------------------------------------------

OPCHECKS = ("test_schema", "test_faketensor")


def test_the_region_op_has_a_true_schema_and_fake():
    case = Case(one(conv(5, 17)), lambda: INPUT.sample(2, 5, 4, 5))
    [region] = [n for n in case.graph.graph.nodes if n.target is REGION.x86_region.default]
    plan = getattr(case.graph, region.args[0].target)
    torch.library.opcheck(REGION.x86_region.default, (plan, list(case.inputs), region.args[2]), test_utils=OPCHECKS)


@pytest.mark.parametrize("mask", [None, torch.randn(2, 1, 1, 7), torch.ones(5, 7, dtype=torch.bool)])
def test_the_attention_op_has_a_true_schema_and_fake(mask):
    native.load()
    inputs = (torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8), mask, 0.3, mask is None)
    torch.library.opcheck(REGION.x86_attention.default, inputs, test_utils=OPCHECKS)


@pytest.mark.parametrize("size", [1e4, 1e12, 1e25])
def test_sums_far_beyond_the_grid_end_at_its_bounds(size):
    """On every instruction set: some convert what fits no int32 to the least one, some wrap."""
    f = Call(lambda m, x, y: (lambda z: (z, m.b(z)))(m.a(x) + y), a=conv(5, 17), b=conv(17, 4, 1))
    x, y = INPUT.sample(1, 5, 5, 4), torch.randn(1, 17, 3, 2).sign() * size
    graph = exported(f, (x, y))
    expected = graph(x, y)
    assert len(replace_regions(graph)) == 1
    for name in native.instruction_sets():
        with native.use(name):
            assert all(
                torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(graph(x, y), expected, strict=True)
            ), name
