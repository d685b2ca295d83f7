"""A model that stays on disk gets the codes that it gets in memory."""

import gc
import json
import operator
import shutil

import pytest
import safetensors.torch
import torch
from decoders import decoder, tokens_of

import torchquant as tq
from torchquant.files.shelf import is_shelved
from torchquant.language import streaming
from torchquant.quantizers import WeightOnlyQuantizer, X86Quantizer

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> a folder with a model in bfloat16."""
    made = {}

    def folder(name, **changes):
        key = (name, *sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name)
            decoder(name, **{**SIZES, **changes}).bfloat16().save_pretrained(made[key])
        return made[key]

    return folder


def in_memory(source, destination, quantizer, tokens, algorithms, format):
    checkpoint, places = tq.load_causal_lm(source), torch.arange(tokens.shape[1])
    batches = [(window[None], places, places) for window in tokens]
    exported = tq.export_causal_lm(checkpoint.model, tokens.shape[1])
    options = {"quantizer": quantizer, "algorithms": algorithms, "progress": False}
    return tq.save_causal_lm(tq.quantize(exported, batches[0], batches, **options), checkpoint, destination, format)


@pytest.mark.filterwarnings("ignore:the checkpoint has no tokenizer")
@pytest.mark.parametrize("format", ["gguf", "compressed-tensors"])
@pytest.mark.parametrize("algorithms", [(), (tq.GPTQ(sweeps=1, refits=0),)], ids=["nearest", "gptq"])
@pytest.mark.parametrize(
    ("name", "scheme", "changes"),
    [
        ("llama", "w4_symmetric_g32", {}),
        ("llama", "w4_g32", {"tie_word_embeddings": True}),
        ("qwen3", "w3_g32", {}),
    ],
)
def test_what_is_written_is_what_memory_gives(tmp_path, folders, name, scheme, changes, algorithms, format):
    source, tokens = folders(name, **changes), tokens_of(12, 3)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    options = {"algorithms": algorithms, "tokens": tokens, "format": format, "progress": False}
    saved = tq.quantize_checkpoint(source, ours, X86Quantizer(scheme), memory_bytes=1 << 16, **options)
    expected = in_memory(source, theirs, X86Quantizer(scheme), tokens, algorithms, format)
    assert (saved.stored_as, saved.rounded) == (expected.stored_as, expected.rounded)
    if format == "gguf":
        assert ours.read_bytes() == theirs.read_bytes()
    else:
        assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
        mine, others = (safetensors.torch.load_file(f / "model.safetensors") for f in (ours, theirs))
        assert mine.keys() == others.keys()
        assert all(torch.equal(mine[n], v) and mine[n].dtype == v.dtype for n, v in others.items())
    assert sorted(f.name for f in tmp_path.iterdir()) == ["ours", "theirs"]


def test_nothing_that_grows_with_the_model_is_in_memory(tmp_path, folders, monkeypatch):
    seen, before = [], {id(o) for o in gc.get_objects() if type(o) is torch.Tensor}
    gc.disable()  # which would hide tensors that hang on what goes late

    def look(converted, checkpoint, *args, **options):
        names = {str(n.target) for n in converted.graph.nodes if n.op == "get_attr"}
        parameters = dict(converted.named_parameters())
        held = {n: operator.attrgetter(n)(converted) for n in names - parameters.keys() if not n.startswith("cache.")}
        seen.append({n: t for n, t in held.items() if t.nbytes >= 1 << 14 and not is_shelved(t)})
        tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor and id(o) not in before]
        assert not [t.shape for t in tensors if t.dtype == torch.int8 and t.nbytes >= 1 << 14 and not is_shelved(t)]
        own = [p for p in checkpoint.model.parameters() if p.ndim > 1]
        assert all(p.untyped_storage().nbytes() >= p.nbytes for p in own)
        assert all(not bool(p.any()) for p in own)  # sparse files, which nobody has filled
        return save(converted, checkpoint, *args, **options)

    save = streaming.save_causal_lm
    monkeypatch.setattr(streaming, "save_causal_lm", look)
    options = {"format": "gptq", "tokens": tokens_of(8, 2), "progress": False}
    try:
        tq.quantize_checkpoint(folders("llama"), tmp_path / "a", X86Quantizer("w4_g32"), **options)
        options["algorithms"] = [tq.GPTQ(sweeps=0, refits=0, search=False)]
        tq.quantize_checkpoint(folders("llama"), tmp_path / "b", X86Quantizer("w4_g32"), **options)
    finally:
        gc.enable()
    assert seen == [{}, {}]


def test_a_run_goes_on_where_it_was_stopped(tmp_path, folders):
    class Stopping(tq.GPTQ):
        left = 3

        def solve(self, task, clock):
            type(self).left -= 1
            if type(self).left < 0:
                raise KeyboardInterrupt
            return super().solve(task, clock)

    options = {"format": "gptq", "tokens": tokens_of(8, 2), "progress": False, "checkpoint": tmp_path / "answers"}
    arguments = (folders("llama"), tmp_path / "out", X86Quantizer("w4_g32"))
    with pytest.raises(KeyboardInterrupt):
        tq.quantize_checkpoint(*arguments, algorithms=[Stopping()], **options)
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "answers").glob("*.pt"))) == 3
    Stopping.left = 15 - 3
    tq.quantize_checkpoint(*arguments, algorithms=[Stopping()], **options)
    assert Stopping.left == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_static_activations_are_calibrated_from_disk(tmp_path, folders):
    source, tokens = folders("llama"), tokens_of(8, 2)
    for name, run in (("ours", tq.quantize_checkpoint), ("theirs", in_memory)):
        options = {"tokens": tokens, "algorithms": (), "format": "compressed-tensors"}
        options |= {"progress": False} if name == "ours" else {}
        with pytest.warns(tq.TorchquantWarning, match="activations are quantized"):
            run(source, tmp_path / name, X86Quantizer("static_int8"), **options)
    mine, others = (safetensors.torch.load_file(tmp_path / f / "model.safetensors") for f in ("ours", "theirs"))
    assert all(torch.equal(mine[n], v) for n, v in others.items())


def refused(source, destination, error, match, **options):
    options = {"format": "gptq", "progress": False, "quantizer": WeightOnlyQuantizer("w4_g32"), **options}
    quantizer = options.pop("quantizer")
    with pytest.raises(error, match=match):
        tq.quantize_checkpoint(source, destination, quantizer, **options)


def test_what_cannot_be_done_is_said_before_anything_is_done(tmp_path, folders):
    source, out = folders("llama"), tmp_path / "out"
    refused(source, out, tq.InputError, "algorithms need calibration data", algorithms=[tq.GPTQ()])
    refused(source, out, tq.InputError, "SmoothQuant rewrites float weights", algorithms=[tq.SmoothQuant()])
    refused(source, out, tq.InputError, "static activations", quantizer=X86Quantizer("static_int8"))
    refused(source, out, tq.InputError, "tokens are int64", tokens=torch.zeros(3))
    refused(source, out, tq.InputError, "hold none", tokens=torch.zeros(0, 4, dtype=torch.int64))
    refused(source, out, tq.InputError, "token id 101 is out of the vocabulary of 101", tokens=torch.tensor([[101]]))
    refused(source, out, tq.SchemeError, "'onnx' is no format", format="onnx")
    refused(source, tmp_path / "no" / "out", tq.ArtifactError, "nothing can be written into")
    whole = {"algorithms": [tq.GPTQ(sensitive=True)], "tokens": tokens_of(6)}
    refused(source, out, tq.InputError, "quantized from disk", **whole)
    assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused(source, tmp_path / "full", tq.ArtifactError, "a new or an empty folder")
    refused(source, tmp_path / "full", tq.ArtifactError, "GGUF is a file", format="gguf")


def test_sources_that_are_no_float_folders_are_sent_to_memory(tmp_path, folders):
    out = tmp_path / "out"
    refused(tmp_path / "model.gguf", out, tq.InputError, "load_causal_lm")
    packed = tmp_path / "packed"
    tq.quantize_checkpoint(folders("llama"), packed, X86Quantizer("w4_g32"), format="gptq", progress=False)
    refused(packed, out, tq.InputError, "are packed: read it with load_causal_lm")
    other = tmp_path / "other"
    shutil.copytree(folders("llama"), other)
    tensors = safetensors.torch.load_file(other / "model.safetensors")
    tensors["model.norm.bias"] = tensors.pop("model.norm.weight")
    safetensors.torch.save_file(tensors, other / "model.safetensors", {"format": "pt"})
    refused(other, out, tq.ArtifactError, "no float tensor model.norm.weight")
    wide = tmp_path / "wide"
    shutil.copytree(folders("llama"), wide)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "intermediate_size": 224}))
    refused(wide, out, tq.ArtifactError, "by its config")
