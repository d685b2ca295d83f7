"""The bounds of this machine: multiply-accumulates a second by type, and bytes read a second by level of memory.

python benchmarks/roofline.py [--threads 1]
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import subprocess
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Roofline", "measure"]

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILE = ("g++", "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
KINDS = ("int8", "fp32", "bf16")  # as the source numbers them
L2_ARRAY_BYTES, MIN_MEMORY_ARRAY_BYTES = 256 << 10, 256 << 20
READ_BYTES = 1 << 26  # of a timing, at least
REPEATS = 200
MIN_CORE_SHARE = 0.8


@dataclass(frozen=True)
class Roofline:
    """The best of repeated measurements on `threads` threads together.

    Args:
        gmacs: 1e9 multiply-accumulates a second with operands in registers, of the types the CPU has.
        instructions: what was measured for each type, e.g. `vpdpbusd zmm` for int8.
        read_gbps: 1e9 bytes read a second from `l2`, `l3` and `memory`.
        cache_bytes: sizes of the caches `l2` (all threads' together) and `l3`.
    """

    threads: int
    gmacs: Mapping[str, float]
    instructions: Mapping[str, str]
    read_gbps: Mapping[str, float]
    cache_bytes: Mapping[str, int]

    def ideal_ms(self, macs: float, bytes_: float, level: str = "memory", kind: str = "int8") -> float:
        """Milliseconds that the products and the bytes read from the level take at least, whichever is longer."""
        return max(macs / self.gmacs[kind], bytes_ / self.read_gbps[level]) / 1e6

    def level_of(self, bytes_: float) -> str:
        """The fastest level that holds so many bytes."""
        return next((level for level, size in self.cache_bytes.items() if bytes_ <= size), "memory")

    def __str__(self) -> str:
        macs = [f"{k} {v:.0f} GMAC/s ({self.instructions[k]})" for k, v in self.gmacs.items()]
        return f"{self.threads} threads: {', '.join(macs)}; read " + ", ".join(
            f"{level} {gbps:.1f} GB/s" for level, gbps in self.read_gbps.items()
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", action="append", type=int, help="repeatable; 1 and 2 if left out")
    for threads in parser.parse_args().threads or (1, 2):
        print(measure(threads), flush=True)


def measure(threads: int = 1) -> Roofline:
    """Measure this machine, in some seconds. It should do nothing else meanwhile: a busy core can halve the result,
    of which a warning then tells.

    Raises:
        RuntimeError: no memory for the array that must not fit the caches.
    """
    library = _library()
    rates = {k: library.macs_per_second(i, threads, REPEATS) / 1e9 for i, k in enumerate(KINDS)}
    caches = {"l2": _cache_bytes(2, 1 << 20) * threads, "l3": _cache_bytes(3, 32 << 20)}
    arrays = {  # bytes a thread
        "l2": L2_ARRAY_BYTES,
        "l3": caches["l3"] // 4 // threads,
        "memory": max(MIN_MEMORY_ARRAY_BYTES, 4 * caches["l3"]) // threads,
    }
    roofline = Roofline(
        threads,
        gmacs={k: rate for k, rate in rates.items() if rate},
        instructions={k: library.instruction(i).decode() for i, k in enumerate(KINDS) if rates[k]},
        read_gbps={level: _read_gbps(size, threads) for level, size in arrays.items()},
        cache_bytes=caches,
    )
    share = library.core_share()
    if share < MIN_CORE_SHARE:
        warnings.warn(f"other processes ran: a thread had {share:.0%} of a core, so rates are too low", stacklevel=2)
    return roofline


def _read_gbps(array_bytes: int, threads: int) -> float:
    size = array_bytes // 512 * 512  # what one step of the source reads
    rate = float(_library().bytes_per_second(size, max(1, READ_BYTES // size // threads), threads, REPEATS))
    if not rate:
        raise RuntimeError(f"no memory for {threads} arrays of {size:,} bytes to read")
    return rate / 1e9


@functools.cache
def _library() -> ctypes.CDLL:
    """The source compiled for this CPU; the file goes once it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "roofline.so"
        subprocess.run([*COMPILE, SOURCE, "-o", path], check=True)
        library = ctypes.CDLL(str(path))
    library.macs_per_second.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int)
    library.bytes_per_second.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_int, ctypes.c_int)
    for function in (library.macs_per_second, library.bytes_per_second, library.core_share):
        function.restype = ctypes.c_double
    library.instruction.argtypes, library.instruction.restype = (ctypes.c_int,), ctypes.c_char_p
    return library


def _cache_bytes(level: int, default: int) -> int:
    """Size of the first core's cache, as Linux tells it."""
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (folder / "level").read_text().strip() == str(level):
            return int((folder / "size").read_text().strip().removesuffix("K")) << 10
    return default


if __name__ == "__main__":
    main()
