"""Checkpoints are read with the weights they hold, and whatever is wrong with one is a typed error."""

import json
import random
import shutil
import struct

import numpy as np
import pytest
import torch
from decoders import SIZES, decoder, tokens_of, transformers

import torchquant as tq
from torchquant.language.gguf_header import read_header

gguf = pytest.importorskip("gguf")

WORDS = [f"w{i}" for i in range(101)]


def llama_weights(model):
    """The weights of a small Llama by the names and in the order of the rows that a GGUF has."""
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, value in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module in outer:
            yield f"{outer[module]}.weight", value
            continue
        _, _, layer, part = module.split(".", 3)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = 4 if part.endswith("q_proj") else 2
            value = value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)  # interleaved
        yield f"blk.{layer}.{names[part]}.weight", value


def write_gguf(path, model, types=(), factors=None, **keys):
    """A GGUF file of a small Llama, with linears in the given types in turn."""
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_block_count(keys.get("blocks", config.num_hidden_layers))
    writer.add_context_length(128)
    writer.add_embedding_length(keys.get("width", config.hidden_size))
    writer.add_feed_forward_length(keys.get("inner", config.intermediate_size))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(keys.get("vocabulary", config.vocab_size))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * len(WORDS))
    writer.add_token_merges(["w 1"])
    for i, (name, value) in enumerate(llama_weights(model)):
        if name in keys.get("without", ()):
            continue
        array = value.numpy()
        if types and value.ndim == 2 and value.shape[1] % gguf.GGML_QUANT_SIZES[types[i % len(types)]][0] == 0:
            kind = types[i % len(types)]
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama():
    return decoder("llama")


@pytest.fixture(scope="module")
def plain(llama, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "plain.gguf", llama)


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def test_a_gguf_gives_the_model_it_was_written_from(llama, plain):
    checkpoint = tq.load_causal_lm(plain)
    assert torch.allclose(logits(checkpoint.model, tokens_of(9)), logits(llama, tokens_of(9)), atol=1e-5)
    assert checkpoint.metadata["llama.block_count"] == 3
    assert checkpoint.stored_as == {"F32": sum(p.numel() for p in llama.parameters())}
    assert not checkpoint.model.training


def test_quantized_weights_are_decoded(llama, tmp_path):
    kinds = gguf.GGMLQuantizationType
    types = [kinds.Q8_0, kinds.F16, kinds.BF16, kinds.Q5_1]
    checkpoint = tq.load_causal_lm(write_gguf(tmp_path / "q.gguf", llama, types))
    assert set(checkpoint.stored_as) == {"F32", "Q8_0", "F16", "BF16", "Q5_1"}
    error = (logits(checkpoint.model, tokens_of(9)) - logits(llama, tokens_of(9))).norm()
    assert 0 < error < 0.2 * logits(llama, tokens_of(9)).norm()
    for ours, stored in zip(checkpoint.model.parameters(), llama.parameters(), strict=True):
        assert (ours - stored).abs().max() < 0.05 * stored.abs().max()


def test_factors_of_rotary_frequencies_are_applied(llama, tmp_path):
    factors = torch.linspace(1.0, 8.0, 8)
    checkpoint = tq.load_causal_lm(write_gguf(tmp_path / "f.gguf", llama, factors=factors))
    plain = llama.model.rotary_emb.inv_freq
    assert torch.allclose(checkpoint.model.model.rotary_emb.inv_freq, plain / factors)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"blocks": 4}, "4 blocks by its keys, and 3"),
        ({"blocks": 1_000_000_000}, "blocks"),
        ({"width": 1 << 20}, "of which there are"),
        ({"inner": 1 << 28}, "of which there are"),
        ({"vocabulary": 1 << 30}, "of which there are"),
        ({"without": ["output_norm.weight"]}, "missing weights: model.norm.weight"),
    ],
)
def test_keys_that_do_not_describe_the_tensors_are_refused(llama, tmp_path, keys, message):
    with pytest.raises(tq.ArtifactError, match=message):
        tq.load_causal_lm(write_gguf(tmp_path / "wrong.gguf", llama, **keys))


def patched(content, position, form, value):
    size = struct.calcsize(f"<{form}")
    return content[:position] + struct.pack(f"<{form}", value) + content[position + size :]


@pytest.mark.parametrize("position", [8, 16, 24])
@pytest.mark.parametrize("value", [1 << 63, 1 << 40, 1 << 31])
def test_counts_and_lengths_beyond_the_file_are_refused(plain, tmp_path, position, value):
    file = tmp_path / "huge.gguf"
    file.write_bytes(patched(plain.read_bytes(), position, "Q", value))
    with pytest.raises(tq.ArtifactError, match=r"huge.gguf"):
        read_header(file)


@pytest.mark.parametrize("magic", [b"", b"GGUF", b"GGML\3\0\0\0", b"GGUF\1\0\0\0", b"GGUF\0\0\0\3"])
def test_other_files_and_versions_are_refused(tmp_path, magic):
    file = tmp_path / "other.gguf"
    file.write_bytes(magic + bytes(60) if len(magic) == 8 else magic)
    with pytest.raises(tq.ArtifactError, match=r"other.gguf"):
        tq.load_causal_lm(file)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(tq.ArtifactError, match=r"none.gguf is not a file"):
        tq.load_causal_lm(tmp_path / "none.gguf")


def test_a_header_that_was_cut_is_refused_wherever_it_was_cut(plain, tmp_path):
    content, file = plain.read_bytes(), tmp_path / "cut.gguf"
    end = content.rfind(b"\0" * 8)
    for size in [*range(0, 2000, 7), *range(2000, end, 4001), len(content) - 1]:
        file.write_bytes(content[:size])
        with pytest.raises(tq.ArtifactError):
            read_header(file)


def test_thousands_of_damaged_headers_are_read_or_refused_and_nothing_else(plain, tmp_path):
    content, file, draw = plain.read_bytes(), tmp_path / "damaged.gguf", random.Random(0)
    head = content.find(b"blk.0.attn_q.weight") + 3000
    refused = 0
    for _ in range(4000):
        damaged = bytearray(content[: head + 64])  # a short file: what is behind the header need not be there
        for _ in range(draw.choice([1, 1, 2, 8])):
            damaged[draw.randrange(head)] = draw.choice([0, 1, 255, draw.randrange(256)])
        file.write_bytes(bytes(damaged) + bytes(draw.choice([0, 1 << 16])))
        try:
            read_header(file)
        except tq.ArtifactError:
            refused += 1
    assert refused > 3900  # as the tensors are not there, unless fewer are announced


def test_damaged_headers_of_whole_files_are_read_or_refused(llama, tmp_path):
    content = write_gguf(tmp_path / "whole.gguf", llama).read_bytes()
    file, draw = tmp_path / "damaged.gguf", random.Random(1)
    end = len(content) - sum(p.numel() for p in llama.parameters()) * 4
    file.write_bytes(content)
    outcomes = {"read": 0, "refused": 0}
    with file.open("r+b") as opened:
        for _ in range(1500):
            place = draw.randrange(end)
            opened.seek(place)
            opened.write(bytes([content[place] ^ (1 << draw.randrange(8))]))
            opened.flush()
            try:
                read_header(file)
                outcomes["read"] += 1
            except tq.ArtifactError:
                outcomes["refused"] += 1
            opened.seek(place)
            opened.write(content[place : place + 1])
    assert min(outcomes.values()) > 50


def test_models_of_damaged_files_are_loaded_or_refused(llama, tmp_path):
    content = write_gguf(tmp_path / "whole.gguf", llama).read_bytes()
    file, draw = tmp_path / "damaged.gguf", random.Random(2)
    end = len(content) - sum(p.numel() for p in llama.parameters()) * 4
    for _ in range(25):
        damaged = bytearray(content)
        damaged[draw.randrange(700)] ^= 1 << draw.randrange(8)
        damaged[draw.randrange(end)] ^= 1 << draw.randrange(8)
        file.write_bytes(bytes(damaged))
        try:
            tq.load_causal_lm(file)
        except tq.ArtifactError:
            continue


def test_types_without_a_decoder_are_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "i8.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(tq.ArtifactError, match=r"token_embd.weight is stored as I8"):
        tq.load_causal_lm(tmp_path / "i8.gguf")


# folders -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(llama, tmp_path):
    llama.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def changed(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_folder_gives_the_model_that_was_saved(name, tmp_path):
    model = decoder(name)
    model.save_pretrained(tmp_path / name)
    checkpoint = tq.load_causal_lm(tmp_path / name)
    assert torch.equal(logits(checkpoint.model, tokens_of(9)), logits(model, tokens_of(9)))
    assert set(checkpoint.stored_as) == {"F32"}


def test_a_folder_in_parts_is_read(llama, tmp_path):
    llama.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").exists()
    checkpoint = tq.load_causal_lm(tmp_path / "parts", dtype=torch.bfloat16)
    assert checkpoint.model.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1_000_000_000}, "1000000000 layers"),
        ({"hidden_size": 1 << 16, "head_dim": 1 << 14}, "of which there are"),
        ({"vocab_size": 1 << 40}, "of which there are"),
        ({"num_hidden_layers": 4}, "missing keys"),
        ({"intermediate_size": 97}, "mismatch"),
        ({"model_type": "unheard_of"}, "unheard_of"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}, "evil|checkpoint"),
    ],
)
def test_configs_that_do_not_describe_the_tensors_are_refused(folder, changes, message):
    changed(folder, **changes)
    with pytest.raises(tq.ArtifactError, match=message):
        tq.load_causal_lm(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_and_cut_files_are_refused(folder, name):
    content = (folder / name).read_bytes()
    for size in (0, 5, 100, len(content) - 3):
        (folder / name).write_bytes(content[:size])
        with pytest.raises(tq.ArtifactError, match=name):
            tq.load_causal_lm(folder)
    (folder / name).unlink()
    with pytest.raises(tq.ArtifactError, match=name):
        tq.load_causal_lm(folder)


def test_pickled_weights_and_files_elsewhere_are_not_read(folder, tmp_path):
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(tq.ArtifactError, match=r"model.safetensors is not a file"):
        tq.load_causal_lm(folder)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(tq.ArtifactError, match="names no files beside it"):
        tq.load_causal_lm(folder)


def test_damaged_safetensors_are_loaded_or_refused(folder):
    file, draw = folder / "model.safetensors", random.Random(3)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    for _ in range(40):
        damaged = bytearray(content)
        damaged[draw.randrange(8 + length)] = draw.randrange(256)
        file.write_bytes(bytes(damaged))
        try:
            tq.load_causal_lm(folder)
        except tq.ArtifactError:
            continue


def test_without_a_tokenizer_the_model_is_read_and_asking_for_it_is_an_error(folder):
    checkpoint = tq.load_causal_lm(folder)
    with pytest.raises(tq.ArtifactError, match="tokenizer"):
        _ = checkpoint.tokenizer


def test_tokens_of_a_saved_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
    assert tq.load_causal_lm(folder).tokenizer("w5 w7").input_ids == [5, 7]
    assert SIZES["vocab_size"] == len(WORDS)


def test_a_missing_library_is_named_with_its_extra(monkeypatch, plain):
    from torchquant.language import libraries

    libraries._imported.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(tq.MissingDependencyError, match=r"torchquant\[llm\]"):
        tq.load_causal_lm(plain)
    libraries._imported.cache_clear()
