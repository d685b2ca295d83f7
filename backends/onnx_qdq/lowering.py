"""QDQ models: written, run by ONNX Runtime as they stand and with its kernels, integer kernels counted, held."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from torchquant.artifacts.program import Metadata
from torchquant.backends.onnx_qdq.capabilities import REDUCED, TARGET, adds_without_overflow
from torchquant.backends.onnx_qdq.exporting import to_onnx
from torchquant.backends.onnx_qdq.kernels import Kernels, read_kernels
from torchquant.backends.onnx_qdq.packages import exporting_packages, runtime_package
from torchquant.backends.onnx_qdq.program import OnnxProgram, Stored, with_metadata
from torchquant.backends.onnx_qdq.sessions import Session, optimized
from torchquant.errors import LoweringError, TorchquantWarning
from torchquant.fx.flat import Flat
from torchquant.fx.signature import Signature
from torchquant.lowering import skeleton
from torchquant.lowering.accounts import names
from torchquant.lowering.proof import Verdict
from torchquant.lowering.skeleton import Artefact, Cases, Hold, Lowering, Run, Stage
from torchquant.types import Site

__all__ = ["lower"]

_NUMPY_HAS_NONE = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def lower(
    quantized: GraphModule,
    example_inputs: Any = None,
    *,
    allow_float: Sequence[str] = (),
    min_sqnr_db: float | None = None,
    progress: bool = True,
) -> OnnxProgram:
    """Write a converted graph as an ONNX model with QuantizeLinear and DequantizeLinear, and prove it in ONNX Runtime.

    The model is run twice: each operator as it stands, which proves the translation for any runtime, and with ONNX
    Runtime's own kernels, of which those in integers are counted. What has codes, yet runs in float there, is warned of
    and in the report with the reason; the file has its codes all the same. The graph is not changed.

    Args:
        quantized: what `convert_pt2e` returned, of any Quantizer.
        example_inputs: one batch to prove it with; made up from the input shapes if None.
        allow_float: patterns of annotated ops that the file shall have in float.
        min_sqnr_db: how close each output must be to the converted graph's on `example_inputs`; None: as
            `torchquant.lowering.proof.hold_against` says.
        progress: show on stderr what is being done.

    Raises:
        MissingDependencyError: the extra `onnx` is not installed.
        InputError: the graph is not converted, or `example_inputs` does not fit it.
        LoweringError: something is quantized in a way that ONNX has no op for, torch cannot write the graph as ONNX, or
            ONNX Runtime cannot run it or computes something else.
    """
    return skeleton.lower(
        _OnnxLowering(),
        quantized,
        example_inputs,
        allow_float=allow_float,
        min_sqnr_db=min_sqnr_db,
        progress=progress,
    )


class _OnnxLowering(Lowering[OnnxProgram]):
    """A model for any runtime of ONNX, proven in ONNX Runtime on the CPU."""

    target = TARGET
    op_error = 1e-6  # ONNX Runtime approximates exp, erf and tanh

    def require(self, quantized: GraphModule) -> None:
        exporting_packages()
        runtime_package()

    def refuse(self, quantized: GraphModule) -> None:
        for spec in Signature.of(quantized).tensors:
            if spec.dtype in map(str, _NUMPY_HAS_NONE):
                raise LoweringError(
                    f"onnx_qdq: input {spec.name!r} is {spec.dtype}, which ONNX Runtime takes from no Python program; "
                    "export a float32 model"
                )

    def build(self, reference: Flat, cases: Cases, stage: Stage) -> Artefact:
        self._case = cases[0]
        stage("writing the ONNX model")
        exported = to_onnx(reference.graph, cases[0])
        self._stored = Stored.of(exported.model)
        stage("counting ONNX Runtime's kernels")
        graph, session = optimized(self._stored.loadable())
        self._kernels: Kernels = read_kernels(graph, self.compute)
        _warn_of_float([s for s in self.compute if s.node in self._kernels.why], self._kernels)
        return Artefact(session, self._kernels.counts, len(self._kernels.integer), reference.graph)

    def account(self) -> tuple[Site, ...]:
        why = self._kernels.why
        return tuple(replace(s, status="unsupported", reason=why[s.node]) if s.node in why else s for s in self.sites)

    def build_again(self, graph: GraphModule) -> Run:
        return Session(Stored.of(to_onnx(graph, self._case).model).loadable(), optimize=not self._as_it_stands)

    def hold(self, hold: Hold, artefact: Artefact) -> Verdict:
        """As it stands, then with the kernels: what fails in the second alone is the runtime's or the CPU's."""
        self._as_it_stands = True
        translation = hold(artefact.graph, Session(self._stored.loadable(), optimize=False), build=self.build_again)
        self._as_it_stands = False
        try:
            verdict = hold(artefact.graph, artefact.run, build=self.build_again)
        except LoweringError as error:
            raise LoweringError(f"{error}\n{_advice(translation)}") from error
        said = f"{translation.comparison.sqnr_db:.1f} dB with each operator as it stands"
        return replace(verdict, reason="; ".join(filter(None, (verdict.reason, said))))

    def finish(self, about: Metadata) -> OnnxProgram:
        stored = self._stored
        if stored.weights is None:
            stored = Stored(with_metadata(stored.content, about))
        return OnnxProgram(stored, about)


def _advice(translation: Verdict) -> str:
    level = translation.comparison.sqnr_db
    text = f"The translation is right ({level:.1f} dB with each operator as it stands): ONNX Runtime's kernels are off."
    if adds_without_overflow():
        return text
    return (
        f"{text} This CPU has no VNNI, and there they add products of bytes in 16 bits, which overflow: quantize with "
        f'OnnxQuantizer("static_int8{REDUCED}"), whose weights have 7 bits, or run the file on another CPU.'
    )


def _warn_of_float(sites: Sequence[Site], kernels: Kernels) -> None:
    if sites:
        reasons = "; ".join(sorted({kernels.why[s.node] for s in sites}))
        warnings.warn(
            f"onnx_qdq: {len(sites)} ops have codes in the file, yet ONNX Runtime computes them in float: "
            f"{names(sites)}. {reasons}. OnnxQuantizer annotates what it runs in integers.",
            TorchquantWarning,
            stacklevel=6,
        )
