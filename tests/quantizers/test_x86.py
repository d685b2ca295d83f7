"""X86Quantizer: uint8 activations and int8 weights for convolutions and linears; the rest float, with the reason."""

import nets
import pytest
import torch
from nets import Call
from torch import nn

import torchquant as tq
from torchquant.fx import ops
from torchquant.ops.x86 import cpu
from torchquant.quantizers.x86 import X86Quantizer


def test_convolutions_and_linears_get_u8_activations_and_s8_weights():
    image = torch.randn(2, 4, 8, 8)
    prepared = tq.prepare(tq.export(nets.Pixels(), image), X86Quantizer())
    compute = [s for s in tq.report(prepared).sites if s.compute]
    assert len(compute) == 5
    for site in compute:
        assert site.status == "quantized"
        assert site.activation.describe() == "uint8[0,255] per tensor"
        assert site.weight.describe() == "int8[-127,127] per channel 0"


@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv2d(3, 4, 3), (3, 8, 8)), (nn.Linear(8, 4), (8,))])
def test_a_layer_of_a_single_sample_is_quantized_as_a_batch_of_one(layer, shape):
    plain = torch.export.export(layer.eval(), (torch.randn(shape),)).module()
    assert [s.status for s in tq.report(tq.prepare(plain, X86Quantizer())).sites if s.compute] == ["quantized"]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose3d(3, 4, 2), (1, 3, 4, 4, 4)),
        (nn.Conv3d(3, 4, 2), (1, 3, 4, 4, 4)),
        (nn.Embedding(8, 4), (2, 3)),
        (nn.LSTM(8, 4, proj_size=2), (2, 3, 8)),
    ],
)
def test_what_no_kernel_runs_in_int8_is_left_float_with_the_reason(layer, shape):
    x = torch.zeros(shape, dtype=torch.int64) if isinstance(layer, nn.Embedding) else torch.randn(shape)
    prepared = tq.prepare(tq.export(Call(lambda m, x: m.inner(x), inner=layer), x), X86Quantizer())
    compute = [s for s in tq.report(prepared).sites if s.compute]
    assert compute
    assert all(s.status == "unsupported" and s.reason for s in compute)


SIZED = {
    "conv1d": (nn.Conv1d(3, 4, 3), (2, 3, 9), "conv1d"),
    "transposed": (nn.ConvTranspose2d(3, 4, 2), (2, 3, 9, 8), "conv_transpose2d"),
    "1x1": (nn.Conv1d(3, 4, 1), (2, 3, 9), ""),
}


@pytest.mark.parametrize("name", SIZED)
def test_what_our_kernels_alone_run_needs_a_known_length(name):
    layer, shape, left = SIZED[name]
    x, sizes = torch.randn(shape), {0: torch.export.Dim("n", max=64), 2: torch.export.Dim("l", min=4, max=64)}
    for dynamic, status in (({0: sizes[0]}, "quantized"), (sizes, "unsupported" if left else "quantized")):
        exported = tq.export(layer.eval(), (x,), dynamic_shapes=(dynamic,))
        [site] = [s for s in tq.report(tq.prepare(exported, X86Quantizer())).sites if s.compute]
        assert site.status == status
        assert ("dynamic" in site.reason) == (status == "unsupported")


def test_recurrent_layers_get_int8_weights_in_both_int8_schemes():
    x = torch.randn(2, 3, 8)
    for scheme in ("static_int8", "dynamic_int8"):
        prepared = tq.prepare(tq.export(Call(lambda m, x: m.a(x)[0], a=nn.LSTM(8, 4)), x), X86Quantizer(scheme))
        [site] = [s for s in tq.report(prepared).sites if s.compute]
        assert (site.status, site.activation) == ("quantized", None)
        assert site.reason == "w8_symmetric: its activations have 16 bits inside the kernel"


def test_dynamic_leaves_convolutions_float_and_says_which_scheme_runs_them():
    image = torch.randn(2, 4, 8, 8)
    prepared = tq.prepare(tq.export(nets.Pixels(), image), X86Quantizer("dynamic_int8"))
    by_op = {}
    for s in tq.report(prepared).sites:
        by_op.setdefault(s.op, set()).add((s.status, s.reason))
    assert by_op["linear"] == {("quantized", "")}
    ((status, reason),) = by_op["conv2d"]
    assert status == "unsupported"
    assert "static_int8" in reason


@pytest.mark.parametrize("scheme", ["static_int8", "dynamic_int8"])
def test_weights_of_seven_bits_are_a_scheme_that_the_graph_and_the_report_name(scheme):
    x = torch.randn(2, 4, 8, 8)
    prepared = tq.prepare(tq.export(nets.Pixels(), x), X86Quantizer(scheme, weights=7))
    sites = [s for s in tq.report(prepared).sites if s.compute and s.status == "quantized"]
    assert sites
    for site in sites:
        assert site.weight.describe() == "int8[-63,63] per channel 0"
        assert site.reason == f"{scheme}_w7: weights of 7 bits, asked for"
    tq.calibrate(prepared, [x], progress=False)
    for node in (converted := tq.convert(prepared)).graph.nodes:
        if "dequantize_per_channel" in str(node.target):
            assert ops.constant_value(converted, node.args[0]).abs().max() == 63


@pytest.mark.parametrize(("instructions", "bits"), [({"avx2", "fma"}, 7), ({"avx2", "avx_vnni"}, 8), (set(), 8)])
def test_auto_takes_seven_bits_where_the_cpu_has_no_vnni_and_says_so(instructions, bits, monkeypatch):
    monkeypatch.setattr(cpu, "instructions", lambda: frozenset(instructions))
    prepared = tq.prepare(tq.export(nn.Linear(8, 4), torch.randn(2, 8)), X86Quantizer(weights="auto"))
    [site] = [s for s in tq.report(prepared).sites if s.compute]
    assert site.weight.quant_max == 2 ** (bits - 1) - 1
    assert ("no VNNI" in site.reason) == (bits == 7)


def test_other_numbers_of_bits_are_schemes_and_refused_as_weights():
    for weights in (6, "seven", None):
        with pytest.raises(tq.SchemeError, match=r"X86Quantizer takes 7, 8 or 'auto'"):
            X86Quantizer(weights=weights)
    x = torch.randn(2, 32)
    prepared = tq.prepare(tq.export(nn.Linear(32, 4), x), X86Quantizer("w4_g32", weights=7))
    [site] = [s for s in tq.report(prepared).sites if s.compute]
    assert site.weight.quant_max == 7  # a scheme of its own has its own bits


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        state = torch.zeros(len(x), 16)
        for i in range(3):
            state = self.cell(x[:, i], state)
        return self.head(state)


def test_single_steps_of_a_recurrent_layer_count_as_compute_and_say_why_they_are_float():
    exported = tq.export(Cells().eval(), torch.randn(2, 3, 8))
    report = tq.report(tq.prepare(exported, X86Quantizer()))
    assert report.coverage == "1/4"
    assert {s.reason for s in report.sites if s.op == "recurrent_cell"} == {
        "the int8 kernel takes whole layers (nn.LSTM, nn.GRU, nn.RNN), not single steps"
    }
