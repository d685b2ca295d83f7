"""Generation over a static cache: what transformers generates, and typed errors for what does not fit."""

import pytest
import torch
from decoders import Own, decoder, tokens_of

import torchquant as tq
from torchquant.backends import inductor_x86
from torchquant.fx.states import states_of
from torchquant.quantizers import WeightOnlyQuantizer, X86Quantizer


def by_transformers(model, tokens, count, **options):
    with torch.no_grad():
        return model.generate(tokens, max_new_tokens=count, attention_mask=torch.ones_like(tokens), **options)


@pytest.fixture(scope="module")
def llama():
    return decoder("llama")


@pytest.fixture(scope="module")
def graph(llama):
    return tq.export_causal_lm(llama, 24, logits="last")


@pytest.fixture(scope="module")
def quantized(llama):
    exported = tq.export_causal_lm(llama, 24)
    batches = [(tokens_of(n, seed=n), torch.arange(n), torch.arange(n)) for n in (24, 12)]
    options = {"quantizer": X86Quantizer(), "algorithms": (), "progress": False}
    return tq.quantize(exported, batches[0], batches, **options)


@pytest.fixture(scope="module")
def program(quantized):
    return inductor_x86.lower(quantized, (tokens_of(6), torch.arange(6), torch.arange(6)), progress=False)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "phi", "mistral"])
def test_greedy_generation_equals_that_of_transformers(name):
    model, prompts = decoder(name), tokens_of(5, batch_size=2)
    wanted = by_transformers(model, prompts, 12, do_sample=False, eos_token_id=None)
    exported = tq.export_causal_lm(model, 16, batch_size=2, logits="last")
    assert torch.equal(tq.generate(exported, prompts, 12), wanted)  # which fills the cache to the last row


def test_sequences_that_end_are_padded_as_transformers_does(llama):
    exported, prompts = tq.export_causal_lm(llama, 32, batch_size=3), tokens_of(4, batch_size=3)
    free = by_transformers(llama, prompts, 16, do_sample=False, eos_token_id=None)
    stops = [int(free[0, 6]), int(free[1, 9])]
    wanted = by_transformers(llama, prompts, 16, do_sample=False, eos_token_id=stops, pad_token_id=0)
    assert torch.equal(tq.generate(exported, prompts, 16, eos_token_id=stops, pad_token_id=0), wanted)


def test_a_prompt_that_is_taken_in_parts_gives_the_same(llama, graph):
    parts = tq.export_causal_lm(llama, 24, max_new_tokens=3, logits="last")
    assert torch.equal(tq.generate(parts, tokens_of(10), 6), tq.generate(graph, tokens_of(10), 6))


def test_sampling_draws_from_the_distribution_that_its_arguments_describe(graph):
    decoding = tq.Decoder(graph)
    probabilities = decoding.append(tokens_of(6))[0, -1].softmax(-1)
    best = probabilities.topk(3).indices

    def first(seed, **options):
        return int(next(decoding.stream(tokens_of(6), 1, do_sample=True, seed=seed, **options))[0])

    drawn = torch.tensor([first(seed, top_k=3) for seed in range(300)])
    shares = torch.stack([(drawn == i).float().mean() for i in best])
    assert torch.allclose(shares, probabilities[best] / probabilities[best].sum(), atol=0.09)
    assert shares.sum() == pytest.approx(1.0)
    nucleus = float(probabilities[best[0]]) / 2
    assert {first(seed, top_p=nucleus) for seed in range(5)} == {int(best[0])}
    assert {first(seed, temperature=1e-4) for seed in range(5)} == {int(best[0])}
    assert [first(s) for s in range(20)] == [first(s) for s in range(20)]
    assert len({first(s) for s in range(20)}) > 1


def test_tokens_come_one_by_one_and_a_conversation_goes_on(graph):
    decoding, prompt = tq.Decoder(graph), tokens_of(4)
    whole = decoding.generate(prompt, 10)
    stream = decoding.stream(prompt, 5)
    start = [int(next(stream)[0]) for _ in range(5)]
    assert decoding.length == 8  # the last token was chosen and not run
    rest = [int(t[0]) for t in decoding.stream([start[-1]], 5, go_on=True)]
    assert start + rest == whole[0, 4:].tolist()
    assert len(list(decoding.stream(prompt))) == decoding.max_cache_len - 4 + 1


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), "empty"),
        ([], "int64"),
        (torch.zeros(1, 25, dtype=torch.int64), "cache of 24"),
        (torch.zeros(2, 3, dtype=torch.int64), "batch of 1"),
        (torch.tensor([[101]]), "id 101 is out of the vocabulary of 101"),
        (torch.tensor([[-1]]), "id -1"),
        (torch.zeros(1, 3), "float32"),
        (torch.zeros(3, dtype=torch.int64), "int64"),
        ("text", "text"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_before_anything_is_written(graph, tokens, message):
    decoding = tq.Decoder(graph)
    wanted = decoding.append(tokens_of(3))
    for call in (decoding.append, lambda t: next(decoding.stream(t, 2, go_on=True))):
        with pytest.raises(tq.InputError, match=message):
            call(tokens)
    assert decoding.length == 3
    assert torch.equal(decoding.generate(tokens_of(3), 1)[0, -1], wanted[0, -1].argmax())


def test_an_overflowing_cache_is_refused_at_once_and_keeps_its_rows(graph):
    decoding = tq.Decoder(graph)
    decoding.append(tokens_of(20))
    following = decoding.append([5])
    for call in (lambda: decoding.append(tokens_of(4)), lambda: decoding.stream([5], 5, go_on=True)):
        with pytest.raises(tq.InputError, match="do not fit the cache of 24, of which 21 are taken"):
            call()
    with pytest.raises(tq.InputError, match="do not fit"):
        decoding.generate(tokens_of(20), 6)
    decoding.reset()
    decoding.append(tokens_of(20))
    assert torch.equal(decoding.append([5]), following)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": 1.5},
        {"eos_token_id": 101},
        {"max_new_tokens": 0},
    ],
)
def test_options_out_of_bounds_are_refused_by_name(graph, options):
    with pytest.raises(tq.InputError, match=next(iter(options))):
        tq.Decoder(graph).stream([5], **options)


def test_other_graphs_are_no_decoders():
    exported = tq.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    with pytest.raises(tq.InputError, match="tokens, positions"):
        tq.Decoder(exported)


def test_calibration_leaves_nothing_in_the_cache_of_what_is_shipped(quantized, program, tmp_path):
    assert all(not v.any() for v in states_of(quantized).values())
    assert all(not v.any() for v in program.state.values())
    tq.generate(program, tokens_of(6), 4)
    assert any(v.any() for v in program.state.values())
    loaded = inductor_x86.load(program.save(tmp_path / "decoder.pt2"))
    assert len(loaded.state) == 6
    assert all(not v.any() for v in loaded.state.values())
    program.reset()
    assert all(not v.any() for v in program.state.values())


def test_generating_from_a_graph_leaves_its_state_alone(quantized):
    tq.generate(quantized, tokens_of(6), 4)
    assert all(not v.any() for v in states_of(quantized).values())


def test_a_lowered_program_generates_what_its_graph_does_at_every_split(quantized, program):
    prompt = tokens_of(6, seed=3)
    wanted = tq.generate(quantized, prompt, 12)
    assert torch.equal(tq.generate(program, prompt, 12), wanted)
    decoding = tq.Decoder(program)
    one_by_one = torch.cat([decoding.append(wanted[:, i : i + 1]) for i in range(18)], 1)
    decoding.reset()
    assert tq.sqnr_db(decoding.append(wanted), one_by_one) > 60


def test_a_step_writes_its_rows_into_the_cache_and_no_copy_of_it(program):
    decoding = tq.Decoder(program)
    decoding.append(tokens_of(3))
    places = {name: value.data_ptr() for name, value in program._state.values.items()}
    before = program.state
    decoding.append([7])
    assert {name: value.data_ptr() for name, value in program._state.values.items()} == places
    for name, value in program.state.items():
        assert torch.equal(value[:, :, :3], before[name][:, :, :3])
        assert value[:, :, 3].any()
        assert not value[:, :, 4:].any()


def test_a_state_that_was_read_can_be_put_back(program):
    decoding = tq.Decoder(program)
    decoding.append(tokens_of(5))
    state = program.state
    wanted = decoding.append([9])
    decoding.append(tokens_of(4, seed=2))
    program.state = state
    decoding.length = 5
    assert torch.equal(decoding.append([9]), wanted)


def test_a_module_of_ones_own_is_a_decoder_if_it_takes_the_same_inputs():
    exported = Own.exported()
    decoding = tq.Decoder(exported)
    assert (decoding.max_cache_len, decoding.vocab_size) == (12, 50)
    tokens = decoding.generate([4, 9, 2], 10)
    decoding.reset()
    assert torch.equal(decoding.append(tokens[:, :-1])[0].argmax(-1)[2:], tokens[0, 3:])


def test_solvers_work_on_decoders_and_leave_nothing_in_the_cache(llama, tmp_path):
    exported = tq.export_causal_lm(llama, 16)
    prompt = (tokens_of(6), torch.arange(6), torch.arange(6))
    following = (tokens_of(1), torch.arange(6, 7), torch.arange(7))
    prepared = tq.prepare(exported, WeightOnlyQuantizer())
    tq.calibrate(prepared, [tq.Steps([prompt, following]), prompt], progress=False)
    tq.optimize(prepared, [prompt] * 3, [tq.GPTQ()], progress=False)
    quantized = tq.convert(prepared)
    assert all(not v.any() for v in states_of(quantized).values())
    assert tq.evaluate(quantized, tokens_of(16), window=16, reference=exported).kl_divergence < 1.0
    tq.save(quantized, tmp_path / "graph.pt2", prompt)
    loaded = tq.load(tmp_path / "graph.pt2")
    assert torch.equal(tq.generate(loaded, tokens_of(5), 8), tq.generate(quantized, tokens_of(5), 8))
