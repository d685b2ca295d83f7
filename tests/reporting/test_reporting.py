"""The report: coverage, statuses, reasons, bytes; and programs beside it."""

import nets
import pytest
import torch
from foreign import SpecQuantizer, per_channel, per_tensor

import torchquant as tq
from torchquant.lowering.accounts import accountable_sites
from torchquant.lowering.proof import hold_against
from torchquant.quantizers.x86 import X86Quantizer


@pytest.fixture
def quantized():
    batch = nets.token_batch()
    return tq.quantize(
        nets.MaskedTokens(), batch, [batch], quantizer=X86Quantizer(exclude=["out"]), algorithms=(), progress=False
    )


def test_the_summary_counts_every_compute_op_by_status(quantized):
    report = tq.report(quantized)
    assert report.coverage == "3/8"
    assert report.count("quantized", compute=True) == 3
    assert report.count("excluded", compute=True) == 1
    assert report.count("unsupported", compute=True) == 4
    assert "3/8 (1 excluded, 3 quantized, 4 unsupported)" in report.summary()


def test_the_table_names_node_module_grid_and_reason(quantized):
    text = str(tq.report(quantized))
    row = next(line for line in text.splitlines() if line.startswith("linear ") and "query" in line)
    assert "uint8[0,255] per tensor" in row
    assert "int8[-127,127] per channel 0" in row
    assert any("excluded by the user" in line for line in text.splitlines() if line.startswith("linear_3"))


def test_weight_bytes_are_those_the_graph_reads():
    x = torch.randn(2, 8)
    quantized = tq.quantize(nets.mlp(), x, [x], quantizer=X86Quantizer(), algorithms=(), progress=False)
    codes, biases, channels = 8 * 16 + 16 * 4, 4 * (16 + 4), 16 + 4
    scales_and_points = tq.report(quantized).weight_bytes - codes - biases
    assert scales_and_points in (channels * 8, channels * 12)  # float32 scales, int32 or int64 zero points


def test_a_report_is_written_whole_with_the_versions(quantized, tmp_path):
    path = tq.report(quantized).save(tmp_path / "report.txt")
    assert path.read_text().splitlines()[-1].startswith("made by torchquant ")
    assert [p.name for p in tmp_path.iterdir()] == ["report.txt"]


def test_only_graphs_are_reported_on():
    with pytest.raises(tq.InputError, match="Linear"):
        tq.report(torch.nn.Linear(2, 2))


def test_our_own_missed_op_stops_a_lowering_and_a_foreign_one_warns():
    x = torch.randn(4, 8)
    foreign = tq.prepare(tq.export(nets.mlp(), x), _first_only())
    with pytest.warns(tq.TorchquantWarning):
        tq.calibrate(foreign, [x], progress=False)
    foreign = tq.convert(foreign)
    with pytest.warns(tq.TorchquantWarning, match=r"1 compute ops were left float without a reason: linear linear_1"):
        accountable_sites(foreign, [], ())
    assert accountable_sites(foreign, ["node:linear_1"], ())[1] == {"linear_1"}
    ours = tq.quantize(nets.mlp(), x, [x], quantizer=X86Quantizer(exclude=["2"]), algorithms=(), progress=False)
    for node in ours.graph.nodes:
        if node.name == "linear_1":
            node.meta["custom"] = {}
    with pytest.raises(tq.LoweringError, match="linear_1"):
        accountable_sites(ours, [], ())


def _first_only():
    quantizer = SpecQuantizer({"linear"}, per_tensor(), per_channel())
    annotate = quantizer.annotate

    def limited(model):
        annotate(model)
        last = [n for n in model.graph.nodes if n.target is torch.ops.aten.linear.default][-1]
        del last.meta["quantization_annotation"]
        return model

    quantizer.annotate = limited
    return quantizer


@pytest.mark.parametrize("state", ["float", "prepared"])
def test_lowering_takes_a_converted_graph_only(state):
    x = torch.randn(4, 8)
    graph = tq.export(nets.mlp(), x)
    graph = tq.prepare(graph, X86Quantizer()) if state == "prepared" else graph
    with pytest.raises(tq.InputError, match="converted graph"):
        accountable_sites(graph, [], ())


BOUND = {"min_sqnr_db": 40.0, "op_error": 1e-7, "target": "test"}


def test_an_artefact_off_its_reference_is_refused_and_a_close_one_is_not():
    x = torch.randn(4, 8)
    graph = tq.export(nets.mlp(), x)
    assert hold_against(graph, graph, [x], **BOUND).comparison.sqnr_db > 100
    verdict = hold_against(graph, lambda v: graph(v) * 1.001, [x], **BOUND)
    assert verdict.comparison.sqnr_db == pytest.approx(60, abs=0.1)
    for wrong in (lambda v: graph(v) * 1.1, lambda v: graph(v) * float("nan"), lambda v: graph(v)[:1]):
        with pytest.raises(tq.LoweringError, match=r"the artefact"):
            hold_against(graph, wrong, [x], **BOUND)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_a_reference_that_is_not_finite_proves_nothing(value):
    x = torch.randn(4, 8)
    graph = tq.export(
        nets.Call(lambda m, x: torch.cat([m.inner(x), torch.full((4, 1), value)], 1), inner=nets.mlp()), x
    )
    with pytest.raises(tq.LoweringError):
        hold_against(graph, lambda v: torch.zeros(4, 5), [x], **BOUND)
