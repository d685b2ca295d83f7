"""How many calibration samples static int8 needs, and which: as many as are used, matched data or not; over seeds.

python benchmarks/calibration_study.py [--network resnet20] [--seeds 3] [--samples 128]
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import records
import torch
from networks import BATCH_SIZE, Batch, Network, load_network

import torchquant as tq
from torchquant.quantizers import X86Quantizer

KEY = ("network", "data", "samples", "seed")
NETWORKS = ("resnet20", "lite0", "minilm")
COUNTS = (1, 4, 16, 64, 256)
OTHER_COUNT = 64  # samples of data that are not the network's own


def main() -> None:
    """A row a network, kind of data, count and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=NETWORKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128, help="held-out samples (pairs for MiniLM)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=tq.TorchquantWarning)
    for name in options.network or NETWORKS:
        network = load_network(name, max(COUNTS), options.samples)
        exported = tq.export(network.model, network.example, dynamic_shapes=network.dynamic_shapes)
        with torch.no_grad():
            reference = torch.cat([network.model(*batch) for batch in network.held_out])
        for seed in range(options.seeds):
            sets = [("matched", n, _drawn(network.calibration, n, seed)) for n in COUNTS]
            chosen = _drawn(network.calibration, OTHER_COUNT, seed)
            sets += [(kind, OTHER_COUNT, make(chosen, seed)) for kind, make in OTHERS[network.transformer].items()]
            for kind, count, batches in sets:
                row = {"network": network.name, "data": kind, "samples": count, "seed": seed}
                row |= _measured(exported, batches, network, reference)
                records.write("calibration_study", [row], KEY)
                print(row, flush=True)


def _measured(exported: Any, batches: Sequence[Batch], network: Network, reference: torch.Tensor) -> dict[str, Any]:
    prepared = tq.prepare(exported, X86Quantizer("static_int8"))
    tq.calibrate(prepared, batches, progress=False)
    converted = tq.convert(prepared)
    with torch.no_grad():
        outputs = torch.cat([converted(*batch) for batch in network.held_out])
    return {
        "sqnr_db": tq.sqnr_db(reference, outputs),
        "metric_name": network.metric_name,
        "metric": network.metric(outputs),
        "float_metric": network.metric(reference),
        "held_out_samples": len(reference),
    }


def _drawn(calibration: Sequence[Batch], count: int, seed: int) -> list[Batch]:
    """`count` of the samples, drawn without replacement."""
    joined = tuple(torch.cat(parts) for parts in zip(*calibration, strict=True))
    chosen = random.Random(seed).sample(range(len(joined[0])), count)
    return list(zip(*(t[chosen].split(BATCH_SIZE) for t in joined), strict=True))


def _noise(batches: Sequence[Batch], seed: int) -> list[Batch]:
    """Normal noise with the mean and the deviation of each channel of the images."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for (images,) in batches:
        mean, deviation = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
        made.append((torch.randn(images.shape, generator=generator) * deviation + mean,))
    return made


def _dark(batches: Sequence[Batch], seed: int) -> list[Batch]:
    """The images at half of their contrast, about their own means."""
    return [
        ((images - images.mean((2, 3), keepdim=True)) / 2 + images.mean((2, 3), keepdim=True),) for (images,) in batches
    ]


def _random_tokens(batches: Sequence[Batch], seed: int) -> list[Batch]:
    """Tokens drawn from the whole vocabulary, in the places of the real ones; first and last ones kept."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for ids, mask in batches:
        drawn = torch.randint(1000, 30000, ids.shape, generator=generator)
        inside = mask.bool() & (ids > 103)
        made.append((torch.where(inside, drawn, ids), mask))
    return made


def _short(batches: Sequence[Batch], seed: int) -> list[Batch]:
    """The first five tokens of each sentence."""
    made = []
    for ids, mask in batches:
        kept = torch.arange(ids.shape[1]) < 5
        made.append((ids * kept, mask * kept))
    return made


# by whether the network is a transformer on text
OTHERS: dict[bool, dict[str, Callable[[Sequence[Batch], int], list[Batch]]]] = {
    False: {"noise": _noise, "half contrast": _dark},
    True: {"random tokens": _random_tokens, "five tokens": _short},
}


if __name__ == "__main__":
    main()
