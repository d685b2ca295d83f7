"""Which instructions this CPU has, and which a package compiled elsewhere may use."""

from __future__ import annotations

import json
import platform
import zipfile
from functools import cache
from pathlib import Path

from torchquant.errors import ArtifactError

__all__ = ["NOTE", "check_package", "has_vnni", "instructions", "note"]

NOTE = "torchquant_cpu.json"
# what compilers and Inductor make use of on their own when they compile for the machine they run on, as Linux names it
_USED = (
    *("sse4_1", "sse4_2", "popcnt", "avx", "f16c", "fma", "avx2", "bmi1", "bmi2", "abm", "movbe", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vbmi2", "avx512_bitalg"),
    *("avx512_vpopcntdq", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
)


@cache
def instructions() -> frozenset[str]:
    """The instruction sets of this CPU that a compiler may use unasked; empty where Linux does not say."""
    info = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not info.is_file():
        return frozenset()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return frozenset(flags).intersection(_USED)


def has_vnni() -> bool:
    """Whether this CPU multiplies bytes and adds the products in one instruction; also where Linux does not say."""
    return not instructions() or bool(instructions() & {"avx512_vnni", "avx_vnni"})


def note(package: Path) -> None:
    """Write into a package what the compiler was free to use."""
    with zipfile.ZipFile(package, "a") as out:
        root = out.namelist()[0].partition("/")[0]
        out.writestr(f"{root}/extra/{NOTE}", json.dumps(sorted(instructions())))


def check_package(package: Path) -> None:
    """Raise ArtifactError if a package was compiled for instructions that this CPU lacks: it would be killed."""
    with zipfile.ZipFile(package) as source:
        notes = [json.loads(source.read(n)) for n in source.namelist() if n.endswith(f"extra/{NOTE}")]
    missing = sorted({flag for flags in notes for flag in flags} - instructions()) if instructions() else []
    if missing:
        raise ArtifactError(
            f"{package} was compiled on a CPU with instructions that this one lacks ({', '.join(missing)}), and would "
            "be killed here. Lower the model on this CPU, or on the oldest it shall run on."
        )
