"""Keys and values in 8 and 4 bits behind a rotation."""

import pytest
import torch
from decoders import decoder, tokens_of

import torchquant as tq
from torchquant.backends import inductor_x86
from torchquant.errors import ExportError, InputError
from torchquant.language.checkpoints import Checkpoint
from torchquant.language.quantized_cache import _decoded, _encoded, hadamard
from torchquant.quantizers import X86Quantizer


def sqnr(wanted, got):
    return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))


@pytest.mark.parametrize("size", [2, 24, 64, 80, 128])
def test_a_rotation_is_orthogonal_and_its_own_inverse(size):
    rotation = hadamard(size)
    assert torch.allclose(rotation @ rotation, torch.eye(size), atol=1e-6)
    assert len(rotation.abs().unique()) <= 2


@pytest.mark.parametrize(("bits", "least_db"), [(8, 40), (4, 19)])
@pytest.mark.parametrize("factor", [1.0, 1e-3, 3e3])
def test_codes_stand_for_the_rows(bits, least_db, factor):
    rows = factor * torch.randn(2, 3, 5, 64)
    codes, scale = _encoded(rows, bits)
    assert codes.shape[-1] == 64 * bits // 8
    assert codes.element_size() == 1
    assert sqnr(rows, _decoded(codes, scale, bits, torch.float32)) > least_db
    nothing = torch.zeros(1, 1, 1, 64)
    assert torch.equal(_decoded(*_encoded(nothing, bits), bits, torch.float32), nothing)


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen3", "gemma3", "gpt2", "phi"))]
)
def test_eight_bits_change_little_and_four_more(name):
    model, tokens = decoder(name), tokens_of(40)
    wanted = model(tokens).logits
    eight, four = (tq.Decoder(tq.export_causal_lm(model, 48, cache_bits=b)).append(tokens) for b in (8, 4))
    assert sqnr(wanted, eight) > 25
    assert 5 < sqnr(wanted, four) < sqnr(wanted, eight) - 10


def test_a_rotation_saves_the_features_beside_an_outlier():
    keys, queries, rotation = torch.randn(1, 1, 200, 64), torch.randn(1, 1, 200, 64), hadamard(64)
    keys[..., 5] *= 10
    queries[..., 5] /= 10
    plain = _decoded(*_encoded(keys, 4), 4, torch.float32)
    rotated = _decoded(*_encoded(keys @ rotation, 4), 4, torch.float32) @ rotation
    scores = queries @ keys.mT
    assert sqnr(scores, queries @ rotated.mT) > sqnr(scores, queries @ plain.mT) + 3


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 4])
def test_a_program_for_x86_stores_bytes_and_does_what_its_graph_does(bits):
    model, tokens = decoder("llama"), tokens_of(20)
    exported = tq.export_causal_lm(model, 32, cache_bits=bits)
    converted = tq.convert(tq.prepare(exported, X86Quantizer("w4_g32")))
    program = inductor_x86.lower(converted, (tokens[:, :5], torch.arange(5), torch.arange(5)))
    per_row = 16 * bits // 8 + 2  # a head of 16 features with one scale
    cached = sum(t.numel() * t.element_size() for t in program.state.values())
    assert cached == 3 * 2 * 2 * 33 * per_row
    graph, lowered = tq.Decoder(converted), tq.Decoder(program)
    for part in tokens.split(7, 1):
        assert sqnr(graph.append(part), lowered.append(part)) > (30 if bits == 8 else 15)  # a code may be the next one
    report = str(tq.report(converted))
    assert "rotation" in report


@pytest.mark.parametrize("bits", [8, 4])
def test_a_checkpoint_is_written_of_a_graph_whose_cache_is_quantized(bits, tmp_path):
    model = decoder("llama")
    exported = tq.export_causal_lm(model, 32, cache_bits=bits)
    converted = tq.convert(tq.prepare(exported, X86Quantizer("w4_symmetric_g32")))
    tq.save_causal_lm(converted, Checkpoint(model, {}, {}), tmp_path / "folder", "compressed-tensors")


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(InputError, match="cache_bits is 8, 4 or None"):
        tq.export_causal_lm(decoder("llama"), 16, cache_bits=3)
    with pytest.raises(ExportError, match="heads of 15 features"):
        tq.export_causal_lm(decoder("gpt2", n_embd=60), 16, cache_bits=4)
