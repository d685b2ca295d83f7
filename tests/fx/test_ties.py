"""Ties: which values additions tie together, who takes their factor, and where an op would part what is quantized."""

import foreign
import pytest
import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from nets import Call
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from torchquant.fx.ties import is_annotated, quantizes_output, ties_of

pytestmark = pytest.mark.filterwarnings("ignore:the Quantizer left:torchquant.errors.TorchquantWarning")


def executorch():
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


def prepared_of(model, *args, quantizer=None):
    return prepare_pt2e(torch.export.export(model.eval(), args).module(), quantizer or executorch())


def sums(prepared):
    return [tie for tie in ties_of(prepared) if tie.is_sum]


def names(nodes):
    return [n.name for n in nodes]


def test_both_operands_and_the_result_of_an_addition_are_one_tie():
    model = Call(
        lambda m, x: m.after((y := m.before(x)) + m.linear(y)),
        before=nn.LayerNorm(8),
        linear=nn.Linear(8, 8),
        after=nn.LayerNorm(8),
    )
    (tie,) = sums(prepared_of(model, torch.randn(4, 8)))
    assert names(tie.values) == ["layer_norm", "linear", "add"]
    assert (tie.axis, tie.reason, tie.made, tie.operations) == (-1, "", [], 1)
    assert names(p.node for p in tie.producers) == ["layer_norm", "linear"]
    assert names(r.layer for r in tie.layers) == ["linear"]
    assert [names(users) for users in tie.outside.values()] == [["layer_norm_1"]]


def test_additions_one_after_the_other_are_one_tie_and_what_takes_no_factor_is_named():
    model = Call(
        lambda m, x: m.head(F.gelu(m.first(x)) + m.second(x) + m.third(x)),
        **{name: nn.Linear(8, 8) for name in ("first", "second", "third", "head")},
    )
    (tie,) = sums(prepared_of(model, torch.randn(4, 8)))
    assert names(tie.made) == ["gelu"]
    assert sorted(names(tie.values)) == ["add", "add_1", "gelu", "linear_1", "linear_2"]
    assert not tie.outside
    assert names(r.layer for r in tie.layers) == ["linear_3"]


def test_a_residual_block_of_convolutions_is_tied_through_its_relu():
    model = Call(
        lambda m, x: m.last(F.relu((y := m.first(x)) + m.second(y))),
        first=nn.Conv2d(3, 4, 1),
        second=nn.Conv2d(4, 4, 3, padding=1),
        last=nn.Conv2d(4, 2, 1),
    )
    (tie,) = sums(prepared_of(model, torch.randn(2, 3, 6, 6)))
    assert (tie.axis, tie.reason, tie.operations) == (-3, "", 0)
    assert names(p.node for p in tie.producers) == ["conv2d", "conv2d_1"]
    assert names(r.layer for r in tie.layers) == ["conv2d_1", "conv2d_2"]


def test_nothing_is_put_between_two_quantized_ops():
    model = Call(lambda m, x: (m.first(x) + m.second(x)) * x, first=nn.Linear(8, 8), second=nn.Linear(8, 8))
    (tie,) = sums(prepared_of(model, torch.randn(4, 8)))
    assert "is quantized and takes no factor" in tie.reason
    model = Call(lambda m, x: m.last((x * 2.0 * x) + m.first(x)), first=nn.Linear(8, 8), last=nn.Linear(8, 8))
    (tie,) = sums(prepared_of(model, torch.randn(4, 8)))
    assert "is quantized and takes no factor" in tie.reason


def test_a_float_addition_ties_nothing():
    model = Call(
        lambda m, x: m.second(m.first(x) + x),
        first=nn.Linear(8, 8),
        second=nn.Linear(8, 8),
    )
    quantizer = foreign.SpecQuantizer(("linear",), foreign.dynamic(), foreign.per_channel())
    assert not sums(prepared_of(model, torch.randn(4, 8), quantizer=quantizer))


def test_an_operand_with_one_value_for_all_channels_forbids_a_factor():
    model = Call(
        lambda m, x: m.after(m.first(x) + m.gate(x)), first=nn.Linear(8, 8), gate=nn.Linear(8, 1), after=nn.LayerNorm(8)
    )
    (tie,) = sums(prepared_of(model, torch.randn(4, 8)))
    assert "differ in their channels" in tie.reason


def test_what_the_quantizer_annotated_is_known():
    model = Call(lambda m, x: F.gelu(m.first(x)), first=nn.Linear(8, 8))
    prepared = prepared_of(model, torch.randn(4, 8))
    annotated = {n.name: (is_annotated(n), quantizes_output(n)) for n in prepared.graph.nodes}
    assert annotated["linear"] == (True, True)
    assert annotated["gelu"] == (False, False)
