"""What is installed, what the machine offers, what each optional part would add, and what will not work and why."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torchquant.errors import TorchquantError
from torchquant.ops import builds
from torchquant.ops.x86 import cpu, native

__all__ = ["Check", "Diagnosis", "diagnose"]

_ROOM = 2 << 30  # bytes that lowering and its caches may ask of a disk
_EXTRAS = {
    "executorch": "lowering to XNNPACK: .pte files for phones",
    "onnx": "ONNX files with quantize and dequantize nodes, proven in ONNX Runtime",
    "openvino": "the same for OpenVINO",
    "llm": "language models: checkpoints and GGUF files in and out",
    "search": "mixed precision: tq.search",
    "report": "the report as a page",
    "docs": "these pages as a site: make docs",
    "harness": "lm-evaluation-harness on quantized models",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        what: its name. found: what is there. is_right: None where it is only told.
        remedy: what to do, where it is not right.
    """

    what: str
    found: str
    is_right: bool | None = None
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All that was looked at, part by part."""

    parts: dict[str, list[Check]]

    @property
    def is_right(self) -> bool:
        """Whether what torchquant needs is there; what it can do without does not count."""
        return all(check.is_right is not False for check in self.parts["needed"])

    def to_dict(self) -> dict[str, Any]:
        """As strings and lists."""
        return {name: [asdict(check) for check in checks] for name, checks in self.parts.items()}

    def show(self, console: Console) -> None:
        """Print a table."""
        table = Table("", "found", "what to do", box=None, pad_edge=False)
        for name, checks in self.parts.items():
            table.add_row(f"[bold]{name}[/bold]")
            for check in checks:
                mark = {True: "[green]✓[/green]", False: "[red]✗[/red]", None: " "}[check.is_right]
                table.add_row(f"{mark} {escape(check.what)}", escape(check.found), escape(check.remedy))
        console.print(table)


def diagnose() -> Diagnosis:
    """Look at packages, compiler, CPU, GPU, folders and optional parts; builds nothing and changes nothing."""
    return Diagnosis(
        {
            "needed": [*_packages(), _python()],
            "x86 programs": [*_compiler(), *_cpu(), *_folders()],
            "NVIDIA GPUs": [_gpu()],
            "optional": list(_extras()),
        }
    )


def _python() -> Check:
    return Check("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", None)


def _packages() -> Iterator[Check]:
    for requirement in _requirements(None):
        found = _version(requirement.name)
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        remedy = "" if fits else f"pip install '{requirement.name}{requirement.specifier}'"
        yield Check(requirement.name, found or "not installed", fits, remedy)


def _requirements(extra: str | None) -> list[Requirement]:
    """What the installed torchquant asks for: always, or for an extra."""
    try:
        wanted = [Requirement(text) for text in requires("torchquant") or []]
    except PackageNotFoundError:  # run from its sources
        return [] if extra else [Requirement(name) for name in ("torch", "torchao", "numpy")]
    if extra is None:
        return [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [
        r for r in wanted if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
    ]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _compiler() -> Iterator[Check]:
    remedy = "apt-get install g++ (or dnf install gcc-c++), or set CXX"
    try:
        name = builds.compiler()
    except TorchquantError:
        yield Check("C++ compiler", "none: lowering for x86 needs one; loading programs does not", False, remedy)
        return
    yield Check("C++ compiler", shutil.which(name) or name, True)
    built = _attempt(lambda: native.library_file().is_file())
    state = "built" if built is True else "not built yet: the first lowering takes a few minutes"
    yield Check("our kernels", state if isinstance(built, bool) else str(built), None)


def _cpu() -> Iterator[Check]:
    if not native.supported():
        yield Check("CPU", f"{platform.machine()}: our kernels are for x86-64", False, "lower for another target")
        return
    flags = cpu.instructions()
    sets = [flag for flag in ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16") if flag in flags]
    found = ", ".join(sets) or ("none of AVX2 and later" if flags else "instruction sets unknown")
    yield Check("CPU", f"{_model_name()}: {found}", not flags or "avx2" in flags, _slow(flags))
    threads = torch.get_num_threads()
    yield Check("threads", f"{threads} in torch, of {os.cpu_count()} CPUs", None)


def _slow(flags: frozenset[str]) -> str:
    if not flags:
        return ""
    if "avx2" not in flags:
        return "programs run by portable code, several times slower"
    if not flags & {"avx_vnni", "avx512_vnni"}:
        return "without VNNI an int8 product takes three instructions: expect less than on newer CPUs"
    return ""


def _model_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _folders() -> Iterator[Check]:
    folder = builds.cache_folder()
    is_kept = folder != builds.own_folder()
    remedy = "" if is_kept else "name a folder that can be written in TORCHQUANT_CACHE, or each process builds anew"
    yield Check("cache", str(folder), is_kept, remedy)
    free = shutil.disk_usage(folder).free
    yield Check(
        "room there", f"{free / 1e9:.1f} GB", free >= _ROOM, "" if free >= _ROOM else "lowering needs about 2 GB"
    )


def _gpu() -> Check:
    if not torch.cuda.is_available():
        why = "torch is built without CUDA" if torch.version.cuda is None else "no GPU, or no driver"
        return Check("GPU", f"none ({why}): programs can be prepared, not lowered or run", None)
    major, minor = torch.cuda.get_device_capability()
    has_triton = _version("triton") is not None
    remedy = "" if has_triton else "pip install triton"
    return Check("GPU", f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}", has_triton, remedy)


def _extras() -> Iterator[Check]:
    for extra, gives in _EXTRAS.items():
        wanted = _requirements(extra)
        missing = [r.name for r in wanted if _version(r.name) is None]
        others = [
            f"{r.name} {found} instead of {r.specifier}"
            for r in wanted
            if (found := _version(r.name)) is not None and not r.specifier.contains(found, prereleases=True)
        ]
        lacks = ", ".join([*(f"{name} is missing" for name in missing), *others])
        if not wanted:
            lacks = "unknown: the installed torchquant does not list it"
        remedy = f"pip install 'torchquant[{extra}]'" if lacks else ""
        yield Check(f"[{extra}] {gives}", lacks or "there", None if lacks else True, remedy)


def _attempt(look: Callable[[], bool]) -> bool | str:
    try:
        return look()
    except (TorchquantError, OSError) as error:
        return str(error)
