"""OpenVINO's IR: exact in float, int8 layers counted by site, two files that belong together."""

import sys

import pytest
import torch
from test_onnx_qdq import BATCH, Attention, Residual, ids_and_mask, quantized, stands_at
from torch import nn

import torchquant as tq
from torchquant.backends import openvino
from torchquant.errors import ArtifactError, LoweringError, MissingDependencyError, SchemeError, TorchquantWarning
from torchquant.quantizers import OpenvinoQuantizer, X86Quantizer, XnnpackQuantizer

pytest.importorskip("openvino")


def lowered(model, batch, quantizer, shapes=None):
    graph = quantized(model, batch, quantizer, shapes)
    return graph, openvino.lower(graph, batch, progress=False)


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)
    batch = (torch.randn(2, 3, 16, 16),)
    return batch, *lowered(Residual(), batch, OpenvinoQuantizer(), ({0: BATCH},))


def test_convolutions_and_linears_are_int8_layers_and_the_translation_is_exact(residual):
    _, graph, program = residual
    assert program.proof.fused == program.proof.annotated == 4
    assert sum(n for kind, n in program.proof.kernels.items() if "Convolution" in kind) == 3
    assert stands_at(program) >= 130
    assert program.proof.comparison.sqnr_db >= 50
    x = torch.randn(5, 3, 16, 16)
    assert tq.compare(graph, program, [(x,)]).sqnr_db > 40


@pytest.mark.parametrize("quantizer", [X86Quantizer(), XnnpackQuantizer("static_int8")], ids=["x86", "xnnpack"])
def test_graphs_of_other_quantizers_run_in_int8_too(quantizer):
    torch.manual_seed(0)
    _, program = lowered(Residual(), (torch.randn(2, 3, 16, 16),), quantizer)
    assert program.proof.fused == 4
    assert stands_at(program) >= 100


@pytest.mark.parametrize("scheme", ["static_int8", "w8", "w4_g32"])
def test_linears_and_lookups_of_a_transformer_keep_their_codes(scheme):
    torch.manual_seed(0)
    batch = ids_and_mask()
    _, program = lowered(Attention(), batch, OpenvinoQuantizer(scheme, exclude=["op:embedding"]))
    assert program.proof.fused == program.proof.annotated == 2
    assert program.proof.comparison.sqnr_db >= 50
    assert torch.equal(program(*batch)[1], batch[0] + 1)


@pytest.mark.parametrize("scheme", ["w4", "w4_symmetric"])
def test_weights_of_4_bits_and_an_odd_number_of_inputs_are_right(scheme):
    """OpenVINO decodes those wrongly: such codes take a byte."""
    torch.manual_seed(0)
    graph, program = lowered(nn.Sequential(nn.Linear(33, 20)), (torch.randn(2, 7, 33),), OpenvinoQuantizer(scheme))
    assert tq.compare(graph, program, [(torch.randn(2, 7, 33),)]).sqnr_db > 100
    assert program.proof.fused == 1


def test_saved_files_are_the_same_program_and_half_of_them_is_refused(residual, tmp_path):
    (x,), _, program = residual
    file = program.save(tmp_path / "model.xml")
    loaded = openvino.load(file)
    torch.testing.assert_close(loaded(x), program(x))
    assert loaded.proof == program.proof
    file.write_bytes(file.read_bytes().replace(b"Convolution", b"Convolutiom", 1))
    with pytest.raises(ArtifactError, match="damaged"):
        openvino.load(file)
    weights = tmp_path / "model.bin"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ArtifactError):
        openvino.load(file)
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"model\.bin is not a file"):
        openvino.load(file)
    with pytest.raises(ArtifactError, match="xml"):
        program.save(tmp_path / "model.onnx")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_products_whose_precision_openvino_does_not_tell_are_not_counted(one_thread):
    """With one thread OpenVINO makes one kernel of a small MLP."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    with pytest.warns(TorchquantWarning, match="does not say in which precision"):
        _, program = lowered(model, (torch.randn(2, 16),), OpenvinoQuantizer())
    assert program.proof.fused == 0
    assert program.proof.kernels == {}


def test_a_scheme_that_openvino_does_not_run_is_refused():
    with pytest.raises(SchemeError, match="static_int8"):
        OpenvinoQuantizer("dynamic_int8")


def test_a_missing_package_names_the_extra(residual, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"torchquant\[openvino\]"):
        openvino.lower(residual[1], residual[0], progress=False)


def test_layers_that_are_off_are_told_from_a_translation_that_is(residual, monkeypatch):
    from torchquant.backends.openvino import models

    original = models.Compiled.__call__

    def saturated(self, *tensors):
        values = original(self, *tensors)
        return values if self.integers is False else tuple(v.clamp(max=0) for v in values)

    first = models.Compiled.__init__

    def noted(self, model, *, integers=True):
        self.integers = integers
        first(self, model, integers=integers)

    monkeypatch.setattr(models.Compiled, "__init__", noted)
    monkeypatch.setattr(models.Compiled, "__call__", saturated)
    with pytest.raises(LoweringError, match="translation is right"):
        openvino.lower(residual[1], residual[0], progress=False)
