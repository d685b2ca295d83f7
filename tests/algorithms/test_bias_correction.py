"""Bias correction: its promise is that the mean output error of weight rounding is zero on the calibration data."""

from typing import ClassVar

import pytest
import torch
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import torchquant as tq
from torchquant.algorithms.bias_correction import RunningMean
from torchquant.formats import UINT8
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer
from torchquant.types import Format, Scheme, TensorSpec


class CoarseQuantizer(X86Quantizer):
    """Three-bit weights, so that rounding has a mean worth correcting."""

    schemes: ClassVar = {
        "static_int8": Scheme(
            "static_int8",
            TensorSpec(UINT8, symmetric=False),
            TensorSpec(Format("int3", torch.int8, -3, 3), symmetric=True, granularity="channel"),
        )
    }


class OneLayer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


LAYERS = {
    "conv2d with padding": (nn.Conv2d(6, 8, 3, padding=1), (4, 6, 9, 7)),
    "conv2d without bias": (nn.Conv2d(6, 8, 3, stride=2, bias=False), (4, 6, 9, 7)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (4, 6, 9, 7)),
    "conv1d": (nn.Conv1d(6, 8, 1), (4, 6, 11)),
    "linear": (nn.Linear(6, 8), (4, 6)),
    "linear on 3-D input": (nn.Linear(6, 8, bias=False), (4, 5, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_error_of_the_rounded_weight_is_zero_on_the_calibration_data(name):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    model = OneLayer(layer).eval()
    batches = [torch.rand(shape) for _ in range(4)]
    exported = tq.export(model, batches[0])

    def mean_error(algorithms):
        prepared = tq.prepare(exported, CoarseQuantizer())
        tq.calibrate(prepared, batches, progress=False)
        if algorithms:
            tq.optimize(prepared, batches, algorithms, progress=False)
        converted = tq.convert(prepared)
        axis = -1 if isinstance(layer, nn.Linear) else 1
        errors = [(converted(b) - model(b)).movedim(axis, 0).flatten(1) for b in batches]
        return torch.cat(errors, 1).mean(1).abs().max()

    plain, corrected = mean_error([]), mean_error([tq.BiasCorrection()])
    assert plain > 0.01
    assert corrected < 0.1 * plain  # what is left comes from rounding the activations


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize("quantizer", [XnnpackQuantizer, X86Quantizer])
def test_it_never_ends_below_the_plain_result_on_the_calibration_data(quantizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    batches = [torch.randn(2, 3, 8, 8) for _ in range(4)]
    found = []
    for algorithms in ((), (tq.BiasCorrection(),)):
        exported = tq.export(model, batches[0])
        converted = tq.quantize(
            exported, batches[0], batches, quantizer=quantizer(), algorithms=algorithms, progress=False
        )
        found.append(tq.compare(model, converted, batches).sqnr_db)
    assert found[1] >= found[0]


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
def test_a_worse_result_is_not_kept_and_a_warning_says_so(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    batches = [torch.randn(4, 6)]
    algorithm = tq.BiasCorrection()

    def spoil(prepared, measured):
        node = next(iter(measured))
        node.args = (node.args[0], node.args[1])  # drops the bias

    monkeypatch.setattr(algorithm, "apply", spoil)
    prepared = tq.prepare(tq.export(model, batches[0]), X86Quantizer())
    tq.calibrate(prepared, batches, progress=False)
    with pytest.warns(tq.TorchquantWarning, match="plain result is kept"):
        tq.optimize(prepared, batches, [algorithm], progress=False)
    assert tq.compare(model, tq.convert(prepared), batches).sqnr_db > 30


def test_it_works_on_a_foreign_quantizers_graph():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    batches = [torch.rand(2, 3, 8, 8) for _ in range(3)]
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (batches[0],)).module(), quantizer)
    tq.calibrate(prepared, batches, progress=False)
    assert len(tq.BiasCorrection().statistics(prepared)) == 2
    tq.optimize(prepared, batches, [tq.BiasCorrection()], progress=False)
    assert tq.compare(model, tq.convert(prepared), batches).sqnr_db > 25


def test_a_running_mean_weighs_batches_by_their_samples():
    mean = RunningMean(features=False)
    mean.update(torch.ones(3, 2))
    mean.update(torch.full((1, 2), 5.0))
    [(value, count)] = mean.means()
    assert count == 4
    assert torch.allclose(value, torch.full((2,), 2.0))


def test_sites_of_changing_size_are_averaged_by_size():
    mean = RunningMean(features=False)
    mean.update(torch.ones(2, 1, 4))
    mean.update(torch.ones(2, 1, 5))
    assert [tuple(value.shape) for value, _ in mean.means()] == [(1, 4), (1, 5)]
