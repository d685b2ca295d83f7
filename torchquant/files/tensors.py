"""Tensors by name, as safetensors with a digest of their names, dtypes, shapes and bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import safetensors.torch
import torch

from torchquant.errors import ArtifactError
from torchquant.files.whole import digest, reading

__all__ = ["DTYPES", "bytes_of", "digest_of", "dtype_of", "read", "stored", "write_tensors"]

_DIGEST = "torchquant.digest"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # names of safetensors


def bytes_of(value: torch.Tensor) -> bytes:
    """The elements of a tensor in order."""
    flat = value.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if value.numel() else b""


def digest_of(values: Mapping[str, torch.Tensor]) -> str:
    """A digest of tensors by name, in whatever order."""
    parts = []
    for name, value in sorted(values.items()):
        parts += [f"{name} {value.dtype} {tuple(value.shape)}\n".encode(), bytes_of(value)]
    return digest(*parts)


def dtype_of(text: object) -> torch.dtype:
    """The dtype that `str` wrote; raises ValueError if it is none."""
    dtype = getattr(torch, str(text).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{text!r} is no dtype of torch")
    return dtype


def stored(values: Mapping[str, torch.Tensor]) -> bytes:
    """Tensors as safetensors."""
    copies = {name: value.contiguous() for name, value in values.items()}
    return safetensors.torch.save(copies, {_DIGEST: digest_of(copies)})


def read(path: str | os.PathLike[str], content: bytes, *, sealed: bool = False) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file, held against their digest if it has one, as whatever `stored` wrote does.

    Args:
        sealed: it was written by `stored`.

    Raises:
        ArtifactError: damaged, or none; `path` is what it names.
    """
    with reading(path, "a .safetensors file"):
        values = dict(safetensors.torch.load(content))
        about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}
        if (sealed or _DIGEST in about) and about.get(_DIGEST) != digest_of(values):
            raise ArtifactError(f"{path} is damaged: its tensors are not as they were written")
    return values


def write_tensors(path: str | os.PathLike[str], values: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> None:
    """Write tensors as safetensors one after the other, so that those on disk are never all in memory.

    Args:
        about: of the file, text by name.

    Raises:
        OSError: the file cannot be written.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    ordered = sorted(values.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that each is aligned
    header: dict[str, object] = {"__metadata__": dict(about)}
    end = 0
    for name, value in ordered:
        start, end = end, end + value.nbytes
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, value in ordered:
            if value.numel():
                file.write(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
