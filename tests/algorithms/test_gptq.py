"""GPTQ: its codes, its objective, its grids, and what it does where the moments are no good."""

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.algorithms.gptq import GPTQ, propagate
from torchquant.algorithms.layers.grid_search import search_grid
from torchquant.algorithms.layers.rounding import Problem
from torchquant.quantizers import WeightOnlyQuantizer

PAPER = {"search": False, "sweeps": 0, "refits": 0, "correct_bias": False, "compensate": False, "damp": 0.01}


def problem(out=6, inputs=64, width=16, *, symmetric=False, bits=3, seed=0):
    """Correlated inputs, weights of groups of `width`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    target = torch.randn(1, out, inputs, generator=generator) + 0.5
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    cells = torch.arange(out * inputs // width).reshape(1, out, -1).repeat_interleave(width, 2)
    parts = target.reshape(1, out, -1, width)
    least, most = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scale = (most - least) / (high - low)
    zero = (low - torch.round(least / scale)).clamp(low, high)
    scale, zero = (t.repeat_interleave(width, 2) for t in (scale, zero))
    metric = (x.T @ x / len(x))[None] + torch.eye(inputs)
    return Problem(target, metric, scale, zero, cells, int(cells.max()) + 1, low, high, symmetric=symmetric)


def plainly(of):
    """The paper's recursion by the inverse itself, brought up to date after each input (Optimal Brain Surgeon)."""
    inverse = torch.linalg.inv(of.metric[0].double())
    target, codes = of.target[0].double().clone(), torch.empty_like(of.target[0])
    for j in range(target.shape[1]):
        scale, zero = of.scale[0, :, j], of.zero_point[0, :, j]
        codes[:, j] = of.clamp(torch.round(target[:, j].float() / scale) + zero)
        error = target[:, j] - (codes[:, j] - zero) * scale
        target -= error[:, None] * inverse[j] / inverse[j, j]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # done with
    return codes[None]


def test_the_codes_are_those_of_the_recursion_with_the_inverse():
    of = problem()
    assert (propagate(of, act_order=False)[0] == plainly(of)).float().mean() > 0.99


@pytest.mark.parametrize("inputs", [64, 129, 300])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_error_is_well_below_that_of_rounding_to_nearest(inputs, act_order):
    of = problem(inputs=inputs, width=inputs)
    assert of.error(propagate(of, act_order)[0]) < 0.6 * of.error(of.nearest())


def test_dead_inputs_and_singular_moments_still_give_codes():
    of = problem()
    of.metric[:, 3] = of.metric[:, :, 3] = 0
    of.metric[:, 5] = of.metric[:, :, 5] = of.metric[:, 4]
    codes, raised = propagate(of)
    assert 0 < raised < 1
    assert bool(codes.isfinite().all())
    assert of.low <= codes.min()
    assert codes.max() <= of.high


def test_where_no_damping_helps_the_weights_are_rounded_to_nearest():
    of = problem()
    of.metric.fill_(torch.nan)
    codes, raised = propagate(of)
    assert raised == torch.inf
    assert torch.equal(codes, of.nearest())


def test_a_damping_that_had_to_be_raised_is_in_the_notes_also_of_a_resumed_run(tmp_path):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 8)).eval(), (torch.randn(3, 64),)  # 3 samples of 64 inputs

    def notes(damp):
        prepared = tq.prepare(tq.export(net, x), WeightOnlyQuantizer("w3_g32"))
        tq.calibrate(prepared, [x], progress=False)
        algorithm = GPTQ(**{**PAPER, "damp": damp})
        return tq.optimize(prepared, [x], [algorithm], checkpoint=tmp_path / str(damp), progress=False).notes

    assert notes(0.01) == []
    (note,) = notes(1e-12)
    assert note.startswith("GPTQ: linear: the second moments of its inputs are not positive definite: 1e-06 of")
    assert notes(1e-12) == [note]


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_searched_grid_is_never_worse_in_any_cell(width, symmetric):
    of = problem(width=width, symmetric=symmetric, bits=2)
    factor, zero_point = search_grid(of, torch.tensor([1.0, 0.8, 0.6]))
    assert (zero_point is None) == symmetric
    better = of.scaled(factor, zero_point)

    def errors(of):
        off = of.values(of.nearest()) - of.target
        return torch.zeros(of.count).index_add_(0, of.cells.reshape(-1), (of.own_slope(off) * off).reshape(-1))

    assert bool((errors(better) <= errors(of) * (1 + 1e-5)).all())
    assert errors(better).sum() < 0.9 * errors(of).sum()


def test_the_slope_of_a_cells_own_weights_is_the_masked_product():
    of = problem(inputs=48, width=16)
    off = torch.randn_like(of.target)
    same = of.cells[0, 0][:, None] == of.cells[0, 0][None]
    assert torch.allclose(of.own_slope(off), off @ (of.metric * same), rtol=1e-4, atol=1e-4)
    shuffled = torch.randperm(48)
    other = Problem(of.target, of.metric, of.scale, of.zero_point, of.cells[..., shuffled], of.count, of.low, of.high)
    same = other.cells[0, 0][:, None] == other.cells[0, 0][None]
    assert torch.allclose(other.own_slope(off), off @ (other.metric * same), rtol=1e-4, atol=1e-4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 64)
        self.up, self.down, self.odd = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 33)
        self.head = nn.Linear(33, 8)

    def forward(self, tokens):
        x = self.table(tokens)
        return self.head(torch.relu(self.odd(x + self.down(torch.relu(self.up(x))))))


def quantized(net, scheme, algorithms=(), **options):
    batches = [(torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(s)),) for s in range(4)]
    prepared = tq.prepare(tq.export(net, batches[0]), WeightOnlyQuantizer(scheme, **options))
    tq.calibrate(prepared, batches, progress=False)
    result = tq.optimize(prepared, batches, list(algorithms), progress=False) if algorithms else None
    return tq.convert(prepared), result, batches


@pytest.mark.parametrize("scheme", ["w4_g64", "w3_g32", "w2_g16", "w4", "w3_symmetric_g32", "w2_symmetric"])
def test_gptq_lifts_every_weight_only_scheme_of_a_network(scheme):
    torch.manual_seed(0)
    net = Net().eval()
    plain, _, batches = quantized(net, scheme)
    paper, _, _ = quantized(net, scheme, [GPTQ(**PAPER)])
    ours, result, _ = quantized(net, scheme, [GPTQ()])
    expected = net(*batches[0])
    errors = [float((model(*batches[0]) - expected).square().sum()) for model in (plain, paper, ours)]
    assert errors[1] <= errors[0] * 1.001
    assert errors[2] < 0.8 * errors[0]
    assert result is not None
    assert result.steps[-1][2]


def test_odd_widths_get_smaller_groups_or_channels_and_the_report_says_so():
    model, _, _ = quantized(Net().eval(), "w4_g128")
    sites = {s.module: s for s in tq.report(model).sites if s.compute}
    assert {name: s.status for name, s in sites.items()} == dict.fromkeys(sites, "quantized")
    # a group as long as a row is read as what it is: one scale a channel
    assert {s.weight.axis for s in sites.values()} == {0}
    assert sites["up"].reason.startswith("w4_g64: its 64 inputs are no multiple of 128")
    assert sites["odd"].reason.startswith("w4_g64")
    assert sites["head"].reason.startswith("w4: its 33 inputs")
    assert "w4" not in sites["down"].reason
    halves, _, _ = quantized(Net().eval(), "w4_g32")
    assert {s.weight.group_size for s in tq.report(halves).sites if s.compute} == {32, None}


def test_overrides_give_embeddings_other_bits():
    model, _, _ = quantized(Net().eval(), "w4_g64", overrides={"op:embedding": "w8"})
    highest = {s.module: s.weight.quant_max for s in tq.report(model).sites if s.compute}
    assert highest == {"table": 127, "up": 7, "down": 7, "odd": 7, "head": 7}


def test_transposed_and_depthwise_convolutions_have_a_scale_a_channel():
    net = nn.Sequential(nn.Conv2d(64, 64, 3, groups=64), nn.ConvTranspose2d(64, 32, 2), nn.Conv2d(32, 8, 1)).eval()
    x = (torch.randn(2, 64, 8, 8),)
    prepared = tq.prepare(tq.export(net, x), WeightOnlyQuantizer("w4_g16"))
    tq.calibrate(prepared, [x], progress=False)
    tq.optimize(prepared, [x], [GPTQ()], progress=False)
    model = tq.convert(prepared)
    weights = [s.weight for s in tq.report(model).sites if s.compute]
    assert [(w.axis, w.group_size) for w in weights] == [(0, None), (1, None), (None, 16)]
    assert tq.sqnr_db(net(*x), model(*x)) > 15


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model, _, batches = quantized(Net().eval(), "w3_g32", [GPTQ()])
    tq.save(model, tmp_path / "model.pt2", batches[0])
    assert torch.equal(tq.load(tmp_path / "model.pt2")(*batches[0]), model(*batches[0]))


def test_an_unknown_scheme_is_refused_with_those_there_are():
    with pytest.raises(tq.SchemeError, match=r"w5_g64.*w\{8,4,3,2\}"):
        WeightOnlyQuantizer("w5_g64")


def test_nothing_lowers_to_it_and_it_says_so():
    with pytest.raises(tq.SchemeError, match="is not lowered by torchquant"):
        WeightOnlyQuantizer.target.backend()


def test_tied_tables_and_bags_are_quantized():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.bag, self.head = nn.Embedding(40, 64), nn.EmbeddingBag(40, 64), nn.Linear(64, 40)
            self.head.weight = self.table.weight

        def forward(self, tokens):
            return self.head(self.table(tokens).mean(1) + self.bag(tokens))

    net = Bag().eval()
    x = (torch.randint(0, 40, (3, 7)),)
    prepared = tq.prepare(tq.export(net, x), WeightOnlyQuantizer("w8_g32"))
    tq.calibrate(prepared, [x], progress=False)
    tq.optimize(prepared, [x], [GPTQ()], progress=False)
    model = tq.convert(prepared)
    assert [(s.op, s.status) for s in tq.report(model).sites if s.compute] == [
        ("embedding", "quantized"),
        ("embedding", "quantized"),
        ("linear", "quantized"),
    ]
    assert tq.sqnr_db(net(*x), model(*x)) > 35
