"""Sites are the same before and after convert, whoever wrote the Quantizer."""

import nets
import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import torchquant as tq
from torchquant.fx.reading import is_converted, is_prepared, observers
from torchquant.fx.sites import read_sites
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer


def executorch_quantizer():
    theirs = pytest.importorskip("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    return theirs.XNNPACKQuantizer().set_global(theirs.get_symmetric_quantization_config(is_per_channel=True))


QUANTIZERS = {
    "X86Quantizer": X86Quantizer,
    "X86Quantizer, dynamic": lambda: X86Quantizer("dynamic_int8"),
    "XnnpackQuantizer": XnnpackQuantizer,
    "torchao's X86InductorQuantizer": lambda: X86InductorQuantizer().set_global(
        get_default_x86_inductor_quantization_config()
    ),
    "ExecuTorch's XNNPACKQuantizer": executorch_quantizer,
}


def summary(graph):
    """What is quantized how, without the scales that only a converted graph has."""
    return {
        (s.node, s.op, s.status, s.activation and s.activation.describe(), s.weight and s.weight.describe())
        for s in read_sites(graph)
        if s.compute
    }


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_compute_sites_are_the_same_before_and_after_convert(name):
    batch = torch.randn(2, 3, 16, 16)
    prepared = prepare_pt2e(torch.export.export(nets.Mobile().eval(), (batch,)).module(), QUANTIZERS[name]())
    assert is_prepared(prepared)
    prepared(batch)
    before = summary(prepared)
    converted = convert_pt2e(prepared)
    assert is_converted(converted)
    assert not is_prepared(converted)
    assert summary(converted) == before
    quantized = {op for _, op, status, _, _ in before if status == "quantized"}
    assert quantized == ({"linear"} if "dynamic" in name else {"conv2d", "linear"})


def test_a_converted_site_carries_the_scales_of_its_observer():
    x = torch.linspace(-1, 2, 16).reshape(2, 8)
    quantized = tq.quantize(nets.mlp(), x, [x], quantizer=X86Quantizer(), algorithms=(), progress=False)
    site = next(s for s in tq.report(quantized).sites if s.op == "linear")
    assert site.activation.scale.item() == pytest.approx(3 / 255, rel=1e-5)
    assert site.activation.zero_point.item() == 85
    assert site.weight.scale.shape == (16,)
    assert site.weight.axis == 0


def test_an_op_inside_a_hidden_region_counts_as_missed():
    graph = torch.export.export(nets.NoGrad().eval(), (torch.randn(2, 3, 8, 8),)).module()
    missed = [s for s in read_sites(graph) if s.status == "missed"]
    assert any("hidden from every Quantizer" in s.reason for s in missed)


@pytest.mark.parametrize("quantizer", [X86Quantizer(), XnnpackQuantizer(), XnnpackQuantizer("static_int8")])
def test_masks_and_positions_are_never_observed(quantizer):
    batch = nets.token_batch()
    prepared = tq.prepare(tq.export(nets.MaskedTokens(), batch), quantizer)
    integers = {"cumsum", "arange", "ones", "clamp", "rsub", "sub", "mask", "ids", "_to_copy", "to", "unsqueeze"}
    watched = {node.args[0].name.rstrip("_0123456789") for node, _ in observers(prepared)}
    assert watched
    assert not watched & integers
    tq.calibrate(prepared, [batch], progress=False)
    sites = tq.report(tq.convert(prepared)).sites
    assert all(s.status == "quantized" for s in sites if s.op == "linear")
    assert all(s.status == "unsupported" and s.reason for s in sites if s.op in ("embedding", "matmul"))
