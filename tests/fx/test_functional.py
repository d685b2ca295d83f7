"""Writes in place become values, on every kind of view and on buffers and inputs; stale copies are refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import Call
from torch import nn
from torch.utils import _pytree as pytree
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import torchquant as tq
from torchquant.fx.functional import functionalize, writes_in_place
from torchquant.quantizers import X86Quantizer, XnnpackQuantizer


def inductor():
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())


def overwritten_slice(m, x):
    y = m.conv(x)
    y[:, :4] = torch.sigmoid(y[:, :4]) + 2
    return m.conv(y[:, :3])


def many_views(m, x):
    y = m.conv(x)
    a, b = y.chunk(2, 1)
    a.mul_(2)
    y.unsqueeze_(1)
    y[torch.tensor([0])] = 0
    z = y.reshape(y.shape[0], -1)
    z[:, ::2].clamp_(0)
    b.masked_fill_(b > 1, 5.0)
    torch.add(b, 1, out=b)
    y.transpose(1, 2)[0].copy_(torch.ones(1))
    return y, a, b, z


def parts(m, x):
    y = m.conv(x).permute(0, 2, 3, 1)
    y[..., 0] = 0
    q, k = y.split([3, 5], -1)
    k.neg_()
    y.unbind(0)[1].exp_()
    torch.diagonal(y, 0, 1, 2).zero_()
    return y, q, k


def other_dtypes_and_orders(m, x):
    y = m.conv(x)
    turned = y.view(2, -1).t()
    turned[3] = 1
    turned.narrow(0, 5, 2).zero_()
    moved = y.flatten(2).movedim(1, 2)
    moved[:, :, 1].copy_(torch.tensor(3.0))
    half = y.half()
    half[:, 0] = y[:, 0] * 2
    return y, half, moved, turned


def indexed(m, x):
    y = m.conv(x)
    y[y > 0.5] = 0.0
    y[:, [0, 2]] = 1.0
    y[0, 0, 0, 0] = 5.0
    y.index_fill_(1, torch.tensor([4]), 9.0)
    y.scatter_(1, torch.zeros(2, 1, 8, 8, dtype=torch.int64), 2.0)
    return y


def constants_that_index(m, x):
    y = m.conv(x)
    y[:, torch.tensor([1, 3])] = 0.0
    y.index_put_((torch.tensor([0, 1]), torch.tensor([2, 2])), torch.tensor(1.0), accumulate=True)
    return y


def complex_parts(m, x):
    y = torch.view_as_complex(x.reshape(2, 3, 8, 4, 2))
    y.real.mul_(2)
    y.imag.add_(1)
    return y.abs()


def turned_around(m, x):
    y = m.conv(x)
    y.transpose_(1, 2)
    y[:, 2:4] = 0.7
    y.transpose_(1, 2)
    y.swapaxes_(0, 1)
    y[1].mul_(3)
    y.unsqueeze_(0)
    return y.squeeze(0)


def in_place_functions(m, x):
    y = m.conv(x)
    r = F.relu(y, inplace=True)
    y += r
    y.view(-1)[::3].add_(1)
    return r


def constants(m, x):
    positions = torch.arange(4.0)
    positions += 2
    index = torch.zeros(3, dtype=torch.int64)
    index += 1
    index[1] = 5
    return m.table[index].sum() + positions.sum() + x.mean()


def swapped_states(m, x):
    kept = m.first.clone()
    m.first.copy_(m.second)
    m.second.copy_(kept)
    m.first[0].add_(x.mean())
    return m.first * 2, m.first


def state_read_through_an_old_view(m, x):
    old = m.first[0]
    m.first.copy_(m.second * 3)
    m.second.add_(1)
    return old, m.first


def state_that_is_another(m, x):
    m.first.copy_(m.second)
    m.second.mul_(2)
    return m.first + x.mean()


def inputs(m, x):
    x.mul_(2)
    x[:, 0] -= 1
    return m.conv(x)


FUNCTIONS = [
    *(
        overwritten_slice,
        many_views,
        parts,
        other_dtypes_and_orders,
        indexed,
        constants_that_index,
        complex_parts,
        turned_around,
        in_place_functions,
    ),
    *(constants, swapped_states, state_read_through_an_old_view, state_that_is_another, inputs),
]


def model_of(function):
    torch.manual_seed(0)
    buffers = {"first": torch.zeros(2, 4), "second": torch.ones(2, 4), "table": torch.randn(10, 8)}
    return Call(function, conv=nn.Conv2d(3, 8, 3, padding=1), **buffers).eval()


def leaves(value):
    return pytree.tree_leaves(value)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_graph_without_writes_computes_the_same_over_several_calls(function):
    model, x = model_of(function), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        graph = torch.export.export(copy.deepcopy(model), (x.clone(),)).module()
    assert functionalize(graph) > 0
    targets = [n.args[0].op for n in graph.graph.nodes if str(n.target).startswith("aten.copy_")]
    assert set(targets) <= {"get_attr", "placeholder"}
    for _ in range(3):
        mine, other = x.clone(), x.clone()
        with torch.no_grad():
            pairs = zip(leaves(model(mine)), leaves(graph(other)), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        assert torch.equal(mine, other)
        buffers = dict(graph.named_buffers())
        assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers() if k in buffers)


def test_writes_of_a_graph_with_sizes_that_vary_hold_for_every_size():
    def function(m, x):
        y = m.conv(x)
        y.view(x.shape[0], -1)[:, :5] = 0
        y[:, 1] = y[:, 0]
        y[1:].mul_(3)
        return y

    model, batch = model_of(function), torch.export.Dim("batch", min=4, max=16)
    graph = tq.export(model, torch.randn(4, 3, 8, 8), dynamic_shapes=(({0: batch},),))
    for n in (4, 7):
        x = torch.randn(n, 3, 8, 8)
        assert torch.equal(model(x), graph(x))


def test_writes_into_parts_of_complex_numbers_leave_sizes_dynamic():
    def function(m, x):
        y = torch.view_as_complex(x.unflatten(-1, (4, 2)))
        y.real.mul_(2)
        y.imag.zero_()
        return m.conv(x)

    model = model_of(function)
    graph = tq.export(model, torch.randn(4, 3, 8, 8), dynamic_shapes=(({0: torch.export.Dim.DYNAMIC},),))
    for n in (2, 7):
        x = torch.randn(n, 3, 8, 8)
        assert torch.equal(graph(x.clone()), model(x))


@pytest.mark.parametrize("quantizer", [X86Quantizer, XnnpackQuantizer])
@pytest.mark.parametrize("through", [tq.export, lambda m, x: torch.export.export(m, x).module()], ids=["ours", "torch"])
def test_a_write_through_a_view_survives_quantization(quantizer, through):
    model, x = model_of(overwritten_slice), (torch.randn(2, 3, 8, 8),)
    prepared = prepare_pt2e(through(model, x), quantizer())
    tq.calibrate(prepared, [x], progress=False)
    assert tq.compare(model, convert_pt2e(prepared), [x]).sqnr_db > 25


def test_a_write_behind_a_foreign_quantizers_observer_is_refused_with_the_way_out():
    def function(m, x):
        y = m.conv(x)
        z = m.back(y)
        y[:, :4] = 5.0
        return m.other(y) + z

    model = Call(function, conv=nn.Conv2d(3, 8, 3, padding=1), back=nn.Conv2d(8, 3, 1), other=nn.Conv2d(8, 3, 1)).eval()
    x = (torch.randn(2, 3, 8, 8),)
    with torch.no_grad():
        graph = torch.export.export(model, x).module()
    prepared = prepare_pt2e(graph, inductor())
    with pytest.raises(tq.ExportError, match=r"fill_.*torchquant\.export"):
        tq.calibrate(prepared, [x], progress=False)
    again = prepare_pt2e(tq.export(model, x), inductor())
    tq.calibrate(again, [x], progress=False)
    assert tq.compare(model, convert_pt2e(again), [x]).sqnr_db > 25


def test_harmless_writes_of_a_foreign_quantizers_graph_are_not_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3), nn.ReLU(inplace=True)).eval()
    x = (torch.randn(2, 3, 8, 8),)
    graph = torch.export.export(model, x).module()
    assert writes_in_place(graph)
    prepared = prepare_pt2e(graph, inductor())
    tq.calibrate(prepared, [x], progress=False)
    assert tq.compare(model, convert_pt2e(prepared), [x]).sqnr_db > 25


def test_a_write_without_a_functional_form_is_refused_by_name():
    def function(m, x):
        values, indices = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
        torch.sort(x, out=(values, indices))
        return values + indices

    with pytest.raises(tq.ExportError, match=r"sort.*2 tensors at once"):
        tq.export(Call(function), torch.randn(4))


def test_a_write_that_needs_other_memory_is_refused_by_name():
    def function(m, x):
        y = m.conv(x)
        y.resize_(2, 8, 4, 16)
        return y

    with pytest.raises(tq.ExportError, match="resize_"):
        tq.export(model_of(function), torch.randn(2, 3, 8, 8))


def bits(m, x):
    y = m.conv(x)
    y.view(torch.int32).bitwise_and_(-256)
    y.real.mul_(2)
    return y


def operators(m, x):
    y = m.conv(x)
    y **= 2
    y //= 0.5
    mask = y > 1
    mask |= y < 0.5
    y[:, torch.tensor([0, 1])] += torch.tensor(1.0)
    y.mT[..., 0].zero_()
    y.ravel()[::7].neg_()
    for part in y[0].hsplit(2):
        part.mul_(3)
    return y * mask


@pytest.mark.parametrize("function", [bits, operators])
def test_less_usual_writes_are_values_too(function):
    model, x = model_of(function), torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), tq.export(model, x)(x))


def test_a_view_by_strides_of_a_view_is_refused_where_its_memory_is_written():
    def function(m, x):
        y = m.conv(x)
        y[:, 1:].as_strided((2, 2), (1, 2)).zero_()
        return y

    with pytest.raises(tq.ExportError, match=r"as_strided.*slice the tensor"):
        tq.export(model_of(function), torch.randn(2, 3, 8, 8))
