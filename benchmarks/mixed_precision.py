"""Mixed precision against 4 bits for all weights, at the same bytes, on data that nothing else has seen; three seeds.

python benchmarks/mixed_precision.py [--network lite0] [--seeds 3] [--samples 96]
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import records
import torch
from networks import Batch, Network, load_network

import torchquant as tq
from torchquant.quantizers import MixedPrecisionQuantizer, WeightOnlyQuantizer

KEY = ("network", "seed", "plan")
NETWORKS = ("lite0", "minilm")
SCHEMES = {
    "lite0": ["w8", "w4", "w3", "w2"],
    "minilm": ["w8_g64", "w4_g64", "w3_g64", "w2_g64"],
}
UNIFORM = {"lite0": "w4", "minilm": "w4_g64"}
BATCH, JUDGED = 4, 4  # samples; batches of the search's own, held out from its calibration


def main() -> None:
    """For each network and seed: search, the plan at uniform's bytes and the uniform one, both on the held-out data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=NETWORKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calibration", type=int, default=96, help="samples from which each seed draws two thirds")
    parser.add_argument("--samples", type=int, default=96, help="held-out samples (pairs for MiniLM)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in options.network or NETWORKS:
        network = load_network(name, options.calibration, options.samples).batched(BATCH)
        for seed in range(options.seeds):
            for row in _rows(name, network, seed):
                records.write("mixed_precision", [row], KEY)
                print(_line(row), flush=True)


def _rows(name: str, network: Network, seed: int) -> list[dict[str, Any]]:
    start = time.process_time()
    batches = _drawn(network.calibration, seed)
    exported = tq.export(network.model, batches[0], dynamic_shapes=network.dynamic_shapes)
    known = [s for s in SCHEMES[name] if s in WeightOnlyQuantizer.schemes]
    found = tq.search(exported, batches[:-JUDGED], WeightOnlyQuantizer, known, validation=batches[-JUDGED:], seed=seed)
    uniform = found.uniform(UNIFORM[name])
    plan = found.plan(uniform.about["weight_bytes"])
    search_seconds = time.process_time() - start
    with torch.no_grad():
        reference = torch.cat([network.model(*batch) for batch in network.held_out])
    float_metric = network.metric(reference)
    rows = []
    for title, one in (("uniform", uniform), ("mixed", plan)):
        prepared = tq.prepare(exported, MixedPrecisionQuantizer(WeightOnlyQuantizer, replace(one, about={})))
        tq.calibrate(prepared, batches[:-JUDGED], progress=False)
        converted = tq.convert(prepared)
        with torch.no_grad():
            outputs = torch.cat([converted(*batch) for batch in network.held_out])
        rows.append(
            {
                "network": network.name,
                "seed": seed,
                "plan": title,
                "weight_bytes": one.about["weight_bytes"],
                "bits_per_weight": one.about["bits_per_weight"],
                "expected_db": one.about["expected_db"],
                "kept": one.about.get("kept", ""),
                "sqnr_db": tq.sqnr_db(reference, outputs),
                "metric_name": network.metric_name,
                "metric": network.metric(outputs),
                "float_metric": float_metric,
                "agreement": 100 * float((outputs.argmax(-1) == reference.argmax(-1)).float().mean()),
                "held_out_samples": len(reference),
                "search_cpu_seconds": search_seconds,
            }
        )
    return rows


def _drawn(calibration: Sequence[Batch], seed: int) -> list[Batch]:
    """Two thirds of the samples, drawn anew for each seed, in batches of the same size."""
    joined = tuple(torch.cat(parts) for parts in zip(*calibration, strict=True))
    count, size = len(joined[0]), len(calibration[0][0])
    chosen = random.Random(seed).sample(range(count), 2 * count // 3 // size * size)
    return [tuple(t[chosen[i : i + size]] for t in joined) for i in range(0, len(chosen), size)]


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['network']:20s} seed {row['seed']} {row['plan']:8s} {row['weight_bytes']:,} bytes "
        f"({row['bits_per_weight']} bpw) {row['sqnr_db']:6.2f} dB, {row['metric_name']} {row['metric']:.2f} "
        f"(float {row['float_metric']:.2f}) {row['kept']}"
    )


if __name__ == "__main__":
    main()
