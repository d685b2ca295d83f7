"""A saved x86 program: loaded and called with torch alone."""

from __future__ import annotations

import lzma
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._C._aoti import AOTIModelPackageLoader  # what torch._inductor.aoti_load_package wraps; that takes seconds

from torchquant.artifacts.program import Program, State, read_metadata
from torchquant.backends.inductor_x86.capabilities import TARGET
from torchquant.calibration import batches as data
from torchquant.errors import ArtifactError
from torchquant.files.owned import OwnFolder
from torchquant.files.whole import reading, write_whole
from torchquant.fx.signature import Signature
from torchquant.measure.traced import Traced, stage, traced
from torchquant.ops.x86 import cpu, exactness, forks, native
from torchquant.surroundings import own_modes

if TYPE_CHECKING:  # to import it takes time
    from torch.fx import GraphModule

__all__ = ["XZ", "X86Program", "load", "run_package"]

XZ = ".xz"  # of a library that is compressed by itself
_LARGEST_LIBRARY = 2**26  # bytes, of which a few crafted ones could else make any number

_PACKAGE = "package"  # stage of a call
_BESIDE = "; beside its ops: Inductor's calls, and its kernels unless lower(..., named_kernels=True) named them"
_RUNNERS = max(1, min(8, os.cpu_count() or 1))  # calls of one program that may run at once


def run_package(package: Path) -> Callable[..., list[Any]]:
    """A function of tensors by position, in a package that holds one."""
    loader = AOTIModelPackageLoader(str(package), "model", False, _RUNNERS, -1)
    return lambda *tensors: list(loader.boxed_run(list(tensors)))


class X86Program(Program):
    """An AOTInductor package: int8 kernels whatever the caller's grad mode and Inductor settings are."""

    target = TARGET.name

    def __init__(
        self,
        package: Path,
        folder: OwnFolder | None = None,
        signature: Signature | None = None,  # with types that cannot be stored
    ) -> None:
        self._package = package
        self._folder = folder  # deleted with the program
        stored = read_metadata(package, TARGET.name)
        self._about = stored if signature is None else replace(stored, signature=signature)
        cpu.check_package(package)
        exactness.check_package(package)
        _load_kernels(package)
        self.inputs, self.sites, self.proof = self._about.signature.tensors, self._about.sites, self._about.proof
        self._state, self._in_place = State(self._about.states), frozenset(self._about.in_place)
        self._run = run_package(package)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors, taken = self._taken(args, kwargs)
        with torch.no_grad():
            return self._finish(self._about, tensors, self._run(*taken))

    def _taken(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The inputs of a call, and all that the package takes: they, and the state."""
        # The package itself checks nothing: a wrong batch size would read memory that is not its own.
        forks.survive()
        tensors = list(self._about.signature.tensors_of(args, kwargs, "cpu"))
        before = [v if n in self._in_place else self._own(v) for n, v in self._state.values.items()]
        return tensors, [*map(self._own, tensors), *before]

    def _own(self, value: torch.Tensor) -> torch.Tensor:
        """The tensor as the package wants it: contiguous, and a copy if the package writes into it."""
        value = value.detach().contiguous()
        return value.clone() if self._about.overwrites_inputs else value

    def trace(self, inputs: Any) -> Traced:
        """The parts of a call, regions with the ops that they compute."""
        args, kwargs = data.split(inputs)

        def run() -> None:  # as `__call__`
            with stage("arguments"):
                tensors, taken = self._taken(args, kwargs)
            with torch.no_grad():
                with stage(_PACKAGE):
                    values = self._run(*taken)
                with stage("outputs"):
                    self._finish(self._about, tensors, values)

        seen = traced(run, opened=_PACKAGE)
        left = [(size, sites) for size, sites in self.facts.get("regions", ())]
        parts = []
        for part in seen.parts:
            match = next((r for r in left if part.name == "x86_region" and r[0] == part.first_size), None)
            if match is not None:
                left.remove(match)
            parts.append(part if match is None else replace(part, sites=tuple(name for name in match[1] if name)))
        return replace(seen, parts=tuple(parts), note=_BESIDE)

    def op_ms(self, graph: GraphModule, inputs: Any) -> dict[str, float]:
        """Node -> milliseconds of each product in our regions, measured one by one on one thread.

        Args:
            graph: the converted graph that the program was lowered from.
        """
        times: dict[str, float] = import_module("torchquant.backends.inductor_x86.op_times").product_ms(graph, inputs)
        return times

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the package (`.pt2`); `load` reads it in any process on a CPU with the same instructions."""
        return write_whole(path, lambda part: shutil.copyfile(self._package, part))

    @property
    def size_bytes(self) -> int:
        return self._package.stat().st_size


@own_modes()
def load(path: str | os.PathLike[str]) -> X86Program:
    """Read a saved X86Program.

    The file holds shared libraries, which are mapped and run: load none whose writer you do not trust. Before anything
    is mapped, every member is held against the digest that was recorded when it was written: that shows damage alone.

    Args:
        path: of what `save` wrote.

    Raises:
        ArtifactError: no such file, truncated, damaged, foreign, for another target or of another format.
    """
    with reading(path, "a program for x86"):
        try:
            return X86Program(Path(path))
        except RuntimeError as error:
            raise ArtifactError(f"{path} cannot be loaded on this machine: {error}") from error


def _load_kernels(package: Path) -> None:
    """Load the kernels that a package calls, if it calls any."""
    with zipfile.ZipFile(package) as source:
        for name in source.namelist():
            library = name.rpartition("/")[2].removesuffix(XZ)
            if library.startswith(native.PREFIX) and not native.is_at_hand(library):
                native.load_packaged(library, _library(package, source, name))


def _library(package: Path, source: zipfile.ZipFile, name: str) -> bytes:
    """The library of kernels in a package: compressed by itself, or as packages of old have it."""
    content = source.read(name)
    if not name.endswith(XZ):
        return content
    decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_XZ)
    try:
        library = decompressor.decompress(content, _LARGEST_LIBRARY)
    except lzma.LZMAError as error:
        raise ArtifactError(f"{package}: its kernels are damaged: {error}") from error
    if not decompressor.eof:
        raise ArtifactError(f"{package}: its kernels are damaged: they are not whole, or larger than any library")
    return library
