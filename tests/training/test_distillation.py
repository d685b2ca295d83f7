"""Distillation: the papers' formulas, cut points without names, and what it does to the student."""

import copy

import nets
import pytest
import torch
from trainable import BATCH, Depthwise, exported, held_db, images, prepared, train

import torchquant as tq
from torchquant import qat
from torchquant.quantizers import X86Quantizer, XnnpackQuantizer
from torchquant.training.distillation import cut_points, kl_divergence


def test_the_divergence_is_hintons():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 3, 9), torch.randn(6, 3, 9)
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    expected = 9 * (p * (p / q).log()).sum(-1).mean()
    assert torch.allclose(kl_divergence(student, teacher, 3.0), expected, atol=1e-5)
    assert float(kl_divergence(teacher, teacher, 3.0)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("feature_weight", [0.0, 1.0])
def test_the_student_comes_nearer_to_its_teacher(feature_weight):
    torch.manual_seed(0)
    teacher = exported()
    graph = qat.prepare(teacher, X86Quantizer(is_qat=True), weights=3, activations=4)
    tq.calibrate(graph, [images()], progress=False)
    qat.learn_steps(graph)
    distillation = qat.Distillation(graph, teacher, temperature=2.0, feature_weight=feature_weight)
    graph.eval()  # no dropout
    x = images()
    before = tq.sqnr_db(teacher(x).detach(), graph(x).detach())
    losses = train(graph, loss=lambda g, x: distillation(g(x), x), steps=60, lr=3e-3)
    assert losses[-1] < losses[0]
    if not feature_weight:  # values inside may come nearer at the cost of the outputs
        assert tq.sqnr_db(teacher(x).detach(), graph(x).detach()) > before
    assert held_db(graph) >= 60


def test_cut_points_are_found_without_names():
    graph = prepared("x86")
    distillation = qat.Distillation(graph, exported(), feature_weight=1.0, max_cuts=9)
    assert len(distillation.names) >= 4
    assert all(not name.endswith(("_norm", "_dropout")) for name in distillation.names)
    again = cut_points(prepared("xnnpack"))
    assert len(again) >= 4


def test_a_residual_networks_cuts_lie_between_its_blocks():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    teacher = tq.export(nets.Mobile(), x, dynamic_shapes=BATCH)
    graph = qat.prepare(teacher, X86Quantizer(is_qat=True))
    names = [n.name for n in cut_points(graph)]
    inside = [n.name for n in teacher.graph.nodes if "expand" in str(n.meta.get("nn_module_stack", ""))]
    assert names
    assert not set(names) & set(inside)


def test_a_student_with_taps_is_converted_and_copied_after_a_forward_with_gradients():
    teacher = exported()
    graph = prepared("x86", 4)
    distillation = qat.Distillation(graph, teacher, feature_weight=1.0)
    outputs = graph(images())
    qat.convert(graph)
    copy.deepcopy(graph)
    assert float(distillation(outputs, images()).detach()) > 0


class Pair(torch.nn.Module):
    def forward(self, x):
        return {"a": x.mean((2, 3)), "b": x.mean((2, 3))}


@pytest.mark.parametrize("outputs", ["kl", "mse"])
def test_a_teacher_with_other_outputs_is_refused(outputs):
    graph, x = prepared(), images()
    narrow = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(432, 1)).eval()
    for teacher in (narrow, Pair().eval()):
        with pytest.raises(tq.InputError, match=r"other outputs: float tensors of \[\(8, 5\)\] and of"):
            qat.Distillation(graph, teacher, outputs=outputs)(graph(x), x)


def test_a_teacher_of_which_a_part_is_in_training_mode_is_refused():
    model = Depthwise().eval()
    model.drop.train()
    for teacher in (model, prepared()):
        with pytest.raises(tq.InputError, match="training mode"):
            qat.Distillation(prepared(), teacher)


def test_taps_leave_nothing_behind():
    graph, x = prepared("xnnpack", 4), images()
    plain = qat.convert(graph)(x)
    qat.Distillation(graph, exported(), feature_weight=1.0)
    converted = qat.convert(graph)
    assert torch.equal(converted(x), plain)
    assert not any("tap" in name for name, _ in converted.named_modules())


def test_the_teacher_is_neither_trained_nor_changed():
    teacher = exported()
    code, before = teacher.code, [p.detach().clone() for p in teacher.parameters()]
    graph = qat.prepare(teacher, XnnpackQuantizer("static_int8", is_qat=True))
    distillation = qat.Distillation(graph, teacher, feature_weight=1.0)
    train(graph, loss=lambda g, x: distillation(g(x), x))
    assert teacher.code == code
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(teacher.parameters(), before, strict=True))


def test_keyword_arguments_and_outputs_that_are_no_logits():
    torch.manual_seed(0)

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

        def forward(self, a, b):
            return {"sum": self.one(a).relu() + self.other(b), "count": a.shape[0]}

    batch = {"b": torch.randn(8, 16), "a": torch.randn(8, 16)}
    teacher = tq.export(Two(), batch, dynamic_shapes={"a": {0: torch.export.Dim.AUTO}, "b": {0: torch.export.Dim.AUTO}})
    graph = qat.prepare(teacher, X86Quantizer(is_qat=True), weights=2)
    tq.calibrate(graph, [batch], progress=False)
    qat.learn_steps(graph)
    distillation = qat.Distillation(graph, teacher, outputs="mse")
    losses = train(graph, batch, loss=lambda g, x: distillation(g(**x), x), steps=30)
    assert losses[-1] < losses[0]
    with qat.evaluate(graph), torch.no_grad():
        trained = graph(**batch)
    assert tq.sqnr_db(trained["sum"], qat.convert(graph)(**batch)["sum"]) >= 60


@pytest.mark.parametrize(
    "options",
    [{"outputs": "l1"}, {"outputs": None}, {"temperature": 0.0}, {"feature_weight": -1.0}, {"output_weight": -1.0}],
)
def test_options_out_of_range(options):
    with pytest.raises(tq.InputError, match=r"outputs is|temperature is over 0"):
        qat.Distillation(prepared(), exported(), **options)


def test_features_need_a_graph_and_a_forward():
    graph = prepared()
    with pytest.raises(tq.InputError, match="exported float graph as teacher"):
        qat.Distillation(graph, torch.nn.Linear(2, 2).eval(), feature_weight=1.0)
    distillation = qat.Distillation(graph, exported(), feature_weight=1.0)
    with pytest.raises(tq.InputError, match="was not run"):
        distillation(torch.zeros(8, 5), images())


def test_a_teacher_in_training_mode_is_refused():
    graph = prepared()
    moving = torch.export.export(Depthwise().train(), (images(),), dynamic_shapes=BATCH).module()
    for teacher in (moving, Depthwise().train()):
        with pytest.raises(tq.InputError, match="teacher is in training mode"):
            qat.Distillation(graph, teacher)
