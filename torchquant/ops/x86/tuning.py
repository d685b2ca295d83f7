"""How wide the panels of each matrix product are: measured on this machine, remembered by CPU and sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torchquant.ops import builds
from torchquant.ops.remembered import cpu_name, read_table, write_table
from torchquant.ops.x86 import native
from torchquant.ops.x86.plan import Step
from torchquant.ops.x86.translation import Built

__all__ = ["tune"]

_PANELS = (2, 3, 4)  # blocks of 16 output channels; 0 in a plan: what kernels.cpp chooses by the sizes
_ROUNDS = 5
_GAIN = 0.97  # of the default's time, that another choice must not exceed


def tune(run: Callable[[], object], regions: Sequence[Built], sizes: str) -> None:
    """Choose the panels of every product of the regions, in their plans.

    Args:
        run: runs a graph with these regions once.
        sizes: of the inputs that `run` uses; part of the key under which a choice is stored.
    """
    plans = [r.plan for r in regions]
    keys = [[_key(step, sizes) for step in plan.laid_out] for plan in plans]
    known = _read()
    wanted = {key for row in keys for key in row if key}
    if not wanted <= set(known):
        times = {panel: _times(run, regions, panel) for panel in (0, *_PANELS)}
        timings: dict[str, dict[int, float]] = {}
        for panel, measured in times.items():
            for key, us in zip((k for row in keys for k in row), measured, strict=True):
                if key:
                    timings.setdefault(key, {}).setdefault(panel, 0.0)
                    timings[key][panel] += us
        known |= {key: _best(us) for key, us in timings.items()}
        write_table(_file(), known)
    for region, row in zip(regions, keys, strict=True):
        for i, key in enumerate(row):
            if key:
                region.plan.set(region.memory, i, "panel", known[key])


def _best(us: dict[int, float]) -> int:
    fastest = min(_PANELS, key=us.__getitem__)
    return fastest if us[fastest] < _GAIN * us[0] else 0


def _times(run: Callable[[], object], regions: Sequence[Built], panel: int) -> list[float]:
    """Microseconds of each op of all regions, the least of several runs, with all panels so wide."""
    for region in regions:
        for i, step in enumerate(region.plan.laid_out):
            if step.kind == "conv":
                region.plan.set(region.memory, i, "panel", panel)
    run()
    memories, counts = [r.memory for r in regions], [len(r.plan.laid_out) for r in regions]
    rounds = [[us for row in native.profiled(run, memories, counts) for us in row] for _ in range(_ROUNDS)]
    return [min(us) for us in zip(*rounds, strict=True)]


def _key(step: Step, sizes: str) -> str:
    """What decides a product's time: the machine, the sizes, and what follows it; empty for other ops."""
    if step.kind != "conv" or "group_out" in step.numbers:  # a group's panels are as its weights are packed
        return ""
    n, output = step.numbers, step.writes()[0]
    window = [n.get(k, 1) for k in ("kh", "kw", "sh", "sw", "dh", "dw")]
    stores = [v is not None for v in (step.out_byte, step.out_float, step.other)]
    parts = [cpu_name(), native.instruction_sets()[0], sizes, output.h, output.w, n["depth"], n["channels"]]
    parts += [*window, *map(int, stores), n.get("before", ""), n.get("after", "")]
    return " ".join(str(p) for p in parts)


def _file() -> Path:
    return builds.cache_folder() / f"tuning-{native.build_name()}.json"


def _read() -> dict[str, int]:
    """The stored choices, key -> panel."""
    return read_table(_file(), _is_panel, f"panels {(0, *_PANELS)}")


def _is_panel(value: object) -> bool:
    return type(value) is int and value in (0, *_PANELS)
