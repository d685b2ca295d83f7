"""One calibration, every target: int8 ops, dB, metric, bytes and latency of each network on each target that runs here.

    python benchmarks/targets.py --network ResNet-20 --network MiniLM

Peers on the same float network, data and threads: ONNX Runtime's own `quantize_static`, and OpenVINO's NNCF where that
is installed. Latency is the median of a call with one sample on one thread, all of a network in turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import networks
import onnxruntime
import records
import torch
from runtimes import Case, onnxruntime_static, openvino_int8

import torchquant as tq
from torchquant.backends import executorch_xnnpack, inductor_x86, onnx_qdq, openvino
from torchquant.errors import TorchquantError
from torchquant.quantizers import OnnxQuantizer, OpenvinoQuantizer, X86Quantizer, XnnpackQuantizer

NETWORKS = {"ResNet-20": "resnet20", "EfficientNet-Lite0": "efficientnet_lite0", "MiniLM": "minilm"}
TARGETS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "inductor_x86": (inductor_x86, X86Quantizer),
    "executorch_xnnpack": (executorch_xnnpack, XnnpackQuantizer),
    "onnx_qdq": (onnx_qdq, OnnxQuantizer),
    "openvino": (openvino, OpenvinoQuantizer),
}
PEERS = {"ONNX Runtime quantize_static": onnxruntime_static, "OpenVINO NNCF": openvino_int8}
_TURNS = 40
Run = Callable[..., Any]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=NETWORKS, help="repeatable; all if left out")
    parser.add_argument("--target", action="append", choices=TARGETS, help="repeatable; all if left out")
    parser.add_argument("--samples", type=int, default=128, help="held out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.network or NETWORKS:
        network = getattr(networks, NETWORKS[name])(samples=options.samples)
        rows = _rows(network, options.target or list(TARGETS))
        records.write("targets", rows, ("network", "target"))


def _rows(network: networks.Network, targets: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each target and peer, those that fail with the reason."""
    exported = tq.export(network.model, network.example, dynamic_shapes=network.dynamic_shapes)
    quantizers = [TARGETS[name][1]() for name in targets]
    graphs = tq.quantize(exported, network.example, network.calibration, quantizer=quantizers, progress=False)
    rows, runs = [], dict[str, Run]()
    for name, graph in zip(targets, graphs, strict=True):
        row = {"network": network.name, "target": name}
        try:
            with warnings.catch_warnings(record=True):
                program = TARGETS[name][0].lower(graph, network.example, progress=False)
        except TorchquantError as error:
            rows.append({**row, "outcome": "refused", "reason": str(error)[:300]})
            continue
        rows.append({**row, **_about(program, network, graph)})
        runs[name] = program
        if name == "onnx_qdq":  # as the peer is called: without torchquant's checks of the inputs
            runs[f"{name}, the file"] = _session_of(program)
    with tempfile.TemporaryDirectory() as folder:
        for name, build in PEERS.items():
            row = {"network": network.name, "target": name}
            try:
                run, coverage = build(Case(network.batched(1), Path(folder)))
            except (ImportError, RuntimeError, ValueError) as error:
                rows.append({**row, "outcome": "not run", "reason": str(error).split("\n")[0][:300]})
                continue
            runs[name] = lambda *batch, run=run: run(batch)
            rows.append({**row, "ops": coverage, "outcome": "run", **_judged(runs[name], network)})
    return [{**row, **_latency(row["target"], times)} for times in [_times(runs, network)] for row in rows]


def _about(program: Any, network: networks.Network, graph: Any) -> dict[str, Any]:
    proof = program.proof
    return {
        "ops": f"{proof.fused}/{proof.annotated}",
        "converted_db": proof.comparison.sqnr_db,
        "translated": proof.reason.rpartition("; ")[2] if "dB with each" in proof.reason else "",
        "bytes": program.size_bytes,
        "outcome": "run",
        "proof": proof.outcome,
        **_judged(program, network),
    }


def _judged(run: Run, network: networks.Network) -> dict[str, Any]:
    """The metric and the SQNR against float on held-out samples, one by one."""
    batches = network.batched(1).held_out
    with torch.no_grad():
        outputs, floats = (torch.cat([f(*batch) for batch in batches]) for f in (run, network.model))
    error = (outputs.double() - floats.double()).square().sum()
    return {
        "metric_name": network.metric_name,
        "metric": network.metric(outputs),
        "float_metric": network.metric(floats),
        "float_db": float(10 * torch.log10(floats.double().square().sum() / error)),
        "held_out_samples": len(batches),
    }


def _times(runs: dict[str, Run], network: networks.Network) -> dict[str, list[float]]:
    """Milliseconds of calls with one sample, all in turns."""
    batch, times = network.batched(1).held_out[0], {name: list[float]() for name in runs}
    for turn in range(_TURNS + 5):
        for name, run in runs.items():
            start = time.perf_counter()
            run(*batch)
            if turn >= 5:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _latency(name: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """Of a call, and where it is timed of the file alone in the runtime's own session."""
    files = {"file_ms": statistics.median(times[f"{name}, the file"])} if f"{name}, the file" in times else {}
    return {"median_ms": statistics.median(times[name]), "turns": _TURNS, **files} if name in times else {}


def _session_of(program: Any) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(program.save(Path(folder) / "model.onnx")), options)
    names = [i.name for i in session.get_inputs()]
    return lambda *batch: session.run(None, {n: t.numpy() for n, t in zip(names, batch, strict=True)})


if __name__ == "__main__":
    main()
