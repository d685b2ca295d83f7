"""Decoders as models of lm-evaluation-harness."""

import sys
from types import SimpleNamespace

import pytest
import torch
from decoders import decoder, tokens_of

import torchquant as tq
from torchquant.errors import InputError, MissingDependencyError
from torchquant.language import libraries
from torchquant.language.harness import _continuation, _Scorer


class Letters:
    """A tokenizer: a letter a token."""

    eos_token_id = 2

    def __call__(self, text, **options):
        return SimpleNamespace(input_ids=[ord(c) - 20 for c in text])

    def decode(self, ids, **options):
        return "".join(chr(int(i) + 20) for i in ids)


def exported(**options):
    return tq.export_causal_lm(decoder("llama"), 32, **options)


def test_a_score_is_the_models_log_likelihood_whatever_the_cache_still_holds():
    model = decoder("llama")
    scorer = _Scorer(tq.Decoder(exported()))
    whole = tokens_of(20)[0].tolist()
    cases = [(whole[:12], whole[12:]), (whole[:12], whole[12:15]), (whole[:5], whole[9:14]), (whole[:1], whole[1:2])]
    for context, continuation in [*cases, cases[0], cases[0]]:
        logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        wanted = torch.tensor(continuation)
        likelihood, is_greedy = scorer.score(context, continuation)
        assert likelihood == pytest.approx(float(logits.gather(1, wanted[:, None]).sum()), rel=1e-4)
        assert is_greedy == bool((logits.argmax(-1) == wanted).all())
    best = [int(model(torch.tensor([whole])).logits[0, -1].argmax())]
    assert scorer.score(whole, best)[1]


def test_a_context_that_is_too_long_loses_its_beginning():
    scorer, tokens = _Scorer(tq.Decoder(exported())), tokens_of(60)[0].tolist()
    assert scorer.score(tokens[:57], tokens[57:]) == pytest.approx(scorer.score(tokens[27:57], tokens[57:]), rel=1e-5)
    with pytest.raises(InputError, match="do not fit the cache"):
        scorer.score(tokens[:1], tokens[1:50])


def test_a_continuation_ends_before_its_stop_string():
    tokenizer, program = Letters(), tq.Decoder(exported())
    text = _continuation(program, tokenizer, "abcde", {"max_gen_toks": 12, "until": [""]})
    assert len(text) == 12
    assert _continuation(program, tokenizer, "abcde", {"until": [text[3:5]], "max_gen_toks": 12}) == text[:3]
    assert len(_continuation(program, tokenizer, "abcde" * 20, {"until": [], "max_gen_toks": 500})) <= 31


def test_an_empty_context_begins_with_the_end_of_a_text():
    program = tq.Decoder(exported())
    continued = program.generate([2], 4)[0, 1:].tolist()
    assert _continuation(program, Letters(), "", {"max_gen_toks": 4}) == Letters().decode(continued)


def test_without_the_harness_its_extra_is_named(monkeypatch):
    libraries._imported.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r"torchquant\[harness\]"):
        tq.harness_model(exported(), Letters())
    libraries._imported.cache_clear()


def test_what_the_harness_cannot_ask_is_refused():
    with pytest.raises(InputError, match="one sequence at a time"):
        tq.harness_model(exported(batch_size=2), Letters())
    with pytest.raises(InputError, match='logits="all"'):
        tq.harness_model(exported(logits="last"), Letters())


def test_the_harness_gets_what_the_model_says():
    pytest.importorskip("lm_eval")
    model = tq.harness_model(exported(), Letters())
    request = SimpleNamespace(args=("abc", "de"))
    ((likelihood, _),) = model.loglikelihood([request])
    assert likelihood == pytest.approx(_Scorer(tq.Decoder(exported())).score([77, 78, 79], [80, 81])[0], rel=1e-5)
    rolling = model.loglikelihood_rolling([SimpleNamespace(args=("abcdefgh" * 9,))])
    assert rolling[0] < 0
    assert model.loglikelihood([request])[0][0] == pytest.approx(likelihood, rel=1e-5)
    assert model.generate_until([SimpleNamespace(args=("uvw", {"max_gen_toks": 2, "until": []}))])[0]
    assert model.loglikelihood([request])[0] == pytest.approx((likelihood, False), rel=1e-5)  # whatever came between
