"""Tokenizers go into GGUF files such that they come out the same, and what has no name there is refused."""

import json

import pytest
from byte_tokenizer import TEXT, byte_folder
from decoders import decoder
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

import torchquant as tq
from torchquant.language.gguf_tokenizer import keys_of_tokenizer
from torchquant.quantizers import X86Quantizer

gguf = pytest.importorskip("gguf")

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(digits):
    cut = pre_tokenizers.Split(Regex(WORDS + digits + REST), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def config(size=300):
    return decoder("llama", vocab_size=size).config


@pytest.fixture
def folder(tmp_path):
    return byte_folder(tmp_path / "source")


def test_texts_have_the_same_ids_after_a_save(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    source = tq.load_causal_lm(folder)
    graph = tq.convert(tq.prepare(tq.export_causal_lm(source.model, 8), X86Quantizer("w4_symmetric_g32")))
    back = tq.load_causal_lm(tq.save_causal_lm(graph, source, tmp_path / "m.gguf").path)
    for text in (TEXT, "naïve 北京 \n\n  x<|end|>", ""):
        ids = source.tokenizer(text).input_ids
        assert back.tokenizer(text).input_ids == ids
        assert back.tokenizer.decode(ids) == source.tokenizer.decode(ids)
    assert back.tokenizer.eos_token_id == source.tokenizer.eos_token_id
    assert back.metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert back.metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert back.metadata["tokenizer.ggml.padding_token_id"] == source.tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("cuts", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "smollm",
        ),
        (split(r"\p{N}"), "qwen2"),
        (split(r"\p{N}{1,3}"), "llama-bpe"),
    ],
)
def test_how_words_are_cut_is_known_by_its_name(tmp_path, cuts, name):
    keys = keys_of_tokenizer(byte_folder(tmp_path / name, pre_tokenizer=cuts), config(), None)
    assert (keys["ggml.model"], keys["ggml.pre"]) == ("gpt2", name)
    assert len(keys["ggml.tokens"]) == len(keys["ggml.token_type"]) == 300
    assert keys["ggml.token_type"][:1] == [1]
    assert keys["ggml.token_type"][261:265] == [3, 3, 3, 5]  # special ones; an id without a text
    assert keys["ggml.merges"][:2] == ["t h", "th e"]
    assert keys["ggml.add_bos_token"] is False


def test_another_way_to_cut_words_asks_for_its_name(tmp_path):
    folder = byte_folder(tmp_path / "odd", pre_tokenizer=split(r"\p{N}{1,2}"))
    with pytest.raises(tq.SchemeError, match="pass pre_tokenizer="):
        keys_of_tokenizer(folder, config(), None)
    assert keys_of_tokenizer(folder, config(), "tekken")["ggml.pre"] == "tekken"


def test_sentencepiece_tokens_get_scores_in_the_order_of_their_merges(tmp_path):
    words = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "t", "h", "e", "th", "the", "\u2581the"]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
    vocab = {w: i for i, w in enumerate(words)}
    inner = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    inner.save(str(tmp_path / "tokenizer.json"))
    keys = keys_of_tokenizer(tmp_path, config(len(words)), None)
    assert keys["ggml.model"] == "llama"
    assert keys["ggml.add_space_prefix"] is True
    assert keys["ggml.token_type"][:4] == [2, 1, 6, 6]
    assert [keys["ggml.scores"][vocab[w]] for w in ("t", "th", "the", "\u2581the")] == [0.0, 0.0, -1.0, -2.0]


def edited(folder, **changes):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, tq.SchemeError, "'Unigram' is not written"),
        (
            {"model": {"type": "BPE", "vocab": {"a": 300}, "merges": []}},
            tq.SchemeError,
            "id 300",
        ),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, tq.SchemeError, "id -1"),
        ({"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}}, tq.SchemeError, "id '0'"),
        ({"model": 5}, tq.ArtifactError, "tokenizer.json"),
        ({"model": {"type": "BPE"}}, tq.ArtifactError, "tokenizer.json"),
        ({"added_tokens": [{}]}, tq.ArtifactError, "tokenizer.json"),
    ],
)
def test_other_and_damaged_tokenizers_are_refused(folder, changes, error, message):
    edited(folder, **changes)
    with pytest.raises(error, match=message):
        keys_of_tokenizer(folder, config(), None)


def test_without_a_tokenizer_a_warning_says_so(tmp_path):
    for folder in (None, tmp_path):
        with pytest.warns(tq.TorchquantWarning, match="no tokenizer"):
            keys = keys_of_tokenizer(folder, config(101), None)
        assert keys["ggml.model"] == "no_vocab"
        assert len(keys["ggml.tokens"]) == 101
