"""What is trained is what is converted: every Quantizer, every width, every kind of spec."""

import operator

import foreign
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from trainable import BATCH, QUANTIZERS, Depthwise, exported, foreign_xnnpack, held_db, images, prepared, train

import torchquant as tq
from torchquant import qat
from torchquant.fx import ops, passes
from torchquant.quantizers import CudaQuantizer, WeightOnlyQuantizer, X86Quantizer, XnnpackQuantizer
from torchquant.training.fakes import Fake, fakes
from torchquant.training.norms import TrainedDropout, TrainedNorm

METHODS = {"observed": None, "LSQ": qat.LSQ(), "LSQ+": qat.LSQPlus(), "EWGS": qat.EWGS(0.05)}


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_prepared_graph_computes_what_the_converted_one_does(quantizer, bits):
    if "ExecuTorch" in quantizer:
        pytest.importorskip("executorch")
    graph = prepared(quantizer, bits)
    train(graph)
    assert held_db(graph) >= 60
    assert tq.report(qat.convert(graph)).coverage == "4/4"


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "observed"])
def test_learned_grids_are_converted_as_they_were_trained(method, bits):
    graph = prepared("xnnpack", bits)
    qat.learn_steps(graph, METHODS[method], METHODS[method], batches=[images()])
    train(graph, steps=10)
    assert held_db(graph) >= 60


def test_pact_and_dorefa_are_converted_as_they_were_trained():
    graph = prepared("x86", 3)
    qat.learn_steps(graph, qat.DoReFa(), qat.PACT())
    train(graph, steps=10)
    assert held_db(graph) >= 60


def test_the_trained_graph_is_not_the_float_one():
    graph, x = prepared("x86", 3), images()
    with torch.no_grad(), qat.evaluate(graph):
        assert tq.sqnr_db(exported()(x), graph(x)) < 40


def test_a_channel_of_one_sign_stays_symmetric():
    graph = prepared("torchao's x86", 3)
    train(graph, steps=1)
    weights = [fake for fake in fakes(graph) if fake.is_weight]
    assert len(weights) == 4
    assert all(not fake.zero_point.any() for fake in weights)
    assert any("Fused" in remark for remark in qat.notes(graph))


def test_per_tensor_weights_train_with_batch_norm_folded_and_say_so():
    pytest.importorskip("executorch")
    graph = qat.prepare(exported(), foreign_xnnpack(per_channel=False), weights=3, activations=4)
    train(graph)
    assert held_db(graph) >= 60
    assert sum("is folded before training" in remark for remark in qat.notes(graph)) == 3
    assert not any(isinstance(m, TrainedNorm) for m in graph.modules())


@pytest.mark.parametrize("make", [XnnpackQuantizer, CudaQuantizer])
def test_the_users_model_and_graph_stay_as_they_are(make):
    torch.manual_seed(0)
    model = Depthwise()
    graph = exported(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    code, modes = graph.code, {m: m.training for m in model.modules()}
    trained = qat.prepare(graph, make("static_int8", is_qat=True))
    train(trained)
    qat.convert(trained)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert graph.code == code
    assert {m: m.training for m in model.modules()} == modes


def test_what_is_trained_goes_on_after_convert():
    graph = prepared("x86", 4)
    train(graph)
    first = qat.convert(graph)(images(3))
    assert torch.equal(qat.convert(graph)(images(3)), first)
    losses = train(graph, steps=8)
    assert losses[-1] < losses[0]


# schemes ----------------------------------------------------------------------------------------------------------


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))


@pytest.mark.parametrize(
    "quantizer",
    [
        X86Quantizer("dynamic_int8", is_qat=True),
        X86Quantizer("w4_g32", is_qat=True),
        X86Quantizer("w2a8_symmetric_g16", is_qat=True),
        X86Quantizer("w3", is_qat=True),
        XnnpackQuantizer("8da4w", is_qat=True),
        XnnpackQuantizer("dynamic_int8", is_qat=True),
        CudaQuantizer("static_fp8", is_qat=True),
        CudaQuantizer("dynamic_fp8", is_qat=True),
        CudaQuantizer("w4a16_g32", is_qat=True),
        WeightOnlyQuantizer("w2_g16", is_qat=True),
    ],
    ids=lambda q: f"{type(q).__name__} {q.scheme}",
)
def test_dynamic_grouped_and_float8_schemes_are_trained(quantizer):
    x = torch.randn(16, 32)
    graph = qat.prepare(tq.export(mlp(), x, dynamic_shapes=BATCH), quantizer)
    tq.calibrate(graph, [x], progress=False)
    start = {name: value.detach().clone() for name, value in graph.named_parameters()}
    losses = train(graph, x, steps=10)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(value, start[name]) for name, value in graph.named_parameters())
    assert held_db(graph, x) >= 60
    assert tq.report(qat.convert(graph)).coverage == "3/3"


@pytest.mark.parametrize("is_static", [True, False])
def test_every_kind_of_foreign_spec_is_trained(is_static):
    """int16, 2 to 8 bits, groups, tokens, fixed, shared and derived qparams, and ops of an observer's own."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    graph = tq.prepare(tq.export(foreign.EveryKind().eval(), x), foreign.EverySpec())
    tq.calibrate(graph, [x], progress=False)
    trained = qat.prepare(graph)
    if is_static:
        assert qat.learn_steps(trained) > 8
    losses = train(trained, x, loss=lambda g, x: (g(x) - 1).square().mean(), steps=8, lr=3e-3)
    assert losses[-1] < losses[0]
    assert held_db(trained, x) >= 60


def test_shared_qparams_stay_one_module():
    graph = prepared("xnnpack")
    called = [n for n in graph.graph.nodes if n.op == "call_module" and isinstance(graph.get_submodule(n.target), Fake)]
    modules = [graph.get_submodule(n.target) for n in called]
    assert len(set(map(id, modules))) == len(fakes(graph))
    for quantizer in ("xnnpack", "torchao's x86"):
        graph = prepared(quantizer)
        before = len(fakes(graph))
        qat.learn_steps(graph)
        assert len(fakes(graph)) == before


def test_our_fake_quantizers_hold_in_torchaos_own_flow():
    torch.manual_seed(0)
    x = torch.randn(8, 32)
    for bits in ((-127, 127), (-4, 3)):
        graph = prepare_qat_pt2e(torch.export.export(mlp(), (x,)).module(), X86Quantizer(is_qat=True))
        for fake in (f for f in fakes(graph) if ops.is_constant(_node_of(graph, f).args[0])):
            for module in (fake, fake.activation_post_process):
                module.quant_min, module.quant_max = bits
        train(graph, x, optimizer=torch.optim.SGD(graph.parameters(), 0.05))
        for fake in fakes(graph):
            fake.disable_observer()
        trained = graph(x)
        assert tq.sqnr_db(trained, convert_pt2e(graph)(x)) >= 60


def _node_of(graph, fake):
    return next(n for n in graph.graph.nodes if n.op == "call_module" and graph.get_submodule(n.target) is fake)


# BatchNorm, dropout, other layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("in_training_mode", [False, True])
def test_dropout_and_batch_norm_keep_what_the_model_says(in_training_mode):
    model = Depthwise()
    if in_training_mode:
        graph = torch.export.export(model.train(), (images(),), dynamic_shapes=BATCH).module()
    else:
        graph = exported(model)
    for quantizer in ("x86", "xnnpack"):
        trained = qat.prepare(graph, QUANTIZERS[quantizer]())
        drops = [m for m in trained.modules() if isinstance(m, TrainedDropout)]
        norms = [m for m in trained.modules() if isinstance(m, TrainedNorm)]
        assert [d.p for d in drops] == [0.25]
        assert [(n.eps, n.momentum) for n in norms] == [(1e-3, 0.2), (1e-5, 0.1), (1e-5, 0.1)]
        x, mean = images(), norms[0].running_mean.clone()
        assert not torch.equal(trained(x), trained(x))
        assert not torch.equal(norms[0].running_mean, mean)
        trained.eval()
        assert torch.equal(trained(x), trained(x))
        assert held_db(trained) >= 60


@pytest.mark.parametrize("in_training_mode", [False, True])
def test_dropout_of_a_prepared_graph_switches_too(in_training_mode):
    x, model = torch.randn(16, 8), nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 5))
    graph = torch.export.export(model.train(in_training_mode), (x,), dynamic_shapes=BATCH).module()
    calibrated = tq.prepare(graph, X86Quantizer())
    tq.calibrate(calibrated, [x], progress=False)
    trained = qat.prepare(calibrated)
    assert [m.p for m in trained.modules() if isinstance(m, TrainedDropout)] == [0.5]
    assert not torch.equal(trained(x), trained(x))
    assert held_db(trained, x) >= 60


def test_batch_norm_is_that_of_the_model_in_training():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3)), images()
    trained = qat.prepare(exported(model), X86Quantizer(is_qat=True))
    for fake in fakes(trained):
        fake.disable_fake_quant()
    expected = model.train()(x)
    assert torch.allclose(trained(x), expected, atol=1e-5)
    norm = next(m for m in trained.modules() if isinstance(m, TrainedNorm))
    assert torch.allclose(norm.running_mean, model[1].running_mean, atol=1e-6)


@pytest.mark.parametrize("affine", [True, False])
def test_a_gamma_that_changes_its_sign_does_not_turn_codes_round(affine):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine), nn.ReLU(), nn.Conv2d(4, 5, 10), nn.Flatten()
    )
    trained = qat.prepare(exported(model), X86Quantizer(is_qat=True), weights=2)
    train(trained)
    norm = next(m for m in trained.modules() if isinstance(m, TrainedNorm))
    if affine:
        with torch.no_grad():
            norm.weight[0], norm.weight[1] = -0.5, 0.0
    assert held_db(trained) >= 60


LAYERS = {
    "transposed": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2)
    ),
    "transposed, BatchNorm": lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 2, 2), nn.BatchNorm2d(6), nn.ReLU6()),
    "grouped transposed, BatchNorm": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.BatchNorm2d(6)
    ),
    "1-D": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 4, 1)),
    "linear, BatchNorm": lambda: nn.Sequential(nn.Flatten(1), nn.Linear(432, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)),
    "BatchNorm in front": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("quantizer", ["x86", "xnnpack"])
def test_layers_of_all_kinds_are_trained(name, quantizer):
    torch.manual_seed(0)
    graph = qat.prepare(exported(LAYERS[name]()), QUANTIZERS[quantizer]())
    losses = train(graph, loss=lambda g, x: (g(x) - 1).square().mean(), steps=8)
    assert losses[-1] < losses[0]
    assert held_db(graph) >= 60


@pytest.mark.parametrize("outputs", [4, 6])
def test_batch_norm_over_another_axis_than_the_outputs_stays_an_op(outputs):
    """BatchNorm1d takes the second axis; behind a linear with three axes that is not the last one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, outputs), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(outputs, 5))
    with torch.no_grad():
        model[1].weight.uniform_(-2, 2)
        model[1].running_mean.uniform_(-1, 1)
        model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(8, 6, 8)
    graph = tq.export(model, x, dynamic_shapes=BATCH)
    trained = qat.prepare(graph, X86Quantizer(is_qat=True))
    tq.calibrate(trained, [x], progress=False)
    with torch.no_grad(), qat.evaluate(trained):
        assert tq.sqnr_db(graph(x), trained(x)) > 35
    train(trained, x, loss=lambda g, x: (g(x) - 1).square().mean())
    assert held_db(trained, x) >= 60


def test_a_gamma_of_zero_is_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    nn.init.zeros_(model[1].weight)
    trained = qat.prepare(exported(model), X86Quantizer(is_qat=True))
    norm = next(m for m in trained.modules() if isinstance(m, TrainedNorm))
    (trained(images()) * torch.randn(8, 4, 10, 10)).sum().backward()
    assert norm.weight.grad.all()
    train(trained, loss=lambda g, x: (g(x) - x[:, :1, 1:-1, 1:-1]).square().mean())
    assert held_db(trained) >= 60


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x):
        query, key, value = self.inner(x).chunk(3, -1)
        p = 0.5 if self.training else 0.0
        return self.outer(F.scaled_dot_product_attention(query, key, value, dropout_p=p))


def test_attention_of_a_graph_exported_in_training_mode_is_still_in_evaluation():
    x = torch.randn(4, 6, 8)
    graph = torch.export.export(Attention().train(), (x,), dynamic_shapes=BATCH).module()
    trained = qat.prepare(graph, X86Quantizer(is_qat=True))
    tq.calibrate(trained, [x], progress=False)
    assert any("dropout of 0.5 inside" in remark for remark in qat.notes(trained))
    assert held_db(trained, x) >= 60


def test_a_batch_norm_without_momentum_says_that_its_statistics_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None))
    assert any("momentum 0" in remark for remark in qat.notes(qat.prepare(exported(model), X86Quantizer(is_qat=True))))


@pytest.mark.filterwarnings("ignore:the Quantizer left")
def test_a_weight_that_two_layers_read_is_one_parameter_and_one_grid():
    torch.manual_seed(0)
    first = nn.Linear(16, 16)
    second = nn.Linear(16, 16)
    second.weight = first.weight
    x = torch.randn(8, 16)
    graph = tq.export(nn.Sequential(first, nn.ReLU(), second), x, dynamic_shapes=BATCH)
    for quantizer in ("x86", "xnnpack"):
        trained = qat.prepare(graph, QUANTIZERS[quantizer](), weights=3)
        train(trained, x, loss=lambda g, x: (g(x) - 1).square().mean())
        weights = {id(p) for p in trained.parameters() if p.ndim == 2}
        assert len(weights) == 1
        assert held_db(trained, x) >= 60


# where training starts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [tq.AdaRound(100), tq.GPTQ()], ids=["AdaRound", "GPTQ"])
def test_training_starts_from_an_algorithms_answer(algorithm):
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    graph = tq.prepare(tq.export(mlp().eval(), x, dynamic_shapes=BATCH), X86Quantizer())
    qat.narrow(graph, weights=3)
    tq.calibrate(graph, [x], progress=False)
    tq.optimize(graph, [x], [algorithm], progress=False)
    expected = tq.convert(passes.copy_graph(graph))(x)
    trained = qat.prepare(graph)
    qat.learn_steps(trained)
    with torch.no_grad(), qat.evaluate(trained):
        assert tq.sqnr_db(expected, trained(x)) > 60
    losses = train(trained, x, steps=15, lr=1e-3)
    assert losses[-1] < losses[0]
    assert held_db(trained, x) >= 60


def test_a_calibrated_graph_keeps_its_ranges_in_training():
    x = torch.randn(16, 32)
    graph = tq.prepare(tq.export(mlp().eval(), x, dynamic_shapes=BATCH), X86Quantizer())
    tq.calibrate(graph, [x], progress=False)
    trained = qat.prepare(graph)
    activations = [f for f in fakes(trained) if not f.is_weight]
    before = [f.scale.clone() for f in activations]
    train(trained, x * 3)
    assert all(torch.equal(f.scale, s) for f, s in zip(activations, before, strict=True))


def test_ranges_do_not_move_in_evaluation():
    graph = prepared("torchao's x86")
    train(graph, steps=2)
    before = [f.scale.clone() for f in fakes(graph)]
    with torch.no_grad(), qat.evaluate(graph):
        graph(images() * 100)
    assert all(torch.equal(f.scale, s) for f, s in zip(fakes(graph), before, strict=True))
    graph(images() * 100)
    assert any(not torch.equal(f.scale, s) for f, s in zip(fakes(graph), before, strict=True))


def test_finish_gives_a_calibrated_graph_for_algorithms_and_analysis():
    graph, x = prepared("x86", 4), images()
    train(graph)
    finished = qat.finish(graph)
    before = tq.convert(qat.finish(graph))(x)
    tq.optimize(finished, [x], [tq.BatchNormReestimation()], progress=False)
    assert tq.sqnr_db(before, tq.convert(finished)(x)) > 5
    assert len(tq.analyze(qat.finish(graph), [x]).sites) >= 4


def test_narrow_codes_are_stored_in_their_bits():
    graph = qat.convert(prepared("x86", 4))
    for site in (s for s in tq.report(graph).sites if s.compute):
        assert site.weight.describe() == "int8[-8,7] per channel 0"
        assert site.activation.describe() == "uint8[0,15] per tensor"
    read = [n for n in graph.graph.nodes if ops.qdq_name(n) == "unpack_codes"]
    assert len(read) == 4
    assert all(operator.attrgetter(n.args[0].target)(graph).dtype == torch.uint8 for n in read)


def test_layers_may_keep_their_bits():
    graph = qat.prepare(exported(), X86Quantizer(is_qat=True), weights=2, activations=4, exclude=["stem", "head"])
    ranges = [f.quant_max for f in fakes(graph) if f.is_weight]
    assert sorted(ranges) == [1, 1, 127, 127]
    assert F.relu(torch.tensor(ranges)).max() == 127
