"""QDQ models: written, run by ONNX Runtime as they stand and with its kernels, integer kernels counted, held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from torchquant.artifacts.program import Metadata
from torchquant.backends.onnx_qdq.capabilities import TARGET
from torchquant.backends.onnx_qdq.exporting import to_onnx
from torchquant.backends.onnx_qdq.kernels import read_kernels
from torchquant.backends.onnx_qdq.packages import exporting_packages, runtime_package
from torchquant.backends.onnx_qdq.program import OnnxProgram, Stored, with_metadata
from torchquant.backends.onnx_qdq.sessions import Session, optimized
from torchquant.backends.onnx_qdq.twice import RunTwice
from torchquant.errors import LoweringError
from torchquant.fx.flat import Flat
from torchquant.fx.signature import Signature
from torchquant.lowering import skeleton
from torchquant.lowering.skeleton import Artefact, Cases, Run, Stage

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


class _OnnxLowering(RunTwice[OnnxProgram]):
    """A model for any runtime of ONNX, proven in ONNX Runtime on the CPU."""

    target = TARGET
    runtime, plainly = "ONNX Runtime", "as it stands"

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
        self._stored = Stored.of(to_onnx(reference.graph, cases[0]).model)
        stage("counting ONNX Runtime's kernels")
        graph, session = optimized(self._stored.loadable())
        return self.counted(session, read_kernels(graph, self.compute), reference.graph)

    def plain(self) -> Run:
        return Session(self._stored.loadable(), optimize=False)

    def written_and_run(self, graph: GraphModule, *, plain: bool) -> Run:
        return Session(Stored.of(to_onnx(graph, self._case).model).loadable(), optimize=not plain)

    def finish(self, about: Metadata) -> OnnxProgram:
        stored = self._stored
        if stored.weights is None:
            stored = Stored(with_metadata(stored.content, about))
        return OnnxProgram(stored, about)
