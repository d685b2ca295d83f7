"""calibrate: what it refuses, what it warns of, and that one pass serves several graphs."""

import nets
import pytest
import torch
from foreign import SpecQuantizer, per_channel, per_tensor
from nets import Call
from torch import nn
from torchao.quantization.pt2e.observer import HistogramObserver
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import torchquant as tq
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer


@pytest.fixture
def batch():
    return torch.randn(4, 8)


@pytest.fixture
def prepared(batch):
    return tq.prepare(tq.export(nets.mlp(), batch), X86Quantizer())


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.randn(4, 9), r"batch 1.*shape \(4, 8\).*\(4, 9\)"),
        (torch.randn(5, 8), r"batch 1.*dynamic_shapes"),
        (torch.randn(4, 8).double(), r"batch 1.*float32.*float64"),
        ((torch.randn(4, 8), torch.randn(4, 8)), r"batch 1 has 2 arguments, the model takes 1"),
        ([], r"batch 1 has no 'x'|batch 1 has no 'input'"),
        ("text", r"a batch is a tensor"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_with_its_number_and_both_shapes(prepared, batch, bad, words):
    with pytest.raises(tq.InputError, match=words):
        tq.calibrate(prepared, [batch, bad], progress=False)


def test_one_tensor_is_no_iterable_of_batches(prepared, batch):
    with pytest.raises(tq.InputError, match=r"\[batch\]"):
        tq.calibrate(prepared, batch)


def test_no_batch_at_all_is_an_error(prepared):
    with pytest.raises(tq.CalibrationError, match="no calibration batch"):
        tq.calibrate(prepared, [], progress=False)


def test_a_used_up_generator_is_an_error(prepared, batch):
    batches = (batch for _ in range(2))
    tq.calibrate(prepared, batches, progress=False)
    with pytest.raises(tq.CalibrationError, match="used up"):
        tq.calibrate(prepared, batches, progress=False)


@pytest.mark.parametrize(
    ("value", "message"),
    [("nan", "batch 1 holds NaN"), ("inf", "input_1.* holds infinity"), ("-inf", "input_1.* holds infinity")],
)
def test_data_that_is_not_finite_is_refused_with_its_batch_or_site(prepared, batch, value, message):
    bad = batch.clone()
    bad[1, 2] = float(value)
    with pytest.raises(tq.CalibrationError, match=message):
        tq.calibrate(prepared, [batch, bad], progress=False)


def test_a_mask_of_minus_infinity_is_no_bad_data():
    model = nets.Call(
        lambda m, x, mask: m.head((m.scores(x) + mask).softmax(-1)),
        scores=torch.nn.Linear(8, 8),
        head=torch.nn.Linear(8, 3),
    )
    x, mask = torch.randn(8, 8), torch.full((8, 8), -torch.inf).triu(1)
    tq.calibrate(tq.prepare(tq.export(model, (x, mask)), X86Quantizer()), [(x, mask)], progress=False)


@pytest.mark.parametrize("make", [X86Quantizer, lambda: SpecQuantizer({"linear"}, per_tensor(), per_channel())])
def test_nan_that_the_network_makes_names_the_site(make, batch):
    model = nets.Call(lambda m, x: m.late(m.early(x).log()), early=torch.nn.Linear(8, 8), late=torch.nn.Linear(8, 8))
    prepared = tq.prepare(tq.export(model, batch), make())
    with pytest.raises(tq.CalibrationError, match=r"log.*NaN"):
        tq.calibrate(prepared, [batch], progress=False)


def test_a_site_that_never_saw_data_is_named(batch):
    model = nets.Call(lambda m, x: (m.all(x), m.none(x[:0])), all=torch.nn.Linear(8, 8), none=torch.nn.Linear(8, 8))
    prepared = tq.prepare(tq.export(model, batch), X86Quantizer())
    with pytest.raises(tq.CalibrationError, match=r"never saw data.*linear_1"):
        tq.calibrate(prepared, [batch], progress=False)


def test_a_graph_without_observers_is_refused(batch):
    with pytest.raises(tq.CalibrationError, match="no observers"):
        tq.calibrate(tq.export(nets.mlp(), batch), [batch])


def test_several_graphs_in_one_call_equal_separate_calls(batch):
    exported = tq.export(nets.mlp(), batch)
    makers = [X86Quantizer, lambda: XnnpackQuantizer("static_int8")]
    batches = [torch.randn(4, 8) for _ in range(3)]
    together = [tq.prepare(exported, make()) for make in makers]
    tq.calibrate(together, (b for b in batches), progress=False)
    for graph, make in zip(together, makers, strict=True):
        alone = tq.prepare(exported, make())
        for b in batches:
            alone(b)
        assert torch.equal(tq.convert(graph)(batch), tq.convert(alone)(batch))


def test_foreign_observers_are_calibrated_by_the_same_call(batch):
    spec = per_tensor(torch.uint8, 0, 255, observer=HistogramObserver)
    exported = tq.export(nets.mlp(), batch)
    prepared = tq.prepare(exported, SpecQuantizer({"linear"}, spec, per_channel()))
    tq.calibrate(prepared, [batch], progress=False)
    quantized = tq.convert(prepared)
    assert tq.report(quantized).coverage == "2/2"
    assert tq.sqnr_db(exported(batch), quantized(batch)) > 30


def test_keyword_batches_may_come_in_any_order():
    a, b = torch.randn(2, 4), 100 * torch.randn(2, 4)
    exported = tq.export(nets.Difference(), {"a": a, "b": b})
    results = []
    for batch in ({"a": a, "b": b}, {"b": b, "a": a}):
        prepared = tq.prepare(exported, X86Quantizer())
        tq.calibrate(prepared, [batch], progress=False)
        results.append(tq.convert(prepared)(a=a, b=b))
    assert torch.equal(*results)


def test_a_foreign_quantizer_that_misses_ops_is_warned_about_and_reported():
    image = torch.randn(2, 3, 8, 8)
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(nets.ManyWays().eval(), (image,)).module(), quantizer)
    with pytest.warns(tq.TorchquantWarning, match=r"left \d compute ops float without saying so.*subclass"):
        tq.calibrate(prepared, [image], progress=False)
    sites = {s.module: s.status for s in tq.report(prepared).sites if s.compute}
    assert sites["module"] == "quantized"
    assert sites["subclass"] == sites["own"] == "missed"


def test_an_observer_on_bools_is_refused_by_name():
    model = Call(lambda m, x: m.linear(x) * (x > 0), linear=nn.Linear(4, 4)).eval()
    quantizer = SpecQuantizer(("linear", "mul"), per_tensor(), per_channel())
    prepared = tq.prepare(tq.export(model, torch.randn(2, 4)), quantizer)
    with pytest.raises(tq.CalibrationError, match=r"gt.*holds bool values.*exclude"):
        tq.calibrate(prepared, [torch.randn(2, 4)], progress=False)


def test_a_model_that_fails_on_a_batch_is_an_error_that_says_so():
    model, index = nets.Call(lambda m, x, i: m.inner(x)[i], inner=nn.Linear(8, 4)), torch.tensor([5])
    prepared = tq.prepare(tq.export(model, (torch.randn(6, 8), index)), X86Quantizer())
    with pytest.raises(tq.CalibrationError, match="fails on step 1 of a batch of steps: IndexError: index 9"):
        tq.calibrate(prepared, [tq.Steps([(torch.randn(6, 8), index), (torch.randn(6, 8), index + 4)])], progress=False)
