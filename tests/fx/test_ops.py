"""What is data and what is a mask; what an op is called."""

import torch
import torch.nn.functional as F
from nets import Call, MaskedTokens, token_batch
from torch import nn

import torchquant as tq
from torchquant.fx import dataflow, ops


def named(graph, op):
    return [n for n in graph.graph.nodes if n.op == "call_function" and ops.op_name(n) == op]


def test_masks_and_positions_are_no_data_and_embeddings_are():
    graph = tq.export(MaskedTokens(), token_batch())
    data = dataflow.data_nodes(graph)
    for op in ("cumsum", "arange", "ones", "clamp", "rsub", "to"):
        assert not set(named(graph, op)) & data, op
    assert set(named(graph, "embedding")) <= data
    assert set(named(graph, "linear")) <= data
    assert set(named(graph, "softmax")) <= data


def test_tensors_that_take_only_the_shape_of_data_are_no_data():
    model = Call(lambda m, x: m.inner(x) + torch.ones_like(x).cumsum(-1) + x.new_zeros(8) + torch.full_like(x, 2.0))
    model.inner = nn.Linear(8, 8)
    graph = tq.export(model, torch.randn(2, 8))
    data = dataflow.data_nodes(graph)
    for op in ("ones_like", "new_zeros", "full_like", "cumsum"):
        assert named(graph, op), op
        assert not set(named(graph, op)) & data, op


def test_in_place_and_functional_forms_have_one_name():
    model = Call(lambda m, x: F.relu6(F.relu(x + 1, inplace=True)).clamp(0, 1).add_(x).mul_(x))
    names = [ops.op_name(n) for n in tq.export(model, torch.randn(3)).graph.nodes if n.op == "call_function"]
    assert names == ["add", "relu", "hardtanh", "hardtanh", "add", "mul"]


def test_constants_come_from_parameters_through_any_op():
    model = Call(lambda m, x: F.linear(x, (m.w * 2).t()), w=nn.Parameter(torch.randn(8, 4)))
    graph = tq.export(model, torch.randn(2, 8))
    linear = named(graph, "linear")[0]
    assert ops.is_constant(ops.argument(linear, 1))
    assert not ops.is_constant(ops.argument(linear, 0))


def test_a_node_knows_the_module_that_called_it():
    graph = tq.export(nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU()), torch.randn(2, 4))
    assert [ops.module_path(n) for n in graph.graph.nodes if n.op == "call_function"] == ["0.0", "1"]


def test_every_overload_in_the_table_exists_in_torch():
    for kind in ops.KINDS:
        for overload in kind.overloads:
            name, _, overload_name = overload.partition(".")
            packet = getattr(torch.ops.aten, name, None)
            assert packet is not None, overload
            assert overload_name in packet.overloads(), overload
