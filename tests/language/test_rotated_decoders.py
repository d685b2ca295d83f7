"""Decoders with a rotated residual stream and rotated values: the same function, at every position of the cache."""

import pytest
import torch
from decoders import decoder, small, tokens_of

import torchquant as tq
from torchquant.fx import ops
from torchquant.fx.reading import observers
from torchquant.quantizers import X86Quantizer

PLACES = torch.arange(12)
ROTATED = {  # residual stream and values of 3 layers
    "llama": 4,
    "qwen2_sliding": 4,
    "qwen3": 4,
    "mistral": 4,
    "gpt2": 4,
    "phi": 4,
    "phi3": 4,
    "gpt_neox": 1,  # queries, keys and values of a head are neighbours in one linear
    "gemma3": 3,  # its normalizations' outputs are added to the stream
}


def with_gains(model):
    """A model whose gains, offsets and biases are no longer ones and zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def prepared_of(model, scheme="w4_g16", **options):
    prepared = tq.prepare(tq.export_causal_lm(model, 16, **options), X86Quantizer(scheme))
    batches = [(tokens_of(12, seed=seed), PLACES, PLACES) for seed in range(2)]
    tq.calibrate(prepared, batches, progress=False)
    return prepared, batches


def logits_of(prepared):
    """Of a prompt of five tokens and single ones after it, in float."""
    decoder = tq.Decoder(prepared)
    tokens = tokens_of(12)
    return torch.cat([decoder.append(part) for part in tokens.split([5, 1, 1, 5], 1)], 1)


@pytest.mark.parametrize("name", ROTATED)
def test_a_decoder_computes_the_same_at_every_position(name):
    tied = name in ("gpt2", "qwen3", "mistral", "phi3")
    model = with_gains(small(name, tie_word_embeddings=tied))
    prepared, batches = prepared_of(model)
    before, nodes = logits_of(prepared), sum(n.op == "call_function" for n in prepared.graph.nodes)
    algorithm = tq.Rotate(tied="gain" if name in ("gpt2", "qwen3") else "untie")
    layers = 1 if name != "gemma3" else 0
    assert algorithm.transform(prepared, batches) == (1 + layers if ROTATED[name] == 4 else 1), algorithm.notes
    assert tq.sqnr_db(before, logits_of(prepared)) > 110
    added = sum(n.op == "call_function" for n in prepared.graph.nodes) - nodes
    assert added == int(tied and algorithm.tied == "gain")  # nothing runs but the gain in front of a tied head


def test_all_layers_are_rotated():
    prepared, batches = prepared_of(with_gains(decoder("llama")))
    before = logits_of(prepared)
    assert tq.Rotate().transform(prepared, batches) == 4
    assert tq.sqnr_db(before, logits_of(prepared)) > 110
    assert tq.Rotate(heads=False).transform(prepared, batches) == 1  # what is rotated can be rotated again
    assert tq.sqnr_db(before, logits_of(prepared)) > 105


def shared(prepared):
    """Whether the table and the head are one tensor, with one observer."""
    nodes = list(prepared.graph.nodes)
    (table,) = (n.args[0] for n in nodes if ops.op_name(n) == "embedding")
    head = next(n for n in reversed(nodes) if ops.op_name(n) == "linear").args[1]
    return table is head


@pytest.mark.parametrize(("tied", "changed", "stays"), [("gain", 2, True), ("untie", 2, False), ("leave", 1, True)])
def test_a_table_that_is_also_the_head_stays_so_unless_it_is_told_otherwise(tied, changed, stays):
    prepared, batches = prepared_of(with_gains(small("llama", tie_word_embeddings=True)))
    before = logits_of(prepared)
    algorithm = tq.Rotate(tied=tied)
    assert algorithm.transform(prepared, batches) == changed
    assert shared(prepared) is stays
    assert any("its weight with a table" in note or "that of the table" in note for note in algorithm.notes)
    assert tq.sqnr_db(before, logits_of(prepared)) > 110


def test_without_a_gain_in_front_of_the_head_nothing_parts_the_two():
    model = with_gains(small("llama", tie_word_embeddings=True))
    model.model.norm.weight.data.fill_(1.0)
    prepared, batches = prepared_of(model)
    before = logits_of(prepared)
    algorithm = tq.Rotate(tied="leave")
    assert algorithm.transform(prepared, batches) == 2
    assert shared(prepared)
    assert not algorithm.notes
    assert tq.sqnr_db(before, logits_of(prepared)) > 110


def test_values_in_few_bits_keep_the_rotation_that_they_have():
    prepared, batches = prepared_of(with_gains(small("llama", tie_word_embeddings=False)), cache_bits=8)
    before = logits_of(prepared)
    algorithm = tq.Rotate()
    assert algorithm.transform(prepared, batches) == 1
    assert any("values of" in note for note in algorithm.notes)
    assert tq.sqnr_db(before, logits_of(prepared)) > 30  # codes of keys and values flip


def test_the_reasons_name_what_is_in_the_way():
    prepared, batches = prepared_of(with_gains(small("gemma3")))
    algorithm = tq.Rotate()
    algorithm.transform(prepared, batches)
    assert any("normalization's output, whose gain" in note for note in algorithm.notes)


def outlying(model):
    """A decoder with two features of its stream far above the others, as trained ones have them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                parameter[:, [3, 17]] *= 30
            elif name.endswith("norm.weight"):
                parameter[[3, 17]] *= 4
    return model


@pytest.mark.parametrize(("scheme", "gain"), [("w4a8", 6), ("dynamic_int8", 6)])
def test_outliers_of_the_stream_cost_less(scheme, gain):
    """The paper's promise: activations and weights round better when no feature stands out."""
    prepared, batches = prepared_of(outlying(small("llama", tie_word_embeddings=False)), scheme)
    result = tq.optimize(prepared, batches, [tq.Rotate()], progress=False)
    (_, before, _), (_, after, kept) = result.steps
    assert kept
    assert after > before + gain


def test_codes_are_solved_on_the_rotated_weights():
    prepared, batches = prepared_of(outlying(small("llama", tie_word_embeddings=False)), "w3_g16")
    result = tq.optimize(prepared, batches, [tq.Rotate(), tq.GPTQ()], progress=False)
    assert [name for name, _, _ in result.steps] == ["as calibrated", "Rotate", "GPTQ"]
    assert result.steps[-1][2]
    assert result.steps[-1][1] > max(db for _, db, _ in result.steps[:2])
    converted = tq.convert(prepared)
    assert tq.report(converted).coverage == tq.report(tq.convert(prepared_of(small("llama"), "w3_g16")[0])).coverage


def test_a_rotation_that_costs_quality_is_not_kept():
    """Weights that the grid holds exactly: nothing is left to gain."""
    model = small("llama", tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                steps = parameter.reshape(-1, 16).abs().argsort(1) - 8.0
                parameter.copy_((steps / 8 * 0.2).reshape(parameter.shape))
    prepared, batches = prepared_of(model)
    tensors = {name: value.clone() for name, value in prepared.state_dict().items()}
    with pytest.warns(tq.TorchquantWarning, match="Rotate would lower"):
        result = tq.optimize(prepared, batches, [tq.Rotate()], progress=False)
    assert result.steps[-1][2] is False
    assert all(torch.equal(tensors[name], value) for name, value in prepared.state_dict().items())


def test_checkpoints_hold_the_rotated_weights_or_are_refused(tmp_path):
    model = with_gains(small("llama", tie_word_embeddings=False))
    prepared, batches = prepared_of(model, "w4_symmetric_g32")
    tq.Rotate().transform(prepared, batches)
    checkpoint = tq.Checkpoint(model, {}, {})
    tq.save_causal_lm(tq.convert(prepared), checkpoint, tmp_path / "folder", "compressed-tensors")
    tied = with_gains(small("llama", tie_word_embeddings=True))
    prepared, batches = prepared_of(tied, "w4_symmetric_g32")
    tq.Rotate().transform(prepared, batches)
    checkpoint = tq.Checkpoint(tied, {}, {})
    with pytest.raises(tq.InputError):
        tq.save_causal_lm(tq.convert(prepared), checkpoint, tmp_path / "tied", "compressed-tensors")


def test_observers_see_the_rotated_weights():
    prepared, batches = prepared_of(outlying(small("llama", tie_word_embeddings=False)))
    before = {n.name: o.calculate_qparams()[0].clone() for n, o in observers(prepared)}
    tq.optimize(prepared, batches, [tq.Rotate()], progress=False)
    after = {n.name: o.calculate_qparams()[0] for n, o in observers(prepared)}
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
