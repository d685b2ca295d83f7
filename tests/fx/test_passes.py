"""Rewrites keep the float function."""

import pytest
import torch
import torch.nn.functional as F
from nets import Call, NoGrad, mlp, parameter
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import torchquant as tq
from torchquant.backends.executorch_xnnpack.chains import duplicate_dynamic_chains
from torchquant.backends.inductor_x86.passes import flatten_quantized_linears
from torchquant.fx import ops, passes
from torchquant.fx.batch_axes import lacks_batch_axis
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer


def names(graph):
    return [ops.op_name(n) for n in graph.graph.nodes if n.op == "call_function"]


def test_nested_no_grad_regions_are_inlined_with_the_same_result():
    x, model = torch.randn(2, 3, 8, 8), NoGrad().eval()
    graph = torch.export.export(model, (x,)).module()
    assert any("wrap_with_set_grad_enabled" in name for name in names(graph))
    assert passes.inline_regions(graph)
    assert not any("wrap" in name for name in names(graph))
    assert names(graph).count("linear") == 2
    assert torch.allclose(graph(x), model(x), atol=1e-6)
    assert not passes.inline_regions(graph)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.mm(x, m.w),
        lambda m, x: x @ m.w,
        lambda m, x: torch.matmul(x[None], m.w),
        lambda m, x: torch.addmm(m.b, x, m.w),
        lambda m, x: torch.addmm(m.one, x, m.w),
    ],
)
def test_a_product_with_a_constant_becomes_a_linear(function):
    x = torch.randn(3, 8)
    graph = tq.export(Call(function, w=parameter(8, 5), b=parameter(5), one=parameter(1)), x)
    expected = graph(x)
    assert passes.constant_matmul_to_linear(graph) == 1
    assert "linear" in names(graph)
    assert torch.allclose(graph(x), expected, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.mm(x, x.t()),
        lambda m, x: torch.mm(m.w, x.t()[:5]),
        lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5),
        lambda m, x: torch.bmm(x[None], m.w[None]),
    ],
)
def test_other_products_are_left_as_they_are(function):
    x = torch.randn(3, 8)
    graph = tq.export(Call(function, w=parameter(8, 5), b=parameter(5)), x)
    expected = graph(x)
    assert passes.constant_matmul_to_linear(graph) == 0
    assert torch.equal(graph(x), expected)


def test_a_product_with_a_transposed_constant_becomes_a_linear():
    x = torch.randn(3, 8)
    graph = tq.export(Call(lambda m, x: torch.mm(x, m.w.t()), w=parameter(5, 8)), x)
    assert passes.constant_matmul_to_linear(graph) == 1


def test_dead_weights_go_and_shared_ones_stay():
    graph = tq.export(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4))
    x = torch.randn(2, 4)
    expected = graph(x)
    graph.register_buffer("dead", torch.ones(100))
    assert passes.remove_dead_weights(graph) == 400
    assert torch.equal(graph(x), expected)
    assert passes.remove_dead_weights(graph) == 0


def test_a_copy_shares_tensors_and_not_the_graph():
    x = torch.randn(2, 8)
    graph = tq.export(mlp(), x)
    copied = passes.copy_graph(graph)
    assert {p.data_ptr() for p in copied.parameters()} == {p.data_ptr() for p in graph.parameters()}
    before = names(graph)
    copied.graph.erase_node(next(n for n in reversed(copied.graph.nodes) if n.op == "output"))
    assert names(graph) == before


def test_flattened_linears_compute_the_same():
    x = torch.randn(2, 4, 3, 8)
    model = Call(lambda m, x: m.inner(x.transpose(1, 2)), inner=nn.Linear(8, 5))
    quantized = tq.quantize(model, x, [x], quantizer=X86Quantizer(), algorithms=(), progress=False)
    flat = passes.copy_graph(quantized)
    assert flatten_quantized_linears(flat) == 1
    assert torch.allclose(flat(x), quantized(x), atol=1e-6)


def test_dynamic_chains_are_duplicated_with_the_same_result():
    x = torch.randn(2, 8)
    model = Call(lambda m, x: F.silu(m.a(x)) * m.b(x), a=nn.Linear(8, 5), b=nn.Linear(8, 5))
    graph = tq.export(model, x)
    quantized = convert_pt2e(prepare_pt2e(graph, XnnpackQuantizer("dynamic_int8")))
    expected = quantized(x)
    before = sum(map(ops.is_quantize, quantized.graph.nodes))
    done = duplicate_dynamic_chains(quantized)
    assert sum(map(ops.is_quantize, quantized.graph.nodes)) == before + done
    assert all(len(n.users) == 1 for n in quantized.graph.nodes if ops.is_dequantize(n))
    assert torch.equal(quantized(x), expected)


def test_a_module_called_twice_gets_its_own_codes_and_bias_for_each_call():
    model = Call(lambda m, x: m.inner(m.inner(x)), inner=nn.Linear(8, 8))
    x = torch.randn(4, 8)
    graph = tq.quantize(model, x, [x], quantizer=X86Quantizer(), algorithms=(), progress=False)
    expected = graph(x)
    assert passes.unshare_weights(graph) == 2
    linears = [n for n in graph.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert len({n.args[1] for n in linears}) == len({n.args[2] for n in linears}) == 2
    assert torch.equal(graph(x), expected)


@pytest.mark.parametrize("bias", [(6,), (1, 6), (4, 6), (4, 1)])
def test_addmm_with_a_constant_bias_of_any_shape_becomes_a_linear(bias):
    model = Call(
        lambda m, x: torch.addmm(m.bias, x, m.weight), bias=nn.Parameter(torch.randn(bias)), weight=parameter(8, 6)
    )
    x = torch.randn(4, 8)
    graph = tq.export(model, x)
    assert passes.constant_matmul_to_linear(graph) == 1
    assert torch.allclose(graph(x), model(x), atol=1e-6)
    quantized = tq.quantize(model, x, [x], quantizer=X86Quantizer(), algorithms=(), progress=False)
    assert tq.compare(model, quantized, [x]).sqnr_db > 30


def test_constants_behind_thousands_of_ops_are_known_without_recursion():
    def function(m, x):
        w = m.weight
        for _ in range(1500):
            w = w * 1.0001
        return torch.nn.functional.linear(x, w)

    graph = tq.export(Call(function, weight=parameter(4, 4)), torch.randn(2, 4))
    weight = next(n for n in graph.graph.nodes if ops.op_name(n) == "linear").args[1]
    assert ops.is_constant(weight)
    assert ops.constant_value(graph, weight).shape == (4, 4)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), (8,)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 4, 3, padding="same")), (3, 8, 8)),
        (nn.Sequential(nn.ConvTranspose1d(3, 8, 3), nn.Conv1d(8, 4, 1)), (3, 8)),
        (nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(5)), (3, 5)),  # reads the channels as samples
    ],
)
def test_single_samples_become_batches_of_one(model, shape):
    x = torch.randn(shape)
    graph = tq.export(model.eval(), x)
    sites = [n for n in graph.graph.nodes if ops.op_name(n).startswith(("conv", "linear"))]
    assert not any(map(lacks_batch_axis, sites))
    assert names(graph).count("reshape") == 2  # none between two of them
    assert all(ops.module_path(n) for n in sites)
    assert torch.allclose(graph(x), model(x), atol=1e-5)


@pytest.mark.parametrize(
    ("function", "draws"),
    [
        (lambda m, x: torch.rand_like(x), True),
        (lambda m, x: x.bernoulli(), True),
        (lambda m, x: F.dropout(x, 0.5), True),
        (lambda m, x: F.dropout(x, 0.0), False),
        (lambda m, x: F.dropout(x, 0.5, training=False), False),
        (lambda m, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5), True),
        (lambda m, x: F.scaled_dot_product_attention(x, x, x), False),
        (lambda m, x: F.rrelu(x), False),
    ],
)
def test_what_draws_random_numbers(function, draws):
    graph = torch.export.export(Call(function), (torch.rand(2, 3, 4),)).module()
    assert any(map(ops.draws_numbers, graph.graph.nodes)) is draws


def test_a_copy_has_state_of_its_own_and_shares_what_is_only_read():
    class Counted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(2, 2))
            self.register_buffer("shift", torch.ones(4))

        def forward(self, x):
            self.count[0].add_(1)  # through a view
            return self.linear(x) + self.shift + self.count.sum()

    exported = tq.export(Counted().eval(), (torch.randn(2, 4),))
    twin = passes.copy_graph(exported)
    exported(torch.randn(2, 4))
    mine, theirs = dict(exported.named_buffers()), dict(twin.named_buffers())
    assert mine["count"].sum() == 2
    assert theirs["count"].sum() == 0
    assert mine["shift"] is theirs["shift"]
