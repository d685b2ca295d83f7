"""What `benchmarks/qat.py` measured, as a table: means over seeds, beside the float control."""

from __future__ import annotations

from statistics import mean
from typing import Any

from gpu_tables import Table

__all__ = ["training"]

Row = dict[str, Any]
_ORDER = ("float control", "RangeSearch", "AdaRound", "fake quantization", "LSQ", "LSQ+", "LSQ with distillation")


def training(results: dict[str, Any]) -> Table:
    """One line for each width and method: the mean over its seeds, each seed, and the distance from the control."""
    rows = [row for row in results["rows"] if row["method"] in _ORDER]
    groups: dict[tuple[int, int, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["weights"], row["activations"], row["steps"], row["method"]), []).append(row)
    ordered = sorted(groups, key=lambda key: (-key[0], -key[1], _ORDER.index(key[3])))
    head = ["bits (weights, activations)", "method", "steps", "seeds", "top-1 %", "each seed", "to the control"]
    cells = []
    for key in ordered:
        weights, activations, steps, method = key
        after = [row["after"] for row in groups[key]]
        controls = {row["seed"]: row["after"] for row in rows if row["method"] == "float control"}
        seeds = [row["seed"] for row in groups[key]]
        trained = steps and method != "float control" and all(seed in controls for seed in seeds)
        gap = f"{mean(after) - mean(controls[seed] for seed in seeds):+.1f}" if trained else ""
        width = "float" if weights == 32 else f"{weights}, {activations}"
        each = ", ".join(f"{value:.1f}" for value in after) if len(after) > 1 else ""
        cells.append([width, method, str(steps or ""), str(len(after)), f"{mean(after):.1f}", each, gap])
    return Table("Quantization-aware training", _note(results), head, cells)


def _note(results: dict[str, Any]) -> str:
    """Where it was measured, the float network, what agrees with convert, and what a step costs."""
    rows = results["rows"]
    if not rows:
        return "Not measured yet: `python benchmarks/qat.py`"
    parts = [f"ResNet-20, 1,000 held-out images of CIFAR-10; {results['cpu']}; {results['date']}"]
    before = next((row["before"] for row in rows if row["method"] == "float control"), None)
    parts += [] if before is None else [f"the float network before any training: {before:.1f} %"]
    times = next((row for row in rows if row["method"] == "step time"), None)
    if times is not None:
        text = f"a training step with learned 4-bit grids takes {times['ratio']:.2f} times as long as the float one"
        parts.append(f"{text} ({times['ms_per_step']:.0f} and {times['float_ms']:.0f} ms, batch {times['batch']})")
    return "; ".join(parts)
