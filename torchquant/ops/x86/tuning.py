"""How wide the panels of each matrix product are: measured on this machine, remembered by CPU and sizes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from torchquant.errors import ArtifactError
from torchquant.files.whole import reading, warn_ignored, write_whole
from torchquant.ops import builds
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
        _write(known)
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
    parts = [_cpu(), native.instruction_sets()[0], sizes, output.h, output.w, n["depth"], n["channels"]]
    parts += [*window, *map(int, stores), n.get("before", ""), n.get("after", "")]
    return " ".join(str(p) for p in parts)


@cache
def _cpu() -> str:
    """Name, family and model of the CPU, as Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return "unknown"
    fields = dict(part.split(":", 1) for part in (line.replace("\t", "") for line in lines) if ":" in part)
    return ",".join(fields.get(k, "").strip() for k in ("model name", "cpu family", "model", "cache size"))


def _file() -> Path:
    return builds.cache_folder() / f"tuning-{native.build_name()}.json"


def _read() -> dict[str, int]:
    """The stored choices, key -> panel; those that the kernels do not know are left out, with a warning."""
    file = _file()
    if not file.exists():
        return {}
    try:
        with reading(file, "a table of measurements"):
            table = json.loads(file.read_text(encoding="utf-8"))
    except ArtifactError as error:
        warn_ignored(file, str(error.__cause__ or error))
        return {}
    known = {k: v for k, v in table.items() if type(v) is int and v in (0, *_PANELS)} if isinstance(table, dict) else {}
    if known != table:
        warn_ignored(file, f"it holds other panels than {(0, *_PANELS)}")
    return known


def _write(known: dict[str, int]) -> None:
    """Remember for the next lowering; a folder that cannot be written costs only the time to measure again."""
    try:
        write_whole(
            _file(), lambda part: part.write_text(json.dumps(known, indent=0, sort_keys=True), encoding="utf-8")
        )
    except ArtifactError:
        logging.getLogger(__name__).info("the choices of %s could not be written", _file())
