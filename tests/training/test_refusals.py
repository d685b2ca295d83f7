"""What training refuses by name: graphs, Quantizers and numbers that would train something else in silence."""

import pytest
import torch
import torch.nn.functional as F
from foreign import SpecQuantizer, per_channel
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)
from trainable import BATCH, Depthwise, exported, images, prepared, train

import torchquant as tq
from torchquant import qat
from torchquant.quantizers import X86Quantizer, XnnpackQuantizer
from torchquant.training.fakes import fakes


@pytest.mark.parametrize(
    "quantizer",
    [
        X86Quantizer(),
        XnnpackQuantizer("static_int8"),
        X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config()),
    ],
    ids=lambda q: type(q).__name__,
)
def test_a_quantizer_that_is_not_made_for_training(quantizer):
    with pytest.raises(tq.PrepareError, match=rf"{type(quantizer).__name__} inserted observers.*is_qat=True"):
        qat.prepare(exported(), quantizer)


def test_a_batch_that_is_always_one():
    graph = tq.export(Depthwise(), images(1))
    with pytest.raises(tq.InputError, match=r"batch of 1.*dynamic_shapes"):
        qat.prepare(graph, X86Quantizer(is_qat=True))


def test_a_quantizer_that_annotates_nothing():
    x = torch.randn(4, 8)
    graph = tq.export(nn.Sequential(nn.ReLU(), nn.Tanh()), x, dynamic_shapes=BATCH)
    with pytest.raises(tq.PrepareError, match="annotated nothing"):
        qat.prepare(graph, X86Quantizer(is_qat=True))


def test_a_model_whose_parameters_are_all_frozen():
    with pytest.raises(tq.InputError, match="every parameter of the graph is frozen"):
        qat.prepare(exported(Depthwise().requires_grad_(False)), X86Quantizer(is_qat=True))


def test_batch_norm_that_torchao_has_written_as_arithmetic():
    graph = torch.export.export(Depthwise().train(), (images(),), dynamic_shapes=BATCH).module()
    graph = prepare_qat_pt2e(graph, X86Quantizer(is_qat=True))
    with pytest.raises(
        tq.InputError, match=r"lost its momentum and eps; give torchquant.qat.prepare the exported graph"
    ):
        qat.prepare(graph)


@pytest.mark.parametrize("kind", ["decomposed", "instance"])
def test_a_normalization_whose_mode_cannot_be_switched(kind):
    norm = nn.BatchNorm2d(4) if kind == "decomposed" else nn.InstanceNorm2d(4, track_running_stats=True)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    program = torch.export.export(model.train(), (images(),), dynamic_shapes=BATCH)
    if kind == "decomposed":
        program = program.run_decompositions()
    with pytest.raises(tq.InputError, match=r"norm.* in training mode .*export the model in evaluation"):
        qat.prepare(program.module(), X86Quantizer(is_qat=True))
    graph = exported(model.eval())
    assert qat.prepare(graph, X86Quantizer(is_qat=True)) is not graph


def test_graphs_that_are_something_else():
    graph = exported()
    for arguments, match in (
        ((Depthwise(), X86Quantizer(is_qat=True)), "exported graph.*not Depthwise"),
        ((graph,), "needs a Quantizer"),
        ((graph, X86Quantizer), "is a class"),
        ((qat.convert(prepared()), None), "converted"),
        ((prepared(), None), "prepared for training already"),
        ((tq.prepare(graph, X86Quantizer()), X86Quantizer(is_qat=True)), "leave the Quantizer out"),
    ):
        with pytest.raises(tq.InputError, match=match):
            qat.prepare(*arguments)
    for call in (qat.convert, qat.finish, qat.learn_steps, qat.dampening, lambda g: qat.schedule(g, 3)):
        with pytest.raises(tq.InputError, match=r"the graph that torchquant.qat.prepare returned"):
            call(graph)


def test_learning_evaluating_and_converting_before_calibration():
    for call in (
        qat.learn_steps,
        qat.convert,
        lambda g: qat.evaluate(g).__enter__(),
        lambda g: qat.schedule(g, 3, observers_off=0),
    ):
        with pytest.raises(tq.CalibrationError, match="never saw data"):
            call(prepared(calibrate=False))


def test_steps_that_cannot_be_learned_leave_the_graph_as_it_was():
    graph = prepared(calibrate=False)
    before = fakes(graph)
    with pytest.raises(tq.CalibrationError, match="never saw data"):
        qat.learn_steps(graph)
    assert fakes(graph) == before
    tq.calibrate(graph, [images()], progress=False)
    with pytest.raises(tq.SchemeError, match="take another method for activations"):
        qat.learn_steps(graph, qat.LSQ(), qat.DoReFa())
    assert fakes(graph) == before


def test_freezing_of_weights_that_a_method_moves():
    graph = prepared()
    qat.learn_steps(graph, qat.DoReFa(), None)
    with pytest.raises(tq.SchemeError, match="DoReFa moves it"):
        qat.Freezing(graph)


@pytest.mark.parametrize("convert", [tq.convert, convert_pt2e])
def test_a_plain_convert_of_what_is_trained(convert):
    graph = prepared("x86")
    qat.learn_steps(graph)
    with pytest.raises(tq.InputError, match=r"convert it with torchquant.qat.convert"):
        convert(graph)
    with pytest.raises(tq.InputError, match=r"torchquant.qat.finish"):
        tq.optimize(prepared("x86"), [images()], [tq.AdaRound(2)], progress=False)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_a_weight_shared_by_two_formats():
    graph = tq.export(Tied(), torch.randn(4, 16), dynamic_shapes=BATCH)
    quantizer = X86Quantizer("w4_g16", overrides={"second": "w2_g16"}, is_qat=True)
    with pytest.raises(tq.SchemeError, match=r"shared, and has two formats: .*\[-2,1\].*second.*\[-8,7\].*first"):
        qat.prepare(graph, quantizer)


# bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 9, 4.0, True, "4"])
def test_bits_out_of_range(bits):
    with pytest.raises(tq.InputError, match="2 to 8 bits"):
        qat.prepare(exported(), X86Quantizer(is_qat=True), weights=bits)


def test_bits_that_a_format_does_not_have():
    quantizer = SpecQuantizer({"conv2d"}, None, per_channel(low=-4, high=3))
    with pytest.raises(tq.SchemeError, match="less than 4 bits"):
        qat.narrow(tq.prepare(exported(), quantizer), weights=4)
    graph = tq.prepare(tq.export(nn.Linear(32, 4), torch.randn(4, 32)), X86Quantizer("dynamic_int8"))
    with pytest.raises(tq.InputError, match="no static integer grid"):
        qat.narrow(graph, activations=4)
    with pytest.raises(tq.PatternError, match="matches nothing"):
        qat.prepare(exported(), X86Quantizer(is_qat=True), weights=4, exclude=["hed"])
    calibrated = tq.prepare(exported(), X86Quantizer())
    tq.calibrate(calibrated, [images()], progress=False)
    tq.optimize(calibrated, [images()], [tq.AdaRound(2)], progress=False)
    with pytest.raises(tq.SchemeError, match=r"narrow before tq.optimize"):
        qat.narrow(calibrated, weights=4)


def test_bits_of_what_is_learned_already():
    graph = prepared("x86")
    qat.learn_steps(graph)
    with pytest.raises(tq.SchemeError, match=r"narrow before torchquant.qat.learn_steps"):
        qat.narrow(graph, weights=4)


# numbers ----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_names_the_step():
    graph = prepared()
    schedule = qat.schedule(graph, 10)
    train(graph, steps=2, schedule=schedule)
    with pytest.raises(tq.TrainingError, match="the loss is nan in step 3"):
        schedule.step(torch.tensor(torch.nan))


def test_gradients_that_are_no_numbers_name_the_layer_and_the_step():
    graph = prepared()
    schedule = qat.schedule(graph, 10)
    F.cross_entropy(graph(images()), torch.arange(8) % 5).backward()
    dict(graph.named_parameters())["depth.weight"].grad[0] = torch.inf
    with pytest.raises(tq.TrainingError, match=r"gradient of depth.weight holds NaN or infinity in step 1"):
        schedule.step()
    with pytest.raises(tq.TrainingError, match=r"after loss\.backward"):
        qat.schedule(prepared(), 10).step()


def test_a_weight_that_is_no_number_is_refused_where_it_is_rounded():
    graph = prepared()
    with torch.no_grad():
        dict(graph.named_parameters())["head.weight"][0, 0] = torch.nan
    with pytest.raises(tq.CalibrationError, match=r"head.*NaN"):
        graph(images())


@pytest.mark.parametrize("quantizer", ["x86", "torchao's x86"])
def test_a_batch_that_holds_nan_is_refused_and_leaves_no_trace_in_ranges(quantizer):
    graph, x = prepared(quantizer), images()
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(tq.CalibrationError, match=r"stem.*holds NaN"):
        graph(x)
    assert bool(graph(images()).isfinite().all())
    assert all(bool(fake.scale.isfinite().all()) for fake in fakes(graph))


def test_statistics_that_hold_nan_are_named_before_they_are_evaluated_or_converted():
    graph, x = prepared(), images()
    qat.learn_steps(graph)
    schedule = qat.schedule(graph, 10)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(tq.TrainingError, match="the loss is nan in step 1"):
        schedule.step(graph(x).sum())
    loss = graph(images()).sum()  # by the statistics of a sound batch
    loss.backward()
    for call in (lambda: schedule.step(loss), lambda: qat.evaluate(graph).__enter__(), lambda: qat.convert(graph)):
        with pytest.raises(tq.TrainingError, match=r"statistics of BatchNorm .* hold NaN"):
            call()


class Looked(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 8, sparse=True), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.table(x)).mean(1)


def test_sparse_gradients_are_checked_as_others():
    x = torch.randint(0, 9, (4, 3))
    graph = qat.prepare(tq.export(Looked(), x, dynamic_shapes=BATCH), X86Quantizer(is_qat=True))
    tq.calibrate(graph, [x], progress=False)
    schedule, loss = qat.schedule(graph, 4), graph(x).sum()
    loss.backward()
    schedule.step(loss)
    gradient = dict(graph.named_parameters())["table.weight"].grad
    assert gradient.is_sparse
    gradient._values()[0] = torch.inf
    with pytest.raises(tq.TrainingError, match=r"gradient of table\.weight"):
        schedule.step(loss)


@pytest.mark.parametrize("value", [0.0, -0.1, torch.nan])
def test_a_step_that_is_not_positive_is_named(value):
    graph = prepared("torchao's x86")
    qat.learn_steps(graph)
    with torch.no_grad():
        next(f for f in fakes(graph) if f.is_weight).scale[0] = value
    schedule = qat.schedule(graph, 10)
    F.cross_entropy(graph(images()), torch.arange(8) % 5).backward()
    for call in (schedule.step, lambda: qat.evaluate(graph).__enter__(), lambda: qat.convert(graph)):
        with pytest.raises(tq.TrainingError, match=r"learned step of .*stem.* must be positive"):
            call()


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 1.5}, {"steps": 3, "norms_frozen": 2}])
def test_a_schedule_out_of_range(options):
    with pytest.raises(tq.InputError, match=r"steps|norms_frozen"):
        qat.schedule(prepared(), **options)


def test_the_schedule_of_another_training():
    schedule = qat.schedule(prepared(), 10)
    with pytest.raises(tq.InputError, match="not one of a schedule of 10 steps"):
        schedule.load_state_dict({"done": 3, "steps": 20})


def test_a_schedule_stops_ranges_and_statistics():
    from torchquant.training.norms import TrainedNorm

    graph = prepared("x86")
    schedule = qat.schedule(graph, 10, observers_off=0.3, norms_frozen=0.6)
    norms = [m for m in graph.modules() if isinstance(m, TrainedNorm)]
    activations = [f for f in fakes(graph) if not f.is_weight]
    train(graph, steps=2, schedule=schedule)
    assert all(f.observes for f in activations)
    train(graph, steps=1, schedule=schedule)
    assert not any(f.observes for f in activations)
    assert not any(norm.frozen for norm in norms)
    train(graph, steps=3, schedule=schedule)
    assert all(norm.frozen for norm in norms)
    before = [(n.running_mean.clone(), n.weight.detach().clone()) for n in norms]
    train(graph, steps=2, schedule=schedule)
    assert all(torch.equal(n.running_mean, mean) for n, (mean, _) in zip(norms, before, strict=True))
    assert any(not torch.equal(n.weight, weight) for n, (_, weight) in zip(norms, before, strict=True))
