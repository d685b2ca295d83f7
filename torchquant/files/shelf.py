"""Tensors that lie in files and are read where they lie.

Pages of a mapped file are no memory of the process: the system drops them when others need the room, and reads them
again. While a shelf is open (`shelf`), what the library makes for each weight and keeps for long goes to unnamed files
in its folder, which vanish with the last tensor on them, whatever ends the process.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.overrides import TorchFunctionMode

from torchquant.errors import ArtifactError
from torchquant.files.freed import give_back

__all__ = ["EmptyOnDisk", "give_back_between", "is_open", "is_shelved", "kept", "mapped", "shelf"]

_LEAST_BYTES = 1 << 14  # a mapping costs a page or two
_FOLDER: ContextVar[Path | None] = ContextVar("torchquant_shelf", default=None)
_MARK = "_torchquant_shelved"


@contextmanager
def shelf(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Inside the block, `kept` writes tensors into this folder.

    Raises:
        ArtifactError: the folder does not exist, or cannot be written.
    """
    place = Path(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ArtifactError(f"nothing can be written into {place} ({error.strerror or error}); name another") from error
    token = _FOLDER.set(place)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def is_open() -> bool:
    """Whether a shelf is open."""
    return _FOLDER.get() is not None


def is_shelved(value: object) -> bool:
    """Whether a tensor is one that `kept` put on a shelf: nobody writes into it, so copies may share it."""
    return isinstance(value, torch.Tensor) and hasattr(value, _MARK)


def kept(value: torch.Tensor) -> torch.Tensor:
    """The same tensor on the open shelf, read-only; as it is where none is open, or for little.

    Raises:
        ArtifactError: the disk is full.
    """
    folder = _FOLDER.get()
    if folder is None or value.nbytes < _LEAST_BYTES or value.device.type != "cpu" or is_shelved(value):
        return value
    flat = value.detach().contiguous().view(-1).view(torch.uint8)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(flat.numpy().data)
            file.flush()
            shelved = mapped(file, value.dtype, value.shape)
    except OSError as error:
        text = f"{value.nbytes:,} bytes cannot be kept in {folder}: {error.strerror or error}"
        raise ArtifactError(f"{text}. Name a folder with more room") from error
    setattr(shelved, _MARK, True)
    give_back_between()
    return shelved


def give_back_between() -> None:
    """Where a shelf is open, return freed memory to the system: what a loop over weights does after each.

    The C library keeps freed blocks of up to 32 MB, and what it keeps grows with the number of weights.
    """
    if is_open():
        give_back()


def mapped(
    file: BinaryIO | Any, dtype: torch.dtype, shape: tuple[int, ...] | torch.Size, start: int = 0
) -> torch.Tensor:
    """A tensor that is read from an open file where it lies there; to write into it ends the process.

    Args:
        start: byte at which it begins.

    Raises:
        ValueError: the file ends before the tensor does.
    """
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    offset = start % mmap.ALLOCATIONGRANULARITY
    length = offset + count * dtype.itemsize
    memory = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start - offset)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(tuple(shape))


class EmptyOnDisk(TorchFunctionMode):
    """Inside the block, large tensors of `torch.empty` lie in unnamed sparse files: they take no memory, nor disk
    before they are written.

    So that a model of any size can be made, to be exported or looked at, before it has weights.

    Args:
        folder: where the files are.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.empty:
            return func(*args, **kwargs)
        shape = args[0] if args and isinstance(args[0], (tuple, list, torch.Size)) else args
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        on_cpu = kwargs.get("device") in (None, "cpu", torch.device("cpu"))
        is_plain = all(isinstance(n, int) for n in shape) and kwargs.keys() <= {"dtype", "device", "requires_grad"}
        if not (is_plain and on_cpu and math.prod(shape) * dtype.itemsize >= _LEAST_BYTES):
            return func(*args, **kwargs)
        with tempfile.TemporaryFile(dir=self._folder) as file:
            file.truncate(math.prod(shape) * dtype.itemsize)
            memory = mmap.mmap(file.fileno(), 0)
        return (
            torch.frombuffer(memory, dtype=dtype).view(tuple(shape)).requires_grad_(bool(kwargs.get("requires_grad")))
        )
