"""Op by op, the work of a network in int8, the time that this machine needs for it at best, and the time it takes.

python benchmarks/profile_cpu.py [--network lite0] [--batch 1] [--threads 1]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import records
import roofline
import torch
from candidates import QUANTIZERS, quantize
from networks import NETWORKS, Batch, load_network
from torch.fx import GraphModule

from torchquant.backends import inductor_x86
from torchquant.backends.inductor_x86.op_times import measured_us
from torchquant.fx.work import Work, resident_bytes, work

KEY = ("network", "batch", "threads", "node")
SUMS = ("macs", "weight_bytes", "input_bytes", "output_bytes", "ideal_us")
ROUNDS = 20


def main() -> None:
    """Print and keep a row an op; then print the sums of each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="lite0")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    bounds = roofline.measure(options.threads)
    network = load_network(options.network, samples=options.batch).batched(options.batch)
    graph, _ = quantize(QUANTIZERS["x86"], network.model, network.calibration[:1])  # ranges do not change the work
    op_work = work(graph)  # of sizes that are fixed
    level = bounds.level_of(resident_bytes(op_work))
    batch = network.held_out[0]
    products, others = measured_us(graph, batch)
    rows = times(op_work, bounds, level, products)
    for kind, us in {**others, "whole program": program_us(graph, batch, options.threads)}.items():
        rows.append({"node": f"({kind})", "kind": kind, "bound": "", **dict.fromkeys(SUMS, 0), "measured_us": us})
    about = {"network": network.name, "batch": options.batch, "threads": options.threads}
    records.write("profile", [{**about, **row} for row in rows], KEY)
    print(f"\n{network.name}, batch {options.batch}; {bounds}\n{resident_bytes(op_work):,} bytes, read from {level}")
    computing = [row for row in rows if row["macs"]]
    for row in computing:
        print(_line(row["node"], [row]))
    for kind in dict.fromkeys(row["kind"] for row in computing):
        print(_line(f"all {kind}", [row for row in computing if row["kind"] == kind]))
    print(_line("all", computing))
    for row in rows:
        if not row["macs"]:
            print(f"{row['kind']:34s}{row['measured_us']:9.1f} us measured")


def program_us(graph: GraphModule, batch: Batch, threads: int) -> float:
    """Median microseconds of the lowered program."""
    program = inductor_x86.lower(graph, batch, min_sqnr_db=-math.inf)
    torch.set_num_threads(threads)
    times_us = []
    for _ in range(5 * ROUNDS):
        start = time.perf_counter_ns()
        program(*batch)
        times_us.append((time.perf_counter_ns() - start) / 1e3)
    return statistics.median(times_us)


def times(
    op_work: Sequence[Work], bounds: roofline.Roofline, level: str, measured: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row an op: its work, the microseconds it takes at best, and those measured, if any.

    Args:
        level: where everything is read from; writes count like reads.
    """
    rows = []
    for op in op_work:
        ideal_us = 1e3 * bounds.ideal_ms(op.macs, op.bytes_, level, op.precision)
        compute_us = 1e3 * bounds.ideal_ms(op.macs, 0, level, op.precision)
        row = {**asdict(op), "ideal_us": ideal_us, "bound": "compute" if compute_us == ideal_us else level}
        row |= {"gmacs": bounds.gmacs[op.precision], "read_gbps": bounds.read_gbps[level]}
        rows.append(row | ({"measured_us": measured[op.node]} if op.node in measured else {}))
    return rows


def _line(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A row, or the sum of several; the measured time and its share of the ideal where every row has one."""
    total = {f: sum(row[f] for row in rows) for f in SUMS}
    about = f"{rows[0]['kind']:11s}{rows[0]['bound']:8s}" if len(rows) == 1 else f"{len(rows):3d} ops{'':12s}"
    text = (
        f"{name:34s}{about}{total['macs'] / 1e6:9.2f} MMAC{total['weight_bytes'] / 1e3:9.1f} kB weights"
        f"{total['input_bytes'] / 1e3:9.1f} kB in{total['output_bytes'] / 1e3:9.1f} kB out"
        f"{total['ideal_us']:9.1f} us ideal"
    )
    if all("measured_us" in row for row in rows):
        measured = sum(row["measured_us"] for row in rows)
        text += f"{measured:9.1f} us measured, {100 * total['ideal_us'] / measured:.0f} % of the bound reached"
    return text


if __name__ == "__main__":
    main()
