"""The examples run as they stand, and what they show is true."""

import runpy
from pathlib import Path

import pytest
import torch

import torchquant as tq
from torchquant import backends
from torchquant.backends import inductor_x86

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MOST_LINES = {"custom_format": 80, "custom_target": 150}


@pytest.fixture(scope="module")
def custom_format():
    return runpy.run_path(str(EXAMPLES / "custom_format.py"))


@pytest.fixture(scope="module")
def custom_target():
    return runpy.run_path(str(EXAMPLES / "custom_target.py"))


@pytest.fixture(scope="module")
def llm():
    return runpy.run_path(str(EXAMPLES / "llm.py"))["main"]


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory):
    """A folder with a small Llama whose weights are random, and a tokenizer of 101 words."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=101))
    model.save_pretrained(folder)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(folder)
    (folder / "text.txt").write_text(" ".join(f"w{i * i % 101}" for i in range(400)))
    return folder


@pytest.mark.parametrize("name", MOST_LINES)
def test_an_extension_is_one_file_of_few_lines(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= MOST_LINES[name]


def test_the_values_of_nf4_are_those_of_the_paper(custom_format):
    values = custom_format["normal_quantiles"]()
    expected = torch.tensor([-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0])  # its appendix E
    assert torch.allclose(values[:8], expected, atol=1e-4)
    assert float(values[-1]) == 1.0


def quantized(custom_format, scheme, model, x, algorithms=()):
    quantizer = custom_format["WeightOnly"](scheme)
    return tq.quantize(model, x, [x], quantizer=quantizer, algorithms=algorithms, progress=False)


def test_a_format_is_reported_sized_saved_and_loaded(custom_format, tmp_path):
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(128, 64)).eval(), torch.randn(4, 128)
    graph = quantized(custom_format, "nf4", model, x)
    report = tq.report(graph)
    assert report.coverage == "1/1"
    assert report.sites[0].weight.describe() == "nf4 per group of 64"
    assert report.weight_bytes == 64 * 128 // 2 + 64 * 2 * 2 + 64 * 4  # codes, scales, bias
    assert custom_format["NF4"].bits_per_weight(64) == 4.25
    assert torch.equal(tq.load(tq.save(graph, tmp_path / "nf4.pt2"))(x), graph(x))
    groups = model[0].weight.detach().reshape(-1, 64)
    scale = groups.abs().amax(1, keepdim=True).half().float()
    steps = (groups / scale).unsqueeze(-1) - custom_format["normal_quantiles"]()
    rounded = groups / scale - steps.gather(-1, steps.abs().argmin(-1, keepdim=True)).squeeze(-1)
    expected = torch.nn.functional.linear(x, (rounded * scale).reshape(64, 128), model[0].bias)
    assert tq.sqnr_db(expected, graph(x)) > 40  # a weight between two values may go either way


def test_what_is_no_affine_grid_is_refused_by_name(custom_format):
    model, x = torch.nn.Sequential(torch.nn.Linear(64, 8)).eval(), torch.randn(4, 64)
    with pytest.raises(tq.SchemeError, match="nf4 is no static integer grid"):
        quantized(custom_format, "nf4", model, x, [tq.AdaRound(2)])
    graph = quantized(custom_format, "nf4", model, x)
    for name in ("inductor_x86", "executorch_xnnpack", "inductor_cuda"):
        target = backends.target(name)
        with pytest.raises(tq.LoweringError, match=f"weight in nf4, and {name} has no kernel"):
            target.backend().lower(graph, x, **target.here()[0])


def test_an_affine_format_needs_nothing_to_be_solved(custom_format):
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(64, 32)).eval(), torch.randn(64, 64)
    plain, solved = (quantized(custom_format, "int3", model, x, steps) for steps in ((), [tq.AdaRound(200)]))
    assert tq.sqnr_db(model(x), solved(x)) > tq.sqnr_db(model(x), plain(x)) + 1


def test_a_target_is_lowered_proven_saved_and_loaded(custom_target, tmp_path):
    torch.manual_seed(0)
    model, x = (
        torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8)).eval(),
        torch.randn(20, 32),
    )
    quantizer = custom_target["EagerQuantizer"]()
    graph = tq.quantize(model, x, [x], quantizer=quantizer, algorithms=(), progress=False)
    program = custom_target["lower"](graph, x)
    assert program.proof.kernels == {"_int_mm": 2}
    assert program.proof.outcome == "holds"
    assert tq.sqnr_db(graph(x), program(x)) > 100
    assert torch.equal(custom_target["load"](program.save(tmp_path / "model.pt2"))(x), program(x))
    with pytest.raises(tq.InputError, match="expected shape"):
        program(x[:3])


def test_a_checkpoint_becomes_a_program_of_few_bits_that_is_judged_saved_and_writes(llm, small_llama, tmp_path, capsys):
    out = tmp_path / "model.pt2"
    sizes = ["--group", "32", "--cache", "32", "--calibration", "4", "--new-tokens", "5"]
    text = ["--text", str(small_llama / "text.txt"), "--method", "gptq", "--prompt", "w5 w7"]
    llm([str(small_llama), *sizes, *text, "--out", str(out), "--save", f"gptq:{tmp_path / 'packed'}"])
    assert tq.load_causal_lm(tmp_path / "packed").stored_as["gptq_v2"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("x86, w4_g32, gptq: compute ops quantized: 9/10") for line in lines), lines
    assert any("124 tokens: perplexity" in line for line in lines)
    assert any("1 torchquant_lookup_w4" in line and "proof: holds" in line for line in lines)
    first = next(line for line in lines if line.startswith("first window"))
    graph, lowered = (float(word) for word in first.replace(",", "").split() if word[0].isdigit())
    assert graph == pytest.approx(lowered, rel=1e-3)
    tokens = tq.generate(inductor_x86.load(out), [5, 7], 5)[0].tolist()
    written = next(line for line in lines if line.startswith("w5 w7"))
    assert written.replace(" ", "") == "".join(f"w{token}" for token in tokens)
    assert "compute ops quantized: 9/10" in out.with_suffix(".txt").read_text()


@pytest.mark.slow
def test_a_checkpoint_becomes_a_program_for_phones(llm, small_llama, tmp_path, capsys):
    sizes = ["--target", "xnnpack", "--group", "32", "--cache", "32", "--new-tokens", "5"]
    llm([str(small_llama), *sizes, "--prompt", "w5 w7", "--out", str(tmp_path / "model.pte")])
    printed = capsys.readouterr().out
    assert "xnnpack, w4a8_symmetric_g32, nearest: compute ops quantized" in printed
    assert "delegated int4 linear" in printed
    assert "5 tokens" in printed


def test_gptq_without_a_text_is_refused_before_anything_is_read(llm, tmp_path, capsys):
    with pytest.raises(SystemExit):
        llm([str(tmp_path / "no model"), "--method", "gptq"])
    assert "give it a --text" in capsys.readouterr().err


def test_a_text_that_is_too_short_is_named(llm, small_llama):
    with pytest.raises(SystemExit, match="tokens, fewer than 2048"):
        llm([str(small_llama), "--text", str(small_llama / "text.txt"), "--cache", "512"])


@pytest.mark.slow
def test_a_network_is_trained_in_few_bits_and_lowered(data_folder, tmp_path):
    main = runpy.run_path(str(EXAMPLES / "qat_cnn.py"))["main"]
    files = [str(data_folder / name) for name in ("resnet20.safetensors", "cifar10_2000.zip")]
    accuracy = main([*files, "--steps", "20", "--out", str(tmp_path / "cnn.pt2")])
    assert accuracy["few bits, trained"] > accuracy["few bits, before training"]
    assert accuracy["the program"] == pytest.approx(accuracy["few bits, trained"], abs=1.0)
    assert inductor_x86.load(tmp_path / "cnn.pt2")(torch.zeros(3, 3, 32, 32)).shape == (3, 10)
