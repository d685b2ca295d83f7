"""Perplexity, divergence and agreement against their definitions."""

import math

import pytest
import torch
from decoders import decoder, tokens_of
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import torchquant as tq
from torchquant.quantizers import X86Quantizer


@pytest.fixture(scope="module")
def llama():
    return decoder("llama")


def of_windows(model, tokens, size):
    """Log-probabilities of each prediction, and what was to be predicted."""
    parts = tokens[: len(tokens) // size * size].view(-1, size)
    with torch.no_grad():
        logits = torch.stack([model(p[None]).logits[0] for p in parts])
    return logits[:, :-1].log_softmax(-1).flatten(0, 1), parts[:, 1:].flatten()


def test_perplexity_is_that_of_the_definition_for_every_form_of_a_model(llama):
    tokens = tokens_of(70)[0]
    predicted, wanted = of_windows(llama, tokens, 16)
    loss = float(nn.functional.nll_loss(predicted, wanted))
    graph = tq.export_causal_lm(llama, 16)
    forms = [llama, graph, tq.Decoder(graph), tq.export_causal_lm(llama, 20, logits="last", batch_size=2)]
    forms += [prepare_pt2e(tq.export_causal_lm(llama, 16), X86Quantizer()), lambda t: llama(t).logits]
    for form in forms:
        result = tq.evaluate(form, tokens, window=16)
        assert result.tokens == 4 * 15
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
        assert result.kl_divergence is None


def test_a_model_agrees_with_itself_and_not_with_another(llama):
    tokens = tokens_of(40)
    same = tq.evaluate(tq.export_causal_lm(llama, 20), tokens, window=20, reference=llama)
    assert abs(same.kl_divergence) < 1e-5
    assert same.top1_agreement == 1.0
    other = decoder("qwen2")
    result = tq.evaluate(llama, tokens, window=20, reference=other)
    p, q = of_windows(other, tokens[0], 20)[0], of_windows(llama, tokens[0], 20)[0]
    assert result.kl_divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert result.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))


def test_evaluating_a_prepared_graph_shows_nothing_to_its_observers(llama):
    prepared = prepare_pt2e(tq.export_causal_lm(llama, 16), X86Quantizer())
    tq.evaluate(prepared, tokens_of(16), window=16)
    with pytest.raises(tq.CalibrationError, match="never saw data"):
        tq.convert(prepared)


def test_windows_are_counted_and_a_short_sequence_is_one(llama):
    assert tq.evaluate(llama, tokens_of(64), window=16, windows=2).tokens == 30
    assert tq.evaluate(llama, [5, 6, 7], window=16).tokens == 2


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.int64), {}, "one sequence"),
        (torch.zeros(8), {}, "float32"),
        ([5], {}, "two tokens"),
        ([5, 6], {"window": 1}, "window"),
        ([5, 6], {"windows": 0}, "windows"),
    ],
)
def test_what_is_no_sequence_is_refused(llama, tokens, options, message):
    with pytest.raises(tq.InputError, match=message):
        tq.evaluate(llama, tokens, **options)


def test_windows_beyond_the_cache_and_other_outputs_are_refused(llama):
    with pytest.raises(tq.InputError, match="cache of 16"):
        tq.evaluate(tq.export_causal_lm(llama, 16), tokens_of(40), window=20)
    with pytest.raises(tq.InputError, match="returns logits"):
        tq.evaluate(lambda tokens: tokens, tokens_of(8), window=8)
    with pytest.raises(tq.InputError, match="reference"):
        tq.evaluate(llama, tokens_of(8), window=8, reference=lambda t: torch.zeros(1, t.shape[1], 50))
