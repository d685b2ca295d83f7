"""Range search: a range ends where its consumers stop caring, and the network is never worse for it."""

import nets
import pytest
import torch
import torch.nn.functional as F
from foreign import SpecQuantizer, calibrated, dynamic, per_channel, per_tensor
from nets import Call
from torch import nn

import torchquant as tq
from torchquant.algorithms.range_search import RangeSearch
from torchquant.calibration.stream import Stream
from torchquant.fx.grids import grid_of
from torchquant.fx.reading import observer_of, observers
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer
from torchquant.solving.contract import Clock
from torchquant.solving.solved import SolvedActivation

U8 = per_tensor(torch.uint8, 0, 255)
pytestmark = pytest.mark.filterwarnings("ignore:the Quantizer left:torchquant.errors.TorchquantWarning")


def ends(prepared, op):
    """Ends of the range of what the first op of this kind reads."""
    node = next(n for n in prepared.graph.nodes if n.op == "call_function" and op in n.name)
    grid = grid_of(observer_of(prepared, node.args[0]), torch.Size([1]))
    return tuple(float((q - grid.zero_point) * grid.scale) for q in (grid.quant_min, grid.quant_max))


def searched(prepared):
    return [str(n.target) for n, o in observers(prepared) if isinstance(o, SolvedActivation)]


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_range_in_front_of_a_relu6_ends_near_6(symmetric):
    model = Call(lambda m, x: m.layer(F.relu6(x * 10)), layer=nn.Linear(16, 4))
    batches = [torch.randn(32, 16) for _ in range(4)]
    spec = per_tensor(low=-127, symmetric=True) if symmetric else U8
    prepared = calibrated(model, batches, SpecQuantizer(("hardtanh",), spec))
    before = ends(prepared, "relu6")
    assert before[1] > 30
    result = tq.optimize(prepared, batches, [RangeSearch()], progress=False)
    low, high = ends(prepared, "relu6")
    assert 5.5 < high < 7.1  # a factor of 0.85 to either side
    if not symmetric:
        assert low > -3 > before[0] / 10  # not quite 0, so that 6 lies on a step
    assert result.steps[-1][1] > result.steps[0][1] + 6


def test_a_mask_in_front_of_a_softmax_is_cut():
    model = Call(lambda m, x, mask: (x * 2 + (1 - mask) * -1e4).softmax(-1))
    mask = torch.ones(4, 16)
    mask[:, 10:] = 0
    batches = [(torch.randn(4, 16), mask) for _ in range(4)]
    prepared = calibrated(model, batches, SpecQuantizer(("softmax",), U8))
    assert ends(prepared, "softmax")[0] < -9000
    result = tq.optimize(prepared, batches, [RangeSearch()], progress=False)
    low, high = ends(prepared, "softmax")
    assert -100 < low < -5
    assert 3 < high < 20
    assert result.steps[-1][1] > 30 > result.steps[0][1]


def test_a_lone_outlier_is_cut_where_the_rest_gains_more():
    model = Call(lambda m, x: m.layer(x), layer=nn.Linear(64, 8))
    batches = [torch.randn(64, 64) for _ in range(2)]
    batches[0][0, 0] = 30.0
    prepared = calibrated(model, batches, SpecQuantizer(("linear",), per_tensor(low=-8, high=7), per_channel()))
    tq.optimize(prepared, batches, [RangeSearch()], progress=False)
    assert ends(prepared, "linear")[1] < 15


def test_positions_that_the_output_does_not_feel_cost_no_codes():
    model = Call(lambda m, x, mask: (m.layer(x) * mask).sum(1), layer=nn.Linear(16, 4))
    mask = torch.ones(4, 8, 1)
    mask[:, 5:] = 0
    batches = [(torch.randn(4, 8, 16) * (101 - 100 * mask), mask) for _ in range(4)]
    prepared = calibrated(model, batches, SpecQuantizer(("linear",), U8, per_channel()))
    assert ends(prepared, "linear")[1] > 100
    result = tq.optimize(prepared, batches, [RangeSearch()], progress=False)
    assert 1.5 < ends(prepared, "linear")[1] < 6
    assert result.steps[-1][1] > result.steps[0][1] + 12


def test_a_prefix_of_poor_weights_does_not_change_the_ranges():
    ranges = []
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(16, 16), nn.ReLU6(), nn.Linear(16, 4)), [torch.randn(32, 16)]
    for high in (127, 1):
        weights = per_channel(low=-high, high=high)
        prepared = calibrated(model, batches, SpecQuantizer(("linear",), per_tensor(low=-8, high=7), weights))
        search, stream = RangeSearch(), Stream(prepared, batches)
        spans = search.spans(prepared, frozenset())
        search.begin(stream, spans, 0)
        ranges.append([search.solve(task, Clock()).activations for task in stream.walk(spans)])
    assert ranges[0] == ranges[1]
    assert len(ranges[0]) == 2


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize("quantizer", [X86Quantizer, XnnpackQuantizer])
@pytest.mark.parametrize(("net", "shape"), [(nets.cnn, (4, 3, 8, 8)), (nets.Pixels, (2, 4, 8, 8))])
def test_the_result_is_never_below_the_plain_one(net, shape, quantizer):
    model, batches = net().eval(), [torch.randn(shape) for _ in range(3)]
    prepared = calibrated(model, batches, quantizer())
    plain = tq.compare(model, tq.convert(calibrated(model, batches, quantizer())), batches).sqnr_db
    result = tq.optimize(prepared, batches, [RangeSearch()], progress=False)
    assert all(span.kept == (span.after <= span.before) for span in result.spans)
    assert tq.compare(model, tq.convert(prepared), batches).sqnr_db >= plain - 1e-4


def test_a_good_range_is_left_alone():
    model, batches = Call(lambda m, x: m.layer(x), layer=nn.Linear(16, 4)), [torch.rand(8, 16) for _ in range(3)]
    prepared = calibrated(model, batches, SpecQuantizer(("linear",), U8, per_channel()))
    before = ends(prepared, "linear")
    tq.optimize(prepared, batches, [RangeSearch()], progress=False)
    assert ends(prepared, "linear") == pytest.approx(before, rel=0.1, abs=0.01)


def test_a_shared_range_is_searched_only_if_no_other_range_lies_between_its_places():
    left, right, inner = (nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 1))
    together = Call(lambda m, x: torch.cat([m.left(x), m.inner(x)], 1), left=left, inner=inner)
    apart = Call(lambda m, x: torch.cat([m.left(x), m.right(m.inner(x))], 1), left=left, right=right, inner=inner)
    batches = [torch.randn(2, 3, 4, 4) for _ in range(2)]
    for model, expected in ((together, True), (apart, False)):
        prepared = calibrated(model, batches, XnnpackQuantizer("static_int8"))
        shared = prepared.graph.find_nodes(op="output")[0].args[0][0].args[0].args[0][0]
        observer = observer_of(prepared, shared)
        places = [n for n, o in observers(prepared) if o is observer]
        spans = [s for s in RangeSearch().spans(prepared, frozenset()) if observer_of(prepared, s.nodes[0]) is observer]
        assert len(places) > 1
        assert [set(places) <= set(span.nodes) for span in spans] == [True] * len(spans)
        assert bool(spans) == expected


def test_dynamic_and_fixed_ranges_are_left_alone():
    batches = [torch.randn(4, 16) for _ in range(2)]
    prepared = calibrated(nn.Linear(16, 4), batches, SpecQuantizer(("linear",), dynamic(), per_channel()))
    result = tq.optimize(prepared, batches, [RangeSearch()], progress=False)
    assert not result.spans
    assert not searched(prepared)


def test_an_excluded_op_keeps_the_range_of_what_it_reads():
    model, batches = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), [torch.randn(8, 8) for _ in range(2)]
    prepared = calibrated(model, batches, X86Quantizer())
    spans = RangeSearch().spans(prepared, frozenset({"linear"}))
    assert [span.nodes[1].name for span in spans] == ["linear_1"]


@pytest.mark.parametrize("factor", [0.0, 1.0, -1.0])
def test_a_factor_that_leads_nowhere_is_refused(factor):
    with pytest.raises(tq.InputError, match="factor"):
        RangeSearch(factor)
