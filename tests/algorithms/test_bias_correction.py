"""Bias correction: its promise is that the mean output error of each layer is zero on the calibration data."""

from typing import ClassVar

import pytest
import torch
from foreign import EveryKind, EverySpec, SpecQuantizer, calibrated, per_channel, per_tensor
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import torchquant as tq
from torchquant.algorithms.bias_correction import output_moments
from torchquant.calibration.stream import Stream
from torchquant.formats.integer import UINT8
from torchquant.fx.blocks import layers
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer
from torchquant.solving.solved import Solution
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


def transposed_quantizer():
    return SpecQuantizer(
        ("conv_transpose1d", "conv_transpose2d"),
        per_tensor(torch.uint8, 0, 255),
        per_channel(low=-3, high=3, axis=1),
    )


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
    "conv_transpose1d": (nn.ConvTranspose1d(6, 8, 3, stride=2), (4, 6, 9)),
    "conv_transpose2d": (nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1), (4, 6, 5, 4)),
    "conv_transpose2d in groups": (nn.ConvTranspose2d(6, 8, 2, groups=2, bias=False), (4, 6, 5, 4)),
}


def mean_error(prepared, model, batches, axis):
    """Largest mean error of a channel of the converted model's output."""
    converted = tq.convert(prepared)
    with torch.no_grad():
        errors = [(converted(b) - model(b)).movedim(axis, 0).flatten(1) for b in batches]
    return torch.cat(errors, 1).mean(1).abs().max()


@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_error_of_each_channel_is_zero_on_the_calibration_data(name):
    layer, shape = LAYERS[name]
    layer.reset_parameters()  # seeded, unlike at import
    model, batches = OneLayer(layer), [torch.rand(shape) for _ in range(4)]
    quantizer = transposed_quantizer() if "transpose" in name else CoarseQuantizer()
    axis = -1 if isinstance(layer, nn.Linear) else 1
    plain = mean_error(calibrated(model, batches, quantizer), model, batches, axis)
    prepared = calibrated(model, batches, quantizer)
    result = tq.optimize(prepared, batches, [tq.BiasCorrection()], progress=False)
    assert [span.kept for span in result.spans] == [True]
    assert plain > 0.005
    assert mean_error(prepared, model, batches, axis) < 0.1 * plain  # what is left comes from rounding the activations


def test_deep_in_a_network_the_mean_error_of_every_layer_is_zero():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    batches = [torch.rand(2, 3, 10, 10) for _ in range(3)]
    prepared = calibrated(model, batches, CoarseQuantizer())
    tq.optimize(prepared, batches, [tq.BiasCorrection()], progress=False)
    mean_errors = largest_mean_errors(prepared, batches)
    assert len(mean_errors) == 3
    assert max(mean_errors) < 1e-5


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize("quantizer", [XnnpackQuantizer, X86Quantizer])
def test_it_never_ends_below_the_plain_result_on_the_calibration_data(quantizer):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    batches = [torch.randn(2, 3, 8, 8) for _ in range(4)]
    sqnr_db = []
    for algorithms in ((), (tq.BiasCorrection(),)):
        exported = tq.export(model, batches[0])
        converted = tq.quantize(
            exported, batches[0], batches, quantizer=quantizer(), algorithms=algorithms, progress=False
        )
        sqnr_db.append(tq.compare(model, converted, batches).sqnr_db)
    assert sqnr_db[1] >= sqnr_db[0]


def test_a_worse_result_is_not_kept_and_a_warning_says_so(monkeypatch):
    def spoil(self, task, clock):
        return Solution(biases={task.span.sites[0].name: torch.full((5,), 1e3)})

    monkeypatch.setattr(tq.BiasCorrection, "solve", spoil)
    # each layer by itself looks no worse
    monkeypatch.setattr("torchquant.calibration.stream.Task.error", lambda task: 0.0)
    monkeypatch.setattr("torchquant.calibration.stream.Task.error_passed_on", lambda task: 0.0)
    model, batches = nn.Sequential(nn.Linear(6, 5)).eval(), [torch.randn(4, 6)]
    prepared = calibrated(model, batches, X86Quantizer())
    with pytest.warns(tq.TorchquantWarning, match=r"BiasCorrection would lower .* the plain result is kept"):
        result = tq.optimize(prepared, batches, [tq.BiasCorrection()], progress=False)
    assert [kept for _, _, kept in result.steps] == [True, False]
    assert tq.compare(model, tq.convert(prepared), batches).sqnr_db > 30


def test_a_layer_without_error_is_left_as_it_is():
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.copy_(torch.randint(-3, 4, (4, 4)).float())
        model.weight[:, 0] = 3.0
    batches = [torch.tensor([[0.0, 1.0, 2.0, 255.0]])]
    prepared = calibrated(model, batches, CoarseQuantizer())
    result = tq.optimize(prepared, batches, [tq.BiasCorrection()], progress=False)
    assert not result.spans


def test_it_works_on_a_foreign_quantizers_graph():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    batches = [torch.rand(2, 3, 8, 8) for _ in range(3)]
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (batches[0],)).module(), quantizer)
    tq.calibrate(prepared, batches, progress=False)
    result = tq.optimize(prepared, batches, [tq.BiasCorrection()], progress=False)
    assert len(result.spans) == 2
    assert tq.compare(model, tq.convert(prepared), batches).sqnr_db > 25


def test_it_corrects_every_layer_of_a_quantizer_that_uses_every_kind_of_spec():
    batches = [torch.randn(2, 4, 8, 8) for _ in range(2)]
    prepared = calibrated(EveryKind(), batches, EverySpec())
    plain = largest_mean_errors(prepared, batches)
    result = tq.optimize(prepared, batches, [tq.BiasCorrection()], progress=False)
    corrected = largest_mean_errors(prepared, batches)
    assert len(result.spans) == len(corrected) == 10
    assert min(plain) > 1e-4
    kept = [error for error, span in zip(corrected, result.spans, strict=True) if span.kept]
    assert len(kept) >= 8  # one whose output on the quantized prefix got no better is left as it was
    assert max(kept) < 5e-5  # what is left is the rounding of the int32 bias
    assert corrected == [a if span.kept else b for a, b, span in zip(corrected, plain, result.spans, strict=True)]


def largest_mean_errors(prepared, batches):
    stream, mean_errors = Stream(prepared, batches), []
    for task in stream.walk(layers(prepared)):
        moments = output_moments(task, "float")
        mean_errors.append(float((moments.mean - moments.mean_q).abs().max()))
    return mean_errors


def test_batches_of_different_size_count_by_their_samples():
    model, batches = OneLayer(nn.Linear(6, 4)), [torch.rand(size, 6) for size in (2, 7, 3)]
    prepared = calibrated(model, batches, CoarseQuantizer(), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    tq.optimize(prepared, batches, [tq.BiasCorrection()], progress=False)
    assert max(largest_mean_errors(prepared, batches)) < 1e-6
