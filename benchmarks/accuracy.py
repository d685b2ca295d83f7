"""Accuracy on real networks: each Quantizer calibrated on the same samples, judged on the same held-out ones.

python benchmarks/accuracy.py [--network lite0] [--quantizer x86] [--algorithm adaround] [--samples 200] [--lower]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import records
import torch
from candidates import ALGORITHMS, QUANTIZERS, Candidate, lower, quantize
from networks import NETWORKS, TRAINED, Batch, Network, load_network
from peak import forget_peak, peak_bytes

import torchquant as tq
from torchquant.artifacts.program import Program

KEY = ("network", "quantizer", "algorithm", "artefact", "calibration_samples")
MINE = ("x86", "x86_dynamic", "xnnpack", "xnnpack_static", "torchao_x86", "torchao_x86_nonstrict", "et_xnnpack")


def main() -> None:
    """Measure what the command line asks for; rows are written as they come."""
    options = _options()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    for name in options.network or TRAINED:
        network = load_network(name, options.calibration, options.samples)
        reference = _outputs(network.model, network)
        print(
            f"\n{network.name}: float {network.metric_name} {network.metric(reference):.2f}, {len(reference)} samples"
        )
        shapes = network.dynamic_shapes if options.dynamic_batch else None
        for key, algorithm in itertools.product(options.quantizer or MINE, options.algorithm or ["none"]):
            if QUANTIZERS[key].transformers_only and not network.transformer:
                continue
            for row in _rows(network, reference, QUANTIZERS[key], algorithm, shapes, options.lower):
                records.write("accuracy", [row], KEY)
                print(_line(row), flush=True)
            gc.collect()  # graphs are cycles, and the next one needs the memory


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=NETWORKS, help="repeatable; the trained if left out")
    parser.add_argument(
        "--quantizer", action="append", choices=QUANTIZERS, help="repeatable; the 8-bit ones if left out"
    )
    parser.add_argument("--algorithm", action="append", choices=ALGORITHMS, help="repeatable; none if left out")
    parser.add_argument("--samples", type=int, help="held-out samples (pairs for MiniLM, 250 if left out)")
    parser.add_argument("--calibration", type=int, default=64, help="calibration samples")
    parser.add_argument("--dynamic-batch", action="store_true", help="export with a batch size of 1 to 16, not of 16")
    parser.add_argument("--lower", action="store_true", help="also lower ours, and measure the artefact itself")
    return parser.parse_args()


def _outputs(model: Callable[..., Any], network: Network) -> torch.Tensor:
    """The outputs on all held-out samples, one after the other."""
    with torch.no_grad():
        return torch.cat([_call(model, batch, len(network.example[0])) for batch in network.held_out])


def _call(model: Callable[..., Any], batch: Batch, size: int) -> torch.Tensor:
    """The model's output for a batch, filled up to `size` with its last sample for the call."""
    samples = len(batch[0])
    outputs = model(*(torch.cat([t, t[-1:].expand(size - samples, *t.shape[1:])]) for t in batch))
    output: torch.Tensor = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    return output[:samples].detach().clone()


def _rows(
    network: Network,
    reference: torch.Tensor,
    candidate: Candidate,
    algorithm: str,
    dynamic_shapes: Any,
    lowered: bool,
) -> Iterator[dict[str, Any]]:
    """One row for the converted graph and, with `lowered`, one for the artefact of ours."""
    about: dict[str, Any] = {
        "network": network.name,
        "quantizer": candidate.name,
        "algorithm": algorithm,
        "artefact": "converted graph",
    }
    forget_peak()
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        steps = ALGORITHMS[algorithm]()
        converted, result = quantize(candidate, network.model, network.calibration, dynamic_shapes, steps)
    except Exception as error:  # a peer's failure is a result
        yield {**about, "error": f"{type(error).__name__}: {str(error)[:300]}"}
        return
    about |= {"seconds": time.perf_counter() - start, "coverage": tq.report(converted).coverage}
    about |= {"cpu_seconds": time.process_time() - cpu_start, "peak_bytes": peak_bytes()}
    if result is not None:
        about["not_kept"] = [name for name, _, kept in result.steps if not kept]
    yield {**about, **_measure(network, reference, converted)}
    if not lowered or candidate.backend is None:
        return
    for name in ("seconds", "cpu_seconds", "peak_bytes"):
        del about[name]
    about |= {"artefact": candidate.backend.TARGET.name}
    program, refusal = lower(candidate.backend, converted, network.example)
    if program is None:
        yield {**about, "error": refusal}
        return
    measured = _measure(network, reference, program)
    yield {**about, "refusal": refusal, **_facts(program), **measured}


def _measure(network: Network, reference: torch.Tensor, model: Callable[..., Any]) -> dict[str, Any]:
    outputs = _outputs(model, network)
    metric, float_metric = network.metric(outputs), network.metric(reference)
    return {
        "sqnr_db": tq.sqnr_db(reference, outputs),
        "metric_name": network.metric_name,
        "metric": metric,
        "delta": metric - float_metric,
        "agreement": 100 * float((outputs.argmax(-1) == reference.argmax(-1)).float().mean()),
        "float_metric": float_metric,
        "calibration_samples": sum(len(b[0]) for b in network.calibration),
        "held_out_samples": len(reference),
    }


def _facts(program: Program) -> dict[str, Any]:
    proof = program.proof
    return {
        "size_bytes": program.size_bytes,
        "kernels": dict(proof.kernels),
        "delegate_calls": proof.kernels.get("delegate calls"),
        "fused": f"{proof.fused}/{proof.annotated}",
        "sqnr_against_converted_db": proof.comparison.sqnr_db,
    }


def _line(row: dict[str, Any]) -> str:
    head = f"{row['network']:19s}{row['quantizer']:45s}{row['algorithm']:23s}{row['artefact']:20s}"
    if "error" in row:
        return f"{head}{row['error']}"
    size = f"  {row['size_bytes']:,} bytes" if "size_bytes" in row else ""
    refusal = f"\n    first refused: {row['refusal']}" if row.get("refusal") else ""
    seconds = f"  {row['seconds']:6.1f} s" if "seconds" in row else ""
    measured = f"{row['coverage']:>8s}  {row['sqnr_db']:6.2f} dB  {row['metric']:6.2f} ({row['delta']:+.2f})"
    peak = f"  {row['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in row else ""
    back = f"  not kept: {', '.join(row['not_kept'])}" if row.get("not_kept") else ""
    return f"{head}{measured}{seconds}{peak}{size}{back}{refusal}"


if __name__ == "__main__":
    main()
