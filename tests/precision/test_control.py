"""Accuracy under control: what stays float is what costs the metric, and no more; what cannot be reached is said."""

import math

import pytest
import torch
from foreign import SpecQuantizer, per_channel, per_tensor
from nets import Counting
from torch import nn

import torchquant as tq
from torchquant.quantizers import WeightOnlyQuantizer, X86Quantizer


class Net(nn.Module):
    """Five linears; the third has an outlier that ruins a scale for the whole tensor."""

    def __init__(self, *, outliers=(2,)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(5)])
        with torch.no_grad():
            for i in outliers:
                self.layers[i].weight[3, 5] = 60.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def _batches(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(32, 16, generator=generator),) for _ in range(count)]


def _per_tensor():
    return SpecQuantizer({"linear"}, per_tensor(), per_tensor(low=-127, high=127, symmetric=True))


def _closeness(model):
    """dB against the float network on data of the metric's own, but finite for the float network itself."""
    held_out = _batches(2, seed=9)

    def metric(candidate):
        return min(100.0, tq.compare(model, candidate, held_out).sqnr_db)

    return metric


def test_the_layer_that_ruins_the_metric_stays_float_alone() -> None:
    model, batches = Net().eval(), _batches()
    result = tq.quantize_within(
        model,
        batches[0],
        batches,
        quantizer=_per_tensor(),
        metric=_closeness(model),
        max_drop=75,
        progress=False,
        validation=iter(_batches(2, seed=3)),
    )
    assert result.ranked_on == "2 batches held out from calibration"
    assert [site.module for site in result.left_float] == ["layers.2"]
    assert result.full_metric < 25 <= result.metric
    assert result.is_least
    assert result.extra_bytes == pytest.approx(16 * 16 * 3, abs=16)
    sites = {s.module: s for s in tq.report(result.quantized).sites if s.compute}
    assert (sites["layers.2"].status, sites["layers.0"].status) == ("excluded", "quantized")
    assert "the metric would lose more" in sites["layers.2"].reason
    assert "layers.2" in str(result)


def test_no_op_that_stays_float_could_be_quantized_too() -> None:
    """Each of those left float is needed: held by hand, one by one."""
    model, batches = Net(outliers=(1, 3)).eval(), _batches()
    metric, calls = _closeness(model), []

    def counting(candidate):
        calls.append(metric(candidate))
        return calls[-1]

    result = tq.quantize_within(
        model, batches[0], batches, quantizer=_per_tensor(), metric=counting, max_drop=75, algorithms=(), progress=False
    )
    assert result.evaluations == len(calls)
    assert {site.module for site in result.left_float} == {"layers.1", "layers.3"}
    for site in result.left_float:
        fewer = [s.node for s in result.left_float if s is not site]
        from torchquant.solving.left_float import leave_float

        prepared = tq.prepare(tq.export(model, batches[0]), _per_tensor())
        tq.calibrate(prepared, batches, progress=False)
        leave_float(prepared, fewer, "by hand")
        assert metric(tq.convert(prepared)) < 25


def test_where_nothing_is_lost_all_is_quantized() -> None:
    model, batches = Net(outliers=()).eval(), _batches()
    result = tq.quantize_within(
        model, batches[0], iter(batches), quantizer=X86Quantizer(), metric=lambda m: 1, max_drop=0, progress=False
    )
    assert (result.left_float, result.extra_bytes, result.evaluations) == ((), 0, 2)
    assert tq.report(result.quantized).coverage == "5/5"


def test_what_cannot_be_reached_is_an_error_with_the_values() -> None:
    batches = _batches()

    def any_change(candidate):
        return 1.0 if candidate(*batches[0]).equal(model(*batches[0])) else 0.0

    model = Net().eval()
    with pytest.raises(tq.InputError, match=r"1 for the float model and 0 with 4 of 5 ops left float"):
        tq.quantize_within(
            model, batches[0], batches, quantizer=_per_tensor(), metric=any_change, max_drop=0.5, progress=False
        )


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")  # what is kept does not matter
@pytest.mark.parametrize("algorithms", [(), (tq.BiasCorrection(),), (tq.AdaRound(20), tq.BiasCorrection())])
def test_left_float_is_the_float_function(algorithms) -> None:
    """With all of them left float a graph computes what the float model does, corrected biases or not."""
    from torchquant.solving.left_float import leave_float

    model, batches = Net().eval(), _batches()
    for quantizer in (X86Quantizer("static_int8"), _per_tensor(), WeightOnlyQuantizer("w4_g16")):
        prepared = tq.prepare(tq.export(model, batches[0]), quantizer)
        tq.calibrate(prepared, batches, progress=False)
        if algorithms:
            tq.optimize(prepared, batches, algorithms, progress=False)
        names = [n.name for n in prepared.graph.nodes if n.target is torch.ops.aten.linear.default]
        leave_float(prepared, names[1:], "by hand")
        leave_float(prepared, names[:1], "by hand")
        assert torch.equal(prepared(*batches[0]), model(*batches[0]))


def test_shared_weights_may_be_float_in_one_place() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(torch.relu(self.one(x)))

    from torchquant.solving.left_float import leave_float

    batches = _batches()
    prepared = tq.prepare(tq.export(Twice(), batches[0]), SpecQuantizer({"linear"}, per_tensor(), per_channel()))
    tq.calibrate(prepared, batches, progress=False)
    leave_float(prepared, ["linear_1"], "by hand")
    statuses = [s.status for s in tq.report(tq.convert(prepared)).sites if s.compute]
    assert statuses == ["quantized", "excluded"]


@pytest.mark.parametrize("max_drop", [-1, math.nan, math.inf, "1", None, True])
def test_a_drop_that_is_none_is_refused(max_drop) -> None:
    batches = _batches(1)
    with pytest.raises(tq.InputError, match="max_drop"):
        tq.quantize_within(
            Net(), batches[0], batches, quantizer=X86Quantizer(), metric=lambda m: 1, max_drop=max_drop, progress=False
        )


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda m: math.nan, "NaN for the float model"),
        (lambda m: math.inf, "inf for the float model"),
        (lambda m: 1 / 0, "raised ZeroDivisionError"),
        (None, "metric is a function"),
    ],
)
def test_metrics_that_decide_nothing_are_refused(metric, message: str) -> None:
    batches = _batches(1)
    with pytest.raises(tq.InputError, match=message):
        tq.quantize_within(
            Net(), batches[0], batches, quantizer=X86Quantizer(), metric=metric, max_drop=1, progress=False
        )


def test_quantizers_are_checked_before_the_work() -> None:
    with pytest.raises(tq.InputError, match="is a class"):
        tq.quantize_within(Net(), None, None, quantizer=X86Quantizer, metric=lambda m: 1, max_drop=1)


class Branches(nn.Module):
    """A value that two ops read, behind a BatchNorm and a ReLU, and an addition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last((x + self.second(x)).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:1 ops are annotated, yet XNNPACK computes them in float")  # the ReLU behind one
@pytest.mark.parametrize("names", [["conv2d"], ["conv2d_1"], ["linear"], ["add"], ["conv2d", "conv2d_1"]])
def test_what_is_left_float_lowers_where_outputs_are_given_quantized(names) -> None:
    from torchquant.backends import executorch_xnnpack
    from torchquant.quantizers import XnnpackQuantizer
    from torchquant.solving.left_float import leave_float

    model, batch = Branches().eval(), (torch.randn(1, 3, 8, 8),)
    prepared = tq.prepare(tq.export(model, batch), XnnpackQuantizer("static_int8"))
    tq.calibrate(prepared, [batch], progress=False)
    leave_float(prepared, names, "by hand")
    quantized = tq.convert(prepared)
    program = executorch_xnnpack.lower(quantized, batch, progress=False)
    compute = [name for name in names if name != "add"]
    assert program.proof.fused == 3 - len(compute)
    statuses = {s.node: s.status for s in tq.report(quantized, program).sites}
    assert {statuses[name] for name in names} == {"excluded"}
    assert tq.compare(model, program, [batch]).sqnr_db > 25


def test_between_two_ops_that_are_left_float_nothing_is_rounded() -> None:
    from torchquant.quantizers import XnnpackQuantizer
    from torchquant.solving.left_float import leave_float

    model, batch = Branches().eval(), (torch.randn(1, 3, 8, 8),)
    prepared = tq.prepare(tq.export(model, batch), XnnpackQuantizer("static_int8"))
    tq.calibrate(prepared, [batch], progress=False)
    leave_float(prepared, ["conv2d", "conv2d_1", "add", "mean", "linear"], "by hand")
    assert tq.compare(model, tq.convert(prepared), [batch]).sqnr_db > 40  # its input and output alone
    from torchquant.fx.reading import observers

    assert len(list(observers(prepared))) <= 2


def test_a_metric_leaves_no_state_behind() -> None:
    x = torch.randn(2, 8)
    result = tq.quantize_within(
        Counting(),
        x,
        [x],
        quantizer=X86Quantizer(),
        metric=lambda m: float(m(x).mean()) * 0,
        max_drop=1,
        progress=False,
    )
    assert float(result.quantized.calls) == 0.0
