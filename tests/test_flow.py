"""export, prepare, convert, quantize: one export for several targets, and the float model untouched."""

import importlib
from functools import partial

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


@pytest.mark.parametrize(
    ("quantizer", "words"),
    [("x86", "no Quantizer"), (X86Quantizer, r"X86Quantizer\(\)"), ([X86Quantizer], "class"), (3, "no")],
)
def test_what_is_no_quantizer_is_refused_with_what_to_write(quantizer, words):
    x = torch.randn(2, 8)
    with pytest.raises(tq.InputError, match=words):
        tq.quantize(nets.mlp(), x, [x], quantizer=quantizer)


def test_batches_with_labels_are_refused_with_the_way_out():
    x = torch.randn(2, 8)
    with pytest.raises(tq.InputError, match="for x, _ in loader"):
        tq.quantize(nets.mlp(), x, [(x, torch.zeros(2))], quantizer=X86Quantizer())


def test_an_example_of_one_sample_for_a_dynamic_batch_is_refused_with_the_way_out():
    model = nets.Call(lambda m, x: m.inner(x).reshape(1, 4), inner=nets.mlp())
    with pytest.raises(tq.ExportError, match="two samples or more"):
        tq.export(model, torch.randn(1, 8), dynamic_shapes=(({0: torch.export.Dim("batch")},),))


def test_a_network_that_returns_indices_alone_is_optimized_for_what_they_are_made_of():
    model, batches = nets.Call(lambda m, x: m.inner(x).argmax(-1), inner=nets.mlp()).eval(), [torch.randn(16, 8)] * 3
    prepared = tq.prepare(tq.export(model, batches[0]), X86Quantizer())
    tq.calibrate(prepared, batches, progress=False)
    steps = tq.optimize(prepared, batches, [tq.AdaRound()], progress=False).steps
    assert all(10 < db < 100 for _, db, _ in steps)


@pytest.mark.parametrize("pattern", ["op:cond", "op:c*nd"])
def test_branches_are_hidden_from_quantizers_and_may_be_excluded(pattern):
    class Branches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.yes, self.no = (torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            x = self.first(x)
            return torch.cond(x.sum() > 0, self.yes.forward, self.no.forward, (x,))

    x = torch.randn(4, 8)
    prepared = tq.prepare(tq.export(Branches().eval(), x), X86Quantizer(exclude=[pattern]))
    assert {s.op: s.status for s in tq.report(prepared).sites if s.compute} == {
        "linear": "quantized",
        "cond": "excluded",
    }


def test_a_lone_batch_norm_does_not_make_convert_look_for_trained_convolutions(image, monkeypatch):
    norms = [nn.BatchNorm2d(3), nn.BatchNorm2d(4)]
    model = nn.Sequential(norms[0], nn.Conv2d(3, 4, 3), nn.ReLU(), norms[1], nn.Conv2d(4, 2, 1)).eval()
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    prepared = tq.prepare(tq.export(model, image), X86Quantizer())
    tq.calibrate(prepared, [image], progress=False)
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: pytest.fail("convert exports patterns"))
    converted = tq.convert(prepared)
    assert tq.sqnr_db(model(image), converted(image)) > 30
    assert [n.target for n in converted.graph.nodes].count(torch.ops.aten.batch_norm.default) == 2


class Failing(X86Quantizer):
    def annotate(self, model):
        raise ValueError("conv partition has more than one output node")


def test_an_error_of_a_foreign_quantizer_names_it_and_the_way_out(image):
    with pytest.raises(tq.PrepareError, match=r"Failing cannot annotate.*more than one output node(?s:.*)Take another"):
        tq.prepare(tq.export(nets.cnn(), image), Failing())


def test_a_model_of_another_dtype_is_refused_with_the_reason_that_its_ops_stay_float():
    model, x = nn.Linear(4, 2).double(), torch.randn(2, 4).double()
    with (
        pytest.warns(tq.TorchquantWarning, match="float64"),
        pytest.raises(tq.CalibrationError, match=r"1 linear: its input is not float32; export a float32 model"),
    ):
        tq.quantize(model, x, [x], quantizer=X86Quantizer(), progress=False)


def test_an_error_of_torchaos_convert_comes_with_the_way_out():
    model, x = nn.Linear(4, 2).double(), torch.randn(2, 4).double()
    prepared = tq.prepare(tq.export(model, x), SpecQuantizer(("linear",), per_tensor(), per_channel()))
    tq.calibrate(prepared, [x], progress=False)
    with pytest.raises(tq.PrepareError, match=r"float64(?s:.*)Export a float32 model"):
        tq.convert(prepared)


class NamedLikeOps(torch.nn.Module):
    """Buffers and inputs whose names are those of ops."""

    def __init__(self):
        super().__init__()
        self.conv2d = torch.nn.Conv2d(3, 4, 3)
        self.linear = torch.nn.Linear(4, 5)
        for name in ("mean", "pad", "relu", "add", "quantize_per_tensor"):
            self.register_buffer(name, torch.rand(1, 3, 1, 1) + 0.5)

    def forward(self, matmul, sum):
        x = (matmul - self.mean) / self.pad * self.relu + self.add * self.quantize_per_tensor + sum
        return self.linear(self.conv2d(x).mean((2, 3)))


@pytest.mark.parametrize("target", ["inductor_x86", "executorch_xnnpack", "inductor_cuda", "onnx_qdq", "openvino"])
def test_names_of_ops_are_no_ops(target):
    from torchquant import quantizers

    backend = importlib.import_module(f"torchquant.backends.{target}")
    quantizer = {
        "inductor_x86": quantizers.X86Quantizer,
        "executorch_xnnpack": quantizers.XnnpackQuantizer,
        "inductor_cuda": quantizers.CudaQuantizer,
        "onnx_qdq": quantizers.OnnxQuantizer,
        "openvino": quantizers.OpenvinoQuantizer,
    }[target]()
    batch = (torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6))
    converted = tq.quantize(NamedLikeOps().eval(), batch, [batch], quantizer=quantizer, algorithms=(), progress=False)
    options = {"device": "cpu"} if target == "inductor_cuda" else {}
    program = backend.lower(converted, batch, **options)
    assert tq.sqnr_db(converted(*batch), program(*batch)) > 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (partial(nn.Conv2d, 3, 4, 3), partial(nn.BatchNorm2d, 4), (3, 8, 8)),
        (partial(nn.Linear, 8, 4), partial(nn.BatchNorm1d, 4, affine=False), (8,)),
    ],
    ids=["images", "rows"],
)
def test_a_batch_norm_without_statistics_of_its_own_is_kept_as_arithmetic(layer, norm, shape, dtype):
    """torchao's folding of BatchNorms fails where there are no statistics to fold."""
    torch.manual_seed(0)
    model = nn.Sequential(layer(), norm(track_running_stats=False), nn.ReLU()).to(dtype).eval()
    batches = [torch.randn(n, *shape, dtype=dtype) for n in (4, 7)]
    graph = tq.export(model, batches[0], dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for x in batches:
        assert tq.sqnr_db(model(x).float(), graph(x).float()) > (100 if dtype == torch.float32 else 40)
    if dtype == torch.float32:
        prepared = tq.prepare(graph, X86Quantizer())
        for x in batches:
            prepared(x)
        assert tq.sqnr_db(model(x), tq.convert(prepared)(x)) > 20


def test_activations_that_become_zero_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)).eval()
    batches = [torch.randn(4, 8) * 1e-9 for _ in range(4)]
    with pytest.warns(tq.TorchquantWarning, match="too small to be told from 0.*Scale the model's inputs"):
        tq.quantize(model, batches[0], batches, quantizer=X86Quantizer(), algorithms=(), progress=False)


def test_a_size_that_depends_on_data_is_refused_by_algorithms_that_compare_values():
    def function(m, x):
        y = m.first(x)
        return m.second(y[(y[:, 0] > 0).nonzero().squeeze(1)])

    torch.manual_seed(0)
    model = Call(function, first=nn.Linear(8, 8), second=nn.Linear(8, 8)).eval()
    batches = [torch.randn(100, 8) for _ in range(16)]
    with pytest.raises(tq.CalibrationError, match=r"depends on the data.*algorithms=\(\)"):
        tq.quantize(model, batches[0], batches, quantizer=X86Quantizer(), progress=False)
    tq.quantize(model, batches[0], batches, quantizer=X86Quantizer(), algorithms=(), progress=False)


def test_infinities_among_the_outputs_do_not_hide_what_an_algorithm_gains():
    def function(m, x):
        y = m.first(x)
        return m.second(y.relu()), y.masked_fill(y > 0, -torch.inf)

    torch.manual_seed(0)
    model = Call(function, first=nn.Linear(8, 32), second=nn.Linear(32, 4)).eval()
    batches = [torch.randn(16, 8) for _ in range(4)]
    prepared = tq.prepare(tq.export(model, batches[0]), X86Quantizer())
    tq.calibrate(prepared, batches, progress=False)
    optimization = tq.optimize(prepared, batches, algorithms=[tq.BiasCorrection()], progress=False)
    assert "nan" not in str(optimization)


def test_branches_without_weights_are_no_layers_that_a_quantizer_missed():
    def function(m, x):
        y = m.first(x)
        return m.second(torch.cond(y.sum() > 0, lambda z: z * 2, lambda z: -z, (y,)))

    torch.manual_seed(0)
    model, x = Call(function, first=nn.Linear(8, 8), second=nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    quantized = tq.quantize(model, x, [x], quantizer=X86Quantizer(), algorithms=(), progress=False)
    (site,) = (s for s in tq.report(quantized).sites if s.op == "cond")
    assert site.status == "unsupported"
    assert not site.compute
