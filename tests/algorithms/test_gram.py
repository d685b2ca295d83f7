"""Layer objectives from moments: equal to the sampled error, minimized as promised, brute force on tiny layers."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foreign import SpecQuantizer, calibrated, groupwise, per_channel, per_tensor
from torch import nn

from torchquant.algorithms.adaround import AdaRound
from torchquant.algorithms.layers import gram
from torchquant.algorithms.layers.descent import descend
from torchquant.algorithms.layers.gram import Moments, choose_damp, compensated, damp_, moments
from torchquant.algorithms.layers.grid_search import search_scale
from torchquant.algorithms.layers.layerwise import float_weight
from torchquant.algorithms.layers.layout import Layout
from torchquant.algorithms.layers.rounding import Problem, enumerate_rounding, fit_scale
from torchquant.algorithms.seq_mse import SeqMSE
from torchquant.calibration.stream import Stream
from torchquant.errors import SchemeError
from torchquant.fx.blocks import layers, weight_grid
from torchquant.solving.contract import Clock

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "linear")
LAYERS = {
    "linear 2-D": (nn.Linear(6, 5), (7, 6)),
    "linear 3-D": (nn.Linear(6, 5), (3, 4, 6)),
    "conv1d": (nn.Conv1d(4, 5, 3, stride=2, padding=1), (3, 4, 9)),
    "conv1d same": (nn.Conv1d(4, 5, 4, padding="same"), (3, 4, 9)),
    "conv1d dilated": (nn.Conv1d(4, 5, 3, padding="same", dilation=2), (3, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3), (2, 4, 7, 6)),
    "conv2d strided": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2)), (2, 4, 7, 6)),
    "conv2d valid": (nn.Conv2d(4, 6, 2, padding="valid"), (2, 4, 7, 6)),
    "conv2d same": (nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(2, 1)), (2, 4, 7, 6)),
    "conv2d groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 7, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, stride=2, padding=1), (2, 4, 7, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2, padding=1), (2, 2, 4, 3, 5)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 5, 3, stride=2, padding=1, output_padding=1), (3, 4, 6)),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 5, (3, 2), stride=(2, 3), padding=(1, 0)), (2, 4, 5, 4)),
    "conv_transpose2d groups": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1, dilation=2),
        (2, 4, 5, 4),
    ),
}


def one_site(layer, shape, weight, batches=3):
    """The task of a single layer, and its batches; its input is quantized to four bits."""
    layer.reset_parameters()  # seeded, unlike at import
    model, data = nn.Sequential(layer), [torch.randn(shape) for _ in range(batches)]
    prepared = calibrated(model, data, SpecQuantizer(KINDS, per_tensor(low=-8, high=7), weight))
    walk = Stream(prepared, data).walk(layers(prepared))
    return next(walk), walk


def axis_of(name):
    return 1 if "transpose" in name else 0


@pytest.mark.parametrize("name", LAYERS)
def test_the_quadratic_form_is_the_squared_error_on_the_data(name):
    layer, shape = LAYERS[name]
    task, walk = one_site(layer, shape, per_channel(low=-3, high=3, axis=axis_of(name)))
    (site,) = task.span.sites
    exact, grid = float_weight(task.prepared, site), weight_grid(task.prepared, site)
    layout = Layout.of(site, exact.shape)
    joined = Moments.joined(moments(task, site, layout))
    W, V = layout.matrix(exact), layout.matrix(grid.nearest(exact))
    form = ((V @ joined.a) * V).sum() - 2 * ((W @ joined.b) * V).sum()
    sampled, weights = 0.0, {site.args[1]: grid.nearest(exact)}
    for batch in range(task.count):
        bias = task.targets(batch)[0] * 0 + (layer.bias.detach() if layout.stride == () else 0)
        if layout.stride:
            bias = bias + layer.bias.detach().reshape(-1, *(1,) * (len(exact.shape) - 2))
        y, yq = task.targets(batch)[0] - bias, task.outputs(batch, task.evaluator(weights=weights))[0] - bias
        sampled += float((yq * yq - 2 * y * yq).sum(dtype=torch.float64))
    assert float(form) * joined.count == pytest.approx(sampled, rel=1e-4)
    assert torch.equal(layout.tensor(W), exact)
    walk.close()


def test_an_op_that_is_no_matrix_product_is_refused():
    task, walk = one_site(*LAYERS["conv2d"], per_channel())
    with pytest.raises(SchemeError, match="not a matrix product"):
        Layout.of(next(n for n in task.prepared.graph.nodes if n.op == "output"), torch.Size([1, 1]))
    walk.close()


def test_the_moments_do_not_depend_on_how_the_samples_come_in_batches():
    layer, data = nn.Conv2d(3, 4, 3, padding=1), torch.randn(12, 3, 5, 5)
    joined = []
    for size in (2, 4, 12):
        model, batches = nn.Sequential(layer), list(data.split(size))
        prepared = calibrated(model, batches, SpecQuantizer(KINDS, per_tensor(), per_channel()))
        for task in Stream(prepared, batches).walk(layers(prepared)):
            (site,) = task.span.sites
            joined.append(Moments.joined(moments(task, site, Layout.of(site, layer.weight.shape))))
    for same in joined[1:]:
        assert same.count == joined[0].count
        for name in ("a", "b", "mean_q", "mean"):
            assert torch.allclose(getattr(same, name), getattr(joined[0], name), atol=1e-5)


def test_centred_moments_are_covariances():
    x, xq = torch.randn(2, 5, 100), torch.randn(2, 5, 100) + 3
    a, b = xq @ xq.mT / 100, x @ xq.mT / 100
    centred = Moments(a, b, xq.mean(-1), x.mean(-1), 100).centre_()
    xc, xqc = x - x.mean(-1, keepdim=True), xq - xq.mean(-1, keepdim=True)
    assert torch.allclose(centred.a, xqc @ xqc.mT / 100, atol=1e-4)
    assert torch.allclose(centred.b, xc @ xqc.mT / 100, atol=1e-4)


# solvers of the problem ---------------------------------------------------------------------------------------------


def problem(outputs=6, inputs=8, low=-3, high=3, groups=1, cell=None):
    """A random problem with correlated inputs; a cell is a row, or `cell` weights of one."""
    x = torch.randn(groups, inputs, 40) + torch.randn(groups, 1, 40)
    metric = x @ x.mT / 40
    target, cell = torch.randn(groups, outputs, inputs), cell or inputs
    cells = torch.arange(groups * outputs * inputs).reshape(target.shape) // cell
    scale = target.reshape(-1, cell).abs().amax(1) / high
    return Problem(target, metric, scale[cells], torch.zeros_like(target), cells, len(scale), low, high)


def neighbours(of, codes):
    """The error after each change of one code by one."""
    for index in itertools.product(*map(range, codes.shape)):
        for step in (-1, 1):
            trial = codes.clone()
            trial[index] = (trial[index] + step).clamp(of.low, of.high)
            yield of.error(trial)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("block", [1, 3, 64])
def test_descent_never_raises_the_error_and_ends_where_no_single_code_helps(groups, block):
    of = problem(groups=groups)
    start = of.clamp(torch.round(torch.randn(of.target.shape) * 2))
    errors = [of.error(start)]
    for sweeps in range(1, 6):
        errors.append(of.error(descend(of, start, sweeps, block)))
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
    codes = descend(of, start, 50, block)
    assert min(neighbours(of, codes)) >= of.error(codes) * (1 - 1e-6)
    assert codes.min() >= of.low
    assert codes.max() <= of.high


def coupled(of):
    """The same problem with outputs that the error couples."""
    groups, outputs = of.target.shape[:2]
    y = torch.randn(groups, outputs, 3 * outputs) + torch.randn(groups, 1, 3 * outputs)
    return dataclasses.replace(of, outputs=y @ y.mT / (3 * outputs))


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("groups", [1, 3])
def test_descent_with_coupled_outputs_never_raises_the_error_and_ends_where_no_single_code_helps(groups, block):
    of = coupled(problem(groups=groups))
    start = descend(of.by_rows(), of.nearest())
    errors = [of.error(start), *(of.error(descend(of, start, sweeps, block)) for sweeps in range(1, 6))]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
    assert errors[-1] < errors[0]
    codes = descend(of, start, 50, block)
    assert min(neighbours(of, codes)) >= of.error(codes) * (1 - 1e-6)
    assert codes.min() >= of.low
    assert codes.max() <= of.high


def test_unit_outputs_are_no_outputs():
    of = problem()
    unit = dataclasses.replace(of, outputs=torch.eye(6)[None])
    assert unit.error(of.nearest()) == pytest.approx(of.error(of.nearest()))
    assert torch.equal(descend(unit, of.nearest()), descend(of, of.nearest()))


def test_descent_along_a_given_slope_is_descent_on_the_problem_whose_slope_it_is():
    of = coupled(problem())
    start = of.nearest()
    slope = of.slope(of.values(start) - of.target)
    elsewhere = dataclasses.replace(of, target=of.values(start))
    assert torch.equal(descend(elsewhere, start, slope=slope), descend(of, start))
    assert torch.equal(descend(elsewhere, start), start)


def test_descent_finds_the_same_codes_whatever_the_block():
    of = problem(inputs=30)
    codes = [descend(of, of.nearest(), 20, block) for block in (1, 7, 64)]
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


def brute_force(of):
    """The least error over all roundings up or down, row by row."""
    floor = torch.floor(of.target / of.scale) + of.zero_point
    best = torch.full(of.target.shape[:2], torch.inf, dtype=torch.float64)
    for choice in itertools.product((0, 1), repeat=of.target.shape[-1]):
        off = (of.values(of.clamp(floor + torch.tensor(choice))) - of.target).double()
        best = torch.minimum(best, ((off @ of.metric.double()) * off).sum(-1))
    return float(best.sum())


@pytest.mark.parametrize("inputs", [1, 2, 5, 8, 9])
def test_enumerated_rounding_is_the_brute_force_optimum(inputs):
    of = problem(outputs=3, inputs=inputs, groups=2)
    codes = enumerate_rounding(of)
    assert of.error(codes) == pytest.approx(brute_force(of), rel=1e-5)
    assert enumerate_rounding(problem(inputs=10)) is None


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("inputs", [2, 4, 8])
def test_adaround_is_at_most_the_brute_force_optimum_on_tiny_layers(inputs, seed):
    torch.manual_seed(seed)
    of = problem(outputs=3, inputs=inputs)
    answer = AdaRound(search=False, refits=0).choose(of, Clock())
    assert of.error(answer.codes) <= brute_force(of) * (1 + 1e-5) + 1e-9


def test_the_relaxation_comes_near_the_brute_force_optimum(monkeypatch):
    monkeypatch.setattr("torchquant.algorithms.adaround.enumerate_rounding", lambda problem: None)
    share = []
    for seed in range(8):
        torch.manual_seed(seed)
        of = problem(outputs=3, inputs=8)
        answer = AdaRound(search=False, refits=0).choose(of, Clock())
        assert of.error(answer.codes) <= of.error(of.nearest())
        share.append(of.error(answer.codes) / brute_force(of))
    assert sum(share) / len(share) < 1.2


GRIDS = {
    **{f"{bits} bits": per_channel(low=-(2 ** (bits - 1)), high=2 ** (bits - 1) - 1) for bits in range(2, 9)},
    "groups of 3": groupwise(3),
    "per tensor": per_tensor(low=-7, high=7, symmetric=True),
    "axis 1": per_channel(low=-7, high=7, axis=1),
    "affine": per_channel(torch.uint8, 0, 15, symmetric=False),
}


@pytest.mark.parametrize("algorithm", [AdaRound(100), SeqMSE()])
@pytest.mark.parametrize("name", GRIDS)
def test_the_error_is_at_most_that_of_rounding_to_nearest(name, algorithm):
    task, walk = one_site(nn.Linear(12, 10), (50, 12), GRIDS[name])
    (site,) = task.span.sites
    weight, grid = float_weight(task.prepared, site), weight_grid(task.prepared, site)
    layout = Layout.of(site, weight.shape)
    target, metric, _ = algorithm._aim(task, site, layout, layout.matrix(weight))
    of = Problem.of(weight, layout, grid, target, metric)
    answer = algorithm.choose(of, Clock())
    assert of.scaled(answer.factor, answer.zero_point).error(answer.codes) <= of.error(of.nearest())
    assert answer.codes.min() >= grid.quant_min
    assert answer.codes.max() <= grid.quant_max
    walk.close()


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "conv3d"])
def test_adaround_lowers_the_error_of_every_kind_of_layer(name):
    layer, shape = LAYERS[name]
    task, walk = one_site(layer, shape, per_channel(low=-3, high=3, axis=axis_of(name)))
    (site,) = task.span.sites
    solution = AdaRound(100).solve(task, Clock())
    codes, grid = solution.weights[site.name]
    evaluator = task.evaluator(weights={site.args[1]: grid.decode(codes)}, biases={site: solution.biases[site.name]})
    error = sum(
        float((task.outputs(b, evaluator)[0] - task.targets(b)[0]).square().sum(dtype=torch.float64)) for b in range(3)
    )
    assert error < task.error()
    walk.close()


def test_fitted_scales_lower_the_error_of_every_channel():
    of = problem(outputs=20, inputs=16)
    codes = of.nearest()
    factor = fit_scale(of, codes)
    before, after = of.contributions(codes).sum(-1), of.scaled(factor).contributions(codes).sum(-1)
    assert bool((after <= before * (1 + 1e-6)).all())
    assert after.sum() < before.sum()
    for share in (0.99, 1.01):
        assert of.scaled(factor * share).error(codes) > of.scaled(factor).error(codes)


def test_a_searched_scale_is_the_best_of_the_candidates_for_every_channel():
    of, factors = problem(outputs=5, inputs=6), torch.linspace(1.2, 0.3, 10)
    chosen = search_scale(of, factors)
    trials = [of.scaled(torch.full((of.count,), f)) for f in factors.tolist()]
    errors = torch.stack([t.contributions(t.nearest()).sum(-1).reshape(-1) for t in trials])
    assert torch.equal(chosen, factors[errors.argmin(0)])


def test_without_a_quantized_prefix_the_compensated_target_is_the_weight():
    x = torch.randn(1, 5, 100)
    a = x @ x.mT / 100
    matrix = torch.randn(1, 4, 5)
    same_moments = Moments(a, a, x.mean(-1), x.mean(-1), 100)
    assert torch.allclose(compensated(matrix, same_moments, 0.001), matrix, atol=1e-4)


def halves(samples, noise, inputs=20):
    """Two halves of data in which the quantized input is the float one and noise."""
    for _ in range(2):
        x = torch.randn(1, inputs, samples)
        xq = x + noise * torch.randn(1, inputs, samples)
        yield Moments(xq @ xq.mT / samples, x @ xq.mT / samples, xq.mean(-1), x.mean(-1), samples)


def test_little_data_is_damped_much_and_plenty_little():
    damps, matrix = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0), torch.randn(1, 4, 20)
    assert choose_damp(matrix, list(halves(10, 0.3)), damps) >= 1
    assert choose_damp(matrix, list(halves(20000, 0.3)), damps) <= 0.01
    empty, full = list(halves(10, 0.3))
    assert choose_damp(matrix, [Moments(empty.a, empty.b, empty.mean_q, empty.mean, 0), full], damps) == 100


def test_compensation_lowers_the_error_of_the_output_on_noisy_inputs():
    one, other = halves(5000, 0.5)
    matrix = torch.randn(1, 4, 20)

    def error(target):
        return float(((target @ other.a) * target).sum() - 2 * ((matrix @ other.b) * target).sum())

    assert error(compensated(matrix, one, 0.01)) < error(matrix)


def test_damping_is_a_share_of_the_mean_diagonal():
    a = torch.diag(torch.tensor([1.0, 3.0]))[None]
    assert torch.equal(damp_(a.clone(), 0.1), a + torch.diag(torch.tensor([0.2, 0.2])))


@pytest.mark.parametrize("name", LAYERS)
def test_moments_of_all_data_at_once_are_those_of_the_halves_joined(name):
    layer, shape = LAYERS[name]
    task, _ = one_site(layer, shape, per_channel(low=-3, high=3, axis=axis_of(name)))
    (site,) = task.span.sites
    layout = Layout.of(site, float_weight(task.prepared, site).shape)
    joined = Moments.joined(moments(task, site, layout))
    (whole,) = moments(task, site, layout, halves=False, crossed=False)
    assert whole.b is None
    assert whole.count == joined.count
    torch.testing.assert_close(whole.a, joined.a)
    torch.testing.assert_close(whole.mean, joined.mean)


@pytest.mark.parametrize("inputs", [1, 127, 128, 129, 700, 1024])
def test_the_triangle_that_is_added_up_gives_the_whole_product(inputs):
    x = torch.randn(33, inputs)
    sums = gram._Sums(1, inputs)
    sums.add(x, 2 * x, Layout(torch.Size((4, inputs))))
    sums.add(-x, x, Layout(torch.Size((4, inputs))))
    whole, exact = sums.moments(), x.double().T @ x.double() / 33
    assert torch.equal(whole.a, whole.a.transpose(1, 2))
    torch.testing.assert_close(whole.a[0].double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.b[0].double(), exact / 2, rtol=1e-5, atol=1e-5)


def test_the_halves_of_the_data_go_on_where_those_of_the_processes_before_end(monkeypatch):
    task, _ = one_site(nn.Linear(6, 5), (3, 6), per_channel(), batches=3)
    (site,) = task.span.sites
    layout = Layout.of(site, torch.Size((5, 6)))
    even, odd = moments(task, site, layout)
    assert even.count != odd.count
    monkeypatch.setattr(gram, "preceding", lambda count: 1)
    swapped = moments(task, site, layout)
    assert torch.equal(swapped[0].a, odd.a)
    assert torch.equal(swapped[1].a, even.a)


# memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1, 50, 10**6])
@pytest.mark.parametrize("name", LAYERS)
def test_the_columns_come_in_pieces_as_small_as_a_row_of_places(name, elements):
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    prepared = calibrated(
        nn.Sequential(layer), [x], SpecQuantizer(KINDS, per_tensor(), per_channel(axis=axis_of(name)))
    )
    (span,) = layers(prepared, frozenset())
    layout = Layout.of(span.sites[0], layer.weight.shape)
    whole, pieces = layout.columns(x), list(layout.pieces(x, elements))
    together = torch.cat(pieces, 2)
    assert together.shape == whole.shape
    for column_sums in (lambda c: c.sum(2), lambda c: c @ c.transpose(1, 2)):  # whatever their order
        assert torch.allclose(column_sums(together), column_sums(whole), atol=1e-4)
    line = whole.shape[0] * whole.shape[1] * (1 if isinstance(layer, nn.Linear) else whole.shape[2] // len(x))
    assert max(p.numel() for p in pieces) <= max(elements, line)
    if elements == 1 and not isinstance(layer, nn.Linear) and len(shape) > 3:
        assert len(pieces) > len(x)  # a sample is cut too


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_moments_of_a_wide_image_take_little_more_memory_than_the_image():
    script = """
from pathlib import Path
import torch
from torchquant.algorithms.layers.gram import _Sums
from torchquant.algorithms.layers.layout import Layout
layout = Layout(torch.Size((96, 1, 5, 5)), 96, (1, 1), (2, 2), (1, 1))
sums, small, x = _Sums(96, 25), torch.randn(1, 96, 8, 8), torch.randn(1, 96, 160, 160)
sums.add(small, small, layout)  # what is set up once
Path("/proc/self/clear_refs").write_text("5")
def resident(name):
    return next(1024 * int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name))
before = resident("VmRSS")
sums.add(x, x, layout)
print((resident("VmHWM") - before) / x.nbytes)
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 5  # unfolded it is 25 times as large; padded, twice the image
