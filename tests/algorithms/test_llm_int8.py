"""LLM.int8: the float function stays the same, outlying channels stay float, and the graph still exports and lowers."""

import pytest
import torch
import torch.nn.functional as F
from foreign import SpecQuantizer, dynamic, per_channel, per_tensor
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import torchquant as tq
from torchquant.algorithms.llm_int8 import LLMInt8
from torchquant.backends import inductor_x86
from torchquant.calibration.calibrate import Recorder, recalibrate
from torchquant.fx import passes
from torchquant.quantizers import WeightOnlyQuantizer
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer

OUTLIERS = (3, 17)


class Net(nn.Module):
    """Two channels of the normalization are 60 times too large; three linears read it, and one what they make."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.up = nn.Linear(32, 48), nn.Linear(32, 48, bias=False), nn.Linear(32, 48)
        self.down = nn.Linear(48, 8)
        with torch.no_grad():
            self.norm.weight[list(OUTLIERS)] *= 60

    def forward(self, x):
        y = self.norm(x)
        return self.down(torch.tanh(self.q(y)) * torch.tanh(self.k(y)) + F.relu(self.up(y)).clamp(max=3))


QUANTIZERS = {
    "x86": X86Quantizer,
    "x86 dynamic": lambda: X86Quantizer("dynamic_int8"),
    "xnnpack dynamic": XnnpackQuantizer,
    "torchao": lambda: X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config()),
    "foreign": lambda: SpecQuantizer(("linear",), per_tensor(), per_channel()),
    "foreign dynamic": lambda: SpecQuantizer(("linear",), dynamic(), per_channel()),
}
BATCHES = [(torch.randn(16, 32, generator=torch.Generator().manual_seed(s)),) for s in range(3)]


def prepared_of(quantizer="x86", net=None):
    torch.manual_seed(0)
    net = (net or Net()).eval()
    prepared = prepare_pt2e(torch.export.export(net, BATCHES[0]).module(), QUANTIZERS[quantizer]())
    tq.calibrate(prepared, BATCHES, progress=False)
    return prepared, net


def float_outputs(prepared):
    run = Recorder(prepared, {}, observe=False)
    with torch.no_grad():
        return torch.cat([run(*b).flatten() for b in BATCHES])


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_float_function_stays_the_same_and_the_outputs_are_closer(quantizer):
    prepared, net = prepared_of(quantizer)
    twin, before = passes.copy_graph(prepared), float_outputs(prepared)
    algorithm = LLMInt8()
    assert algorithm.transform(prepared, BATCHES) == 3
    assert (float_outputs(prepared) - before).norm() <= 1e-5 * before.norm()
    assert torch.equal(float_outputs(twin), before)
    recalibrate(prepared, BATCHES, progress=False)
    x = torch.randn(16, 32)  # held out
    plain, split = (tq.sqnr_db(net(x), tq.convert(graph)(x)) for graph in (twin, prepared))
    assert split > plain + 6
    assert all(note.endswith("no channel reaches 6.0") for note in algorithm.notes)


def test_the_columns_are_those_that_reach_the_threshold_and_their_weights_are_float():
    prepared, net = prepared_of()
    x = torch.cat([net.norm(b).detach() for (b,) in BATCHES])
    expected = (x.abs().amax(0) >= 6.0).nonzero().flatten()
    assert set(expected.tolist()) == set(OUTLIERS)
    result = tq.optimize(prepared, BATCHES, [LLMInt8()], progress=False)
    assert result.steps[-1][2]
    (columns,) = [b for n, b in prepared.named_buffers() if n.endswith("_outliers")]
    assert torch.equal(columns, expected)
    sides = {n: p for n, p in prepared.named_parameters() if "outlier_weight" in n}
    assert len(sides) == 3
    assert any(torch.equal(p, net.q.weight[:, columns]) for p in sides.values())
    model = tq.convert(prepared)
    excluded = [s for s in tq.report(model).sites if s.status == "excluded"]
    assert [s.reason for s in excluded] == ["LLMInt8: 2 of 32 input channels are outliers"] * 3


def test_it_lowers_with_all_int8_kernels_and_saves(tmp_path):
    prepared, net = prepared_of()
    tq.optimize(prepared, BATCHES, [LLMInt8()], progress=False)
    model = tq.convert(prepared)
    tq.save(model, tmp_path / "model.pt2", BATCHES[0])
    assert torch.equal(tq.load(tmp_path / "model.pt2")(*BATCHES[0]), model(*BATCHES[0]))
    program = inductor_x86.lower(model, BATCHES[0])
    assert program.proof.fused == program.proof.annotated == 4
    assert tq.sqnr_db(net(*BATCHES[0]), program(*BATCHES[0])) > 25


def test_what_is_left_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.wide, self.calm = nn.Conv1d(4, 32, 1), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.conv(x.reshape(-1, 4, 8))
            return self.calm(torch.tanh(self.wide(100 * y)))

    prepared, _ = prepared_of(net=Odd())
    algorithm = LLMInt8()
    assert algorithm.transform(prepared, BATCHES) == 0
    assert algorithm.notes == [
        "conv1d: left as it is: only linears are split",
        "mul: left as it is: 8 of 8 channels reach 6.0, more than a few",
        "tanh: left as it is: no channel reaches 6.0",
    ]
    weights = tq.prepare(tq.export(Net().eval(), BATCHES[0]), WeightOnlyQuantizer("w4_g16"))
    tq.calibrate(weights, BATCHES, progress=False)
    algorithm.transform(weights, BATCHES)
    assert algorithm.notes[0] == "linear: left as it is: its input is not quantized"


def test_readers_that_share_an_observer_with_others_get_their_own():
    class Shared(Net):
        def forward(self, x):
            y = self.norm(x)
            return self.down(torch.tanh(self.q(y)) * self.k(y).sigmoid()) + y.sum(-1, keepdim=True)

    prepared, _ = prepared_of("foreign", Shared())
    before = float_outputs(prepared)
    assert LLMInt8().transform(prepared, BATCHES) == 2
    assert torch.allclose(float_outputs(prepared), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantizer", ["torchao", "foreign dynamic"])
def test_a_linear_that_reads_a_split_one_reads_the_sum_of_its_products(quantizer):
    torch.manual_seed(1)
    net = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16, bias=False), nn.Linear(16, 8))
    prepared, _ = prepared_of(quantizer, net)
    before = float_outputs(prepared)
    assert LLMInt8(0.5, share=1.0).transform(prepared, BATCHES) == 2
    assert torch.allclose(float_outputs(prepared), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("argument", "message"), [({"threshold": 0}, "threshold is 0"), ({"share": 1.5}, "share is 1.5")]
)
def test_arguments_out_of_range_are_refused(argument, message):
    with pytest.raises(tq.InputError, match=message):
        LLMInt8(**argument)
