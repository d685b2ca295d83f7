"""The weights of a converted decoder as a checkpoint that other runtimes load."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from torch.fx import GraphModule

from torchquant.errors import InputError, SchemeError, TorchquantWarning
from torchquant.files.whole import write_folder, write_whole
from torchquant.language import gguf_file, gguf_types, packed_folder
from torchquant.language.checkpoints import Checkpoint
from torchquant.language.gguf_tokenizer import keys_of_tokenizer
from torchquant.language.graph_weights import Weight, float_activations, refuse_other_function, weights_of
from torchquant.surroundings import unchanged

__all__ = ["FORMATS", "Format", "SavedCheckpoint", "save_causal_lm"]

Format = Literal["gguf", "compressed-tensors", "gptq", "awq"]


@dataclass(frozen=True)
class SavedCheckpoint:
    """What was written.

    Args:
        path: the file or folder.
        size_bytes: of all that was written.
        stored_as: type -> how many weights are stored in it.
        encoded_again: name -> SQNR in dB to what the graph computes with, of each tensor without the graph's codes.
        rounded: names of tensors with the graph's codes, whose scales or minima were rounded to float16.
    """

    path: Path
    size_bytes: int
    stored_as: Mapping[str, int]
    encoded_again: Mapping[str, float]
    rounded: tuple[str, ...]


@unchanged()
def save_causal_lm(
    quantized: GraphModule,
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    format: Format = "gguf",
    *,
    type: str | None = None,
    pre_tokenizer: str | None = None,
) -> SavedCheckpoint:
    """Write a converted decoder for other runtimes, with the codes, scales and zero points that it has.

    Weights alone are stored: where the graph quantizes activations, a warning says that the runtime will not.

    Args:
        quantized: what `convert_pt2e` made of a graph of `export_causal_lm`.
        checkpoint: the one that the graph was exported from: its config and tokenizer go along.
        path: a file for GGUF, which is written over; else a folder, which must not exist or be empty.
        format: `gguf` (llama.cpp and its kin); `compressed-tensors` (`pack-quantized`), `gptq` or `awq` (transformers,
            vLLM).
        type: of ggml, for all that is quantized, e.g. `Q4_K`; None: the smallest that holds the codes. What holds no
            codes of the graph is encoded again.
        pre_tokenizer: llama.cpp's name for how the tokenizer cuts words, where it is not known from the tokenizer.

    Raises:
        InputError: the graph is not converted, is none of `export_causal_lm`, does not come from this checkpoint, or
            computes what its model with other weights could not.
        SchemeError: the format cannot hold the model or one of its weights.
        ArtifactError: the place cannot be written; nothing is left behind.
        MissingDependencyError: transformers or gguf is not installed.
    """
    if not isinstance(checkpoint, Checkpoint):
        raise InputError(f"checkpoint is what load_causal_lm returned, not {checkpoint.__class__.__name__}")
    if format not in _WRITERS:
        raise SchemeError(f"{format!r} is no format that is written; there are {', '.join(_WRITERS)}")
    weights = weights_of(quantized, checkpoint.model)
    as_float, count = float_activations(quantized)
    refuse_other_function(as_float, checkpoint.model, weights)
    if count:
        text = f"{count} activations are quantized in the graph; a checkpoint stores weights, so that they stay float"
        warnings.warn(text, TorchquantWarning, stacklevel=3)
    return _WRITERS[format](checkpoint, _without_tied(checkpoint, weights), Path(path), type, pre_tokenizer)


def _without_tied(checkpoint: Checkpoint, weights: dict[str, Weight]) -> dict[str, Weight]:
    """The weights without those that are the same parameter in the model and have the same values in the graph."""
    parameters = dict(checkpoint.model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    kept: dict[str, Weight] = {}
    for name, weight in weights.items():
        other = first.setdefault(id(parameters[name]), name)
        if other == name or not weight.equals(weights[other]):
            kept[name] = weight
    return kept


def _as_gguf(
    checkpoint: Checkpoint, weights: dict[str, Weight], path: Path, type: str | None, pre_tokenizer: str | None
) -> SavedCheckpoint:
    gguf_types.check_type(type)
    tensors = gguf_file.tensors_of(checkpoint.model, weights, type)
    source = checkpoint.source
    config = checkpoint.model.config
    is_gguf = source is not None and source.is_file()
    tokenizer = {} if is_gguf else keys_of_tokenizer(source, config, pre_tokenizer)
    place = write_whole(path, lambda part: gguf_file.write(part, checkpoint, tensors, tokenizer))
    counts = Counter[str]()
    for tensor in tensors.values():
        counts[tensor.type] += tensor.elements
    again = {name: t.encoded_db for name, t in tensors.items() if t.encoded_db is not None}
    rounded = tuple(name for name, t in tensors.items() if t.is_rounded)
    return SavedCheckpoint(place, place.stat().st_size, dict(counts), again, rounded)


def _as_folder(
    name: str,
    checkpoint: Checkpoint,
    weights: dict[str, Weight],
    path: Path,
    type: str | None,
    pre_tokenizer: str | None,
) -> SavedCheckpoint:
    if type is not None or pre_tokenizer is not None:
        raise SchemeError(f"type and pre_tokenizer belong to GGUF; {name} has neither")
    folder = packed_folder.folder_of(name, checkpoint, weights)
    place = write_folder(path, lambda part: packed_folder.write(part, checkpoint, folder))
    counts = Counter({f"{name} {folder.bits} bits": sum(folder.packed.values())})
    for full in weights:
        if full.removesuffix(".weight") not in folder.packed:
            counts[str(folder.tensors[full].dtype).removeprefix("torch.")] += folder.tensors[full].numel()
    size = sum(file.stat().st_size for file in place.iterdir())
    return SavedCheckpoint(place, size, dict(counts), {}, folder.rounded)


_WRITERS: dict[str, Callable[..., SavedCheckpoint]] = {
    "gguf": _as_gguf,
    **{name: partial(_as_folder, name) for name in packed_folder.FORMATS},
}
FORMATS = tuple(_WRITERS)
