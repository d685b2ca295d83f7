"""A `.pte`: loaded, called, saved, read again.

What torchquant knows of a program (how it is called, its report, its proof, the first state) stands behind the program
in the same file, as a zip archive: ExecuTorch's runtimes read the program by the sizes in its header and ignore it.
"""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from torchquant.artifacts.program import Metadata, Program, State, read_metadata, write_metadata
from torchquant.backends.executorch_xnnpack.capabilities import TARGET
from torchquant.backends.executorch_xnnpack.quiet import undisturbed, without_cpu_lines
from torchquant.calibration import batches as data
from torchquant.errors import ArtifactError, LoweringError, MissingDependencyError
from torchquant.files.owned import OwnFolder
from torchquant.files.whole import reading, write_whole
from torchquant.fx.signature import InputSpec, Signature
from torchquant.measure.traced import Traced
from torchquant.surroundings import own_modes

__all__ = ["ExecutorchError", "Method", "XnnpackProgram", "executorch_modules", "load", "with_metadata"]

_HEADER = slice(8, 12)  # of the extended header: its name, then its length, 4 bytes, and three sizes of 8
# ExecuTorch's scalar type numbers
_DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
}


class ExecutorchError(LoweringError):
    """ExecuTorch fails on a program, without saying at which op of the model."""


def executorch_modules() -> SimpleNamespace:
    """ExecuTorch's modules, imported when first needed.

    Raises:
        MissingDependencyError: ExecuTorch is not installed.
    """
    try:
        with undisturbed():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower
            from executorch.runtime import Runtime, Verification

            import_module("executorch.kernels.quantized")  # kernels of lookups in tables of few bits
    except ImportError as error:
        raise MissingDependencyError(
            f"ExecuTorch is not installed ({error}): pip install 'torchquant[executorch]'"
        ) from error
    return SimpleNamespace(
        partitioner=XnnpackPartitioner,
        lower=to_edge_transform_and_lower,
        runtime=Runtime,
        verification=Verification,
    )


@contextmanager
def _typed(what: str) -> Iterator[None]:
    """ExecuTorch's own errors, which are RuntimeErrors with a number or a line, as ones of ours."""
    try:
        yield
    except RuntimeError as error:
        raise ExecutorchError(f"ExecuTorch cannot {what}: {error}") from error


class Method:
    """The `forward` of a `.pte`: tensors in, a tuple of tensors out, one call at a time.

    Raises:
        ExecutorchError: ExecuTorch cannot load it, or not run it on these tensors.
    """

    def __init__(self, buffer: bytes) -> None:
        executorch = executorch_modules()
        with _typed("load the program"):
            self._program = executorch.runtime.get().load_program(
                buffer, verification=executorch.verification.InternalConsistency
            )
            with without_cpu_lines():
                self._method = self._program.load_method("forward")
        self._lock = threading.Lock()

    def __call__(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        inputs = [t.detach().contiguous() for t in tensors]
        sizes = ", ".join(str(tuple(t.shape)) for t in inputs)
        with self._lock, _typed(f"run the program on tensors of {sizes}"):
            return tuple(self._method.execute(inputs))

    def signature(self) -> Signature:
        """What the runtime reports of the inputs: of a program with dynamic sizes, the largest ones."""
        with _typed("say what the program takes"):
            about = self._method.metadata
            metas = [about.input_tensor_meta(i) for i in range(about.num_inputs())]
        return Signature.flat(
            InputSpec(f"input {i}", str(_DTYPES.get(m.dtype(), m.dtype())), tuple(m.sizes()))
            for i, m in enumerate(metas)
        )


class XnnpackProgram(Program):
    """A `.pte` for the XNNPACK delegate, run through ExecuTorch's Python runtime.

    State is what the program takes behind its inputs and returns behind its outputs, in the order of `state`.
    """

    target = TARGET.name

    def __init__(self, buffer: bytes, about: Metadata | None = None) -> None:
        self._buffer, self._method = buffer, Method(buffer)
        self._about = about or Metadata(self._method.signature(), (), None)
        self.inputs, self.sites, self.proof = self._about.signature.tensors, self._about.sites, self._about.proof
        self._state = State(self._about.states)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = self._about.signature.tensors_of(args, kwargs, "cpu")
        values = self._method(*tensors, *self._state.values.values())
        with torch.no_grad():
            return self._finish(self._about, tensors, values)

    def trace(self, inputs: Any) -> Traced:
        """The ops of a call, those inside of the delegate too."""
        args, kwargs = data.split(inputs)
        tensors = self._about.signature.tensors_of(args, kwargs, "cpu")
        call = import_module("torchquant.backends.executorch_xnnpack.traces").traced_program
        traced: Traced = call(self._buffer, [*tensors, *self._state.initial.values()])
        return traced

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the `.pte`; any ExecuTorch runtime with the XNNPACK delegate runs it."""
        return write_whole(path, lambda part: part.write_bytes(self._buffer))

    @property
    def size_bytes(self) -> int:
        return len(self._buffer)


def with_metadata(buffer: bytes, about: Metadata) -> bytes:
    """The program with what torchquant knows of it behind it."""
    with OwnFolder("torchquant-xnnpack-") as folder:
        file = folder / "model.pte"
        file.write_bytes(buffer)
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("torchquant/about", "what torchquant knows of the program before this archive\n")
        write_metadata(file, TARGET.name, about)
        return file.read_bytes()


@own_modes()
def load(path: str | os.PathLike[str]) -> XnnpackProgram:
    """Read a saved `.pte`: the program as it was lowered, with its inputs, state, report and proof.

    What torchquant wrote is held against the digests in the archive behind the program. A program that torchquant did
    not write has neither digest nor report: it takes tensors by position, of the sizes that the runtime reports, and
    what is wrong in it ExecuTorch may notice late or never. A `.pte` holds no machine code.

    Args:
        path: of a `.pte`, of torchquant's or another's writing.

    Raises:
        ArtifactError: no such file, truncated, damaged, or not a program that this ExecuTorch loads.
    """
    file = Path(path)
    if not file.is_file():
        raise ArtifactError(f"{file} is not a file")
    with reading(file, "an ExecuTorch program (.pte)"):
        content = file.read_bytes()
    if content[4:6] != b"ET":
        raise ArtifactError(f"{file} is truncated or not an ExecuTorch program (.pte)")
    about = read_metadata(file, TARGET.name) if _has_archive(file, content) else None
    try:
        return XnnpackProgram(content, about)
    except (LoweringError, RuntimeError) as error:
        raise ArtifactError(f"{file} is truncated or from another ExecuTorch: {error}") from error


def _has_archive(file: Path, content: bytes) -> bool:
    """Whether anything stands behind the program: seen from the program's header, and from the end of the file."""
    end = _end_of(content)
    if end > len(content):
        raise ArtifactError(f"{file} is truncated: it has {len(content)} bytes of {end}")
    return any(content[end:]) or zipfile.is_zipfile(file)


def _end_of(content: bytes) -> int:
    """Where the program ends, by its header: behind its last segment."""
    if content[_HEADER] != b"eh00":
        return len(content)
    program, segments, size = (int.from_bytes(content[at : at + 8], "little") for at in (16, 24, 32))
    return segments + size if segments else program
