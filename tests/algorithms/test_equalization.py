"""Cross-layer equalization: its promise is the same float function, with the channels of each pair equally large."""

import functools
import itertools

import foreign
import nets
import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import torchquant as tq
from torchquant.algorithms.channels import folding
from torchquant.algorithms.equalization import CrossLayerEqualization, equalizing_factor
from torchquant.calibration.calibrate import Recorder, recalibrate
from torchquant.fx import ops, passes
from torchquant.fx.reading import is_prepared
from torchquant.quantizers.x86 import X86Quantizer

LAYERS = ("linear", "conv2d", "conv1d")
QUANTIZERS = {
    "x86": X86Quantizer,
    "x86 dynamic": lambda: X86Quantizer("dynamic_int8"),
    "torchao": lambda: X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config()),
    "executorch": lambda: XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True)),
    "foreign per tensor": lambda: foreign.SpecQuantizer(
        LAYERS, foreign.per_tensor(), foreign.per_tensor(symmetric=True)
    ),
    "foreign dynamic": lambda: foreign.SpecQuantizer(("linear",), foreign.dynamic(), foreign.per_channel()),
}


def depthwise_chain(padding=0):
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, padding=padding), nn.ReLU()),
        *(nn.Conv2d(8, 6, 1), nn.LeakyReLU(0.2), nn.AvgPool2d(2), nn.Conv2d(6, 4, 1)),
    )


def flattened():
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.PReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(96, 8)),
        *(nn.ReLU(), nn.Linear(8, 4)),
    )


NETWORKS = {
    "cnn": (nets.cnn, lambda: torch.randn(2, 3, 8, 8)),
    "depthwise": (depthwise_chain, lambda: torch.randn(2, 3, 8, 8)),
    "flattened": (flattened, lambda: torch.randn(2, 3, 8, 8)),
    "block": (nets.Block, lambda: torch.randn(2, 8, 32)),
    "pixels": (nets.Pixels, lambda: torch.randn(2, 4, 8, 8)),
    "mobile": (nets.Mobile, lambda: torch.randn(2, 3, 16, 16)),
}


@functools.cache
def exported_of(network):
    """(model, exported program, batches)."""
    make, draw = NETWORKS[network]
    model, batches = make().eval(), [draw() for _ in range(2)]
    return model, torch.export.export(model, (batches[0],)), batches


def prepared_of(model, batch, quantizer=None):
    return prepare_pt2e(torch.export.export(model.eval(), (batch,)).module(), quantizer or X86Quantizer())


def float_outputs(prepared, batches):
    run = Recorder(prepared, {}, observe=False)
    with torch.no_grad():
        return torch.cat([run(b).flatten() for b in batches])


def equalized(model, batches, quantizer=None, **options):
    prepared = prepared_of(model, batches[0], quantizer)
    before = float_outputs(prepared, batches)
    algorithm = CrossLayerEqualization(**options)
    changed = algorithm.transform(prepared, batches)
    assert (float_outputs(prepared, batches) - before).norm() <= 1e-5 * before.norm()
    return prepared, algorithm, changed


def layers_of(prepared):
    return [n for n in prepared.graph.nodes if ops.op_name(n) in LAYERS]


def ranges(prepared, first, second):
    """r1 and r2 of two layers, from their weights as they are now."""
    a, b = (folding.constant_at(prepared, n, 1) for n in (first, second))
    return a.abs().flatten(1).amax(1), folding.input_magnitudes(b, ops.arguments(second).get("groups", 1))


def spread(model, seed=0):
    """The same network with channels of very different range between its layers."""
    generator = torch.Generator().manual_seed(seed)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        for first, second in itertools.pairwise(layers):
            s = 10 ** (3 * torch.rand(len(first.weight), generator=generator) - 1.5)
            first.weight.div_(s.reshape(-1, *[1] * (first.weight.ndim - 1)))
            first.bias.div_(s)
            groups = getattr(second, "groups", 1)
            second.weight.copy_(folding.scale_inputs(second.weight, s, groups))
    return model


def is_long(quantizer, network):
    """ExecuTorch's Quantizer exports a pattern for each of its ops, which takes seconds."""
    return quantizer == "executorch" and network not in ("block", "depthwise")


EVERYWHERE = [pytest.param(q, n, marks=pytest.mark.slow if is_long(q, n) else ()) for q in QUANTIZERS for n in NETWORKS]


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize(("quantizer", "network"), EVERYWHERE)
def test_the_float_function_stays_the_same_under_any_quantizer(quantizer, network):
    model, exported, batches = exported_of(network)
    prepared = prepare_pt2e(exported.module(), QUANTIZERS[quantizer]())
    before, weights = float_outputs(prepared, batches), {k: v.clone() for k, v in model.state_dict().items()}
    twin, algorithm = passes.copy_graph(prepared), CrossLayerEqualization()
    changed = algorithm.transform(prepared, batches)
    assert changed >= {"cnn": 1, "depthwise": 3, "flattened": 2, "pixels": 0, "block": 1, "mobile": 0}[network]
    assert (float_outputs(prepared, batches) - before).norm() <= 1e-5 * before.norm()
    assert torch.equal(float_outputs(twin, batches), before)  # which shares its tensors
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    if is_prepared(prepared):
        recalibrate(prepared, batches, progress=False)
        assert tq.compare(model, tq.convert(prepared), batches).sqnr_db > 8


def test_after_convergence_both_layers_of_every_pair_have_equal_ranges():
    prepared, _, changed = equalized(spread(depthwise_chain()), [torch.randn(2, 3, 8, 8)], iterations=200)
    assert changed == 3
    chain = layers_of(prepared)
    for first, second in itertools.pairwise(chain):
        r1, r2 = ranges(prepared, first, second)
        assert torch.allclose(r1, r2, rtol=0.01)


def test_the_factor_is_the_papers():
    r1, r2 = torch.tensor([4.0, 1.0, 0.0, 2.0]), torch.tensor([1.0, 9.0, 3.0, 0.0])
    s = equalizing_factor(r1, r2)
    assert torch.allclose(s[:2], (r1 * r2).sqrt()[:2] / r2[:2])
    assert s[2:].tolist() == [1.0, 1.0]  # dead channels
    assert torch.allclose(r1[:2] / s[:2], r2[:2] * s[:2])


def test_uneven_channels_cost_several_db_less_under_weights_with_one_scale():
    torch.manual_seed(0)
    model, batches = spread(depthwise_chain()).eval(), [torch.randn(4, 3, 8, 8) for _ in range(3)]
    sqnr_db = []
    for algorithm in (None, CrossLayerEqualization()):
        prepared = prepared_of(model, batches[0], QUANTIZERS["foreign per tensor"]())
        if algorithm is not None:
            algorithm.transform(prepared, batches)
        recalibrate(prepared, batches, progress=False)
        sqnr_db.append(tq.compare(model, tq.convert(prepared), batches).sqnr_db)
    assert sqnr_db[1] > sqnr_db[0] + 6


def test_relu6_stops_a_pair():
    model = spread(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1)))
    _, algorithm, changed = equalized(model, [torch.randn(2, 3, 4, 4)])
    assert changed == 0
    assert any("hardtanh" in note for note in algorithm.notes)


def test_a_residual_reader_stops_a_pair():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.first(x).relu()
            return x + self.second(x)

    _, algorithm, changed = equalized(spread(Residual()), [torch.randn(2, 3, 4, 4)])
    assert changed == 0
    assert any("read" in note for note in algorithm.notes)


def test_a_weight_that_is_used_twice_stops_its_pairs():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.first(self.second(self.first(x).relu()).relu())

    _, algorithm, changed = equalized(spread(Tied()), [torch.randn(4, 8)])
    assert changed == 0
    assert any("same weight" in note for note in algorithm.notes)


def test_a_prelu_with_a_slope_for_each_channel_stops_a_pair():
    for slopes, expected in ((1, 1), (4, 0)):
        model = spread(nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(slopes), nn.Conv2d(4, 4, 1)))
        assert equalized(model, [torch.randn(2, 3, 4, 4)])[2] == expected


def test_channels_mixed_by_a_reshape_stop_a_pair():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Linear(16, 4)

        def forward(self, x):
            return self.second(self.first(x).relu().permute(0, 2, 3, 1).flatten(1))

    assert equalized(Mixed().eval(), [torch.randn(2, 3, 2, 2)])[2] == 0


def absorbing(padding, absorb_bias=True):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=padding))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([9.0, 9.0, 0.0, -9.0]))
    batches = [torch.rand(2, 3, 6, 6) for _ in range(2)]
    prepared, _, _ = equalized(model, batches, absorb_bias=absorb_bias)
    relu = next(n for n in prepared.graph.nodes if ops.op_name(n) == "relu")
    minima = []
    with torch.no_grad():
        for batch in batches:
            minima.append(_value_at(prepared, relu.args[0], batch).amin((0, 2, 3)))
    return torch.stack(minima).amin(0)


def _value_at(prepared, node, batch):
    class Keep:
        def update(self, value):
            self.value = value

    keep = Keep()
    Recorder(prepared, {next(iter(node.users)): keep}, observe=False)(batch)
    return keep.value


def test_a_bias_that_relu_never_cuts_moves_on_so_that_the_range_starts_at_zero():
    low = absorbing(padding=0)
    assert torch.allclose(low[:2], torch.zeros(2), atol=1e-5)
    assert bool((low[2:] < 0).all())


def test_a_bias_stays_where_the_next_layer_pads_or_where_nobody_asked():
    assert bool((absorbing(padding=1)[:2] > 1).all())
    assert bool((absorbing(padding=0, absorb_bias=False)[:2] > 1).all())
