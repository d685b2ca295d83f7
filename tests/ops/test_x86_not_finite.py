"""NaN and infinity through the x86 kernels: what the converted graph gives in eager torch, on every instruction set."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from exact import INPUT, OUTPUT, REGION, Grid, conv, depthwise, exported, linear, products_left, regions_in, signed
from nets import Call, pairs
from torch.utils._pytree import tree_flatten_with_path
from torch.utils._pytree import tree_leaves as leaves

from torchquant.fx import ops
from torchquant.ops.x86 import native
from torchquant.ops.x86.translation import replace_regions

ROWS = range(1, 14)  # tiles of products have up to 12
SOME_ROWS = (1, 4, 11, 13)
CHANNELS = (1, 3, 7, 8, 15, 16, 17, 20, 31, 32, 33, 48, 64, 70)  # panels have up to 64, in blocks of 16
WILD = (math.nan, math.inf, -math.inf)
SIGNED, REDUCED, POSITIVE = signed(0.031, -17), Grid(0.031, 60, 3, 127), Grid(0.03, 0)
STEP = 0.032  # more than a step of any of these
BATCH = torch.export.Dim("batch")


def with_wild(x, every=5):
    """Copies of a tensor: NaN and infinities strewn over it, and each alone at an end."""
    flat = torch.arange(x.numel())
    strewn, first, last = x.clone(), x.clone(), x.clone()
    for i, value in enumerate(WILD):
        strewn.view(-1)[flat % (3 * every) == i * every] = value
    first.view(-1)[0], last.view(-1)[-1] = -math.inf, math.nan
    return strewn, first, last


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors gain nothing from more, and lose much where other processes run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Compared:
    """A module's graph, and the same graph on our kernels."""

    def __init__(self, module, *inputs, batch=True):
        torch.manual_seed(0)
        shapes = {"args": tuple({0: BATCH} for _ in inputs)} if batch else None
        self.graph = exported(module, inputs, shapes)
        self.replaced = copy.deepcopy(self.graph)
        replace_regions(self.replaced)
        assert regions_in(self.replaced)
        assert not products_left(self.replaced)

    def check(self, *inputs):
        """Outputs are equal but for float32's last bits, or for one step of a grid."""
        with torch.no_grad():
            expected = tree_flatten_with_path(self.graph(*inputs))[0]
            for name in native.instruction_sets():
                with native.use(name):
                    actual = leaves(self.replaced(*inputs))
                for (path, a), b in zip(expected, actual, strict=True):
                    assert_same(a, b, (name, path))


def assert_same(expected, actual, where):
    assert torch.equal(expected.isnan(), actual.isnan()), where
    infinite = expected.isinf() | actual.isinf()
    assert torch.equal(expected[infinite], actual[infinite]), where
    a, b = (t[expected.isfinite()] for t in (expected, actual))
    if a.numel():
        away = (a - b).abs() / (1 + a.abs() / STEP * 1e-4)
        assert float(away.max()) <= STEP, where
        assert float((away > 1e-4).sum()) <= 1 + 0.01 * a.numel(), where  # flips of roundings


def each_of(functions, layer):
    """A module that calls each function on the result of a layer of its own, and a float operand."""
    layers = {f"layer{i}": layer() for i in range(len(functions))}

    def forward(m, x, o):
        return {name: f(getattr(m, f"layer{i}")(x), o) for i, (name, f) in enumerate(functions.items())}

    return Call(forward, **layers)


# behind products -----------------------------------------------------------------------------------------------------

BEHIND = {  # of a product's result and a float operand
    "floats": lambda y, o: y + o,
    "relu, floats": lambda y, o: (y + o).relu(),
    "clamp, floats": lambda y, o: (y + o).clamp(-0.5, 0.7),
    "from above, floats": lambda y, o: (y + o).clamp(max=0.7),
    "bytes": lambda y, o: OUTPUT(y + o),
    "relu, bytes": lambda y, o: OUTPUT((y + o).relu()),
    "floats and bytes": lambda y, o: (lambda z: (z, OUTPUT(z)))(y + o),
    "relu, floats and bytes": lambda y, o: (lambda z: (z, OUTPUT(z)))((y + o).relu()),
    "floats and bytes from zero": lambda y, o: (lambda z: (z, POSITIVE(z)))((y + o).relu()),
    "floats and int8": lambda y, o: (lambda z: (z, SIGNED(z)))(y + o),
    "int8": lambda y, o: SIGNED(F.relu6(y + o)),
    "floats and a reduced grid": lambda y, o: (lambda z: (z, REDUCED(z)))(y + o),
    "two grids": lambda y, o: (lambda z: (SIGNED(z), REDUCED(z)))(y + o),
    "an operand on a grid": lambda y, o: OUTPUT(y + OUTPUT(o)),
    "an operand on int8": lambda y, o: y.relu() + SIGNED(o),
    "multiplied": lambda y, o: SIGNED(y * o),
    "silu behind": lambda y, o: F.silu(y + o),
    "hardswish behind": lambda y, o: SIGNED(F.hardswish(y + o)),
    "tanh behind a product": lambda y, o: OUTPUT(torch.tanh(y * o)),
    "two activations": lambda y, o: OUTPUT((y.sigmoid() + o).relu()),
}


@pytest.mark.parametrize("channels", CHANNELS)
def test_what_is_not_finite_in_an_operand_of_a_linears_result(channels):
    norm = {"layer norm behind": lambda y, o: SIGNED(F.layer_norm(y + o, y.shape[-1:]))}
    model = each_of({**BEHIND, **norm}, lambda: linear(9, channels))
    case = Compared(model, INPUT.sample(3, 9), torch.randn(3, channels))
    for rows in ROWS if channels in (17, 64) else SOME_ROWS:
        for other in with_wild(torch.randn(rows, channels)):
            case.check(INPUT.sample(rows, 9), other)


@pytest.mark.parametrize(("channels", "size"), pairs([5, 16, 20, 33, 64, 70], [(2, 6), (1, 13), (4, 4)]))
def test_what_is_not_finite_in_an_operand_of_a_convolutions_result(size, channels):
    for layer, width in ((lambda: conv(5, channels, padding=1), 5), (lambda: depthwise(channels, padding=1), channels)):
        inputs = INPUT.sample(1, width, *size), torch.randn(1, channels, *size)
        case = Compared(each_of(BEHIND, layer), *inputs, batch=False)
        for other in with_wild(inputs[1]):
            case.check(inputs[0], other)


@pytest.mark.parametrize("channels", [16, 17, 40])
def test_a_gate_that_is_not_finite(channels):
    for layer in (conv(channels, channels), depthwise(channels)):
        model = Call(lambda m, x, g: (lambda z: (z, SIGNED(z)))(m.a(x) * g.sigmoid()), a=layer)
        case = Compared(model, INPUT.sample(2, channels, 5, 4), torch.randn(2, channels, 1, 1), batch=False)
        for gate in with_wild(torch.randn(2, channels, 1, 1)):
            case.check(INPUT.sample(2, channels, 5, 4), gate)


# in front of them ----------------------------------------------------------------------------------------------------

INPUTS = {"uint8": INPUT, "int8": signed(0.02, -17), "reduced": Grid(0.02, 60, 3, 127), "symmetric": signed(0.02, 0)}


@pytest.mark.parametrize(("channels", "grid"), pairs([1, 3, 4, 5, 17, 33], INPUTS, of_each=2))
def test_images_that_are_not_finite_are_quantized_as_torch_does(grid, channels):
    grid = INPUTS[grid]
    layers = {"a": conv(channels, 20, padding=1, grid=grid), "b": depthwise(channels, padding=1, grid=grid)}
    for size in ((1, 1), (3, 7), (5, 33)):
        x = grid.sample(2, channels, *size)
        for f in (
            lambda m, x: m.a(x),
            lambda m, x: m.b(x),
            lambda m, x: (m.a(x), F.max_pool2d(grid(x), 3, 1, 1)),
        ):
            case = Compared(Call(f, **layers), x, batch=False)
            for wild in with_wild(x):
                case.check(wild)


@pytest.mark.parametrize("channels", CHANNELS)
def test_rows_that_are_not_finite_are_quantized_as_torch_does(channels):
    layers = {name: linear(channels, 20, grid) for name, grid in INPUTS.items()}
    case = Compared(Call(lambda m, x: {n: getattr(m, n)(x) for n in layers}, **layers), torch.randn(3, channels))
    for rows in ROWS:
        for wild in with_wild(torch.randn(rows, channels)):
            case.check(wild)


ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.7, 0.9),
    "clamp": lambda x: x.clamp(-0.3, 1.2),
    "clamp from below": lambda x: x.clamp(min=-0.3),
    "clamp from above": lambda x: x.clamp(max=0.4),
    "crossed clamp": lambda x: x.clamp(1.0, -1.0),
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
}
FAR = (1e3, 87.5, 88.5, 1e10, 1e30, 1e37)


def activated(channels):
    """Each activation alone, and in front of quantization to uint8 and int8."""
    layers = {"u": linear(channels, 20, OUTPUT), "s": linear(channels, 17, SIGNED)}

    def forward(m, x):
        values = {name: f(x) for name, f in ACTIVATIONS.items()}
        return (
            values,
            {name: m.u(y) for name, y in values.items()},
            {name: m.s(f(x)) for name, f in ACTIVATIONS.items()},
        )

    case = Compared(Call(forward, **layers), torch.randn(3, channels))
    assert not {"gelu", "relu", "hardtanh", "silu", "sigmoid"} & {ops.op_name(n) for n in case.replaced.graph.nodes}
    return case


@pytest.mark.parametrize("channels", [1, 7, 16, 20, 64, 70])
def test_activations_of_what_is_not_finite(channels):
    case = activated(channels)
    for wild in with_wild(torch.randn(5, channels)):
        case.check(torch.where(wild == math.inf, 3.0, wild))  # for infinity see below


@pytest.mark.parametrize("sign", [1, -1])
def test_activations_of_numbers_far_from_zero(sign):
    case = activated(20)
    for far in (1e3, 87.5, 88.5, 1e10, 1e30, 1e37):
        case.check(torch.full((3, 20), sign * far))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_infinity(name):
    """The GELU of infinity is infinity; torch gives infinity or NaN, by the length of the tensor."""
    f = ACTIVATIONS[name]
    case = Compared(Call(lambda m, x: (lambda y: (y, m.a(y)))(f(x)), a=linear(20, 20, OUTPUT)), torch.randn(3, 20))
    x = torch.full((3, 20), math.inf)
    for set_name in native.instruction_sets():
        with native.use(set_name):
            assert torch.allclose(case.replaced(x)[0], f(x[0, 0])), set_name


# pools and norms -----------------------------------------------------------------------------------------------------


POOLS = [(2, {}), (3, {"stride": 2, "padding": 1}), (3, {"stride": 1, "dilation": 2, "padding": 1})]


@pytest.mark.parametrize(("channels", "window"), pairs([1, 5, 16, 20, 33, 64, 70, 80], POOLS))
def test_a_max_pool_keeps_nan(channels, window):
    kernel, options = window

    def pool(x):
        return F.max_pool2d(x, kernel, **options)

    functions = {
        "floats and bytes": lambda m, x, o: (pool(o), m.a(pool(o))),
        "bytes": lambda m, x, o: m.a(pool(o)),  # quantizing first would lose what is NaN
        "bytes behind a sum": lambda m, x, o: m.a(pool((m.b(x) + o).relu())),
        "bytes that are there": lambda m, x, o: (lambda y: (m.a(y), m.a(pool(y))))(m.b(x) + o),
        "a product": lambda m, x, o: SIGNED(pool(m.b(x) * o)),
        "an operand on a grid": lambda m, x, o: pool(m.b(x) + OUTPUT(o)),
    }
    layers = {"a": conv(channels, 7, 1, grid=SIGNED), "b": conv(channels, channels, 1)}
    inputs = INPUT.sample(2, channels, 7, 8), torch.randn(2, channels, 7, 8)
    model = Call(lambda m, x, o: {name: f(m, x, o) for name, f in functions.items()}, **layers)
    case = Compared(model, *inputs, batch=False)
    for other in with_wild(inputs[1], every=11):
        case.check(inputs[0], other)


@pytest.mark.parametrize("finite", [True, False])
def test_only_what_cannot_be_nan_is_quantized_in_front_of_a_max_pool(finite):
    def f(m, x, o):
        y = F.relu(m.a(x))
        return m.b(F.max_pool2d(y + OUTPUT(o) if finite else y + o, 3, 2, 1))

    model = Call(f, a=conv(5, 20, padding=1), b=conv(20, 7))
    graph = exported(model, (INPUT.sample(2, 5, 12, 12), torch.randn(2, 20, 12, 12)))
    steps = [s for built in replace_regions(graph) for s in built.plan.steps]
    [pool] = [s for s in steps if s.kind == "max_pool"]
    assert (pool.input.grid is not None) == finite


@pytest.mark.parametrize("channels", CHANNELS)
def test_means_and_norms_of_what_is_not_finite(channels):
    def f(m, x, o):
        y = m.b(x) + o
        return y.mean((2, 3)), m.a(y.mean((2, 3), keepdim=True)), SIGNED(y.mean((2, 3)))

    model = Call(f, a=conv(channels, 7, 1, grid=OUTPUT), b=conv(channels, channels, 1))
    inputs = INPUT.sample(3, channels, 2, 3), torch.randn(3, channels, 2, 3)
    case = Compared(model, *inputs, batch=False)
    for other in with_wild(inputs[1], every=11):
        case.check(inputs[0], other)
    norm = Call(lambda m, x: (lambda y: (y, m.a(y)))(F.layer_norm(x, (channels,))), a=linear(channels, 20, SIGNED))
    case = Compared(norm, torch.randn(3, channels))
    for rows in (1, 5, 13):
        for wild in with_wild(torch.randn(rows, channels), every=3 * channels):
            case.check(wild)


# dynamic quantization: all results are NaN; what follows keeps it -----------------------------------------------------


def test_nan_from_a_dynamic_range_reaches_floats_bytes_and_pools():
    from test_x86_dynamic import GRIDS

    for grid in GRIDS.values():
        for channels in (1, 16, 20, 64, 70):
            model = Call(
                lambda m, x: (lambda y: (y, F.relu(y), OUTPUT(y), SIGNED(F.relu(y)), F.gelu(y) + x.sum()))(m.a(x)),
                a=linear(9, channels, grid),
            )
            case = Compared(model, torch.randn(3, 9))
            for rows in (1, 2, 6, 12, 13):
                for wild in with_wild(torch.randn(rows, 9)):
                    case.check(wild)


# attention -----------------------------------------------------------------------------------------------------------


def attended(q, k, v, mask, causal):
    """softmax(q k' / sqrt(width) + mask) v as written; a row that sees no key is zero unless its values are not finite.

    torch's own kernel gives zeros too where all scores of a row are NaN and the keys fill no vector.
    """
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    if mask is not None:
        scores = scores + (torch.where(mask, 0.0, -math.inf) if mask.dtype == torch.bool else mask)
    weights = torch.where((scores == -math.inf).all(-1, keepdim=True), 0.0, scores.softmax(-1))
    return weights @ v


def masks(rows, keys):
    last = torch.ones(rows, keys, dtype=torch.bool)
    last[0] = False
    return {
        "none": (None, False),
        "causal": (None, True),
        "bool": (torch.rand(rows, keys) > 0.4, False),
        "float": (torch.where(torch.rand(2, 1, rows, keys) > 0.4, 0.0, -math.inf), False),
        "a row sees nothing": (last, False),
    }


SIZES = [(1, 1, 8), (2, 5, 16), (4, 3, 1), (7, 13, 20), (12, 16, 32), (13, 40, 7), (33, 33, 64), (5, 70, 16)]


@pytest.mark.parametrize("value", WILD)
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize(("rows", "keys", "width"), SIZES)
def test_attention_to_what_is_not_finite(rows, keys, width, which, value):
    torch.manual_seed(0)
    sizes = {"query": rows, "key": keys, "value": keys}
    for mask, causal in masks(rows, keys).values():
        for place in {0, sizes[which] // 2, sizes[which] - 1}:
            operands = {name: torch.randn(2, 3, n, width) for name, n in sizes.items()}
            operands[which][1, 1, place, width // 2] = value
            expected = attended(*operands.values(), mask, causal)
            theirs = F.scaled_dot_product_attention(*operands.values(), attn_mask=mask, is_causal=causal)
            assert bool((expected.isnan() | ~theirs.isnan()).all())
            assert keys < 16 or torch.equal(expected.isnan(), theirs.isnan())
            for name in native.instruction_sets():
                with native.use(name):
                    actual = REGION.x86_attention(*operands.values(), mask, width**-0.5, causal).transpose(1, 2)
                assert torch.allclose(expected, actual, rtol=1e-4, atol=1e-5, equal_nan=True), name


def test_a_mask_that_is_nan_is_seen():
    q = torch.randn(1, 2, 5, 16)
    for keys in (1, 5, 16, 33):
        k, mask = torch.randn(1, 2, keys, 16), torch.zeros(5, keys)
        mask[2, keys // 2] = math.nan
        for name in native.instruction_sets():
            with native.use(name):
                output = REGION.x86_attention(q, k, k, mask, 0.25, False)
            assert output.isnan().all((0, 2, 3)).tolist() == [False, False, True, False, False], name
