"""The stream: both flows in one walk, equal to running the graph, whatever the memory."""

from pathlib import Path

import nets
import pytest
import torch
from foreign import EveryKind, EverySpec, SpecQuantizer, calibrated, per_channel, per_tensor
from nets import Call
from torch import nn

import torchquant as tq
from torchquant.calibration import store as store_module
from torchquant.calibration.evaluator import Evaluator
from torchquant.calibration.stream import Store, Stream
from torchquant.fx.blocks import blocks, data_order, layers

QUANTIZER = SpecQuantizer(("conv2d", "linear", "conv_transpose2d"), per_tensor(torch.uint8, 0, 255), per_channel())


def walked(prepared, batches, spans, **options):
    """The stream after a walk, and for each span its inputs, targets, outputs and error."""
    stream, seen = Stream(prepared, batches, **options), []
    for task in stream.walk(spans):
        evaluator = task.evaluator()
        for batch in range(task.count):
            inputs = [list(task.inputs(batch, flow).values()) for flow in ("float", "quantized")]
            seen.append((inputs, task.targets(batch), task.outputs(batch, evaluator), task.error()))
    return stream, seen


def assert_same(a, b):
    assert torch.utils._pytree.tree_structure(a) == torch.utils._pytree.tree_structure(b)
    pairs = zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True)
    assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize(
    ("make", "sample"),
    [
        (nets.cnn, lambda: (torch.randn(2, 3, 8, 8),)),
        (nets.Block, lambda: (torch.randn(2, 8, 32),)),
        (nets.MaskedTokens, nets.token_batch),
        (nets.Pixels, lambda: (torch.randn(2, 4, 8, 8),)),
        (nets.Mobile, lambda: (torch.randn(2, 3, 16, 16),)),
        (nets.Shared, lambda: (torch.randn(2, 3, 8, 8),)),
    ],
)
def test_the_float_flow_is_the_float_model_at_every_span(make, sample):
    model, batches = make().eval(), [sample() for _ in range(2)]
    prepared = calibrated(model, batches, QUANTIZER)
    stream = Stream(prepared, batches)
    spans, behind = layers(prepared), prepared.graph.find_nodes(op="output")[0].all_input_nodes[0]
    for task in stream.walk(spans):
        inputs = [task.inputs(0, "float")[n] for n in task.span.sites[0].all_input_nodes[:1]]
        with torch.no_grad():
            env = dict(zip(prepared.graph.find_nodes(op="placeholder"), batches[0], strict=True))
            Evaluator(prepared, "float").run(data_order(prepared), env)
            exact = model(*batches[0])
        assert torch.allclose(env[behind], exact, rtol=1e-5, atol=1e-5)
        assert torch.equal(env[task.span.sites[0].args[0]], inputs[0])
        assert torch.equal(env[task.results[0]], task.targets(0)[0])
    assert stream.signal == pytest.approx(sum(float(model(*b).detach().square().sum()) for b in batches), rel=1e-4)


def in_place(m, x):
    y = m.a(x)
    y.relu_()
    z = m.b(y)
    z.add_(y)
    kept = z * 2
    z.mul_(0.5)
    return m.c(z) + kept + y


@pytest.mark.parametrize("spans", [layers, blocks, lambda prepared: []])
def test_who_reads_a_tensor_after_an_in_place_op_reads_its_result(spans):
    model = Call(in_place, a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 8)).eval()
    batches = [torch.randn(4, 8) for _ in range(2)]
    exact = [model(b).detach() for b in batches]
    prepared = calibrated(model, batches, QUANTIZER)
    stream, _ = walked(prepared, batches, spans(prepared))
    assert stream.signal == pytest.approx(sum(float(e.square().sum()) for e in exact), rel=1e-5)
    assert all(torch.allclose(prepared(b), e, atol=1e-6) for b, e in zip(batches, exact, strict=True))
    converted = tq.convert(prepared)
    noise = sum(float((converted(b) - e).square().sum()) for b, e in zip(batches, exact, strict=True))
    assert stream.noise == pytest.approx(noise, rel=1e-3)


def test_the_callers_batches_are_not_changed_by_in_place_ops():
    model = Call(lambda m, x: m.a((x * 1).relu_().add_(1)), a=nn.Linear(8, 4)).eval()
    batches = [torch.randn(4, 8)]
    before = batches[0].clone()
    prepared = calibrated(model, batches, QUANTIZER)
    walked(prepared, batches, layers(prepared))
    assert torch.equal(batches[0], before)


def folders(tmp_path):
    return [p for p in tmp_path.iterdir() if p.name.startswith("torchquant-")]


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_store_over_its_budget_spills_to_disk_and_gives_back_equal_values(temporary):
    store, values = Store(budget_bytes=1000), {}
    for key in range(10):
        values[key] = (torch.randn(10, 10), [torch.arange(3), torch.randn(2).bfloat16()])
        store.put(key, values[key])
    assert store.spilled_bytes > 0
    [folder] = folders(temporary)
    assert len(list(folder.iterdir())) == 8
    for key, value in values.items():
        assert key in store
        assert_same(store.get(key), value)
    store.drop(0)
    assert 0 not in store
    assert len(list(folder.iterdir())) == 7
    store.close()
    assert not folders(temporary)
    assert 5 not in store


def test_a_store_within_its_budget_writes_nothing(temporary):
    store = Store(budget_bytes=1000)
    store.put("a", torch.randn(10, 10))
    store.put("b", torch.randn(10, 10))
    assert store.spilled_bytes == 0
    assert not folders(temporary)


def test_a_value_above_the_whole_budget_lies_on_disk(temporary):
    store = Store(budget_bytes=100)
    value = torch.randn(10, 10)
    store.put("large", value)
    assert store.spilled_bytes == 400
    assert not store._kept
    assert torch.equal(store.get("large"), value)
    store.put("small", torch.zeros(10))
    assert store.spilled_bytes == 400


@pytest.mark.skipif(not store_module.CAN_GIVE_BACK, reason="another C library than glibc")
@pytest.mark.parametrize(("budget_bytes", "goes_back"), [(1 << 20, True), (1 << 30, False), (None, False)])
def test_holes_go_back_to_the_system_where_the_process_has_grown_by_more_than_the_budget(budget_bytes, goes_back):
    store = Store(budget_bytes)
    blocks_of_memory = [torch.ones(25_000) for _ in range(1000)]
    del blocks_of_memory[::2]
    grown = store_module._resident_bytes()
    store.put("key", torch.zeros(1))
    freed = grown - store_module._resident_bytes()
    assert freed > 30e6 if goes_back else freed < 5e6


def test_a_view_keeps_no_larger_tensor_alive():
    store = Store()
    store.put("row", torch.randn(1000, 10)[3])
    assert store.get("row").untyped_storage().nbytes() == 40


@pytest.mark.parametrize("spans", [layers, blocks])
def test_a_walk_with_one_byte_of_memory_gives_the_same_answers(spans, temporary):
    model, batches = EveryKind(), [torch.randn(2, 4, 8, 8) for _ in range(2)]
    prepared = calibrated(model, batches, EverySpec())
    plain, seen = walked(prepared, batches, spans(prepared))
    tight, again = walked(prepared, batches, spans(prepared), budget_bytes=1)
    assert plain.store.spilled_bytes == 0
    assert tight.store.spilled_bytes > 0
    assert_same(seen, again)
    assert (plain.signal, plain.noise) == (tight.signal, tight.noise)
    assert not folders(temporary)


def test_the_folder_goes_also_when_the_caller_stops_in_between(temporary):
    batches = [torch.randn(2, 8) for _ in range(3)]
    prepared = calibrated(nets.mlp(), batches, QUANTIZER)
    walk = Stream(prepared, batches, budget_bytes=1).walk(layers(prepared))
    next(walk)
    assert folders(temporary)
    walk.close()
    assert not folders(temporary)


def test_values_that_nobody_reads_any_more_are_freed():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
    batches = [torch.randn(2, 8) for _ in range(2)]
    prepared = calibrated(model, batches, QUANTIZER)
    stream, live = Stream(prepared, batches), []
    for _ in stream.walk(layers(prepared)):
        live.append(len({key for key in stream.store._kept if key[0] == "float"}))
    assert max(live) <= 3 * len(batches)  # what the span reads and what it makes
    assert not stream.store._kept


def test_sensitivities_are_freed_with_the_values_they_belong_to():
    batches = [torch.randn(2, 8) for _ in range(2)]
    prepared = calibrated(nets.mlp(), batches, QUANTIZER)
    stream, spans = Stream(prepared, batches), layers(prepared)
    stream.sensitivities(spans, seed=0)
    left = []
    for _ in stream.walk(spans):
        left.append(sum(key[0] == "sensitivity" for key in stream.store._kept))
    assert left[0] > left[-1] > 0
    assert not stream.store._kept


def test_a_solvers_change_reaches_the_rest_of_the_walk():
    batches = [torch.randn(4, 8)]
    prepared = calibrated(nets.mlp(), batches, QUANTIZER)
    stream, first, second = Stream(prepared, batches), *layers(prepared)
    for task in stream.walk([first, second]):
        if task.span is first:
            bias = task.prepared.get_parameter("0.bias")
            bias.data += 100  # a spoiled quantized flow; the float flow of this span has been taken already
        else:
            exact, quantized = (task.inputs(0, flow)[task.span.sites[0].args[0]] for flow in ("float", "quantized"))
            assert (quantized - exact).abs().mean() > 0.5


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_quantized_value_that_is_no_number_counts_where_the_float_one_is(value):
    batches = [torch.randn(4, 8)]
    prepared = calibrated(nets.mlp(), batches, QUANTIZER)
    stream, last = Stream(prepared, batches), layers(prepared)[-1]
    for task in stream.walk([last]):
        before = task.error()
        task.prepared.get_parameter("2.bias").data[0] = value
        assert before < 1e3
        assert not task.error() <= before
