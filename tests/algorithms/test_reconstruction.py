"""Reconstruction: its loss is AdaRound's on one layer, its parts start where they should, its blocks get no worse."""

import math

import pytest
import torch
from foreign import SpecQuantizer, calibrated, groupwise, per_channel, per_tensor
from torch import nn

import torchquant as tq
from torchquant.algorithms.adaquant import AdaQuant
from torchquant.algorithms.adaround import AdaRound
from torchquant.algorithms.brecq import BRECQ
from torchquant.algorithms.layers.gram import Moments, moments
from torchquant.algorithms.layers.layerwise import float_weight, trial
from torchquant.algorithms.layers.layout import Layout
from torchquant.algorithms.qdrop import QDrop
from torchquant.algorithms.spans.objective import Objective
from torchquant.algorithms.spans.reconstruction import LearnedStep, Reconstruction, StraightThrough
from torchquant.calibration.stream import Stream
from torchquant.fx.blocks import layers, weight_grid
from torchquant.fx.grids import grid_of
from torchquant.fx.reading import observers
from torchquant.solving.contract import Clock
from torchquant.solving.solved import Solution, SolvedWeight

KINDS = ("conv2d", "linear", "conv_transpose2d")
W4A8 = SpecQuantizer(KINDS, per_tensor(torch.uint8, 0, 255), per_channel(low=-7, high=7))


class Residual(nn.Module):
    """A stem, one residual block, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.b(self.a(x).relu()) + x).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture
def batches():
    return [torch.randn(4, 3, 8, 8) for _ in range(4)]


def codes_of(prepared):
    return {str(n.args[0]): o.codes for n, o in observers(prepared) if isinstance(o, SolvedWeight)}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(8, 5, bias=False), (1, 30, 8)),
        (nn.Conv2d(4, 6, 3, padding=1, bias=False), (1, 4, 6, 5)),
        (nn.Conv2d(4, 4, 3, stride=2, groups=4, bias=False), (1, 4, 7, 7)),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False), (1, 4, 5, 5)),
    ],
)
def test_at_hard_rounding_the_loss_of_one_layer_is_adarounds_quadratic_form(layer, shape):
    layer.reset_parameters()  # seeded, unlike at import
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    quantizer = SpecQuantizer(KINDS, per_tensor(low=-8, high=7), per_channel(low=-3, high=3, axis=axis))
    sample = [torch.randn(shape)]
    prepared = calibrated(nn.Sequential(layer), sample, quantizer)
    [span] = layers(prepared)
    (site,) = span.sites
    for task in Stream(prepared, sample).walk([span]):
        grid = weight_grid(prepared, site)
        up = (torch.rand(layer.weight.shape) < 0.5).float()
        codes = (torch.floor(layer.weight.detach() / grid.expand(layer.weight.shape)[0]) + up).clamp(-3, 3)
        chosen = Solution(weights={site.name: (codes, grid)})
        layout = Layout.of(site, layer.weight.shape)
        joined = Moments.joined(moments(task, site, layout))
        W, V = layout.matrix(layer.weight.detach()), layout.matrix(grid.decode(codes))
        energy = float(task.targets(0)[0].square().sum())
        form = joined.count * float(((V @ joined.a) * V).sum() - 2 * ((W @ joined.b) * V).sum())
        objective = Objective(task, sensitive=False)
        assert objective.of(trial(task, chosen)) == pytest.approx(form + energy, rel=1e-4)
        learned = Reconstruction(objective, Clock(), {site: (codes, grid)}, {}, learn_steps=False)
        assert float(learned.loss()) == pytest.approx(form + energy, rel=1e-4)


def test_without_drop_qdrop_is_brecq(batches):
    model = Residual()
    graphs = [calibrated(model, batches, W4A8) for _ in range(2)]
    results = [
        tq.optimize(prepared, batches, [algorithm], seed=3, progress=False)
        for prepared, algorithm in zip(graphs, (BRECQ(20), QDrop(20, drop=0.0)), strict=True)
    ]
    assert [s.after for s in results[0].spans] == [s.after for s in results[1].spans]
    one, other = map(codes_of, graphs)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize("algorithm", [BRECQ(), BRECQ(fisher=False), BRECQ(compensate=False), QDrop(), AdaQuant(150)])
def test_no_block_ends_above_the_error_of_rounding_to_nearest(algorithm, batches):
    prepared = calibrated(Residual(), batches, W4A8)
    result = tq.optimize(prepared, batches, [algorithm], progress=False)
    assert len(result.spans) == len(algorithm.spans(prepared, frozenset()))
    assert all(span.kept == (span.after <= span.before) for span in result.spans)
    assert sum(span.after < span.before for span in result.spans) >= len(result.spans) / 2
    assert result.steps[-1][1] > result.steps[0][1]


def test_brecq_refines_the_codes_that_stand_in_the_graph(batches):
    prepared = calibrated(Residual(), batches, W4A8)
    tq.optimize(prepared, batches, [AdaRound(50)], progress=False)
    before = {name: codes.clone() for name, codes in codes_of(prepared).items()}
    tq.optimize(prepared, batches, [BRECQ(0, rounds=0, start=None)], progress=False)
    after = codes_of(prepared)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


GRIDS = {
    "per channel": per_channel(low=-7, high=7),
    "per group": groupwise(4),
    "per tensor": per_tensor(low=-7, high=7, symmetric=True),
    "affine": per_channel(torch.uint8, 0, 15, symmetric=False),
}


def weight_and_grid(name):
    layer = nn.Linear(8, 6)
    with torch.no_grad():
        layer.weight *= torch.logspace(-3, 0, 6)[:, None]  # channels of very different scale
    prepared = calibrated(nn.Sequential(layer), [torch.randn(4, 8)], SpecQuantizer(KINDS, None, GRIDS[name]))
    site = layers(prepared)[0].sites[0]
    return float_weight(prepared, site) * 0.93, weight_grid(prepared, site)  # no weight halfway between two codes


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize("name", GRIDS)
def test_a_learned_weight_starts_at_the_nearest_codes(name):
    weight, grid = weight_and_grid(name)
    codes, same = StraightThrough(weight, grid).answer()
    assert torch.equal(codes, grid.encode(weight))
    assert torch.allclose(same.scale, grid.scale)


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize("name", [name for name in GRIDS if name != "per tensor"])
def test_a_learned_weight_starts_at_the_codes_chosen_before(name):
    weight, grid = weight_and_grid(name)
    codes = torch.randint(grid.quant_min, grid.quant_max + 1, weight.shape)
    learned, same = StraightThrough(weight, grid, codes).answer()
    assert torch.equal(learned, codes.float())
    assert torch.allclose(same.scale, grid.scale)


def test_a_learned_step_starts_at_the_observers_grid_and_drops_a_share():
    observer = per_tensor(torch.uint8, 0, 255).observer_or_fake_quant_ctr(
        dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine
    )
    x = torch.randn(100, 100)
    observer(x)
    grid = grid_of(observer, x.shape)
    step = LearnedStep(grid, 0.0, torch.Generator())
    assert torch.allclose(step(x), grid.nearest(x), atol=1e-6)
    assert step.answer() == pytest.approx((float(grid.scale), int(grid.zero_point)))
    step(x).square().sum().backward()
    assert float(step.log_scale.grad) != 0
    dropped = LearnedStep(grid, 0.3, torch.Generator().manual_seed(0))(x)
    assert float((dropped == x).float().mean()) == pytest.approx(0.3, abs=0.03)


def test_sensitivities_are_the_squared_gradients_of_a_linear_net_in_closed_form():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 2))
    sample = [torch.randn(2, 4)]
    prepared = calibrated(model, sample, W4A8)
    spans, stream = layers(prepared), Stream(prepared, sample)
    stream.sensitivities(spans, seed=0, draws=4000)
    behind = [model[2].weight @ model[1].weight, model[2].weight, torch.eye(2)]
    for task, jacobian in zip(stream.walk(spans), behind, strict=True):
        [sensitivity] = task.sensitivity(0)
        assert torch.allclose(sensitivity, jacobian.detach().square().sum(0).expand_as(sensitivity), rtol=0.12)


def test_sensitivities_are_the_squared_gradients_by_autograd():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    sample = [torch.randn(1, 2, 5, 5) for _ in range(2)]
    prepared = calibrated(model, sample, W4A8)
    spans, stream = layers(prepared), Stream(prepared, sample)
    stream.sensitivities(spans, seed=0, draws=3000)
    for task, position in zip(stream.walk(spans), (0, 2, 5), strict=True):
        for batch in range(2):
            [y] = task.targets(batch)
            jacobian = torch.autograd.functional.jacobian(model[position + 1 :], y)
            [sensitivity] = task.sensitivity(batch)
            exact = jacobian.flatten(0, 1).square().sum(0)
            assert (sensitivity - exact).norm() < 0.1 * exact.norm()


def test_the_output_metric_is_the_jacobians_gram_matrix():
    model, sample = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 6)), [torch.randn(500, 4)]
    prepared = calibrated(model, sample, W4A8)
    spans, stream = layers(prepared), Stream(prepared, sample)
    stream.sensitivities(spans, seed=0, draws=20)
    exact = model[1].weight.detach().T @ model[1].weight.detach()
    exact = exact / exact.diagonal().mean()
    for task, wanted in zip(stream.walk(spans), (exact, torch.eye(6)), strict=True):
        metric = task.output_metric(task.span.sites[0])
        assert (metric - wanted).norm() < 0.1 * wanted.norm()


def test_a_mean_of_draws_approaches_its_limit():
    model, sample = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 6)), [torch.randn(5, 4)]
    prepared = calibrated(model, sample, W4A8)
    exact, off = model[1].weight.detach().square().sum(0), []
    for draws in (2, 2000):
        spans, stream = layers(prepared), Stream(prepared, sample)
        stream.sensitivities(spans, seed=1, draws=draws)
        sensitivities = [task.sensitivity(0)[0] for task in stream.walk(spans)]
        off.append(float((sensitivities[0] - exact).abs().mean()))
    assert off[1] < 0.2 * off[0]


def test_without_fisher_nothing_is_measured(batches):
    prepared = calibrated(Residual(), batches, W4A8)
    algorithm, stream = BRECQ(fisher=False), Stream(prepared, batches)
    spans = algorithm.spans(prepared, frozenset())
    algorithm.begin(stream, spans, 0)
    for task in stream.walk(spans):
        assert task.sensitivity(0) == [None] * len(task.results)


def test_time_that_is_up_still_gives_an_answer(batches):
    prepared = calibrated(Residual(), batches, W4A8)
    spans = BRECQ().spans(prepared, frozenset())
    for task in Stream(prepared, batches).walk(spans):
        solution = BRECQ(10**9).solve(task, Clock(seconds=0.0))
        assert solution.weights.keys() == {site.name for site in task.span.sites}


@pytest.mark.parametrize("drop", [-0.1, 1.0, math.nan])
def test_a_drop_outside_zero_to_one_is_refused(drop):
    with pytest.raises(tq.InputError, match="drop"):
        QDrop(drop=drop)


def test_block_sizes_that_contradict_are_refused():
    with pytest.raises(tq.InputError, match="min_sites 5 and max_sites 3"):
        BRECQ(min_sites=5, max_sites=3)
