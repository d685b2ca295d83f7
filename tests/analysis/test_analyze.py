"""Where the error comes from: figures against the same by hand, and five broken models diagnosed."""

import json
import math

import pytest
import torch
from torch import nn
from torch.export import export
from torchao.quantization.pt2e import MinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)

import torchquant as tq
from torchquant.quantizers import X86Quantizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


def _batches(count: int = 4, width: int = 16, seed: int = 1) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(32, width, generator=generator),) for _ in range(count)]


def _calibrated(model: nn.Module, batches, quantizer=None):
    model = model.eval()
    quantizer = quantizer or X86Quantizer("static_int8")
    prepared = prepare_pt2e(export(model, batches[0], strict=True).module(), quantizer)
    tq.calibrate(prepared, batches, progress=False)
    return prepared


def test_figures_are_those_of_the_converted_graph() -> None:
    batches, model = _batches(), Net()
    prepared = _calibrated(model, batches)
    analysis = tq.analyze(prepared, batches)
    converted = tq.convert(prepared)
    assert analysis.output_db == pytest.approx(tq.compare(model, converted, batches).sqnr_db, abs=0.05)
    last = next(s for s in analysis.sites if s.site.module == "third")
    assert last.cumulative_db == pytest.approx(analysis.output_db, abs=0.5)
    assert sum(s.share for s in analysis.sites) == pytest.approx(1)
    assert all(f.severity == "note" for f in analysis.findings)


def test_alone_is_what_one_layer_alone_costs() -> None:
    """The estimate by second order, against a graph in which nothing else is quantized."""
    batches, model = _batches(8), Net()
    analysis = tq.analyze(_calibrated(model, batches), batches)
    for module in ("first", "second", "third"):
        others = [m for m in ("first", "second", "third") if m != module]
        alone = tq.convert(_calibrated(Net(), batches, X86Quantizer("static_int8", exclude=others)))
        wanted = tq.compare(model, alone, batches).sqnr_db
        site = next(s for s in analysis.sites if s.site.module == module)
        assert site.output_db == pytest.approx(wanted, abs=1.5), module


def test_activations_and_weight_add_up() -> None:
    batches = _batches()
    analysis = tq.analyze(_calibrated(Net(), batches), batches)
    assert len(analysis.sites) == 3
    for site in analysis.sites:
        assert site.weight is not None
        assert (site.weight.channels, site.weight.clipped) == (32 if site.site.module != "third" else 8, 0)
        assert 0 <= site.weight.lost < 0.1
        parts = sum(10 ** (-db / 10) for db in (site.activations_db, site.weight_db))
        assert 10 ** (-site.alone_db / 10) == pytest.approx(parts, rel=0.3)


def test_the_graph_stays_as_it_is() -> None:
    batches = _batches()
    prepared = _calibrated(Net(), batches)
    before = {name: t.clone() for name, t in prepared.state_dict().items()}
    nodes = [n.name for n in prepared.graph.nodes]
    tq.analyze(prepared, batches)
    assert [n.name for n in prepared.graph.nodes] == nodes
    assert all(torch.equal(t, before[name]) for name, t in prepared.state_dict().items())


def test_json_holds_everything_and_no_infinity() -> None:
    batches = _batches()
    analysis = tq.analyze(_calibrated(Net(), batches), batches)
    read = json.loads(analysis.to_json())
    assert len(read["sites"]) == len(analysis.sites)
    first = read["sites"][0]
    assert first["site"]["op"] == "linear"
    assert sum(first["activations"][0]["counts"]) == 4 * 32 * 16
    assert all(math.isfinite(db) for db in (first["alone_db"], first["weight_db"]))


@pytest.mark.parametrize("size", [8, 24])
def test_errors_that_add_up_in_a_mean_are_counted_so(size: int) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.c = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))

    generator = torch.Generator().manual_seed(0)
    batches = [(torch.rand(8, 3, size, size, generator=generator),) for _ in range(4)]
    analysis = tq.analyze(_calibrated(Pooled(), batches), batches)
    for module in "abc":
        others = [m for m in "abc" if m != module]
        alone = tq.convert(_calibrated(Pooled(), batches, X86Quantizer("static_int8", exclude=others)))
        wanted = tq.compare(Pooled().eval(), alone, batches).sqnr_db
        site = next(s for s in analysis.sites if s.site.module == module)
        assert site.output_db == pytest.approx(wanted, abs=2), module


def test_behind_a_rounding_there_is_no_derivative() -> None:
    class Rounded(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.third(self.second(torch.round(4 * self.first(x))))

    batches = _batches()
    analysis = tq.analyze(_calibrated(Rounded(), batches), batches)
    first = next(s for s in analysis.sites if s.site.module == "first")
    assert first.output_db is None
    assert first.share == 0
    assert "no derivative" in str(analysis)
    assert not any(f.kind == "dominant" for f in analysis.findings)


def test_an_empty_batch_takes_nothing_away() -> None:
    """As the last one of a loader may be; before, it made the estimate forget the others."""
    batches = _batches()
    model = Net().eval()
    exported = tq.export(model, batches[0], dynamic_shapes=({0: torch.export.Dim("batch", min=0)},))
    prepared = tq.prepare(exported, X86Quantizer("static_int8"))
    tq.calibrate(prepared, batches, progress=False)
    full, more = (tq.analyze(prepared, b) for b in (batches, [*batches, (torch.empty(0, 16),)]))
    assert [s.site.node for s in more.sites if s.output_db is None] == []
    for a, b in zip(full.sites, more.sites, strict=True):
        assert a.output_db == pytest.approx(b.output_db, abs=1.5)


def test_an_analysis_of_another_graph_is_refused() -> None:
    batches = _batches()
    analysis = tq.analyze(_calibrated(Net(), batches), batches)
    other = _calibrated(nn.Sequential(nn.Linear(16, 4)), batches)
    with pytest.raises(tq.InputError, match="another graph"):
        tq.report(other, analysis=analysis)
    with pytest.raises(tq.InputError, match="analyze returned"):
        tq.report(other, analysis=5)


# five broken models --------------------------------------------------------------------------------------------------


def _first(analysis: tq.Analysis) -> tq.Finding:
    assert analysis.findings, str(analysis)
    return analysis.findings[0]


def test_outlier_weights_are_named() -> None:
    model, batches = Net(), _batches()
    with torch.no_grad():
        model.second.weight[3] *= 300
        model.third.weight[:, 3] /= 300
    finding = _first(tq.analyze(_calibrated(model, batches, PerTensor()), batches))
    assert (finding.kind, finding.module) == ("outlier weights", "second")
    assert "each channel" in finding.remedy


def test_a_saturating_activation_is_named() -> None:
    batches = _batches()
    prepared = _calibrated(Net(), batches)
    larger = [(4 * x,) for (x,) in _batches(seed=2)]
    finding = _first(tq.analyze(prepared, larger))
    assert finding.kind == "clipped"
    assert "calibrate" in finding.remedy


def test_a_matmul_that_nobody_annotated_is_named() -> None:
    class Product(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y @ y.transpose(0, 1)

    batches = _batches()
    with pytest.warns(tq.TorchquantWarning, match="left 1 compute ops float"):
        prepared = _calibrated(Product(), batches, PerTensor())
    finding = _first(tq.analyze(prepared, batches))
    assert (finding.kind, finding.severity) == ("missed", "error")
    assert finding.site.startswith("matmul")


@pytest.mark.parametrize(("scale", "zero_point", "kind"), [(0.02, 0, "clipped"), (1.0, 128, "grid too wide")])
def test_a_wrong_spec_is_named(scale: float, zero_point: int, kind: str) -> None:
    """A grid of one sign under data of both, and one far wider than the data."""
    spec = FixedQParamsQuantizationSpec(torch.uint8, scale, zero_point, 0, 255, torch.per_tensor_affine)
    batches = _batches()
    finding = _first(tq.analyze(_calibrated(Net(), batches, PerTensor(spec)), batches))
    assert (finding.kind, finding.severity) == (kind, "error")
    assert kind != "clipped" or "sign" in finding.remedy


@pytest.mark.parametrize("mask", [-1e9, torch.finfo(torch.float32).min / 2])
def test_a_mask_inside_an_int8_range_is_named(mask: float) -> None:
    class Masked(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = self.second(torch.relu(self.first(x)))
            masked = (torch.arange(32) < 4).float() * mask
            return self.third(torch.softmax(scores + masked, -1))

    batches = _batches()
    prepared = _calibrated(
        Masked(), batches, PerTensor(ops=(torch.ops.aten.linear.default, torch.ops.aten.softmax.int))
    )
    finding = _first(tq.analyze(prepared, batches))
    assert finding.kind == "hidden by large values"
    assert "inf dB" not in finding.message


class PerTensor(Quantizer):
    """One scale for each tensor, and nothing but the ops it is told."""

    def __init__(self, activation: QuantizationSpec | None = None, ops=(torch.ops.aten.linear.default,)) -> None:
        super().__init__()
        self._ops = ops
        self._weight = QuantizationSpec(torch.int8, MinMaxObserver, -128, 127, torch.per_tensor_symmetric)
        self._activation = activation or QuantizationSpec(
            torch.int8, MinMaxObserver, -128, 127, torch.per_tensor_affine
        )

    def annotate(self, model):
        for node in model.graph.nodes:
            if node.op == "call_function" and node.target in self._ops:
                specs = {node.args[0]: self._activation}
                if node.target is torch.ops.aten.linear.default:
                    specs[node.args[1]] = self._weight
                node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)
        return model

    def validate(self, model) -> None:
        pass


@pytest.mark.parametrize("what", ["converted", "empty", "module"])
def test_what_cannot_be_analyzed_is_refused(what: str) -> None:
    batches = _batches()
    prepared = _calibrated(Net(), batches)
    if what == "empty":
        with pytest.raises(tq.CalibrationError, match="no calibration batch"):
            tq.analyze(prepared, [])
        return
    with pytest.raises(tq.InputError, match=r"before convert_pt2e"):
        tq.analyze(tq.convert(prepared) if what == "converted" else Net(), batches)
