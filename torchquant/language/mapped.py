"""Folders of safetensors whose weights stay in their files: a model to export, and the weights for its graph.

The model is made with sparse files in the place of weights, exported, and dropped; its graph then reads each weight
where it lies in the checkpoint, in the dtype that it has there, and widens it right before it is used.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from torchquant.errors import ArtifactError, InputError, TorchquantWarning
from torchquant.files.shelf import EmptyOnDisk, mapped
from torchquant.files.tensors import DTYPES
from torchquant.files.whole import reading
from torchquant.language.checkpoints import Checkpoint, files_in, shapes_in
from torchquant.language.json_files import json_in
from torchquant.language.libraries import transformers
from torchquant.language.models import check_size, without_values

__all__ = ["MappedCheckpoint", "mapped_checkpoint", "put_weights"]

_WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)
_IN_MEMORY = "read it with load_causal_lm, which takes it into memory, and quantize that"


@dataclass(frozen=True)
class MappedCheckpoint:
    """A checkpoint whose weights stay on disk.

    Args:
        checkpoint: its model has the shapes, names and buffers of the real one, and no weights: to export, not to run.
        weights: parameter -> tensor in the file, in the file's dtype; tied ones by each of their names.
    """

    checkpoint: Checkpoint
    weights: Mapping[str, Tensor]


def mapped_checkpoint(folder: Path, dtype: torch.dtype, workspace: Path) -> MappedCheckpoint:
    """A folder as `load_causal_lm` reads it, without reading its weights.

    Args:
        dtype: in which the model computes.
        workspace: folder for sparse files.

    Raises:
        InputError: it is no folder of safetensors, or its weights are packed.
        ArtifactError: it is damaged, or its tensors are not those of the model.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder with config.json and .safetensors files; of a GGUF file: {_IN_MEMORY}")
    described = json_in(folder / "config.json")
    if "quantization_config" in described:
        raise InputError(f"the weights of {folder} are packed: {_IN_MEMORY}")
    shapes, stored = shapes_in(folder)
    with reading(folder, "a checkpoint of a language model", "download it again"):
        config = transformers().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_size(config, sum(map(prod, shapes.values())), len(shapes))
        with EmptyOnDisk(workspace):
            model = without_values(config, dtype).eval()
            model.tie_weights()
        tensors = {n: t for file in files_in(folder) for n, t in _tensors_in(folder / file).items()}
    weights = _matched(folder, model, tensors)
    checkpoint = Checkpoint(model, described, stored, (str(folder), {}))
    return MappedCheckpoint(checkpoint, weights)


def _tensors_in(path: Path) -> dict[str, Tensor]:
    """The float tensors of a file that safetensors has found sound, where they lie."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        tensors = {}
        for name, about in header.items():
            dtype, start = DTYPES.get(about["dtype"]), 8 + size + about["data_offsets"][0]
            if dtype in _WEIGHTS:
                tensors[name] = mapped(file, dtype, tuple(about["shape"]), start)
    return tensors


def _matched(folder: Path, model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensor of each parameter; raises ArtifactError where there is none of its shape."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."
    own = {n: tensors[k] for n in parameters for k in (n.removeprefix(prefix), n) if k in tensors}
    by_parameter = {id(parameters[name]): tensor for name, tensor in own.items()}
    weights = {name: by_parameter[id(p)] for name, p in parameters.items() if id(p) in by_parameter}
    missing = [name for name in parameters if name not in weights]
    if missing:
        raise ArtifactError(
            f"{folder} has no float tensor {missing[0]} ({len(missing)} of {len(parameters)} parameters of "
            f"{type(model).__name__} are missing, or stored under other names): {_IN_MEMORY}"
        )
    for name, tensor in weights.items():
        if tensor.shape != parameters[name].shape:
            raise ArtifactError(
                f"{name} is {tuple(tensor.shape)} in {folder}, and {tuple(parameters[name].shape)} by its config; "
                "download it again"
            )
    used = {id(tensor) for tensor in weights.values()}
    unused = sorted(name for name, tensor in tensors.items() if id(tensor) not in used and name not in parameters)
    if unused:
        text = f"{len(unused)} tensors of {folder} belong to no part of {type(model).__name__}: {', '.join(unused[:4])}"
        warnings.warn(text, TorchquantWarning, stacklevel=4)
    return weights


def put_weights(exported: GraphModule, weights: Mapping[str, Tensor], prefix: str = "model.") -> None:
    """Let a graph read weights from files in the place of its parameters, in place.

    Args:
        weights: by the names of the model's parameters. prefix: of them in the graph.
    """
    for node in list(exported.graph.find_nodes(op="get_attr")):
        weight = weights.get(str(node.target).removeprefix(prefix))
        owner, _, leaf = str(node.target).rpartition(".")
        module = exported.get_submodule(owner)
        if weight is None or leaf not in module._parameters:
            continue
        module._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
        value = node.meta["val"]
        if value.dtype != weight.dtype:
            _widen(exported, node, value, weight.dtype)
    exported.recompile()


def _widen(exported: GraphModule, node: Node, value: Any, stored: torch.dtype) -> None:
    readers = list(node.users)
    with exported.graph.inserting_before(min(readers)):
        wide = exported.graph.call_function(torch.ops.torchquant.widen.default, (node, value.dtype))
    wide.meta = {**node.meta, "val": value}
    with value.fake_mode:
        node.meta["val"] = value.to(stored)
    for reader in readers:
        reader.replace_input_with(node, wide)
