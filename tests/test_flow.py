"""export, prepare, convert, quantize: one export for several targets, and the float model untouched."""

import nets
import pytest
import torch
from foreign import SpecQuantizer, groupwise, per_channel, per_tensor
from nets import Call
from torch import nn

import torchquant as tq
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer


@pytest.fixture
def image():
    return torch.randn(2, 3, 8, 8)


def test_one_export_serves_several_quantizers_with_the_results_of_separate_runs(image):
    exported = tq.export(nets.cnn(), image)
    batches = [torch.randn(2, 3, 8, 8) for _ in range(3)]
    makers = [X86Quantizer, XnnpackQuantizer, lambda: X86Quantizer(exclude=["4"])]
    together = tq.quantize(
        exported, image, iter(batches), quantizer=[m() for m in makers], algorithms=(), progress=False
    )
    for graph, make in zip(together, makers, strict=True):
        alone = tq.quantize(nets_same(exported), image, batches, quantizer=make(), algorithms=(), progress=False)
        assert torch.equal(graph(image), alone(image))
    assert [tq.report(g).coverage for g in together] == ["2/2", "2/2", "1/2"]


def nets_same(exported):
    """The export itself: every run copies it."""
    return exported


def test_the_float_model_and_its_export_are_unchanged(image):
    model = nets.cnn()
    exported = tq.export(model, image)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    targets = [n.target for n in exported.graph.nodes]
    expected = model(image)
    tq.quantize(exported, image, [image], quantizer=[X86Quantizer(), XnnpackQuantizer()], algorithms=(), progress=False)
    assert torch.equal(model(image), expected)
    assert torch.equal(exported(image), tq.export(model, image)(image))
    assert [n.target for n in exported.graph.nodes] == targets
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_training_model_is_exported_in_eval_mode_and_put_back(image):
    model = nets.cnn().train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    exported = tq.export(model, image)
    assert model.training
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.allclose(exported(image), model.eval()(image), atol=1e-6)


@pytest.mark.parametrize("outer", [True, False])
def test_a_submodules_own_mode_is_put_back_too(image, outer):
    """A frozen BatchNorm in a training model, or the other way round."""
    model = nets.cnn().train(outer)
    model[1].train(not outer)
    tq.export(model, image)
    assert model.training == outer
    assert model[1].training != outer


def test_a_symbolically_traced_model_is_exported_in_eval_mode():
    x = torch.ones(4, 64)
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).train())
    exported = tq.export(traced, x)
    assert torch.equal(exported(x), exported(x))


def test_what_torch_cannot_export_gives_its_reason(image):
    class Branches(nn.Module):
        def forward(self, x):
            return x + 1 if float(x.sum()) > 0 else x.flatten()

    with pytest.raises(tq.ExportError, match="cannot capture Branches"):
        tq.export(Branches(), image)


def test_a_prepared_or_converted_graph_is_not_exported_again(image):
    prepared = tq.prepare(tq.export(nets.cnn(), image), X86Quantizer())
    with pytest.raises(tq.InputError, match="already"):
        tq.export(prepared, image)
    tq.calibrate(prepared, [image], progress=False)
    with pytest.raises(tq.InputError, match="already"):
        tq.export(tq.convert(prepared), image)


def test_convert_leaves_integer_weights_and_no_dead_float_ones(image):
    quantized = tq.quantize(nets.cnn(), image, [image], quantizer=X86Quantizer(), algorithms=(), progress=False)
    large = [t for t in quantized.state_dict().values() if t.ndim >= 2]
    assert {t.dtype for t in large} == {torch.int8}
    floats = sum(p.numel() for p in nets.cnn().parameters())
    assert tq.report(quantized).weight_bytes < 1.6 * floats
    assert (
        sum(t.numel() * t.element_size() for t in quantized.state_dict().values()) == tq.report(quantized).weight_bytes
    )


@pytest.mark.parametrize("make", [X86Quantizer, lambda: SpecQuantizer({"linear"}, per_tensor(), per_channel())])
def test_convert_refuses_an_uncalibrated_graph_of_any_quantizer(make):
    prepared = tq.prepare(tq.export(nets.mlp(), torch.randn(2, 8)), make())
    with pytest.raises(tq.CalibrationError, match="never saw data"):
        tq.convert(prepared)


def test_convert_refuses_a_graph_that_was_not_prepared():
    with pytest.raises(tq.CalibrationError, match="prepared graph"):
        tq.convert(tq.export(nets.mlp(), torch.randn(2, 8)))


def test_quantize_without_a_quantizer_says_what_is_missing():
    x = torch.randn(2, 8)
    with pytest.raises(tq.InputError, match="X86Quantizer"):
        tq.quantize(nets.mlp(), x, [x], quantizer=[])


def test_groupwise_weights_of_a_foreign_observer_convert():
    x = torch.randn(2, 64)
    model = nn.Sequential(nn.Linear(64, 32))
    exported = tq.export(model, x)
    quantized = tq.quantize(
        exported, x, [x], quantizer=SpecQuantizer({"linear"}, None, groupwise()), algorithms=(), progress=False
    )
    (site,) = (s for s in tq.report(quantized).sites if s.compute)
    assert (site.status, site.reason) == ("quantized", "weight only")
    assert tq.sqnr_db(exported(x), quantized(x)) > 15


def test_a_dynamic_batch_survives_the_whole_flow():
    x = torch.randn(4, 8)
    batch = torch.export.Dim("batch")
    quantized = tq.quantize(
        nets.mlp(), x, [x, x[:1]], quantizer=X86Quantizer(), algorithms=(), dynamic_shapes=({0: batch},), progress=False
    )
    assert torch.allclose(quantized(x)[:1], quantized(x[:1]), atol=1e-6)


def test_a_model_with_nothing_to_quantize_is_refused_with_a_pointer_to_the_report():
    x = torch.randn(2, 8)
    with pytest.raises(tq.CalibrationError, match=r"annotated nothing.*report"):
        tq.quantize(Call(lambda m, x: x + 1), x, [x], quantizer=X86Quantizer(), algorithms=(), progress=False)
