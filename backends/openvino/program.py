"""OpenVINO's IR: a `.xml` and, beside it, a `.bin` with the weights; run, saved, read again.

What torchquant knows of a program stands behind the weights in the `.bin`, as a zip archive: OpenVINO reads the weights
by the places that the `.xml` names.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchquant.artifacts.program import Metadata, Program, State, read_metadata, write_metadata
from torchquant.backends.openvino.capabilities import TARGET
from torchquant.backends.openvino.models import Compiled, openvino_package
from torchquant.errors import ArtifactError, LoweringError
from torchquant.files import archive
from torchquant.files.owned import OwnFolder
from torchquant.files.whole import digest, reading, write_whole
from torchquant.surroundings import own_modes

__all__ = ["Ir", "OpenvinoProgram", "load"]

_DIGEST = "torchquant/xml"


@dataclass(frozen=True)
class Ir:
    """The bytes of a `.xml` and of its `.bin`."""

    xml: bytes
    weights: bytes

    @staticmethod
    def of(model: Any) -> Ir:
        """Of an `openvino.Model`, its floats as they are."""
        with OwnFolder("torchquant-openvino-") as folder:
            openvino_package().save_model(model, str(folder / "model.xml"), compress_to_fp16=False)
            return Ir((folder / "model.xml").read_bytes(), (folder / "model.bin").read_bytes())

    def known_as(self, about: Metadata) -> Ir:
        """With what torchquant knows of it behind the weights."""
        with OwnFolder("torchquant-openvino-") as folder:
            file = folder / "model.bin"
            file.write_bytes(self.weights)
            with zipfile.ZipFile(file, "a") as out:
                out.writestr(_DIGEST, digest(self.xml))
            write_metadata(file, TARGET.name, about)
            return Ir(self.xml, file.read_bytes())

    def model(self) -> Any:
        """The `openvino.Model`; raises LoweringError where OpenVINO does not read it."""
        with OwnFolder("torchquant-openvino-") as folder:
            (folder / "model.xml").write_bytes(self.xml)
            (folder / "model.bin").write_bytes(self.weights)
            try:
                core = openvino_package().Core()
                core.set_property({"ENABLE_MMAP": False})  # the folder goes
                return core.read_model(str(folder / "model.xml"))
            except RuntimeError as error:
                raise LoweringError(f"OpenVINO does not read the model: {str(error)[:500]}") from error


class OpenvinoProgram(Program):
    """A model run by OpenVINO's CPU plugin with its int8 layers.

    State is what the model takes behind its inputs and returns behind its outputs, in the order of `state`.
    """

    target = TARGET.name

    def __init__(self, ir: Ir, about: Metadata) -> None:
        self._ir, self._compiled, self._about = ir, Compiled(ir.model()), about
        self.inputs, self.sites, self.proof = about.signature.tensors, about.sites, about.proof
        self._state = State(about.states)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = self._about.signature.tensors_of(args, kwargs, "cpu")
        values = self._compiled(*tensors, *self._state.values.values())
        with torch.no_grad():
            return self._finish(self._about, tensors, values)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the `.xml`, and the `.bin` beside it first."""
        target = _named(path)
        write_whole(target.with_suffix(".bin"), lambda part: part.write_bytes(self._ir.weights))
        return write_whole(target, lambda part: part.write_bytes(self._ir.xml))

    @property
    def size_bytes(self) -> int:
        return len(self._ir.xml) + len(self._ir.weights)


def _named(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix != ".xml":
        raise ArtifactError(f"{target} is no name for an IR: OpenVINO asks for .xml, and finds the weights by it")
    return target


@own_modes()
def load(path: str | os.PathLike[str]) -> OpenvinoProgram:
    """Read a saved `.xml` and its `.bin`: the program as it was lowered, with its inputs, state, report and proof.

    Args:
        path: of what `save` wrote.

    Raises:
        ArtifactError: no such file, truncated, damaged, not written by torchquant, or OpenVINO does not take it.
        MissingDependencyError: the extra is not installed.
    """
    file = _named(path)
    weights = file.with_suffix(".bin")
    with reading(file, "an OpenVINO model"):
        xml = file.read_bytes()
    about = read_metadata(weights, TARGET.name)
    if archive.members(weights)[_DIGEST.partition("/")[2]].decode() != digest(xml):
        raise ArtifactError(f"{file} is damaged, or not the one that {weights} was written with; save them again")
    try:
        return OpenvinoProgram(Ir(xml, weights.read_bytes()), about)
    except LoweringError as error:
        raise ArtifactError(f"{file} is from another OpenVINO: {error}") from error
