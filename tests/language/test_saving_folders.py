"""Folders with packed linears: what is written is read by others and by us, and others' are read by us."""

import json
import shutil
from functools import cache

import pytest
import safetensors.torch
import torch
from byte_tokenizer import TEXT, byte_folder
from decoders import quantized, small, tokens_of, transformers, values_in

import torchquant as tq
from torchquant.language.packed import LAYOUTS, Codes, pack_bits, unpack_bits
from torchquant.quantizers import WeightOnlyQuantizer, X86Quantizer

FORMATS = ("compressed-tensors", "gptq", "awq")


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def quantization_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# layouts of words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 31, 32, 96, 101])
def test_fields_come_back_from_words(bits, count):
    values = torch.randint(0, 2**bits, (3, count))
    packed = pack_bits(values, bits)
    assert (packed.dtype, packed.shape) == (torch.int32, (3, -(-count * bits // 32)))
    assert torch.equal(unpack_bits(packed, bits, count).long(), values)
    stream = sum(int(v) << (bits * i) for i, v in enumerate(values[0]))  # as one integer
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(packed.shape[1])]
    assert [int(w) & 0xFFFFFFFF for w in packed[0]] == words


def gptq_by_definition(tensors, bits, less):
    """Weights (inputs, outputs), field by field, from the description of AutoGPTQ's `QuantLinear`."""
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    inputs, outputs = len(tensors["g_idx"]), qweight.shape[1]

    def field(words, index):
        stream = sum((int(w) & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(words))
        return (stream >> (bits * index)) & (2**bits - 1)

    weight = torch.empty(inputs, outputs)
    for i in range(inputs):
        group = int(tensors["g_idx"][i])
        for o in range(outputs):
            zero = field(qzeros[group], o) + less
            weight[i, o] = float(scales[group, o]) * (field(qweight[:, o], i) - zero)
    return weight


def awq_by_definition(tensors):
    """Weights (inputs, outputs), from the description of AutoAWQ's `WQLinear_GEMM`."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def table(words):
        out = torch.empty(words.shape[0], words.shape[1] * 8)
        for place, column in enumerate(order):
            out[:, column::8] = (words.to(torch.int64) >> (4 * place)) & 15
        return out

    codes, zeros, scales = table(tensors["qweight"]), table(tensors["qzeros"]), tensors["scales"]
    group = len(codes) // len(scales)
    return (codes - zeros.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)


@pytest.mark.parametrize(("layout", "bits"), [("gptq", 3), ("gptq", 4), ("gptq_v2", 2), ("gptq_v2", 8), ("gemm", 4)])
def test_layouts_are_as_they_are_described(layout, bits):
    zeros = torch.randint(1, 2**bits, (32, 2))
    weight = Codes(torch.randint(0, 2**bits, (32, 64)), torch.rand(32, 2) + 0.1, zeros, bits)
    tensors = LAYOUTS[layout].pack(weight, False)
    less = 1 if layout == "gptq" else 0
    values = awq_by_definition(tensors) if layout == "gemm" else gptq_by_definition(tensors, bits, less)
    assert torch.allclose(values.t(), weight.values())
    assert torch.equal(LAYOUTS[layout].unpack(tensors, bits).values(), weight.values())


# written and read back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("name", "scheme", "changes"),
    [
        ("llama", "w4_symmetric_g32", {}),
        ("llama", "w4_g32", {}),
        ("llama", "w2_symmetric_g32", {"tie_word_embeddings": True}),
        ("qwen2", "w4_symmetric_g32", {}),
        ("gemma3", "w4_symmetric_g32", {}),
        ("phi", "w4_g16", {}),
    ],
)
def test_weights_come_back_bit_by_bit(tmp_path, format, name, scheme, changes):
    checkpoint, graph = quantized(name, scheme, **changes)
    saved = tq.save_causal_lm(graph, checkpoint, tmp_path / "out", format)
    assert saved.path == tmp_path / "out"
    assert saved.size_bytes == sum(f.stat().st_size for f in saved.path.iterdir())
    assert not saved.rounded
    back, values = tq.load_causal_lm(saved.path), values_in(graph, checkpoint.model)
    for parameter_name, parameter in back.model.named_parameters(remove_duplicate=False):
        assert torch.equal(parameter, values[parameter_name]), parameter_name
    tokens = tokens_of(6)
    assert tq.sqnr_db(tq.Decoder(graph).append(tokens), logits(back.model, tokens)) > 100
    assert back.model.config.tie_word_embeddings == bool(changes) or name == "gemma3"
    assert sum(back.stored_as.values()) == sum(saved.stored_as.values())


@pytest.mark.parametrize(
    ("scheme", "format", "config"),
    [
        ("w4_symmetric_g32", "gptq", {"checkpoint_format": "gptq", "sym": True, "bits": 4, "group_size": 32}),
        ("w4_g32", "gptq", {"checkpoint_format": "gptq_v2", "sym": False, "desc_act": False}),
        ("w3_g32", "gptq", {"bits": 3}),
        ("w8_symmetric", "gptq", {"bits": 8, "group_size": -1}),
        ("w4_g32", "awq", {"bits": 4, "version": "gemm", "zero_point": True, "modules_to_not_convert": ["lm_head"]}),
        ("w8_g32", "compressed-tensors", {"format": "pack-quantized", "ignore": ["lm_head"]}),
    ],
)
def test_the_config_says_what_was_written(tmp_path, scheme, format, config):
    checkpoint, graph = quantized("llama", scheme)
    saved = tq.save_causal_lm(graph, checkpoint, tmp_path / "out", format)
    written = quantization_of(saved.path)
    assert {key: written[key] for key in config} == config
    assert (saved.path / "quantize_config.json").exists() == (format == "gptq")


def test_groups_that_differ_become_the_largest_common_ones(tmp_path):
    checkpoint, graph = quantized("llama", "w4_symmetric_g64")  # 96 inputs are no whole groups of 64
    saved = tq.save_causal_lm(graph, checkpoint, tmp_path / "out", "gptq")
    assert quantization_of(saved.path)["group_size"] == 32
    values = values_in(graph, checkpoint.model)
    for name, parameter in tq.load_causal_lm(saved.path).model.named_parameters():
        assert torch.equal(parameter, values[name])


@cache
def excluded():
    checkpoint, _ = quantized("llama", "w4_g32")
    quantizer = WeightOnlyQuantizer("w4_g32", exclude=["*layers.0.mlp.up_proj"])
    return checkpoint, tq.convert(tq.prepare(tq.export_causal_lm(checkpoint.model, 16), quantizer))


@cache
def in_bfloat16():
    model = small("llama").to(torch.bfloat16)
    graph = tq.convert(tq.prepare(tq.export_causal_lm(model, 16), WeightOnlyQuantizer("w4_symmetric_g32")))
    return tq.Checkpoint(model, {}, {}), graph


@pytest.mark.parametrize("format", FORMATS)
def test_layers_that_are_excluded_stay_float_and_are_named(tmp_path, format):
    checkpoint, graph = excluded()
    saved = tq.save_causal_lm(graph, checkpoint, tmp_path / "out", format)
    assert "layers.0.mlp.up_proj" in json.dumps(quantization_of(saved.path)).replace("[.]", ".")
    values = values_in(graph, checkpoint.model)
    for name, parameter in tq.load_causal_lm(saved.path).model.named_parameters():
        assert torch.equal(parameter, values[name])


@pytest.mark.parametrize("format", FORMATS)
def test_models_in_bfloat16_come_back(tmp_path, format):
    checkpoint, graph = in_bfloat16()
    saved = tq.save_causal_lm(graph, checkpoint, tmp_path / "out", format)
    back, values = tq.load_causal_lm(saved.path, dtype=torch.bfloat16), values_in(graph, checkpoint.model)
    assert all(torch.equal(p, values[name]) for name, p in back.model.named_parameters())


def test_the_tokenizer_goes_along_from_folders_and_from_gguf(tmp_path):
    source = tq.load_causal_lm(byte_folder(tmp_path / "source"))
    graph = tq.convert(tq.prepare(tq.export_causal_lm(source.model, 8), X86Quantizer("w4_symmetric_g32")))
    first = tq.load_causal_lm(tq.save_causal_lm(graph, source, tmp_path / "m.gguf").path)
    for name, checkpoint in (("a", source), ("b", first)):
        back = tq.load_causal_lm(tq.save_causal_lm(graph, checkpoint, tmp_path / name, "awq").path)
        assert back.tokenizer(TEXT).input_ids == source.tokenizer(TEXT).input_ids


# by others -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w4_symmetric_g32", "w4_g32", "w8_symmetric"])
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_transformers_loads_packed_folders(tmp_path, scheme):
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (extra bench)")
    checkpoint, graph = quantized("llama", scheme)
    saved = tq.save_causal_lm(graph, checkpoint, tmp_path / "out", "compressed-tensors")
    has_zeros = not quantization_of(saved.path)["config_groups"]["group_0"]["weights"]["symmetric"]
    # transformers 5.24 makes no place for packed zero points unless it dequantizes
    options = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if has_zeros else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(saved.path, **options).eval()
    tokens = tokens_of(6)
    assert tq.sqnr_db(tq.Decoder(graph).append(tokens), logits(model, tokens)) > 100


# what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scheme", "format", "message"),
    [
        ("llama", "w8_symmetric", "awq", "fields of .4,. bits, and the graph has codes of 8"),
        ("gpt2", "w4_symmetric_g32", "compressed-tensors", "is a Conv1D"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(tmp_path, name, scheme, format, message):
    checkpoint, graph = quantized(name, scheme)
    with pytest.raises(tq.SchemeError, match=message):
        tq.save_causal_lm(graph, checkpoint, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_no_whole_words_are_refused_by_name(tmp_path):
    checkpoint, graph = quantized("llama", "w4_symmetric_g16", hidden_size=48, intermediate_size=84)
    for format in ("gptq", "awq"):
        with pytest.raises(tq.SchemeError, match=r"48, no whole words of"):
            tq.save_causal_lm(graph, checkpoint, tmp_path / "out", format)
    saved = tq.save_causal_lm(graph, checkpoint, tmp_path / "out", "compressed-tensors")
    values = values_in(graph, checkpoint.model)
    assert all(torch.equal(p, values[n]) for n, p in tq.load_causal_lm(saved.path).model.named_parameters())


def test_folders_that_hold_something_are_not_written_over(tmp_path):
    checkpoint, graph = quantized("llama", "w4_symmetric_g32")
    (tmp_path / "empty").mkdir()
    assert tq.save_causal_lm(graph, checkpoint, tmp_path / "empty", "gptq").path == tmp_path / "empty"
    (tmp_path / "file").write_text("mine")
    for name in ("empty", "file"):
        with pytest.raises(tq.ArtifactError, match=r"cannot write .*something in the place"):
            tq.save_causal_lm(graph, checkpoint, tmp_path / name, "gptq")
    with pytest.raises(tq.ArtifactError, match="cannot write"):
        tq.save_causal_lm(graph, checkpoint, tmp_path / "none" / "out", "gptq")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("format", ["gguf", "gptq"])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch, format):
    from torchquant.language import gguf_file, packed_folder

    checkpoint, graph = quantized("llama", "w4_symmetric_g32")
    module = gguf_file if format == "gguf" else packed_folder
    write = module.write

    def failing(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write", failing)
    with pytest.warns(tq.TorchquantWarning) if format == "gguf" else pytest.raises(KeyboardInterrupt):
        try:
            tq.save_causal_lm(graph, checkpoint, tmp_path / "out", format)
        except KeyboardInterrupt:
            if format != "gguf":
                raise
    assert not list(tmp_path.iterdir())


# folders of others, damaged or made to do harm -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    checkpoint, graph = quantized("llama", "w4_g32")
    place = tmp_path_factory.mktemp("written")
    return {f: tq.save_causal_lm(graph, checkpoint, place / f, f).path for f in FORMATS}


def copied(written, format, tmp_path):
    return shutil.copytree(written[format], tmp_path / "copy")


def with_tensors(folder, change):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")


UP = "model.layers.0.mlp.up_proj"
DAMAGES = [
    ("gptq", "qweight", lambda t: t[:-1], "up_proj is"),
    ("gptq", "qweight", lambda t: t.float(), "up_proj is"),
    ("gptq", "qweight", lambda t: t.to(torch.int64), "up_proj is"),
    ("gptq", "qzeros", lambda t: t[:, :-1], "up_proj is"),
    ("gptq", "scales", lambda t: t[:, :-1], "up_proj is"),
    ("gptq", "scales", lambda t: t[:0], "up_proj is"),
    ("gptq", "scales", lambda t: t.to(torch.int16), "up_proj is"),
    ("gptq", "scales", lambda t: t * torch.inf, "not finite"),
    ("gptq", "g_idx", lambda t: t + 1, "groups 1 to 2 where there are 2"),
    ("gptq", "g_idx", lambda t: t - 1, "groups -1 to 0"),
    ("gptq", "g_idx", lambda t: t[:-1], "up_proj is"),
    ("gptq", "g_idx", lambda t: t.float(), "up_proj is"),
    ("awq", "qweight", lambda t: t[:, :-1], "up_proj is"),
    ("awq", "qzeros", lambda t: t[0], "up_proj is"),
    ("compressed-tensors", "weight_packed", lambda t: t[:, :-1], "up_proj is"),
    ("compressed-tensors", "weight_shape", lambda t: t * 1024, "up_proj is"),
    ("compressed-tensors", "weight_shape", lambda t: -t, "up_proj is"),
    ("compressed-tensors", "weight_shape", lambda t: t.float(), "up_proj is"),
    ("compressed-tensors", "weight_zero_point", lambda t: t[:-1], "up_proj is"),
    ("compressed-tensors", "weight_scale", lambda t: t[:-1], "up_proj is"),
]


@pytest.mark.parametrize(("format", "part", "change", "message"), DAMAGES)
def test_tensors_that_do_not_fit_each_other_are_refused(written, tmp_path, format, part, change, message):
    folder, name = copied(written, format, tmp_path), f"{UP}.{part}"
    with_tensors(folder, lambda tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(tq.ArtifactError, match=message):
        tq.load_causal_lm(folder)


@pytest.mark.parametrize(
    ("format", "part", "message"),
    [
        ("gptq", "scales", "has no scales"),
        ("awq", "qweight", "missing weights"),
        ("gptq", "qweight", "missing weights"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*belong to no part")
def test_parts_that_are_missing_are_named(written, tmp_path, format, part, message):
    folder = copied(written, format, tmp_path)
    with_tensors(folder, lambda tensors: tensors.pop(f"{UP}.{part}"))
    with pytest.raises(tq.ArtifactError, match=message):
        tq.load_causal_lm(folder)


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("gptq", {"bits": 8}, "in the model, and as stored"),
        ("gptq", {"bits": 5}, "fields of .5,. bits"),
        ("gptq", {"bits": 0}, "fields of .0,. bits"),
        ("gptq", {"bits": "4"}, "fields of"),
        ("gptq", {"bits": None}, "fields of"),
        ("gptq", {"dynamic": 5}, "config.json"),
        ("gptq", {"checkpoint_format": "marlin"}, "'gptq' in a way that is not read"),
        ("awq", {"version": "gemv"}, "'awq' in a way that is not read"),
        ("awq", {"quant_method": "bitsandbytes"}, "'bitsandbytes' in a way that is not read"),
        ("awq", {"quant_method": ["awq"]}, "in a way that is not read"),
        ("compressed-tensors", {"format": "nvfp4-pack-quantized"}, "in a way that is not read"),
        ("compressed-tensors", {"config_groups": {}}, "in a way that is not read"),
        ("compressed-tensors", {"config_groups": [1]}, "config.json"),
    ],
)
def test_configs_that_describe_something_else_are_refused(written, tmp_path, format, changes, message):
    folder = copied(written, format, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(tq.ArtifactError, match=message):
        tq.load_causal_lm(folder)


def test_groups_in_any_order_are_read(written, tmp_path):
    folder, order = copied(written, "gptq", tmp_path), torch.randperm(64) % 2
    tensors = {}
    with_tensors(folder, lambda all_: (all_.update({f"{UP}.g_idx": order.to(torch.int32)}), tensors.update(all_)))
    parts = {p: tensors[f"{UP}.{p}"] for p in ("qweight", "qzeros", "scales", "g_idx")}
    weight = tq.load_causal_lm(folder).model.get_parameter(f"{UP}.weight")
    assert torch.allclose(weight.t(), gptq_by_definition(parts, 4, 0))


def test_files_that_were_cut_are_refused(written, tmp_path):
    folder = copied(written, "awq", tmp_path)
    content = (folder / "model.safetensors").read_bytes()
    for size in (0, 7, 900, len(content) // 2, len(content) - 1):
        (folder / "model.safetensors").write_bytes(content[:size])
        with pytest.raises(tq.ArtifactError, match=r"model.safetensors"):
            tq.load_causal_lm(folder)


def test_checkpoints_meant_for_quantized_activations_are_read_with_a_warning(written, tmp_path):
    folder = copied(written, "compressed-tensors", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(tq.TorchquantWarning, match="meant for quantized activations"):
        tq.load_causal_lm(folder)


def test_a_packed_checkpoint_is_a_source_like_any_other(written, tmp_path):
    source = tq.load_causal_lm(written["gptq"])
    graph = tq.convert(tq.prepare(tq.export_causal_lm(source.model, 8), X86Quantizer("w4_g32")))
    saved = tq.save_causal_lm(graph, source, tmp_path / "again", "compressed-tensors")
    back = tq.load_causal_lm(saved.path)
    assert tq.sqnr_db(logits(source.model, tokens_of(6)), logits(back.model, tokens_of(6))) > 20
