"""The proof can fail: on zeros, wrong integers, a small output beside a large one, a fault in one chaotic layer."""

import math

import pytest
import torch
from nets import Call
from torch import nn
from torch.fx import Interpreter

import torchquant as tq
from torchquant.fx import ops
from torchquant.fx.flat import flat
from torchquant.lowering import depth
from torchquant.lowering.proof import hold_against
from torchquant.quantizers import X86Quantizer

EPS = {"op_error": 1e-7, "target": "test"}


def reference(model, *inputs):
    """A converted graph of tensors, and a batch."""
    quantized = tq.quantize(model.eval(), inputs, [inputs], quantizer=X86Quantizer(), algorithms=(), progress=False)
    return flat(quantized).graph


class Chaos(nn.Module):
    """Two hundred times the difference to the next integer, again and again: a flip of one code changes everything."""

    def __init__(self, layers=8):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x = 200 * (x - x.round())
            x = torch.sin(x)
        return x


class Slightly(Interpreter):
    """Correct, but each matrix product is off in its last place; `fault` names a node that computes something else."""

    def __init__(self, graph, fault="", seed=0):
        super().__init__(graph)
        self.fault, self.seed, self.noise = fault, seed, torch.Generator()

    def __call__(self, *inputs):
        self.noise.manual_seed(self.seed)
        with torch.no_grad():
            return self.run(*inputs)

    def run_node(self, n):
        value = super().run_node(n)
        if ops.op_name(n) == "linear" and isinstance(value, torch.Tensor):
            value = value * (1 + 2e-7 * (torch.rand(value.shape, generator=self.noise) - 0.5))
            return value.roll(1, -1) if n.name == self.fault else value
        return value


@pytest.fixture(scope="module")
def chaos():
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    return reference(Chaos(), x), [(x,)]


def test_zeros_are_refused_however_chaotic_the_reference_is(chaos):
    graph, batches = chaos
    with pytest.raises(tq.LoweringError, match=r"0\.0 dB"):
        hold_against(graph, lambda x: torch.zeros(64, 16), batches, min_sqnr_db=None, **EPS)

    def zeros(g):
        return lambda x: tuple(torch.zeros(64, 16) for _ in g.graph.output_node().args[0])

    with pytest.raises(tq.LoweringError, match="In depth"):
        hold_against(graph, zeros(graph), batches, min_sqnr_db=None, build=zeros, **EPS)


def test_a_chaotic_graph_is_held_in_depth(chaos):
    graph, batches = chaos
    program = Slightly(graph)
    verdict = hold_against(graph, program, batches, min_sqnr_db=None, build=Slightly, **EPS)
    assert verdict.comparison.sqnr_db < 20
    assert verdict.outcome == "holds"
    assert "in depth" in verdict.reason


def test_a_fault_in_one_layer_of_a_chaotic_graph_is_found_and_named(chaos):
    graph, batches = chaos
    name = [n.name for n in graph.graph.nodes if ops.op_name(n) == "linear"][5]
    with pytest.raises(tq.LoweringError, match=rf"In depth: linear {name}.*layers\.5"):
        hold_against(
            graph,
            Slightly(graph, name),
            batches,
            min_sqnr_db=None,
            build=lambda g: Slightly(g, name),
            **EPS,
        )


def test_a_bound_that_was_asked_for_is_not_relaxed(chaos):
    graph, batches = chaos
    with pytest.raises(tq.LoweringError, match=r"you asked for 40\.0 dB"):
        hold_against(graph, Slightly(graph), batches, min_sqnr_db=40.0, build=Slightly, **EPS)


def test_an_artefact_that_is_not_the_one_looked_into_is_not_called_proven(chaos):
    graph, batches = chaos
    with pytest.warns(tq.TorchquantWarning, match="not proven"):
        verdict = hold_against(graph, Slightly(graph, seed=1), batches, min_sqnr_db=None, build=Slightly, **EPS)
    assert verdict.outcome == "undecided"


def test_each_output_is_proven_by_itself():
    x = torch.randn(8, 16)
    model = Call(lambda m, x: (1000 * m.large(x), m.small(x)), large=nn.Linear(16, 8), small=nn.Linear(16, 8))
    graph = reference(model, x)

    def wrong(x):
        large, small = graph(x)
        return large, torch.zeros_like(small)

    with pytest.raises(tq.LoweringError, match="output 1"):
        hold_against(graph, wrong, [(x,)], min_sqnr_db=None, **EPS)


def test_a_channel_that_is_lost_beside_large_ones_is_refused():
    x = torch.randn(8, 3, 6, 6)
    conv = nn.Conv2d(3, 8, 1)
    with torch.no_grad():
        conv.weight[:7] *= 1000
    graph = reference(nn.Sequential(conv), x)

    def wrong(x):
        (y,) = graph(x)
        return (torch.cat([y[:, :7], 0 * y[:, 7:]], 1),)

    with pytest.raises(tq.LoweringError, match="index 7 of axis 1 is lost"):
        hold_against(graph, wrong, [(x,)], min_sqnr_db=None, **EPS)


@pytest.mark.parametrize("wrong", [False, True])
def test_integers_are_held_to_what_follows_from_the_artefacts_own_floats(wrong):
    x = torch.randn(64, 16)
    model = Call(
        lambda m, x: m.inner(x).argmax(-1), inner=nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64))
    )
    graph = reference(model, x)

    def build(g):
        def run(*inputs):
            outputs = Slightly(g)(*inputs)
            return ((outputs[0] + 1) % 64, *outputs[1:]) if wrong else outputs

        return run

    if wrong:
        with pytest.raises(tq.LoweringError, match=r"output 0.*%"):
            hold_against(graph, build(graph), [(x,)], min_sqnr_db=None, build=build, **EPS)
    else:
        assert hold_against(graph, build(graph), [(x,)], min_sqnr_db=None, build=build, **EPS).outcome == "holds"


def test_an_output_without_a_finite_number_decides_nothing():
    x = torch.randn(8, 16)
    nothing = Call(lambda m, x: m.inner(x) * math.nan, inner=nn.Linear(16, 8))
    graph = reference(nothing, x)
    with pytest.raises(tq.LoweringError, match="nothing can be proven"):
        hold_against(graph, graph, [(x,)], min_sqnr_db=None, **EPS)
    half = Call(lambda m, x: (m.inner(x), m.inner(x) / 0), inner=nn.Linear(16, 8))
    graph = reference(half, x)
    with pytest.warns(tq.TorchquantWarning, match="output 1 is NaN"):
        assert hold_against(graph, graph, [(x,)], min_sqnr_db=None, **EPS).outcome == "undecided"


def test_what_is_zero_or_has_no_elements_is_no_obstacle():
    x = torch.randn(8, 16)
    model = Call(lambda m, x: (m.inner(x), 0 * x, x[:0]), inner=nn.Linear(16, 8))
    graph = reference(model, x)

    def almost(x):
        y, zero, nothing = graph(x)
        return y, zero + 1e-12, nothing

    verdict = hold_against(graph, almost, [(x,)], min_sqnr_db=None, **EPS)
    assert verdict.outcome == "holds"


def test_random_numbers_are_named_where_nothing_can_be_proven():
    x = torch.randn(8, 16)
    graph = reference(Call(lambda m, x: m.inner(x) + torch.rand_like(x[:, :8]), inner=nn.Linear(16, 8)), x)
    with pytest.raises(tq.LoweringError, match=r"rand_like.*random"):
        hold_against(graph, graph, [(x,)], min_sqnr_db=None, **EPS)


def test_an_artefact_that_is_wrong_though_its_parts_are_right_is_refused():
    x = torch.randn(32, 16)
    graph = reference(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)), x)
    with pytest.raises(tq.LoweringError, match="each part is right"):
        hold_against(graph, lambda x: (-graph(x)[0],), [(x,)], min_sqnr_db=None, build=Slightly, **EPS)


@pytest.mark.parametrize("bound", ["30", float("nan")])
def test_a_bound_that_is_no_number_is_refused(bound):
    x = torch.randn(8, 16)
    graph = reference(nn.Sequential(nn.Linear(16, 8)), x)
    with pytest.raises(tq.InputError, match="number of dB"):
        hold_against(graph, graph, [(x,)], min_sqnr_db=bound, **EPS)


def test_parts_have_all_that_they_are_made_of_where_integers_share_an_op_with_floats():
    def forward(m, x):
        values, places = m.first(x).sort(-1)
        return m.last(values), places, (m.first(x) > 0).sum(-1)

    graph = flat(tq.export(Call(forward, first=nn.Linear(8, 8), last=nn.Linear(8, 8)), torch.randn(2, 8))).graph
    for part in depth.parts_of(graph):
        known = {*part.nodes, *part.reads, *(n for n in graph.graph.nodes if n.op in ("placeholder", "get_attr"))}
        assert all(source in known for node in part.nodes for source in node.all_input_nodes)
