"""What an algorithm adds to the memory of the process, against the bound that the engine promises.

python benchmarks/memory.py [--network lite0] [--algorithm adaround] [--budget-mib 256]

The bound: the model, twice the activations of the largest span for one batch, and the byte budget. What lies beyond the
budget is on disk.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import records
import torch
from candidates import ALGORITHMS, QUANTIZERS
from networks import NETWORKS, load_network
from peak import forget_peak, peak_bytes
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import torchquant as tq
from torchquant.calibration.evaluator import Evaluator
from torchquant.calibration.stream import Stream
from torchquant.files.freed import give_back
from torchquant.fx.blocks import Span

KEY = ("network", "algorithm", "budget_bytes")


def main() -> None:
    """Measure, print and keep one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="lite0")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="adaround")
    parser.add_argument("--budget-mib", type=int, default=256)
    parser.add_argument("--calibration", type=int, default=64)
    options = parser.parse_args()
    network = load_network(options.network, options.calibration)
    prepared = tq.prepare(tq.export(network.model, network.example), QUANTIZERS["x86"].make())
    tq.calibrate(prepared, network.calibration, progress=False)
    steps = ALGORITHMS[options.algorithm]()
    spans = [span for step in steps for span in step.spans(prepared, frozenset())]
    model = sum(t.numel() * t.element_size() for t in (*prepared.parameters(), *prepared.buffers()))
    largest = largest_activations(prepared, network.example, spans)
    budget = options.budget_mib << 20
    give_back()  # what calibration freed is no part of what is there before
    before = resident_bytes()
    forget_peak()
    start = time.perf_counter()
    result = tq.optimize(prepared, network.calibration, steps, memory_bytes=budget, progress=False)
    row = {
        "network": network.name,
        "algorithm": options.algorithm,
        "calibration_samples": options.calibration,
        "budget_bytes": budget,
        "model_bytes": model,
        "largest_span_bytes": largest,
        "bound_bytes": model + 2 * largest + budget,
        "added_bytes": peak_bytes() - before,
        "spilled_bytes": result.spilled_bytes,
        "seconds": time.perf_counter() - start,
    }
    records.write("memory", [row], KEY)
    print("  ".join(f"{k}: {v / 1e6:.0f} MB" if k.endswith("bytes") else f"{k}: {v}" for k, v in row.items()))


def largest_activations(prepared: GraphModule, batch: tuple[torch.Tensor, ...], spans: list[Span]) -> int:
    """Bytes of all values that a span reads and makes for one batch, at most."""
    stream, largest = Stream(prepared, [batch]), 0
    for task in stream.walk(spans):
        with torch.no_grad():
            env = Evaluator(prepared, "quantized").run(task.span.nodes, task.inputs(0, "quantized"))
        tensors = [t for t in pytree.tree_leaves(list(env.values())) if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        largest = max(largest, sum(storages.values()))
    return largest


def resident_bytes() -> int:
    """Resident memory of this process now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
