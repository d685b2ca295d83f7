"""A `.pte`: loaded, called, saved, read again."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchquant import batches as data
from torchquant.backends.executorch_xnnpack.capabilities import TARGET
from torchquant.backends.executorch_xnnpack.quiet import undisturbed
from torchquant.errors import ArtifactError, LoweringError, MissingDependencyError
from torchquant.files import write_whole
from torchquant.program import Program

__all__ = ["XnnpackProgram", "executorch_modules", "load"]


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


class XnnpackProgram(Program):
    """A `.pte` for the XNNPACK delegate, run through ExecuTorch's Python runtime."""

    target = TARGET

    def __init__(self, buffer: bytes, structure: pytree.TreeSpec | None = None) -> None:
        self._structure = structure  # of the outputs; a .pte holds them flat
        executorch = executorch_modules()
        try:
            self._program = executorch.runtime.get().load_program(
                buffer, verification=executorch.verification.InternalConsistency
            )
            self._method = self._program.load_method("forward")
        except RuntimeError as error:
            raise LoweringError(f"ExecuTorch cannot load the program: {error}") from error
        self._buffer = buffer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self._method.execute([t.contiguous() for t in data.arrange(self.inputs, args, kwargs)])
        if self._structure is not None:
            return pytree.tree_unflatten(found, self._structure)
        return found[0] if len(found) == 1 else tuple(found)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the `.pte`; any ExecuTorch runtime with the XNNPACK delegate runs it."""
        return write_whole(path, lambda part: part.write_bytes(self._buffer))

    @property
    def size_bytes(self) -> int:
        return len(self._buffer)


def load(path: str | os.PathLike[str]) -> XnnpackProgram:
    """Read a saved `.pte`. It carries no report: `sites` is empty and `proof` is not set.

    Raises:
        ArtifactError: no such file, or not a program that this ExecuTorch loads.
    """
    file = Path(path)
    if not file.is_file():
        raise ArtifactError(f"{file} is not a file")
    content = file.read_bytes()
    if content[4:6] != b"ET":
        raise ArtifactError(f"{file} is truncated or not an ExecuTorch program (.pte)")
    try:
        program = XnnpackProgram(content)
    except (LoweringError, RuntimeError) as error:
        raise ArtifactError(f"{file} is truncated or from another ExecuTorch: {error}") from error
    program.inputs, program.sites, program.proof = _inputs_of(program), (), None
    return program


def _inputs_of(program: XnnpackProgram) -> tuple[data.InputSpec, ...]:
    """The input specs that the runtime reports: of a program with dynamic sizes, the largest ones."""
    about = program._method.metadata
    found = [about.input_tensor_meta(i) for i in range(about.num_inputs())]
    return tuple(
        data.InputSpec(f"input {i}", str(_DTYPES.get(m.dtype(), m.dtype())), tuple(m.sizes()))
        for i, m in enumerate(found)
    )


# ExecuTorch's scalar type numbers
_DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
}
