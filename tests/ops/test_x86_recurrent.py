"""LSTM, GRU and RNN with weights of few bits: kernels against torch on every instruction set, programs, refusals."""

import pytest
import torch
from nets import Call
from torch import nn

import torchquant as tq
from torchquant.backends import inductor_x86
from torchquant.fx.sites import read_sites
from torchquant.ops.x86 import native, rows
from torchquant.quantizers.x86 import X86Quantizer

KINDS = {"lstm": (nn.LSTM, {}), "gru": (nn.GRU, {}), "tanh": (nn.RNN, {}), "relu": (nn.RNN, {"nonlinearity": "relu"})}
GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}


@pytest.fixture(autouse=True, scope="module")
def _library():
    native.load()


def rounded(weight):
    """A weight of 8 bits a code: its grid, and its values."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round()
    return rows.Grid(codes.to(torch.int8), scale, torch.zeros_like(scale, dtype=torch.int64), 8, -128), codes * scale


def one_direction(kind, n, samples, steps, reverse, batch_first):
    """What the kernel and torch make of one layer whose input is the gates' part itself."""
    torch.manual_seed(n)
    width = GATES[kind] * n
    cls, options = KINDS[kind]
    layer = cls(width, n, batch_first=batch_first, **options).eval()
    grid, value = rounded(torch.randn(width, n) / n**0.5)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(width))
        layer.weight_hh_l0.copy_(value)
        layer.bias_ih_l0.zero_()
    given = torch.randn(samples, steps, width) if batch_first else torch.randn(steps, samples, width)
    h, c = torch.randn(samples, n), torch.randn(samples, n)
    packed = rows.pack(grid, layer.bias_hh_l0.detach())
    cell = c if kind == "lstm" else None
    found = native.ops().x86_recurrent(packed, given, h, cell, list(KINDS).index(kind), batch_first, reverse)
    time = 1 if batch_first else 0
    with torch.no_grad():
        states, last = layer(given.flip(time) if reverse else given, (h[None], c[None]) if kind == "lstm" else h[None])
    return found, [states.flip(time) if reverse else states, *([last[1][0]] if kind == "lstm" else [])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "samples", "steps"), [(64, 1, 9), (37, 3, 5), (130, 5, 4), (1, 2, 3)])
def test_a_layer_is_torchs_own_with_these_weights(kind, n, samples, steps, instructions):
    for reverse, batch_first in ((False, False), (True, True)):
        found, expected = one_direction(kind, n, samples, steps, reverse, batch_first)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape
            assert tq.sqnr_db(b, a) > 70


def test_no_steps_and_no_samples_are_none(instructions):
    packed = rows.pack(rounded(torch.randn(16, 4))[0])
    for steps, samples in ((0, 2), (3, 0)):
        cell = torch.randn(samples, 4)
        states, last = native.ops().x86_recurrent(packed, torch.zeros(steps, samples, 16), cell, cell, 0, False, False)
        assert states.shape == (steps, samples, 4)
        assert torch.equal(last, cell)


def test_a_sample_that_is_not_finite_leaves_the_others_alone(instructions):
    packed = rows.pack(rounded(torch.randn(12, 4))[0])
    given, h = torch.randn(5, 3, 12), torch.randn(3, 4)
    [clean] = native.ops().x86_recurrent(packed, given, h, None, 1, False, False)
    given[2, 1, 3] = torch.nan
    [states] = native.ops().x86_recurrent(packed, given, h, None, 1, False, False)
    assert torch.equal(states[:, [0, 2]], clean[:, [0, 2]])
    assert torch.equal(states[:2], clean[:2])
    assert states[3:, 1].isnan().all()


BAD = {
    "gates": lambda p, g, h: (p, g[..., :-1], h, h, 0, False, False),
    "states": lambda p, g, h: (p, g, h[:, :-1], h, 0, False, False),
    "samples": lambda p, g, h: (p, g, h, h[:1], 0, False, False),
    "kind": lambda p, g, h: (p, g, h, h, 7, False, False),
    "no cell": lambda p, g, h: (p, g, h, None, 0, False, False),
    "a cell too many": lambda p, g, h: (p, g, h, h, 1, False, False),
    "dtype": lambda p, g, h: (p, g.double(), h, h, 0, False, False),
    "weight": lambda p, g, h: (p[:-64], g, h, h, 0, False, False),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_that_do_not_fit_are_refused(name):
    packed = rows.pack(rounded(torch.randn(16, 4))[0])
    with pytest.raises(RuntimeError, match="torchquant:"):
        native.ops().x86_recurrent(*BAD[name](packed, torch.randn(3, 2, 16), torch.randn(2, 4)))


# programs ------------------------------------------------------------------------------------------------------------


def tagger(layer):
    """All that a recurrent layer returns."""

    def forward(m, x, *begin):
        states, last = m.layer(x, *((begin if len(begin) > 1 else begin[0],) if begin else ()))
        return states, *(last if isinstance(last, tuple) else (last,))

    return Call(forward, layer=layer)


def quantized(model, inputs, scheme=None, dynamic_shapes=None, **options):
    quantizer = X86Quantizer(scheme, **options)
    return tq.quantize(
        model, inputs, [inputs], quantizer=quantizer, algorithms=(), dynamic_shapes=dynamic_shapes, progress=False
    )


LAYERS = {
    "two layers, both directions": (nn.LSTM(20, 24, 2, bidirectional=True, batch_first=True), ((2, 9, 20),)),
    "states given, no bias": (nn.LSTM(20, 33, bias=False), ((6, 3, 20), (1, 3, 33), (1, 3, 33))),
    "one sample without a batch": (nn.GRU(20, 16), ((6, 20),)),
    "gru, state given": (nn.GRU(12, 16, 2, bidirectional=True), ((5, 2, 12), (4, 2, 16))),
    "relu": (nn.RNN(12, 16, nonlinearity="relu", dropout=0.5, num_layers=2), ((5, 1, 12),)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_product_of_a_recurrent_layer_is_ours(name):
    torch.manual_seed(0)
    layer, shapes = LAYERS[name]
    inputs = tuple(torch.randn(s) for s in shapes)
    model = tagger(layer.eval())
    converted = quantized(model, inputs)
    [site] = [s for s in read_sites(converted) if s.compute]
    assert (site.op, site.status) == ("recurrent", "quantized")
    assert site.weight.describe() == "int8[-127,127] per channel 0"
    program = inductor_x86.lower(converted, inputs)
    assert program.proof.kernels == {"torchquant_recurrent_w8a16": 1}
    for wanted, graph, ours in zip(model(*inputs), converted(*inputs), program(*inputs), strict=True):
        assert tq.sqnr_db(graph, ours) > 70
        assert tq.sqnr_db(wanted, ours) > 30


def test_the_batch_stays_dynamic_and_a_saved_program_is_the_same(tmp_path):
    torch.manual_seed(0)
    sizes = {0: torch.export.Dim("batch", max=64)}  # torch itself fixes the length
    model = Call(
        lambda m, x: m.head(m.layer(x)[0][:, -1]), layer=nn.LSTM(12, 20, batch_first=True), head=nn.Linear(20, 3)
    )
    x = torch.randn(4, 7, 12)
    program = inductor_x86.lower(quantized(model, (x,), dynamic_shapes={"args": (sizes,)}), (x,))
    assert program.proof.fused == 2
    loaded = inductor_x86.load(program.save(tmp_path / "tagger.pt2"))
    for samples in (1, 2, 33):
        y = torch.randn(samples, 7, 12)
        assert torch.equal(program(y), loaded(y))
        assert tq.sqnr_db(model(y), program(y)) > 25


@pytest.mark.parametrize(("scheme", "kernel"), [("dynamic_int8", "w8a16"), ("w4_g32", "w4a16"), ("w4a8_g32", "w4a16")])
def test_other_schemes_take_the_weights_bits(scheme, kernel):
    x = torch.randn(5, 2, 32)
    converted = quantized(tagger(nn.GRU(32, 64).eval()), (x,), scheme)
    program = inductor_x86.lower(converted, (x,))
    assert program.proof.kernels == {f"torchquant_recurrent_{kernel}": 1}
    assert tq.sqnr_db(converted(x)[0], program(x)[0]) > 70


LEFT = {
    "projections": (nn.LSTM(32, 32, proj_size=16), None, "proj_size"),
    "no whole groups": (nn.LSTM(40, 32), "w4_g32", "[32, 40] inputs are no whole groups of 32"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_has_no_kernel_stays_float_and_says_why(name):
    layer, scheme, words = LEFT[name]
    x = torch.randn(3, 2, layer.input_size)
    prepared = tq.prepare(tq.export(tagger(layer.eval()), (x,)), X86Quantizer(scheme))
    [site] = [s for s in read_sites(prepared) if s.compute]
    assert site.status == "unsupported"
    assert words in site.reason


def test_without_our_kernels_a_recurrent_layer_is_refused_by_name():
    x = torch.randn(3, 2, 8)
    converted = quantized(tagger(nn.LSTM(8, 8).eval()), (x,))
    with pytest.raises(tq.LoweringError, match=r"recurrent lstm \(layer\).*own kernels alone"):
        inductor_x86.lower(converted, (x,), own_kernels=False)
    program = inductor_x86.lower(converted, (x,), allow_float=["op:recurrent"])
    assert tq.sqnr_db(converted(x)[0], program(x)[0]) > 60


def test_an_excluded_layer_stays_float_beside_one_that_is_not():
    x = torch.randn(2, 5, 8)
    model = Call(lambda m, x: m.b(m.a(x)[0])[0], a=nn.LSTM(8, 8, batch_first=True), b=nn.GRU(8, 8, batch_first=True))
    converted = quantized(model.eval(), (x,), exclude=["a"])
    program = inductor_x86.lower(converted, (x,))
    assert program.proof.kernels["torchquant_recurrent_w8a16"] == 1
    assert tq.sqnr_db(converted(x), program(x)) > 70


@pytest.mark.parametrize(
    "algorithm",
    [tq.AdaRound(iterations=20), tq.GPTQ(), tq.BiasCorrection(), tq.CrossLayerEqualization(), tq.SmoothQuant()],
)
def test_algorithms_leave_recurrent_layers_as_they_are(algorithm):
    torch.manual_seed(0)
    model = Call(lambda m, x: m.head(m.layer(x)[0]), layer=nn.LSTM(8, 12, batch_first=True), head=nn.Linear(12, 8))
    batches = [(torch.randn(4, 6, 8),) for _ in range(3)]
    prepared = tq.prepare(tq.export(model.eval(), batches[0]), X86Quantizer())
    tq.calibrate(prepared, batches, progress=False)
    plain = tq.convert(tq.prepare(tq.export(model, batches[0]), X86Quantizer("dynamic_int8")))
    tq.optimize(prepared, batches, [algorithm], progress=False)
    converted = tq.convert(prepared)
    states = [s for s in converted.state_dict().values() if s.dtype == torch.int8 and s.dim() == 2 and len(s) == 48]
    assert len(states) == 2
    assert all(any(torch.equal(s, p) for p in plain.state_dict().values() if p.shape == s.shape) for s in states)


def test_an_analysis_sees_what_rounding_the_weights_costs():
    torch.manual_seed(0)
    model = Call(lambda m, x: m.head(m.layer(x)[0]), layer=nn.LSTM(8, 12, batch_first=True), head=nn.Linear(12, 8))
    batches = [(torch.randn(4, 6, 8),) for _ in range(2)]
    prepared = tq.prepare(tq.export(model.eval(), batches[0]), X86Quantizer(exclude=["op:linear"]))
    tq.calibrate(prepared, batches, progress=False)
    analysis = tq.analyze(prepared, batches)
    [site] = [s for s in analysis.sites if s.site.op == "recurrent"]
    assert 30 < site.weight_db == site.alone_db < 70
    assert site.activations_db == float("inf")
    assert abs(site.cumulative_db - site.weight_db) < 0.01
