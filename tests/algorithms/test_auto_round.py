"""AutoRound: gradients as in the paper, grids of every kind, never above what rounding to nearest leaves."""

import pytest
import torch
import torch.nn.functional as F
from foreign import SpecQuantizer, calibrated, groupwise, per_channel, per_tensor
from nets import Block
from torch import nn
from torchao.quantization.pt2e.observer import MappingType
from torchao.quantization.pt2e.quantizer import FixedQParamsQuantizationSpec

import torchquant as tq
from torchquant.algorithms.auto_round import AutoRound, SignRounded
from torchquant.algorithms.layers.layerwise import float_weight
from torchquant.algorithms.layers.offset_rounding import fake_quantize
from torchquant.calibration.calibrate import Recorder
from torchquant.fx.blocks import layers, weight_grid
from torchquant.fx.passes import copy_graph
from torchquant.fx.reading import observers
from torchquant.quantizers import WeightOnlyQuantizer
from torchquant.solving.solved import SolvedWeight

pytestmark = pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")  # what a Quantizer leaves
KINDS = ("conv2d", "linear", "conv_transpose2d")
GRIDS = {
    "groups": groupwise(4),
    "affine groups": groupwise(4, 0, 7, MappingType.ASYMMETRIC),
    "per channel": per_channel(low=-3, high=3),
    "affine": per_channel(torch.uint8, 0, 3, symmetric=False),
    "8 bits": per_channel(),
    "per tensor": per_tensor(low=-7, high=7, symmetric=True),
}


class Residual(nn.Module):
    """Convolutions of several kinds, one block of them with a shortcut, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 1)
        self.up, self.head = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.b(self.a(x).relu()) + x).relu()
        return self.head(self.up(x).mean((2, 3)))


def two_linears(spec):
    net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    batches = [torch.randn(32, 16) @ torch.randn(16, 16) for _ in range(4)]
    return calibrated(net, batches, SpecQuantizer(("linear",), None, spec)), batches


def solved(prepared):
    return {n.name: o for n, o in observers(prepared) if isinstance(o, SolvedWeight)}


@pytest.mark.parametrize("name", GRIDS)
def test_blocks_get_better_on_every_grid(name):
    prepared, batches = two_linears(GRIDS[name])
    exact, nearest = Recorder(copy_graph(prepared), {}, observe=False), tq.convert(copy_graph(prepared))
    result = tq.optimize(prepared, batches, [AutoRound(60)], progress=False)
    (span,) = result.spans
    assert span.kept
    assert span.after < 0.9 * span.before
    for observer in solved(prepared).values():
        assert observer.grid.quant_min <= int(observer.codes.min()) <= int(observer.codes.max()) <= observer.quant_max
    wanted, before = (torch.cat([run(b) for b in batches]) for run in (exact, nearest))
    converted = tq.convert(prepared)
    assert tq.sqnr_db(wanted, torch.cat([converted(b) for b in batches])) > tq.sqnr_db(wanted, before)


@pytest.mark.parametrize("quantizer", ["static", "weights"])
def test_convolutions_and_encoders_get_better(quantizer):
    specs = {
        "static": lambda: SpecQuantizer(KINDS, per_tensor(torch.uint8, 0, 255), per_channel(low=-3, high=3)),
        "weights": lambda: WeightOnlyQuantizer("w3_g16"),
    }
    networks = [(Block, torch.randn(4, 8, 32))]
    if quantizer == "static":
        networks = [(Residual, torch.randn(4, 4, 8, 8)), *networks]
    for make, like in networks:
        batches = [torch.randn_like(like) for _ in range(4)]
        prepared = calibrated(make(), batches, specs[quantizer]())
        if make is Residual:  # a transposed convolution has its outputs on the other axis
            prepared = calibrated(
                make(), batches, SpecQuantizer(("conv2d", "linear"), None, per_channel(low=-3, high=3))
            )
        result = tq.optimize(prepared, batches, [AutoRound(40)], progress=False)
        assert all(s.kept == (s.after <= s.before) for s in result.spans)
        assert result.steps[-1][1] > result.steps[0][1] + 1


def test_scales_of_a_fixed_spec_stay():
    fixed = FixedQParamsQuantizationSpec(torch.int8, 0.125, 0, -8, 7, torch.per_tensor_symmetric)
    prepared, batches = two_linears(fixed)
    result = tq.optimize(prepared, batches, [AutoRound(60)], progress=False)
    assert result.spans[0].after < 0.9 * result.spans[0].before
    assert len(solved(prepared)) == 2
    assert all(torch.equal(o.grid.scale, torch.tensor([0.125])) for o in solved(prepared).values())
    assert sum("its scale is fixed by its spec" in note for note in result.notes) == 2


def test_with_a_clip_range_of_one_all_scales_stay():
    prepared, batches = two_linears(GRIDS["affine groups"])
    before = {n.name: o.calculate_qparams() for n, o in observers(prepared)}
    tq.optimize(prepared, batches, [AutoRound(60, clip_range=(1.0, 1.0))], progress=False)
    for name, observer in solved(prepared).items():
        assert torch.equal(observer.grid.scale, before[name][0].reshape(-1))
        assert torch.equal(observer.grid.zero_point, before[name][1].reshape(-1).int())


@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_rounded_up_or_down_on_the_learned_grid(name):
    """V stays within half a step, whatever the learning rate."""
    prepared, batches = two_linears(GRIDS[name])
    weights = {s.name: float_weight(prepared, s) for span in layers(prepared) for s in span.sites}
    sources = {s.args[1].name: s.name for span in layers(prepared) for s in span.sites}
    tq.optimize(prepared, batches, [AutoRound(60, lr=0.05)], progress=False)
    for source, observer in solved(prepared).items():
        scale, zero = observer.grid.expand(observer.codes.shape)
        exact = weights[sources[source]] / scale + zero
        off = (observer.codes.float() - exact.clamp(observer.quant_min, observer.quant_max)).abs()
        assert float(off.max()) <= 1 + 1e-3
        assert bool((off > 0.5 + 1e-3).any())  # and some do not go to the nearest


def reference(weight, offset, scale, zero_point, low, high):
    def rounded(x):
        return x + (x.round() - x).detach()

    codes = (rounded(weight / scale + offset) + zero_point).clamp(low, high)
    return (codes - zero_point) * scale


@pytest.mark.parametrize("name", GRIDS)
def test_gradients_are_those_of_the_formula_straight_through_the_rounding(name):
    prepared, _ = two_linears(GRIDS[name])
    site = layers(prepared)[0].sites[0]
    weight, grid = float_weight(prepared, site) * 1.1, weight_grid(prepared, site)  # some are cut off
    offset = (torch.rand_like(weight) - 0.5).requires_grad_()
    scale = grid.scale.clone().requires_grad_()
    zeros = grid.zero_point.float().requires_grad_()
    cells, felt = grid.cells(weight.shape), torch.randn_like(weight)
    wanted = reference(weight, offset, scale[cells], zeros[cells], grid.quant_min, grid.quant_max)
    gradients = torch.autograd.grad((wanted * felt).sum(), (offset, scale, zeros))
    actual = fake_quantize(weight, offset, scale, zeros, grid)
    assert torch.allclose(actual, wanted, atol=1e-6)
    for got, want in zip(torch.autograd.grad((actual * felt).sum(), (offset, scale, zeros)), gradients, strict=True):
        assert torch.allclose(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", GRIDS)
def test_it_starts_at_the_nearest_codes_on_the_grid_that_stands(name):
    prepared, _ = two_linears(GRIDS[name])
    site = layers(prepared)[0].sites[0]
    weight, grid = float_weight(prepared, site) * 0.93, weight_grid(prepared, site)
    codes, start = SignRounded(weight, grid).answer()
    assert start is grid
    assert torch.equal(codes, grid.encode(weight))


def test_the_best_of_all_steps_is_kept():
    """A learning rate that destroys the weights at once leaves rounding to nearest."""
    prepared, batches = two_linears(GRIDS["8 bits"])
    result = tq.optimize(prepared, batches, [AutoRound(5, lr=0.5, range_lr=0.9)], progress=False)
    assert result.spans[0].after <= result.spans[0].before
    assert result.steps[-1][1] >= result.steps[0][1]


class Cached(nn.Module):
    """Two layers that keep what they computed as state, as decoders keep keys and values."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Linear(16, 16) for _ in range(4))
        self.register_buffer("first", torch.zeros(2, 4, 16))
        self.register_buffer("second", torch.zeros(2, 4, 16))

    def forward(self, x):
        for kept, key, out in ((self.first, self.one, self.two), (self.second, self.three, self.four)):
            kept.copy_(key(x))
            x = x + out(F.silu(kept))
        return x


def test_what_only_becomes_state_hinders_no_cut_and_is_no_output_of_a_block():
    batches = [torch.randn(2, 4, 16) for _ in range(3)]
    prepared = calibrated(Cached(), batches, WeightOnlyQuantizer("w3_g16"))
    algorithm = AutoRound(20, min_sites=2, max_sites=3)
    spans = algorithm.spans(prepared, frozenset())
    assert [len(span.sites) for span in spans] == [2, 2]
    result = tq.optimize(prepared, batches, [algorithm], progress=False)
    assert all(s.after < s.before for s in result.spans)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"range_lr": float("nan")}, "range_lr is nan"),
        ({"clip_range": (0.5, 0.9)}, "clip_range is"),
        ({"min_sites": 9}, "min_sites 9"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(tq.InputError, match=match):
        AutoRound(**options)
