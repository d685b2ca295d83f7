"""Blocks: spans are contiguous, every site is in one of them, and cuts fall where one value crosses."""

import nets
import pytest
import torch
import torch.nn.functional as F
from foreign import EveryKind, EverySpec, PlaceholderObserver, SpecQuantizer, calibrated, per_channel, per_tensor
from nets import Call
from torch import nn

import torchquant as tq
from torchquant.fx import ops
from torchquant.fx.blocks import blocks, data_order, layers, weight_grid
from torchquant.fx.reading import observer_of

pytestmark = pytest.mark.filterwarnings("ignore:the Quantizer left:torchquant.errors.TorchquantWarning")
KINDS = ("conv1d", "conv2d", "linear", "conv_transpose2d")


class ResNet(nn.Module):
    """A stem, residual blocks of two convs, the second one with a conv on the shortcut, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.first = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.second = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.shortcut = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.first[1](self.first[0](x).relu()) + x).relu()
        x = (self.second[1](self.second[0](x).relu()) + self.shortcut(x)).relu()
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """Three levels down, three up, a skip at each."""

    def __init__(self, levels=3):
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(levels))
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(levels))

    def forward(self, x):
        skips = []
        for conv in self.down:
            x = conv(x).relu()
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x).relu()
        for conv in self.up:
            x = conv(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1)).relu()
        return x


def chain(count):
    return nn.Sequential(*(layer for _ in range(count) for layer in (nn.Linear(8, 8), nn.ReLU())))


def prepared_for(model, *inputs):
    quantizer = SpecQuantizer(KINDS, per_tensor(torch.uint8, 0, 255), per_channel())
    return calibrated(model, [inputs], quantizer)


def paths(span):
    return [ops.module_path(site) for site in span.sites]


def check(prepared, spans, excluded=frozenset()):
    """Every site in exactly one span; spans contiguous, in order, without overlap."""
    order = data_order(prepared)
    place = {node: i for i, node in enumerate(order)}
    sites = [s.sites[0] for s in layers(prepared, excluded)]
    assert [site for span in spans for site in span.sites] == sites
    ends = 0
    for span in spans:
        first, last = place[span.nodes[0]], place[span.nodes[-1]]
        assert span.nodes == tuple(order[first : last + 1])
        assert first >= ends
        assert set(span.sites) <= set(span.nodes)
        assert last + 1 == len(order) or observer_of(prepared, span.nodes[-1]) is None
        ends = last + 1


def test_a_chain_is_cut_every_min_sites_layers():
    prepared = prepared_for(chain(6), torch.randn(2, 8))
    for size, expected in ((1, [1] * 6), (2, [2, 2, 2]), (3, [3, 3]), (6, [6])):
        spans = blocks(prepared, min_sites=size)
        check(prepared, spans)
        assert [len(span.sites) for span in spans] == expected


def test_a_cut_takes_along_what_follows_the_layer_without_weights():
    prepared = prepared_for(chain(4), torch.randn(2, 8))
    assert [ops.op_name(span.nodes[-1]) for span in blocks(prepared)] == ["relu", "relu"]


@pytest.mark.parametrize("min_sites", [1, 2])
def test_no_cut_falls_inside_a_residual_block(min_sites):
    prepared = prepared_for(ResNet(), torch.randn(2, 3, 8, 8))
    spans = blocks(prepared, min_sites=min_sites)
    check(prepared, spans)
    span_paths = [paths(span) for span in spans]
    for block in (["first.0", "first.1"], ["second.0", "second.1", "shortcut"]):
        assert any(set(block) <= set(span) for span in span_paths)
    assert span_paths[0][0] == "stem"
    assert len(span_paths) > 1


def test_the_halves_of_a_transformer_block_are_spans():
    prepared = prepared_for(nn.Sequential(nets.Block(), nets.Block()), torch.randn(2, 8, 32))
    spans = blocks(prepared)
    check(prepared, spans)
    assert [paths(span) for span in spans] == [
        ["0.qkv", "0.out"],
        ["0.up", "0.down"],
        ["1.qkv", "1.out"],
        ["1.up", "1.down"],
    ]


def test_two_towers_are_cut_one_by_one_and_joined_behind():
    model = Call(lambda m, x, y: m.head(torch.cat([m.left(x), m.right(y)], 1)), left=chain(4), right=chain(4))
    model.head = nn.Linear(16, 3)
    prepared = prepared_for(model, torch.randn(2, 8), torch.randn(2, 8))
    spans = blocks(prepared)
    check(prepared, spans)
    assert [{path.split(".")[0] for path in paths(span)} for span in spans[:2]] == [{"left"}, {"left"}]
    assert {path.split(".")[0] for path in paths(spans[2])} == {"right"}


@pytest.mark.parametrize("max_sites", [2, 3, 8])
def test_skips_of_a_u_net_do_not_lead_to_spans_of_more_than_max_sites(max_sites):
    prepared = prepared_for(UNet(), torch.randn(2, 4, 16, 16))
    spans = blocks(prepared, min_sites=1, max_sites=max_sites)
    check(prepared, spans)
    assert max(len(span.sites) for span in spans) <= max_sites


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_several_inputs_and_outputs_are_covered(dtype):
    model = Call(lambda m, x, mask: (m.a(x) * mask, {"b": m.b(x).relu(), "c": m.c(m.a(x) + mask)}))
    model.a, model.b, model.c = (nn.Linear(8, 8) for _ in range(3))
    prepared = prepared_for(model, torch.randn(2, 8), torch.ones(2, 8, dtype=dtype))
    for min_sites in (1, 2, 4):
        spans = blocks(prepared, min_sites=min_sites)
        check(prepared, spans)
        assert sum(len(span.sites) for span in spans) == 3  # `a` is called twice, and solved once


def test_a_mask_for_all_blocks_hinders_no_cut():
    model = Call(lambda m, x, mask: m.d(m.c(m.b(m.a(x) * mask) * mask) * mask) * mask)
    model.a, model.b, model.c, model.d = (nn.Linear(8, 8) for _ in range(4))
    prepared = prepared_for(model, torch.randn(2, 8), torch.ones(2, 8))
    assert [paths(span) for span in blocks(prepared)] == [["a", "b"], ["c", "d"]]


def test_excluded_sites_are_in_no_span():
    prepared = prepared_for(ResNet(), torch.randn(2, 3, 8, 8))
    excluded = frozenset(site.name for s in layers(prepared) for site in s.sites if "first" in paths(s)[0])
    assert len(excluded) == 2
    for spans in (layers(prepared, excluded), blocks(prepared, excluded)):
        check(prepared, spans, excluded)
        assert not any("first" in path for span in spans for path in paths(span))
    everything = frozenset(n.name for n in prepared.graph.nodes)
    assert blocks(prepared, everything) == layers(prepared, everything) == []


def test_layers_are_the_convolutions_and_linears_whose_weight_is_quantized():
    prepared = calibrated(EveryKind(), [torch.randn(2, 4, 8, 8)], EverySpec())
    assert len(layers(prepared)) == 10
    check(prepared, blocks(prepared))
    embedding = prepared_for(nets.MaskedTokens(), *nets.token_batch())
    assert len(layers(embedding)) == 4


def test_a_weight_without_an_integer_grid_is_refused_with_its_name():
    half = per_tensor(torch.float16, None, None, observer=PlaceholderObserver)
    prepared = calibrated(nets.mlp(), [torch.randn(2, 8)], SpecQuantizer(("linear",), weight=half))
    with pytest.raises(tq.SchemeError, match=r"^0: PlaceholderObserver.*exclude"):
        weight_grid(prepared, layers(prepared)[0].sites[0])
