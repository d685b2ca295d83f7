"""ranges: every search keeps its promise on its own grid, and the observers live through all of PT2E."""

import copy
import math

import nets
import pytest
import torch
from foreign import SpecQuantizer, groupwise, per_tensor
from torchao.quantization.granularity import PerGroup
from torchao.quantization.pt2e._affine_quantization import AffineQuantizedMinMaxObserver
from torchao.quantization.pt2e.observer import MappingType, MinMaxObserver
from torchao.quantization.pt2e.quantizer import QuantizationSpec

import torchquant as tq
from torchquant.calibration.calibrate import recalibrate
from torchquant.observers import histograms
from torchquant.observers.minmax import PerChannelWeight, reset
from torchquant.observers.ranges import (
    ActivationEntropy,
    ActivationMSE,
    ActivationPercentile,
    GroupWeightMSE,
    PerChannelWeightMSE,
    WeightMSE,
)

ACTIVATIONS = [ActivationPercentile, ActivationMSE, ActivationEntropy]
GRIDS = {
    "int4": (torch.int8, -8, 7),
    "int8": (torch.int8, -128, 127),
    "int8 narrow": (torch.int8, -127, 127),
    "uint8": (torch.uint8, 0, 255),
    "uint7": (torch.uint8, 0, 127),
    "int16": (torch.int16, -32768, 32767),
}
DATA = {
    "gaussian": lambda *shape: torch.randn(*shape),
    "heavy-tailed": lambda *shape: torch.distributions.StudentT(2.0).sample(shape),
    "one-sided": lambda *shape: torch.randn(*shape).relu(),
    "negative": lambda *shape: -1 - torch.rand(*shape),
    "constant": lambda *shape: torch.full(shape, -3.7),
    "zero": lambda *shape: torch.zeros(shape),
}
every_grid = pytest.mark.parametrize("grid", GRIDS)
every_data = pytest.mark.parametrize("data", DATA)
both_symmetries = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])


def options(grid, symmetric, *, channel=False):
    dtype, low, high = GRIDS[grid]
    scheme = f"per_{'channel' if channel else 'tensor'}_{'symmetric' if symmetric else 'affine'}"
    return {"dtype": dtype, "quant_min": low, "quant_max": high, "qscheme": getattr(torch, scheme)}


def group_options(grid, symmetric, group_size=16):
    dtype, low, high = GRIDS[grid]
    return {
        "mapping_type": MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        "target_dtype": dtype,
        "granularity": PerGroup(group_size),
        "quant_min": low,
        "quant_max": high,
        "zero_point_dtype": torch.int32,
    }


def seen(observer, *batches):
    for batch in batches:
        assert observer(batch) is batch
    return observer


def errors(rows, observer, p):
    """Sum of |x - Q(x)|**p over each row, as the converted graph would compute Q."""
    scale, zero_point = (t.reshape(-1, 1) for t in observer.calculate_qparams())
    codes = ((rows * (1.0 / scale)).round() + zero_point).clamp(observer.quant_min, observer.quant_max)
    return ((codes - zero_point) * scale - rows).abs().pow(p).sum(1, dtype=torch.float64)


# activations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2.0, 2.4])
@both_symmetries
@every_grid
@every_data
def test_the_mse_range_of_activations_has_at_most_the_error_of_min_max(data, grid, symmetric, p):
    x = DATA[data](4, 5000)
    mine = seen(ActivationMSE(p=p, **options(grid, symmetric)), *x)
    plain = seen(MinMaxObserver(**options(grid, symmetric)), *x)
    rows = x.reshape(1, -1)
    resolution = x.numel() * (float(x.abs().max()) * 2**-21) ** p  # what the bins of constant data leave open
    assert errors(rows, mine, p) <= 1.01 * errors(rows, plain, p) + resolution


@pytest.mark.parametrize("p", [1.0, 2.0, 2.4])
@pytest.mark.parametrize("data", ["gaussian", "heavy-tailed", "one-sided"])
@pytest.mark.parametrize("grid", ["int4", "uint8"])
def test_the_mse_range_of_activations_is_as_good_as_trying_all_pairs(data, grid, p):
    x = DATA[data](20000)
    mine = seen(ActivationMSE(p=p, **options(grid, False)), x)
    factors = 2 ** torch.linspace(-7, 0, 29)
    ends = torch.cartesian_prod(x.min() * factors, x.max() * factors)
    best = math.inf
    for low, high in torch.unique(ends, dim=0):
        pair = seen(MinMaxObserver(**options(grid, False)), torch.stack([low, high]))
        best = min(best, float(errors(x.reshape(1, -1), pair, p)))
    assert errors(x.reshape(1, -1), mine, p) <= 1.02 * best


@pytest.mark.parametrize("scale", [0.013, 0.4, 1.7])
@pytest.mark.parametrize("p", [1.0, 2.0, 2.4])
def test_the_error_of_a_histogram_is_that_of_evenly_spread_values(scale, p):
    counts, edges = torch.randint(0, 50, (12,)).double(), torch.arange(-4, 9).double() / 2
    inside = (torch.arange(20000).double() + 0.5) / 20000
    x = edges[:-1, None] + inside * 0.5
    codes = ((x / scale).round() + 3).clamp(0, 15)
    expected = (((codes - 3) * scale - x).abs().pow(p).mean(1) * counts).sum()
    grid = torch.tensor([scale], dtype=torch.float64), torch.tensor([3])
    assert torch.allclose(histograms.lp_error(counts, edges, grid, (0, 15), p), expected, rtol=1e-3)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.99, 100.0])
@every_data
def test_the_percentile_equals_that_of_all_values_to_a_bin(data, percentile):
    x = DATA[data](40, 500) * torch.linspace(0.1, 5, 40)[:, None]
    observer = seen(ActivationPercentile(percentile, **options("int16", False)), *x)
    counts, edges = observer.histogram()
    outside = (100 - percentile) / 200
    expected = torch.quantile(x.double(), torch.tensor([outside, 1 - outside], dtype=torch.float64))
    percentiles = torch.stack(observer.find_range(counts, edges))
    assert (percentiles - expected).abs().max() <= edges[1] - edges[0]


@pytest.mark.parametrize("values", [[5.0, 5.001], [-1e-30, 3e38], [0.0, 0.0], [0.0, -2.0], [1e6, 1e6 + 1]])
def test_extreme_values_are_counted_and_keep_their_range(values):
    observer = seen(ActivationPercentile(100.0, **options("int8", False)), *torch.tensor(values).split(1))
    counts, edges = observer.histogram()
    assert counts.sum() + observer.zeros == 2
    assert torch.stack(observer.find_range(counts, edges)).tolist() == sorted(torch.tensor(values).tolist())


def test_the_histogram_does_not_depend_on_batches_or_their_order():
    x = torch.cat([torch.randn(1000) * 10.0**k for k in range(-6, 7)] + [torch.zeros(100)])
    whole = seen(ActivationMSE(**options("uint8", False)), x)
    shuffled = seen(ActivationMSE(**options("uint8", False)), *x[torch.randperm(len(x))].split(777))
    apart = seen(ActivationMSE(**options("uint8", False)), *x.split(333))
    for other in (shuffled, apart):
        assert torch.equal(other.counts, whole.counts)
        assert other.zeros == whole.zeros == 100


@both_symmetries
def test_entropy_clips_a_long_tail(symmetric):
    x = torch.cat([torch.randn(200000), torch.tensor([12.0, -13.0])])
    mine, plain = (seen(c(**options("int8", symmetric)), x) for c in (ActivationEntropy, MinMaxObserver))
    assert 0.2 < mine.calculate_qparams()[0] / plain.calculate_qparams()[0] < 0.6


@both_symmetries
def test_entropy_keeps_all_of_evenly_spread_values(symmetric):
    x = torch.rand(200000) * 2 - 1
    mine, plain = (seen(c(**options("int8", symmetric)), x) for c in (ActivationEntropy, MinMaxObserver))
    assert mine.calculate_qparams()[0] / plain.calculate_qparams()[0] > 0.99


@both_symmetries
def test_entropy_does_not_collapse_where_there_are_as_many_codes_as_bins(symmetric):
    x = DATA["heavy-tailed"](50000)
    twelve_bits = {**options("int16", symmetric), "quant_min": -2048, "quant_max": 2047}
    mine, plain = (seen(c(**twelve_bits), x) for c in (ActivationEntropy, MinMaxObserver))
    assert len(mine.counts) == 4096
    assert torch.equal(mine.calculate_qparams()[0], plain.calculate_qparams()[0])
    with pytest.raises(tq.SchemeError, match="256 bins is too coarse"):
        ActivationEntropy(bins=256, **options("int8", symmetric))


def test_a_range_of_fewer_bins_than_codes_is_no_candidate_of_entropy():
    counts, edges = torch.ones(64, dtype=torch.float64), torch.arange(65).double()
    grid = torch.tensor([64 / 15, 1.0, 0.9, 0.01]), torch.tensor([0, 0, 0, 0])
    divergence = histograms.kl_divergence(counts, edges, grid, (0, 15))
    assert torch.isfinite(divergence).tolist() == [True, True, False, False]


@pytest.mark.parametrize(("scale", "zero_point"), [(2.0, 8), (3.0, 5), (1.5, 0), (4.4, 15)])
def test_the_divergence_is_that_of_the_two_distributions_written_out(scale, zero_point):
    counts, edges = torch.randint(0, 3, (80,)).double(), torch.arange(-30, 51).double()
    ends = [((c - zero_point) * scale + 30) for c in (-0.5, 15.5)]
    first, last = (int(torch.tensor(e).round().clamp(0, 80)) for e in ends)
    P = counts[first:last].clone()
    P[0] += counts[:first].sum()
    P[-1] += counts[last:].sum()
    codes = [
        next(c for c in range(16) if i < round(((c + 0.5 - zero_point) * scale) + 30) or c == 15)
        for i in range(first, last)
    ]
    Q = torch.zeros_like(P)
    for c in set(codes):
        mine = torch.tensor([code == c for code in codes])
        if (mine & (P > 0)).any():
            Q[mine & (P > 0)] = counts[first:last][mine].sum().clamp(min=1) / (mine & (P > 0)).sum()
    P, Q = P / P.sum(), Q / Q.sum()
    expected = torch.xlogy(P, P).sum() - torch.xlogy(P, Q).sum()
    grid = torch.tensor([scale], dtype=torch.float64), torch.tensor([zero_point])
    assert torch.allclose(histograms.kl_divergence(counts, edges, grid, (0, 15)), expected)


@pytest.mark.parametrize("observer", ACTIVATIONS)
@both_symmetries
@every_grid
@every_data
def test_zero_keeps_an_exact_code_and_the_codes_stay_in_range(data, grid, symmetric, observer):
    mine = seen(observer(**options(grid, symmetric)), DATA[data](300))
    scale, zero_point = mine.calculate_qparams()
    assert scale.shape == zero_point.shape == (1,)
    assert scale > 0
    assert not zero_point.is_floating_point()
    assert mine.quant_min <= zero_point <= mine.quant_max


# weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2.0, 2.4])
@both_symmetries
@every_grid
@every_data
def test_the_range_of_a_weight_has_at_most_the_error_of_min_max_in_every_channel(data, grid, symmetric, p):
    w = DATA[data](6, 10, 32)
    w[0] *= 1e-9  # below the floor of the scales
    tensor, channel = options(grid, symmetric), options(grid, symmetric, channel=True) | {"ch_axis": 1}
    group = group_options(grid, symmetric)
    for rows, mine, plain in (
        (w.reshape(1, -1), WeightMSE(p, **tensor), MinMaxObserver(**tensor)),
        (w.transpose(0, 1).flatten(1), PerChannelWeightMSE(p, **channel), PerChannelWeight(**channel)),
        (w.reshape(-1, 16), GroupWeightMSE(p, **group), AffineQuantizedMinMaxObserver(**group)),
    ):
        assert (errors(rows, seen(mine, w), p) <= errors(rows, seen(plain, w), p)).all()


def test_the_range_of_a_weight_is_the_best_of_its_factors():
    w = DATA["heavy-tailed"](8, 64)
    mine = seen(PerChannelWeightMSE(**options("int4", True, channel=True)), w)
    least = errors(w, mine, 2.0)
    for factor in torch.linspace(15 / 14, 0.2, 80):
        other = seen(PerChannelWeight(**options("int4", True, channel=True)), w * factor)
        assert (least <= 1.0001 * errors(w, other, 2.0)).all()
    assert (least < 0.9 * errors(w, seen(PerChannelWeight(**options("int4", True, channel=True)), w), 2.0)).any()


def test_no_channel_has_a_scale_below_the_floor():
    w = torch.randn(4, 64)
    w[1] *= 1e-12
    mine, plain = (
        seen(c(**options("int8", True, channel=True)), w).calculate_qparams()[0]
        for c in (PerChannelWeightMSE, PerChannelWeight)
    )
    assert mine.min() == plain.min() == plain.max() * 2**-16


def test_a_weight_is_searched_again_only_if_it_changed(monkeypatch):
    calls = []
    search = histograms.search_factor
    monkeypatch.setattr(histograms, "search_factor", lambda *a: calls.append(a) or search(*a))
    w = torch.randn(4, 64)
    observer = seen(PerChannelWeightMSE(**options("int4", True, channel=True)), w, w, w.clone())
    assert len(calls) == 1
    w[2, w[2].abs().argmin()] += 0.01
    seen(observer, w)
    assert len(calls) == 2


# all of them ---------------------------------------------------------------------------------------------------

MAKERS = {
    **{c.__name__: lambda c=c: c(**options("int4", False)) for c in [*ACTIVATIONS, WeightMSE]},
    "PerChannelWeightMSE": lambda: PerChannelWeightMSE(**options("int4", False, channel=True)),
    "GroupWeightMSE": lambda: GroupWeightMSE(**group_options("int4", False)),
}
every_observer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def assert_same_qparams(a, b):
    for left, right in zip(a.calculate_qparams(), b.calculate_qparams(), strict=True):
        assert left.shape == right.shape
        assert torch.equal(left, right)


@every_observer
def test_an_observer_survives_a_deep_copy_and_the_copies_are_independent(make):
    x = torch.randn(4, 32)
    observer = seen(make(), x)
    twin = copy.deepcopy(observer)
    assert_same_qparams(observer, twin)
    before = observer.calculate_qparams()[0].clone()
    seen(twin, 10 * x)
    assert torch.equal(observer.calculate_qparams()[0], before)
    assert not torch.equal(twin.calculate_qparams()[0], before)


@every_observer
def test_an_observer_survives_its_state_dict(make):
    x = torch.randn(4, 32)
    observer, other = seen(make(), x), make()
    other.load_state_dict(observer.state_dict())
    assert_same_qparams(observer, other)
    seen(observer, 3 * x)
    seen(other, 3 * x)
    assert_same_qparams(observer, other)


@every_observer
def test_a_reset_observer_is_as_good_as_new(make):
    x = torch.randn(4, 32)
    observer = seen(make(), 100 * x)
    reset(observer)
    with pytest.raises(tq.CalibrationError, match="never saw data"):
        observer.calculate_qparams()
    reset(observer)
    assert_same_qparams(seen(observer, x), seen(make(), x))


@every_observer
def test_missing_empty_and_non_finite_data_are_refused(make):
    observer = make()
    observer(torch.zeros(0, 32))
    with pytest.raises(tq.CalibrationError, match="never saw data"):
        observer.calculate_qparams()
    for value, word in ((torch.nan, "NaN"), (torch.inf, "infinity"), (-torch.inf, "infinity")):
        with pytest.raises(tq.CalibrationError, match=word):
            observer(torch.full((4, 32), value))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@every_observer
def test_any_float_dtype_is_observed(make, dtype):
    x = torch.randn(4, 32).to(dtype)
    actual, expected = (seen(make(), v).calculate_qparams()[0].float() for v in (x, x.float()))
    assert torch.allclose(actual, expected, rtol=0.2)


@pytest.mark.parametrize("observer", [*ACTIVATIONS, ActivationMSE.with_args(p=2.4)])
@pytest.mark.parametrize("weight", [PerChannelWeightMSE, PerChannelWeightMSE.with_args(p=2.4), WeightMSE, "group"])
def test_a_network_is_converted_with_its_ranges_by_a_foreign_quantizer(observer, weight):
    batches = [torch.randn(16, 32) for _ in range(3)]
    model = nets.Call(lambda m, x: m.b(m.a(x).relu()), a=torch.nn.Linear(32, 64), b=torch.nn.Linear(64, 8))
    if weight == "group":
        arguments = {k: v for k, v in group_options("int8", True).items() if not k.startswith("quant")}
        spec = QuantizationSpec(torch.int8, GroupWeightMSE.with_args(**arguments), -128, 127)
    elif weight is WeightMSE:
        spec = per_tensor(symmetric=True, observer=WeightMSE)
    else:
        spec = QuantizationSpec(torch.int8, weight, -127, 127, torch.per_channel_symmetric, ch_axis=0)
    exported = tq.export(model, batches[0])
    prepared = tq.prepare(exported, SpecQuantizer({"linear"}, per_tensor(observer=observer), spec))
    tq.calibrate(prepared, batches, progress=False)
    again = copy.deepcopy(prepared)
    recalibrate(again, batches, progress=False)
    quantized = tq.convert(prepared)
    assert torch.equal(tq.convert(again)(batches[0]), quantized(batches[0]))
    assert tq.report(quantized).coverage == "2/2"
    assert tq.sqnr_db(exported(batches[0]), quantized(batches[0])) > 20
    assert ("dequantize_affine" in quantized.code) == (weight == "group")


def test_a_group_observer_from_a_state_dict_is_converted_to_the_same_codes():
    x = torch.randn(2, 64)
    exported = tq.export(torch.nn.Sequential(torch.nn.Linear(64, 8)).eval(), x)
    arguments = groupwise().observer_or_fake_quant_ctr.p.keywords
    spec = QuantizationSpec(torch.int8, GroupWeightMSE.with_args(**arguments), -8, 7)
    first, second = (tq.prepare(exported, SpecQuantizer({"linear"}, None, spec)) for _ in range(2))
    tq.calibrate(first, [x], progress=False)
    second.load_state_dict(first.state_dict())
    assert torch.equal(tq.convert(first)(x), tq.convert(second)(x))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ActivationPercentile(101, **options("int8", True)), "percentile 101"),
        (lambda: ActivationPercentile(0, **options("int8", True)), "percentile 0"),
        (lambda: ActivationMSE(p=0, **options("int8", True)), "p 0"),
        (lambda: WeightMSE(p=-1, **options("int8", True)), "p -1"),
        (lambda: ActivationMSE(dtype=torch.float8_e4m3fn, quant_min=-448, quant_max=448), "integer grids"),
        (lambda: PerChannelWeightMSE(qscheme=torch.per_channel_affine_float_qparams), "integer zero points"),
        (lambda: GroupWeightMSE(**group_options("int8", False), zero_point_domain=None), "integer zero points"),
        (
            lambda: GroupWeightMSE(**{**group_options("int8", False), "target_dtype": torch.uint4, "quant_min": None}),
            "give quant_min",
        ),
    ],
)
def test_what_no_search_can_honour_is_refused_with_its_value(make, words):
    with pytest.raises(tq.SchemeError, match=words):
        make()
