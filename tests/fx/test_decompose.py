"""Every rewrite keeps the float function, and leaves alone what it cannot rewrite."""

import math

import pytest
import torch
import torch.nn.functional as F
from nets import Call
from torch import nn

import torchquant as tq
from torchquant.fx import passes
from torchquant.fx.rewrites.decompose import FORMS, RULES, decompose, normalize

attend = F.scaled_dot_product_attention


def x3():
    return (torch.randn(2, 3, 8),)


def qkv():
    return torch.randn(2, 4, 6, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 5)


def masked(kind):
    """q, k, v and a mask in which every row keeps at least its first key."""
    mask = torch.rand(2, 1, 6, 7) > 0.5
    mask[..., 0] = True
    return *qkv(), mask if kind == "bool" else torch.zeros(2, 1, 6, 7).masked_fill(~mask, -math.inf)


def module(m, x):
    return m.inner(x)


def affine(norm):
    with torch.no_grad():
        for p in norm.parameters():
            p.uniform_(0.5, 1.5)
    return norm


CASES = {
    "layer_norm": (Call(module, inner=affine(nn.LayerNorm(8, eps=0.1))), x3),
    "layer_norm without affine": (Call(module, inner=nn.LayerNorm(8, elementwise_affine=False)), x3),
    "layer_norm without bias": (Call(module, inner=affine(nn.LayerNorm(8, bias=False))), x3),
    "layer_norm, eps by keyword": (Call(lambda m, x: torch.layer_norm(x, [8], eps=0.5)), x3),
    "rms_norm": (Call(module, inner=affine(nn.RMSNorm(8))), x3),
    "rms_norm without weight": (Call(module, inner=nn.RMSNorm(8, elementwise_affine=False, eps=0.1)), x3),
    "rms_norm by hand": (Call(lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), x3),
    "instance_norm": (Call(module, inner=affine(nn.InstanceNorm2d(4, affine=True))), lambda: image()),
    "instance_norm without affine": (Call(module, inner=nn.InstanceNorm2d(4, eps=0.1)), lambda: image()),
    "attention": (Call(lambda m, q, k, v: attend(q, k, v)), qkv),
    "attention, causal": (Call(lambda m, q, k, v: attend(q, k, v, is_causal=True)), qkv),
    "attention, scale": (Call(lambda m, q, k, v: attend(q, k, v, scale=0.3)), qkv),
    "attention, bool mask": (Call(lambda m, q, k, v, a: attend(q, k, v, a)), lambda: masked("bool")),
    "attention, float mask with -inf": (Call(lambda m, q, k, v, a: attend(q, k, v, a)), lambda: masked("float")),
    "attention, constant mask": (
        Call(lambda m, q, k, v: attend(q, k, v, torch.ones(6, 7, dtype=torch.bool).tril())),
        qkv,
    ),
    "mean last": (Call(lambda m, x: x.mean(-1)), x3),
    "mean last kept": (Call(lambda m, x: x.mean(-1, keepdim=True) * x), x3),
    "sum last": (Call(lambda m, x: x.sum(-1)), x3),
    "sum first": (Call(lambda m, x: x.sum(0)), x3),
    "sum middle kept": (Call(lambda m, x: x.sum(1, keepdim=True)), x3),
    "vector norm": (Call(lambda m, x: torch.linalg.vector_norm(x, dim=-1)), x3),
    "normalize": (Call(lambda m, x: F.normalize(x, dim=-1)), x3),
    "chunk": (Call(lambda m, x: x.chunk(3, -1)[2] - x.chunk(3, -1)[1][..., :2]), x3),
    "split": (Call(lambda m, x: torch.cat(x.split([1, 2], 1)[::-1], 1)), x3),
    "scalars": (Call(lambda m, x: (x * 2.5 + 1e-3 - 0.25) / 3), x3),
    "near scalars": (Call(lambda m, x: (x + 1.0000001) * 1.0000002), x3),
    "reversed subtraction": (Call(lambda m, x: 1 - x), x3),
    "unsqueeze": (Call(lambda m, x: x.unsqueeze(1)), x3),
    "transpose": (Call(lambda m, x: x.transpose(-1, 0)), x3),
    "needless expand": (Call(lambda m, x: x * x[:, :1].expand(2, 3, 8)), x3),
    "expand_as scaled": (Call(lambda m, x: torch.add(x, x[:, :1].expand_as(x), alpha=2)), x3),
    "folded constants": (Call(lambda m, x: x * torch.arange(8).float().exp()), x3),
}
OTHER = {  # nothing to rewrite, or nothing that may be
    "alpha": (Call(lambda m, x: torch.sub(x, 2, alpha=3)), x3),
    "reversed alpha": (Call(lambda m, x: torch.rsub(x, 2, alpha=3)), x3),
    "layer_norm over two axes": (Call(lambda m, x: F.layer_norm(x, [3, 8])), x3),
    "attention of grouped queries": (
        Call(lambda m, q, k, v: attend(q, k[:, :2], v[:, :2], enable_gqa=True)),
        qkv,
    ),
    "attention in 3-D": (Call(lambda m, q, k, v: attend(q[0], k[0], v[0])), qkv),
    "sum in float64": (Call(lambda m, x: x.sum(-1, dtype=torch.float64)), x3),
    "another norm": (Call(lambda m, x: torch.linalg.vector_norm(x, ord=1, dim=-1)), x3),
    "floor division": (Call(lambda m, x: torch.div(x, 2, rounding_mode="floor")), x3),
    "expand that is returned": (Call(lambda m, x: x[:, :1].expand(2, 3, 8)), x3),
    "shared expand": (Call(lambda m, x: x[:, :1].expand(2, 3, 8) + x[:1].expand(2, 3, 8)), x3),
}
EDGES = {
    "0-D times a number": (Call(lambda m, x: x.sum(dim=(0, 1, 2)) * 2), x3),
    "0-D sum of 1-D": (Call(lambda m, x: x.sum(dim=0) / 2), lambda: (torch.randn(5),)),
    "sum over all axes kept": (Call(lambda m, x: torch.sum(x, dim=None, keepdim=True)), x3),
    "attention, scale 0": (Call(lambda m, q, k, v: attend(q, k, v, scale=0.0)), qkv),
    "attention, keys broadcast": (Call(lambda m, q, k, v: attend(q, k[:1], v[:1])), qkv),
}
MASKED_ROWS = {
    "attention, bool row masked": (
        Call(lambda m, q, k, v, a: attend(q, k, v, a.logical_and(torch.arange(6)[:, None] > 0))),
        lambda: masked("bool"),
    ),
    "attention, float row masked": (
        Call(lambda m, q, k, v, a: attend(q, k, v, torch.full_like(a, -math.inf))),
        lambda: masked("float"),
    ),
}


def image():
    return (torch.randn(2, 4, 6, 6),)


NORMAL = {
    "clamp": (Call(lambda m, x: x.clamp(-0.5, 0.5)), image),
    "clamp from below": (Call(lambda m, x: x.clamp(min=0.25)), image),
    "clamp at zero": (Call(lambda m, x: torch.clamp_min(x, 0)), image),
    "clamp from above": (Call(lambda m, x: torch.clamp_max(x, 0.25)), image),
    "clamp in place": (Call(lambda m, x: (2 * x).clamp_(-0.5, 0.5)), image),
    "select": (Call(lambda m, x: x[:, -1] + x[:, 0]), image),
    "unbind": (Call(lambda m, x: x.unbind(1)[2]), image),
    "squeeze": (Call(lambda m, x: x[:, :1].squeeze(1).unsqueeze(-1)), image),
    "stack": (Call(lambda m, x: torch.stack([x, 2 * x], -1)), image),
    "cat of one": (Call(lambda m, x: torch.cat([x]) * 2), image),
    "chunk": (Call(lambda m, x: x.chunk(3, 2)[1]), image),
    "uneven split": (Call(lambda m, x: x.split([1, 3], 1)[1]), image),
    "tensor_split": (Call(lambda m, x: torch.tensor_split(x, 4, 3)[1]), image),
    "spatial mean": (Call(lambda m, x: x.mean((-1, -2))), image),
    "whole average": (Call(lambda m, x: F.avg_pool2d(x, 6)), image),
    "pixel shuffle": (Call(lambda m, x: F.pixel_shuffle(x, 2)), image),
    "pixel unshuffle": (Call(lambda m, x: F.pixel_unshuffle(x, 3)), image),
    "channel shuffle": (Call(lambda m, x: torch.channel_shuffle(x, 2)), image),
    "crop": (Call(lambda m, x: F.pad(x, (-1, 2, 1, -2))), image),
    "dropout": (Call(lambda m, x: F.dropout(x, 0.5, False) + 1), image),
    "contiguous": (Call(lambda m, x: x.permute(0, 2, 3, 1).contiguous().view(2, 36, 4)), image),
}
FUNCTIONS = {
    "hard sigmoid": (Call(lambda m, x: F.hardsigmoid(4 * x)), image),
    "softplus": (Call(lambda m, x: F.softplus(30 * x)), image),
    "softplus, beta": (Call(lambda m, x: F.softplus(30 * x, 2.0, 20.0)), image),
    "mish": (Call(lambda m, x: F.mish(4 * x)), image),
    "log sigmoid": (Call(lambda m, x: F.logsigmoid(30 * x)), image),
    "bilinear": (
        Call(lambda m, x: m.inner(x, 2 * x), inner=nn.Bilinear(6, 6, 5)),
        image,
    ),
}
KEPT = {  # forms that may not be rewritten
    "softplus with a low threshold": (Call(lambda m, x: F.softplus(x, 1.0, 1.0)), image),
    "a clamp by tensors": (Call(lambda m, x: torch.clamp(x, torch.zeros(6), torch.ones(6))), image),
    "a clamp whose bounds cross": (Call(lambda m, x: x.clamp(0.5, -0.5)), image),
    "a clamp in place of what is used again": (Call(lambda m, x: (lambda y: y.clamp_(0, 1) + y)(2 * x)), image),
    "a copy that is written": (Call(lambda m, x: x.clone().add_(1) + x), image),
    "an average with a divisor": (Call(lambda m, x: F.avg_pool2d(x, 6, divisor_override=7)), image),
}


@pytest.mark.parametrize("name", NORMAL)
def test_a_normal_form_keeps_the_float_function(name):
    model, inputs = NORMAL[name]
    batch = inputs()
    exported = tq.export(model, batch)
    changed = passes.copy_graph(exported)
    assert normalize(changed)
    assert_same(exported(*batch), changed(*batch))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_in_the_delegates_arithmetic_is_the_same(name):
    model, inputs = FUNCTIONS[name]
    count, expected, actual = before_and_after(model, inputs())
    assert count
    assert_same(expected, actual)


@pytest.mark.parametrize("name", KEPT)
def test_what_has_no_normal_form_keeps_its_function(name):
    model, inputs = KEPT[name]
    batch = inputs()
    exported = tq.export(model, batch)
    changed = passes.copy_graph(exported)
    normalize(changed)
    assert_same(exported(*batch), changed(*batch))
    _, expected, actual = before_and_after(model, batch)
    assert_same(expected, actual)


def test_what_stands_for_an_op_keeps_its_name():
    graph = tq.export(Call(lambda m, x: x.clamp(0, 1)), image())
    normalize(graph)
    (node,) = (n for n in graph.graph.nodes if n.op == "call_function" and n.target is torch.ops.aten.hardtanh.default)
    assert node.name == "clamp"


def before_and_after(model, inputs):
    exported = tq.export(model, inputs)
    changed = passes.copy_graph(exported)
    count = decompose(changed)
    return count, exported(*inputs), changed(*inputs)


def assert_same(expected, actual):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-12)
    assert float(error) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_a_rewrite_keeps_the_float_function(name):
    model, inputs = CASES[name]
    count, expected, actual = before_and_after(model, inputs())
    assert count or name == "folded constants"
    assert_same(expected, actual)


@pytest.mark.parametrize("name", OTHER)
def test_what_no_rewrite_fits_keeps_its_function(name):
    model, inputs = OTHER[name]
    _, expected, actual = before_and_after(model, inputs())
    assert_same(expected, actual)


@pytest.mark.parametrize("name", MASKED_ROWS)
def test_a_query_with_every_key_masked_gives_finite_values_and_the_others_stay(name):
    model, inputs = MASKED_ROWS[name]
    _, expected, actual = before_and_after(model, inputs())
    assert actual.isfinite().all()
    visible = expected.abs().sum(-1) > 0
    assert torch.allclose(actual[visible], expected[visible], atol=1e-5)


@pytest.mark.parametrize("name", EDGES)
def test_a_rewrite_keeps_the_float_function_at_the_edges(name):
    model, inputs = EDGES[name]
    _, expected, actual = before_and_after(model, inputs())
    assert_same(expected, actual)


def test_no_composite_op_is_left_of_a_transformer_block():
    from nets import Block

    graph = tq.export(Block(), torch.randn(1, 8, 32))
    decompose(graph)
    left = {str(n.target) for n in graph.graph.nodes if n.op == "call_function"}
    assert not [t for t in left if any(w in t for w in ("layer_norm", "attention", "chunk", "split"))]


def test_rewrites_that_need_static_shapes_leave_dynamic_ones_alone():
    from nets import Block

    x = torch.randn(2, 8, 32)
    graph = tq.export(Block(), x, dynamic_shapes=({0: torch.export.Dim("batch")},))
    composite = [n.target for n in graph.graph.nodes if n.target in RULES and n.target not in FORMS]
    assert composite
    expected = graph(x[:1])
    decompose(graph)
    assert [n.target for n in graph.graph.nodes if n.target in composite] == composite
    assert torch.allclose(graph(x[:1]), expected, atol=1e-6)


def test_a_batch_that_varies_is_normalized_too():
    x = torch.randn(3, 4, 6, 6)
    model = Call(lambda m, x: torch.cat([*x.clamp(0, 1).chunk(2, 1)], 2).mean((2, 3)))
    graph = tq.export(model, (x,), dynamic_shapes=(({0: torch.export.Dim("batch")},),))
    expected = graph(x[:1])
    normalize(graph)
    targets = {n.target for n in graph.graph.nodes}
    assert not targets & {torch.ops.aten.chunk.default, torch.ops.aten.clamp.default}
    assert torch.allclose(graph(x[:1]), expected)
