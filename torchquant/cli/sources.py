"""Where the command line finds models and data: `package.module:name`, `.pt2`, `.npz`, `.safetensors`."""

from __future__ import annotations

import importlib
import inspect
import io
import os
import sys
import traceback
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchquant.artifacts import exported
from torchquant.errors import ArtifactError, InputError, TorchquantError
from torchquant.files import archive, tensors
from torchquant.files.whole import reading

__all__ = ["load_batches", "load_model", "resolve"]


def resolve(reference: str) -> Any:
    """The object that `package.module:name` names; modules are also looked for in the working directory.

    Raises:
        InputError: not of that form, no such module, or no such name in it.
    """
    module_name, separator, name = reference.partition(":")
    if not separator or not module_name or not name:
        raise InputError(
            f"{reference!r} is not of the form package.module:name; files are read as models (.pt2, an "
            "ExportedProgram) or as data (.npz, .safetensors)"
        )
    working_directory = os.getcwd()
    sys.path.insert(0, working_directory)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"cannot import {error.name!r} for {reference!r}; run from its folder or install it"
        ) from error
    except Exception as error:
        raise InputError(f"{module_name!r} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        if working_directory in sys.path:
            sys.path.remove(working_directory)
    if not hasattr(module, name):
        raise InputError(f"module {module_name!r} has no {name!r}")
    return getattr(module, name)


def load_model(reference: str, *, trust: bool = False, inputs: Iterable[Any] = ()) -> torch.nn.Module:
    """A float model from `package.module:function` (called), `package.module:instance`, or an ExportedProgram file.

    Args:
        trust: let torch unpickle what it likes from the file, which runs whatever its writer put there.
        inputs: batches that it will get.

    Raises:
        InputError: the reference does not resolve to a module, or a batch names an input that its forward does not
            have. ArtifactError: the file cannot be read, or not without
            running what is in it.
    """
    if reference.endswith(".pt2"):
        return _exported(Path(reference), trust)
    source = resolve(reference)
    model = source if isinstance(source, torch.nn.Module) else _called(source, reference)
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"{reference!r} gave a {type(model).__name__}, not a torch.nn.Module")
    _check_names(model, inputs, reference)
    return model


def _check_names(model: torch.nn.Module, batches: Iterable[Any], reference: str) -> None:
    """Raise InputError where a batch names an input that the model's forward does not have."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for batch in batches:
        for name in batch if isinstance(batch, dict) else ():
            if name not in known:
                raise InputError(
                    f"the data have an input {name!r}, and the forward of {reference} takes "
                    f"{', '.join(known) or 'none'}: rename or drop it"
                )


def _called(function: Any, reference: str) -> Any:
    """What a user's function returns; its errors with the place where they were raised."""
    if not callable(function):
        raise InputError(f"{reference!r} is a {type(function).__name__}, neither a torch.nn.Module nor a function")
    try:
        return function()
    except TorchquantError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"{reference!r} raised {type(error).__name__}: {error} (in {frame.name}, {frame.filename}:{frame.lineno})"
        ) from error


def _exported(path: Path, trust: bool) -> torch.nn.Module:
    if not path.is_file():
        raise ArtifactError(f"{path} is not a file")
    advice = "export the model again, or give --trust to let torch run what is in the file"
    with reading(path, f"an ExportedProgram that torch {torch.__version__} reads", advice):
        program = torch.export.load(path) if trust else exported.load(path, advice)
        return program.module()


def load_batches(reference: str) -> list[Any]:
    """Batches from `package.module:function` (an iterable, or called for one), `.npz` or `.safetensors`.

    In a file each tensor is one input by name, its first dimension counts the batches.

    Raises:
        InputError: no batches there, or tensors of different first sizes. ArtifactError: an unreadable file.
    """
    if reference.endswith((".npz", ".safetensors")):
        return _split_file(Path(reference))
    source = resolve(reference)
    batches = _called(source, reference) if callable(source) else source
    if not isinstance(batches, Iterable) or isinstance(batches, (torch.Tensor, dict, str)):
        raise InputError(f"{reference!r} gave a {type(batches).__name__}, not an iterable of batches")
    kept = _called(lambda: list(batches), reference)  # a generator runs only now
    if not kept:
        raise InputError(f"{reference!r} gave no batches")
    return list(kept)


def _split_file(path: Path) -> list[Any]:
    inputs = _arrays(path)
    counts = {len(t) if t.ndim else 0 for t in inputs.values()}
    if len(counts) != 1 or counts == {0}:
        raise InputError(f"{path} holds no batches: its tensors must share a first dimension that counts them")
    return [{name: t[i] for name, t in inputs.items()} for i in range(counts.pop())]


def _arrays(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ArtifactError(f"{path} is not a file")
    with reading(path, f"a {path.suffix} file", "write it again"):
        if path.suffix == ".safetensors":
            return tensors.read(path, path.read_bytes())
        with zipfile.ZipFile(path) as source:
            members = dict(archive.entries(path, source))
        arrays = {name.removesuffix(".npy"): _array(name, content) for name, content in members.items()}
    return {name: _tensor(path, name, value) for name, value in arrays.items()}


def _array(name: str, content: bytes) -> np.ndarray[Any, Any]:
    array: Any = np.load(io.BytesIO(content), allow_pickle=False)
    if not isinstance(array, np.ndarray):  # an archive inside the archive
        raise ValueError(f"{name} is no array")
    return array


def _tensor(path: Path, name: str, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """An array of numbers in whatever order of bytes."""
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except TypeError as error:
        raise ArtifactError(f"{path}: {name!r} is an array of {array.dtype}, of which torch has no tensors") from error
