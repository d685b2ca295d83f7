"""ONNX models: exact as they stand, in integers in ONNX Runtime, from any Quantizer's graph, with hostile inputs."""

import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import torchquant as tq
from torchquant.backends import onnx_qdq
from torchquant.backends.onnx_qdq import program as onnx_program
from torchquant.errors import ArtifactError, InputError, LoweringError, MissingDependencyError, TorchquantWarning
from torchquant.quantizers import OnnxQuantizer, WeightOnlyQuantizer, X86Quantizer, XnnpackQuantizer

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
BATCH = Dim("batch", min=1, max=32)


class Residual(nn.Module):
    """Convolutions with a pad on two sides alone, ReLU6, a sum, pools, a join and a linear."""

    def __init__(self):
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.b, self.c, self.l = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        y = F.relu6(self.bn(self.a(F.pad(x, (0, 1, 0, 1)))))
        y = F.relu(y + self.c(F.relu(self.b(y))))
        y = torch.cat([F.max_pool2d(y, 2)] * 2, 1)[:, :8]
        return self.l(y.mean((2, 3)))


class Attention(nn.Module):
    """Lookups, attention with a bool mask, integers that are handed on."""

    def __init__(self):
        super().__init__()
        self.e, self.q, self.o = nn.Embedding(50, 32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, ids, mask):
        q, k, v = self.q(self.e(ids)).chunk(3, -1)
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask[:, None, None])[:, 0]
        return self.o(y), ids + 1


def ids_and_mask():
    return torch.randint(0, 50, (2, 7)), torch.arange(7).expand(2, 7) < 5


def quantized(model, batch, quantizer, shapes=None):
    graph = tq.export(model.eval(), batch, dynamic_shapes=shapes)
    return tq.quantize(graph, batch, [batch], quantizer=quantizer, algorithms=(), progress=False)


def lowered(model, batch, quantizer, shapes=None):
    graph = quantized(model, batch, quantizer, shapes)
    return graph, onnx_qdq.lower(graph, batch, progress=False)


def stands_at(program):
    return float(program.proof.reason.rpartition("; ")[2].partition(" dB")[0])


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)
    batch = (torch.randn(2, 3, 16, 16),)
    return batch, *lowered(Residual(), batch, OnnxQuantizer(), ({0: BATCH},))


def test_a_convolutional_network_runs_in_integers_throughout_and_is_translated_exactly(residual):
    _, _, program = residual
    assert program.proof.kernels == {"QLinearConv": 3, "MatMulIntegerToFloat": 1}
    assert program.proof.fused == program.proof.annotated == 4
    assert stands_at(program) >= 100
    assert program.proof.comparison.sqnr_db >= 50


@pytest.mark.parametrize("size", [1, 3])
def test_the_batch_stays_dynamic(residual, size):
    _, graph, program = residual
    x = torch.randn(size, 3, 16, 16)
    assert tq.compare(graph, program, [(x,)]).sqnr_db > 40
    assert tq.compare(graph, program.translated, [(x,)]).sqnr_db > 100


def test_a_relu6_and_a_pad_leave_no_node_behind(residual):
    _, _, program = residual
    model = onnx.load_from_string(program._stored.content)
    kinds = {n.op_type for n in model.graph.node}
    assert not kinds & {"Clip", "Relu", "Pad", "ReduceMean", "Transpose"}
    assert {tuple(a.ints) for n in model.graph.node for a in n.attribute if a.name == "pads"} >= {(0, 0, 1, 1)}
    assert not any(n.metadata_props or n.doc_string for n in model.graph.node)


def test_a_clamp_that_its_codes_do_not_imply_stays():
    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.b(self.a(x).clamp(-0.05, 0.05) * 3)

    batch = (torch.randn(2, 3, 6, 6),)
    with pytest.warns(TorchquantWarning, match="output is not quantized"):
        graph, program = lowered(Clamped(), batch, X86Quantizer())
    assert tq.compare(graph, program, [(10 * batch[0],)]).sqnr_db > 50
    assert "Clip" in {n.op_type for n in onnx.load_from_string(program._stored.content).graph.node}


@pytest.mark.parametrize(
    ("quantizer", "kernels"),
    [
        (OnnxQuantizer(), {"DynamicQuantizeMatMul": 1, "MatMulIntegerToFloat": 1}),
        (OnnxQuantizer("static_int8"), {"MatMulIntegerToFloat": 2}),
        (OnnxQuantizer(reduced_range=True), {"DynamicQuantizeMatMul": 1, "MatMulIntegerToFloat": 1}),
        (XnnpackQuantizer("dynamic_int8"), {"MatMulInteger": 2}),
        (XnnpackQuantizer("static_int8"), {}),
        (X86Quantizer("w4a8_g32"), {"MatMulNBits": 2}),
    ],
    ids=lambda value: value.scheme if hasattr(value, "scheme") else "",
)
def test_linears_of_every_quantizer_run_in_integers(quantizer, kernels):
    torch.manual_seed(0)
    _, program = lowered(Attention(), ids_and_mask(), quantizer)
    products = {k: n for k, n in program.proof.kernels.items() if "Gather" not in k}
    assert sum(products.values()) == 2
    assert not kernels or set(products) <= {*kernels, "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    assert stands_at(program) >= 60
    assert program.proof.comparison.sqnr_db >= 50


@pytest.mark.parametrize(("scheme", "opset"), [("w8", 18), ("w4_g32", 21), ("w4_symmetric_g16", 21), ("w2_g16", 25)])
def test_weights_of_few_bits_stay_few_bits_and_the_opset_is_the_least(scheme, opset):
    torch.manual_seed(0)
    _, program = lowered(Attention(), ids_and_mask(), OnnxQuantizer(scheme))
    model = onnx.load_from_string(program._stored.content)
    assert [o.version for o in model.opset_import if not o.domain] == [opset]
    assert program.proof.kernels["MatMulNBits"] == 2
    assert program.proof.fused == program.proof.annotated
    assert stands_at(program) > 100
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize(("inputs", "outputs"), [(32, 21), (48, 18), (33, 20), (31, 7)])
@pytest.mark.parametrize("scheme", ["w4", "w2", "w2_g16"])
def test_weights_of_few_bits_and_odd_sizes_are_right(scheme, inputs, outputs):
    """ONNX Runtime decodes 2 bits wrongly where the outputs are no multiple of 4: such codes take 4."""
    torch.manual_seed(0)
    batch = (torch.randn(2, 7, inputs),)
    graph, program = lowered(nn.Sequential(nn.Linear(inputs, outputs)), batch, OnnxQuantizer(scheme))
    assert tq.compare(graph, program, [batch]).sqnr_db > 100
    assert program.proof.fused == 1


def test_four_bits_take_their_ideal_size_to_within_3_percent():
    """Codes of 4 bits, and for each 32 a float32 scale and a zero point of 4 bits."""
    rows, columns = 512, 1024
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    _, program = lowered(model, (torch.randn(2, columns),), OnnxQuantizer("w4_g32"))
    ideal = rows * columns * (4 + (32 + 4) / 32) / 8
    assert ideal <= len(program._stored.content) <= 1.03 * ideal


def test_a_weight_whose_inputs_are_odd_gets_a_scale_an_output():
    graph, program = lowered(nn.Sequential(nn.Linear(37, 11)), (torch.randn(3, 37),), OnnxQuantizer("w4_g32"))
    x = torch.randn(3, 37)
    assert tq.compare(graph, program, [(x,)]).sqnr_db > 100


@pytest.mark.parametrize("rank", [1, 3])
def test_convolutions_of_other_ranks_run_in_integers(rank):
    conv = (nn.Conv1d, None, nn.Conv3d)[rank - 1](3, 4, 4, padding="same", dilation=1)
    _, program = lowered(nn.Sequential(conv, nn.ReLU()), (torch.randn(2, 3, *[6] * rank),), OnnxQuantizer())
    assert program.proof.kernels == {"QLinearConv": 1}


def test_what_has_codes_and_runs_in_float_is_warned_of_with_the_reason():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 3))
    with pytest.warns(TorchquantWarning, match="no integer transposed convolution"):
        _, program = lowered(model, (torch.randn(2, 3, 8, 8),), XnnpackQuantizer("static_int8"))
    assert program.proof.kernels == {"QLinearConv": 1}
    assert [s.status for s in program.sites if s.op == "conv_transpose2d"] == ["unsupported"]
    assert "transposed" in str(dict(program.proof.left_float))


def test_inputs_by_name_nested_and_handed_on_come_back_as_the_model_returns_them():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(8, 8)

        def forward(self, d, *, more):
            return {"y": self.l(d["x"][0]) + more["z"], "same": (d["x"][0], more["z"])}

    batch = {"d": {"x": [torch.randn(2, 8)]}, "more": {"z": torch.randn(8)}}
    graph, program = lowered(Nested(), batch, OnnxQuantizer())
    returned = program(**batch)
    assert torch.equal(returned["same"][0], batch["d"]["x"][0])
    assert tq.compare(graph, program, [batch]).sqnr_db > 60
    with pytest.raises(InputError, match="float32"):
        program(d={"x": [torch.randn(2, 8, dtype=torch.float64)]}, more=batch["more"])


def test_state_goes_from_call_to_call_and_back_to_the_start(tmp_path):
    class Filter(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(8, 8)
            self.register_buffer("h", torch.zeros(4, 8))

        def forward(self, x):
            self.h.add_(self.l(x))
            return self.h * 2

    x = torch.randn(4, 8)
    _, program = lowered(Filter(), (x,), OnnxQuantizer())
    again = onnx_qdq.load(program.save(tmp_path / "filter.onnx"))
    first, second = program(x), program(x)
    torch.testing.assert_close(second, 2 * first)
    torch.testing.assert_close(again(x), first)
    program.reset()
    torch.testing.assert_close(program(x), first)


def test_a_shared_weight_is_kept_once_for_lookups_and_products():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.l = nn.Embedding(20, 16), nn.Linear(16, 16)

        def forward(self, i):
            return F.linear(self.l(self.e(i)), self.e.weight)

    graph, program = lowered(Tied(), (torch.randint(0, 20, (2, 7)),), OnnxQuantizer("w8"))
    assert tq.compare(graph, program, [(torch.randint(0, 20, (2, 7)),)]).sqnr_db > 100
    assert program.proof.kernels["MatMulNBits"] == 2


def test_float8_is_written_as_float8_and_computed_in_float():
    with pytest.warns(TorchquantWarning, match="float8 codes in float"):
        _, program = lowered(Residual(), (torch.randn(2, 3, 16, 16),), OnnxQuantizer("tensorrt_fp8"))
    model = onnx.load_from_string(program._stored.content)
    assert onnx.TensorProto.FLOAT8E4M3FN in {t.data_type for t in model.graph.initializer}
    assert stands_at(program) > 100


def test_a_bfloat16_model_is_refused_by_the_name_of_its_input():
    graph = quantized(nn.Linear(32, 8).bfloat16(), (torch.randn(2, 32).bfloat16(),), WeightOnlyQuantizer("w8"))
    with pytest.raises(LoweringError, match=r"input .* is torch\.bfloat16"):
        onnx_qdq.lower(graph, progress=False)


# files ----------------------------------------------------------------------------------------------------------------


def test_a_saved_model_is_the_same_program_and_a_plain_onnx_file(residual, tmp_path):
    (x,), _, program = residual
    file = program.save(tmp_path / "ein Name & mehr.onnx")
    assert file.stat().st_size == program.size_bytes
    loaded = onnx_qdq.load(file)
    assert torch.equal(loaded(x), program(x))
    assert loaded.proof == program.proof
    assert [(s.node, s.status, s.reason) for s in loaded.sites] == [(s.node, s.status, s.reason) for s in program.sites]
    onnx.checker.check_model(str(file), full_check=True)
    session = onnxruntime.InferenceSession(str(file))
    name = session.get_inputs()[0].name
    assert session.get_inputs()[0].shape[1:] == [3, 16, 16]
    np.testing.assert_array_equal(session.run(None, {name: x.numpy()})[0], program(x).numpy())


def test_a_model_of_others_is_loaded_without_a_report(residual, tmp_path):
    (x,), _, program = residual
    file = program.save(tmp_path / "ours.onnx")
    model = onnx.load(str(file))
    model.DiscardUnknownFields()
    onnx.save(model, str(tmp_path / "theirs.onnx"))
    theirs = onnx_qdq.load(tmp_path / "theirs.onnx")
    assert theirs.proof is None
    assert torch.equal(theirs(x), program(x))


@pytest.mark.parametrize("at", [20, 2000, -40])
def test_a_changed_byte_is_seen(residual, tmp_path, at):
    _, _, program = residual
    file = program.save(tmp_path / "m.onnx")
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    try:
        loaded = onnx_qdq.load(file)
    except ArtifactError:
        return
    assert at == -40  # the archive's comment, which fills the room that is left
    assert loaded.proof == program.proof


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_half_a_file_is_refused(residual, tmp_path, keep):
    _, _, program = residual
    file = program.save(tmp_path / "m.onnx")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArtifactError):
        onnx_qdq.load(file)


def test_a_missing_folder_is_named_and_a_file_stays_when_its_successor_fails(residual, tmp_path):
    _, _, program = residual
    with pytest.raises(ArtifactError, match="nowhere"):
        program.save(tmp_path / "nowhere" / "m.onnx")
    file = tmp_path / "m.onnx"
    file.write_bytes(b"before")
    with pytest.raises(LoweringError, match="2000"):
        onnx_qdq.lower(residual[1], residual[0], min_sqnr_db=2000, progress=False).save(file)
    assert file.read_bytes() == b"before"


def test_weights_beyond_the_limit_of_a_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_program, "_LARGEST_BYTES", 1000)
    x = torch.randn(2, 64)
    _, program = lowered(nn.Sequential(nn.Linear(64, 64)), (x,), OnnxQuantizer("w8"))
    file = program.save(tmp_path / "large.onnx")
    assert (tmp_path / "large.onnx.data").stat().st_size >= 64 * 64
    assert file.stat().st_size < 64 * 64 + 8000
    loaded = onnx_qdq.load(file)
    assert torch.equal(loaded(x), program(x))
    session = onnxruntime.InferenceSession(str(file))
    assert len(session.run(None, {session.get_inputs()[0].name: x.numpy()})) == 1
    again = onnx_qdq.load(loaded.save(tmp_path / "again.onnx"))
    assert torch.equal(again(x), program(x))
    assert again.proof == program.proof
    content = bytearray((tmp_path / "large.onnx.data").read_bytes())
    content[100] ^= 1
    (tmp_path / "large.onnx.data").write_bytes(content)
    with pytest.raises(ArtifactError, match="weights"):
        onnx_qdq.load(file)
    (tmp_path / "large.onnx.data").unlink()
    with pytest.raises(ArtifactError, match="does not lie beside it"):
        onnx_qdq.load(file)


def test_a_missing_package_names_the_extra(residual, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"torchquant\[onnx\]"):
        onnx_qdq.lower(residual[1], residual[0], progress=False)


# the proof ------------------------------------------------------------------------------------------------------------


def test_kernels_that_are_off_are_told_from_a_translation_that_is(residual, monkeypatch):
    from torchquant.backends.onnx_qdq import capabilities, lowering

    def saturated(model):
        graph, session = original(model)
        return graph, lambda *tensors: tuple(v.clamp(max=0) for v in session(*tensors))

    original = lowering.optimized
    monkeypatch.setattr(lowering, "optimized", saturated)
    monkeypatch.setattr(capabilities, "has_vnni", lambda: False)
    with pytest.raises(LoweringError, match=r"translation is right .*reduced_range"):
        onnx_qdq.lower(residual[1], residual[0], progress=False)


def test_a_wrong_translation_is_refused(residual, monkeypatch):
    from torchquant.backends.onnx_qdq import rewriting

    monkeypatch.setattr(
        rewriting._Writer,
        "_codes",
        lambda self, stored: rewriting.ops.constant_value(self.graph, stored.codes).detach().neg(),
    )
    with pytest.raises(LoweringError, match="onnx_qdq: output 0"):
        onnx_qdq.lower(residual[1], residual[0], progress=False)


def test_a_profile_names_the_operators_and_the_sites_that_they_compute(residual):
    batch, graph, program = residual
    profile = tq.profile(program, batch, graph=graph)
    parts = {site: part.name for part in profile.trace.parts for site in part.sites}
    assert parts["conv2d"] == "QLinearConv"
    assert parts["linear"] == "MatMulIntegerToFloat"
    assert 0 < profile.trace.parts_ms <= 1.1 * profile.trace.whole_ms


# TensorRT -------------------------------------------------------------------------------------------------------------


def test_the_tensorrt_scheme_follows_its_rules_and_others_are_told_what_they_break(tmp_path, residual):
    batch = (torch.randn(2, 3, 16, 16),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TorchquantWarning)  # ONNX Runtime wants codes behind a convolution, too
        _, program = lowered(Residual(), batch, OnnxQuantizer("tensorrt_int8"))
    assert onnx_qdq.tensorrt.check(program.save(tmp_path / "ours.onnx")) == ()
    broken = {v.rule for v in onnx_qdq.tensorrt.check(residual[2].save(tmp_path / "cpu.onnx"))}
    assert "a zero point is not 0" in broken
    assert any("UINT8" in rule for rule in broken)
    with pytest.raises(ArtifactError):
        onnx_qdq.tensorrt.check(tmp_path / "none.onnx")
