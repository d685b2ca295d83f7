"""Ternary weights: the paper's codes, trained, and run by x86 in 2 bits and by XNNPACK in 8."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchquant as tq
from torchquant import qat
from torchquant.backends import inductor_x86
from torchquant.quantizers import TernaryQuantizer
from torchquant.training.fakes import fakes

BATCH = ({0: torch.export.Dim("batch")},)


class Net(nn.Module):
    """Two hidden layers of BitNet's kind: a norm in front of each linear, no biases."""

    def __init__(self):
        super().__init__()
        self.first, self.one = nn.LayerNorm(64), nn.Linear(64, 128, bias=False)
        self.second, self.two = nn.LayerNorm(128), nn.Linear(128, 64, bias=False)
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        return self.head(self.two(self.second(F.relu(self.one(self.first(x))).square())))


def trained(scheme, steps=40, dynamic_shapes=BATCH):
    torch.manual_seed(0)
    x = torch.randn(32, 64)
    wanted = (x[:, :4] * x[:, 4:8]).argmax(1)
    exported = tq.export(Net(), x, dynamic_shapes=dynamic_shapes)
    graph = qat.prepare(exported, TernaryQuantizer(scheme, exclude=["head"], is_qat=True))
    optimizer = torch.optim.Adam(qat.parameters(graph, 3e-3))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(graph(x), wanted)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return graph, x, losses


@pytest.mark.parametrize("scheme", ["ternary", "ternary_xnnpack"])
def test_the_codes_and_the_scale_are_the_papers(scheme):
    graph, x, losses = trained(scheme)
    assert losses[-1] < losses[0] / 2
    weight = dict(graph.named_parameters())["one.weight"]
    fake = next(f for f in fakes(graph) if f.is_weight)
    with torch.no_grad():
        graph(x)  # sees the weight after the last step
        gamma = weight.abs().mean()
        assert torch.allclose(fake(weight), (weight / gamma).round().clamp(-1, 1) * gamma, rtol=1e-5)
        with qat.evaluate(graph):
            expected = graph(x)
    converted = qat.convert(graph)
    assert tq.sqnr_db(expected, converted(x)) >= 60
    described = {s.module: s.weight.describe() for s in tq.report(converted).sites if s.weight is not None}
    where = "per tensor" if scheme == "ternary" else "per channel 0"
    assert described == dict.fromkeys(("one", "two"), f"int8[-1,1] {where}")
    assert (
        tq.report(converted).weight_bytes < 1.2 * 64 * 128
    )  # of 2 x 64 x 128 weights in 2 bits, scales, norms and the head


def test_gradients_pass_beyond_the_largest_code():
    graph, x, _ = trained("ternary", steps=0)
    graph(x).square().sum().backward()
    weight = dict(graph.named_parameters())["one.weight"]
    beyond = weight.abs() > 1.5 * weight.abs().mean()
    assert beyond.any()
    assert (weight.grad[beyond] != 0).all()


def test_x86_multiplies_weights_of_two_bits():
    graph, x, _ = trained("ternary")
    converted = qat.convert(graph)
    program = inductor_x86.lower(converted, x)
    assert program.proof.kernels["torchquant_linear_w2a8"] == 2
    assert program.proof.outcome == "holds"
    assert tq.sqnr_db(converted(x), program(x)) > 40


def test_xnnpack_multiplies_them_in_eight_and_says_so():
    backend = pytest.importorskip("torchquant.backends.executorch_xnnpack")
    graph, x, _ = trained("ternary_xnnpack", dynamic_shapes=None)
    converted = qat.convert(graph)
    reasons = {s.reason for s in tq.report(converted).sites if s.weight is not None}
    assert len(reasons) == 1
    assert "no kernel of 2-bit weights" in reasons.pop()
    assert backend.lower(converted, x).proof.outcome == "holds"


def test_what_is_no_linear_stays_float_with_the_reason():
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    graph = tq.prepare(tq.export(model.eval(), x), TernaryQuantizer())
    reasons = {s.op: (s.status, s.reason) for s in tq.report(graph).sites}
    assert reasons["conv2d"] == (
        "unsupported",
        "ternary weights are for linears; leave it float, or take another Quantizer for it",
    )
    assert reasons["linear"][0] == "quantized"
