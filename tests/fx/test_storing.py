"""What a converted graph keeps of its weights, against torchao's own conversion."""

import operator

import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

import torchquant as tq
from torchquant.fx import ops, passes
from torchquant.fx.reading import GraphReading
from torchquant.fx.storing import unpack_weights
from torchquant.quantizers import CudaQuantizer, WeightOnlyQuantizer, X86Quantizer

INPUTS = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))


class Tied(torch.nn.Module):
    """A table that is also the head, around a layer."""

    def __init__(self):
        super().__init__()
        self.table, self.inner = torch.nn.Embedding(96, 128), torch.nn.Linear(128, 128)
        self.head = torch.nn.Linear(128, 96, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.inner(self.table(ids)).relu())


def net():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(128, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128), torch.nn.Linear(128, 64)]
    return torch.nn.Sequential(*layers).eval()


def prepared(quantizer, model=None, inputs=INPUTS):
    graph = tq.prepare(tq.export(model or net(), inputs), quantizer)
    tq.calibrate(graph, [inputs], progress=False)
    return graph


def codes_of(graph):
    reading, codes = GraphReading(graph), []
    for node in graph.graph.nodes:
        read = reading.op(node) if ops.is_dequantize(node) else None
        if read is not None and read.codes is not None and ops.is_constant(read.codes):
            codes.append((ops.constant_value(graph, read.codes), read.qparams))
    return codes


@pytest.mark.parametrize(
    "quantizer",
    [WeightOnlyQuantizer(s) for s in ("w4_g32", "w4_symmetric_g64", "w3_g32", "w2_g16", "w4", "w8_g32", "w8")]
    + [X86Quantizer("static_int8"), X86Quantizer("dynamic_int8"), X86Quantizer("w4a8_g32"), CudaQuantizer("w4a16_g32")],
    ids=lambda quantizer: f"{type(quantizer).__name__}-{quantizer.scheme}",
)
def test_packed_graphs_are_torchaos_bit_by_bit(quantizer):
    theirs, ours = convert_pt2e(prepared(quantizer)), tq.convert(prepared(quantizer))
    pairs = list(zip(codes_of(theirs), codes_of(ours), strict=True))
    assert pairs
    for (their_codes, their_grid), (our_codes, our_grid) in pairs:
        assert our_codes.dtype == their_codes.dtype
        assert torch.equal(our_codes, their_codes)
        assert (our_grid.axis, our_grid.group_size) == (their_grid.axis, their_grid.group_size)
        assert torch.equal(our_grid.scale, their_grid.scale)
    with torch.no_grad():
        expected = theirs(INPUTS)
        assert torch.equal(ours(INPUTS), expected)
        assert torch.equal(tq.convert(prepared(quantizer))(INPUTS), expected)
        saved = passes.weight_bytes(theirs)
        assert tq.pack_weights(theirs) == saved - passes.weight_bytes(theirs) >= 0
        assert torch.equal(theirs(INPUTS), expected)


@pytest.mark.parametrize(("scheme", "most"), [("w4_g32", 0.6), ("w4_g64", 0.55), ("w3_g64", 0.43), ("w2_g32", 0.35)])
def test_a_weight_takes_its_bits_and_its_share_of_scales(scheme, most):
    model = torch.nn.Linear(512, 256, bias=False)
    inputs = torch.randn(1, 512)
    graph = tq.convert(prepared(WeightOnlyQuantizer(scheme), model, inputs))
    assert passes.weight_bytes(graph) / model.weight.numel() <= most
    unpack_weights(graph)
    assert passes.weight_bytes(graph) / model.weight.numel() > 1


def test_unpacked_graphs_read_plain_constants_and_compute_the_same():
    graph = tq.convert(prepared(WeightOnlyQuantizer("w4_g32")))
    expected, codes = graph(INPUTS), [c for c, _ in codes_of(graph)]
    assert unpack_weights(graph) == 9  # codes, scales and zero points of three layers
    assert unpack_weights(graph) == 0
    assert all(n.args[0].op == "get_attr" for n in graph.graph.nodes if ops.is_dequantize(n))
    assert all(torch.equal(a, b) for a, (b, _) in zip(codes, codes_of(graph), strict=True))
    assert torch.equal(graph(INPUTS), expected)
    assert not any("packed" in name for name, _ in graph.named_buffers())


def test_codes_outside_of_the_grid_that_an_op_names_are_left_as_they_are():
    graph = convert_pt2e(prepared(WeightOnlyQuantizer("w4")))
    node = next(n for n in graph.graph.nodes if ops.is_dequantize(n))
    stored = operator.attrgetter(node.args[0].target)(graph)
    stored[0, 0] = 100
    expected = graph(INPUTS)
    tq.pack_weights(graph)
    assert torch.equal(graph(INPUTS), expected)
    assert [node.args[0].op == "get_attr" for node in graph.graph.nodes if ops.is_dequantize(node)].count(True) == 1


def test_weights_are_decoded_one_at_a_time():
    graph = tq.convert(prepared(WeightOnlyQuantizer("w4_g32")))
    decoded = [n for n in graph.graph.nodes if ops.is_dequantize(n)]
    assert len(decoded) == 3
    assert all(node.next in node.users for node in decoded)


@pytest.mark.parametrize("scheme", ["w4_g32", "w8", "w8_g32"])
@pytest.mark.parametrize("algorithms", [(), (tq.GPTQ(),)], ids=["nearest", "gptq"])
def test_a_table_that_is_also_the_head_is_stored_once(tmp_path, scheme, algorithms):
    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.arange(8)[None]
    quantizer = X86Quantizer(scheme)
    graph = tq.quantize(model, ids, [ids], quantizer=quantizer, algorithms=algorithms, progress=False)
    tq.save(graph, tmp_path / "tied.pt2")
    for kept in (graph, tq.load(tmp_path / "tied.pt2")):
        names = {str(n.target) for n in kept.graph.nodes if n.op == "get_attr"}
        stored = [operator.attrgetter(name)(kept) for name in names]
        bits = 4 if scheme.startswith("w4") else 8
        assert [t.nbytes for t in stored].count(96 * 128 * bits // 8) == 1
        assert sum(t.nbytes for t in stored) < 1.2 * bits / 8 * (96 + 128) * 128 + 8 * (96 + 128 + 128)
        assert torch.equal(kept(ids), graph(ids))


def test_float_weights_go_while_codes_come():
    """Of the exported weights none is held by the converted graph, and the caller's graph keeps its own."""
    exported = tq.export(net(), INPUTS)
    graph = tq.convert(tq.prepare(exported, WeightOnlyQuantizer("w4_g32")))
    assert not [
        n for n, t in graph.state_dict().items() if t.is_floating_point() and t.ndim > 1 and t.dtype != torch.half
    ]
    assert len([p for p in exported.parameters() if p.ndim > 1]) == 3
