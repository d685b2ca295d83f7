"""What a program is proven on: the example, one sample of it where the model runs on that, state after some calls."""

import torch
from nets import Call
from torch import nn

import torchquant as tq
from torchquant.fx.flat import flat
from torchquant.lowering.proof import cases_of


def flattened(model, batch, dynamic_shapes=None):
    return flat(tq.export(model.eval(), batch, dynamic_shapes=dynamic_shapes))


def test_one_sample_is_tried_where_the_batch_varies():
    batch = torch.export.Dim("batch")
    cases = cases_of(flattened(nn.Linear(4, 2), torch.randn(3, 4), ({0: batch},)), torch.randn(3, 4))
    assert [tuple(case[0].shape) for case in cases] == [(3, 4), (1, 4)]


def test_one_sample_is_left_out_where_indices_point_beyond_it():
    def messages(m, x, edges):
        return m.linear(x[edges[0]]).index_add(0, edges[1], x[edges[1]])

    shapes = (({0: torch.export.Dim("nodes", min=2)}, {1: torch.export.Dim("edges", min=2)}),)
    batch = (torch.randn(5, 4), torch.randint(2, (2, 7)) + 2)
    reference = flattened(Call(messages, linear=nn.Linear(4, 4)), batch, shapes)
    assert [case[0].shape[0] for case in cases_of(reference, batch)] == [5]


def test_state_is_looked_at_as_it_is_at_first_and_after_each_of_some_calls():
    def count(m, x):
        m.count += 1
        return m.linear(x) + m.count

    reference = flattened(Call(count, linear=nn.Linear(4, 2), count=torch.zeros(1)), torch.randn(3, 4))
    assert [float(case[-1]) for case in cases_of(reference, torch.randn(3, 4))] == [0, 1, 2, 3]
