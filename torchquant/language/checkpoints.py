"""Causal language models from files: GGUF, and folders of safetensors as transformers writes them.

What a file says is held against its size, and the model that it describes against its tensors, before anything big is
allocated. Nothing is downloaded, and no code of a checkpoint is run.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from torchquant.errors import ArtifactError, TorchquantWarning
from torchquant.files.whole import reading
from torchquant.language.gguf_header import Header, decoded, read_header, refuse_undecoded
from torchquant.language.json_files import json_in
from torchquant.language.libraries import gguf, transformers
from torchquant.language.models import check_size, filled, without_values
from torchquant.language.packed_reading import Packing, packed_model, packing_of

__all__ = ["Checkpoint", "files_in", "load_causal_lm", "shapes_in"]

_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_UNREAD = {"qwen3": {"attention.key_length": "head_dim"}, "gpt2": {"context_length": "n_positions"}}
_FACTORS = "rope_freqs.weight"  # divisors of the rotary frequencies, which transformers does not read


@dataclass(frozen=True)
class Checkpoint:
    """A language model and what its files say about it.

    Args:
        model: in eval mode, e.g. LlamaForCausalLM.
        metadata: of a GGUF file its keys with single values; of a folder its config.
        stored_as: type -> how many weights are stored in it, e.g. `{"Q4_1": 106168320}`.
    """

    model: Any
    metadata: Mapping[str, Any]
    stored_as: Mapping[str, int]
    _source: tuple[str, dict[str, Any]] = field(repr=False, default=("", {}))

    @property
    def source(self) -> Path | None:
        """The GGUF file or the folder that it was read from; None for one that was made otherwise."""
        folder, options = self._source
        return Path(folder) / options.get("gguf_file", "") if folder else None

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers; raises ArtifactError if the files have none that it reads."""
        folder, options = self._source
        with reading(folder, "a checkpoint with a tokenizer", "take the tokenizer from the original model"):
            return transformers().AutoTokenizer.from_pretrained(folder, **options, **_LOCAL)


def load_causal_lm(path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Read a causal language model with its tokenizer.

    Args:
        path: a `.gguf` file of an architecture that transformers reads (llama, qwen2, qwen3, gemma3, gpt2, phi3 ...),
            or a folder with `config.json` and `.safetensors` files, whose linears may be packed by compressed-tensors
            (`pack-quantized`), GPTQ or AWQ.
        dtype: of the weights; quantized ones are decoded.

    Raises:
        ArtifactError: no such file; truncated, damaged or made to do harm; an architecture or a type that is not read;
            weights that are missing, or that do not fit the architecture.
        MissingDependencyError: transformers or gguf is not installed.
    """
    place = Path(path)
    if place.is_dir():
        return _from_folder(place, dtype)
    return _from_gguf(place, dtype)


# GGUF ----------------------------------------------------------------------------------------------------------------


def _from_gguf(path: Path, dtype: torch.dtype) -> Checkpoint:
    header = read_header(path)
    refuse_undecoded(path, header)
    options = {"gguf_file": path.name}
    with reading(path, "a GGUF file of a language model", "take another file"):
        _check_described(header)
        config = transformers().AutoConfig.from_pretrained(path.parent, **options, **_LOCAL)
        _set_unread(config, header)
        elements = sum(prod(t.shape) for t in header.tensors if t.name != _FACTORS)
        check_size(config, elements, len(header.tensors))
        model = _decoded(path, header, config, dtype)
    used = sum(p.numel() for p in model.parameters())
    if used != elements:
        raise ArtifactError(f"{path} holds {elements:,} weights, and transformers makes a model with {used:,} of it")
    _divide_frequencies(path, header, model)
    stored = Counter[str]()
    for tensor in header.tensors:
        stored[tensor.type] += prod(tensor.shape)
    return Checkpoint(model, header.metadata, dict(stored), (str(path.parent), options))


def _check_described(header: Header) -> None:
    """Raise ValueError where the keys do not describe the tensors."""
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ValueError("it does not say which architecture it is of")
    blocks = {t.name.split(".")[1] for t in header.tensors if t.name.startswith("blk.")}
    count = header.metadata.get(f"{architecture}.block_count")
    if count != len(blocks):
        raise ValueError(f"{count!r} blocks by its keys, and {len(blocks)} by its tensors")


def _set_unread(config: Any, header: Header) -> None:
    """Give the config the sizes in the file that transformers does not read; raises ValueError if they are none."""
    architecture = header.metadata["general.architecture"]
    for key, attribute in _UNREAD.get(architecture, {}).items():
        value = header.metadata.get(f"{architecture}.{key}", getattr(config, attribute))
        if type(value) is not int or value < 1:
            raise ValueError(f"{architecture}.{key} is {value!r:.80}")
        setattr(config, attribute, value)


def _weights(path: Path, header: Header, model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights by their names in the model, in the order of rows and with the offsets that transformers wants.

    As `load_gguf_checkpoint` of transformers, which reads the whole file, texts included, each time.
    """
    library = transformers("modeling_gguf_pytorch_utils")
    kind = library.TENSOR_PROCESSORS.get(header.metadata["general.architecture"], library.TensorProcessor)
    processor = kind(config=model.config.to_dict())
    with _one_name_map():
        names = library.get_gguf_hf_weights_map(model, processor)
    weights: dict[str, torch.Tensor] = {}
    for tensor in header.tensors:
        values = decoded(path, header, tensor)
        shared = {"tensor_key_mapping": names, "parsed_parameters": {"tensors": weights}}
        result = processor.process(weights=values, name=tensor.name, **shared)
        if result.name in names:
            weights[names[result.name]] = torch.from_numpy(result.weights.copy()).to(dtype)
    return weights


@contextmanager
def _one_name_map() -> Iterator[None]:
    """Let gguf make its map of tensor names once in the block: transformers asks for it once for each module."""
    library = gguf()
    make = library.get_tensor_name_map
    library.get_tensor_name_map = cache(make)
    try:
        yield
    finally:
        library.get_tensor_name_map = make


def _decoded(path: Path, header: Header, config: Any, dtype: torch.dtype) -> Any:
    """The model with the weights of the file, decoded; raises ValueError if any is missing or has another shape."""
    model = without_values(config, dtype)
    return filled(model, _weights(path, header, model, dtype))


def _divide_frequencies(path: Path, header: Header, model: nn.Module) -> None:
    """Divide the rotary frequencies by the factors in the file, as llama.cpp does."""
    if all(t.name != _FACTORS for t in header.tensors):
        return
    stored = next(t for t in header.tensors if t.name == _FACTORS)
    factors = torch.from_numpy(decoded(path, header, stored).copy())
    frequencies = [b for name, b in model.named_buffers() if name.endswith("rotary_emb.inv_freq")]
    if len(frequencies) != 1 or frequencies[0].shape != factors.shape:
        raise ArtifactError(f"{path} has {_FACTORS} of {tuple(factors.shape)}, which fits no frequencies of its model")
    frequencies[0].div_(factors)


# folders -------------------------------------------------------------------------------------------------------------


def _from_folder(folder: Path, dtype: torch.dtype) -> Checkpoint:
    described = json_in(folder / "config.json")
    quantization = described.get("quantization_config")
    packing = _packing_of(folder, quantization) if "quantization_config" in described else None
    shapes, stored = shapes_in(folder)
    with reading(folder, "a checkpoint of a language model", "download it again"):
        config = transformers().AutoConfig.from_pretrained(folder, **_LOCAL)
        if packing is None:
            check_size(config, sum(map(prod, shapes.values())), len(shapes))
            model = _loaded(folder, dtype, {"use_safetensors": True})
        else:
            model, stored = packed_model(folder, files_in(folder), config, packing, dtype)
    return Checkpoint(model, described, stored, (str(folder), {}))


def _packing_of(folder: Path, quantization: Any) -> Packing:
    name = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    with reading(folder / "config.json", f"a description of weights packed by {name!r:.80}", "download it again"):
        packing = packing_of(quantization)
    if packing is None:
        raise ArtifactError(
            f"{folder} is quantized by {name!r:.80} in a way that is not read; compressed-tensors' pack-quantized, "
            "GPTQ and AWQ (gemm) are. Take the checkpoint with float weights"
        )
    return packing


def files_in(folder: Path) -> list[str]:
    """Names of the files with weights; raises ArtifactError for an index that names others than files beside it."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    listed = json_in(index).get("weight_map")
    names = list(listed.values()) if isinstance(listed, dict) else []
    if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise ArtifactError(f"{index} names no files beside it")
    return sorted(set(names))


def shapes_in(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Name -> shape of all tensors, and dtype -> number of weights, from the headers of the files alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    stored = Counter[str]()
    for name in files_in(folder):
        with reading(folder / name, "a .safetensors file", "download it again"):
            if not (folder / name).is_file():
                raise FileNotFoundError(folder / name)
            with safetensors.safe_open(folder / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no dict
                    part = file.get_slice(key)
                    shapes[key] = tuple(part.get_shape())
                    stored[str(part.get_dtype())] += prod(shapes[key])
    return shapes, dict(stored)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars inside the block."""
    logging = transformers("utils.logging")
    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()


def _loaded(folder: Path, dtype: torch.dtype, options: Mapping[str, Any]) -> Any:
    load = transformers().AutoModelForCausalLM.from_pretrained
    with _without_bars():
        model, report = load(folder, dtype=dtype, output_loading_info=True, **options, **_LOCAL)
    for kind in ("missing_keys", "mismatched_keys"):
        if report.get(kind):
            raise ValueError(f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, report[kind]))[:4])}")
    if report.get("unexpected_keys"):
        names = sorted(report["unexpected_keys"])
        text = f"{len(names)} tensors of {folder} belong to no part of {type(model).__name__}: {', '.join(names[:4])}"
        warnings.warn(text, TorchquantWarning, stacklevel=5)
    return model.eval()
