"""What whole programs take, by `torchquant.profile`: time beside float, its parts, work, CPU seconds.

python benchmarks/program_profile.py [--network resnet20]
"""

from __future__ import annotations

import argparse
import math
import os
import warnings
from typing import Any

import records
import torch
from candidates import QUANTIZERS, quantize
from networks import Network, load_network

import torchquant as tq
from torchquant.backends import executorch_xnnpack, inductor_x86

KEY = ("network", "program", "batch")
NETWORKS = ("resnet20", "lite0", "minilm")
PROGRAMS = {"inductor_x86": "x86", "executorch_xnnpack": "xnnpack"}


def main() -> None:
    """A row a network and target, one thread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=NETWORKS)
    parser.add_argument("--program", action="append", choices=PROGRAMS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    for name in options.network or NETWORKS:
        network = load_network(name, 16, 8).batched(1)
        for program in options.program or PROGRAMS:
            row = _row(network, program)
            records.write("program_profile", [row], KEY)
            print(row, flush=True)


def _row(network: Network, name: str) -> dict[str, Any]:
    graph, _ = quantize(QUANTIZERS[PROGRAMS[name]], network.model, network.calibration[:2])
    batch = network.held_out[0]
    if name == "inductor_x86":
        program: Any = inductor_x86.lower(graph, batch, min_sqnr_db=-math.inf, named_kernels=True)
    else:
        program = executorch_xnnpack.lower(graph, batch, min_sqnr_db=-math.inf)
    exported = tq.export(network.model, batch)
    reference, _ = inductor_x86.lower_float(exported, batch)
    profile = tq.profile(program, batch, reference=reference, rounds=50)
    return {
        "network": network.name,
        "program": name,
        "batch": 1,
        "median_ms": profile.latency.median_ms,
        "iqr_ms": profile.latency.iqr_ms,
        "p99_ms": profile.latency.p99_ms,
        "float_ms": profile.others["reference"].median_ms,
        "parts_ms": profile.trace.parts_ms,
        "whole_ms": profile.trace.whole_ms,
        "parts": [[p.name, len(p.sites), round(p.ms, 4)] for p in profile.trace.parts],
        "concurrent": [[c.callers, round(c.p50_ms, 3), round(c.p99_ms, 3)] for c in profile.concurrent],
        "program_bytes": profile.program_bytes,
        "peak_bytes": profile.peak_bytes,
        "weight_bytes": profile.weight_bytes,
        "activation_bytes": profile.activation_bytes,
        "int_operations": profile.int_operations,
        "float_operations": profile.float_operations,
        "joules": profile.energy.joules,
        "cpu_seconds": profile.energy.cpu_seconds,
        "meter": profile.energy.meter,
        "load": os.getloadavg()[0],  # processes of others that wanted the cores, too
    }


if __name__ == "__main__":
    main()
