"""The engine: what is annotated, excluded and overridden, on aten ops and for any way of calling prepare."""

import nets
import pytest
import torch
import torch.nn.functional as F
from foreign import SpecQuantizer, dynamic, per_channel, per_tensor
from nets import Call
from torch import nn
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import ComposableQuantizer

import torchquant as tq
from torchquant.errors import SchemeError
from torchquant.fx import passes
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer

OURS = [X86Quantizer, lambda **k: XnnpackQuantizer("static_int8", **k)]


def statuses(graph, op="linear"):
    return {s.node: s.status for s in tq.report(graph).sites if s.op == op}


@pytest.mark.parametrize("make", OURS)
def test_classes_subclasses_functions_and_products_are_all_quantized(make):
    image = torch.randn(2, 3, 8, 8)
    exported = torch.export.export(nets.ManyWays().eval(), (image,)).module()
    prepared = prepare_pt2e(passes.copy_graph(exported), make())
    tq.calibrate(prepared, [image], progress=False)
    quantized = convert_pt2e(prepared)
    assert tq.report(quantized).coverage == "8/8"
    assert tq.sqnr_db(exported(image), quantized(image)) > 25


@pytest.mark.parametrize("route", ["torchao", "tq.export"])
@pytest.mark.parametrize("make", OURS)
def test_a_forward_under_no_grad_is_quantized_fully_with_batch_norm_folded(make, route):
    image, model = torch.randn(2, 3, 8, 8), nets.NoGrad().eval()
    if route == "torchao":
        prepared = prepare_pt2e(torch.export.export(model, (image,)).module(), make())
    else:
        prepared = tq.prepare(tq.export(model, image), make())
    prepared(image)
    quantized = convert_pt2e(prepared)
    assert tq.report(quantized).coverage == "3/3"
    assert not [s for s in tq.report(quantized).sites if s.op == "batch_norm"]
    assert tq.sqnr_db(model(image), quantized(image)) > 25


@pytest.mark.parametrize("make", OURS)
def test_module_op_and_node_patterns_exclude(make):
    x = torch.randn(4, 8)
    exported = tq.export(nets.mlp(), x)
    cases = {
        "0": {"linear": "excluded", "linear_1": "quantized"},
        "node:linear_1": {"linear": "quantized", "linear_1": "excluded"},
        "op:lin*": {"linear": "excluded", "linear_1": "excluded"},
    }
    for pattern, expected in cases.items():
        graph = tq.prepare(exported, make(exclude=[pattern]))
        assert statuses(graph) == expected, pattern
        excluded = [s for s in tq.report(graph).sites if s.status == "excluded"]
        assert all("user" in s.reason and s.weight is None for s in excluded)


def test_an_exclusion_survives_convert():
    x = torch.randn(4, 8)
    quantized = tq.quantize(nets.mlp(), x, [x], quantizer=X86Quantizer(exclude=["0"]), algorithms=(), progress=False)
    assert statuses(quantized) == {"linear": "excluded", "linear_1": "quantized"}


def test_later_overrides_win():
    x = torch.randn(4, 8)
    exported = tq.export(nets.mlp(), x)

    def schemes(overrides):
        prepared = tq.prepare(exported, X86Quantizer(overrides=overrides))
        sites = [s for s in tq.report(prepared).sites if s.op == "linear"]
        return [s.activation.dynamic if s.activation else None for s in sites]

    assert schemes({"op:linear": "dynamic_int8"}) == [True, True]
    assert schemes({"op:linear": "dynamic_int8", "2": "static_int8"}) == [True, False]
    assert schemes({"op:linear": None, "2": "dynamic_int8"}) == [None, True]
    assert schemes({"2": "dynamic_int8", "op:linear": None}) == [None, None]


@pytest.mark.parametrize("make", OURS)
def test_a_pattern_that_matches_nothing_raises_and_names_near_names(make):
    exported = tq.export(nets.mlp(), torch.randn(4, 8))
    for options in ({"exclude": ["op:linaer"]}, {"overrides": {"op:linaer": "static_int8"}}):
        with pytest.raises(tq.PatternError, match=r"op:linaer.*Nearest names:.*linear"):
            tq.prepare(exported, make(**options))


def test_a_single_string_as_exclude_is_refused():
    with pytest.raises(SchemeError, match=r"exclude=\['op:linear'\]"):
        X86Quantizer(exclude="op:linear")


@pytest.mark.parametrize("options", [{"scheme": "int3"}, {"overrides": {"0": "int3"}}])
def test_an_unknown_scheme_names_the_known_ones(options):
    with pytest.raises(SchemeError, match=r"int3.*static_int8, dynamic_int8"):
        X86Quantizer(**options)


def test_an_excluded_op_is_not_fused_into_the_one_before_it():
    image = torch.randn(1, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    prepared = tq.prepare(tq.export(model, image), XnnpackQuantizer("static_int8", exclude=["op:relu"]))
    assert statuses(prepared, "relu") == {"relu": "excluded"}


@pytest.mark.parametrize("ours_first", [True, False])
def test_composed_with_another_quantizer_nothing_is_overwritten(ours_first):
    x = torch.randn(4, 8)
    ours = X86Quantizer(exclude=["0"])
    theirs = SpecQuantizer({"linear"}, dynamic(), per_channel(low=-7, high=7))
    theirs.annotate = _only_first(theirs.annotate)
    both = ComposableQuantizer([ours, theirs] if ours_first else [theirs, X86Quantizer()])
    prepared = prepare_pt2e(tq.export(nets.mlp(), x), both)
    tq.calibrate(prepared, [x], progress=False)
    first, second = (s for s in tq.report(convert_pt2e(prepared)).sites if s.op == "linear")
    assert (first.weight.quant_max, first.activation.dynamic) == (7, True)
    assert (second.weight.quant_max, second.activation.dtype) == (127, torch.uint8)


def _only_first(annotate):
    """Take the annotations off every linear but the first again."""

    def limited(model):
        key = "quantization_annotation"
        linears = [n for n in model.graph.nodes if n.target is torch.ops.aten.linear.default]
        kept = {n: n.meta.get(key) for n in linears[1:]}
        annotate(model)
        for node, annotation in kept.items():
            del node.meta["quantization_annotation"]
            if annotation is not None:
                node.meta[key] = annotation
        return model

    return limited


@pytest.mark.parametrize("make", [X86Quantizer, pytest.param(OURS[1], marks=pytest.mark.slow)])  # see test_xnnpack.py
def test_quantization_aware_training_steps_and_converts(make):
    image = torch.randn(4, 3, 8, 8)
    model = nets.cnn().train()
    prepared = prepare_qat_pt2e(torch.export.export(model, (image,)).module(), make(is_qat=True))
    optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.mse_loss(prepared(image), torch.ones(4, 5))
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    move_exported_model_to_eval(prepared)
    trained = prepared(image)
    quantized = convert_pt2e(prepared)
    assert tq.report(quantized).coverage == "2/2"
    assert tq.sqnr_db(trained, quantized(image)) > 25


@pytest.mark.parametrize("make", OURS)
@pytest.mark.parametrize("convert", [tq.convert, convert_pt2e])
def test_convert_before_calibration_is_refused_by_name(make, convert):
    prepared = prepare_pt2e(tq.export(nets.mlp(), torch.randn(4, 8)), make())
    with pytest.raises(tq.CalibrationError, match=r"linear.*never saw data"):
        convert(prepared)


@pytest.mark.parametrize("make", [X86Quantizer, XnnpackQuantizer])
@pytest.mark.parametrize("convert", [tq.convert, convert_pt2e])
def test_dynamic_needs_no_calibration(make, convert):
    x = torch.randn(4, 8)
    exported = tq.export(nets.mlp(), x)
    quantized = convert(tq.prepare(exported, make("dynamic_int8")))
    assert tq.report(quantized).coverage == "2/2"
    assert tq.sqnr_db(exported(x), quantized(x)) > 30


def test_every_op_that_stays_float_has_a_reason():
    batch = nets.token_batch()
    for quantizer in (X86Quantizer(), XnnpackQuantizer()):
        graph = tq.prepare(tq.export(nets.MaskedTokens(), batch), quantizer)
        for site in tq.report(graph).sites:
            assert site.status != "missed", site
            assert site.reason or site.status == "quantized", site


def test_a_weight_computed_at_run_time_stays_float_with_the_reason():
    x = torch.randn(4, 8)
    prepared = tq.prepare(
        tq.export(Call(lambda m, x: F.linear(m.inner(x), x), inner=nn.Linear(8, 8)), x), X86Quantizer()
    )
    sites = {s.node: (s.status, s.reason) for s in tq.report(prepared).sites}
    assert sites["linear"][0] == "quantized"
    assert sites["linear_1"][0] == "unsupported"
    assert "run time" in sites["linear_1"][1]


@pytest.mark.filterwarnings("ignore:X86Quantizer annotated nothing")
def test_a_half_precision_model_stays_float_with_the_reason():
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    prepared = tq.prepare(tq.export(nets.mlp().bfloat16(), x), X86Quantizer())
    assert all("float32" in s.reason for s in tq.report(prepared).sites if s.op == "linear")


def test_weights_are_symmetric_per_output_channel_with_the_closed_form_scale():
    x = torch.randn(4, 8)
    exported = tq.export(nets.mlp(), x)
    weight = exported.state_dict()["0.weight"]
    quantized = tq.quantize(exported, x, [x], quantizer=X86Quantizer(), algorithms=(), progress=False)
    site = next(s for s in tq.report(quantized).sites if s.op == "linear")
    assert torch.allclose(site.weight.scale, weight.abs().amax(1) / 127.5, rtol=1e-2)
    assert not site.weight.zero_point.any()


def test_foreign_specs_are_reported_as_annotated():
    x = torch.randn(4, 8)
    quantizer = SpecQuantizer({"linear"}, per_tensor(torch.uint8, 0, 127), per_channel(low=-8, high=7))
    quantized = tq.quantize(nets.mlp(), x, [x], quantizer=quantizer, algorithms=(), progress=False)
    for site in (s for s in tq.report(quantized).sites if s.op == "linear"):
        assert site.activation.describe() == "uint8[0,127] per tensor"
        assert site.weight.describe() == "int8[-8,7] per channel 0"
