"""HQQ: the paper's iteration, and its promise: in no cell is the l_p error above that of the observer's grid."""

import dataclasses

import pytest
import torch
from foreign import SpecQuantizer, groupwise, per_channel, per_tensor
from torch import nn

import torchquant as tq
from torchquant.algorithms.hqq import HQQ, iterates, shrink
from torchquant.algorithms.layers.rounding import Problem
from torchquant.quantizers import WeightOnlyQuantizer


def problem(out=8, inputs=64, width=32, *, bits=3, symmetric=False, outlier=0.0, seed=0):
    """Weights in groups of `width`, of which the first of each may be an outlier; the observer's min-max grid."""
    target = torch.randn(1, out, inputs, generator=torch.Generator().manual_seed(seed))
    target[..., ::width] += outlier
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    parts = target.reshape(1, out, -1, width)
    least, most = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scale = torch.maximum(-least, most) / high if symmetric else (most - least) / (high - low)
    zero = torch.zeros_like(scale) if symmetric else (low - torch.round(least / scale)).clamp(low, high)
    cells = torch.arange(scale.numel()).reshape(scale.shape)
    scale, zero, cells = (t.repeat_interleave(width, 2) for t in (scale, zero, cells))
    return Problem(target, torch.empty(0), scale, zero, cells, int(cells.max()) + 1, low, high, symmetric=symmetric)


def authors(weight, scale, zero, low, high, *, p=0.7, beta=10.0, kappa=1.01, iterations=20):
    """The authors' loop over rows (cells, k): float zero points after each iteration."""
    zeros = []
    for _ in range(iterations):
        codes = torch.clamp(torch.round(weight / scale + zero), low, high)
        rest = weight - scale * (codes - zero)
        error = torch.sign(rest) * torch.relu(rest.abs() - (1 / beta) * rest.abs().pow(p - 1))
        zero = torch.mean(codes - (weight - error) / scale, dim=1, keepdim=True)
        zeros.append(zero)
        beta *= kappa
    return zeros


def errors(of, codes, p=0.7):
    off = (of.target - of.values(codes)).abs().pow(p)
    return torch.zeros(of.count).index_add_(0, of.cells.reshape(-1), off.reshape(-1))


def test_the_zero_points_before_they_are_rounded_are_the_authors():
    of = problem(outlier=4.0)
    unit = dataclasses.replace(of, target=of.target / of.scale, scale=torch.ones_like(of.scale))
    found = [zero for _, zero in iterates(of, 0.7, 10.0, 1.01, 20, scales=False)]
    rows, start = unit.target.reshape(-1, 32), unit.zero_point.reshape(-1, 32)[:, :1]
    expected = authors(rows, torch.ones(len(rows), 1), start, of.low, of.high)
    assert len(found) == 20
    for zero, other in zip(found, expected, strict=True):
        assert torch.allclose(zero, other[:, 0], atol=1e-4)
    assert not torch.allclose(found[-1], start[:, 0], atol=0.02)  # they do move


@pytest.mark.parametrize("p", [0.3, 0.7, 1.0])
def test_shrinking_lowers_the_splittings_objective(p):
    x, beta = torch.linspace(-3, 3, 101), 10.0

    def objective(e):
        return beta / 2 * (e - x).square() + e.abs().pow(p) / p  # whose stationary points the paper approximates

    shrunk = shrink(x, beta, p)
    assert bool((objective(shrunk) <= objective(x) + 1e-6).all())
    assert bool((shrunk.abs() <= x.abs()).all())
    assert bool((shrunk * x >= 0).all())
    assert float(shrunk[50]) == 0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("outlier", [0.0, 6.0])
def test_no_cell_is_worse_than_the_observers_grid_and_the_whole_is_better(symmetric, bits, outlier):
    of = problem(symmetric=symmetric, bits=bits, outlier=outlier)
    answer = HQQ().choose(of)
    before = errors(of, of.nearest())
    after = errors(of.scaled(answer.factor, answer.zero_point), answer.codes)
    assert bool((after <= before * (1 + 1e-5)).all())
    assert after.sum() < 0.985 * before.sum()


def test_zero_points_are_integers_within_the_codes_and_those_of_symmetric_grids_stay():
    of = problem(outlier=9.0, bits=2)
    answer = HQQ().choose(of)
    assert torch.equal(answer.zero_point, answer.zero_point.round())
    assert of.low <= answer.zero_point.min() <= answer.zero_point.max() <= of.high
    assert HQQ().choose(problem(symmetric=True)).zero_point is None


def test_cells_of_zeros_and_of_one_value_stay_finite():
    of = problem()
    of.target[0, 0] = 0
    of.target[0, 1] = 5.0
    answer = HQQ().choose(of)
    assert bool((answer.factor > 0).all() and answer.factor.isfinite().all())
    assert float(of.scaled(answer.factor, answer.zero_point).values(answer.codes)[0, 0].abs().max()) == 0


@pytest.mark.parametrize(
    ("argument", "message"),
    [({"p": 0.0}, "p is 0"), ({"p": 1.5}, "p is 1.5"), ({"beta": 0}, "beta is 0"), ({"kappa": 0.5}, "kappa 0.5"),
     ({"iterations": 0}, "iterations is 0")],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(argument, message):
    with pytest.raises(tq.InputError, match=message):
        HQQ(**argument)


class Net(nn.Module):
    """A convolution, a depthwise one and linears, with weights far from normal."""

    def __init__(self):
        super().__init__()
        self.first, self.deep = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=32)
        self.up, self.head = nn.Linear(32, 64), nn.Linear(64, 16)
        with torch.no_grad():
            for layer in (self.first, self.deep, self.up, self.head):
                layer.weight.copy_(torch.randn_like(layer.weight) * torch.rand_like(layer.weight).pow(4))

    def forward(self, x):
        return self.head(self.up(self.deep(self.first(x).relu()).mean((2, 3))).relu())


def optimized(quantizer, algorithms, **options):
    torch.manual_seed(0)
    net, batches = Net().eval(), [(torch.randn(8, 3, 8, 8),) for _ in range(2)]
    prepared = tq.prepare(tq.export(net, batches[0]), quantizer)
    tq.calibrate(prepared, batches, progress=False)
    result = tq.optimize(prepared, batches, algorithms, progress=False, **options)
    return tq.convert(prepared), result, net, batches


QUANTIZERS = {
    "weights": lambda: WeightOnlyQuantizer("w3_g16"),
    "symmetric weights": lambda: WeightOnlyQuantizer("w3_symmetric"),
    "foreign channels": lambda: SpecQuantizer(("conv2d", "linear"), per_tensor(), per_channel(low=-4, high=3)),
    "foreign groups": lambda: SpecQuantizer(("linear",), per_tensor(), groupwise(16)),
}


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")  # a Quantizer of linears alone
@pytest.mark.parametrize("name", QUANTIZERS)
def test_it_serves_any_quantizer_and_is_kept_where_no_worse(name):
    model, result, net, batches = optimized(QUANTIZERS[name](), [HQQ()])
    assert {s.span for s in result.spans} >= {"up", "head"}
    assert all(s.after <= s.before for s in result.spans if s.kept)
    plain, *_ = optimized(QUANTIZERS[name](), [])
    expected = net(*batches[0])
    assert tq.sqnr_db(expected, model(*batches[0])) > tq.sqnr_db(expected, plain(*batches[0])) - 0.1
    if name == "weights":
        assert result.steps[-1][1] > result.steps[0][1] + 0.5


def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path, monkeypatch):
    quantizer = QUANTIZERS["weights"]
    whole, *_, batches = optimized(quantizer(), [HQQ()])
    solve, calls = HQQ.solve, []

    def stopping(self, task, clock):
        calls.append(task.span.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return solve(self, task, clock)

    monkeypatch.setattr(HQQ, "solve", stopping)
    with pytest.raises(KeyboardInterrupt):
        optimized(quantizer(), [HQQ()], checkpoint=tmp_path / "run")
    resumed, *_ = optimized(quantizer(), [HQQ()], checkpoint=tmp_path / "run")
    assert calls == ["first", "deep", "up", "up", "head"]
    assert torch.equal(resumed(*batches[0]), whole(*batches[0]))
