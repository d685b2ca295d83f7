"""The main job: a pretrained network quantized for x86 and for ExecuTorch with one calibration, run, and proven."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import torch
from efficientnet_lite0 import calibration, held_out, model
from rich.console import Console
from rich.table import Table

import torchquant as tq
from torchquant.lowering.target import Target
from torchquant.measure.benchmark import interleaved
from torchquant.quantizers import X86Quantizer, XnnpackQuantizer

OUT = Path(os.environ.get("TORCHQUANT_DEMO_OUT", "demo-output"))
console = Console(width=110)


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    OUT.mkdir(exist_ok=True)
    network, images, unseen = model(), calibration(), held_out()
    console.print(f"EfficientNet-Lite0, {len(images)} calibration crops, {len(unseen)} held-out crops")
    exported = tq.export(network, images[0])
    quantizers = [X86Quantizer(), XnnpackQuantizer()]
    converted = tq.quantize(exported, images[0], images, quantizer=quantizers)
    targets = [quantizer.target for quantizer in quantizers]
    table = Table("", *map(str, targets))
    lowered = [_lowered(target, graph, exported, unseen) for target, graph in zip(targets, converted, strict=True)]
    programs, columns = zip(*lowered, strict=True)
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    console.print(table)
    analysis = tq.analyze(converted[0], unseen, reference=exported, programs=programs[:1])
    tq.report(converted[0], programs, analysis=analysis).save(OUT / "report.html")
    console.print(f"artefacts and reports: {OUT}/")


def _lowered(
    target: Target, graph: torch.fx.GraphModule, exported: torch.fx.GraphModule, unseen: list
) -> tuple[tq.Program, dict[str, str]]:
    backend = target.backend()
    start = time.perf_counter()
    program = backend.lower(graph, unseen[0])
    seconds = time.perf_counter() - start
    float_run, float_bytes = backend.lower_float(exported, unseen[0])
    program.save(OUT / f"efficientnet_lite0.{target}{target.suffix}")
    report = tq.report(graph, program)
    report.save(OUT / f"report.{target}.txt")
    comparison = tq.compare(exported, program, unseen)
    times = interleaved({"float": float_run, "int8": program}, unseen[0], rounds=40)
    return program, {
        "int8 compute ops": report.coverage,
        "kernels": ", ".join(f"{n} {kernel}" for kernel, n in program.proof.kernels.items()),
        "SQNR against float, held out": f"{comparison.sqnr_db:.1f} dB",
        "same top-1 as float": f"{100 * comparison.agreement:.1f} %",
        "against the converted graph": f"{program.proof.comparison.sqnr_db:.1f} dB",
        "bytes (of float)": f"{program.size_bytes:,} ({program.size_bytes / float_bytes:.3f})",
        "latency (of float, same runtime)": f"{times['int8'].median_ms:.2f} ms "
        f"({times['int8'].median_ms / times['float'].median_ms:.2f})",
        "lowered and proven in": f"{seconds:.0f} s",
    }


if __name__ == "__main__":
    main()
