"""A converted graph as OpenVINO's IR, by way of ONNX; run in float and with int8 layers, which are counted; held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from torchquant.artifacts.program import Metadata
from torchquant.backends.onnx_qdq.exporting import Exported, to_onnx
from torchquant.backends.onnx_qdq.packages import exporting_packages
from torchquant.backends.onnx_qdq.twice import RunTwice
from torchquant.backends.openvino.capabilities import TARGET
from torchquant.backends.openvino.models import Compiled, openvino_package, read_layers
from torchquant.backends.openvino.program import Ir, OpenvinoProgram
from torchquant.errors import LoweringError
from torchquant.fx.flat import Flat
from torchquant.fx.signature import Signature
from torchquant.lowering import skeleton
from torchquant.lowering.skeleton import Artefact, Cases, Run, Stage

__all__ = ["lower"]


def lower(
    quantized: GraphModule,
    example_inputs: Any = None,
    *,
    allow_float: Sequence[str] = (),
    min_sqnr_db: float | None = None,
    progress: bool = True,
) -> OpenvinoProgram:
    """Write a converted graph of any Quantizer as OpenVINO's IR, and prove it on the CPU.

    It is run twice: with each operator in float, which proves the translation, and with OpenVINO's int8 layers. The
    graph is not changed.

    Args:
        quantized, example_inputs, allow_float, min_sqnr_db, progress: as for `onnx_qdq.lower`.

    Raises:
        MissingDependencyError: the extra `openvino` is not installed.
        InputError: the graph is not converted, or `example_inputs` does not fit it.
        LoweringError: the graph cannot be written, or OpenVINO cannot run it or computes something else.
    """
    return skeleton.lower(
        _OpenvinoLowering(),
        quantized,
        example_inputs,
        allow_float=allow_float,
        min_sqnr_db=min_sqnr_db,
        progress=progress,
    )


class _OpenvinoLowering(RunTwice[OpenvinoProgram]):
    """An IR, proven in OpenVINO's CPU plugin."""

    target = TARGET
    runtime, plainly = "OpenVINO", "in float"

    def require(self, quantized: GraphModule) -> None:
        openvino_package()
        exporting_packages()

    def refuse(self, quantized: GraphModule) -> None:
        for spec in Signature.of(quantized).tensors:
            if spec.dtype == str(torch.bfloat16):
                raise LoweringError(f"openvino: input {spec.name!r} is {spec.dtype}; export a float32 model")

    def build(self, reference: Flat, cases: Cases, stage: Stage) -> Artefact:
        self._case = cases[0]
        stage("writing the model")
        exported = to_onnx(reference.graph, cases[0])
        self._model = _read(exported)
        stage("counting int8 layers")
        compiled = Compiled(self._model)
        return self.counted(compiled, read_layers(compiled, self.compute, exported.sites), reference.graph)

    def plain(self) -> Run:
        return Compiled(self._model, integers=False)

    def written_and_run(self, graph: GraphModule, *, plain: bool) -> Run:
        return Compiled(_read(to_onnx(graph, self._case)), integers=not plain)

    def finish(self, about: Metadata) -> OpenvinoProgram:
        return OpenvinoProgram(Ir.of(self._model).known_as(about), about)


def _read(exported: Exported) -> Any:
    try:
        return openvino_package().Core().read_model(model=exported.model.SerializeToString())
    except RuntimeError as error:
        raise LoweringError(f"OpenVINO does not read the model: {' '.join(str(error).split())[:1500]}") from error
