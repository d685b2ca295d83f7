"""SmoothQuant: its promise is the same float function, and outliers that no longer cost other channels their steps."""

import functools

import foreign
import nets
import pytest
import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from torch import nn
from torchao.quantization.pt2e.observer import FixedQParamsObserver
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import torchquant as tq
from torchquant.algorithms.channels.channel_statistics import ChannelSample
from torchquant.algorithms.smooth_quant import SmoothQuant, outlier_factor, smoothing_factor
from torchquant.calibration.calibrate import Recorder, recalibrate
from torchquant.fx import passes
from torchquant.fx.reading import is_prepared
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer

LINEAR = ("linear",)
LAYERS = ("linear", "conv2d", "conv1d")
QUANTIZERS = {
    "x86": X86Quantizer,
    "x86 dynamic": lambda: X86Quantizer("dynamic_int8"),
    "xnnpack dynamic": XnnpackQuantizer,
    "torchao": lambda: X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config()),
    "executorch": lambda: XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True)),
    "executorch dynamic": lambda: XNNPACKQuantizer().set_global(
        get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    ),
    "foreign": lambda: foreign.SpecQuantizer(LAYERS, foreign.per_tensor(), foreign.per_channel()),
    "foreign symmetric": lambda: foreign.SpecQuantizer(
        LAYERS, foreign.per_tensor(symmetric=True), foreign.per_tensor(symmetric=True)
    ),
    "foreign dynamic": lambda: foreign.SpecQuantizer(LINEAR, foreign.dynamic(), foreign.per_channel()),
    "foreign groups": lambda: foreign.SpecQuantizer(LINEAR, foreign.per_tensor(), foreign.groupwise(8)),
    "foreign activations only": lambda: foreign.SpecQuantizer(LINEAR, foreign.per_tensor()),
}


class Rms(nn.Module):
    """RMSNorm once as an op and once written out, a gate, a tied weight."""

    def __init__(self):
        super().__init__()
        self.norm, self.scale = nn.RMSNorm(16), nn.Parameter(torch.rand(16) + 0.5)
        self.up, self.gate, self.down, self.head = (nn.Linear(16, 16) for _ in range(4))
        self.head.weight = self.up.weight

    def forward(self, x):
        y = self.norm(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.scale * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)))


def conv_chain():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.LeakyReLU(0.1)),
        *(nn.Conv2d(8, 6, 1), nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(144, 5)),
    )


def norms():
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


NETWORKS = {
    "norms": (norms, lambda: torch.randn(6, 8)),
    "convs": (conv_chain, lambda: torch.randn(2, 3, 8, 8)),
    "cnn": (nets.cnn, lambda: torch.randn(2, 3, 8, 8)),
    "block": (nets.Block, lambda: torch.randn(2, 8, 32)),
    "tokens": (nets.MaskedTokens, nets.token_batch),
    "pixels": (nets.Pixels, lambda: torch.randn(2, 4, 8, 8)),
    "rms": (Rms, lambda: torch.randn(2, 6, 16)),
}


def prepared_of(model, batch, quantizer):
    args = batch if isinstance(batch, tuple) else (batch,)
    return prepare_pt2e(torch.export.export(model.eval(), args).module(), quantizer)


@functools.cache
def exported_of(network):
    """(model, exported program, batches)."""
    make, draw = NETWORKS[network]
    model, batches = make().eval(), [draw() for _ in range(2)]
    return model, torch.export.export(model, batches[0] if isinstance(batches[0], tuple) else (batches[0],)), batches


def float_outputs(prepared, batches):
    run = Recorder(prepared, {}, observe=False)
    with torch.no_grad():
        return torch.cat([run(*(b if isinstance(b, tuple) else (b,))).flatten() for b in batches])


def plant_outliers(model):
    """Every fourth channel of each LayerNorm is 40 times too large, and what reads it makes up for that."""
    with torch.no_grad():
        for norm, reader in ((model.before, model.qkv), (model.after, model.up)):
            norm.weight[::4] *= 40
            norm.bias.uniform_(-1, 1)
            reader.weight[:, ::4] /= 40
    return model


def is_long(quantizer, network):
    """ExecuTorch's Quantizer exports a pattern for each of its ops, which takes seconds."""
    return quantizer.startswith("executorch") and network not in ("block", "convs")


EVERYWHERE = [pytest.param(q, n, marks=pytest.mark.slow if is_long(q, n) else ()) for q in QUANTIZERS for n in NETWORKS]


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize(("quantizer", "network"), EVERYWHERE)
def test_the_float_function_stays_the_same_under_any_quantizer(quantizer, network):
    if quantizer.startswith("executorch") and network == "tokens":
        pytest.skip("ExecuTorch's Quantizer makes the positions floats, and an embedding refuses them")
    model, exported, batches = exported_of(network)
    prepared = prepare_pt2e(exported.module(), QUANTIZERS[quantizer]())
    if not is_prepared(prepared):
        pytest.skip("the Quantizer annotates nothing in this network")
    before, weights = float_outputs(prepared, batches), {k: v.clone() for k, v in model.state_dict().items()}
    twin, algorithm = passes.copy_graph(prepared), SmoothQuant(alpha=0.6, rows=64)
    changed = algorithm.transform(prepared, batches)
    assert changed or algorithm.notes
    assert (float_outputs(prepared, batches) - before).norm() <= 1e-5 * before.norm()
    assert torch.equal(float_outputs(twin, batches), before)  # which shares its tensors
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    recalibrate(prepared, batches, progress=False)
    assert tq.compare(model, tq.convert(prepared), batches).sqnr_db > 8


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize(
    ("quantizer", "alpha"),
    [
        ("x86", 0.5),
        pytest.param("x86", None, marks=pytest.mark.slow),
        ("x86 dynamic", None),
        pytest.param("torchao", None, marks=pytest.mark.slow),
        ("executorch", 0.5),
    ],
)
def test_planted_outlier_channels_cost_several_db_less(quantizer, alpha):
    model, batches = plant_outliers(nets.Block()).eval(), [torch.randn(8, 8, 32) for _ in range(4)]
    held_out = [torch.randn(8, 8, 32) for _ in range(4)]
    sqnr_db = []
    for algorithm in (None, SmoothQuant(alpha)):
        prepared = prepared_of(model, batches[0], QUANTIZERS[quantizer]())
        if algorithm is not None:
            assert algorithm.transform(prepared, batches) >= 2
        recalibrate(prepared, batches, progress=False)
        sqnr_db.append(tq.compare(model, tq.convert(prepared), held_out).sqnr_db)
    assert sqnr_db[1] > sqnr_db[0] + 3


def smoothed(model, batches, quantizer=None, **options):
    prepared = prepared_of(model, batches[0], quantizer or X86Quantizer())
    before = float_outputs(prepared, batches)
    algorithm = SmoothQuant(**{"alpha": 0.5, **options})
    changed = algorithm.transform(prepared, batches)
    assert (float_outputs(prepared, batches) - before).norm() <= 1e-5 * before.norm()
    return prepared, algorithm, changed


def inserted(prepared):
    return [n.target for n in prepared.graph.nodes if "SmoothQuant" in str(n.meta.get("custom"))]


def test_factors_and_offsets_go_into_a_normalization_at_no_cost():
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4))
    prepared, algorithm, changed = smoothed(model, [torch.randn(8, 16) * torch.logspace(-2, 2, 16)])
    assert (changed, inserted(prepared), algorithm.notes) == (1, [], [])


def test_a_tensor_that_something_else_reads_gets_an_op_in_front_of_the_linear():
    class PostNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x):
            x = self.norm(x)
            return x + self.linear(x)

    batches = [torch.randn(8, 16)]
    prepared, _, changed = smoothed(PostNorm(), batches, shift=False)
    assert (changed, inserted(prepared)) == (1, [torch.ops.aten.mul.Tensor])
    prepared, algorithm, changed = smoothed(PostNorm(), batches, explicit=False)
    assert (changed, inserted(prepared)) == (0, [])
    assert "read by" in algorithm.notes[0]


def test_gelu_gets_an_op_and_relu_does_not():
    batches = [torch.randn(8, 16)]
    for between, count in ((nn.ReLU(), 1), (nn.GELU(), 2)):
        model = nn.Sequential(nn.Linear(16, 16), between, nn.Linear(16, 4))
        prepared, _, changed = smoothed(model, batches, shift=False)
        assert (changed, len(inserted(prepared))) == (2, count)  # the input of the network needs one in any case


def test_an_attentions_value_path_takes_the_factor():
    prepared, _, changed = smoothed(nets.Block().eval(), [torch.randn(2, 8, 32)], shift=False)
    assert changed == 4
    assert len(inserted(prepared)) == 1  # behind the GELU


def test_a_reader_that_is_no_layer_keeps_the_tensor_and_its_observer_as_they_were():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x):
            return self.linear(x) + x

    quantizer = foreign.SpecQuantizer(("linear", "add"), foreign.per_tensor(), foreign.per_channel())
    batches = [torch.randn(8, 16)]
    prepared, _, _ = smoothed(Both(), batches, quantizer, shift=False)
    recalibrate(prepared, batches, progress=False)
    add = next(n for n in prepared.graph.nodes if n.target is torch.ops.aten.add.Tensor)
    x = next(n for n in prepared.graph.nodes if n.op == "placeholder")
    assert add.args[1].args[0] is x
    observer = prepared.get_submodule(add.args[1].target)
    assert float(observer.max_val) == float(batches[0].max())


def test_one_weight_behind_two_tensors_is_scaled_for_each():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.first, self.second = nn.Linear(16, 16), nn.LayerNorm(16), nn.LayerNorm(16)

        def forward(self, x, y):
            return self.linear(self.first(x)) + self.linear(self.second(y))

    batches = [(torch.randn(8, 16), torch.randn(8, 16) * torch.logspace(-2, 2, 16))]
    _, _, changed = smoothed(Tied(), batches)
    assert changed == 2


def test_a_padded_convolution_gets_no_offset_and_an_unpadded_one_does():
    batches = [torch.randn(2, 3, 8, 8) + 50]
    for padding in (0, 1):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(1, 1), nn.Conv2d(3, 4, 3, padding=padding)).eval()
        prepared, _, changed = smoothed(model, batches)
        assert changed == 1
        conv = next(n for n in prepared.graph.nodes if n.target is torch.ops.aten.conv2d.default)
        bias = prepared.get_parameter(conv.args[2].target)
        assert torch.equal(bias, model[2].bias) == bool(padding)


def test_convolutions_behind_what_takes_no_factor_stay_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1))
    _, algorithm, changed = smoothed(model, [torch.randn(2, 3, 4, 4)])
    assert changed == 0
    assert any("hardtanh" in note for note in algorithm.notes)


def test_a_fixed_range_is_left_alone():
    grid = {"dtype": torch.int8, "quant_min": -128, "quant_max": 127}
    fixed = FixedQParamsObserver.with_args(scale=1 / 256, zero_point=-128, **grid)
    quantizer = foreign.SpecQuantizer(LINEAR, foreign.per_tensor(observer=fixed), foreign.per_channel())
    model = nn.Sequential(nn.Sigmoid(), nn.Linear(8, 4))
    _, _, changed = smoothed(model, [torch.randn(4, 8)], quantizer)
    assert changed == 0


def test_the_search_never_takes_a_rule_that_is_worse_on_the_other_half_of_the_data():
    torch.manual_seed(0)
    model, batches = norms().eval(), [torch.randn(64, 8) for _ in range(4)]
    sqnr_db = []
    for algorithm in (None, SmoothQuant()):
        prepared = prepared_of(model, batches[0], X86Quantizer())
        if algorithm is not None:
            algorithm.transform(prepared, batches)
        recalibrate(prepared, batches, progress=False)
        sqnr_db.append(tq.compare(model, tq.convert(prepared), batches).sqnr_db)
    assert sqnr_db[1] > sqnr_db[0] - 0.5


def test_alpha_one_half_makes_inputs_and_weights_equally_large():
    x, w = torch.rand(9) + 0.1, torch.rand(9) + 0.1
    s = smoothing_factor(x, w, 0.5)
    ratio = (x / s) / (w * s)
    assert torch.allclose(ratio, ratio[:1].expand(9), rtol=1e-4)
    assert torch.allclose(smoothing_factor(x, w, 1.0) / x, (1 / x.log().mean().exp()).expand(9), rtol=1e-4)


def test_the_outlier_factor_leaves_channels_below_the_threshold_alone():
    s = outlier_factor(torch.tensor([1.0, 2.0, 16.0]), octave=2.0)
    assert s.tolist() == [1.0, 1.0, 4.0]


def test_dead_channels_and_dead_weights_give_finite_factors():
    s = smoothing_factor(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), 0.5)
    assert bool(s.isfinite().all() & (s > 0).all())


def test_the_sample_is_drawn_evenly_and_knows_both_halves():
    sample = ChannelSample(axis=-1, items=50, rows=True, seed=0)
    values = torch.arange(4000.0).reshape(1000, 2, 2)
    for batch in values.split(125):
        sample.update(batch)
    assert sample.kept.shape == (50, 2)
    assert 1500 < float(sample.kept.mean()) < 2500
    assert [float(r[1].max()) for r in sample.ranges] == [3995.0, 3999.0]
    for fold, (low, high) in zip(sample.folds(), reversed(sample.ranges), strict=True):
        assert torch.equal(fold.low, low)
        assert torch.equal(fold.high, high)
        assert not bool(((fold.items == low) | (fold.items == high)).any())


def test_an_alpha_outside_zero_to_one_is_refused():
    with pytest.raises(ValueError, match=r"alpha 1\.5 must be between 0 and 1"):
        SmoothQuant(alpha=1.5)
