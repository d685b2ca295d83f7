"""What the papers promise of their gradients and starting points, and what learning does to a graph."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trainable import BATCH, held_db, images, prepared, train

import torchquant as tq
from torchquant import qat
from torchquant.quantizers import X86Quantizer
from torchquant.training.dorefa import squeezed
from torchquant.training.fakes import Fake, fakes
from torchquant.training.lsq import LearnedStep
from torchquant.training.lsq_plus import LearnedOffset
from torchquant.training.pact import LearnedClip
from torchquant.training.rounding import Cells, rounded


def fake_of(values, *, low=0, high=15, symmetric=False):
    from torchquant.observers import ActivationMinMax

    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    dtype = torch.int8 if low < 0 else torch.uint8
    fake = Fake(ActivationMinMax, dtype=dtype, quant_min=low, quant_max=high, qscheme=scheme)
    fake.observe(values)
    return fake


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("low", "high", "point"), [(-4, 3, 0), (0, 15, 6), (-128, 127, -128), (0, 255, 255)])
def test_the_values_are_those_of_converts_ops(shape, dtype, low, high, point):
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(dtype)
    scale = torch.tensor([0.37])
    ops = torch.ops.quantized_decomposed
    grid = (float(scale), point, low, high, torch.int8 if low < 0 else torch.uint8)
    expected = ops.dequantize_per_tensor(ops.quantize_per_tensor(x.float(), *grid), *grid).to(dtype)
    actual = rounded(x, scale, torch.tensor([point]), Cells(), low, high)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_channels_and_blocks_are_rounded_as_convert_does(axis):
    torch.manual_seed(0)
    w, ops = torch.randn(6, 8, 3, 3), torch.ops.quantized_decomposed
    scale, point = torch.rand(w.shape[axis]) + 0.05, torch.zeros(w.shape[axis], dtype=torch.int32)
    grid = (scale, point, axis, -4, 3, torch.int8)
    expected = ops.dequantize_per_channel(ops.quantize_per_channel(w, *grid), *grid)
    assert torch.equal(rounded(w, scale, point, Cells(axis=axis), -4, 3), expected)
    block, scale = (1, 4, 3, 3), torch.rand(12) + 0.05
    points = torch.randint(0, 15, (12,), dtype=torch.int32)
    codes = torch.ops.torchao.quantize_affine(
        w, block, scale.reshape(6, 2, 1, 1), points.reshape(6, 2, 1, 1), torch.uint8, 0, 15
    )
    expected = torch.ops.torchao.dequantize_affine(
        codes, block, scale.reshape(6, 2, 1, 1), points.reshape(6, 2, 1, 1), torch.uint8, 0, 15
    )
    assert torch.equal(rounded(w, scale, points, Cells(block=block), 0, 15), expected)


def test_the_gradient_of_a_step_is_equation_3_of_lsq():
    torch.manual_seed(0)
    x, grad = 2 * torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    step = LearnedStep(fake_of(x, low=-4, high=3, symmetric=True), torch.tensor([0.3]))
    values = x.clone().requires_grad_()
    step(values).backward(grad)
    v = x / 0.3
    by_step = torch.where(v.round() < -4, -4.0, torch.where(v.round() > 3, 3.0, v.round() - v))
    g = 1 / (30 * 3) ** 0.5  # 30 features of a sample, Q_P 3
    assert torch.allclose(step.scale.grad, ((grad * by_step).sum() * g).reshape(1), rtol=1e-4)
    assert torch.equal(values.grad, torch.where((v.round() >= -4) & (v.round() <= 3), grad, 0))


def test_a_step_of_each_channel_starts_where_lsq_says():
    graph = prepared("x86", 3)
    qat.learn_steps(graph, qat.LSQ(), None)
    weight = next(p for p in graph.parameters() if p.shape == (16, 8, 1, 1))
    step = next(f for f in fakes(graph) if isinstance(f, LearnedStep) and f.scale.numel() == 16)
    assert torch.allclose(step.scale, 2 * weight.abs().mean((1, 2, 3)) / 3**0.5, rtol=1e-5)


def test_the_offset_of_lsq_plus_gets_the_gradient_of_what_is_clipped():
    torch.manual_seed(0)
    x, grad = torch.randn(4, 50), torch.randn(4, 50)
    learned = LearnedOffset(fake_of(x / 2), fake_of(x / 2).scale)
    x_hat = learned(x)
    x_hat.backward(grad)
    inside = (x_hat - x).abs() <= learned.scale.detach() * 0.5001
    g = 1 / (50 * 15) ** 0.5
    assert torch.allclose(learned.offset.grad, (grad[~inside].sum() * g).reshape(1), rtol=1e-4)
    assert float(learned.qparams()[1]) == round(float(learned.qparams()[1]))


def test_the_clip_of_pact_gets_the_gradient_above_it():
    torch.manual_seed(0)
    x, grad = (2 * torch.randn(4, 50)).relu(), torch.randn(4, 50)
    learned = LearnedClip(fake_of(x / 3), fake_of(x / 3).scale)
    learned(x).backward(grad)
    above = (x / learned.qparams()[0]).round() > 15
    assert above.any()
    assert torch.allclose(learned.alpha.grad, grad[above].sum().reshape(1), rtol=1e-4)
    assert isinstance(qat.PACT().activation(fake_of(torch.randn(9))), LearnedStep)  # it has both signs


def test_ewgs_scales_gradients_by_the_distance_from_the_code():
    torch.manual_seed(0)
    x, grad = torch.rand(4, 50), torch.randn(4, 50)
    learned = qat.EWGS(0.5).activation(fake_of(x))
    values = x.clone().requires_grad_()
    x_hat = learned(values)
    x_hat.backward(grad)
    away = (x - x_hat.detach()) / (15 * learned.scale.detach())
    assert torch.allclose(values.grad, grad * (1 + 0.5 * grad.sign() * away), atol=1e-6)
    plain = LearnedStep(fake_of(x), fake_of(x).scale)
    plain(x).backward(grad)
    assert torch.allclose(plain.scale.grad, learned.scale.grad)


def test_dorefa_keeps_the_range_and_the_order_of_weights():
    w = torch.linspace(-2, 2, 41).reshape(1, -1)
    s = squeezed(w, 0)
    assert float(s.abs().max()) == pytest.approx(2)
    assert (s.diff() > 0).all()
    assert torch.allclose(s, 2 * w.tanh() / torch.tensor(2.0).tanh())


@pytest.mark.parametrize("methods", [{"weights": qat.PACT()}, {"activations": qat.DoReFa()}])
def test_a_method_for_the_other_tensor_is_refused(methods):
    with pytest.raises(tq.SchemeError, match=r"take another method for (weights|activations)"):
        qat.learn_steps(prepared("x86"), **methods)


def test_steps_start_at_the_least_squared_error_on_given_batches():
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    x[0, 0] = 60.0  # which the range of min-max keeps
    model = nn.Sequential(nn.Linear(32, 8))
    graph = qat.prepare(tq.export(model, x, dynamic_shapes=BATCH), X86Quantizer(is_qat=True), activations=4)
    tq.calibrate(graph, [x], progress=False)
    with torch.no_grad():
        observed = next(f for f in fakes(graph) if not f.is_weight)(x)
        qat.learn_steps(graph, batches=[x])
        searched = next(f for f in fakes(graph) if not f.is_weight)(x)
    assert (searched - x).square().sum() < (observed - x).square().sum()


@pytest.mark.parametrize("first", [qat.LSQ(), qat.LSQPlus(), qat.PACT(), qat.EWGS()], ids=lambda m: type(m).__name__)
def test_a_second_method_starts_at_the_grid_that_the_first_has_learned(first):
    graph = prepared("xnnpack", 4)
    weights = None if isinstance(first, qat.PACT) else first
    qat.learn_steps(graph, weights, first)
    with torch.no_grad():
        for fake in fakes(graph):
            for parameter in fake.parameters(recurse=False):
                parameter.mul_(1.5)
    before = [fake.calculate_qparams() for fake in fakes(graph)]
    qat.learn_steps(graph, qat.LSQ(start="grid"), qat.LSQ())
    for fake, (scale, zero_point) in zip(fakes(graph), before, strict=True):
        assert torch.allclose(fake.calculate_qparams()[0], scale)
        assert torch.equal(fake.calculate_qparams()[1], zero_point)


def test_excluded_layers_keep_their_observers():
    graph = prepared("x86", 4)
    qat.learn_steps(graph, exclude=["stem", "head"])
    learned = [f for f in fakes(graph) if isinstance(f, LearnedStep)]
    assert len(learned) == 4
    assert len(fakes(graph)) == 8


# training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [qat.LSQ(), qat.LSQPlus(), qat.EWGS()], ids=lambda m: type(m).__name__)
def test_steps_move_and_the_loss_falls(method):
    graph = prepared("x86", 2)
    qat.learn_steps(graph, method, method)
    steps = {name: p.detach().clone() for f in fakes(graph) for name, p in f.named_parameters(recurse=False)}
    graph.eval()  # without dropout
    before = [f.scale.detach().clone() for f in fakes(graph)]
    losses = train(graph, steps=20)
    assert steps
    assert losses[-1] < losses[0]
    assert all(not torch.equal(f.scale, b) for f, b in zip(fakes(graph), before, strict=True))


def test_the_state_of_a_training_goes_to_a_file_and_back(tmp_path):
    def made():
        torch.manual_seed(0)
        graph = prepared("xnnpack", 4)
        qat.learn_steps(graph, qat.LSQ(), qat.LSQPlus())
        optimizer = torch.optim.Adam(qat.parameters(graph, 1e-2))
        return graph, optimizer, qat.schedule(graph, 20, norms_frozen=0.4)

    graph, optimizer, schedule = made()
    graph.eval()  # no dropout, so that both see the same
    train(graph, steps=10, optimizer=optimizer, schedule=schedule)
    state = {"graph": graph.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(state, tmp_path / "half.pt")
    expected = train(graph, steps=10, optimizer=optimizer, schedule=schedule)
    again, optimizer, schedule = made()
    again.eval()
    loaded = torch.load(tmp_path / "half.pt", weights_only=True)
    again.load_state_dict(loaded["graph"])
    optimizer.load_state_dict(loaded["optimizer"])
    schedule.load_state_dict(loaded["schedule"])
    assert train(again, steps=10, optimizer=optimizer, schedule=schedule) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(qat.convert(graph)(images()), qat.convert(again)(images()))


def test_a_checkpoint_of_another_scheme_is_refused_by_name():
    graph = prepared("x86", 4)
    qat.learn_steps(graph)
    state = graph.state_dict()
    for other in (prepared("x86", 3), prepared("x86", 4)):
        with pytest.raises(tq.InputError, match=r"of another training.*(quant_m|method).*there"):
            other.load_state_dict(state)


def test_ranges_that_were_seen_are_loaded_into_a_graph_that_saw_nothing():
    graph = prepared("x86", 4)
    train(graph)
    fresh = prepared("x86", 4, calibrate=False)
    fresh.load_state_dict(graph.state_dict())
    assert torch.equal(qat.convert(graph)(images()), qat.convert(fresh)(images()))


def test_a_copy_trains_for_itself():
    graph = prepared("x86", 4)
    qat.learn_steps(graph)
    twin = copy.deepcopy(graph)
    before = qat.convert(twin)(images())
    train(graph)
    assert torch.equal(qat.convert(twin)(images()), before)
    train(twin)
    assert held_db(twin) >= 60


def test_accumulated_gradients_are_those_of_the_whole_batch():
    graph = prepared("x86", 4)
    qat.learn_steps(graph)
    graph.eval()
    x, wanted = images(8), torch.arange(8) % 5
    F.cross_entropy(graph(x), wanted).backward()
    whole = {name: p.grad.clone() for name, p in graph.named_parameters()}
    graph.zero_grad()
    for part in (slice(0, 4), slice(4, 8)):
        (F.cross_entropy(graph(x[part]), wanted[part]) / 2).backward()
    for name, p in graph.named_parameters():
        assert torch.allclose(p.grad, whole[name], atol=1e-5), name


def test_training_under_bfloat16_autocast_holds_in_float32():
    graph = prepared("x86", 4)
    qat.learn_steps(graph)
    optimizer = torch.optim.Adam(qat.parameters(graph, 1e-2))
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(graph(images()).float(), torch.arange(8) % 5)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in graph.parameters())
    assert held_db(graph) >= 60


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_any_optimizer_trains(optimizer):
    graph = prepared("x86", 4)
    qat.learn_steps(graph)
    made = optimizer(qat.parameters(graph, 1e-3))
    assert all(torch.isfinite(torch.tensor(train(graph, optimizer=made))))
    assert held_db(graph) >= 60


def test_frozen_parameters_stay():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
    model[0].requires_grad_(False)
    x = torch.randn(8, 16)
    graph = qat.prepare(tq.export(model, x, dynamic_shapes=BATCH), X86Quantizer(is_qat=True))
    tq.calibrate(graph, [x], progress=False)
    before = {name: p.detach().clone() for name, p in graph.named_parameters()}
    train(graph, x)
    moved = {name: not torch.equal(p, before[name]) for name, p in graph.named_parameters()}
    assert moved == {"0.weight": False, "0.bias": False, "2.weight": True, "2.bias": True}


def test_weights_that_oscillate_are_frozen_at_the_code_they_were_at_most():
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    x = torch.randn(8, 4)
    graph = qat.prepare(tq.export(model, x, dynamic_shapes=BATCH), X86Quantizer(is_qat=True), weights=3)
    tq.calibrate(graph, [x], progress=False)
    qat.learn_steps(graph, qat.LSQ("grid"), None)
    weight = next(p for p in graph.parameters() if p.ndim == 2)
    step = next(f for f in fakes(graph) if f.is_weight).scale.detach()
    with torch.no_grad():
        weight[0, 0] = step[0] * 1.4
    freezing = qat.Freezing(graph, 0.05, momentum=0.1)
    for i in range(20):
        with torch.no_grad():
            weight[0, 0] = step[0] * (1.4 if i % 4 else 1.6)  # codes 1, 1, 1, 2
        freezing.step()
    assert freezing.frozen == 1 / 8
    assert float(weight[0, 0]) == pytest.approx(float(step[0]), rel=1e-5)


def test_dampening_pulls_weights_to_their_codes():
    graph = prepared("x86", 3)
    qat.learn_steps(graph, qat.LSQ("grid"), None)
    before = float(qat.dampening(graph).detach())
    optimizer = torch.optim.SGD([p for p in graph.parameters() if p.ndim > 1], 0.05)
    for _ in range(20):
        optimizer.zero_grad()
        qat.dampening(graph).backward()
        optimizer.step()
    assert float(qat.dampening(graph).detach()) < before / 10


def test_dampening_is_of_the_weights_that_are_rounded():
    graph = prepared("x86", 8)
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    qat.learn_steps(graph, qat.DoReFa(), None)
    graph(images())
    count = sum(p.numel() for p in graph.parameters() if p.ndim > 1)
    widest = max(float(fake.scale.max()) for fake in fakes(graph) if fake.is_weight)
    assert float(qat.dampening(graph).detach()) <= count * (widest / 2) ** 2


@pytest.mark.slow
def test_a_compiled_graph_computes_and_learns_the_same():
    graph = prepared("x86", 4)
    qat.learn_steps(graph)
    graph.eval()
    compiled = torch.compile(graph, backend="aot_eager")
    x, wanted = images(), torch.arange(8) % 5
    F.cross_entropy(graph(x), wanted).backward()
    expected = {name: p.grad.clone() for name, p in graph.named_parameters()}
    value = graph(x).detach()
    graph.zero_grad()
    assert torch.allclose(compiled(x), value, atol=1e-5)
    F.cross_entropy(compiled(x), wanted).backward()
    for name, p in graph.named_parameters():
        assert torch.allclose(p.grad, expected[name], atol=1e-4), name


@pytest.mark.parametrize("quantizer", ["x86", "xnnpack"])
def test_a_last_batch_of_one_sample_is_trained(quantizer):
    graph = prepared(quantizer, 4)
    losses = train(graph, images(1), steps=4)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert held_db(graph) >= 60
    with torch.no_grad(), qat.evaluate(graph):
        x = images(2)
        assert torch.allclose(graph(x)[:1], graph(x[:1]), atol=1e-5)
