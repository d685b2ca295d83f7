"""Scales near zero: what hardly moved in calibration still lowers right for XNNPACK, or is refused with the site."""

import copy

import pytest
import torch
import torch.nn.functional as F
from foreign import SpecQuantizer, per_channel, per_tensor
from nets import Call
from torch import nn
from torchao.quantization.pt2e.observer import HistogramObserver, MinMaxObserver

import torchquant as tq
from torchquant.observers import ranges
from torchquant.observers.minmax import ActivationHistogram, ActivationMinMax, Floor, PerChannelWeight, least_scale
from torchquant.quantizers.xnnpack import XnnpackQuantizer
from torchquant.solving.solved import SolvedActivation

pytest.importorskip("executorch")
from torchquant.backends import executorch_xnnpack

IMAGE = (torch.rand(1, 4, 8, 8) - 0.5,)


def conv(weight=None, bias=None, **options):
    torch.manual_seed(1)
    layer = nn.Conv2d(4, 4, 3, padding=1, **options)
    with torch.no_grad():
        layer.weight.copy_(layer.weight if weight is None else torch.full_like(layer.weight, weight))
        layer.bias.copy_(layer.bias if bias is None else torch.full_like(layer.bias, bias))
    return layer


def closed(channels):
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight[channels] = 0
        norm.bias.uniform_(-1, 1)
    return norm


def dead_relu():
    return Call(lambda m, x: m.b(F.relu(m.a(x))), a=conv(bias=-50.0), b=conv(bias=2.0))


ALMOST_ZERO = {
    "a dead ReLU": (dead_relu, IMAGE),
    "a dead ReLU before a linear": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
        (torch.zeros(2, 4),),
    ),
    "a zero-initialized branch": (
        lambda: Call(lambda m, x: m.c(m.a(x) + m.z(m.a(x))), a=conv(), z=conv(0.0, 0.0), c=conv()),
        IMAGE,
    ),
    "a zero-initialized BatchNorm": (
        lambda: nn.Sequential(conv(), nn.ReLU(), conv(), closed(slice(None)), nn.ReLU(), conv()),
        IMAGE,
    ),
    "two closed channels": (
        lambda: nn.Sequential(conv(), nn.ReLU(), conv(), closed(slice(2)), nn.ReLU(), conv()),
        IMAGE,
    ),
    "a gate stuck at zero": (
        lambda: Call(lambda m, x: m.c(m.a(x) * F.relu(m.g(x))), a=conv(), g=conv(bias=-60.0), c=conv(bias=1.0)),
        IMAGE,
    ),
    "a weight of zeros": (lambda: Call(lambda m, x: m.c(F.relu(m.a(x))), a=conv(), c=conv(0.0, 1.0)), IMAGE),
    "an output of zeros": (lambda: Call(lambda m, x: m.c(F.relu(m.a(x))), a=conv(), c=conv(0.0, 0.0)), IMAGE),
    "inputs of zeros": (lambda: nn.Sequential(conv(), nn.ReLU(), conv()), (torch.zeros(1, 4, 8, 8),)),
    "a bias far above its inputs": (
        lambda: Call(lambda m, x: m.b(F.relu(m.a(x))), a=conv(bias=-5e6), b=conv(bias=2.0)),
        (IMAGE[0] * 1e3,),
    ),
}


@pytest.mark.parametrize("name", ALMOST_ZERO)
def test_what_hardly_moves_in_calibration_lowers_with_the_float_result(name):
    build, inputs = ALMOST_ZERO[name]
    model = build().eval()
    quantized = tq.quantize(model, inputs, [inputs], quantizer=XnnpackQuantizer(), algorithms=(), progress=False)
    program = executorch_xnnpack.lower(quantized, inputs)
    expected = model(*inputs).detach()
    assert (program(*inputs) - expected).abs().max() <= 0.02 * expected.abs().max()


OBSERVERS = [
    ActivationMinMax,
    ActivationHistogram,
    pytest.param(ranges.ActivationPercentile, marks=pytest.mark.slow),
    pytest.param(ranges.ActivationMSE, marks=pytest.mark.slow),
    pytest.param(ranges.ActivationEntropy, marks=pytest.mark.slow),
    MinMaxObserver,
    pytest.param(HistogramObserver, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: o.__name__)
def test_every_activation_observer_keeps_the_floor(observer):
    model = dead_relu().eval()
    quantizer = XnnpackQuantizer(observer=observer)
    quantized = tq.quantize(model, IMAGE, [IMAGE], quantizer=quantizer, algorithms=(), progress=False)
    assert tq.compare(model, executorch_xnnpack.lower(quantized, IMAGE), [IMAGE]).sqnr_db > 40


@pytest.mark.parametrize(
    "algorithm", [tq.RangeSearch(), tq.AdaRound(), tq.BRECQ(iterations=5)], ids=lambda a: type(a).__name__
)
@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
def test_every_solver_of_ranges_keeps_the_floor(algorithm):
    model = dead_relu().eval()
    quantized = tq.quantize(model, IMAGE, [IMAGE], quantizer=XnnpackQuantizer(), algorithms=[algorithm], progress=False)
    assert tq.compare(model, executorch_xnnpack.lower(quantized, IMAGE), [IMAGE]).sqnr_db > 40


def test_small_activations_that_no_bias_outweighs_keep_their_range():
    small = (IMAGE[0] * 1e-4,)
    model = nn.Sequential(conv(bias=0.0), nn.ReLU(), conv(bias=0.0)).eval()
    quantized = tq.quantize(model, small, [small], quantizer=XnnpackQuantizer(), algorithms=(), progress=False)
    assert tq.compare(model, executorch_xnnpack.lower(quantized, small), [small]).sqnr_db > 30


SPECS = (per_tensor(), per_channel(), per_tensor())
FOREIGN = {
    "bias of channel": (dead_relu, {"conv2d", "relu"}, r"\(b\): the bias of channel .* int32.*eps=2\*\*-12"),
    "factor": (
        lambda: Call(lambda m, x: m.b(x), b=conv(0.5, 0.0)),
        {"conv2d"},
        r"requantization factor.*256.*eps=2\*\*-12",
    ),
}


@pytest.mark.parametrize("name", ["bias of channel", "factor"])
def test_a_foreign_quantizers_scales_beyond_the_limits_are_refused_with_site_value_and_remedy(name):
    build, kinds, words = FOREIGN[name]
    inputs = IMAGE
    if name == "factor":  # weights that cancel: an output far smaller than one step of the sums
        inputs = (torch.zeros(1, 4, 8, 8),)
        specs = (per_tensor(observer=MinMaxObserver.with_args(eps=1.0)), SPECS[1], SPECS[2])
    else:
        specs = SPECS
    quantizer = SpecQuantizer(kinds, *specs)
    quantized = tq.quantize(build().eval(), inputs, [inputs], quantizer=quantizer, algorithms=(), progress=False)
    with pytest.raises(tq.LoweringError, match=words):
        executorch_xnnpack.lower(quantized, inputs)


def test_a_floor_follows_the_observers_it_is_made_of():
    source, observer = ActivationMinMax(dtype=torch.int8), ActivationMinMax(dtype=torch.int8)
    observer.floors = (Floor(0.5, times=(source,)), Floor(1e-3, over=(source,)))
    assert least_scale(observer) == pytest.approx(torch.finfo(torch.float32).eps)
    source(torch.tensor([0.0, 255.0]))
    observer(torch.tensor([0.0, 1e-6]))
    assert float(observer.calculate_qparams()[0]) == pytest.approx(0.5)
    twin = copy.deepcopy(observer)
    assert float(twin.calculate_qparams()[0]) == pytest.approx(0.5)
    assert float(observer.eps) == pytest.approx(torch.finfo(torch.float32).eps)


def test_a_solved_activation_below_the_floor_gets_it_with_the_same_low_end():
    observer = ActivationMinMax(dtype=torch.int8, qscheme=torch.per_tensor_affine, eps=0.5)
    scale, zero_point = SolvedActivation(0.1, -78, observer).calculate_qparams()
    assert float(scale) == 0.5
    assert int(zero_point) == -118  # the low end was -5


def test_a_closed_channel_in_training_gets_no_scale_far_below_the_others():
    observer = PerChannelWeight(dtype=torch.int8, qscheme=torch.per_channel_symmetric, ch_axis=0)
    observer(torch.tensor([[1.0], [0.0]]))
    scale = observer.calculate_qparams()[0]
    assert float(scale[1] / scale[0]) == pytest.approx(2**-16)
