"""Writing the weights of a converted decoder as one GGUF file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchquant.files.shelf import is_shelved, kept
from torchquant.files.whole import reading
from torchquant.language import gguf_layout as layouts
from torchquant.language.checkpoints import Checkpoint
from torchquant.language.gguf_header import read_header
from torchquant.language.gguf_layout import Layout
from torchquant.language.gguf_types import Stored, stored_float, stored_grid, stored_values
from torchquant.language.graph_weights import Weight
from torchquant.language.libraries import gguf

__all__ = ["tensors_of", "write"]

_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S"}
_WITHOUT_GRID = "Q6_K"  # for codebooks and other formats of their own
_NOT_COPIED = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version", "split.")
_ADDING: dict[type, Callable[[Any, str, Any], None]] = {
    str: lambda writer, key, value: writer.add_string(key, value),
    bool: lambda writer, key, value: writer.add_bool(key, value),
    int: lambda writer, key, value: writer.add_uint32(key, value),
    list: lambda writer, key, value: writer.add_array(key, value),
}


def tensors_of(model: Any, weights: Mapping[str, Weight], type: str | None) -> dict[str, Stored]:
    """What the file holds, by its names for tensors.

    Args:
        weights: by the names of parameters; without a head that is the table.
        type: of ggml, for all that is quantized; None for what holds the codes.

    Raises:
        SchemeError: the architecture has no layout, or none that could hold this model.
    """
    config = model.config
    layout = layouts.layout_of(config)
    names = layouts.names_of(layout, config.num_hidden_layers, list(weights))
    tensors = {
        names[name]: _shelved(_stored(layout, config, names[name], weight, type)) for name, weight in weights.items()
    }
    factors = layouts.rope_factors(layout, model)
    if factors is not None:
        tensors[layouts.FACTORS] = stored_float(factors)
    return tensors


def _stored(layout: Layout, config: Any, name: str, weight: Weight, type: str | None) -> Stored:
    rows = layouts.rows_of(layout, config, name, weight.shape()[-1 if weight.is_turned else 0])
    order = slice(None) if rows is None else rows

    def values() -> Tensor:
        return weight.matrix()[order]

    if not weight.is_quantized:
        return stored_float(values() + (layout.norm_offset if name.endswith("norm.weight") else 0.0))
    grid = weight.grid
    if grid is None:
        return stored_values(values().float(), type or _WITHOUT_GRID)
    parts = {key: getattr(grid, key)[order] for key in ("codes", "scale", "zero_point")}
    return stored_grid(replace(grid, **parts), lambda: values().float(), type)


def _shelved(stored: Stored) -> Stored:
    """The same, its bytes on disk where a shelf is open."""
    data = kept(torch.from_numpy(stored.data))
    return replace(stored, data=data.numpy()) if is_shelved(data) else stored


def write(path: Path, checkpoint: Checkpoint, tensors: Mapping[str, Stored], tokenizer: Mapping[str, Any]) -> None:
    """Write keys and tensors.

    Args:
        tokenizer: key -> what stands for the tokenizer; without it the keys of the file that the model comes from.
    """
    library, layout = gguf(), layouts.layout_of(checkpoint.model.config)
    writer = library.GGUFWriter(path, layout.architecture)
    source = checkpoint.source
    if source is None or source.is_dir():
        _add_keys(writer, layout, checkpoint.model, tokenizer)
    else:
        _copy_keys(writer, source)
    writer.add_file_type(_file_type(tensors))
    writer.add_quantization_version(library.GGML_QUANT_VERSION)
    for name, tensor in tensors.items():
        kind = library.GGMLQuantizationType[tensor.type]
        writer.add_tensor(name, tensor.data, raw_dtype=None if tensor.type in ("F32", "F16") else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _file_type(tensors: Mapping[str, Stored]) -> Any:
    """What most weights are, as runtimes print it."""
    counts = Counter[str]()
    for tensor in tensors.values():
        counts[tensor.type] += tensor.data.nbytes
    name = counts.most_common(1)[0][0]
    return gguf().LlamaFileType[_FILE_TYPES.get(name, f"MOSTLY_{name}")]


def _add_keys(writer: Any, layout: Layout, model: Any, tokenizer: Mapping[str, Any]) -> None:
    writer.add_name(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    for key, value in layouts.keys_of(layout, model.config).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for key, value in tokenizer.items():
        _ADDING[type(value)](writer, f"tokenizer.{key}", value)


def _copy_keys(writer: Any, source: Path) -> None:
    """The keys of another file, without those that say how its tensors are stored."""
    with reading(source, "a GGUF file", "the model was read from it: put it back"):
        read_header(source)
        fields = gguf().GGUFReader(str(source)).fields
        for key, field in fields.items():
            if key.startswith(_NOT_COPIED):
                continue
            is_array = field.types[0] == gguf().GGUFValueType.ARRAY
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if is_array else None)
