"""How plans are packed, laid out, shared between threads and refused; and what the kernels leave alone."""

import copy
import struct

import nets
import pytest
import torch
import torch.nn.functional as F
from exact import INPUT, OUTPUT, REGION, Case, Grid, Layer, Q, conv, depthwise, exported, linear, regions_in, targets
from foreign import SpecQuantizer, dynamic, per_channel, per_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Call, callers_agree
from torch import nn

import torchquant as tq
from torchquant.artifacts.serialize import export_again
from torchquant.errors import LoweringError
from torchquant.fx.flat import flat
from torchquant.ops.x86 import native, packing
from torchquant.ops.x86 import plan as plans
from torchquant.ops.x86.plan import Quantization, Step, Value
from torchquant.ops.x86.translation import replace_regions

# threads ------------------------------------------------------------------------------------------------------------


def network(m, x):
    x = F.relu6(m.stem(x))
    x = (x + m.narrow(F.relu6(m.deep(F.relu6(m.widen(x)))))).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    return m.head(F.adaptive_avg_pool2d(F.silu(m.last(x)), 1).flatten(1)), x


def tokens(m, x):
    y = m.first(F.layer_norm(x, (40,)))
    return x + m.second(F.gelu(y))


@pytest.fixture(scope="module")
def network_region():
    torch.manual_seed(0)
    model = Call(
        network,
        stem=conv(3, 24, 3, stride=2, padding=1),
        widen=conv(24, 72, 1),
        deep=depthwise(72, padding=1),
        narrow=conv(72, 24, 1),
        last=conv(24, 130, 1),
        head=linear(130, 10),
    )
    graph = exported(model, (torch.randn(3, 3, 33, 30),), {"args": ({0: torch.export.Dim("batch")},)})
    assert len(replace_regions(graph)) == 1
    return graph


@pytest.fixture(scope="module")
def token_region():
    torch.manual_seed(0)
    model = Call(tokens, first=linear(40, 100, Grid(0.03, 128)), second=linear(100, 40))
    graph = exported(model, (torch.randn(3, 19, 40),), {"args": ({0: torch.export.Dim("batch")},)})
    assert len(replace_regions(graph)) == 1
    return graph


def leaves(value):
    return torch.utils._pytree.tree_leaves(value)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


@pytest.fixture
def thread_setting():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("thread_setting")
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 40])
def test_the_number_of_threads_changes_no_bit(batch, network_region, token_region):
    for graph, shape in ((network_region, (batch, 3, 33, 30)), (token_region, (batch, 19, 40))):
        x = torch.randn(shape)
        for name in native.instruction_sets():
            with native.use(name):
                torch.set_num_threads(1)
                expected = graph(x)
                for threads in (2, 3):
                    torch.set_num_threads(threads)
                    for _ in range(3):
                        assert equal(graph(x), expected), (name, threads)


@pytest.mark.usefixtures("thread_setting")
@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_samples_that_meet_behind_a_split_get_the_same_results(chunk, monkeypatch):
    """The last layers run on several samples at once, the first ones on `chunk`: not a bit may change."""
    monkeypatch.setattr(plans, "_CACHED", 0)
    torch.manual_seed(0)
    layers = {"a": conv(3, 16, 3, padding=1), "b": conv(16, 256, 3, stride=4), "c": conv(256, 256, 1)}
    f = lambda m, x: (m.c(y := m.b(F.relu(m.a(x)))) + y, y)  # noqa: E731
    graph = exported(Call(f, **layers), (torch.randn(3, 3, 33, 30),), {"args": ({0: torch.export.Dim("batch")},)})
    (built,) = replace_regions(graph)
    header = struct.unpack("<16i", bytes(built.memory[:64].tolist()))
    assert 0 < header[10] < header[3]
    built.memory.copy_(built.plan.build(chunk))
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 33, 30)
        torch.set_num_threads(1)
        expected = [torch.cat(parts) for parts in zip(*(graph(x[i : i + 1]) for i in range(batch)), strict=True)]
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert equal(graph(x), expected), (batch, threads)


@pytest.mark.usefixtures("thread_setting")
def test_attention_does_not_depend_on_the_number_of_threads():
    inputs = [torch.randn(3, 5, 17, 20) for _ in range(3)]
    torch.set_num_threads(1)
    expected = REGION.x86_attention(*inputs, None, 0.2, False)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(REGION.x86_attention(*inputs, None, 0.2, False), expected)


@pytest.mark.usefixtures("thread_setting")
@pytest.mark.parametrize("threads", [1, 2])
def test_four_callers_at_once_get_bit_equal_results(threads, network_region):
    torch.set_num_threads(threads)
    inputs = [torch.randn(1 + i, 3, 33, 30) for i in range(4)]
    assert callers_agree(network_region, inputs)


def test_samples_do_not_see_each_other(network_region):
    x = torch.randn(7, 3, 33, 30)
    whole = network_region(x)
    for i in range(7):
        assert equal([part[i : i + 1] for part in whole], network_region(x[i : i + 1]))


def test_a_profile_has_the_time_of_each_op(call):
    plan, inputs, shapes = call
    count = struct.unpack("<4i", bytes(plan[:16].tolist()))[3]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        [spent] = native.profiled(lambda: REGION.x86_region(plan, inputs, shapes), [plan], [count])
    finally:
        torch.set_num_threads(before)
    assert len(spent) == count > 2
    assert all(0 <= t < 1e6 for t in spent)


# refusals -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def call():
    """The plan, inputs and shapes of a region with two inputs and one output."""
    model = Call(lambda m, x, y: m.a(x) + m.b(y), a=conv(5, 16), b=conv(3, 16))
    case = Case(model, lambda: (INPUT.sample(2, 5, 6, 7), INPUT.sample(2, 3, 6, 7)))
    [node] = regions_in(case.graph)
    return getattr(case.graph, node.args[0].target).clone(), list(case.inputs), list(node.args[2])


def test_what_is_no_plan_is_refused(call):
    plan, inputs, shapes = call
    for bad in (torch.randint(0, 256, plan.shape, dtype=torch.uint8), plan[:60], plan[:0], plan[4:]):
        with pytest.raises(RuntimeError, match="not a plan"):
            REGION.x86_region(bad, inputs, shapes)


def test_a_truncated_plan_is_refused(call):
    plan, inputs, shapes = call
    for size in (64, len(plan) // 2, len(plan) - 64):
        with pytest.raises(RuntimeError, match="the plan is damaged"):
            REGION.x86_region(plan[:size].clone(), inputs, shapes)


def test_other_dtypes_and_output_sizes_are_refused(call):
    plan, inputs, shapes = call
    x, y = inputs
    for bad in ([x.to(torch.int32), y], [x.double(), y], [x, y.to(torch.uint8)]):
        with pytest.raises(RuntimeError, match=r"input \d of the region is no float32"):
            REGION.x86_region(plan, bad, shapes)
    with pytest.raises(RuntimeError, match=r"output 0 .* elements, not"):
        REGION.x86_region(plan, inputs, [*shapes[:-1], shapes[-1] + 1])


def test_a_plan_of_another_version_is_refused(call):
    plan, inputs, shapes = call
    plan[4:8] = torch.frombuffer(bytearray(struct.pack("<i", 99)), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"version 99.*lower the model again"):
        REGION.x86_region(plan, inputs, shapes)


def test_inputs_of_a_wrong_size_or_number_are_refused(call):
    plan, (x, y), shapes = call
    for bad in ([x[:, :, :5], y], [x, y[:1]], [x, y[:, :2]]):
        with pytest.raises(RuntimeError, match=r"input \d of the region has \d+ elements, and \d+ make a sample"):
            REGION.x86_region(plan, bad, shapes)
    for bad in ([x], [x, y, y]):
        with pytest.raises(RuntimeError, match="takes 2 tensors"):
            REGION.x86_region(plan, bad, shapes)
    with pytest.raises(RuntimeError, match="returns 1 tensors"):
        REGION.x86_region(plan, [x, y], [*shapes, *shapes])


def test_attention_refuses_what_it_does_not_take():
    native.load()
    q = torch.randn(2, 4, 5, 8)
    for bad in ((q[0], q, q), (q, q[:, :3], q[:, :3]), (q, q, q[..., :4]), (q.double(), q, q)):
        with pytest.raises(RuntimeError, match="torchquant: attention"):
            REGION.x86_attention(*bad, None, 1.0, False)


def test_a_cache_that_cannot_be_made_is_replaced(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHQUANT_CACHE", str(tmp_path / "file" / "below"))
    folder = native.cache_folder()
    assert folder.is_dir()
    assert folder == native.cache_folder() != tmp_path / "file" / "below"


def test_an_unknown_instruction_set_is_refused_and_the_best_stays():
    with pytest.raises(LoweringError, match=r"does not run no such set; it runs \["), native.use("no such set"):
        pass
    with native.use("portable"), pytest.raises(LoweringError), native.use("no such set"):
        pass


@pytest.mark.parametrize("compiler", ["/bin/false", "/no/such/compiler"])
def test_a_broken_compiler_is_reported_and_leaves_no_file(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "compiler", lambda: compiler)
    with pytest.raises(LoweringError, match=compiler):
        native.library_file()
    assert [f.suffix for f in tmp_path.iterdir()] == [".lock"]


def test_another_architecture_is_refused(monkeypatch):
    monkeypatch.setattr(native.platform, "machine", lambda: "riscv64")
    assert not native.supported()
    with pytest.raises(LoweringError, match="do not run on riscv64"):
        native.library_file()


# packing ------------------------------------------------------------------------------------------------------------


def codes(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (16, 4, 1, 1), (17, 5, 3, 2), (40, 3, 2, 3)])
def test_convolution_weights_are_packed_in_blocks_of_sixteen_by_four(shape):
    weight = codes(*shape)
    n, c, kh, kw = shape
    expected = torch.zeros(-(-n // 16), kh * kw, -(-c // 4), 16, 4, dtype=torch.int8)
    for i in range(n):
        for j in range(c):
            for y in range(kh):
                for x in range(kw):
                    expected[i // 16, y * kw + x, j // 4, i % 16, j % 4] = weight[i, j, y, x]
    assert torch.equal(packing.pack_convolution(weight), expected)


def lane_of(channel, channels):
    """Its block: first channel and size; its vector and lane there, as the comment at `Block` in kernels.cpp has it."""
    at = 0
    for size in [64] * (channels // 64) + [32] * (channels % 64 // 32) + [16] * (channels % 32 // 16):
        if channel < at + size:
            i, rest = divmod(channel - at, 16)
            if size == 64:
                return at, size, rest // 4, 4 * i + rest % 4
            if size == 32:
                return at, size, rest // 8, 8 * (rest // 4 % 2) + 4 * i + rest % 4
            return at, size, 0, rest
        at += size
    raise AssertionError


@pytest.mark.parametrize("channels", [16, 32, 48, 64, 80, 96, 112, 128, 208])
def test_channels_are_interleaved_as_byte_vectors_leave_them(channels):
    values = torch.arange(channels)
    interleaved = packing.interleave_channels(values)
    for channel in range(channels):
        at, _, vector, lane = lane_of(channel, channels)
        assert int(interleaved[at + 16 * vector + lane]) == channel


@pytest.mark.parametrize("channels", [1, 16, 40, 65, 112])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 5), (5, 1), (5, 5), (4, 2), (7, 3), (9, 9)])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_depthwise_weights_are_packed_four_taps_a_lane(channels, kernel, stride, dilation):
    weight, (kh, kw) = codes(channels, 1, *kernel), kernel
    padded = -(-channels // 16) * 16
    alone = kh % 4 == 1 and kh > 1
    down, along = (kh // 4, -(-kw // 4)) if alone else (-(-kh // 4), 0)
    taps = down * kw + along
    shifts = [0, 1] if (kh, stride, dilation) == (3, 1, 1) else [0]
    expected = torch.zeros(len(shifts) * padded * taps * 4, dtype=torch.int8)
    for s, shift in enumerate(shifts):
        for channel in range(channels):
            at, size, vector, lane = lane_of(channel, padded)
            for y in range(kh):
                for x in range(kw):
                    if alone and y == kh - 1:
                        tap, k = down * kw + x // 4, x % 4
                    else:
                        tap, k = (y + shift) // 4 * kw + x, (y + shift) % 4
                    place = (s * padded + at) * taps + tap * size + 16 * vector + lane
                    expected[place * 4 + k] = weight[channel, 0, y, x]
    assert torch.equal(packing.pack_depthwise(weight, stride, dilation), expected)


# layout of the arena ------------------------------------------------------------------------------------------------


@st.composite
def random_steps(draw):
    values = [
        Value(
            draw(st.integers(1, 9)),
            draw(st.integers(1, 9)),
            draw(st.integers(1, 70)),
            Quantization(1.0, 0, 0, 255) if draw(st.booleans()) else None,
            ("output", 0) if draw(st.integers(0, 9)) == 0 else None,
            [draw(st.integers(0, 2)) for _ in range(4)],
        )
        for _ in range(draw(st.integers(2, 12)))
    ]
    any_value = st.sampled_from(values)
    steps = [
        Step(
            "elementwise",
            draw(any_value),
            out_byte=draw(st.none() | any_value),
            out_float=draw(any_value),
            other=draw(st.none() | any_value),
        )
        for _ in range(draw(st.integers(1, 15)))
    ]
    return steps, values


@settings(max_examples=100, deadline=None, derandomize=True)
@given(random_steps())
def test_values_that_live_at_once_never_overlap(drawn):
    steps, _ = drawn
    values = list(dict.fromkeys(v for s in steps for v in (*s.reads(), *s.writes())))
    size = plans._lay_out(steps, values)[0]
    replaced = {(s.other, s.out_float) for s in steps}
    inner = [v for v in values if v.external is None]
    lives = {v: [i for i, s in enumerate(steps) if v in (*s.reads(), *s.writes())] for v in inner}
    for v in inner:
        assert v.offset >= 0
        assert v.offset + v.units <= size
        assert v.units * 64 >= (v.h + sum(v.border[::2])) * (v.w + sum(v.border[1::2])) * v.stride
        for w in inner:
            first, second = sorted((v, w), key=lambda u: lives[u][0])
            meet = v is not w and lives[second][0] <= lives[first][-1]
            if meet and lives[second][0] == lives[first][-1] and (first, second) in replaced:
                continue  # a sum may take the place of its addend
            assert not meet or v.offset + v.units <= w.offset or w.offset + w.units <= v.offset


def test_values_that_never_meet_share_the_arena():
    first, second, third = (Value(4, 4, 16) for _ in range(3))
    steps = [Step("elementwise", first, out_float=second), Step("elementwise", second, out_float=third)]
    assert plans._lay_out(steps, [first, second, third])[0] == 2 * first.units
    assert first.offset == third.offset != second.offset


# what stays with Inductor -------------------------------------------------------------------------------------------


def unharmed(graph, *inputs):
    """The graph with its regions replaced, after a check that it computes the same."""
    replaced = copy.deepcopy(graph)
    replace_regions(replaced)
    for _ in range(2):
        expected, actual = leaves(graph(*inputs)), leaves(replaced(*inputs))
        assert all(tq.sqnr_db(a, b) > 60 for a, b in zip(expected, actual, strict=True))
    return replaced


OTHER = {
    "one image without a batch": (conv(5, 17), (5, 7, 6)),
    "one signal without a batch": (Layer(F.conv1d, INPUT, (17, 5, 3)), (5, 7)),
    "one row": (linear(5, 17), (5,)),
    "three dimensions": (Layer(F.conv3d, INPUT, (4, 3, 2, 2, 2)), (1, 3, 4, 4, 4)),
    "transposed": (Layer(F.conv_transpose2d, INPUT, (5, 6, 2, 2), bias=False), (1, 5, 4, 4)),
    "weight only": (linear(5, 17, None), (4, 5)),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_product_of_another_kind_is_no_region(name):
    layer, shape = OTHER[name]
    graph = exported(Call(lambda m, x: OUTPUT(m.a(x)), a=layer), (INPUT.sample(*shape),))
    assert not regions_in(unharmed(graph, INPUT.sample(*shape)))


def quantized(model, x, kinds, *specs):
    converted = tq.quantize(model, x, [x], quantizer=SpecQuantizer(kinds, *specs), algorithms=(), progress=False)
    return export_again(converted, x).module()


U8 = per_tensor(torch.uint8, 0, 255)
SPECS = {
    "dynamic activations, affine weights": (dynamic(), per_channel(symmetric=False)),
    "affine weights": (U8, per_channel(torch.uint8, 0, 255, symmetric=False)),
    "affine int8 weights": (U8, per_channel(symmetric=False)),
    "weights by input channel": (U8, per_channel(axis=1)),
    "16-bit activations": (per_tensor(torch.int16, -32768, 32767), per_channel()),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_linear_with_other_qparams_is_no_region(name):
    x = torch.randn(4, 8)
    assert not regions_in(unharmed(quantized(nets.mlp(), x, {"linear"}, *SPECS[name]), x))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_transposed_convolution_of_a_quantizer_is_a_region_if_its_scales_are_those_of_outputs(axis):
    x = torch.randn(2, 3, 6, 6)
    graph = quantized(nn.Sequential(nn.ConvTranspose2d(3, 4, 2)), x, {"conv_transpose2d"}, U8, per_channel(axis=axis))
    assert len(regions_in(unharmed(graph, x))) == axis


@pytest.mark.parametrize("shape", [(2, 40), (2, 5, 8)])
def test_a_conv1d_of_what_was_reshaped_is_a_region(shape):
    x = torch.randn(shape)
    model = Call(lambda m, x: m.inner(x.flatten(1)[:, None].relu()), inner=nn.Conv1d(1, 4, 3))
    assert len(regions_in(unharmed(quantized(model, x, {"conv1d"}, U8, per_channel()), x))) == 1


def test_a_quantized_network_of_a_quantizer_is_one_region():
    x = torch.randn(2, 3, 6, 6)
    graph = quantized(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), x, {"conv2d"}, U8, per_channel()
    )
    assert len(regions_in(unharmed(graph, x))) == 1


def around(function, *shape, **layers):
    """One convolution in front of a function that the kernels do not run, as a graph and its input."""
    x = INPUT.sample(*shape or (2, 5, 7, 6))
    return exported(Call(function, a=conv(5, 16), **layers), (x,)), x


REST = {  # function, layers, regions
    "float op in between": (lambda m, x: m.b(torch.sin(INPUT(x))), {"b": conv(5, 4, grid=None)}, 0),
    "dequantized, changed, then read": (lambda m, x: m.b(INPUT(x) * 2.0), {"b": conv(5, 4, grid=None)}, 0),
    "padding with ones": (lambda m, x: m.a(F.pad(x, (1, 1, 1, 1), value=1.0)), {}, 1),
    "reflected padding": (lambda m, x: m.a(F.pad(x, (1, 1, 1, 1), mode="reflect")), {}, 1),
    "cropping": (lambda m, x: m.a(F.pad(x, (-1, 1, 0, 0))), {}, 1),
    "padding with more readers": (lambda m, x: (lambda y: (m.a(y), y + 1))(F.pad(x, (1, 1, 1, 1))), {}, 1),
    "padding of channels": (lambda m, x: m.b(F.pad(m.a(x), (0, 0, 0, 0, 1, 2))), {"b": conv(19, 4)}, 2),
    "padding of one without and one grouped": (
        lambda m, x: (lambda y: (m.b(y), m.c(y)))(F.pad(m.a(x), (1, 1, 1, 1))),
        {"b": conv(16, 4), "c": conv(16, 4, groups=2)},
        1,
    ),
    "pool to 2x2": (lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), 2)), {"b": conv(16, 4, 1)}, 2),
    "average pool": (lambda m, x: m.b(F.avg_pool2d(m.a(x), 2)), {"b": conv(16, 4, 1)}, 2),
    "pool with indices": (lambda m, x: F.max_pool2d(m.a(x), 2, return_indices=True)[0], {}, 1),
    "mean of rows": (lambda m, x: m.a(x).mean(2), {}, 1),
    "mean of channels": (lambda m, x: m.a(x).mean(1, keepdim=True), {}, 1),
    "sum with alpha": (lambda m, x: torch.add(m.a(x), m.a(x), alpha=2), {}, None),
    "a scalar added": (lambda m, x: (m.a(x) + 1).relu() * 2.0, {}, 1),
    "a broadcast row added": (lambda m, x: m.a(x) + m.a(x)[:1, :, :1], {}, None),
    "training dropout of nothing": (lambda m, x: F.dropout(m.a(x), 0.0, training=True), {}, 1),
    "leaky relu": (lambda m, x: F.leaky_relu(m.a(x)), {}, 1),
    "elu inside": (lambda m, x: m.b(F.elu(m.a(x))), {"b": conv(16, 4, 1)}, 2),
    "concatenated": (lambda m, x: m.b(torch.cat([m.a(x), m.a(x).relu()], 1)), {"b": conv(32, 4, 1)}, None),
    "chunked": (lambda m, x: torch.mul(*m.a(x).chunk(2, 1)), {}, 1),
    "channels last norm": (
        lambda m, x: m.b(F.layer_norm(m.a(x).permute(0, 2, 3, 1), (16,))),
        {"b": linear(16, 9)},
        2,
    ),
    "norm of image rows": (lambda m, x: m.b(F.layer_norm(m.a(x), (4,))), {"b": linear(4, 9)}, 2),
    "norm of the last two": (lambda m, x: F.layer_norm(m.a(x), (5, 4)), {}, 1),
    "tokens of an image": (
        lambda m, x: m.b(F.layer_norm(m.a(x).flatten(2).transpose(1, 2), (16,))),
        {"b": linear(16, 9)},
        2,
    ),
    "images of tokens": (
        lambda m, x: m.c(m.b(m.a(x).flatten(2).transpose(1, 2)).transpose(1, 2).reshape(2, 9, 5, 4)),
        {"b": linear(16, 9), "c": conv(9, 4)},
        3,
    ),
    "rows and images added": (lambda m, x: m.a(x) + m.b(x[:, :1, 2:].expand(2, 16, 5, 6)), {"b": linear(6, 4)}, None),
    "returns to where it came from": (
        lambda m, x: (lambda y: m.b(y) + torch.sin(y))(m.a(x)),
        {"b": conv(16, 16, 1)},
        None,
    ),
    "two grids of one quantize op": (
        lambda m, x: Q.dequantize_per_tensor(
            Q.quantize_per_tensor(m.a(x), 0.03, 3, 0, 255, torch.uint8), 0.04, 3, 0, 255, torch.uint8
        ),
        {},
        1,
    ),
}


@pytest.mark.parametrize("name", REST)
def test_what_the_kernels_do_not_run_is_unharmed(name):
    function, layers, regions = REST[name]
    graph, x = around(function, **layers)
    replaced = unharmed(graph, x)
    assert regions is None or len(regions_in(replaced)) == regions


def test_a_float_image_may_be_added_last():
    model = Call(lambda m, x, y: m.a(x) + y, a=conv(5, 17))
    inputs = (INPUT.sample(2, 5, 7, 6), torch.randn(2, 17, 5, 4))
    assert len(regions_in(unharmed(exported(model, inputs), *inputs))) == 1


IN_PLACE = {
    "relu_ of a shared value": lambda m, x: (lambda y: (F.relu_(y), y))(m.a(x)),
    "relu_ after another reader": lambda m, x: (lambda y: (m.b(y), F.relu_(y)))(m.a(x)),
    "add_ after another reader": lambda m, x: (lambda y: (m.b(y), y.add_(1.0)))(m.a(x)),
    "add_ of an activation": lambda m, x: (lambda y: (m.b(y), y.add_(y.sigmoid()), y))(m.a(x)),
    "mul_ of a shared value": lambda m, x: (lambda y: (y.mul_(m.c(x)), y, m.b(y)))(m.a(x)),
    "relu_ of the input": lambda m, x: m.a(F.relu_(x)),
    "relu_ of the input, read before": lambda m, x: (lambda y: y + m.a(F.relu_(x)))(m.a(x)),
    "leaky_relu_ of the input, read before": lambda m, x: (lambda y: y + m.a(F.leaky_relu_(x)))(m.a(x)),
    "relu_ of a view of a shared value": lambda m, x: (lambda y: (F.relu_(y.view(y.shape)), y))(m.a(x)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_writing_in_place_is_unharmed(name):
    x = torch.randn(2, 5, 7, 6)
    graph = exported(Call(IN_PLACE[name], a=conv(5, 16), b=conv(16, 4, 1), c=conv(5, 16)), (x,))
    replaced = export_again(flat(graph).graph, x.clone()).module()
    assert replace_regions(replaced)
    expected, actual = leaves(graph(x.clone())), leaves(replaced(x.clone()))  # and what is written into the input
    assert all(tq.sqnr_db(a, b) > 60 for a, b in zip(expected, actual[: len(expected)], strict=True))


def test_regions_of_a_graph_without_products_are_none():
    graph = exported(Call(lambda m, x: OUTPUT(INPUT(x).relu() + 1)), (torch.randn(2, 5, 4, 4),))
    before = targets(graph)
    assert replace_regions(graph) == []
    assert targets(graph) == before
