"""Op by op, the work of a network in int8, the time that this machine needs for it at best, and the time it takes.

python benchmarks/profile_cpu.py [--network lite0] [--batch 1] [--threads 1]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import records
import roofline
import torch
from candidates import QUANTIZERS, quantize
from networks import NETWORKS, Batch, load_network
from torch.fx import GraphModule, Node

import torchquant as tq
from torchquant.artifacts.serialize import export_again
from torchquant.backends import inductor_x86
from torchquant.fx import ops
from torchquant.ops.x86 import native, tuning
from torchquant.ops.x86.translation import replace_regions

__all__ = ["Work", "work"]

KEY = ("network", "batch", "threads", "node")
SUMS = ("macs", "weight_bytes", "input_bytes", "output_bytes", "ideal_us")
ROUNDS = 20


@dataclass(frozen=True)
class Work:
    """What one op computes and moves.

    Args:
        node: its name in the converted graph.
        kind: `1x1 conv`, `depthwise`, `other conv`, `linear`, `attention` or `matmul`.
        precision: `int8`, or `fp32` where the Quantizer left the op float.
        macs: multiply-accumulates, those with padding too.
        weight_bytes: the codes alone, without scales and bias.
        input_bytes, output_bytes: in the precision of the op: what follows it up to the next quantize op counts as
            fused into it.
    """

    node: str
    kind: str
    precision: str
    macs: int
    weight_bytes: int
    input_bytes: int
    output_bytes: int

    @property
    def bytes_(self) -> int:
        """All that it moves, each byte once."""
        return self.weight_bytes + self.input_bytes + self.output_bytes


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
    op_work = work(graph)
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


def work(graph: GraphModule) -> list[Work]:
    """Convolutions, linears, attention and matrix products of a converted graph that was exported with fixed sizes."""
    integer = {site.node for site in tq.report(graph).sites if site.status == "quantized"}
    return [
        _work(node, "int8" if node.name in integer else "fp32", graph)
        for node in graph.graph.nodes
        if ops.op_name(node) in KINDS
    ]


def _work(node: Node, precision: str, graph: GraphModule) -> Work:
    kind = ops.kind_of(node)
    assert kind is not None
    weight = ops.argument(node, kind.weight) if kind.weight is not None else None
    shapes = [_shape(n, graph) for n in (*ops.data_inputs(node, kind), *([weight] if weight else ()))]
    data = shapes[:-1] if weight else shapes
    name, macs = KINDS[kind.name](_shape(node, graph), *shapes)
    width = 1 if precision == "int8" else 4
    return Work(
        node.name,
        name,
        precision,
        macs,
        weight_bytes=width * math.prod(shapes[-1]) if weight else 0,
        input_bytes=width * sum(map(math.prod, data)),
        output_bytes=width * math.prod(_shape(node, graph)),
    )


def _shape(node: Node, graph: GraphModule) -> tuple[int, ...]:
    """The shape of a value; quantize and dequantize ops, which may carry none, leave it as it is."""
    while ops.is_quantize(node) or ops.is_dequantize(node):
        node = node.all_input_nodes[0]
    shape = ops.constant_value(graph, node).shape if node.op == "get_attr" else ops.shape_of(node)
    assert shape is not None
    return tuple(int(size) for size in shape)


Shape = tuple[int, ...]


def _convolution(output: Shape, data: Shape, weight: Shape) -> tuple[str, int]:
    depthwise = weight[1] == 1 and data[1] > 1
    kind = "depthwise" if depthwise else "1x1 conv" if math.prod(weight[2:]) == 1 else "other conv"
    return kind, math.prod(output) * math.prod(weight[1:])


def _linear(output: Shape, data: Shape, weight: Shape) -> tuple[str, int]:
    return "linear", math.prod(output) * weight[-1]


def _attention(output: Shape, query: Shape, key: Shape, value: Shape) -> tuple[str, int]:
    """Every query with every key, those a mask hides too."""
    return "attention", math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _matmul(output: Shape, left: Shape, right: Shape) -> tuple[str, int]:
    return "matmul", math.prod(output) * left[-1]


# Op -> its kind and MACs from the shapes of its output, of its data inputs, and of its weight.
KINDS: Mapping[str, Callable[..., tuple[str, int]]] = {
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "linear": _linear,
    "attention": _attention,
    "matmul": _matmul,
}


def resident_bytes(op_work: Sequence[Work]) -> int:
    """What stays in the caches from call to call at best: all weights, and the activations of the largest op."""
    return sum(w.weight_bytes for w in op_work) + max(w.input_bytes + w.output_bytes for w in op_work)


def measured_us(graph: GraphModule, batch: Batch) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds on one thread: of each op by the name of its node, and of the other steps of our regions by kind.

    What stays with Inductor, and our attention, are in neither: the whole program's time less these is theirs.
    """
    exported = export_again(graph, batch).module()
    names = {new.name: old.name for old, new in zip(_products(graph), _products(exported), strict=True)}
    regions = replace_regions(exported)
    with torch.no_grad():
        run = lambda: exported(*batch)  # noqa: E731
        tuning.tune(run, regions, "x".join(str(s) for t in batch for s in t.shape))
        memories, steps = [r.memory for r in regions], [r.plan.laid_out for r in regions]
        rounds = [native.profiled(run, memories, [len(s) for s in steps]) for _ in range(ROUNDS)]
    products: dict[str, float] = {}
    others: dict[str, float] = {}
    for i, region in enumerate(steps):
        for k, step in enumerate(region):
            us = statistics.median(microseconds[i][k] for microseconds in rounds)
            if step.kind in ("conv", "depthwise"):
                products[names[step.label]] = us
            else:
                others[step.kind] = others.get(step.kind, 0.0) + us
    return products, others


def _products(graph: GraphModule) -> list[Node]:
    return [node for node in graph.graph.nodes if ops.op_name(node) in KINDS]


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
