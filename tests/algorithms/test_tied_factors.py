"""Factors of tied tensors: the same float function, additions that stay integer ops, outliers that cost less."""

import foreign
import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from nets import Call
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import torchquant as tq
from torchquant.algorithms.channels import tied_factors
from torchquant.algorithms.channels.tied_factors import smooth_ties, spread
from torchquant.calibration.calibrate import Recorder, recalibrate
from torchquant.calibration.stream import Stream
from torchquant.fx import ops
from torchquant.fx.ties import ties_of

pytestmark = pytest.mark.filterwarnings("ignore:the Quantizer left:torchquant.errors.TorchquantWarning")


def executorch():
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


def symmetric():
    return foreign.SpecQuantizer(("linear", "add"), foreign.per_tensor(low=-127, symmetric=True), foreign.per_channel())


def block(factor=60.0):
    """A residual block with one channel far larger than the others, in front of a LayerNorm, as in BERT."""
    torch.manual_seed(0)
    model = Call(
        lambda m, x: m.head(m.after((y := m.before(x)) + m.down(m.up(y).relu()))),
        **{"before": nn.LayerNorm(16), "up": nn.Linear(16, 32), "down": nn.Linear(32, 16)},
        **{"after": nn.LayerNorm(16), "head": nn.Linear(16, 8)},
    ).eval()
    with torch.no_grad():
        model.down.weight[3] *= factor
        model.after.weight[3] /= factor
    return model, [torch.randn(16, 4, 16) for _ in range(3)]


def prepared_of(model, batches, make=executorch):
    prepared = prepare_pt2e(torch.export.export(model, (batches[0],)).module(), make())
    recalibrate(prepared, batches, progress=False)
    return prepared


def output(prepared, batch):
    with torch.no_grad():
        return Recorder(prepared, {}, observe=False)(batch)


def sqnr_db(model, prepared, batches):
    recalibrate(prepared, batches, progress=False)
    return tq.compare(model, convert_pt2e(prepared), [torch.randn(16, 4, 16) for _ in range(3)]).sqnr_db


@pytest.mark.parametrize("make", [executorch, symmetric])
def test_the_float_function_stays_and_an_outlier_in_a_sum_costs_several_db_less(make):
    model, batches = block()
    plain = sqnr_db(model, prepared_of(model, batches, make), batches)
    prepared = prepared_of(model, batches, make)
    before = output(prepared, batches[0])
    changed, notes = smooth_ties(prepared, batches)
    assert changed
    assert not notes
    assert (output(prepared, batches[0]) - before).norm() <= 1e-5 * before.norm()
    assert sqnr_db(model, prepared, batches) > plain + 6


def test_additions_read_and_make_quantized_tensors_as_before():
    model, batches = block()
    prepared = prepared_of(model, batches)
    assert smooth_ties(prepared, batches)[0]
    recalibrate(prepared, batches, progress=False)
    converted = convert_pt2e(prepared)
    adds = [n for n in converted.graph.nodes if ops.op_name(n) == "add"]
    assert len(adds) == 1
    for add in adds:
        assert all(ops.is_dequantize(operand) for operand in add.args[:2])
        assert all(ops.is_quantize(user) for user in add.users)
    inserted = [n for n in converted.graph.nodes if "SmoothQuant" in str(n.meta.get("custom"))]
    assert all(ops.is_dequantize(n.args[0]) for n in inserted)  # behind what is quantized


def test_without_explicit_ops_a_sum_in_front_of_a_normalization_stays():
    model, batches = block()
    prepared = prepared_of(model, batches)
    changed, notes = smooth_ties(prepared, batches, explicit=False)
    assert changed == 0
    assert "nothing takes up the factor" in notes[0]


def test_no_op_is_inserted_where_it_would_gain_nothing():
    model, batches = block(factor=1.0)
    prepared = prepared_of(model, batches)
    noises = measured(prepared, batches)
    for noise in noises:
        s = tied_factors._search(noise)
        assert noise(s) <= noise(torch.ones_like(s))


def test_an_embedding_and_a_parameter_get_ops_of_their_own():
    model = Call(
        lambda m, x: m.head(m.norm(m.words(x) + m.offset)),
        words=nn.Embedding(50, 16),
        offset=nn.Parameter(torch.randn(16)),
        norm=nn.LayerNorm(16),
        head=nn.Linear(16, 4),
    ).eval()
    with torch.no_grad():
        model.words.weight[:, 5] *= 100
    batches = [torch.randint(0, 50, (8, 6)) for _ in range(3)]
    prepared = prepared_of(model, batches)
    before = output(prepared, batches[0])
    assert smooth_ties(prepared, batches)[0]
    assert (output(prepared, batches[0]) - before).norm() <= 1e-5 * before.norm()
    inserted = [n for n in prepared.graph.nodes if "SmoothQuant" in str(n.meta.get("custom"))]
    assert {"embedding", "offset"} <= {n.args[0].name for n in inserted}


def measured(prepared, batches):
    return tied_factors._measure(prepared, [t for t in ties_of(prepared) if not t.reason], batches, 0)


def test_the_predicted_noise_is_what_rounding_adds_to_the_output():
    model, batches = block(factor=4.0)
    prepared = prepared_of(model, batches[:2])
    (noise,) = [n for n in measured(prepared, batches[:2]) if len(n.activations) == 3]
    predicted = sum(a.noise(torch.ones_like(a.low)) for a in noise.activations)
    tie = next(t for t in ties_of(prepared) if t.is_sum)
    stream, squared_error = Stream(prepared, batches[:2]), 0.0
    tied = {str(o.target) for o in tie.observers}
    everything = [n for n in prepared.graph.nodes if n.op == "call_module"]
    free = {str(n.target): (lambda x: x) for n in everything if str(n.target) not in tied}
    weights = {n: prepared.get_parameter(n.args[0].target) for n in everything if n.args[0].op == "get_attr"}
    with torch.no_grad():
        for batch in batches[:2]:
            env = {next(n for n in prepared.graph.nodes if n.op == "placeholder"): batch}
            quantized = stream.evaluator("quantized", fakes=free, weights=weights).run(stream._order, env)
            last = prepared.graph.find_nodes(op="output")[0].args[0][0]
            squared_error += float((quantized[last] - model(batch)).square().sum())
    assert 0.4 < predicted / squared_error < 2.5


def test_spread_leaves_channels_below_the_threshold_alone():
    assert spread(torch.tensor([1.0, 2.0, 16.0]), octave=2.0, exponent=1.0).tolist() == [1.0, 1.0, 4.0]
    assert spread(torch.tensor([1.0, 2.0, 16.0]), octave=2.0, exponent=0.5).tolist() == [1.0, 1.0, 2.0]
    assert spread(torch.zeros(3), octave=2.0, exponent=0.5).tolist() == [1.0, 1.0, 1.0]
