"""Ops that the XNNPACK delegate does not know: right through other ops or portable kernels, or refused by name."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from nets import Call
from torch import nn

import torchquant as tq
from torchquant.fx import passes
from torchquant.quantizers.xnnpack import XnnpackQuantizer

pytest.importorskip("executorch")
from executorch.backends.xnnpack.quantizer import xnnpack_quantizer

from torchquant.backends import executorch_xnnpack
from torchquant.backends.executorch_xnnpack import portable
from torchquant.backends.executorch_xnnpack.blame import blamed

MOST = 7


def lowered(model, batch, *, dynamic=False, quantizer=None):
    """The program and its converted graph."""
    torch.manual_seed(0)
    shapes = (tuple({0: torch.export.Dim("batch", max=MOST)} for _ in batch),) if dynamic else None
    exported = tq.export(model.eval(), batch, dynamic_shapes=shapes)
    quantizer = quantizer or XnnpackQuantizer("static_int8")
    quantized = tq.quantize(exported, batch, [batch], quantizer=quantizer, algorithms=(), progress=False)
    return executorch_xnnpack.lower(passes.copy_graph(quantized), batch), quantized


def assert_same(program, graph, batch):
    for wanted, actual in zip(graph(*batch), program(*batch), strict=True):
        assert (wanted.dtype, wanted.shape) == (actual.dtype, actual.shape)
        if wanted.is_floating_point():
            assert tq.sqnr_db(wanted, actual) > 30  # wrong, it is 6; a sum of the first layer may round otherwise
        else:
            assert torch.equal(wanted, actual)


def vectors(m, x):
    y = m.first(x)
    index = (y.abs() * 4).long().clamp(max=9)
    return (
        m.slope(y),
        m.slopes(y),
        m.slopes(y[:, :, None].expand(-1, -1, 3)),
        F.rrelu(y),
        y.sort(-1, descending=True).values,
        *torch.sort(y, stable=True),
        *y.round().sort(-1),
        (2 * y).round().argsort(-1, descending=True),
        (2 * y).round()[:, :, None].expand(-1, -1, 2).argsort(1),
        y.msort() if not isinstance(y.shape[0], torch.SymInt) else y,
        torch.searchsorted(m.borders, y),
        torch.searchsorted(m.borders, y, right=True, out_int32=True),
        torch.bucketize(y, m.borders),
        *(bag(index) for bag in m.bags),
        m.bags[0](index, per_sample_weights=y),
        m.pair(y, y.relu()),
    )


def vector_model():
    bags = nn.ModuleList(nn.EmbeddingBag(10, 4, mode=mode) for mode in ("sum", "mean", "max"))
    layers = {"slope": nn.PReLU(), "slopes": nn.PReLU(8, 0.1), "bags": bags, "pair": nn.Bilinear(8, 8, 3)}
    return Call(vectors, first=nn.Linear(8, 8), borders=torch.linspace(-1, 1, 6), **layers)


def images(m, x):
    y = m.first(x)
    deep = y.unflatten(1, (2, 2))
    return (
        y.max(1).values,
        y.max(2, keepdim=True).values,
        y.max(-1).values,
        F.adaptive_max_pool2d(y, (3, 2)),
        F.adaptive_max_pool2d(y, 1),
        F.adaptive_max_pool1d(y.flatten(2), 5),
        F.adaptive_avg_pool3d(deep, (1, 3, 2)),
        F.adaptive_max_pool3d(deep, (2, 3, 2)),
        F.max_pool3d(deep, (2, 3, 3), stride=2, padding=(0, 1, 1), ceil_mode=True),
        F.max_pool3d(deep, (1, 2, 2), dilation=(1, 2, 1)),
        F.avg_pool3d(deep, (2, 3, 3), stride=(1, 2, 2), padding=(1, 1, 0), count_include_pad=False),
        F.avg_pool3d(deep, 2, ceil_mode=True, padding=1),
        F.local_response_norm(y, 3),
        F.pad(y, (1, 2, 0, 3), mode="circular"),
    )


def image_model():
    return Call(images, first=nn.Conv2d(3, 4, 3, padding=1))


def sequences(m, x):
    y = m.first(x)
    start = torch.zeros(x.shape[0], 6)
    h, c = m.long(y[:, 0], (start, start))
    cells = h, c, m.gated(h, c), m.plain(h, c), m.clipped(h)
    return (*cells, *m.gru(y), *m.other(y.transpose(0, 1), m.start.expand(-1, x.shape[0], -1)))


def sequence_model():
    cells = {"long": nn.LSTMCell(8, 6), "gated": nn.GRUCell(6, 6), "plain": nn.RNNCell(6, 6)}
    cells["clipped"] = nn.RNNCell(6, 6, bias=False, nonlinearity="relu")
    grus = {"gru": nn.GRU(8, 5, 2, batch_first=True, bidirectional=True), "other": nn.GRU(8, 5, bias=False)}
    return Call(sequences, first=nn.Linear(8, 8), start=torch.randn(1, 1, 5), **cells, **grus)


MODELS = {
    "vectors": (vector_model, (8,)),
    "images": (image_model, (3, 9, 7)),
    "sequences": (sequence_model, (2, 8)),
}


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "name", ["images", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n != "images")]
)
def test_cells_pools_bags_and_orders_compute_what_the_graph_does_for_every_size(name, dynamic):
    model, shape = MODELS[name]
    program, graph = lowered(model(), (torch.randn(2, *shape),), dynamic=dynamic)
    for n in (1, 2, MOST) if dynamic else (2,):
        assert_same(program, graph, (torch.randn(n, *shape),))


@pytest.mark.filterwarnings("default::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize("name", ["ours", "executorch"])
def test_a_mean_over_images_is_right_in_a_call_that_is_larger_than_those_before(name):
    theirs = xnnpack_quantizer.XNNPACKQuantizer().set_global(xnnpack_quantizer.get_symmetric_quantization_config(True))
    quantizer = XnnpackQuantizer("static_int8") if name == "ours" else theirs
    model = Call(lambda m, x: (m.last(F.adaptive_avg_pool2d(m.first(x), 1)),), first=conv(3, 8), last=conv(8, 4))
    program, graph = lowered(model, (torch.randn(2, 3, 6, 6),), dynamic=True, quantizer=quantizer)
    for n in (2, 1, 4, MOST):
        assert_same(program, graph, (torch.randn(n, 3, 6, 6),))


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def test_a_prelu_keeps_nan_and_infinity():
    model = Call(lambda m, x: (m.slope(m.mix(x)), m.slope(x)), mix=nn.Linear(4, 4), slope=nn.PReLU(4))
    program, graph = lowered(model, (torch.randn(2, 4),))
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), -2.0], [0.0, 1.0, -1.0, 2.0]])
    assert torch.equal(program(x)[1].nan_to_num(7.0), graph(x)[1].nan_to_num(7.0))


def test_constants_that_are_views_of_one_tensor_keep_their_own_values():
    whole = torch.randn(3, 8, 8)

    def forward(m, x):
        y = m.first(x)
        return F.linear(y.sigmoid(), m.a) + F.linear(y.tanh(), m.b) + m.c, y @ m.turned

    model = Call(forward, first=nn.Linear(8, 8), a=whole[0], b=whole[1], c=whole[2, 3], turned=whole[2].t())
    model.a, model.b, model.c, model.turned = whole[0], whole[1], whole[2, 3], whole[2].t()
    quantizer = XnnpackQuantizer("static_int8", exclude=["node:linear_1", "node:linear_2"])
    program, graph = lowered(model, (torch.randn(2, 8),), quantizer=quantizer)
    assert_same(program, graph, (torch.randn(2, 8),))


@torch.library.custom_op("torchquant_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@doubled.register_fake
def _(x):
    return torch.empty_like(x)


class Last(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


REFUSED = {
    "complex numbers": (lambda y: torch.fft.rfft(y).abs(), r"fft_rfft fft_rfft \(last\) gives complex"),
    "no kernel": (
        lambda y: torch.zeros(8).scatter_reduce(0, torch.arange(8), y[0], "amax"),
        r"scatter_reduce scatter_reduce \(last\): ExecuTorch has no kernel for aten::scatter_reduce",
    ),
    "an op of somebody else": (doubled, r"doubled doubled \(last\): ExecuTorch has no kernel for torchquant_tests::"),
    "not in its programs": (
        lambda y: y.cumprod(-1),
        r"lower cumprod cumprod \(last\) \(its programs have no",
    ),
    "not in its programs, in front of a layer": (
        lambda y: F.linear(y.cummax(0).values, torch.eye(8)),
        r"lower cummax cummax \(last\) \(its programs have no",
    ),
    "a size that depends on values": (lambda y: (y > 0).nonzero(), r"nonzero nonzero \(last\): the size of its result"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_executorch_cannot_run_is_refused_by_op_and_module_with_a_way_out(kind):
    function, words = REFUSED[kind]
    model = Call(lambda m, x: (m.last(m.first(x)), x + 1), first=nn.Linear(8, 8), last=Last(function))
    with pytest.raises(tq.LoweringError, match=words) as refusal:
        lowered(model, (torch.randn(2, 8),))
    assert "another target" in str(refusal.value)
    assert "EdgeCompileConfig" not in str(refusal.value)


def test_the_first_op_with_which_a_part_fails_is_the_one_to_blame():
    model = Call(lambda m, x: (m.a(x).relu().tanh().sigmoid() + m.a(x)).exp(), a=nn.Linear(4, 4))
    graph = tq.export(model, (torch.randn(2, 4),))

    def trial(part):
        part(torch.randn(2, 4))  # each part runs
        if any("tanh" in n.name for n in part.graph.nodes):
            raise RuntimeError("no tanh\nThings to try: 1. nothing")

    error = blamed(graph, RuntimeError("no tanh\nThings to try: 1. nothing"), trial, "lower")
    assert "cannot lower tanh tanh (its error: no tanh). Write it as other ops" in str(error)


def test_an_op_whose_shape_function_looks_at_sizes_holds_for_all_of_them():
    program, graph = lowered(distances(), (torch.randn(3, 8),), dynamic=True)
    for n in (1, MOST):
        x = torch.randn(n, 8)
        assert tq.sqnr_db(graph(x), program(x)) > 40


def distances():
    return Call(lambda m, x: F.pdist(torch.cat([m.first(x), x + 1, x])), first=nn.Linear(8, 8))


def test_a_size_that_an_op_fixes_is_found_by_running_with_others(monkeypatch):
    module = "torchquant.backends.executorch_xnnpack.lowering"
    for name in ("_sizes_as_exported", "quick_passes"):
        monkeypatch.setattr(f"{module}.{name}", nullcontext)
    monkeypatch.setattr(f"{module}.decomposed_once", lambda exported, partitioner: exported)
    model = distances()
    with pytest.raises(tq.LoweringError, match=r"cannot run pdist pdist with other sizes.*fixed sizes"):
        lowered(model, (torch.randn(3, 8),), dynamic=True)


def test_an_axis_behind_several_that_vary_is_added_for_every_size():
    def forward(m, x):
        y = m.first(x)
        turned = torch.stack([y[..., ::2] - y[..., 1::2], y[..., ::2]], -1).flatten(-2)
        return m.last(turned), y[..., 0][..., None] * y

    sizes = {0: torch.export.Dim("batch", max=MOST), 1: torch.export.Dim("length", max=MOST)}
    model, x = Call(forward, first=nn.Linear(8, 8), last=nn.Linear(8, 4)).eval(), torch.randn(2, 3, 8)
    exported = tq.export(model, x, dynamic_shapes=((sizes,),))
    graph = tq.quantize(exported, x, [x], quantizer=XnnpackQuantizer(), algorithms=(), progress=False)
    program = executorch_xnnpack.lower(passes.copy_graph(graph), x)
    for shape in ((2, 3, 8), (1, MOST, 8), (MOST, 1, 8)):
        assert_same(program, graph, (torch.randn(shape),))


# control flow --------------------------------------------------------------------------------------------------------


def conditional(m, x):
    y = m.first(x)

    def positive(z):
        return m.prelu(F.hardswish(m.up(z)))

    def negative(z):
        return m.down(F.max_pool2d(z[:, None, None], (1, 2))[:, 0, 0]) - 1

    return (torch.cond(y.mean() > 0, positive, negative, (y,)) + 1,)


def conditional_model():
    layers = {"first": nn.Linear(8, 8, bias=False), "up": nn.Linear(8, 4), "down": nn.Linear(4, 4)}
    model = Call(conditional, prelu=nn.PReLU(4), **layers)
    model.first.weight.data = torch.eye(8)
    return model


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_condition_that_is_excluded_runs_the_branch_that_the_graph_runs(dynamic):
    quantizer = XnnpackQuantizer("static_int8", exclude=["op:cond"])
    program, graph = lowered(conditional_model(), (torch.randn(2, 8),), dynamic=dynamic, quantizer=quantizer)
    for n in (1, 2, MOST) if dynamic else (2,):
        for sign in (1, -1):
            assert_same(program, graph, (sign * torch.rand(n, 8),))
    assert program.proof.kernels["portable cond"] == 1


def test_a_branch_that_the_example_does_not_take_is_proven_too(monkeypatch):
    aten = torch.ops.aten
    wrong = lambda b, node: b.call(aten.mul.Scalar, node.args[0], -3.0)  # noqa: E731
    monkeypatch.setitem(portable._BRANCH_RULES, aten.hardswish.default, wrong)
    quantizer = XnnpackQuantizer("static_int8", exclude=["op:cond"])
    with pytest.raises(tq.LoweringError, match="output 0"):
        lowered(conditional_model(), (-torch.rand(2, 8),), quantizer=quantizer)


@pytest.mark.filterwarnings("default::torchquant.errors.TorchquantWarning")
def test_a_condition_that_is_not_excluded_is_refused_by_name():
    with pytest.raises(tq.LoweringError, match=r"cond cond .*Exclude"):
        lowered(conditional_model(), (torch.randn(2, 8),))


@pytest.mark.filterwarnings("default::torchquant.errors.TorchquantWarning")
def test_a_loop_is_refused_by_name():
    from torch._higher_order_ops.while_loop import while_loop

    def forward(m, x):
        return while_loop(lambda i, z: i < 3, lambda i, z: (i + 1, z * 0.5), (torch.tensor(0), m.first(x)))[1]

    with pytest.raises(tq.LoweringError, match=r"while_loop while_loop.*cond, map_impl, scan only\. Unroll it"):
        lowered(Call(forward, first=nn.Linear(8, 8)), (torch.randn(2, 8),))
