"""Converted graphs and programs analyzed: the figures of the prepared graph, whoever wrote the Quantizer."""

import math

import pytest
import torch
from foreign import SpecQuantizer, calibrated, dynamic, groupwise, per_channel, per_tensor
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

import torchquant as tq
from torchquant.backends import inductor_x86
from torchquant.fx.passes import copy_graph
from torchquant.quantizers import X86Quantizer, XnnpackQuantizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 8, bias=False)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-1, 1)
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.second(torch.relu(self.first(x)))


def _batches(count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 3, 8, 8, generator=generator),) for _ in range(count)]


QUANTIZERS = {
    "x86": X86Quantizer,
    "x86 dynamic": lambda: X86Quantizer("dynamic_int8"),
    "x86 few bits": lambda: X86Quantizer("w4_g16", overrides={"op:conv2d": "static_int8"}),
    "xnnpack": XnnpackQuantizer,
    "per tensor": lambda: SpecQuantizer({"conv2d", "linear"}, per_tensor(), per_tensor(symmetric=True, low=-127)),
    "outputs": lambda: SpecQuantizer({"conv2d", "linear"}, per_tensor(), per_channel(), per_tensor()),
    "dynamic": lambda: SpecQuantizer({"linear"}, dynamic(), per_channel()),
    "groups": lambda: SpecQuantizer({"linear"}, None, groupwise(8)),
}


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("convert", [tq.convert, convert_pt2e])
@pytest.mark.parametrize("algorithms", [(), (tq.BiasCorrection(),)])
@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
def test_a_converted_graph_has_the_figures_of_the_prepared_one(name: str, convert, algorithms) -> None:
    model, batches = Net().eval(), _batches()
    prepared = calibrated(model, batches, QUANTIZERS[name]())
    if algorithms:
        tq.optimize(prepared, batches, algorithms, progress=False)
    wanted = tq.analyze(prepared, batches)
    exported = tq.export(model, batches[0])
    got = tq.analyze(convert(copy_graph(prepared)), batches, reference=exported)
    assert got.output_db == pytest.approx(wanted.output_db, abs=0.1)
    # converted ops that nothing quantizes are sites in neither
    sites = {s.site.node: s for s in got.sites}
    for site in wanted.sites:
        if not site.site.compute:
            continue
        twin = sites[site.site.node]
        for figure in ("alone_db", "activations_db", "weight_db", "cumulative_db"):
            assert getattr(twin, figure) == pytest.approx(getattr(site, figure), abs=0.2), (site.site.node, figure)
        if site.output_db is not None:
            assert twin.output_db == pytest.approx(site.output_db, abs=3)
    assert got.stages[0].name == "quantized"
    assert got.stages[0].float_db == pytest.approx(got.output_db, abs=0.1)


def test_float_against_converted_against_lowered() -> None:
    model, batches = Net().eval(), _batches()
    exported = tq.export(model, batches[0])
    quantized = tq.quantize(exported, batches[0], batches, quantizer=X86Quantizer(), algorithms=(), progress=False)
    program = inductor_x86.lower(quantized, batches[0], progress=False)
    analysis = tq.analyze(quantized, batches, reference=exported, programs=[program])
    converted, lowered = analysis.stages
    assert (converted.name, lowered.name) == ("quantized", "inductor_x86")
    assert lowered.float_db == pytest.approx(tq.compare(model, program, batches).sqnr_db, abs=0.01)
    assert lowered.graph_db == pytest.approx(tq.compare(quantized, program, batches).sqnr_db, abs=0.01)
    assert "inductor_x86: " in str(analysis)
    alone = tq.analyze(program, batches, reference=exported)
    assert alone.output_db == lowered.float_db
    assert alone.sites == ()
    tq.report(quantized, program, analysis=analysis)


def test_a_program_that_is_worse_than_its_graph_is_a_finding() -> None:
    from torchquant.analysis.stages import Stage, stage_findings

    stages = [Stage("quantized", 30.0, math.inf, 1.0), Stage("good", 29.5, 60.0, 1.0), Stage("bad", 20.0, 21.0, 0.9)]
    (finding,) = stage_findings(stages)
    assert finding.severity == "error"
    assert "bad is 20.0 dB from float, its graph 30.0" in finding.message


def test_rewritten_weights_and_other_models_are_refused() -> None:
    model, batches = Net().eval(), _batches()
    exported = tq.export(model, batches[0])
    quantized = tq.quantize(exported, batches[0], batches, quantizer=X86Quantizer(), algorithms=(), progress=False)
    other = Net().eval()
    with torch.no_grad():
        other.first.weight.normal_()
    with pytest.raises(tq.InputError, match=r"linear reads is not what"):
        tq.analyze(quantized, batches, reference=tq.export(other, batches[0]))
    with torch.no_grad():  # as SmoothQuant does, by hand: the function stays, the weights do not
        smooth = Net().eval()
        smooth.first.weight.mul_(2)
        smooth.first.bias.mul_(2)
        smooth.second.weight.div_(2)
    rewritten = tq.quantize(smooth, batches[0], batches, quantizer=X86Quantizer(), algorithms=(), progress=False)
    with pytest.raises(tq.InputError, match="Analyze the prepared graph"):
        tq.analyze(rewritten, batches, reference=exported)
    with pytest.raises(tq.InputError, match="reference=exported"):
        tq.analyze(quantized, batches)
    with pytest.raises(tq.InputError, match="is the float graph"):
        tq.analyze(quantized, batches, reference=model)
    with pytest.raises(tq.InputError, match=r"write \[program\]|lower\(\) or load"):
        tq.analyze(quantized, batches, reference=exported, programs=[5])


@pytest.mark.parametrize("seed", ["a", 1.5, -1, None, True])
def test_a_seed_is_a_whole_number(seed) -> None:
    model, batches = Net().eval(), _batches(1)
    with pytest.raises(tq.InputError, match="seed is a whole number"):
        tq.analyze(calibrated(model, batches, X86Quantizer()), batches, seed=seed)
