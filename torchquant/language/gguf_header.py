"""The header of a GGUF file, held against the file before anything is allocated for what it says.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: magic, version, counts; keys with typed values; a name,
sizes, type and offset for each tensor; then, aligned, the tensors.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from torchquant.errors import ArtifactError
from torchquant.files.whole import reading
from torchquant.language.libraries import gguf

__all__ = ["Header", "TensorInfo", "decoded", "read_header", "refuse_undecoded"]

_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # type -> struct
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_LONGEST_KEY = 65_535  # bytes, by the specification
_LONGEST_NAME = 255  # of a tensor; the specification says 64
_MOST_AXES = 4
_LARGEST_ALIGNMENT = 1 << 16


@dataclass(frozen=True)
class TensorInfo:
    """A tensor: its sizes as torch has them, the name of its ggml type, and its bytes, from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself.

    Args:
        version: of the format.
        metadata: key -> number, bool or text.
        lengths: key -> how many values, where it has an array.
        tensors: in the order of the file.
        start: where the data of the tensors begin, in bytes.
    """

    version: int
    metadata: Mapping[str, Any]
    lengths: Mapping[str, int]
    tensors: tuple[TensorInfo, ...]
    start: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a GGUF file.

    Raises:
        ArtifactError: no GGUF file of version 2 or 3, or one whose counts, lengths, types, sizes or offsets do not fit
            the file, or each other.
        MissingDependencyError: the package gguf is not installed.
    """
    with reading(path, "a GGUF file", "download it again"), Path(path).open("rb") as file:
        return _Reader(file, os.fstat(file.fileno()).st_size).header()


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(what)


class _Reader:
    """Reads a header from its start to its end; each length is held against what is left of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def header(self) -> Header:
        size = self._left
        _require(self._bytes(4) == b"GGUF", "it does not begin with GGUF")
        version = self._number("I")
        _require(version in _VERSIONS, f"version {version}; known are {_VERSIONS}, little-endian")
        tensor_count, key_count = self._number("Q"), self._number("Q")
        _require(tensor_count * 24 + key_count * 13 <= self._left, f"{tensor_count} tensors and {key_count} keys")
        metadata, lengths = self._metadata(key_count)
        alignment = metadata.get("general.alignment", 32)
        is_power = type(alignment) is int and 0 < alignment <= _LARGEST_ALIGNMENT and alignment & (alignment - 1) == 0
        _require(is_power, f"an alignment of {alignment!r}")
        tensors = tuple(self._tensor() for _ in range(tensor_count))
        start = (size - self._left + alignment - 1) // alignment * alignment
        _check_places(tensors, size - start, alignment)
        return Header(version, metadata, lengths, tensors, start)

    def _metadata(self, count: int) -> tuple[dict[str, Any], dict[str, int]]:
        metadata: dict[str, Any] = {}
        lengths: dict[str, int] = {}
        for _ in range(count):
            key = self._text(_LONGEST_KEY)
            _require(key not in metadata and key not in lengths, f"the key {key!r:.80} twice")
            kind = self._number("I")
            if kind == _ARRAY:
                lengths[key] = self._skip_array()
            else:
                metadata[key] = self._value(kind)
                _require(key != "general.alignment" or kind == _UINT32, "an alignment that is no uint32")
        return metadata, lengths

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text(self._left)
        _require(kind in _SCALARS, f"a value of type {kind}")
        if _SCALARS[kind] == "?":
            _require((byte := self._number("B")) in (0, 1), f"a bool of {byte}")
            return bool(byte)
        return self._number(_SCALARS[kind])

    def _skip_array(self) -> int:
        """Read over an array; returns how many values it has. Arrays of arrays are not in use and are refused."""
        kind, count = self._number("I"), self._number("Q")
        if kind == _STRING:
            _require(count * 8 <= self._left, f"{count} texts")
            for _ in range(count):
                self._skip(self._number("Q"))
        else:
            _require(kind in _SCALARS, f"an array of type {kind}")
            self._skip(count * struct.calcsize(_SCALARS[kind]))
        return int(count)

    def _tensor(self) -> TensorInfo:
        name = self._text(_LONGEST_NAME)
        axes = self._number("I")
        _require(1 <= axes <= _MOST_AXES, f"{name!r} with {axes} axes")
        sizes = [self._number("Q") for _ in range(axes)]
        kind, offset = self._number("I"), self._number("Q")
        library = gguf()
        known = {int(t): t for t in library.GGML_QUANT_SIZES}
        _require(kind in known, f"{name!r} of type {kind}")
        block, block_bytes = library.GGML_QUANT_SIZES[known[kind]]
        _require(all(size > 0 for size in sizes) and sizes[0] % block == 0, f"{name!r} of sizes {sizes}")
        return TensorInfo(name, tuple(reversed(sizes)), known[kind].name, offset, prod(sizes) // block * block_bytes)

    def _text(self, longest: int) -> str:
        length = self._number("Q")
        _require(length <= longest, f"a text of {length} bytes")
        return self._bytes(length).decode("utf-8")

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._bytes(struct.calcsize(f"<{form}")))[0]

    def _bytes(self, count: int) -> bytes:
        _require(count <= self._left, f"{count} bytes where {self._left} are left")
        content = self._file.read(count)
        _require(len(content) == count, "it became shorter while it was read")
        self._left -= count
        return content

    def _skip(self, count: int) -> None:
        _require(count <= self._left, f"{count} bytes where {self._left} are left")
        self._file.seek(count, os.SEEK_CUR)
        self._left -= count


def _check_places(tensors: tuple[TensorInfo, ...], room: int, alignment: int) -> None:
    """Raise ValueError unless the tensors lie in the file, aligned, one behind the other, each with a name of its own.

    Args:
        room: bytes of the file from the start of the data.
    """
    _require(len({t.name for t in tensors}) == len(tensors), "two tensors of one name")
    end = 0
    for tensor in sorted(tensors, key=lambda t: t.offset):
        _require(tensor.offset % alignment == 0, f"{tensor.name!r} at {tensor.offset}, not aligned to {alignment}")
        _require(tensor.offset >= end, f"{tensor.name!r} over another tensor")
        end = tensor.offset + tensor.size_bytes
        _require(end <= room, f"{tensor.name!r} ends {end - room} bytes behind the file")


def decoded(path: str | os.PathLike[str], header: Header, tensor: TensorInfo) -> np.ndarray[Any, Any]:
    """The values of a tensor as float32 or, if it is stored so, float16, in its shape."""
    library = gguf()
    kind = library.GGMLQuantizationType[tensor.type]
    stored = np.memmap(path, np.uint8, "r", header.start + tensor.offset, (tensor.size_bytes,))
    if tensor.type in ("F32", "F16"):
        return stored.view(np.float32 if tensor.type == "F32" else np.float16).reshape(tensor.shape)
    rows = stored.reshape(*tensor.shape[:-1], -1)
    values: np.ndarray[Any, Any] = library.dequantize(rows, kind)
    return values.reshape(tensor.shape)


def refuse_undecoded(path: str | os.PathLike[str], header: Header) -> None:
    """Raise ArtifactError where a tensor has a type that the package gguf cannot decode."""
    library = gguf()
    decoded = {"F32", "F16", *(t.name for t in library.quants._type_traits)}
    for tensor in header.tensors:
        if tensor.type not in decoded:
            raise ArtifactError(f"{path}: {tensor.name} is stored as {tensor.type}, which gguf cannot decode")
