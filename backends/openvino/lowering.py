"""A converted graph as OpenVINO's IR, by way of ONNX; run in float and with int8 layers, which are counted; held."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from torchquant.artifacts.program import Metadata
from torchquant.backends.onnx_qdq.exporting import Exported, to_onnx
from torchquant.backends.onnx_qdq.packages import exporting_packages
from torchquant.backends.openvino.capabilities import TARGET
from torchquant.backends.openvino.models import Compiled, Layers, openvino_package, read_layers
from torchquant.backends.openvino.program import Ir, OpenvinoProgram
from torchquant.errors import LoweringError, TorchquantWarning
from torchquant.fx.flat import Flat
from torchquant.fx.signature import Signature
from torchquant.lowering import skeleton
from torchquant.lowering.accounts import names
from torchquant.lowering.proof import Verdict
from torchquant.lowering.skeleton import Artefact, Cases, Hold, Lowering, Run, Stage
from torchquant.types import Site

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


class _OpenvinoLowering(Lowering[OpenvinoProgram]):
    """An IR, proven in OpenVINO's CPU plugin."""

    target = TARGET
    op_error = 1e-6

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
        self._layers: Layers = read_layers(compiled, self.compute, exported.sites)
        _warn_of_float([s for s in self.compute if s.node in self._layers.why], self._layers)
        return Artefact(compiled, self._layers.counts, len(self._layers.integer), reference.graph)

    def account(self) -> tuple[Site, ...]:
        why = self._layers.why
        return tuple(replace(s, status="unsupported", reason=why[s.node]) if s.node in why else s for s in self.sites)

    def build_again(self, graph: GraphModule) -> Run:
        return Compiled(_read(to_onnx(graph, self._case)), integers=self._integers)

    def hold(self, hold: Hold, artefact: Artefact) -> Verdict:
        """In float, then with int8 layers."""
        self._integers = False
        translation = hold(artefact.graph, Compiled(self._model, integers=False), build=self.build_again)
        self._integers = True
        level = f"{translation.comparison.sqnr_db:.1f} dB with each operator in float"
        try:
            verdict = hold(artefact.graph, artefact.run, build=self.build_again)
        except LoweringError as error:
            advice = self.target.here()[1] or "report it, or exclude the ops it names"
            text = f"{error}\nThe translation is right ({level}): OpenVINO's int8 layers are off; {advice}."
            raise LoweringError(text) from error
        return replace(verdict, reason="; ".join(filter(None, (verdict.reason, level))))

    def finish(self, about: Metadata) -> OpenvinoProgram:
        return OpenvinoProgram(Ir.of(self._model).known_as(about), about)


def _read(exported: Exported) -> Any:
    try:
        return openvino_package().Core().read_model(model=exported.model.SerializeToString())
    except RuntimeError as error:
        raise LoweringError(f"OpenVINO does not read the model: {' '.join(str(error).split())[:1500]}") from error


def _warn_of_float(sites: Sequence[Site], layers: Layers) -> None:
    if sites:
        reasons = "; ".join(sorted({layers.why[s.node] for s in sites}))
        warnings.warn(
            f"openvino: {len(sites)} ops have codes in the file, yet OpenVINO computes them in float: {names(sites)}. "
            f"{reasons}.",
            TorchquantWarning,
            stacklevel=6,
        )
