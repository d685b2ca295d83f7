"""XnnpackQuantizer: int8 from op to op, shared qparams, and dynamic for transformers."""

import nets
import pytest
import torch
import torch.nn.functional as F
from nets import Call
from torch import nn
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

import torchquant as tq
from torchquant.fx import ops
from torchquant.quantizers.xnnpack import XnnpackQuantizer


def test_a_mobilenet_block_is_int8_from_the_first_conv_to_the_classifier():
    image = torch.randn(1, 3, 16, 16)
    quantized = tq.quantize(
        nets.Mobile().eval(), image, [image], quantizer=XnnpackQuantizer(), algorithms=(), progress=False
    )
    sites = tq.report(quantized).sites
    assert {s.op for s in sites if s.status == "quantized"} >= {
        "conv2d",
        "add",
        "hardtanh",
        "adaptive_avg_pool2d",
        "linear",
    }
    assert tq.report(quantized).coverage == "5/5"


def test_a_clamp_is_observed_behind_and_not_before_it():
    image = torch.randn(1, 3, 8, 8)
    prepared = tq.prepare(tq.export(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6()), image), XnnpackQuantizer())
    conv, clamp = (
        n for n in prepared.graph.nodes if n.op == "call_function" and ops.op_name(n) in ("conv2d", "hardtanh")
    )
    assert list(conv.users) == [clamp]
    assert [u.op for u in clamp.users] == ["call_module"]


@pytest.mark.parametrize("op", ["cat", "max_pool2d", "pad", "slice", "reshape"])
def test_what_moves_data_keeps_its_inputs_qparams(op):
    moves = {
        "cat": lambda m, a, b: torch.cat([a, b], 1),
        "max_pool2d": lambda m, a, b: F.max_pool2d(a, 2),
        "pad": lambda m, a, b: m.after(F.pad(a, (1, 1))),
        "slice": lambda m, a, b: a[:, :, 1:3],
        "reshape": lambda m, a, b: a.permute(0, 1, 3, 2),
    }
    layers = {name: nn.Conv2d(i, 4, 1) for name, i in (("left", 3), ("right", 3), ("after", 4))}
    with torch.no_grad():
        layers["right"].weight.mul_(100)
    model = Call(lambda m, x: moves[op](m, m.left(x), m.right(x)), **layers)
    image = torch.randn(1, 3, 8, 8)
    quantized = tq.quantize(
        model, image, [image], quantizer=XnnpackQuantizer("static_int8"), algorithms=(), progress=False
    )
    node = next(n for n in quantized.graph.nodes if n.op == "call_function" and ops.op_name(n) == op)
    before = [n.args[1:3] for n in node.all_input_nodes if ops.is_dequantize(n)]
    behind = [u.args[1:3] for u in node.users if ops.is_quantize(u)]
    assert before
    assert behind
    assert len({*before, *behind}) == 1


def test_auto_is_dynamic_without_convolutions_and_static_for_a_cnn():
    def dynamic(model, x):
        sites = tq.report(tq.prepare(tq.export(model, x), XnnpackQuantizer())).sites
        return {s.activation.dynamic for s in sites if s.op in ("linear", "conv2d")}

    assert dynamic(nets.Block(), torch.randn(1, 8, 32)) == {True}
    assert dynamic(nets.cnn(), torch.randn(1, 3, 8, 8)) == {False}
    assert dynamic(nets.mlp(), torch.randn(2, 8)) == {True}


def test_static_runs_a_linear_that_joins_a_float_residual_sum_dynamically_and_says_so():
    x = torch.randn(1, 8, 32)
    prepared = tq.prepare(tq.export(nets.Block(), x), XnnpackQuantizer("static_int8"))
    sites = {s.module: s for s in tq.report(prepared).sites if s.op == "linear"}
    assert {m for m, s in sites.items() if s.activation.dynamic} == {"out", "down"}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Call(lambda m, x: torch.add(m.inner(x), m.inner(x), alpha=2), inner=nn.Conv2d(3, 4, 1)), "alpha = 1"),
        (Call(lambda m, x: F.max_pool2d(m.inner(x), 2, 3), inner=nn.Conv2d(3, 4, 1)), "no stride over its window"),
        (Call(lambda m, x: F.relu(m.inner(x) + 2.0), inner=nn.Conv2d(3, 4, 1)), "operand is a number"),
        (Call(lambda m, x: F.adaptive_avg_pool2d(m.inner(x), 2), inner=nn.Conv2d(3, 4, 1)), "1 x 1"),
        (Call(lambda m, x: m.inner(x).mean((1, 2)), inner=nn.Conv2d(3, 4, 1)), "only the last two axes"),
        (Call(lambda m, x: F.pad(m.inner(x), (1, 1), value=2.0), inner=nn.Conv2d(3, 4, 1)), "with zeros"),
        (Call(lambda m, x: F.pad(m.inner(x), (1, 1)), inner=nn.Conv2d(3, 4, 1)), "in front of a convolution"),
        (Call(lambda m, x: m.inner(x), inner=nn.ConvTranspose2d(3, 6, 2, groups=3)), "grouped transposed"),
        (Call(lambda m, x: F.softmax(m.inner(x), -1), inner=nn.Conv2d(3, 4, 1)), "in float"),
    ],
)
def test_what_the_delegate_cannot_do_in_int8_stays_float_with_the_reason(model, words):
    prepared = tq.prepare(tq.export(model, torch.randn(1, 3, 8, 8)), XnnpackQuantizer("static_int8"))
    assert [s for s in tq.report(prepared).sites if s.status == "unsupported" and words in s.reason]


def test_two_linears_that_are_added_stay_static_like_two_convolutions():
    model = Call(lambda m, x: m.c(F.relu(m.a(x) + m.b(x))), a=nn.Linear(8, 16), b=nn.Linear(8, 16), c=nn.Linear(16, 4))
    sites = tq.report(tq.prepare(tq.export(model, torch.randn(4, 8)), XnnpackQuantizer("static_int8"))).sites
    assert {s.status for s in sites} == {"quantized"}
    assert not any(s.activation is not None and s.activation.dynamic for s in sites)


def test_a_linear_added_to_a_float_tensor_stays_dynamic_beside_a_sum_of_two():
    model = Call(lambda m, x: x + m.c(F.relu(m.a(x) + m.b(x))), **{k: nn.Linear(8, 8) for k in "abc"})
    sites = {
        s.module: s
        for s in tq.report(tq.prepare(tq.export(model, torch.randn(4, 8)), XnnpackQuantizer("static_int8"))).sites
    }
    assert sites["c"].activation.dynamic
    assert not sites["a"].activation.dynamic


def test_what_another_quantizer_annotated_before_survives_the_second_pass():
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    model = Call(lambda m, x: x + m.a(m.b(x)), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    graph = tq.export(model, torch.randn(4, 8))
    first = next(n for n in graph.graph.nodes if ops.op_name(n) == "linear")
    first.meta[Q_ANNOTATION_KEY] = theirs = QuantizationAnnotation({}, None, _annotated=True)
    XnnpackQuantizer("static_int8").annotate(graph)
    assert first.meta[Q_ANNOTATION_KEY] is theirs


def up2d(**options):
    return nn.ConvTranspose2d(8, 4, 2, 2, **options)


TRAINED = {
    "transposed": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), up2d(), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        (2, 3, 8, 8),
    ),
    "transposed, BatchNorm, no bias": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), up2d(bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        (2, 3, 8, 8),
    ),
    "transposed in groups": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), up2d(groups=2), nn.Conv2d(4, 2, 1)),
        (2, 3, 8, 8),
    ),
    "transposed 1-D": (
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.ConvTranspose1d(8, 4, 2, 2)),
        (2, 3, 8),
    ),
    "linear with BatchNorm": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)),
        (4, 8),
    ),
    "closed by its data": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)),
        (2, 3, 8, 8),
    ),
}


def trained(model, x, scheme):
    """Prepared for training, trained for three steps, in eval mode."""
    exported = torch.export.export(model.train(), (x,)).module()
    prepared = prepare_qat_pt2e(exported, XnnpackQuantizer(scheme, is_qat=True))
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()
    move_exported_model_to_eval(prepared)
    return prepared


DYNAMIC = ("transposed", "transposed, BatchNorm, no bias", "linear with BatchNorm")  # a 1-D one has no dynamic kernel


QUICK = ("linear with BatchNorm",)
CASES = [*((n, "static_int8") for n in TRAINED), *((n, "dynamic_int8") for n in DYNAMIC)]


@pytest.mark.parametrize(
    ("name", "scheme"),
    [pytest.param(n, s, marks=() if n in QUICK and s == "static_int8" else pytest.mark.slow) for n, s in CASES],
)
def test_a_network_is_trained_converted_and_lowered(name, scheme):
    executorch_xnnpack = pytest.importorskip("torchquant.backends.executorch_xnnpack")
    torch.manual_seed(0)
    build, shape = TRAINED[name]
    x = torch.zeros(shape) if name.startswith("closed") else torch.randn(shape)
    prepared = trained(build(), x, scheme)
    with torch.no_grad():
        fake = prepared(x)
        quantized = convert_pt2e(prepared)
        assert tq.sqnr_db(fake, quantized(x)) > 25
    program = executorch_xnnpack.lower(quantized, x)
    assert program.proof.kernels["delegate calls"] == 1
    assert not program.state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_dtype_is_told_so_when_it_is_prepared(dtype):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).to(dtype), torch.randn(1, 3, 8, 8, dtype=dtype)
    with pytest.warns(tq.TorchquantWarning, match=rf"annotated nothing.*{str(dtype)[6:]}.*float32.*model\.float\(\)"):
        prepared = tq.prepare(tq.export(model, x), XnnpackQuantizer())
    assert all("float32" in s.reason for s in tq.report(prepared).sites if s.compute)


def test_an_op_outside_the_table_has_a_reason():
    prepared = tq.prepare(
        tq.export(Call(lambda m, x: m.inner(x).erf(), inner=nn.Conv2d(3, 4, 1)), torch.randn(1, 3, 8, 8)),
        XnnpackQuantizer(),
    )
    (site,) = (s for s in tq.report(prepared).sites if s.op == "erf")
    assert site.reason == "executorch_xnnpack has no quantized kernel for erf, so it runs in float"
