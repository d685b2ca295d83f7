"""Memory and energy as the system tells them; what it does not tell is said to be unknown, never estimated."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

resource: Any
try:
    import resource
except ImportError:  # not on Windows
    resource = None

__all__ = ["Energy", "forget_peak", "measure_energy", "peak_bytes", "resident_bytes"]

_POWERCAP = Path("/sys/class/powercap")
_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _status_bytes(field: str) -> int | None:
    if not _STATUS.is_file():
        return None
    lines = [line.split() for line in _STATUS.read_text().splitlines() if line.startswith(field)]
    return int(lines[0][1]) * 1024 if lines else None


def resident_bytes() -> int | None:
    """What the process holds in memory now; None where the system does not say."""
    return _status_bytes("VmRSS:")


def peak_bytes() -> int | None:
    """The most that it held, since `forget_peak` where that worked."""
    peak = _status_bytes("VmHWM:")
    if peak is not None or resource is None:
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> bool:
    """Start the peak anew; whether the system could do that."""
    try:
        _FORGET.write_text("5")
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Energy:
    """What some calls took, each of them.

    Args:
        joules: of the whole meter (a CPU package, a GPU), other processes included; None where nothing measures it.
        cpu_seconds: of all threads of this process.
        meter: what measured the joules, or why nothing did.
    """

    joules: float | None
    cpu_seconds: float
    meter: str


def measure_energy(run: Callable[[], object], calls: int, *, powercap: Path = _POWERCAP) -> Energy:
    """Energy of a call, by RAPL or NVML where they can be read, over `calls` of them."""
    meter, name = _meter(powercap)
    joules_before, cpu_before = meter() if meter else 0.0, time.process_time()
    for _ in range(calls):
        run()
    cpu_seconds = (time.process_time() - cpu_before) / calls
    joules = (meter() - joules_before) / calls if meter else None
    if joules is not None and joules <= 0:  # the counter has started anew
        return Energy(None, cpu_seconds, f"{name}, whose counter was reset meanwhile")
    return Energy(joules, cpu_seconds, name)


def _meter(powercap: Path) -> tuple[Callable[[], float] | None, str]:
    """A function that gives joules so far, and what it reads."""
    counters = sorted(powercap.glob("*-rapl:[0-9]*/energy_uj"))
    packages = [c for c in counters if c.parent.name.count(":") == 1]
    try:
        if packages and all(int(c.read_text()) >= 0 for c in packages):
            return lambda: sum(int(c.read_text()) for c in packages) / 1e6, "RAPL, whole CPU packages"
    except (OSError, ValueError):
        pass
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        devices = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        if devices and sum(map(nvml.nvmlDeviceGetTotalEnergyConsumption, devices)) >= 0:
            return lambda: sum(map(nvml.nvmlDeviceGetTotalEnergyConsumption, devices)) / 1e3, "NVML, all GPUs"
    except Exception:  # NVML's own errors, whose class is in what may be missing
        pass
    seen = f"{len(packages)} RAPL counters cannot be read" if packages else "no RAPL counter"
    return None, f"{seen}, and no NVML: CPU seconds alone"
