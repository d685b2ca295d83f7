"""The Quantizers that the benchmarks compare: ours and those of torchao and ExecuTorch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from networks import Batch
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import torchquant as tq
from torchquant.backends import executorch_xnnpack, inductor_x86
from torchquant.program import Program
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer

__all__ = ["QUANTIZERS", "Candidate", "lower", "quantize"]


def _torchao_x86(dynamic: bool = False) -> X86InductorQuantizer:
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_dynamic=dynamic))


def _executorch_xnnpack(dynamic: bool = False) -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic))


@dataclass(frozen=True)
class Candidate:
    """A Quantizer as its users would call it.

    Args:
        name: for the tables.
        make: builds the Quantizer.
        backend: the module of ours that lowers it; None for a peer, which is measured by its own flow.
        strict: how to export for it; source-partition Quantizers see `nn.Conv2d` subclasses only if strict.
        transformers_only: no sense on a CNN.
        algorithms: of ours, applied after calibration.
    """

    name: str
    make: Callable[[], Any]
    backend: ModuleType | None = None
    strict: bool = False
    transformers_only: bool = False
    algorithms: tuple[tq.BiasCorrection, ...] = ()


QUANTIZERS: dict[str, Candidate] = {
    "x86": Candidate("X86Quantizer", X86Quantizer, inductor_x86),
    "x86_bias": Candidate(
        "X86Quantizer + BiasCorrection", X86Quantizer, inductor_x86, algorithms=(tq.BiasCorrection(),)
    ),
    "x86_dynamic": Candidate(
        "X86Quantizer dynamic_int8", lambda: X86Quantizer("dynamic_int8"), inductor_x86, transformers_only=True
    ),
    "xnnpack": Candidate("XnnpackQuantizer (auto)", XnnpackQuantizer, executorch_xnnpack),
    "xnnpack_bias": Candidate(
        "XnnpackQuantizer (auto) + BiasCorrection",
        XnnpackQuantizer,
        executorch_xnnpack,
        algorithms=(tq.BiasCorrection(),),
    ),
    "xnnpack_static": Candidate(  # what `auto` is on a CNN
        "XnnpackQuantizer static_int8",
        lambda: XnnpackQuantizer("static_int8"),
        executorch_xnnpack,
        transformers_only=True,
    ),
    "torchao_x86": Candidate("torchao X86InductorQuantizer (strict export)", _torchao_x86, strict=True),
    "torchao_x86_nonstrict": Candidate("torchao X86InductorQuantizer (default export)", _torchao_x86),
    "torchao_x86_dynamic": Candidate(
        "torchao X86InductorQuantizer dynamic (strict export)",
        lambda: _torchao_x86(dynamic=True),
        strict=True,
        transformers_only=True,
    ),
    "et_xnnpack": Candidate("ExecuTorch XNNPACKQuantizer", _executorch_xnnpack),
    "et_xnnpack_dynamic": Candidate(
        "ExecuTorch XNNPACKQuantizer dynamic", lambda: _executorch_xnnpack(dynamic=True), transformers_only=True
    ),
}


def quantize(
    candidate: Candidate, model: torch.nn.Module, calibration: Sequence[Batch], dynamic_shapes: Any = None
) -> GraphModule:
    """Export, calibrate and convert: ours by `torchquant.quantize`, a peer's Quantizer by torchao's own calls."""
    if candidate.backend is not None:
        converted: GraphModule = tq.quantize(
            model,
            calibration[0],
            calibration,
            quantizer=candidate.make(),
            algorithms=candidate.algorithms,
            dynamic_shapes=dynamic_shapes,
            progress=False,
        )
        return converted
    exported = torch.export.export(model, calibration[0], dynamic_shapes=dynamic_shapes, strict=candidate.strict)
    prepared = prepare_pt2e(exported.module(), candidate.make())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in calibration:
            prepared(*batch)
        return convert_pt2e(prepared)


def lower(backend: ModuleType, converted: GraphModule, example: Batch) -> tuple[Program | None, str]:
    """Our artefact, and why `lower` first refused it, if it did: then it is built without the bound on its SQNR."""
    try:
        return backend.lower(converted, example), ""
    except tq.TorchquantError as error:
        refusal = f"{type(error).__name__}: {str(error)[:300]}"
    try:
        return backend.lower(converted, example, min_sqnr_db=-math.inf), refusal
    except tq.TorchquantError as error:
        return None, f"{type(error).__name__}: {str(error)[:300]}"
