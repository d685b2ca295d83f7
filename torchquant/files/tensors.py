"""Tensors by name, as safetensors with a digest of their names, dtypes, shapes and bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import safetensors.torch
import torch

from torchquant.errors import ArtifactError
from torchquant.files.whole import digest, reading

__all__ = ["bytes_of", "digest_of", "dtype_of", "read", "stored"]

_DIGEST = "torchquant.digest"


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
