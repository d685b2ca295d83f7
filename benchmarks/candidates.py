"""The Quantizers that the benchmarks compare: ours and those of torchao and ExecuTorch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar

import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from networks import Batch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import torchquant as tq
from torchquant.artifacts.program import Program
from torchquant.backends import executorch_xnnpack, inductor_cuda, inductor_x86
from torchquant.fx import ops
from torchquant.observers import ranges
from torchquant.quantizers.cuda import CudaQuantizer
from torchquant.quantizers.weight_only import WeightOnlyQuantizer
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer
from torchquant.solving.results import Optimization
from torchquant.types import Format, Scheme, TensorSpec

__all__ = ["ALGORITHMS", "QUANTIZERS", "Candidate", "LowBitQuantizer", "lower", "quantize"]


def _torchao_x86(dynamic: bool = False) -> X86InductorQuantizer:
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_dynamic=dynamic))


def _torchao_x86_with(observer: Any) -> X86InductorQuantizer:
    """torchao's Quantizer with another observer for activations."""
    config = get_default_x86_inductor_quantization_config()
    activation = replace(config.input_activation, observer_or_fake_quant_ctr=observer)
    return X86InductorQuantizer().set_global(replace(config, input_activation=activation))


def _executorch_xnnpack(dynamic: bool = False, per_channel: bool = True) -> XNNPACKQuantizer:
    config = get_symmetric_quantization_config(is_per_channel=per_channel, is_dynamic=dynamic)
    return XNNPACKQuantizer().set_global(config)


def _low_bit(weight_bits: int, activation_bits: int, name: str) -> Scheme:
    weight_high, activation_high = 2 ** (weight_bits - 1) - 1, 2**activation_bits - 1
    return Scheme(
        name,
        TensorSpec(Format(f"uint{activation_bits}", torch.uint8, 0, activation_high), symmetric=False),
        TensorSpec(
            Format(f"int{weight_bits}", torch.int8, -weight_high - 1, weight_high),
            symmetric=True,
            granularity="channel",
        ),
    )


class LowBitQuantizer(X86Quantizer):
    """X86Quantizer with fewer bits, as accuracy studies use it; no kernel of the target runs these.

    Args:
        weight_bits: symmetric, per channel. activation_bits: affine, per tensor.
        edge_bits: of weights and activations of the first and the last weighted op; None: as the others.
    """

    capabilities = tuple(
        replace(row, schemes=(*row.schemes, "edge")) if "static_int8" in row.schemes else row
        for row in X86Quantizer.capabilities
    )
    schemes: ClassVar = {name: _low_bit(8, 8, name) for name in ("static_int8", "edge")}

    def __init__(self, weight_bits: int, activation_bits: int, edge_bits: int | None = None) -> None:
        super().__init__()
        edge = (edge_bits, edge_bits) if edge_bits else (weight_bits, activation_bits)
        self.schemes = {
            "static_int8": _low_bit(weight_bits, activation_bits, "static_int8"),
            "edge": _low_bit(*edge, "edge"),
        }
        self._edges: set[Node] = set()

    def annotate(self, model: GraphModule) -> GraphModule:
        """Find the first and the last weighted op, then annotate."""
        weighted = [n for n in model.graph.nodes if ops.op_name(n) in ("conv2d", "linear")]
        self._edges = {weighted[0], weighted[-1]} if weighted else set()
        return super().annotate(model)

    def scheme_for(self, node: Node, scheme: str) -> tuple[str, str]:
        """Edges have a scheme of their own."""
        return ("edge", "") if node in self._edges else (scheme, "")


ALGORITHMS: dict[str, Callable[[], list[Any]]] = {
    "none": list,
    "bias": lambda: [tq.BiasCorrection()],
    "batch_norm": lambda: [tq.BatchNormReestimation()],
    "equalize": lambda: [tq.CrossLayerEqualization()],
    "smooth": lambda: [tq.SmoothQuant()],
    "ranges": lambda: [tq.RangeSearch()],
    "seq_mse": lambda: [tq.SeqMSE()],
    "gptq": lambda: [tq.GPTQ()],
    "hqq": lambda: [tq.HQQ()],
    "awq": lambda: [tq.AWQ(), tq.SeqMSE()],
    "awq_explicit": lambda: [tq.AWQ(explicit=True), tq.SeqMSE()],
    "awq_explicit+gptq": lambda: [tq.AWQ(explicit=True), tq.GPTQ()],
    "llm_int8": lambda: [tq.LLMInt8()],
    "gptq+bias": lambda: [tq.GPTQ(), tq.BiasCorrection()],
    "gptq_paper": lambda: [tq.GPTQ(search=False, sweeps=0, refits=0, correct_bias=False, compensate=False, damp=0.01)],
    "adaround": lambda: [tq.AdaRound()],
    "auto_round": lambda: [tq.AutoRound()],
    "auto_round_60": lambda: [tq.AutoRound(60)],
    "gptq_places": lambda: [tq.GPTQ(weigh_places=True)],
    "adaround_paper": lambda: [tq.AdaRound(search=False, refits=0, sweeps=0, correct_bias=False, compensate=False)],
    "adaround_sensitive": lambda: [tq.AdaRound(sensitive=True)],
    "adaquant": lambda: [tq.AdaQuant()],
    "brecq": lambda: [tq.BRECQ()],
    "qdrop": lambda: [tq.QDrop()],
    "ranges+adaround": lambda: [tq.RangeSearch(), tq.AdaRound()],
    "ranges+brecq": lambda: [tq.RangeSearch(), tq.BRECQ()],
    "ranges+qdrop": lambda: [tq.RangeSearch(), tq.QDrop()],
    "smooth+adaround": lambda: [tq.SmoothQuant(), tq.AdaRound()],
    "smooth+ranges": lambda: [tq.SmoothQuant(), tq.RangeSearch()],
    "smooth+ranges+adaround": lambda: [tq.SmoothQuant(), tq.RangeSearch(), tq.AdaRound()],
}


OBSERVERS: dict[str, Any] = {
    "percentile": ranges.ActivationPercentile,
    "entropy": ranges.ActivationEntropy,
    "MSE": ranges.ActivationMSE,
    "L2.4": ranges.ActivationMSE.with_args(p=2.4),
}


@dataclass(frozen=True)
class Candidate:
    """A Quantizer as its users would call it.

    Args:
        name: for the tables.
        make: builds the Quantizer.
        backend: the module of ours that lowers it; None for a peer, which is measured by its own flow.
        strict: how to export for it; source-partition Quantizers see `nn.Conv2d` subclasses only if strict.
        transformers_only: no sense on a CNN.
    """

    name: str
    make: Callable[[], Any]
    backend: ModuleType | None = None
    strict: bool = False
    transformers_only: bool = False


QUANTIZERS: dict[str, Candidate] = {
    "x86": Candidate("X86Quantizer", X86Quantizer, inductor_x86),
    "x86_w7": Candidate("X86Quantizer weights=7", lambda: X86Quantizer(weights=7), inductor_x86),
    "x86_dynamic": Candidate(
        "X86Quantizer dynamic_int8", lambda: X86Quantizer("dynamic_int8"), inductor_x86, transformers_only=True
    ),
    "xnnpack": Candidate("XnnpackQuantizer (auto)", XnnpackQuantizer, executorch_xnnpack),
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
    "et_xnnpack_tensor": Candidate(
        "ExecuTorch XNNPACKQuantizer, weights per tensor", lambda: _executorch_xnnpack(per_channel=False)
    ),
    **{
        f"torchao_x86_{name}": Candidate(
            f"torchao X86InductorQuantizer, {name} observer (strict export)",
            lambda observer=observer: _torchao_x86_with(observer),  # type: ignore[misc]
            strict=True,
        )
        for name, observer in OBSERVERS.items()
    },
    **{
        scheme: Candidate(
            f"WeightOnlyQuantizer {scheme}",
            lambda scheme=scheme: WeightOnlyQuantizer(scheme, exclude=["op:embedding"]),  # type: ignore[misc]
            transformers_only=True,
        )
        for scheme in ("w4_g128", "w4_g64", "w3_g128", "w3_g64", "w2_g64")
    },
    **{
        f"cuda_{scheme}": Candidate(
            f"CudaQuantizer {scheme}",
            lambda scheme=scheme: CudaQuantizer(scheme),  # type: ignore[misc]
            inductor_cuda,
        )
        for scheme in inductor_cuda.SCHEMES
    },
    "w4a8": Candidate("W4A8", lambda: LowBitQuantizer(4, 8)),
    "w3a8": Candidate("W3A8", lambda: LowBitQuantizer(3, 8)),
    "w2a8_edges8": Candidate("W2A8, first and last 8 bits", lambda: LowBitQuantizer(2, 8, 8)),
    "w4a4_edges8": Candidate("W4A4, first and last 8 bits", lambda: LowBitQuantizer(4, 4, 8)),
}


def quantize(
    candidate: Candidate,
    model: torch.nn.Module,
    calibration: Sequence[Batch],
    dynamic_shapes: Any = None,
    algorithms: Sequence[Any] = (),
) -> tuple[GraphModule, Optimization | None]:
    """Export, calibrate, optimize and convert: a peer's Quantizer by torchao's own calls."""
    if candidate.backend is not None:
        exported = tq.export(model, calibration[0], dynamic_shapes=dynamic_shapes)
        prepared = tq.prepare(exported, candidate.make())
        tq.calibrate(prepared, calibration, progress=False)
    else:
        exported = torch.export.export(
            model, calibration[0], dynamic_shapes=dynamic_shapes, strict=candidate.strict
        ).module()
        prepared = prepare_pt2e(exported, candidate.make())
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for batch in calibration:
                prepared(*batch)
    result = tq.optimize(prepared, calibration, algorithms, progress=False) if algorithms else None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tq.convert(prepared) if candidate.backend is not None else convert_pt2e(prepared), result


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
