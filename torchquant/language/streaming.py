"""Language models that are larger than memory: from a folder on disk to another, weight by weight."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from torchquant.calibration.calibrate import calibrate
from torchquant.errors import ArtifactError, InputError, SchemeError
from torchquant.files.shelf import shelf
from torchquant.flow import QuantizerLike, check_quantizer, convert, optimize, prepare
from torchquant.fx import ops, passes
from torchquant.fx.reading import observers
from torchquant.language.checkpoints import Checkpoint
from torchquant.language.export import export_causal_lm
from torchquant.language.mapped import mapped_checkpoint, put_weights
from torchquant.language.saving import FORMATS, Format, SavedCheckpoint, save_causal_lm
from torchquant.solving.contract import Algorithm, Transform

__all__ = ["quantize_checkpoint"]

_FEW_TOKENS = 8  # on which the result is held against the graph, where there are no others


def quantize_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    quantizer: QuantizerLike,
    *,
    format: Format = "gguf",
    type: str | None = None,
    algorithms: Sequence[Algorithm] = (),
    tokens: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    memory_bytes: int = 1 << 30,
    checkpoint: str | os.PathLike[str] | None = None,
    exclude: Sequence[str] = (),
    seed: int = 0,
    pre_tokenizer: str | None = None,
    progress: bool = True,
) -> SavedCheckpoint:
    """Quantize a language model that memory cannot hold, from a folder of safetensors to a file of another runtime.

    The codes are those of `optimize` and `convert` in memory, bit by bit; docs/language.md says what memory and the
    disk of `destination` must hold.

    Args:
        source: folder with `config.json` and `.safetensors` files with float weights.
        destination, format, type, pre_tokenizer: as for `save_causal_lm`.
        quantizer: any torchao Quantizer.
        algorithms: solvers that go layer by layer, such as `GPTQ()`; none rounds to the nearest codes.
        tokens: int64 (windows, length): calibration data, which solvers and static activations need.
        dtype: in which the network computes, whatever the weights are stored in.
        memory_bytes, checkpoint, exclude, seed, progress: as for `optimize`.

    Raises:
        InputError: the source is no such folder; tokens are missing, or out of the vocabulary; an algorithm needs the
            whole network in memory.
        SchemeError: the format cannot hold the model or one of its weights.
        ArtifactError: the source is damaged, or the destination cannot be written; nothing is left behind.
        MissingDependencyError: transformers or gguf is not installed.
    """
    place = Path(destination)
    _check(place, quantizer, algorithms, tokens, format)
    options = {"memory_bytes": memory_bytes, "checkpoint": checkpoint, "exclude": exclude, "seed": seed}
    with shelf(place.parent):
        source = Path(source)
        model, converted = _converted(source, place.parent, quantizer, algorithms, tokens, dtype, progress, options)
        return save_causal_lm(converted, model, place, format, type=type, pre_tokenizer=pre_tokenizer)


def _converted(
    source: Path,
    workspace: Path,
    quantizer: Any,
    algorithms: Sequence[Algorithm],
    tokens: Tensor | None,
    dtype: torch.dtype,
    progress: bool,
    options: Mapping[str, Any],
) -> tuple[Checkpoint, GraphModule]:
    """The checkpoint, its model without weights, and the converted graph."""
    model = mapped_checkpoint(source, dtype, workspace)
    batches = _batches(tokens, model.checkpoint)
    exported = export_causal_lm(model.checkpoint.model, _FEW_TOKENS if tokens is None else max(2, tokens.shape[1]))
    put_weights(exported, model.weights)
    prepared = prepare(exported, quantizer)
    _observe(prepared, batches, progress)
    if algorithms:
        optimize(prepared, batches, algorithms, progress=progress, **options)
    return model.checkpoint, convert(prepared)


def _check(place: Path, quantizer: object, algorithms: Sequence[Algorithm], tokens: Tensor | None, format: str) -> None:
    """Raise for what would fail only after hours."""
    check_quantizer(quantizer)
    if format not in FORMATS:
        raise SchemeError(f"{format!r} is no format that is written; there are {', '.join(FORMATS)}")
    if format == "gguf" and place.is_dir():
        raise ArtifactError(f"cannot write {place}: it is a folder, and GGUF is a file")
    if format != "gguf" and place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ArtifactError(f"cannot write {place}: {format} is a new or an empty folder")
    for algorithm in algorithms:
        if isinstance(algorithm, Transform):
            raise InputError(
                f"{algorithm.__class__.__name__} rewrites float weights, so that all of them would be in memory; "
                "leave it out, or quantize in memory: load_causal_lm, optimize, save_causal_lm"
            )
    if algorithms and tokens is None:
        raise InputError("algorithms need calibration data: tokens=, int64 (windows, length)")
    if tokens is not None and not (isinstance(tokens, Tensor) and tokens.dtype == torch.int64 and tokens.ndim == 2):
        what = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else f"{tokens!r:.80}"
        raise InputError(f"tokens are int64 (windows, length), not {what}")
    if tokens is not None and 0 in tokens.shape:
        raise InputError(f"tokens of shape {tuple(tokens.shape)} hold none: give a window at least")


def _batches(tokens: Tensor | None, checkpoint: Checkpoint) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A batch for each window."""
    if tokens is None:
        return []
    low, high, size = int(tokens.min()), int(tokens.max()), checkpoint.model.get_input_embeddings().num_embeddings
    if low < 0 or high >= size:
        raise InputError(f"token id {low if low < 0 else high} is out of the vocabulary of {size}")
    places = torch.arange(tokens.shape[1])
    return [(window[None], places, places) for window in tokens]


def _observe(prepared: GraphModule, batches: Sequence[Any], progress: bool) -> None:
    """Let observers see what they need: data where activations are static, else each weight once."""
    static = {node for node, _ in passes.static_observers(prepared)}
    if any(not ops.is_constant(node.args[0]) for node in static):  # type: ignore[arg-type]
        if not batches:
            raise InputError("the Quantizer has static activations, which need calibration data: tokens=")
        calibrate(prepared, batches, progress=progress)
        return
    for node, observer in observers(prepared):
        source = node.args[0]
        seen = getattr(getattr(observer, "activation_post_process", observer), "observes_weight", False)
        if not seen and ops.is_constant(source):  # type: ignore[arg-type]
            observer(ops.constant_value(prepared, source))  # type: ignore[arg-type]
