"""A `.onnx` file: run, saved, read again.

What torchquant knows of a program (how it is called, its report, its proof, the first state) stands at the end of the
file, as a zip archive in a field that readers of ONNX do not know and skip: the same file is both.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchquant.artifacts.program import Metadata, Program, State, read_metadata, write_metadata
from torchquant.backends.onnx_qdq.capabilities import TARGET
from torchquant.backends.onnx_qdq.packages import runtime_package
from torchquant.backends.onnx_qdq.sessions import Session
from torchquant.backends.onnx_qdq.traces import traced_model
from torchquant.calibration import batches as data
from torchquant.errors import ArtifactError, LoweringError
from torchquant.files import archive
from torchquant.files.owned import OwnFolder
from torchquant.files.whole import digest, reading, write_whole
from torchquant.fx.signature import InputSpec, Signature
from torchquant.measure.traced import Traced
from torchquant.surroundings import own_modes

__all__ = ["OnnxProgram", "Stored", "load", "with_metadata"]

_FIELD = (1000 << 3) | 2  # of a model: a number that ONNX gives no field, with bytes in it
_LARGEST_BYTES = 2**31 - 2**20  # of a file of ONNX with its weights in it
_ROOM = 256  # by which two archives of the same model may differ, compressed
_DIGEST = "torchquant/weights"
_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """A model as it is kept.

    Args:
        content: of the `.onnx` file.
        weights: the file with its weights, in a folder of its own; None where they are in `content`.
        folder: what keeps that folder.
    """

    content: bytes
    weights: Path | None = None
    folder: OwnFolder | None = None

    @staticmethod
    def of(model: Any) -> Stored:
        """An `onnx.ModelProto`; with its weights in a file of their own if it is too large for one."""
        if sum(len(t.raw_data) for t in model.graph.initializer) < _LARGEST_BYTES:
            return Stored(model.SerializeToString())
        onnx = runtime_package().onnx
        folder = OwnFolder("torchquant-onnx-")
        path = folder.path
        options = {"save_as_external_data": True, "all_tensors_to_one_file": True, "location": "model.onnx.data"}
        onnx.save_model(model, str(path / "model.onnx"), **options)
        return Stored((path / "model.onnx").read_bytes(), path / "model.onnx.data", folder)

    @property
    def size_bytes(self) -> int:
        return len(self.content) + (0 if self.weights is None else self.weights.stat().st_size)

    def loadable(self) -> bytes | Path:
        """What a session takes."""
        if self.weights is None:
            return self.content
        file = self.weights.with_name("model.onnx")
        if not file.exists():
            file.write_bytes(self.content)
        return file


class OnnxProgram(Program):
    """A QDQ model, run by ONNX Runtime on the CPU with its integer kernels.

    State is what the model takes behind its inputs and returns behind its outputs, in the order of `state`.
    """

    target = TARGET.name

    def __init__(self, stored: Stored, about: Metadata | None = None) -> None:
        self._stored, self._session = stored, Session(stored.loadable())
        self._about = about or Metadata(_signature_of(self._session), (), None)
        self.inputs, self.sites, self.proof = self._about.signature.tensors, self._about.sites, self._about.proof
        self._state = State(self._about.states)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._called(self._session, args, kwargs)

    def translated(self, *args: Any, **kwargs: Any) -> Any:
        """As a call, with the operators as the file has them, none fused: what any runtime should compute."""
        return self._called(Session(self._stored.loadable(), optimize=False), args, kwargs)

    def _called(self, session: Session, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        tensors = self._about.signature.tensors_of(args, kwargs, "cpu")
        values = session(*tensors, *self._state.values.values())
        with torch.no_grad():
            return self._finish(self._about, tensors, values)

    def trace(self, inputs: Any) -> Traced:
        """The operators of a call as ONNX Runtime runs them."""
        args, kwargs = data.split(inputs)
        tensors = self._about.signature.tensors_of(args, kwargs, "cpu")
        sites = [site.node for site in self.sites]
        return traced_model(self._stored.loadable(), [*tensors, *self._state.initial.values()], sites)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the `.onnx` file, and beside it `NAME.data` where the weights take more than 2 GB."""
        target, weights = Path(path), self._stored.weights
        if weights is None:
            return write_whole(target, lambda part: part.write_bytes(self._stored.content))
        name = f"{target.name}.data"
        content = _with_location(self._stored.content, name)
        about = with_metadata(content, self._about, weights) if self.proof is not None else content
        write_whole(target.with_name(name), lambda part: shutil.copyfile(weights, part))
        return write_whole(target, lambda part: part.write_bytes(about))

    @property
    def size_bytes(self) -> int:
        return self._stored.size_bytes


def _signature_of(session: Session) -> Signature:
    """What the model itself says of its inputs; sizes that vary have any value."""
    specs = []
    for given in session.inputs:
        if given.type not in _DTYPES:
            raise ArtifactError(f"input {given.name!r} is a {given.type}, of which torch has no tensors")
        shape = tuple(s if isinstance(s, int) else None for s in given.shape)
        specs.append(InputSpec(given.name, str(_DTYPES[given.type]), shape))
    return Signature.flat(specs)


def _with_location(content: bytes, name: str) -> bytes:
    """The model with its weights in a file of this name, without what torchquant knew of it."""
    model = runtime_package().onnx.load_from_string(content)
    model.DiscardUnknownFields()
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    return bytes(model.SerializeToString())


def with_metadata(content: bytes, about: Metadata, weights: Path | None = None) -> bytes:
    """The model with what torchquant knows of it in its last field.

    The length of that field stands before it, in what the archive has a digest of; so it is chosen first, and the
    archive's comment fills what is left of it.
    """
    with OwnFolder("torchquant-onnx-") as folder:
        file = folder / "model.onnx"
        length = _written(file, content, 0, about, weights) + _ROOM
        left = length - _written(file, content, length, about, weights)
        with zipfile.ZipFile(file, "a") as out:
            out.comment = b" " * left
        return file.read_bytes()


def _written(file: Path, content: bytes, length: int, about: Metadata, weights: Path | None) -> int:
    """Write the model and the archive behind it; the bytes of the archive."""
    start = content + _varint(_FIELD) + _varint(length, 5)
    file.write_bytes(start)
    with zipfile.ZipFile(file, "a") as out:
        out.writestr(_DIGEST, "" if weights is None else _digest_of(weights))
    write_metadata(file, TARGET.name, about)
    return file.stat().st_size - len(start)


def _varint(value: int, width: int = 0) -> bytes:
    """A number as protobuf writes it, in `width` bytes or as few as it takes."""
    parts: list[int] = []
    while value >= 128 or len(parts) + 1 < width:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _digest_of(file: Path) -> str:
    return digest(file.read_bytes())


@own_modes()
def load(path: str | os.PathLike[str]) -> OnnxProgram:
    """Read a saved `.onnx`: the program as it was lowered, with its inputs, state, report and proof.

    A model that torchquant did not write takes tensors by position, and has no report.

    Args:
        path: of what `save` wrote.

    Raises:
        ArtifactError: no such file, truncated, damaged, changed by another tool, or ONNX Runtime does not take it.
        MissingDependencyError: the extra is not installed.
    """
    file = Path(path)
    if not file.is_file():
        raise ArtifactError(f"{file} is not a file")
    onnx = runtime_package().onnx
    with reading(file, "an ONNX model"):
        content = file.read_bytes()
        model = onnx.load_from_string(content)
    names = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    about, weights = None, _weights_beside(file, names)
    if archive.is_ours(file):
        about = read_metadata(file, TARGET.name)
        _refuse_other_weights(file, weights)
    try:
        return OnnxProgram(_stored(content, weights), about)
    except LoweringError as error:
        raise ArtifactError(f"{file} is damaged or from another ONNX: {error}") from error


def _weights_beside(file: Path, names: set[str]) -> Path | None:
    """The one file with weights that a model names, which lies beside it."""
    if not names:
        return None
    name = next(iter(names))
    if len(names) > 1 or Path(name).name != name:
        raise ArtifactError(
            f"{file} has its weights in {', '.join(sorted(names))}; torchquant reads one file beside it"
        )
    if not file.with_name(name).is_file():
        raise ArtifactError(f"{file} has its weights in {name}, which does not lie beside it")
    return file.with_name(name)


def _refuse_other_weights(file: Path, weights: Path | None) -> None:
    recorded = archive.members(file)[_DIGEST.partition("/")[2]].decode()
    if recorded != ("" if weights is None else _digest_of(weights)):
        raise ArtifactError(f"{weights or file} is damaged: the weights are not those that {file} was written with")


def _stored(content: bytes, weights: Path | None) -> Stored:
    """A copy in a folder of the program's own, so that it stays whole whatever becomes of the files."""
    if weights is None:
        return Stored(content)
    folder = OwnFolder("torchquant-onnx-")
    own = folder.path / "model.onnx.data"
    shutil.copyfile(weights, own)
    return Stored(_with_location(content, own.name), own, folder)
