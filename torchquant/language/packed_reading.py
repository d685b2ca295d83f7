"""Reading folders whose linears are packed: compressed-tensors' `pack-quantized`, GPTQ and AWQ; decoded to floats."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from torchquant.errors import TorchquantWarning
from torchquant.language.models import check_size, described_by, filled, without_values
from torchquant.language.packed import LAYOUTS, PackedLayout

__all__ = ["Packing", "packed_model", "packing_of"]

_WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Packing:
    """What a `quantization_config` says of the weights.

    Args:
        method: for the report.
        layout: of the tensors.
        bits: of fields; where several, the sizes of a weight tell.
    """

    method: str
    layout: PackedLayout
    bits: tuple[int, ...]


def packing_of(described: object) -> Packing | None:
    """How weights are packed, or None where they are in a way that is not read here.

    Raises:
        ValueError: it says nothing that makes sense.
    """
    if not isinstance(described, dict):
        return None
    read = _READERS.get(str(described.get("quant_method")))
    packing = None if read is None else read(described)
    if packing is not None and not (packing.bits and all(b in _WIDTHS for b in packing.bits)):
        raise ValueError(f"fields of {packing.bits} bits; known are {_WIDTHS}")
    return packing


def _compressed(described: Mapping[str, Any]) -> Packing | None:
    groups = [g for g in described["config_groups"].values() if g.get("weights")]
    formats = {g.get("format") or described.get("format") for g in groups}
    if formats != {"pack-quantized"} or any(g["weights"].get("type", "int") != "int" for g in groups):
        return None
    if described.get("kv_cache_scheme") or any(g.get("input_activations") for g in groups):
        text = "this checkpoint is meant for quantized activations; its model here has float ones"
        warnings.warn(text, TorchquantWarning, stacklevel=6)
    bits = sorted({g["weights"]["num_bits"] for g in groups})
    return Packing("compressed-tensors", LAYOUTS["pack-quantized"], tuple(bits))


def _gptq(described: Mapping[str, Any]) -> Packing | None:
    version = described.get("checkpoint_format") or described.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2") or described.get("is_marlin_format"):
        return None
    others = (described.get("dynamic") or {}).values()
    bits = sorted({described["bits"], *(rule["bits"] for rule in others if rule.get("bits"))})
    return Packing(version, LAYOUTS[version], tuple(bits))


def _awq(described: Mapping[str, Any]) -> Packing | None:
    version = str(described.get("version", "gemm")).lower()
    if version != "gemm" or described["bits"] != 4:
        return None
    return Packing("awq", LAYOUTS["gemm"], (4,))


_READERS = {"compressed-tensors": _compressed, "gptq": _gptq, "awq": _awq}


def packed_model(
    folder: Path, files: Sequence[str], config: Any, packing: Packing, dtype: torch.dtype
) -> tuple[Any, dict[str, int]]:
    """The model with decoded weights, and type -> how many weights are stored in it.

    Raises:
        ValueError: tensors do not fit each other or the model, or are missing.
    """
    tensors = _tensors_in(folder, files)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    shapes = {name: tuple(p.shape) for name, p in described_by(config).named_parameters(remove_duplicate=False)}
    modules = _modules(tensors, packing)
    packed = {f"{module}.{part}" for module in modules for part in packing.layout.parts}
    floats = {name: tensor for name, tensor in tensors.items() if name not in packed}
    elements = sum(t.numel() for t in floats.values()) + sum(prod(shapes.get(f"{m}.weight", (0,))) for m in modules)
    check_size(config, elements, len(tensors))
    model, stored = without_values(config, dtype), Counter[str]()
    for tensor in floats.values():
        stored[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    weights = {name: tensor.to(dtype) for name, tensor in floats.items()}
    for module in modules:
        parts = {p: tensors[f"{module}.{p}"] for p in packing.layout.parts if f"{module}.{p}" in tensors}
        weights[f"{module}.weight"] = _decoded(module, parts, packing, shapes).to(dtype)
        stored[packing.method] += weights[f"{module}.weight"].numel()
    _warn_of_unused(folder, set(weights) - set(model.state_dict()))
    return filled(model, weights), dict(stored)


def _tensors_in(folder: Path, files: Sequence[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in files:
        with safetensors.safe_open(folder / name, "pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    return tensors


def _modules(tensors: Mapping[str, Tensor], packing: Packing) -> list[str]:
    """Names of what is packed; raises ValueError where there is nothing, or only a part of it."""
    first = packing.layout.parts[0]
    modules = [name.removesuffix(f".{first}") for name in tensors if name.endswith(f".{first}")]
    if not modules:
        raise ValueError(f"no tensor named ...{first}, though config.json announces {packing.method}")
    for module in modules:
        needed = [part for part in packing.layout.parts if part not in packing.layout.optional]
        if lacking := [part for part in needed if f"{module}.{part}" not in tensors]:
            raise ValueError(f"{module} has no {lacking[0]}")
    return modules


def _decoded(
    module: str, parts: Mapping[str, Tensor], packing: Packing, shapes: Mapping[str, tuple[int, ...]]
) -> Tensor:
    wanted, reasons = shapes.get(f"{module}.weight"), []
    for bits in packing.bits:
        try:
            codes = packing.layout.unpack(parts, bits)
        except ValueError as error:
            reasons.append(str(error))
            continue
        if tuple(codes.codes.shape) == wanted:
            values = codes.values()
            if not bool(values.isfinite().all()):
                raise ValueError(f"{module} has scales that are not finite")
            return values
        reasons.append(f"{tuple(codes.codes.shape)} in {bits} bits")
    raise ValueError(f"{module} is {wanted} in the model, and as stored: {'; '.join(reasons)}")


def _warn_of_unused(folder: Path, names: set[str]) -> None:
    if names:
        text = f"{len(names)} tensors of {folder} belong to no part of the model: {', '.join(sorted(names)[:4])}"
        warnings.warn(text, TorchquantWarning, stacklevel=6)
