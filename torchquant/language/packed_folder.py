"""Writing the weights of a converted decoder as a folder of safetensors whose linears are packed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchquant.errors import SchemeError
from torchquant.files.shelf import kept
from torchquant.files.tensors import write_tensors
from torchquant.language.checkpoints import Checkpoint
from torchquant.language.graph_weights import Weight
from torchquant.language.packed import LAYOUTS, Codes
from torchquant.ops.x86.rows import Grid

__all__ = ["FORMATS", "Folder", "folder_of", "write"]

_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*chat_template*")
_FROM_SOURCE = (*_TOKENIZER, "generation_config.json")
_OUTPUTS = 8  # how many share a word in GPTQ and AWQ, at least


@dataclass(frozen=True)
class _Scheme:
    """What all packed linears of a folder have in common.

    Args:
        bits: of a field. group: inputs that share a scale; -1: all.
        is_symmetric: zero points are half of the grid.
        plain: names of linears that are not packed.
    """

    bits: int
    group: int
    is_symmetric: bool
    plain: tuple[str, ...]


@dataclass(frozen=True)
class _Format:
    """A format of folders.

    Args:
        bits: of the fields that it knows.
        layouts: names in `LAYOUTS`, without zero points and with them.
        config: `quantization_config`, and other files by name.
        half: scales are float16.
        whole: outputs are multiples of this.
    """

    bits: tuple[int, ...]
    layouts: tuple[str, str]
    config: Callable[[_Scheme, str], dict[str, Any]]
    half: bool
    whole: Callable[[int], int]


@dataclass(frozen=True)
class Folder:
    """What is to be written: tensors by name, what `config.json` says of them, and for the report which are packed."""

    tensors: Mapping[str, Tensor]
    quantization: Mapping[str, Any]
    is_tied: bool
    packed: Mapping[str, int]
    bits: int
    rounded: tuple[str, ...]


def folder_of(name: str, checkpoint: Checkpoint, weights: Mapping[str, Weight]) -> Folder:
    """Linears but the head packed, all else as floats: tables, the head, and what is no grid of integers.

    All linears get fields of the same width and groups of the same size, in which the codes of each of them fit.

    Raises:
        SchemeError: nothing is left to pack, or it fits no field of the format.
    """
    _refuse_other_frequencies(checkpoint.model)
    format = FORMATS[name]
    linears = {m: w for n, w in weights.items() if w.has_grid and (m := _linear(checkpoint.model, n, w))}
    if not linears:
        raise SchemeError(f"{name} packs linears but the head, and the graph has none with integer weights")
    scheme = _scheme_of(name, linears, checkpoint.model)
    layout = format.layouts[0 if scheme.is_symmetric else 1]
    tensors: dict[str, Tensor] = {}
    rounded: list[str] = []
    for full, weight in weights.items():
        module = full.removesuffix(".weight")
        if module not in linears:
            tensors[full] = kept(weight.values().contiguous())
            continue
        codes = _codes(name, module, _grid(weight), scheme)
        rounded += [module] if format.half and not _is_half(module, codes.scale) else []
        scale = codes.scale.half() if format.half else _narrow(codes.scale, checkpoint.model.dtype)
        parts = LAYOUTS[layout].pack(replace(codes, scale=scale), scheme.is_symmetric)
        tensors |= {f"{module}.{part}": kept(value) for part, value in parts.items()}
    is_tied = bool(checkpoint.model.config.tie_word_embeddings) and "lm_head.weight" not in weights
    counts = {module: math.prod(weight.shape()) for module, weight in linears.items()}
    return Folder(tensors, format.config(scheme, layout), is_tied, counts, scheme.bits, tuple(rounded))


def _grid(weight: Weight) -> Grid:
    grid = weight.grid
    assert grid is not None
    return grid


def _linear(model: Any, name: str, weight: Weight) -> str:
    """The module if it is a linear that is to be packed, else an empty text."""
    module = name.removesuffix(".weight")
    if weight.is_turned:
        raise SchemeError(f"{module} is a Conv1D, which this format has no place for; take format='gguf'")
    is_linear = isinstance(model.get_submodule(module), torch.nn.Linear)
    return module if is_linear and model.get_submodule(module) is not model.get_output_embeddings() else ""


def _refuse_other_frequencies(model: Any) -> None:
    """Raise SchemeError for rotary frequencies that the config does not give, such as those of a GGUF's factors."""
    for name, module in model.named_modules():
        if name.endswith("rotary_emb") and hasattr(module, "inv_freq"):
            frequencies = module.inv_freq.detach().cpu()  # in the dtype of a model that was cast as a whole
            plain = type(module)(config=model.config).inv_freq.cpu().to(frequencies.dtype)
            if not torch.allclose(plain, frequencies, rtol=1e-4):
                raise SchemeError(f"{name} has frequencies that config.json cannot say; take format='gguf'")


def _scheme_of(name: str, weights: Mapping[str, Weight], model: Any) -> _Scheme:
    forms = [(grid.bits, grid.codes.shape[1], grid.scale.shape[1]) for grid in map(_grid, weights.values())]
    most = max(bits for bits, _, _ in forms)
    fields = [bits for bits in FORMATS[name].bits if bits >= most]
    if not fields:
        raise SchemeError(f"{name} has fields of {FORMATS[name].bits} bits, and the graph has codes of {most}")
    is_symmetric = all(_centred(_grid(weight), fields[0]) is not None for weight in weights.values())
    sizes = [inputs // groups for _, inputs, groups in forms]
    group = -1 if all(groups == 1 for _, _, groups in forms) else math.gcd(*sizes)
    linears = [m for m, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return _Scheme(fields[0], group, is_symmetric, tuple(m for m in linears if m not in weights))


def _centred(grid: Grid, bits: int) -> Tensor | None:
    """The codes with the zero point in the middle of the field, or None where they do not fit."""
    groups = grid.scale.shape[1]
    points = grid.zero_point.repeat_interleave(grid.codes.shape[1] // groups, 1)
    codes = grid.codes.to(torch.int16) - points.to(torch.int16) + 2 ** (bits - 1)
    return codes.to(torch.uint8) if bool(((codes >= 0) & (codes < 2**bits)).all()) else None


def _codes(name: str, module: str, grid: Grid, scheme: _Scheme) -> Codes:
    outputs, inputs = grid.codes.shape
    if FORMATS[name].half and (outputs % FORMATS[name].whole(scheme.bits) or inputs % 32):
        raise SchemeError(
            f"{module} is {outputs} by {inputs}, no whole words of {name}: exclude it, or take 'compressed-tensors'"
        )
    times = 1 if scheme.group == -1 else inputs // grid.scale.shape[1] // scheme.group
    scale, point = (part.repeat_interleave(times, 1) for part in (grid.scale, grid.zero_point))
    centred = _centred(grid, scheme.bits)
    if centred is not None:
        middle = torch.full(point.shape, 2 ** (scheme.bits - 1), dtype=torch.uint8)
        return Codes(centred, scale, middle, scheme.bits)
    if int(grid.zero_point.max()) - grid.low >= 2**scheme.bits:
        raise SchemeError(f"{module} has zero points outside of {scheme.bits} bits, which {name} cannot hold")
    codes = (grid.codes.to(torch.int16) - grid.low).to(torch.uint8)
    return Codes(codes, scale, (point - grid.low).to(torch.uint8), scheme.bits)


def _is_half(module: str, scale: Tensor) -> bool:
    half = scale.half().float()
    if not bool(((half - scale).abs() <= scale.abs() * 2.0**-11).all()):
        raise SchemeError(f"{module} has scales that float16 cannot hold, as this format has them")
    return torch.equal(half, scale)


def _narrow(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the dtype of the model where that holds them, as runtimes expect."""
    return scale.to(dtype) if torch.equal(scale.to(dtype).float(), scale) else scale


# what config.json says -----------------------------------------------------------------------------------------------


def _compressed(scheme: _Scheme, layout: str) -> dict[str, Any]:
    is_channel = scheme.group == -1
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.is_symmetric,
        "strategy": "channel" if is_channel else "group",
        "group_size": None if is_channel else scheme.group,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(scheme.plain),
    }


def _gptq(scheme: _Scheme, layout: str) -> dict[str, Any]:
    about: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group,
        "sym": scheme.is_symmetric,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": layout,
        "pack_dtype": "int32",
    }
    plain = [name for name in scheme.plain if name != "lm_head"]
    return about | ({"dynamic": {f"-:^{name.replace('.', '[.]')}$": {} for name in plain}} if plain else {})


def _awq(scheme: _Scheme, layout: str) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "version": layout,
        "bits": scheme.bits,
        "group_size": scheme.group,
        "zero_point": True,
        "modules_to_not_convert": list(scheme.plain),
    }


# the first version of GPTQ, which all runtimes read, holds no zero points of 0, and GPTQModel refuses any in it
FORMATS: dict[str, _Format] = {
    "compressed-tensors": _Format((4, 8), ("pack-quantized", "pack-quantized"), _compressed, False, lambda bits: 1),
    "gptq": _Format((2, 3, 4, 8), ("gptq", "gptq_v2"), _gptq, True, lambda bits: 32 if bits == 3 else 32 // bits),
    "awq": _Format((4,), ("gemm", "gemm"), _awq, True, lambda bits: _OUTPUTS),
}


def write(place: Path, checkpoint: Checkpoint, folder: Folder) -> None:
    """Config, weights, tokenizer."""
    model, source = checkpoint.model, checkpoint.source
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "tie_word_embeddings": folder.is_tied}
    config |= {"dtype": str(model.dtype).removeprefix("torch."), "quantization_config": dict(folder.quantization)}
    (place / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")
    if folder.quantization["quant_method"] == "gptq":
        (place / "quantize_config.json").write_text(json.dumps(folder.quantization, indent=2), "utf-8")
    write_tensors(place / "model.safetensors", folder.tensors, {"format": "pt"})
    if source is not None and source.is_file():
        checkpoint.tokenizer.save_pretrained(place)
    elif source is not None:
        for file in {f for pattern in _FROM_SOURCE for f in source.glob(pattern) if f.is_file()}:
            shutil.copyfile(file, place / file.name)
