"""Transformers whose lengths vary: few delegate calls, and the same results as the graph at every length."""

import pytest
import torch
import torch.nn.functional as F
from nets import Call
from torch import nn

import torchquant as tq
from torchquant.quantizers import XnnpackQuantizer

pytest.importorskip("executorch")
from executorch.exir import pass_base

from torchquant.backends import executorch_xnnpack
from torchquant.backends.executorch_xnnpack.quick import quick_passes

SCHEME = "w4a8_symmetric_g32"
LENGTH = torch.export.Dim("length", min=1, max=16)


def lowered(model, batch, shapes):
    torch.manual_seed(0)
    exported = tq.export(model.eval(), batch, dynamic_shapes=(shapes,))
    quantizer = XnnpackQuantizer(SCHEME)
    graph = tq.quantize(exported, batch, [batch], quantizer=quantizer, algorithms=(), progress=False)
    return executorch_xnnpack.lower(graph, batch, progress=False), graph


def attend(m, x, mask=None):
    batch, length, _ = x.shape
    q, k, v = (layer(x).view(batch, length, 4, 16).transpose(1, 2) for layer in (m.q, m.k, m.v))
    y = F.scaled_dot_product_attention(q, k, v, mask)
    return m.out(y.transpose(1, 2).reshape(batch, length, 64))


@pytest.mark.parametrize("kind", [pytest.param("none", marks=pytest.mark.slow), "bool", "float"])
def test_attention_of_varying_lengths_is_one_delegate_call_and_right_at_every_length(kind):
    def inputs(length):
        mask = torch.rand(1, 1, length, length) + torch.eye(length) > 0.4  # each row reads itself
        masks = {"none": (), "bool": (mask,), "float": (torch.zeros(mask.shape).masked_fill(~mask, -torch.inf),)}
        return torch.randn(2, length, 64), *masks[kind]

    shapes = ({1: LENGTH}, {2: LENGTH, 3: LENGTH})[: len(inputs(1))]
    program, graph = lowered(
        Call(attend, **{name: nn.Linear(64, 64) for name in ("q", "k", "v", "out")}), inputs(5), shapes
    )
    assert program.proof.kernels["delegate calls"] == 1
    assert program.proof.kernels["delegated int4 linear"] == 4
    for length in (1, 16, 4):
        batch = inputs(length)
        assert tq.sqnr_db(graph(*batch), program(*batch)) > 40


def test_norms_and_rotations_of_varying_lengths_stay_in_the_delegate():
    def forward(m, x):
        y = m.inner(m.norm(x) * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt())
        turned = torch.cat([-y[..., 32:], y[..., :32]], -1)
        return torch.cat([turned[..., ::2], -turned[..., 60:], turned[..., :8]], -1) + 1

    program, graph = lowered(
        Call(forward, norm=nn.RMSNorm(64), inner=nn.Linear(64, 64)), torch.randn(2, 5, 64), ({1: LENGTH},)
    )
    assert program.proof.kernels["delegate calls"] == 1
    assert not [name for name in program.proof.kernels if name.startswith("portable")]
    for length in (1, 16, 4):
        x = torch.randn(2, length, 64)
        assert tq.sqnr_db(graph(x), program(x)) > 40


def test_a_decoder_with_a_cache_is_one_delegate_call_a_layer_and_two_more():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_hidden_layers=2, vocab_size=101, **sizes, tie_word_embeddings=True)
    exported = tq.export_causal_lm(transformers.LlamaForCausalLM(config).eval(), 16, logits="last")
    quantized = tq.convert(tq.prepare(exported, XnnpackQuantizer(SCHEME)))
    example = (torch.zeros(1, 5, dtype=torch.int64), torch.arange(5), torch.arange(5))
    program = executorch_xnnpack.lower(quantized, example, progress=False)
    kernels = program.proof.kernels
    assert kernels["delegate calls"] <= 2 + 2
    assert kernels["delegated int4 linear"] == 2 * 7 + 1
    assert kernels["portable embedding_4bit"] == 1
    assert torch.equal(tq.generate(program, [4, 9, 2], 8), tq.generate(quantized, [4, 9, 2], 8))


def test_the_passes_of_executorch_are_put_back():
    base = pass_base._ExportPassBase
    before = base.call, base._fx, base.ExportInterpreter.run_node
    with quick_passes():
        assert base.call is not before[0]
    with pytest.raises(tq.LoweringError), quick_passes():
        raise tq.LoweringError("what is built within fails")
    assert (base.call, base._fx, base.ExportInterpreter.run_node) == before
