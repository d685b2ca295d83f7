"""A decoder over a static cache computes what the model does without a cache, at every position."""

import pytest
import torch
from decoders import DECODERS, decoder, step, tokens_of, transformers

import torchquant as tq


@pytest.mark.parametrize("name", DECODERS)
def test_logits_equal_those_without_a_cache_at_every_position(name):
    model, tokens = decoder(name), tokens_of(20, batch_size=2)
    implementation = model.config._attn_implementation
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits
    graph = tq.export_causal_lm(model, 32, batch_size=2)
    parts, start = [], 0
    for count in (7, 1, 1, 6, 5):  # beyond the sliding windows
        parts.append(step(graph, tokens[:, start : start + count], start))
        start += count
    assert torch.allclose(torch.cat(parts, 1), wanted, atol=1e-4, rtol=1e-4)
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        assert torch.equal(model(tokens, use_cache=False).logits, wanted)  # the model is as it was


def test_the_whole_cache_can_be_filled_by_one_call_or_one_by_one():
    model, tokens = decoder("llama"), tokens_of(16)
    graph = tq.export_causal_lm(model, 16)
    whole = step(graph, tokens, 0)
    single = torch.cat([step(graph, tokens[:, i : i + 1], i) for i in range(16)], 1)
    with torch.no_grad():
        assert torch.allclose(whole, model(tokens).logits, atol=1e-4)
    assert torch.allclose(single, whole, atol=1e-4)


def test_reading_more_of_the_cache_than_is_needed_changes_nothing():
    graph, tokens = tq.export_causal_lm(decoder("gemma3"), 16), tokens_of(5)
    wanted = step(graph, tokens, 0)
    with torch.no_grad():
        for count in (8, 16):
            assert torch.allclose(graph(tokens, torch.arange(5), torch.arange(count)), wanted, atol=1e-5)


def test_what_an_earlier_sequence_left_in_the_cache_is_not_read():
    graph = tq.export_causal_lm(decoder("llama"), 16)
    clean = step(graph, tokens_of(4), 0)
    step(graph, tokens_of(16, seed=1), 0)
    assert torch.allclose(step(graph, tokens_of(4), 0), clean, atol=1e-6)


def test_logits_of_the_last_token_only():
    model, tokens = decoder("qwen2"), tokens_of(6)
    last = step(tq.export_causal_lm(model, 16, logits="last"), tokens, 0)
    assert last.shape == (1, 1, 101)
    with torch.no_grad():
        assert torch.allclose(last, model(tokens).logits[:, -1:], atol=1e-4)


def test_exporting_leaves_training_mode_and_the_model_alone():
    model = decoder("gpt2").train()
    tq.export_causal_lm(model, 8)
    assert all(module.training for module in model.modules())
    assert not any("keys_" in name or "table" in name for name, _ in model.named_buffers())


def test_keys_and_values_are_not_copied_for_heads_that_share_them():
    graph = tq.export_causal_lm(decoder("llama"), 16)
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("scaled_dot_product_attention" in name for name in names) == 3
    assert not any("repeat_interleave" in name or "cos" in name for name in names)


def test_a_call_may_be_limited_to_few_tokens():
    graph = tq.export_causal_lm(decoder("llama"), 16, max_new_tokens=1)
    assert step(graph, tokens_of(1), 0).shape == (1, 1, 101)


def test_a_raw_model_is_refused_with_the_name_of_the_call():
    with pytest.raises(tq.ExportError, match="export_causal_lm"):
        tq.export(decoder("llama"), {"input_ids": tokens_of(4)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_cache_len": 1}, "max_cache_len"),
        ({"max_cache_len": 16, "batch_size": 0}, "batch_size"),
        ({"max_cache_len": 16, "max_new_tokens": 17}, "max_new_tokens"),
        ({"max_cache_len": 16, "logits": "first"}, "logits"),
        ({"max_cache_len": True}, "max_cache_len"),
    ],
)
def test_arguments_out_of_bounds_are_refused_by_name(arguments, message):
    with pytest.raises(tq.InputError, match=message):
        tq.export_causal_lm(decoder("llama"), **arguments)


def test_other_modules_are_refused():
    with pytest.raises(tq.InputError, match="Linear"):
        tq.export_causal_lm(torch.nn.Linear(2, 2), 16)
    with pytest.raises(tq.InputError, match="LlamaModel"):
        tq.export_causal_lm(decoder("llama").model, 16)


def test_a_cache_longer_than_learned_positions_is_refused():
    with pytest.raises(tq.ExportError, match="128"):
        tq.export_causal_lm(decoder("gpt2"), 129)


def test_frequencies_that_change_with_the_length_are_refused_beyond_it():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = decoder("llama", rope_parameters=rope, max_position_embeddings=32)
    tokens = tokens_of(32)
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits
    assert torch.allclose(step(tq.export_causal_lm(model, 32), tokens, 0), wanted, atol=1e-4)
    with pytest.raises(tq.ExportError, match="32 positions"):
        tq.export_causal_lm(model, 33)


def test_layers_without_keys_and_values_are_refused():
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=101, state_size=4)
    with pytest.raises(tq.ExportError, match="MambaForCausalLM"):
        tq.export_causal_lm(transformers.MambaForCausalLM(config), 16)
